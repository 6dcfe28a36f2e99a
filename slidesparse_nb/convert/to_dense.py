"""A packed checkpoint -> the dense one with the same weights, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, packing
from ..checkpoint import Checkpoint, packed_names, read_packed, read_stacked
from ..checkpoint.safetensors import checked_path
from ..core import reference
from ..core.packed import PackedWeight
from ..core.scheme import Scheme
from ..errors import UnsupportedError, VerificationError
from .layout import Item, dense_entries, dense_item, row_ranges
from .module import Module
from .options import UNIT_BYTES, Report, Run, instance_of
from .proof import prove_copies, prove_dequantized
from .run import Conversion, output_target
from .sources import read_packed_source


def unpack_checkpoint(source: str | os.PathLike[str], out: str | os.PathLike[str], run: Run | None = None) -> Report:
    """Write a packed checkpoint back dense: 16-bit weights, or 8-bit weights and their scales as compressed-tensors names them.

    The experts of a layer get the tensor that they came from, its name and order of axes; of 8 bits they are dequantized.

    Raises:
        OperandError: `out` exists. FormatError: the source is broken. UnsupportedError: it is not packed, or a folder whose
            config.json would have to describe weights of several types.
        VerificationError: `source` is not in canonical form, or what was written does not equal it.
    """
    run, source = instance_of("run", run, Run), checked_path(source, "source")
    with Checkpoint.open(source) as checkpoint:
        weights = read_packed(checkpoint)
        if not weights:
            raise UnsupportedError(f"{source}: holds no packed weights")
        pattern = next(iter(weights.values())).pattern
        scheme = _one_type(source, checkpoint, weights)
        stacked = read_stacked(checkpoint)
        modules = [
            Module(name, w.shape, w.dtype.safetensors, w.scheme, None, tuple(packed_names(name, w)), stacked.get(name))
            for name, w in weights.items()
        ]
        target, single = output_target(source, checkpoint, out, "dense")
        said = read_packed_source(checkpoint)
        conversion = Conversion(source, checkpoint, said, target, single, modules, pattern, scheme, "dense")
        conversion.plan(lambda module: _item(checkpoint, module, weights[module.name]))
        report = conversion.report(prune="none", left_dense=dict.fromkeys(said.ignore, "not packed"), skipped={}, notes=[])

        def prove(written: Checkpoint, add: Callable[[int], None]) -> None:
            for module in modules:
                for matrix in module.matrices():
                    for first, last in row_ranges(matrix.n, _row_bytes(weights[module.name]), UNIT_BYTES):
                        _prove_rows(matrix, written, matrix.packed_matrix(weights[module.name]).rows(first, last), first, last)
                    written.release(module.weight)
                _release(checkpoint, module)
                add(sum(checkpoint.tensors[name][0].nbytes for name in module.replaced))
            replaced = [name for module in modules for name in module.replaced]
            made = [entry[0] for m in modules for entry in dense_entries(m)]
            prove_copies(written, checkpoint, replaced, made, add)

        conversion.carry_out({"unpack": __version__}, run, report, "unpacking", prove)
        return report


def _one_type(source: Path, checkpoint: Checkpoint, weights: dict[str, PackedWeight]) -> Scheme | None:
    """The type of all packed weights; None of several, which no config.json of ours describes. Raises UnsupportedError."""
    kinds = {str(w.scheme): (w.scheme, name) for name, w in weights.items()}
    if blocks := [f"{kind} ({name})" for kind, (scheme, name) in kinds.items() if scheme.blocks]:
        raise UnsupportedError(
            f"{source}: holds {blocks[0]} weights, whose block scales are of the expanded k and which have no dense form; take"
            " the dense source, or load the file and call unpack"
        )
    if len(kinds) > 1 and checkpoint.config is not None:
        told = " and ".join(f"{kind} ({name})" for kind, (_, name) in sorted(kinds.items()))
        raise UnsupportedError(
            f"{source}: holds modules of several types, {told}, and config.json can describe only one; unpack its .safetensors"
            " files one by one, which keep their types, or pack the source again with one --scheme"
        )
    return next(iter(kinds.values()))[0] if len(kinds) == 1 else None


def _row_bytes(packed: PackedWeight) -> int:
    return packed.nbytes // max(1, prod(packed.shape[:-1]))


def _item(checkpoint: Checkpoint, module: Module, packed: PackedWeight) -> Item:
    def rows(matrix: Module, first: int, last: int) -> tuple[Any, Any]:
        block = matrix.packed_matrix(packed).rows(first, last).validate(f"{matrix.name}{matrix.place}", first_row=first)
        if last == matrix.n:
            _release(checkpoint, module)
        return packing.unpack(block), block.scale

    return dense_item(module, _row_bytes(packed), rows)


def _prove_rows(matrix: Module, written: Checkpoint, block: PackedWeight, first: int, last: int) -> None:
    """The dense rows, packed again, are the packed rows; dequantized ones are the packed values times their scales."""
    dense = np.ascontiguousarray(matrix.dense_rows(written, first, last))
    try:
        if matrix.stacked is None or not matrix.scheme.scaled:
            scale = None if block.scale is None else written.array(f"{matrix.name}.weight_scale")[first:last]
            packing.verify_rows(block, dense, scale=scale, first_row=first)
        else:
            packing.verify_rows(block, first_row=first)
            prove_dequantized(matrix.label, dense, reference.unpack(block), block.scale, first)
    except VerificationError as error:
        raise VerificationError(f"{matrix.name}: {error}") from None


def _release(checkpoint: Checkpoint, module: Module) -> None:
    for name in module.replaced:
        checkpoint.release(name)
