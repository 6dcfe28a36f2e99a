"""How Hopper's kernel wants its operands laid out (cuda_src/sm90/gemm.cu). NumPy, or CuPy by the same lines.

`wgmma.mma_async.sp` multiplies 64 rows of 2:4 weights by up to 256 tokens, both read from shared memory. A pipeline stage is
128 slid bytes along k, two instructions. Everything stands in global memory exactly as shared memory wants it, so the kernel
moves it by contiguous bulk copies and never touches an address of an element:

    values       [stages, strips of 64 rows, 64 x 64]: kept bytes, swizzled in 64-byte rows
    words        [stages, strips, 512 or 1024]: the instruction's index words, those of mma.sp for each warp's 16 rows
    codes        [stages, strips, 256 or 512]: what the words can be made of, in half of the bytes
    activations  [stages, groups of 8 tokens, 8 x 128]: slid, swizzled in 128-byte rows (operand.py)

Swizzles: PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate", "Shared memory matrix layout".

**Order of k.** A thread gives the index bits of 16 windows of a row and stage of an 8-bit type. So that these are neighbours,
instruction 0 takes windows 0-7 and 16-23 of a stage, instruction 1 the others; activations and kept values stand accordingly.
Stages of 16-bit types have 16 windows in all, in order.

**Codes.** A group of L columns keeps L-2 of them, so its mask is known from its two zeros a < b: code b (b-1)/2 + a, of which
there are L (L-1)/2: 28 at 6:8, five bits where index nibbles take twelve. Columns that are zero beyond two are kept as zeros
(8-bit types; 16-bit weights with such columns have no codes, so that infinity in x meets the zeros that the reference says).
A code word holds the codes of all groups that 16 windows of a row belong to, the first lowest: `CODED_WINDOWS` says for which
patterns they fit into 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.dtypes import DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from .operand import stages

WORD_WINDOWS = 16
"""Windows whose codes are in one word."""

CODED_WINDOWS = range(2, 8)
"""Windows per group of the patterns that have codes, 4:6 to 14:16: the codes of 16 windows fit into a word, and the nibbles of
a group too."""

VALUE_BYTES = 64 * 64
"""Of a strip and stage."""

CHUNK = 64
"""Strips that are arranged at a time: what lies between takes several times the memory of their values."""


def strips(n: int) -> int:
    """Strips of 64 rows that cover n: an even number, since most tiles take two at a time."""
    return -(-n // 128) * 2


def coded(pattern: Pattern) -> bool:
    """Whether masks of this pattern have codes."""
    return pattern.windows in CODED_WINDOWS


def code_bits(pattern: Pattern) -> int:
    """Bits of a code."""
    return (pattern.group * (pattern.group - 1) // 2 - 1).bit_length()


def codes_in_a_word(pattern: Pattern) -> int:
    """Groups that 16 windows in a row may belong to."""
    return -(-(WORD_WINDOWS + (pattern.windows - 1 if WORD_WINDOWS % pattern.windows else 0)) // pattern.windows)


def index_bytes(dtype: DType, codes: bool) -> int:
    """Of a strip and stage: words, or codes."""
    return (512 if dtype.bits == 16 else 1024) // (2 if codes else 1)


# ---- places ----------------------------------------------------------------------------------------------------------


def kept_at(size: int) -> Any:
    """Where byte b of row r of a strip's kept values stands, for r * 64 + b."""
    row, byte = np.arange(64)[:, None], np.arange(64)
    if size == 1:  # pieces of 16: windows 0-7, 8-15, 16-23, 24-31
        byte = np.array([0, 2, 1, 3])[byte // 16] * 16 + byte % 16
    return (row * 64 + (byte ^ (row // 2 % 4 * 16))).ravel()


# ---- weights ---------------------------------------------------------------------------------------------------------


def arrange(packed: PackedWeight, xp: Any = np) -> dict[str, Any]:
    """Packed weights as shared memory wants them: "values", and "codes" if the pattern has them, or else "words".

    Rows and columns beyond the matrix hold zeros. Weights that keep a column in two windows, which no packer writes, and 16-bit
    weights that have fewer non-zeros than the pattern allows, have no codes: they get words.

    Args:
        xp: numpy or cupy, whichever made packed.values.

    Returns:
        values: uint8 [stages, strips, 4096].
        codes or words: uint8 [stages, strips, index_bytes].
    """
    found = _arranged(packed, xp, True) if coded(packed.pattern) else None
    return found or _arranged(packed, xp, False)  # type: ignore[return-value]


def _arranged(packed: PackedWeight, xp: Any, codes: bool) -> dict[str, Any] | None:
    """With codes or with words; None if there are no codes for these weights."""
    pattern, dtype = packed.pattern, packed.dtype
    size, many, count = dtype.bits // 8, strips(packed.n), stages(pattern, packed.k, dtype)
    values = xp.empty((count, many, VALUE_BYTES), np.uint8)
    index = xp.empty((count, many, index_bytes(dtype, codes)), np.uint8)
    at = xp.asarray(kept_at(size))
    for first in range(0, many, CHUNK):
        last = min(many, first + CHUNK)
        rows = slice(64 * first, min(64 * last, packed.n))
        kept, meta = packed.values[rows].view(dtype.raw), packed.meta[rows]
        if codes:
            masked = _masked(kept, meta, packed, xp)
            if masked is None:
                return None
            kept, code = masked
            index[:, first:last] = _code_words(code, last - first, count, pattern, dtype, xp)
        else:
            index[:, first:last] = _index_words(meta, last - first, count, dtype, xp)
        image = xp.zeros((64 * (last - first), 64 * count), np.uint8)
        image[: len(kept), : kept.shape[1] * size] = xp.ascontiguousarray(kept).view(np.uint8)
        values[:, first:last, at] = (
            image.reshape(last - first, 64, count, 64).transpose(2, 0, 1, 3).reshape(count, -1, VALUE_BYTES)
        )
    return {"values": values, "codes" if codes else "words": index}


def _masked(kept: Any, meta: Any, packed: PackedWeight, xp: Any) -> tuple[Any, Any] | None:
    """Kept values [n, ks/2] in order of columns, zeros among them where a group has more than two, and codes [n, groups].

    None if a column is kept in two windows; or if a group of a 16-bit type has more than two zeros: an unused slot of the
    packed form makes NaN of infinity in x, and a zero kept elsewhere would make it of another column's.
    """
    pattern = packed.pattern
    n, windows = len(kept), pattern.windows
    groups = kept.shape[1] // (2 * windows)
    kept = kept.reshape(n, groups, windows, 2)
    nibble = xp.stack([meta & 15, meta >> 4], axis=2).reshape(n, groups, windows)
    columns = [xp.zeros(nibble.shape[:2], kept.dtype) for _ in range(pattern.group)]
    twice = xp.zeros((), bool)
    for j in range(windows):
        for slot in range(2):
            place, value = nibble[:, :, j] >> 2 * slot & 3, kept[:, :, j, slot]
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
    ordered = xp.empty((n, nibble.shape[1], 2 * windows), kept.dtype)
    for e in range(2 * windows):
        ordered[:, :, e] = xp.where(e < first, columns[e], xp.where(e + 1 < second, columns[e + 1], columns[e + 2]))
    second = second.astype(np.uint32)
    return ordered.reshape(n, 2 * windows * groups), second * (second - 1) // 2 + first


def _padded(rows: Any, height: int, width: int, fill: int, xp: Any) -> Any:
    whole = xp.full((height, width), fill, rows.dtype)
    whole[: rows.shape[0], : rows.shape[1]] = rows
    return whole


def _index_words(meta: Any, many: int, count: int, dtype: DType, xp: Any) -> Any:
    """Nibbles of rows as the instruction takes them: uint8 [count, many, 512 or 1024]."""
    if dtype.bits == 8:  # 16 bytes a row and stage: half of the windows, instruction, bytes
        split = _padded(meta, 64 * many, 16 * count, 0x44, xp).reshape(many, 4, 2, 8, count, 2, 2, 4)
        # strip, warp, q & 1, g, stage, q >> 1, instruction, bytes: row 16 warp + g + 8 (q & 1), half q >> 1 of the windows
        split = split.transpose(4, 0, 1, 3, 5, 2, 6, 7)
    else:  # 8 bytes a row and stage: instruction q >> 1, half q & 1 of its windows; row g in the low half-word, then g + 8
        split = _padded(meta, 64 * many, 8 * count, 0x44, xp).reshape(many, 4, 2, 8, count, 2, 2, 2)
        split = split.transpose(4, 0, 1, 3, 5, 6, 2, 7)
    return xp.ascontiguousarray(split).reshape(count, many, index_bytes(dtype, False))


def _code_words(code: Any, many: int, count: int, pattern: Pattern, dtype: DType, xp: Any) -> Any:
    """Codes [n, groups] as words, of 16 windows each: uint8 [count, many, 256 or 512].

    8-bit types: words of thread (warp, g, q), of row 16 warp + g + 8 (q & 1) and half q >> 1 of the stage's windows; 16-bit: of
    rows.
    """
    words_a_stage = 2 if dtype.bits == 8 else 1
    blocks, bits, codes = count * words_a_stage, code_bits(pattern), codes_in_a_word(pattern)
    first = np.arange(blocks) * WORD_WINDOWS // pattern.windows
    code = _padded(code, 64 * many, int(first[-1]) + codes, 0, xp)
    word = xp.zeros((64 * many, blocks), np.uint32)
    for j in range(codes):
        word |= code[:, xp.asarray(first + j)] << np.uint32(bits * j)
    if dtype.bits == 8:
        word = word.reshape(many, 4, 2, 8, count, 2).transpose(4, 0, 1, 3, 5, 2)
    else:
        word = word.reshape(many, 64, count).transpose(2, 0, 1)
    return xp.ascontiguousarray(word).view(np.uint8).reshape(count, many, index_bytes(dtype, True))


def nibbles(pattern: Pattern) -> Any:
    """The index nibbles of every code: uint8 [codes, windows].

    The e-th of the columns that are kept stands e + (e >= a) + (e + 1 >= b) columns into the group, a < b being the zeros.
    """
    table = []
    for b in range(pattern.group):
        for a in range(b):
            place = [e % 2 + (e >= a) + (e + 1 >= b) for e in range(2 * pattern.windows)]  # in window e / 2
            table.append([place[2 * j] | place[2 * j + 1] << 2 for j in range(pattern.windows)])
    return np.array(table, np.uint8)


def expand(index: Any, pattern: Pattern, dtype: DType, xp: Any = np) -> Any:
    """Codes -> words; twin of `expand` in cuda_src/sm90/index.cuh.

    Args:
        index: uint8 [stages, strips, 256 or 512], codes.
    """
    windows, bits, table = pattern.windows, code_bits(pattern), xp.asarray(nibbles(pattern))
    count, many = index.shape[:2]
    word = index.view(np.uint32)
    if dtype.bits == 8:
        first = (np.arange(count)[:, None] * 2 + np.arange(128) % 4 // 2) * WORD_WINDOWS % windows
    else:
        first = np.broadcast_to(np.arange(count)[:, None] * WORD_WINDOWS % windows, (count, 64))
    nibble = xp.empty((*word.shape, WORD_WINDOWS), np.uint8)
    for i in range(WORD_WINDOWS):
        group, inside = np.divmod(first + i, windows)
        code = word >> xp.asarray(bits * group, np.uint32)[:, None] & np.uint32((1 << bits) - 1)
        nibble[..., i] = table[code, xp.asarray(inside)[:, None]]
    pairs = nibble[..., 0::2] | nibble[..., 1::2] << 4  # [stage, strip, word, 8 bytes]
    if dtype.bits == 16:  # rows -> threads
        pairs = pairs.reshape(count, many, 4, 2, 8, 2, 2, 2).transpose(0, 1, 2, 4, 5, 6, 3, 7)
    return xp.ascontiguousarray(pairs).reshape(count, many, index_bytes(dtype, False))


def restore(arranged: dict[str, Any], packed: PackedWeight) -> PackedWeight:
    """A packed weight with the same matrix; equal to `packed` where that keeps no zeros, or has no codes. NumPy."""
    size = packed.dtype.bits // 8
    values = arranged["values"]
    count, many = values.shape[:2]
    values = values[:, :, kept_at(size)].reshape(count, many, 64, 64).transpose(1, 2, 0, 3).reshape(64 * many, 64 * count)
    words = expand(arranged["codes"], packed.pattern, packed.dtype) if "codes" in arranged else arranged["words"]
    if size == 1:
        meta = words.reshape(count, many, 4, 8, 2, 2, 2, 4).transpose(1, 2, 5, 3, 0, 4, 6, 7)
    else:
        meta = words.reshape(count, many, 4, 8, 2, 2, 2, 2).transpose(1, 2, 6, 3, 0, 4, 5, 7)
    meta = meta.reshape(64 * many, 16 // size * count)
    n, ks = packed.n, packed.ks
    kept = np.ascontiguousarray(values[:n, : ks // 2 * size]).view(packed.dtype.numpy)
    return PackedWeight(
        kept, np.ascontiguousarray(meta[:n, : ks // 8]), packed.scale, packed.pattern, packed.shape, packed.scheme
    )
