"""The kernel that packs weights, and what it reports: `reference`'s prune, quantize, slide and compress in one pass.

    row of w --> (largest magnitude kept --> scale, inverse) --> prune --> quantize or round --> slide, compress --> row

A block has a row, a thread a slice unit of it at a time: one or two groups, a whole number of index bytes. Where the row is
quantized here it is looked at twice, the second time from cache. Rows of whole aligned words are loaded by vectors, a group at
a time into registers, and their values leave through shared memory, in order. Other rows, and those of groups that are too
long for registers, are read and written element by element.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED, DType
from ...core.scheme import Scheme
from ..jit.numba import SIMULATED, Kernel, cuda, device_function
from .numbers import INFINITY, LOW, ROUND, row_scale, to_float8
from .ptx import (
    LANES,
    Float,
    Word,
    add,
    as_word,
    atomic_add,
    atomic_min,
    larger,
    load4,
    multiply,
    to_bfloat16,
    to_float8x2,
    to_float16,
    warp_max,
)

MOST_THREADS = 8 if SIMULATED else 256
MOST_WARPS = MOST_THREADS // LANES
LARGEST_HELD = 16
"""Columns of the longest group that a thread holds in registers."""

NOTHING = 2**64 - 1
NOT_FINITE, OVERFLOW, BAD_SCORE, FIRST, COUNT = range(5)
"""Words of a report on packing: lowest row * k + column of a NaN or infinity in w; of an infinity that rounding made; of a
score that is negative or not finite; lowest row * groups + group that breaks the pattern; how many do. `NOTHING`: none."""

BITS = {"float32": 32} | {d.name: d.bits for d in PACKED}
NUMBERS = {"float32": INFINITY} | {d.name: np.uint32(d.inf_bits or 2**32 - 1) for d in PACKED}
"""Magnitude bits of each type below which everything is a number."""

NONE = np.uint32(2**32 - 1)
"""No column."""

METHODS = {
    "none": (False, False, False),
    "magnitude": (True, False, False),
    "scores": (True, True, False),
    "random": (True, False, True),
}
"""Of each method that a kernel knows: whether it prunes, by scores that are given, by random numbers."""

Int: Any = np.int64
"""Indices in kernels; of no type that a type checker would hold them to."""


@dataclass(frozen=True)
class Variant:
    """What a packing kernel is compiled for.

    Attributes:
        source: type of w: "float32", "float16", "bfloat16", "int8" or "float8_e4m3fn".
        stored: type of the values; quantized here if it has 8 bits and w has more.
        windows: of the pattern, windows a group.
        prune: a name in METHODS.
        vector: words of 4 bytes that are loaded at once, 4 or 1; 0: element by element, any row.
        native: the architecture converts to float8 itself (sm_89 and later).
    """

    source: str
    stored: DType
    windows: int
    prune: str
    vector: int
    native: bool

    @property
    def name(self) -> str:
        shape = f"vector{self.vector}" if self.vector else "any"
        return f"pack_{shape}_{self.source}_{self.stored}_{self.windows}_{self.prune}{'' if self.native else '_early'}"

    @property
    def quantized(self) -> bool:
        """Values are quantized here."""
        return Scheme.of(self.stored).scaled and self.source != self.stored.name


# ---- pieces ------------------------------------------------------------------------------------------------------


def _nibble_table() -> int:
    """The index nibble of each of 16 masks of a window's non-zeros: of the first two, (0, p) of one at p > 0, else (0, 1)."""
    table = 0
    for mask in range(16):
        taken = [p for p in range(4) if mask >> p & 1][:2]
        if len(taken) < 2:
            taken = [0, max(1, *taken, 1)]
        table |= (taken[0] | taken[1] << 2) << 4 * mask
    return table


NIBBLES, NIBBLES_OF_LAST = np.uint32(_nibble_table() & 0xFFFFFFFF), np.uint32(_nibble_table() >> 32)
"""The table for windows whose last column is zero, and is not."""

GAMMA = np.uint64(0x9E3779B97F4A7C15)


@device_function("u64", "u64")
def mixed(z: Any) -> Any:
    """The finalizer of SplitMix64, as in `pruning.uniform`."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stored_pair(variant: Variant) -> Any:
    """A function (x, y, inverse) -> the stored bits of two elements."""
    low: Any = LOW.get(variant.source)
    source, stored = variant.source, variant.stored
    rounded = to_bfloat16 if stored.name == "bfloat16" else to_float16
    native = variant.native

    @device_function(("u32", "u32"), "u32", "u32", "f32")
    def kept(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        return x, y

    @device_function(("u32", "u32"), "u32", "u32", "f32")
    def to_int8(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        p, q = as_word(add(multiply(low(x), inverse), ROUND)), as_word(add(multiply(low(y), inverse), ROUND))
        return p & np.uint32(0xFF), q & np.uint32(0xFF)

    @device_function(("u32", "u32"), "u32", "u32", "f32")
    def to_float8_pair(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        p, q = multiply(low(x), inverse), multiply(low(y), inverse)
        if native:
            pair = to_float8x2(p, q)
            return pair & np.uint32(0xFF), pair >> np.uint32(8)
        return to_float8(p), to_float8(q)

    @device_function(("u32", "u32"), "u32", "u32", "f32")
    def to_half(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        return rounded(low(x)), rounded(low(y))

    if source == stored.name:
        return kept
    return {INT8: to_int8, FLOAT8: to_float8_pair, BFLOAT16: to_half, FLOAT16: to_half}[stored]


# ---- pack --------------------------------------------------------------------------------------------------------


@functools.cache
def pack_kernel(variant: Variant) -> Kernel:
    """Prune, quantize or round, slide and compress: one block a row."""
    windows, vector, stored = variant.windows, variant.vector, variant.stored
    group, groups = 2 * windows + 2, 1 + windows % 2
    per_unit = groups * windows

    bits = BITS[variant.source]
    ones, signed = np.uint32(2**bits - 1), variant.source == "int8"
    magnitude = ones if signed else np.uint32(ones >> 1)
    infinite, overflowing = NUMBERS[variant.source], NUMBERS[stored.name]
    low: Any = LOW.get(variant.source)
    pointer = "u32*" if vector else f"u{bits}*"
    per_word, per_load = 32 // bits, vector * 32 // bits if vector else 1
    columns, span = groups * group, groups if group <= 8 else 1  # groups at a time: more would not stay in registers
    words, outs = span * group * bits // 32 if vector else 1, 2 * span
    loads = words // vector if vector else 0

    pruned, scored, random = METHODS[variant.prune]
    ranked = scored or random
    Key = np.uint32 if bits <= 16 and not ranked else np.uint64
    shift, places, highest = Key(16 if Key is np.uint32 else 32), Key(0xFFFF), Key(2 ** (32 if Key is np.uint32 else 64) - 1)

    quantized, t = variant.quantized, np.float32(Scheme.of(stored).weights.limit)
    first_look = 0 if quantized else 1
    rounded = not quantized and variant.source != stored.name
    mask, stored_bits, wide = np.uint32(stored.nonzero_mask), np.uint32(stored.bits), stored.bits == 16
    unit_words = per_unit * stored.bits // 16
    staged_words = MOST_THREADS * unit_words
    stored_pair = _stored_pair(variant)

    key_type = "u32" if Key is np.uint32 else "u64"

    @device_function(key_type, key_type, key_type)
    def lower(a: Any, b: Any) -> Any:  # of the operands' own type: Numba's min of two words has 64 bits
        return a if a < b else b

    @device_function(key_type, key_type, key_type)
    def higher(a: Any, b: Any) -> Any:
        return b if a < b else a

    @device_function("u32", pointer, "i64", "i64", "i64", "i64")
    def element_at(w: Any, row_start: int, column: int, step: int, k: int) -> Word:
        return np.uint32(w[row_start + column * step]) if column < k else np.uint32(0)

    def kernel(
        w: Any,  # [n, k] elements of strides ld, step; or [n, ld] vectors
        score: Any,  # [n, k] float32 bits, read if pruned by them
        scale: Any,  # [n], written if quantized
        values: Any,  # [n, ks/2], as words
        meta: Any,  # [n, ks/8]
        report: Any,
        ld: int,
        step: int,
        k: int,
        units: int,
        seed_low: int,
        seed_high: int,
    ) -> None:
        row, thread, threads = Int(cuda.blockIdx.x), Int(cuda.threadIdx.x), Int(cuda.blockDim.x)
        held = cuda.local.array(words, np.uint32)
        out = cuda.local.array(outs, np.uint32)
        if vector:
            staged = cuda.shared.array(staged_words, np.uint32)
        peak, inverse, live = np.uint32(0), np.float32(0), ones
        not_finite = overflow = bad_score = NONE
        over, first_over = Int(0), Int(0)
        byte = pending = np.uint32(0)  # of the window before: its nibble, and its pair of 8-bit values
        row_key = np.uint64(0)
        if random:
            row_key = mixed(np.uint64(seed_high) << np.uint64(32) | np.uint64(seed_low))
            row_key = mixed(row_key + np.uint64(row + 1) * GAMMA)
        for look in range(first_look, 2):  # 0: the largest magnitude that is kept; 1: all else
            if look == 0 and not ranked:  # pruned by magnitude a row keeps its largest
                at = thread
                while at * per_load < k:
                    if vector == 4:
                        x, y, z, u = load4(w, row * ld + at)
                    else:
                        x = y = z = u = np.uint32(w[row * ld + at * step])
                    peak = larger(peak, larger(larger(x & magnitude, y & magnitude), larger(z & magnitude, u & magnitude)))
                    if vector and bits == 16:
                        x, y, z, u = x >> np.uint32(16), y >> np.uint32(16), z >> np.uint32(16), u >> np.uint32(16)
                        other = larger(larger(x & magnitude, y & magnitude), larger(z & magnitude, u & magnitude))
                        peak = larger(peak, other)
                    at += threads
            chunk = Int(0) if ranked or look == 1 else units
            while chunk < units:
                unit = chunk + thread
                at_unit = row * units + unit
                for g in range(0, groups if unit < units else 0, span):
                    start = unit * columns + g * group
                    if vector:
                        at = row * ld + (unit * groups + g) // span * loads
                        for v in range(loads):
                            if vector == 4:
                                x = y = z = u = np.uint32(0)
                                if start + v * per_load < k:
                                    x, y, z, u = load4(w, at + v)
                                held[4 * v], held[4 * v + 1], held[4 * v + 2], held[4 * v + 3] = x, y, z, u
                            else:
                                held[v] = np.uint32(w[at + v]) if start + v * per_load < k else np.uint32(0)
                    if pruned:
                        for h in range(span):
                            lowest = second = highest
                            for j in range(group):
                                i = h * group + j
                                if vector:
                                    element = np.uint32(held[i // per_word] >> np.uint32(bits * (i % per_word)))
                                else:
                                    element = element_at(w, row * ld, start + i, step, k)
                                size = np.uint32(element & magnitude)
                                if signed and size > np.uint32(128):
                                    size = np.uint32(256) - size
                                rank = Key(size)
                                if scored:
                                    given = np.uint32(0)
                                    if start + i < k:
                                        given = np.uint32(score[row * k + start + i])
                                    absolute = given & np.uint32(0x7FFFFFFF)
                                    if absolute >= INFINITY or given > np.uint32(0x80000000):
                                        bad_score = min(bad_score, np.uint32(start + i))
                                    rank = Key(absolute) + Key(1)
                                if random:
                                    rank = (mixed(row_key + np.uint64(start + i + 1) * GAMMA) >> np.uint64(40)) + Key(1)
                                if ranked and size == np.uint32(0):
                                    rank = Key(0)  # zeros go first, those past k before all
                                # unique keys; of equal scores the rightmost is lowest
                                key = Key(rank << shift | Key(group - 1 - j))
                                second = lower(second, higher(lowest, key))
                                lowest = lower(lowest, key)
                            out[2 * h] = np.uint32(np.uint32(group - 1) - np.uint32(lowest & places))
                            out[2 * h + 1] = np.uint32(np.uint32(group - 1) - np.uint32(second & places))
                    a = b = np.uint32(0)  # what the window before left of its last two columns
                    for p in range(span * (windows + 1)):  # two columns enter
                        h, j, i = p // (windows + 1), p % (windows + 1), 2 * p
                        if vector:
                            x = np.uint32(held[i // per_word] >> np.uint32(bits * (i % per_word)) & ones)
                            y = np.uint32(held[(i + 1) // per_word] >> np.uint32(bits * ((i + 1) % per_word)) & ones)
                        else:
                            x = element_at(w, row * ld, start + i, step, k)
                            y = element_at(w, row * ld, start + i + 1, step, k)
                        if larger(x & magnitude, y & magnitude) >= infinite:
                            not_finite = min(not_finite, np.uint32(start + i + (0 if x & magnitude >= infinite else 1)))
                        if pruned:
                            if out[2 * h] == np.uint32(2 * j) or out[2 * h + 1] == np.uint32(2 * j):
                                x = np.uint32(0)
                            if out[2 * h] == np.uint32(2 * j + 1) or out[2 * h + 1] == np.uint32(2 * j + 1):
                                y = np.uint32(0)
                        if ranked and look == 0:
                            peak = larger(peak, larger(x & magnitude, y & magnitude))
                        else:
                            c, d = stored_pair(x & live, y & live, inverse)
                            if rounded and larger(c & mask, d & mask) >= overflowing:
                                overflow = min(overflow, np.uint32(start + i + (0 if c & mask >= overflowing else 1)))
                            c = c if c & mask != np.uint32(0) else np.uint32(0)
                            d = d if d & mask != np.uint32(0) else np.uint32(0)
                            if j > 0:  # a window takes its first two non-zeros
                                at_table = np.uint32(4 if a != np.uint32(0) else 0)
                                at_table = np.uint32(at_table | np.uint32(8 if b != np.uint32(0) else 0))
                                at_table = np.uint32(at_table | np.uint32(16 if c != np.uint32(0) else 0))
                                table = NIBBLES_OF_LAST if d != np.uint32(0) else NIBBLES
                                nibble = np.uint32(np.uint32(table >> at_table) & np.uint32(15))
                                i0, i1 = np.uint32(nibble & np.uint32(3)), np.uint32(nibble >> np.uint32(2))
                                first = a if i0 == np.uint32(0) else b if i0 == np.uint32(1) else c
                                last = b if i1 == np.uint32(1) else c if i1 == np.uint32(2) else d
                                if i0 == np.uint32(2) or i1 == np.uint32(2):
                                    c = np.uint32(0)
                                if i1 == np.uint32(3):
                                    d = np.uint32(0)
                                window = (g + h) * windows + j - 1  # of the unit
                                pair = np.uint32(first | last << stored_bits)
                                if window & 1:
                                    meta[at_unit * (per_unit // 2) + (window >> 1)] = byte | nibble << np.uint32(4)
                                if wide or window & 1:
                                    word = pair if wide else np.uint32(pending | pair << np.uint32(16))
                                    place = window if wide else window >> 1
                                    if vector:
                                        staged[thread * unit_words + place] = word
                                    else:
                                        values[at_unit * unit_words + place] = word
                                byte, pending = nibble, pair
                            a, b = c, d
                            if j == windows:
                                if a | b != np.uint32(0):
                                    if over == 0:
                                        first_over = unit * groups + g + h
                                    over += 1
                                a = b = np.uint32(0)
                if vector and look == 1:
                    cuda.syncthreads()
                    at = thread
                    while at < min(threads, units - chunk) * unit_words:
                        values[(row * units + chunk) * unit_words + at] = staged[at]
                        at += threads
                    cuda.syncthreads()
                chunk += threads
            if quantized and look == 0:
                of_warps = cuda.shared.array(MOST_WARPS, np.uint32)
                peak = warp_max(peak)
                if thread % LANES == 0:
                    of_warps[thread // LANES] = peak
                cuda.syncthreads()
                for i in range(threads // LANES):
                    peak = larger(peak, of_warps[i])
                row_scaled, inverse = row_scale(low(peak), t)
                if thread == 0:
                    scale[row] = row_scaled
                live = ones if inverse > np.float32(0) else np.uint32(0)  # x 0 would keep signs, and NaN
        if not_finite != NONE:
            atomic_min(report, NOT_FINITE, row * k + Int(not_finite))
        if overflow != NONE:
            atomic_min(report, OVERFLOW, row * k + Int(overflow))
        if bad_score != NONE:
            atomic_min(report, BAD_SCORE, row * k + Int(bad_score))
        if over:
            atomic_min(report, FIRST, row * (units * groups) + first_over)
            atomic_add(report, COUNT, over)

    integers = ("i64",) * 6
    arrays = (pointer, "u32*", "f32*", "u32*", "u8*", "u64*")
    return Kernel(variant.name, kernel, *arrays, *integers, max_threads=MOST_THREADS)
