"""A packed checkpoint -> the dense one that it stands for, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import __version__, packing
from ..checkpoint import Checkpoint, packed_names, read_packed
from ..checkpoint.safetensors import checked_path
from ..core.packed import PackedWeight
from ..core.scheme import Scheme
from ..errors import UnsupportedError, VerificationError
from .config_json import output_config, output_metadata
from .layout import Item, Piece, dense_entries, dense_pieces, output_layout, row_ranges
from .options import UNIT_BYTES, Report, Run
from .proof import prove_copies
from .run import all_items, carry_out, new_report, output_target
from .select import Module
from .sources import read_packed_source


def unpack_checkpoint(source: str | os.PathLike[str], out: str | os.PathLike[str], run: Run | None = None) -> Report:
    """Write a packed checkpoint back dense: 16-bit weights, or 8-bit weights and their scales as compressed-tensors names them.

    Raises:
        OperandError: `out` exists. FormatError: the source is broken. UnsupportedError: it is not packed, or a folder whose
            config.json would have to describe weights of several types.
        VerificationError: `source` is not in canonical form, or what was written does not equal it.
    """
    run, source = run or Run(), checked_path(source, "source")
    with Checkpoint.open(source) as checkpoint:
        weights = read_packed(checkpoint)
        if not weights:
            raise UnsupportedError(f"{source}: holds no packed weights")
        pattern = next(iter(weights.values())).pattern
        scheme = _one_type(source, checkpoint, weights)
        modules = [_module(name, packed) for name, packed in weights.items()]
        target, single = output_target(source, checkpoint, out, "dense")
        said = read_packed_source(checkpoint)
        layout = output_layout(
            all_items(checkpoint, modules, lambda module: _item(checkpoint, module, weights[module.name])),
            checkpoint,
            metadata=output_metadata(checkpoint, "dense", pattern, scheme),
            config=output_config(checkpoint, said, "dense", pattern, scheme, weights) if scheme else None,
            max_shard_size=None,
            single=target.name if single else None,
        )
        report = new_report(
            source,
            target,
            checkpoint,
            modules,
            layout,
            pattern=pattern,
            scheme=scheme,
            format="dense",
            prune="none",
            left_dense={name: "not packed" for name in said.ignore},
            skipped={},
            notes=[],
        )

        def prove(written: Checkpoint, add: Callable[[int], None]) -> None:
            for module in modules:
                for first, last in row_ranges(*_extent(weights[module.name]), UNIT_BYTES):
                    _prove_rows(module, written, weights[module.name].rows(first, last), first, last)
                _release(checkpoint, module)
                add(sum(checkpoint.tensors[name][0].nbytes for name in module.replaced))
            replaced = [name for module in modules for name in module.replaced]
            made = [entry[0] for m in modules for entry in dense_entries(m.name, m.scheme, m.shape)]
            prove_copies(written, checkpoint, replaced, made, add)

        carry_out(layout, target, single, checkpoint, {"unpack": __version__}, run, report, "unpacking", prove)
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


def _module(name: str, packed: PackedWeight) -> Module:
    return Module(name, packed.shape, packed.dtype.safetensors, packed.scheme, None, tuple(packed_names(name, packed)))


def _extent(packed: PackedWeight) -> tuple[int, int]:
    return packed.n, packed.nbytes // max(1, packed.n)


def _item(checkpoint: Checkpoint, module: Module, packed: PackedWeight) -> Item:
    def make(first: int, last: int) -> Iterator[Piece]:
        block = packed.rows(first, last).validate(module.name, first_row=first)
        yield from dense_pieces(module.name, packing.unpack(block), block.scale, first)
        if last == packed.n:
            _release(checkpoint, module)

    return Item(module.name, dense_entries(module.name, module.scheme, module.shape), *_extent(packed), make)


def _prove_rows(module: Module, written: Checkpoint, block: PackedWeight, first: int, last: int) -> None:
    """The dense rows, packed again, are the packed rows."""
    scale = None if block.scale is None else written.array(f"{module.name}.weight_scale")[first:last]
    try:
        packing.verify_rows(block, written.array(module.weight)[first:last], scale=scale, first_row=first)
    except VerificationError as error:
        raise VerificationError(f"{module.name}: {error}") from None


def _release(checkpoint: Checkpoint, module: Module) -> None:
    for name in module.replaced:
        checkpoint.release(name)
