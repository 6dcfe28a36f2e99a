"""The layout of Hopper's operands in global memory (cuda_src/sm90). NumPy, or CuPy by the same lines.

`wgmma.mma_async.sp` multiplies 64 rows of 2:4 weights (a row tile) by up to 256 tokens, both read from shared memory. A stage
is 128 bytes of expanded k, two instructions. Global memory holds what shared memory holds, so a stage is loaded by contiguous
bulk copies:

    values       [stages, row tiles, 64 x 64]: non-zero values, swizzled in 64-byte rows
    expanded     [stages, row tiles, 512 or 1024]: metadata as the instruction reads it, that of mma.sp for each warp's 16 rows
    compact      [stages, row tiles, 256 or 512]: metadata in half of the bytes, from which the kernels make the expanded form
    activations  [stages, groups of 8 tokens, 8 x 128]: expanded k, swizzled in 128-byte rows (operand.py)

Swizzles: PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate", "Shared memory matrix layout".

**Order of k.** A thread supplies the metadata of 16 windows of a row and stage of an 8-bit type. To make these neighbours,
instruction 0 takes windows 0-7 and 16-23 of a stage, instruction 1 the others; activations and values are stored in that order.
A stage of a 16-bit type has 16 windows, in order.

**Compact metadata.** In a group of L columns all but two are stored, so the two others, a < b, determine the mask: number
b (b-1)/2 + a of L (L-1)/2. At 6:8 there are 28 masks: five bits, where the metadata of three windows takes twelve. A group with
more than two zeros stores some of them as values (8-bit types; 16-bit weights with such groups have no compact metadata,
because infinity in x must meet the zeros that the reference says). A word holds the mask numbers of all groups that 16 windows
of a row belong to, the first lowest; `COMPACT_WINDOWS` lists the patterns for which they fit into 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.dtypes import DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from .operand import stages

WORD_WINDOWS = 16
"""Windows whose mask numbers share a word of compact metadata."""

COMPACT_WINDOWS = range(2, 8)
"""Windows per group of the patterns that have compact metadata, 4:6 to 14:16: the mask numbers of 16 windows fit into a word,
and so does the metadata of a group."""

VALUE_BYTES = 64 * 64
"""Bytes of values of a row tile and stage."""

ARRANGED_AT_ONCE = 64
"""Row tiles that are arranged at a time: intermediate arrays take several times the memory of their values."""


def row_tiles(n: int) -> int:
    """Row tiles of 64 that cover n: an even number, since most tiles take two at a time."""
    return -(-n // 128) * 2


def has_compact_metadata(pattern: Pattern) -> bool:
    """Whether masks of this pattern have numbers that fit."""
    return pattern.windows in COMPACT_WINDOWS


def mask_bits(pattern: Pattern) -> int:
    """Bits of a mask number."""
    return (pattern.group * (pattern.group - 1) // 2 - 1).bit_length()


def masks_per_word(pattern: Pattern) -> int:
    """Groups that 16 windows in a row may belong to."""
    return -(-(WORD_WINDOWS + (pattern.windows - 1 if WORD_WINDOWS % pattern.windows else 0)) // pattern.windows)


def metadata_bytes(dtype: DType, compact: bool) -> int:
    """Bytes of metadata of a row tile and stage."""
    return (512 if dtype.bits == 16 else 1024) // (2 if compact else 1)


# ---- places ----------------------------------------------------------------------------------------------------------


def value_at(size: int) -> Any:
    """Position of byte b of row r of a row tile's values, elements of `size` bytes: int [r * 64 + b]."""
    row, byte = np.arange(64)[:, None], np.arange(64)
    if size == 1:  # 16-byte chunks: windows 0-7, 8-15, 16-23, 24-31
        byte = np.array([0, 2, 1, 3])[byte // 16] * 16 + byte % 16
    return (row * 64 + (byte ^ (row // 2 % 4 * 16))).ravel()


# ---- weights ---------------------------------------------------------------------------------------------------------


def arrange(packed: PackedWeight, xp: Any = np) -> dict[str, Any]:
    """Packed weights as the kernel loads them: "values", and "compact" metadata if the weights have it, or else "expanded".

    Rows and columns beyond the matrix hold zeros. Without compact metadata are patterns outside `COMPACT_WINDOWS`; weights that
    store a column in two windows, which no packer writes; and 16-bit weights with more zeros than the pattern demands.

    Args:
        xp: numpy or cupy, whichever made packed.values.

    Returns:
        values: uint8 [stages, row tiles, 4096].
        compact or expanded: uint8 [stages, row tiles, metadata_bytes].
    """
    found = _arranged(packed, xp, True) if has_compact_metadata(packed.pattern) else None
    return found or _arranged(packed, xp, False)  # type: ignore[return-value]


def _arranged(packed: PackedWeight, xp: Any, compact: bool) -> dict[str, Any] | None:
    """With compact or with expanded metadata; None if these weights have no compact metadata."""
    pattern, dtype = packed.pattern, packed.dtype
    size, many, count = dtype.bits // 8, row_tiles(packed.n), stages(pattern, packed.k, dtype)
    values = xp.empty((count, many, VALUE_BYTES), np.uint8)
    metadata = xp.empty((count, many, metadata_bytes(dtype, compact)), np.uint8)
    at = xp.asarray(value_at(size))
    for first in range(0, many, ARRANGED_AT_ONCE):
        last = min(many, first + ARRANGED_AT_ONCE)
        rows = slice(64 * first, min(64 * last, packed.n))
        stored, meta = packed.values[rows].view(dtype.raw), packed.meta[rows]
        if compact:
            masked = _masked(stored, meta, packed, xp)
            if masked is None:
                return None
            stored, mask = masked
            metadata[:, first:last] = _compact(mask, last - first, count, pattern, dtype, xp)
        else:
            metadata[:, first:last] = _expanded(meta, last - first, count, dtype, xp)
        padded = xp.zeros((64 * (last - first), 64 * count), np.uint8)
        padded[: len(stored), : stored.shape[1] * size] = xp.ascontiguousarray(stored).view(np.uint8)
        values[:, first:last, at] = (
            padded.reshape(last - first, 64, count, 64).transpose(2, 0, 1, 3).reshape(count, -1, VALUE_BYTES)
        )
    return {"values": values, "compact" if compact else "expanded": metadata}


def _masked(stored: Any, meta: Any, packed: PackedWeight, xp: Any) -> tuple[Any, Any] | None:
    """Values [n, ks/2] in order of columns, zeros among them where a group has more than two, and mask numbers [n, groups].

    None if a column is stored in two windows; or if a group of a 16-bit type has more than two zeros: an unused slot of the
    packed form makes NaN of infinity in x, and a zero stored for another column would make it of that column's.
    """
    pattern = packed.pattern
    n, windows = len(stored), pattern.windows
    groups = stored.shape[1] // (2 * windows)
    stored = stored.reshape(n, groups, windows, 2)
    nibble = xp.stack([meta & 15, meta >> 4], axis=2).reshape(n, groups, windows)
    columns = [xp.zeros(nibble.shape[:2], stored.dtype) for _ in range(pattern.group)]
    twice = xp.zeros((), bool)
    for j in range(windows):
        for slot in range(2):
            place, value = nibble[:, :, j] >> 2 * slot & 3, stored[:, :, j, slot]
            for c in range(4):
                here = value * (place == c)
                if j and c < 2:  # the window before sees this column too
                    twice |= ((columns[2 * j + c] != 0) & (here != 0)).any()
                columns[2 * j + c] |= here
    if packed.dtype.bits == 16:
        at = xp.arange(groups) * pattern.group
        zeros = sum(((column == 0) & (at + c < packed.k)).astype(np.uint8) for c, column in enumerate(columns))
        twice |= (zeros > 2).any()
    if bool(twice):
        return None
    first = second = xp.full(nibble.shape[:2], 255, np.uint8)  # columns that are zero
    for c in reversed(range(pattern.group)):
        zero = columns[c] == 0
        first, second = xp.where(zero, np.uint8(c), first), xp.where(zero, first, second)
    ordered = xp.empty((n, nibble.shape[1], 2 * windows), stored.dtype)
    for e in range(2 * windows):
        ordered[:, :, e] = xp.where(e < first, columns[e], xp.where(e + 1 < second, columns[e + 1], columns[e + 2]))
    second = second.astype(np.uint32)
    return ordered.reshape(n, 2 * windows * groups), second * (second - 1) // 2 + first


def _padded(rows: Any, height: int, width: int, fill: int, xp: Any) -> Any:
    whole = xp.full((height, width), fill, rows.dtype)
    whole[: rows.shape[0], : rows.shape[1]] = rows
    return whole


def _expanded(meta: Any, many: int, count: int, dtype: DType, xp: Any) -> Any:
    """Nibbles of rows in the order of the instruction: uint8 [count, many, 512 or 1024]."""
    if dtype.bits == 8:  # 16 bytes a row and stage: half of the windows, instruction, bytes
        split = _padded(meta, 64 * many, 16 * count, 0x44, xp).reshape(many, 4, 2, 8, count, 2, 2, 4)
        # row tile, warp, q & 1, g, stage, q >> 1, instruction, bytes: row 16 warp + g + 8 (q & 1), half q >> 1 of the windows
        split = split.transpose(4, 0, 1, 3, 5, 2, 6, 7)
    else:  # 8 bytes a row and stage: instruction q >> 1, half q & 1 of its windows; row g in the low half-word, then g + 8
        split = _padded(meta, 64 * many, 8 * count, 0x44, xp).reshape(many, 4, 2, 8, count, 2, 2, 2)
        split = split.transpose(4, 0, 1, 3, 5, 6, 2, 7)
    return xp.ascontiguousarray(split).reshape(count, many, metadata_bytes(dtype, False))


def _compact(mask: Any, many: int, count: int, pattern: Pattern, dtype: DType, xp: Any) -> Any:
    """Mask numbers [n, groups] as words of 16 windows each: uint8 [count, many, 256 or 512].

    8-bit types: a word for each thread (warp, g, q), of row 16 warp + g + 8 (q & 1) and half q >> 1 of the stage's windows.
    16-bit types: a word for each row.
    """
    words_a_stage = 2 if dtype.bits == 8 else 1
    blocks, bits, masks = count * words_a_stage, mask_bits(pattern), masks_per_word(pattern)
    first = np.arange(blocks) * WORD_WINDOWS // pattern.windows
    mask = _padded(mask, 64 * many, int(first[-1]) + masks, 0, xp)
    word = xp.zeros((64 * many, blocks), np.uint32)
    for j in range(masks):
        word |= mask[:, xp.asarray(first + j)] << np.uint32(bits * j)
    if dtype.bits == 8:
        word = word.reshape(many, 4, 2, 8, count, 2).transpose(4, 0, 1, 3, 5, 2)
    else:
        word = word.reshape(many, 64, count).transpose(2, 0, 1)
    return xp.ascontiguousarray(word).view(np.uint8).reshape(count, many, metadata_bytes(dtype, True))


def nibbles(pattern: Pattern) -> Any:
    """The metadata of every mask: uint8 [masks, windows], a nibble each.

    The e-th stored column is column e + (e >= a) + (e + 1 >= b) of the group; a < b are the two that are not stored.
    """
    table = []
    for b in range(pattern.group):
        for a in range(b):
            place = [e % 2 + (e >= a) + (e + 1 >= b) for e in range(2 * pattern.windows)]  # in window e / 2
            table.append([place[2 * j] | place[2 * j + 1] << 2 for j in range(pattern.windows)])
    return np.array(table, np.uint8)


def expand(compact: Any, pattern: Pattern, dtype: DType, xp: Any = np) -> Any:
    """Compact -> expanded metadata, the reference of cuda_src/sm90/metadata.cuh and expand.cu.

    Args:
        compact: uint8 [stages, row tiles, 256 or 512].

    Returns:
        uint8 [stages, row tiles, 512 or 1024].
    """
    windows, bits, table = pattern.windows, mask_bits(pattern), xp.asarray(nibbles(pattern))
    count, many = compact.shape[:2]
    word = compact.view(np.uint32)
    if dtype.bits == 8:
        first = (np.arange(count)[:, None] * 2 + np.arange(128) % 4 // 2) * WORD_WINDOWS % windows
    else:
        first = np.broadcast_to(np.arange(count)[:, None] * WORD_WINDOWS % windows, (count, 64))
    nibble = xp.empty((*word.shape, WORD_WINDOWS), np.uint8)
    for i in range(WORD_WINDOWS):
        group, inside = np.divmod(first + i, windows)
        mask = word >> xp.asarray(bits * group, np.uint32)[:, None] & np.uint32((1 << bits) - 1)
        nibble[..., i] = table[mask, xp.asarray(inside)[:, None]]
    pairs = nibble[..., 0::2] | nibble[..., 1::2] << 4  # [stage, row tile, word, 8 bytes]
    if dtype.bits == 16:  # rows -> threads
        pairs = pairs.reshape(count, many, 4, 2, 8, 2, 2, 2).transpose(0, 1, 2, 4, 5, 6, 3, 7)
    return xp.ascontiguousarray(pairs).reshape(count, many, metadata_bytes(dtype, False))
