"""What can be measured: types, models and their linear layers, and the order of cases, the most telling first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from slidesparse_nb.tuning.clock import cold_calls


@dataclass(frozen=True)
class Kind:
    """A type of weights.

    Attributes:
        key: its name in options and results.
        name: the dtype, as `pack` takes it.
        size: bytes of an element.
        activations: dtype of x and y around the product.
    """

    key: str
    name: str
    size: int
    activations: str = "bfloat16"

    @property
    def label(self) -> str:
        return self.key.upper()

    @property
    def quantized(self) -> bool:
        """Whether activations are quantized to it, with one scale a token; 16-bit activations are taken as they are."""
        return self.size == 1


KINDS = {
    kind.key: kind
    for kind in (
        Kind("fp8", "float8_e4m3fn", 1),
        Kind("int8", "int8", 1),
        Kind("bf16", "bfloat16", 2),
        Kind("fp16", "float16", 2, "float16"),
    )
}


@dataclass(frozen=True)
class Linear:
    """One linear layer: y[m, n] = x[m, k] @ w[n, k].T."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Suite:
    """Linear layers that are measured together, and added up.

    Attributes:
        tokens: the m to measure, where the suite decides; else None.
    """

    name: str
    linears: tuple[Linear, ...]
    tokens: tuple[int, ...] | None = None


class Geometry(NamedTuple):
    """Sizes of a model, from its published configuration.

    Attributes:
        inner: width of the MLP.
        head: width of an attention head.
        family: the type of model that engines know it as; None: they have it with weights of its own only.
        tied: the output head is the embedding.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocab: int
    family: str | None
    tied: bool


GEOMETRIES = {
    "llama3.2-1b": Geometry(2048, 8192, 32, 8, 64, 16, 128256, "llama", True),
    "llama3.2-3b": Geometry(3072, 8192, 24, 8, 128, 28, 128256, "llama", True),
    "qwen2.5-7b": Geometry(3584, 18944, 28, 4, 128, 28, 152064, "qwen2", False),
    "qwen2.5-14b": Geometry(5120, 13824, 40, 8, 128, 48, 152064, "qwen2", False),
    "bitnet-2b": Geometry(2560, 6912, 20, 5, 128, 30, 128256, None, True),
}
"""bitnet-2b: BitNet b1.58 2B4T."""


def transformer(name: str, of: Geometry) -> Suite:
    """One layer as engines serve it: q, k and v in one product, gate and up in one."""
    qkv, o = Linear("qkv", (of.heads + 2 * of.kv_heads) * of.head, of.hidden), Linear("o", of.hidden, of.heads * of.head)
    return Suite(name, (qkv, o, Linear("gate_up", 2 * of.inner, of.hidden), Linear("down", of.hidden, of.inner)))


MODELS = {name: transformer(name, geometry) for name, geometry in GEOMETRIES.items()}

SQUARES = tuple(Suite(f"{n} x {n} x {n}", (Linear("square", n, n),), (n,)) for n in (1024, 2048, 4096, 8192, 16384))
"""m = n = k."""

PARTS = {
    "gemm": "the product alone; x is quantized beforehand",
    "linear": "16-bit x in, 16-bit y out: quantization and product",
    "quantize": "the quantization of x alone",
    "pack": "pruning and packing of weights",
}
OURS = "ours"

ALL = "all"
"""In place of a layer: the suite's layers in turn."""

FEW_TOKENS = 12
"""Largest number of m that is a list; more are a curve: measured coarsely first, and shown thinned."""


def is_curve(tokens: Collection[int]) -> bool:
    return len(tokens) > FEW_TOKENS


def in_turn(tokens: Sequence[int]) -> list[int]:
    """The m in the order in which they are measured: few as they were named; of a curve both ends, then the middle of every
    gap, and so on, so that a run that is cut short has a coarser curve of the whole range."""
    if not is_curve(tokens):
        return list(tokens)
    ordered = sorted(tokens)
    order, gaps = [0, len(ordered) - 1], [(0, len(ordered) - 1)]
    for low, high in gaps:  # which grows meanwhile
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [ordered[i] for i in order]


@dataclass(frozen=True)
class Peer:
    """A baseline.

    Attributes:
        words: what it is, for --help.
        title: its name in tables.
        part: the part that it is measured in.
        kinds: the types that it has.
        package: what must be installed.
        sparse: whether its weights follow the pattern; dense weights are measured once for all patterns.
        late: measured after everything else of the suite and pattern, since it may take long.
    """

    words: str
    title: str
    part: str = "gemm"
    kinds: tuple[str, ...] = tuple(KINDS)
    package: str = "torch"
    sparse: bool = False
    late: bool = False


@dataclass(frozen=True)
class Case:
    """What is measured in one go: one provider on all layers of a suite.

    Attributes:
        provider: "ours" or the name of a peer.
        pattern: "6:8"; None for dense weights.
        m: tokens; None for the part "pack".
        load: "burst", each layer by itself; or "sustained", the layers in turn, over and over.
    """

    provider: str
    part: str
    suite: Suite
    kind: Kind
    pattern: str | None
    m: int | None
    load: str = "burst"

    def __str__(self) -> str:
        words = [self.suite.name, self.part, self.kind.label, self.pattern, f"m={self.m}" if self.m is not None else None]
        return " ".join(word for word in (*words, self.load, self.provider) if word)


@dataclass(frozen=True)
class Selection:
    """What a user asked for.

    Attributes:
        sustained: those of `tokens` at which products are measured under sustained load, too.
        products_only: of patterns after the first nothing but products is measured.
        budget: seconds after which no case is begun.
        engines: in which whole models are measured, and nothing else; `rounds` times each.
    """

    suites: tuple[Suite, ...]
    patterns: tuple[str, ...]
    kinds: tuple[Kind, ...]
    tokens: tuple[int, ...]
    parts: tuple[str, ...]
    peers: dict[str, Peer]
    sustained: tuple[int, ...]
    budget: float
    products_only: bool = False
    engines: tuple[str, ...] = ()
    rounds: int = 1

    def as_dict(self) -> dict[str, Any]:
        names = {"suites": [suite.name for suite in self.suites], "kinds": [kind.key for kind in self.kinds]}
        return {**vars(self), **names, "peers": list(self.peers)}


def plan(selection: Selection) -> list[Case]:
    """The cases in the order in which they are measured, so that a run that is cut short has said the most.

    For each suite the first pattern, then the others. Of each: products beside their baselines; whole linears beside theirs;
    products under sustained load; the late peers; quantization; packing. A dense baseline is measured once, whatever the
    patterns. Types come in the order named, each with all its m (`in_turn`), since weights are made once a type.
    """
    firsts, others = selection.patterns[:1], selection.patterns[1:]
    parts = ("gemm",) if selection.products_only else selection.parts
    cases = (
        case
        for suite in selection.suites
        for patterns, of in ((firsts, selection.parts), (others, [part for part in selection.parts if part in parts]))
        for case in _cases(selection, suite, patterns, of)
    )
    return list(dict.fromkeys(cases))


def _cases(selection: Selection, suite: Suite, patterns: Sequence[str], parts: Sequence[str]) -> Iterator[Case]:
    tokens = in_turn(suite.tokens or selection.tokens)

    def cases(part: str, providers: Sequence[str], ms: Sequence[int | None], load: str = "burst") -> Iterator[Case]:
        for pattern in patterns:
            for kind in selection.kinds:
                for m in ms:
                    for name in providers:
                        peer = selection.peers.get(name)
                        if peer is None or kind.key in peer.kinds:
                            at = pattern if peer is None or peer.sparse else None
                            yield Case(name, part, suite, kind, at, m, load)

    def baselines(part: str, late: bool = False) -> list[str]:
        return [name for name, peer in selection.peers.items() if (peer.part, peer.late) == (part, late)]

    for part in ("gemm", "linear"):
        if part in parts:
            yield from cases(part, [*baselines(part), OURS], tokens)
    if "linear" in parts:
        yield from cases("gemm", baselines("gemm"), tokens)  # the dense product, for linears without products
    if "gemm" in parts:
        for m in selection.sustained:
            yield from cases("gemm", [*baselines("gemm"), OURS] if m in tokens else [], [m], "sustained")
        yield from cases("gemm", baselines("gemm", late=True), tokens)
        for m in selection.sustained if patterns == selection.patterns[:1] else ():
            yield from cases("gemm", baselines("gemm", late=True) if m in tokens else [], [m], "sustained")
    for part, ms in (("quantize", tokens), ("pack", [None])):
        if part in parts:
            yield from cases(part, [OURS], ms)


# ---- calls -----------------------------------------------------------------------------------------------------------

Call = Callable[[], Any]


@dataclass
class Calls:
    """One layer of a case, ready to run.

    Attributes:
        calls: each with weights, activations and output of its own.
        check: raises VerificationError unless call number i computed the right thing.
        outputs: of the calls; filled with NaN before what `check` looks at is computed.
        rows: tokens that are really given, if not m.
        notes: what a reader must know of it.
        on_host: the calls wait for the device and are timed by the host's clock, one after the other.
    """

    calls: Sequence[Call]
    check: Callable[[int], None] = lambda i: None
    outputs: Sequence[Any] = ()
    rows: int | None = None
    notes: Sequence[str] = ()
    on_host: bool = False


class Provider(Protocol):
    """What makes calls: this library, or a baseline."""

    def prepare(self, case: Case, linear: Linear, copies: int) -> Calls:
        """`copies` calls for one layer."""

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """One CUDA graph of these calls, and what replays it on the clock's stream."""

    def release(self) -> None:
        """Forget weights, and give memory back."""


def told(error: BaseException) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].removesuffix(":")


def copies(linears: Sequence[Linear], kind: Kind, m: int | None, l2_bytes: int) -> int:
    """Calls in a graph, the same for every provider, so that 2:4 weights, the smallest, with x and y fill L2 often enough."""
    tokens = m or 0
    touched = sum(x.n * x.k * kind.size // 2 + tokens * (x.k * kind.size + 2 * x.n) for x in linears)
    return cold_calls(touched, l2_bytes)
