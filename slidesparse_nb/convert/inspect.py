"""What a checkpoint holds: packed modules, or dense ones and the patterns that their weights already satisfy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import packing
from ..checkpoint import Checkpoint, packed_names, read_packed, read_stacked
from ..core.packed import PackedWeight
from ..core.pattern import known_patterns
from ..core.prune import bind
from ..core.reference import Array, prune
from ..cpu.kernels import violations
from ..errors import FormatError, UnsupportedError, VerificationError, shown
from ..packing.proof import quantized
from .kinds import not_linear
from .layout import row_ranges
from .module import Module
from .options import UNIT_BYTES, Progress, Run, Sized
from .proof import prove_copies
from .select import QUANTIZED_PARTS, SOURCE_CODES, Selection, named, select, tensor_of
from .sources import open_source


@dataclass(frozen=True)
class ModuleFacts(Sized):
    """One matrix: a packed module, a dense weight X.weight under its module's name X, or another tensor under its own.

    Attributes:
        n, k: its rows and columns; of a stack of matrices (the experts of a layer), the rows of all of them.
        matrices: how many there are.
        bytes: of its tensors: values, indices, scales.
        packed: the pattern it is packed in; None for a dense weight.
        satisfies: known patterns that a dense weight's zeros already obey, the sparsest first.
        zeros: share of weights that are zero, 0 to 1; None for a packed weight.
        reason: why a dense weight would not be packed; empty if it would.
    """

    name: str
    n: int
    k: int
    stored: str
    bytes: int
    bits_per_weight: float
    packed: str | None = None
    satisfies: tuple[str, ...] = ()
    zeros: float | None = None
    reason: str = ""
    matrices: int = 1


@dataclass
class Facts:
    """What `inspect_checkpoint` found."""

    path: str
    files: int
    tensors: int
    bytes: int
    modules: list[ModuleFacts] = field(default_factory=list)
    other_tensors: int = 0
    other_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def inspect_checkpoint(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Facts:
    """Read a checkpoint's headers and, where it is dense, its weights, to say which patterns they satisfy.

    Raises:
        FormatError: the checkpoint is broken.
    """
    with Checkpoint.open(path) as checkpoint:
        sizes = {name: info.nbytes for name, (info, _) in checkpoint.tensors.items()}
        facts = Facts(str(path), len(checkpoint.files), len(sizes), sum(sizes.values()))
        counted: set[str] = set()
        for name, packed in read_packed(checkpoint).items():
            counted.update(packed_names(name, packed))
            facts.modules.append(
                ModuleFacts(
                    name,
                    math.prod(packed.shape[:-1]),
                    packed.k,
                    packed.scheme.name if packed.scheme.blocks else packed.dtype.safetensors,
                    sum(sizes[part] for part in packed_names(name, packed)),
                    packed.bits_per_weight,
                    str(packed.pattern),
                    matrices=math.prod(packed.lead),
                )
            )
        dense, experts = _dense_matrices(checkpoint, facts, counted)
        add = Run(progress=progress).counter("reading", sum(sizes[tensor_of(checkpoint, name)] for name in dense))
        for name, why in dense.items():
            parts = [part for part in (tensor_of(checkpoint, name), f"{name}.weight_scale") if part in sizes]
            facts.modules.append(_dense_facts(checkpoint, name, why, sum(sizes[part] for part in parts), experts.get(name)))
            counted.update(parts)
            add(sizes[parts[0]])
        facts.other_tensors = len(sizes.keys() - counted)
        facts.other_bytes = sum(size for name, size in sizes.items() if name not in counted)
        return facts


def _dense_matrices(checkpoint: Checkpoint, facts: Facts, counted: set[str]) -> tuple[dict[str, str], dict[str, Module]]:
    """Every tensor of two or more dimensions that is not packed, by module or tensor name: why it would stay dense, or "".

    And the experts among those that would be packed.
    """
    selection, rest = Selection(), ""
    if not facts.modules:
        try:
            selection = select(checkpoint)
        except UnsupportedError as error:  # then no module could be packed
            facts.notes.append(str(error))
            rest = "see the note"
    bad = {name: why.partition(": ")[2] for name, why in selection.bad.items()}  # without the name that each begins with
    found = {m.name: "" for m in selection.modules} | selection.left_dense | bad
    for name, (info, _) in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if len(info.shape) >= 2 and not {name, module} & {*found, *counted} and name.rpartition(".")[2] not in QUANTIZED_PARTS:
            found[module] = (len(info.shape) == 2 and not_linear(module, info.shape)) or rest
    return found, {m.name: m for m in selection.modules if m.stacked is not None}


def _dense_facts(checkpoint: Checkpoint, name: str, reason: str, nbytes: int, experts: Module | None) -> ModuleFacts:
    """Of a dense tensor; of experts that would be packed, every matrix as it would be."""
    info = checkpoint.tensors[tensor_of(checkpoint, name)][0]
    n, k = math.prod(info.shape[:-1]), info.shape[-1]
    if experts is not None:
        n, k = experts.rows, experts.k
    patterns = known_patterns()
    zeros = 0
    readable = n * k > 0 and info.code in SOURCE_CODES and (len(info.shape) == 2 or experts is not None)
    single = [checkpoint.array(info.name)] if readable and experts is None else []
    for matrix in single if experts is None else (m.dense_array(checkpoint) for m in experts.matrices()):
        for first, last in row_ranges(len(matrix), info.nbytes // max(1, n), UNIT_BYTES):
            w = np.ascontiguousarray(matrix[first:last])
            zeros += w.size - int(np.count_nonzero(w))
            patterns = [p for p in patterns if not len(violations(w, p))] if zeros else []
            if experts is None or last == len(matrix):
                checkpoint.release(info.name)
    satisfies = tuple(str(p) for p in patterns) if readable else ()
    bits, share = 8 * nbytes / max(1, n * k), zeros / (n * k) if readable else None
    count = 1 if experts is None else experts.count
    return ModuleFacts(name, n, k, info.code, nbytes, bits, None, satisfies, share, reason, count)


@dataclass
class Verification:
    """What `verify_checkpoint` proved.

    Attributes:
        modules, weights: in packed form. copies: other tensors, equal byte for byte.
        pruned: weights of the source that are not zero and were pruned; by_magnitude: each the smallest of its group.
        rounded: weights of the source that are not zero but too small for the packed type.
    """

    modules: int = 0
    weights: int = 0
    copies: int = 0
    pruned: int = 0
    by_magnitude: bool = True
    rounded: int = 0
    against_source: bool = False


def verify_checkpoint(
    path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Verification:
    """Prove a packed checkpoint canonical and, with `source`, equal to it.

    Against its dense source: every kept weight is the source's, quantized; every dropped one stood in a group with too many
    non-zeros (whatever rule chose it; with block scales: magnitude); every other tensor is equal byte for byte.

    Raises:
        FormatError: a checkpoint is broken. UnsupportedError: `path` is not packed. VerificationError: the proof fails.
    """
    result = Verification(against_source=source is not None)
    with Checkpoint.open(path) as written:
        packed = read_packed(written)
        if not packed:
            raise UnsupportedError(f"{path}: holds no packed weights")
        total = sum(w.nbytes for w in packed.values())
        add = Run(progress=progress).counter("verifying", total)
        if source is None:
            for name, weight in packed.items():
                _each_block(written, name, weight, lambda _, block, first, last: packing.verify_rows(block, first_row=first))
                result.weights += math.prod(weight.shape)
                add(weight.nbytes)
        else:
            with open_source(source) as dense:
                _against(written, packed, dense, result, add)
        result.modules = len(packed)
    return result


def _each_block(
    written: Checkpoint, name: str, weight: PackedWeight, check: Callable[[int, PackedWeight, int, int], Any]
) -> None:
    """Call `check` on ranges of rows of every matrix, with the number of the matrix; the error it raises gets the name."""
    for i, matrix in enumerate(weight.matrices()):
        for first, last in row_ranges(matrix.n, matrix.nbytes // max(1, matrix.n), UNIT_BYTES):
            try:
                check(i, matrix.rows(first, last), first, last)
            except (FormatError, VerificationError) as error:
                raise type(error)(f"{name}{f'[{i}]' if weight.lead else ''}: {error}") from None
    for tensor in packed_names(name, weight):
        written.release(tensor)


def _against(
    written: Checkpoint, packed: dict[str, PackedWeight], dense: Checkpoint, result: Verification, add: Callable[[int], None]
) -> None:
    """Prove packed modules, and the tensors beside them, against the dense source."""
    stacked = read_stacked(written)
    for name, weight in packed.items():
        entry = stacked.get(name)
        tensor, shape = (f"{name}.weight", weight.shape) if entry is None else (entry.tensor, entry.dense_shape(weight.shape))
        if tensor not in dense.tensors or dense.tensors[tensor][0].shape != shape:
            raise VerificationError(f"{name}: the source has no weight of shape {list(shape)} named {shown(tensor)}")
    modules = named(dense, {name: weight.scheme for name, weight in packed.items()}, stacked)
    for name, weight in packed.items():
        module, matrices = modules[name], modules[name].matrices()

        def check(i: int, block: PackedWeight, first: int, last: int) -> None:
            w = matrices[i].dense_rows(dense, first, last)  # noqa: B023 (called before the loop goes on)
            scale = matrices[i].scales(dense, first, last)  # noqa: B023
            blocks = block.scheme.blocks  # of which `verify` must know how they were pruned
            if result.by_magnitude or blocks:
                try:
                    packing.verify_rows(block, w, scale=scale, prune=bind("magnitude", w.shape), first_row=first)
                except VerificationError as error:
                    if blocks:
                        raise VerificationError(f"{error}; if pruned otherwise, call verify with its seed or scores") from None
                    result.by_magnitude = False
            if not (result.by_magnitude or blocks):
                packing.verify_rows(block, w, scale=scale, prune=bind("random", w.shape, None), first_row=first)
            pruned, rounded = dropped(block, w)
            result.pruned += pruned
            result.rounded += rounded
            matrices[i].release(dense, first, last)  # noqa: B023

        _each_block(written, name, weight, check)
        dense.release(module.weight)
        result.weights += math.prod(weight.shape)
        add(weight.nbytes)
    replaced = [name for module in modules.values() for name in module.replaced]
    made = [tensor for name, weight in packed.items() for tensor in packed_names(name, weight)]
    result.copies = prove_copies(written, dense, replaced, made, lambda _: None)


def dropped(block: PackedWeight, w: Array) -> tuple[int, int]:
    """Of the non-zero source weights of these rows that are not stored: how many were pruned, how many rounded to zero."""
    kept = packing.unpack(block).astype(np.float32) != 0
    weights = w.astype(np.float32)
    gone = (weights != 0) & ~kept
    if block.scheme.blocks:
        survive = prune(weights, block.pattern) == 0  # those that lost by magnitude, the one way that is proved of them
    elif not block.scheme.scaled or w.dtype.itemsize == 1:
        with np.errstate(over="ignore"):
            survive = w.astype(block.dtype.numpy).astype(np.float32) != 0
    else:
        survive = quantized(weights, kept, block.dtype)[0].astype(np.float32) != 0
    return int(np.count_nonzero(gone & survive)), int(np.count_nonzero(gone & ~survive))
