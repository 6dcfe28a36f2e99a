"""What is measured: types, models and their linear layers, and the order of the measurements, the most telling first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import slidesparse_nb as ss


@dataclass(frozen=True)
class Kind:
    """A type of weights.

    Attributes:
        key: how it is asked for.
        name: the dtype, as `pack` takes it.
        label: for readers.
        size: bytes of an element.
        activations: dtype of x and y around the product.
    """

    key: str
    name: str
    label: str
    size: int
    activations: str

    @property
    def quantized(self) -> bool:
        """Whether activations are quantized to it, a scale a token; 16-bit ones are taken as they are."""
        return self.size == 1


KINDS = {
    kind.key: kind
    for kind in (
        Kind("fp8", "float8_e4m3fn", "FP8", 1, "bfloat16"),
        Kind("int8", "int8", "INT8", 1, "bfloat16"),
        Kind("bf16", "bfloat16", "BF16", 2, "bfloat16"),
        Kind("fp16", "float16", "FP16", 2, "float16"),
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


def transformer(name: str, hidden: int, inner: int, heads: int, kv_heads: int, head: int) -> Suite:
    """One layer as engines serve it: q, k and v in one product, gate and up in one."""
    return Suite(
        name,
        (
            Linear("qkv", (heads + 2 * kv_heads) * head, hidden),
            Linear("o", hidden, heads * head),
            Linear("gate_up", 2 * inner, hidden),
            Linear("down", hidden, inner),
        ),
    )


MODELS = {
    suite.name: suite
    for suite in (
        transformer("llama3.2-1b", 2048, 8192, 32, 8, 64),
        transformer("llama3.2-3b", 3072, 8192, 24, 8, 128),
        transformer("qwen2.5-7b", 3584, 18944, 28, 4, 128),
        transformer("qwen2.5-14b", 5120, 13824, 40, 8, 128),
        transformer("bitnet-2b", 2560, 6912, 20, 5, 128),
    )
}
"""Sizes from the models' published configurations (bitnet-2b: BitNet b1.58 2B4T)."""

SQUARES = tuple(Suite(f"{n} x {n} x {n}", (Linear("square", n, n),), (n,)) for n in (1024, 2048, 4096, 8192, 16384))
"""m = n = k."""

PARTS = {
    "gemm": "the product alone; x is quantized beforehand",
    "linear": "16-bit x in, 16-bit y out: quantization and product",
    "quantize": "the quantization of x alone",
    "pack": "pruning and packing of weights",
}
PEERS = {
    "dense": "cuBLASLt, dense weights of the same type",
    "cusparselt": "cuSPARSELt, 2:4 weights at the slid k: the published method",
    "torch": "a dynamic 8-bit linear of PyTorch operations: scale per token, quantize, dense product",
}
OURS = "ours"

ALL = "all"
"""In place of a layer: the suite's layers in turn."""

FEW_TOKENS = 12
"""So many m are a list; more are a curve: measured coarsely first, drawn as time over m, types side by side in tables."""


def is_curve(tokens: Collection[int]) -> bool:
    """Whether these m are so many that they are shown as a curve."""
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
class Group:
    """What is measured in one go: one contender on all layers of a suite.

    Attributes:
        contender: "ours" or a key of PEERS.
        pattern: "6:8"; None for dense contenders.
        m: tokens; None for the part "pack".
        load: "burst", each layer by itself; or "sustained", the layers in turn, over and over.
    """

    contender: str
    part: str
    suite: Suite
    kind: Kind
    pattern: str | None
    m: int | None
    load: str

    def __str__(self) -> str:
        words = [self.suite.name, self.part, self.kind.label, self.pattern, f"m={self.m}" if self.m is not None else None]
        return " ".join(word for word in (*words, self.load, self.contender) if word)


@dataclass(frozen=True)
class Selection:
    """What a user asked for.

    Attributes:
        sustained: those of `tokens` at which products are measured under sustained load, too.
        products_only: patterns after the first: products, and nothing else.
    """

    suites: tuple[Suite, ...]
    patterns: tuple[str, ...]
    kinds: tuple[Kind, ...]
    tokens: tuple[int, ...]
    parts: tuple[str, ...]
    peers: tuple[str, ...]
    sustained: tuple[int, ...]
    products_only: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "suites": [suite.name for suite in self.suites],
            "patterns": list(self.patterns),
            "types": [kind.key for kind in self.kinds],
            "m": list(self.tokens),
            "parts": list(self.parts),
            "peers": list(self.peers),
            "sustained_m": list(self.sustained),
            "products_only": self.products_only,
        }


def plan(selection: Selection) -> list[Group]:
    """The groups in the order in which they are measured, so that a run that is cut short has said the most.

    For each suite the first pattern, then the others. Of each, products beside the dense peer; whole linears of the first type;
    products beside the 2:4 peer; then under sustained load, in the order in which its m were named (the first pattern's beside
    the 2:4 peer, too); then other types' linears, quantization, packing. A dense peer is measured once, whatever the patterns.
    Types in the order named, each with all its m (`in_turn`), for which weights are made once.
    """
    seen: set[tuple[object, ...]] = set()
    ordered = []
    for suite in selection.suites:
        for patterns in (selection.patterns[:1], selection.patterns[1:]):
            for group in _stages(selection, suite, patterns):
                key = (group.contender, group.part, suite.name, group.kind.key, group.pattern, group.m, group.load)
                if key not in seen:
                    seen.add(key)
                    ordered.append(group)
    return ordered


def _stages(selection: Selection, suite: Suite, patterns: Sequence[str]) -> Iterator[Group]:
    tokens = in_turn(suite.tokens or selection.tokens)
    sustained = [m for m in selection.sustained if m in tokens]
    kinds = selection.kinds
    peers, first = selection.peers, patterns == selection.patterns[:1]
    parts = selection.parts if first or not selection.products_only else [part for part in selection.parts if part == "gemm"]

    def groups(
        part: str, contenders: Sequence[str], ms: Sequence[int | None], load: str = "burst", kinds: Sequence[Kind] = kinds
    ) -> Iterator[Group]:
        for pattern in patterns:
            for kind in kinds:
                for m in ms:
                    for contender in contenders:
                        at = pattern if contender in (OURS, "cusparselt") else None
                        if contender != "torch" or kind.quantized:
                            yield Group(contender, part, suite, kind, at, m, load)

    dense, cusparselt, torch = ([peer for peer in (name,) if peer in peers] for name in ("dense", "cusparselt", "torch"))
    if "gemm" in parts:
        yield from groups("gemm", [*dense, OURS], tokens)
    if "linear" in parts:
        yield from groups("linear", [*torch, OURS], tokens, kinds=kinds[:1])
    if "gemm" in parts:
        yield from groups("gemm", cusparselt, tokens)
        for contenders in ([*dense, OURS], cusparselt if first else []):
            for m in sustained:
                yield from groups("gemm", contenders, [m], "sustained")
    if "linear" in parts:
        yield from groups("linear", [*torch, OURS], tokens, kinds=kinds[1:])
        yield from groups("gemm", dense, tokens)  # what the 16-bit linears are compared with
    if "quantize" in parts:
        yield from groups("quantize", [OURS], tokens)
    if "pack" in parts:
        yield from groups("pack", [OURS], [None])


def slid_k(pattern: str, k: int) -> int:
    """k after sliding, before any padding of a peer's."""
    return ss.Pattern.of(pattern).slid_k(k)


@dataclass(frozen=True)
class Preset:
    """What is measured where the user names nothing, and for how long at most."""

    models: tuple[str, ...]
    patterns: tuple[str, ...]
    kinds: tuple[str, ...]
    tokens: tuple[int, ...]
    parts: tuple[str, ...]
    peers: tuple[str, ...]
    sustained: tuple[int, ...]
    budget: float


QUICK = Preset(
    ("qwen2.5-7b",), ("6:8",), ("fp8", "int8", "bf16"), (16, 1024, 4096), ("gemm",), ("dense",), (), budget=50
)  # fmt: skip
FULL = Preset(
    ("qwen2.5-7b",),
    ("6:8", "2:4", "4:6", "8:10"),
    ("fp8", "int8", "bf16", "fp16"),
    (1, 16, 64, 256, 1024, 4096, 16384),
    tuple(PARTS),
    tuple(PEERS),
    (4096, 16384),
    budget=510,
)
