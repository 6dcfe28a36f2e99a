"""What to convert, how to work, and what came of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from ..core import prune as pruning
from ..core.checks import real_numbers, whole_number
from ..core.pattern import Pattern
from ..core.scheme import SCHEMES as BY_NAME
from ..core.scheme import Scheme
from ..errors import OperandError, shown

SCHEMES = ("auto", *Scheme.names())
DEFAULT_PATTERN = Pattern(6, 8)
FORMATS = ("packed", "dense")
MIN_MEMORY = 256 * 2**20
UNIT_BYTES = 2**20
"""Source bytes in one piece of work: its float32 copy stays in a core's cache."""

Progress = Callable[[str, int, int], None]
"""Called with the phase ("packing", "verifying" ...), bytes of the source done, and bytes in all."""

T = TypeVar("T")


def instance_of(name: str, value: object, kind: type[T]) -> T:
    """`value`, or what `kind` is by default in place of None. Raises OperandError for anything else."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise OperandError(f"{name}: {type(value).__name__} must be slidesparse_nb.{kind.__name__}(...)")
    return value


def settle(options: Any) -> None:
    """Bring the options of every conversion into one form: pattern, names and size of files. Raises OperandError."""
    found: dict[str, Any] = {"pattern": Pattern.of(options.pattern)}
    for name in ("targets", "ignore"):
        value = getattr(options, name)
        names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
        if not all(isinstance(each, str) for each in names):
            raise OperandError(f"{name}: {shown(value)} must be names of modules, such as 'model.layers.0.*'")
        found[name] = names
    if options.max_shard_size is not None:
        found["max_shard_size"] = whole_number("max_shard_size", options.max_shard_size, 1)
    for name, value in found.items():
        object.__setattr__(options, name, value)


@dataclass(frozen=True)
class Options:
    """Everything that decides the bytes of a packed checkpoint.

    Attributes:
        pattern: (2N-2):2N.
        scheme: "auto" keeps the source's type (float32 becomes bfloat16), or INT8_W8A8, FP8_DYNAMIC, BF16, FP16, W4A8,
            NVFP4, MXFP4 (whose pattern is over pairs of columns), or the type: int8, fp8, bf16, fp16.
        prune: none (weights that break the pattern are refused), magnitude, random (with `seed`) or wanda (by `statistics`).
        targets, ignore: which modules (exact name, glob, or "re:" regular expression).
        statistics: module -> array, of a method that needs more than the weights: real numbers [k] or [n, k]. Not compared.
        format: "packed", or "dense": pruned and quantized under the weights' own names, for engines that know no sparsity.
        max_shard_size: bytes of one output file; None for 5 GB in a folder, and for no limit in a single file.
        skip_bad: leave modules dense that cannot be packed, instead of failing.

    Raises:
        OperandError: a value is none of these.
    """

    pattern: Pattern = DEFAULT_PATTERN
    scheme: str = "auto"
    prune: str = "none"
    seed: int = 0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    format: str = "packed"
    max_shard_size: int | None = None
    skip_bad: bool = False
    statistics: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        settle(self)
        with contextlib.suppress(OperandError):  # then the check below tells
            object.__setattr__(self, "scheme", "auto" if str(self.scheme).lower() == "auto" else Scheme.of(self.scheme).name)
        if scheme := BY_NAME.get(str(self.scheme)):
            object.__setattr__(self, "pattern", scheme.pattern(self.pattern))
            if scheme.blocks and self.format == "dense":
                raise OperandError(
                    f"format: {scheme} weights have no dense form, their scales being of the expanded k; use packed"
                )
        elif self.pattern.unit > 1 and self.scheme == "auto":
            named = " or ".join(scheme.name for scheme in BY_NAME.values() if scheme.unit == self.pattern.unit)
            raise OperandError(f"pattern: {self.pattern} needs a scheme that keeps pairs; pass scheme {named}")
        for name, allowed in {"scheme": SCHEMES, "prune": tuple(pruning.PRUNERS), "format": FORMATS}.items():
            if (value := getattr(self, name)) not in allowed:
                raise OperandError(f"{name}: {value!r} must be one of {', '.join(allowed)}")
        if not isinstance(self.statistics, Mapping):
            raise OperandError(f"statistics: {type(self.statistics).__name__} must be a mapping of modules to arrays")
        if not pruning.takes_statistics(self.prune):
            pruning.require_no_statistics(self.statistics or None, self.prune)
        given = {name: real_numbers(f"statistics of {shown(name)}", a) for name, a in self.statistics.items()}
        object.__setattr__(self, "statistics", given)

    def facts(self) -> dict[str, Any]:
        """All options in plain types, to tell runs apart; of statistics, a hash of every array."""
        facts = asdict(replace(self, statistics={}))
        del facts["statistics"]
        hashes = {
            name: f"{a.dtype} {a.shape} {hashlib.sha256(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data).hexdigest()}"
            for name, a in self.statistics.items()
        }
        return {**facts, "statistics": hashes} if hashes else facts


@dataclass(frozen=True)
class Run:
    """How to work: nothing here changes a byte of the output.

    Attributes:
        max_workers: threads; None for all cores.
        max_memory: bytes that may be in use.
        resume: continue an interrupted run; harmless where there is none.
        overwrite: replace the output, if it is one of ours, and forget an unfinished run.
        verify: read everything back and prove it equal to the source before the output appears.
        progress: called as work is done.

    Raises:
        OperandError: a value out of range.
    """

    max_workers: int | None = None
    max_memory: int = 2 * 2**30
    resume: bool = False
    overwrite: bool = False
    verify: bool = True
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.max_workers is not None:
            whole_number("max_workers", self.max_workers, 1)
        if whole_number("max_memory", self.max_memory, 1) < MIN_MEMORY:
            raise OperandError(f"max_memory: {self.max_memory} bytes are too few; give at least {MIN_MEMORY >> 20} MiB")
        if self.progress is not None and not callable(self.progress):
            raise OperandError(f"progress: {type(self.progress).__name__} must be a function of (phase, done, in all)")

    @property
    def workers(self) -> int:
        """Threads, as many as asked for or as the memory allows: three units a thread are in flight, each in several copies."""
        return max(1, min(self.max_workers or os.cpu_count() or 1, self.max_memory // (64 * UNIT_BYTES)))

    def counter(self, phase: str, total: int) -> Callable[[int], None]:
        """A function that adds bytes done and reports them."""
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress(phase, done, total)

        return add


class Sized:
    """What a row of a listing is called: "4096 x 1024", or "128 x 4096 x 1024" of 128 matrices."""

    n: int
    k: int
    matrices: int

    @property
    def size(self) -> str:
        shape = (self.matrices, self.n // max(1, self.matrices), self.k)
        return " x ".join(map(str, shape if self.matrices != 1 else shape[1:]))


@dataclass(frozen=True)
class ModuleReport(Sized):
    """One packed module in numbers; sizes in bytes. n counts the rows of all its matrices."""

    name: str
    n: int
    k: int
    source: str
    stored: str
    source_bytes: int
    bytes: int
    bits_per_weight: float
    matrices: int = 1


@dataclass
class Report:
    """What a conversion did or, with `dry_run`, would do. Sizes in bytes, times in seconds.

    Attributes:
        left_dense: modules that are not packed by choice, and why. skipped: those that could not be, with `skip_bad`.
        refused: those that a real run would fail on (of a dry run); unsupported: of these, the ones of a kind that cannot be
            packed, whatever their weights are.
        packed_bytes, dense_bytes, refused_bytes, other_bytes: where the source's bytes are: in tensors that are packed, in
            matrices that stay dense, in refused ones, and in the rest (norms, biases ...). Their sum is source_bytes.
        copied_bytes: the files that go along (tokenizer ...).
        already_complete: `out` held the result before. resumed: an earlier run had done part of the work.
    """

    input: str
    output: str
    pattern: str
    scheme: str
    format: str
    prune: str
    expansion: float
    ideal_speedup: float
    modules: list[ModuleReport]
    left_dense: dict[str, str]
    skipped: dict[str, str]
    notes: list[str]
    files: list[str]
    weights: int
    source_bytes: int
    output_bytes: int
    dry_run: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    packed_bytes: int = 0
    dense_bytes: int = 0
    other_bytes: int = 0
    refused_bytes: int = 0
    copied_bytes: int = 0
    already_complete: bool = False
    resumed: bool = False
    verified: bool = False
    seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def weights_per_second(self) -> float:
        """Packed weights over the time to read, pack and write the whole checkpoint, verification apart."""
        return self.weights / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**asdict(self), "weights_per_second": self.weights_per_second}
