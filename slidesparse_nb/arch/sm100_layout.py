"""Operands and descriptors of the kernel on `tcgen05.mma.sp` (cuda_src/sm100): bytes, bits and addresses. NumPy, or CuPy.

The two thread blocks of a pair multiply 256 outputs, 128 each, by a tile of tokens, half of which each loads. A k-tile is 128
expanded columns. Global memory holds what shared memory holds, so an operand of a k-tile is contiguous:

    weights      [k-tiles, row tiles of 128 outputs, blocks * 128 x 64 + 128 x 16]
                 values: a block is 128 bytes of expanded k, 64 bytes of values a row, swizzled in 64-byte rows
                 metadata: 16 bytes a row
    activations  [blocks, groups of 8 tokens, 8 x 128]: expanded k, swizzled in 128-byte rows (operand.py)

**Metadata.** `tcgen05.cp.128x128b` copies 128 rows of 16 bytes to the 128 lanes of tensor memory, four columns. For 8-bit types
they are the bytes of the packed form, `meta[row, k / 8]`, cut in tiles of 128 rows x 16 bytes: lane = row, and an instruction
reads two columns. For 16-bit types an instruction reads one column, whose lanes hold the low and the high half of the
instruction's 32 expanded columns for rows r and r + 8 (`metadata_at`).

**Order of k.** The activations of an 8-bit type are stored with 16-byte chunks in the order `operand.HALVES`, so that Hopper's
kernel can share them. Values and metadata follow: quarters of a k-tile in the order 0, 2, 1, 3.

Sections of the PTX ISA: "Matrix Descriptors", "Sparse Matrices", "Tensor Memory Data Movement Instructions" under
"TensorCore 5th Generation Family Instructions". The bits of descriptors are named in `SHARED` and `INSTRUCTION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from .operand import STAGE, stages

ROWS = 128
"""Outputs of a row tile: those of one thread block."""
COLUMNS = 128
"""Expanded columns of a k-tile."""
VALUE_BYTES = ROWS * STAGE // 2
"""Bytes of values of a row tile and block of k."""
METADATA_BYTES = ROWS * COLUMNS // 8
"""Bytes of metadata of a row tile and k-tile."""
QUARTERS = (0, 2, 1, 3)
"""Order of the quarters of a k-tile of an 8-bit type; its own inverse."""
ARRANGED_AT_ONCE = 32
"""Row tiles that are arranged at a time: intermediate arrays take several times the memory of their values."""


def blocks(dtype: DType) -> int:
    """Blocks of 128 bytes of expanded k in a k-tile."""
    return COLUMNS * dtype.bits // 8 // STAGE


def row_tiles(n: int) -> int:
    """Row tiles of 128 that cover n: an even number, since a pair of thread blocks takes two."""
    return -(-n // (2 * ROWS)) * 2


def weight_bytes(dtype: DType) -> int:
    """Bytes of weights of a row tile and k-tile."""
    return blocks(dtype) * VALUE_BYTES + METADATA_BYTES


def k_tiles(pattern: Pattern, k: int, dtype: DType) -> int:
    """K-tiles that cover the expanded k, an even number of blocks."""
    return stages(pattern, k, dtype) // blocks(dtype)


# ---- weights ---------------------------------------------------------------------------------------------------------


def value_at() -> Any:
    """Position of byte b of row r of a row tile's values: int [r * 64 + b]. 16-byte chunks are swizzled."""
    row, byte = np.arange(ROWS)[:, None], np.arange(STAGE // 2)
    return (row * (STAGE // 2) + (byte ^ (row // 2 % 4 * 16))).ravel()


def metadata_at(dtype: DType) -> Any:
    """Position of metadata byte b of row r of a row tile: int [r * 16 + b]; a byte has two nibbles, of 8 expanded columns."""
    row, byte = np.arange(ROWS)[:, None], np.arange(COLUMNS // 8)
    if dtype.bits == 8:
        return (16 * row + byte).ravel()
    # lane r % 8 + 8 * (half of the instruction's columns) + 16 * (r // 16); column: instruction; half-word: r // 8 % 2
    lane = row % 8 + 8 * (byte // 2 % 2) + row // 16 * 16
    return (16 * lane + 4 * (byte // 4) + 2 * (row // 8 % 2) + byte % 2).ravel()


def arrange(packed: PackedWeight, xp: Any = np) -> dict[str, Any]:
    """Packed weights as the kernel loads them: weights uint8 [k-tiles, row tiles, weight_bytes].

    Rows and columns beyond the matrix hold zeros.

    Args:
        xp: numpy or cupy, whichever made packed.values.
    """
    dtype, many, count = packed.dtype, row_tiles(packed.n), k_tiles(packed.pattern, packed.k, packed.dtype)
    values_at, meta_at = xp.asarray(value_at()), xp.asarray(metadata_at(dtype))
    made = xp.empty((count, many, weight_bytes(dtype)), np.uint8)
    for first in range(0, many, ARRANGED_AT_ONCE):
        last = min(many, first + ARRANGED_AT_ONCE)
        rows = slice(ROWS * first, min(ROWS * last, packed.n))
        stored = xp.ascontiguousarray(packed.values[rows].view(dtype.raw)).view(np.uint8)
        values = _tiles(stored, last - first, count, blocks(dtype) * STAGE // 2, 0, dtype, xp)
        meta = _tiles(packed.meta[rows], last - first, count, COLUMNS // 8, 0x44, dtype, xp)
        for block in range(blocks(dtype)):
            part = values[..., block * STAGE // 2 : (block + 1) * STAGE // 2].reshape(count, -1, VALUE_BYTES)
            made[:, first:last, block * VALUE_BYTES + values_at] = part
        made[:, first:last, blocks(dtype) * VALUE_BYTES + meta_at] = meta.reshape(count, -1, METADATA_BYTES)
    return {"weights": made}


def _tiles(rows: Any, many: int, count: int, width: int, fill: int, dtype: DType, xp: Any) -> Any:
    """Rows of bytes, padded and cut into tiles in the order of k: uint8 [count, many, 128, width]."""
    padded = xp.full((ROWS * many, count * width), fill, np.uint8)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    cut = padded.reshape(many, ROWS, count, width).transpose(2, 0, 1, 3)
    if dtype.bits == 8:
        cut = cut.reshape(count, many, ROWS, 4, width // 4)[:, :, :, xp.asarray(QUARTERS)].reshape(count, many, ROWS, width)
    return xp.ascontiguousarray(cut)


# ---- descriptors -----------------------------------------------------------------------------------------------------

SHARED = {
    "address": (0, 14), "leading": (16, 14), "stride": (32, 14), "version": (46, 3), "base": (49, 3), "absolute": (52, 1),
    "swizzle": (61, 3),
}  # fmt: skip
"""Fields of a shared memory descriptor, (first bit, bits). Address and strides are in units of 16 bytes; `stride`: from 8 rows
to the next 8; `leading` is not used by rows of 16 bytes, nor by swizzled rows; `base`: 0, of aligned tiles."""
NO_SWIZZLE, SWIZZLE_128, SWIZZLE_64 = 0, 2, 4
"""Codes of `swizzle`."""

INSTRUCTION = {
    "selector": (0, 2), "sparse": (2, 1), "saturate": (3, 1), "d": (4, 2), "a": (7, 3), "b": (10, 3), "negate_a": (13, 1),
    "negate_b": (14, 1), "transpose_a": (15, 1), "transpose_b": (16, 1), "n": (17, 6), "m": (24, 5), "shift": (30, 2),
}  # fmt: skip
"""Fields of an instruction descriptor of kinds f16, f8f6f4 and i8. `n`: in units of 8; `m`: in units of 16."""

CODES: Mapping[DType, tuple[int, int]] = {INT8: (1, 2), FLOAT8: (0, 1), BFLOAT16: (1, 1), FLOAT16: (0, 1)}
"""Type -> code of A and of B in its kind of instruction; code of D (1: float32, 2: int32)."""


def encode(fields: Mapping[str, tuple[int, int]], **values: int) -> int:
    """A descriptor of these fields, the others 0."""
    word = 0
    for name, value in values.items():
        first, bits = fields[name]
        if not 0 <= value < 1 << bits:
            raise AssertionError((name, value))
        word |= value << first
    return word


def shared_descriptor(row_bytes: int, swizzle: int) -> int:
    """Of a K-major operand at address 0, rows of `row_bytes`."""
    return encode(SHARED, leading=1, stride=8 * row_bytes // 16, version=1, swizzle=swizzle)


ACTIVATIONS_DESCRIPTOR = shared_descriptor(STAGE, SWIZZLE_128)
VALUES_DESCRIPTOR = shared_descriptor(STAGE // 2, SWIZZLE_64)
METADATA_DESCRIPTOR = shared_descriptor(COLUMNS // 8, NO_SWIZZLE)


def instruction_descriptor(dtype: DType, tokens: int) -> int:
    """Of a sparse product of a pair of thread blocks: 256 outputs x `tokens`; the selector is 0."""
    operands, sums = CODES[dtype]
    return encode(INSTRUCTION, sparse=1, d=sums, a=operands, b=operands, n=tokens // 8, m=2 * ROWS // 16)


# ---- tensor memory ---------------------------------------------------------------------------------------------------

TENSOR_COLUMNS = 512
"""Columns of tensor memory, each 128 lanes x 32 bits; a thread block takes all."""
CHUNK = 32
"""Columns of sums that a warp reads at a time."""
METADATA_COLUMNS = COLUMNS // 8 // 4
"""Columns of the metadata of a k-tile."""


def second_at(tokens: int) -> int:
    """Column of the second set of sums; the first starts at 0. Tiles of 256 tokens leave both sets a chunk in common."""
    return min(tokens, TENSOR_COLUMNS - 256 - CHUNK)


def metadata_column(tokens: int) -> int:
    """Column of the metadata, of which each slot of the ring has its own."""
    return second_at(tokens) + tokens


def most_slots(tokens: int) -> int:
    """Slots whose metadata fit into tensor memory."""
    return (TENSOR_COLUMNS - metadata_column(tokens)) // METADATA_COLUMNS


def steps(dtype: DType, tokens: int) -> tuple[tuple[int, int, int, int], ...]:
    """What the instructions of a k-tile, each 64 bytes of expanded k, add to descriptors and addresses.

    Returns:
        of each: to the activations' descriptor, to the values' descriptor, to the column of the metadata, the selector.
    """
    activations, half = tokens // 2 * STAGE // 16, STAGE // 2 // 16  # a block; half a row of it, in 16 bytes
    found = []
    for i in range(2 * blocks(dtype)):
        column, selector = (2 * i, 0) if dtype.bits == 8 else (i & ~1, i & 1)
        at = i // 2 * activations + i % 2 * half
        found.append((at, i // 2 * (VALUE_BYTES // 16) + i % 2 * half // 2, column, selector))
    return tuple(found)
