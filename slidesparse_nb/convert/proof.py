"""Proof that a written checkpoint holds what its source holds: tensors that are copied, and small files, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..core.reference import dequantize
from ..errors import VerificationError
from .layout import Layout, row_ranges
from .options import UNIT_BYTES


def prove_copies(
    written: Checkpoint, source: Checkpoint, replaced: Iterable[str], made: Iterable[str], add: Callable[[int], None]
) -> int:
    """Check that `written` holds every tensor of `source` but `replaced`, byte for byte, and none else but `made`; how many.

    Raises:
        VerificationError: one is missing, differs, or has no source.
    """
    gone, count = set(replaced), 0
    if extra := written.tensors.keys() - source.tensors.keys() - set(made):
        raise VerificationError(f"{min(extra)}: is in the output but not in the source")
    for name, (info, _) in source.tensors.items():
        if name in gone:
            continue
        if name not in written.tensors:
            raise VerificationError(f"{name}: is in the source but not in the output")
        other = written.tensors[name][0]
        if (other.code, other.shape) != (info.code, info.shape):
            raise VerificationError(
                f"{name}: is {info.code} {list(info.shape)} in the source, {other.code} {list(other.shape)} in the output"
            )
        for first, last in row_ranges(info.nbytes, 1, UNIT_BYTES):
            if not np.array_equal(source.raw(name, first, last), written.raw(name, first, last)):
                raise VerificationError(f"{name}: differs from the source between bytes {first} and {last - 1}")
            source.release(name, first, last)
            written.release(name, first, last)
            add(last - first)
        count += 1
    return count


def prove_dequantized(label: str, dense: Any, q: Any, scale: Any, first_row: int) -> None:
    """Check that rows of a dense tensor are stored values times scales, in its type.

    Args:
        label: what the error calls the matrix. dense, q: [rows, k], rows first_row ... of it. scale: float32 [rows, 1].

    Raises:
        VerificationError: naming the first that is not.
    """
    wanted = dequantize(q, scale).astype(dense.dtype)
    if (wrong := wanted.view(f"u{dense.itemsize}") != dense.view(f"u{dense.itemsize}")).any():
        row, column = map(int, np.argwhere(wrong)[0])
        raise VerificationError(
            f"{label}: {dense[row, column]} at row {first_row + row}, column {column} is not {wanted[row, column]}, the value"
            " times its scale"
        )


def prove_files(folder: Path, layout: Layout) -> None:
    """Check that `folder` holds the small files of `layout` byte for byte, and no other file that is not hidden.

    Raises:
        VerificationError: one is missing or differs, or another is there.
    """
    if why := next(filter(None, (file.difference(folder) for file in layout.files)), ""):
        raise VerificationError(why)
    wanted = {shard.name for shard in layout.shards} | {file.name for file in layout.files}
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = (Path(place) / name).relative_to(folder).as_posix()
            if not name.startswith(".") and path not in wanted:
                raise VerificationError(f"{path} is not in the source")
