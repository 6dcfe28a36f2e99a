"""The kernels of activations.py: a thread block takes one token, quantizes or rounds it, lifts it, lays it out.

`row_in_registers` holds a token in registers between its two looks at it, so that each byte of x is read once:

    16-byte loads --> largest magnitude (warp, then block) --> scale, inverse --> multiply, round, pack --> rows
                                                             lifted: --> shared memory --> gather --> 16-byte stores

`row_from_memory` reads x element by element, twice, the second time from cache: for rows that are not 16-byte aligned, whose
elements are not neighbours, or that are too long for registers. Both give the bits of `reference.quantize`: products and
sums are rounded one by one, never fused; the two divisions a token are correctly rounded.

How windows are gathered. Shared memory holds a row in pairs of columns, two bytes each, or four of a 16-bit type. Window w
starts at pair w + w // windows, for a group has one pair more than windows. A thread makes 16 bytes: four windows of an 8-bit
type, which stand in six pairs in a row, or two of a 16-bit type. It reads four words, moves them by half a word if the first
pair is an odd one, and takes each window from two words by one byte permute, whose selector says whether the group has ended
before it. Where threads step by a multiple of the period of all that, selectors are made once a thread.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arch.operand import HALVES as HALVES_AT
from ...core.dtypes import INT8
from ...core.scheme import Scheme
from ..jit.numba import SIMULATED, Kernel, cuda, device_function
from .numbers import HIGH, LOW, ROUND_TWO, row_scale, to_float8x4_early, to_int8x4
from .ptx import (
    LANES,
    Float,
    Word,
    larger,
    larger_halves,
    launch_later_grid,
    load4,
    multiply,
    permute,
    store2,
    store4,
    to_float8x4,
    wait_for_earlier_grids,
    warp_max,
)

WORD = np.dtype(np.uint32)
ALIGNMENT = None if SIMULATED else 16
SLOTS = 1024 // LANES

ZERO, SEVEN = np.uint32(0), np.uint32(7)
NEXT = np.uint64(1)
"""From a word of shared memory to the next; signed indices might count from the end, and cost more."""

HALVES = np.uint32(sum(int(place) << 4 * piece for piece, place in enumerate(HALVES_AT)))
"""A nibble a piece."""

# Selectors of a byte permute of two words, seen as four half-words, lowest first.
FIRST, MIDDLE, SECOND = (np.uint32(s) for s in (0x3210, 0x5432, 0x7654))


@device_function("u32", "u32")
def block_max(word: Word) -> Word:
    """The largest word of the block, to all its threads."""
    slots = cuda.shared.array(SLOTS, np.uint32)
    thread, lanes = np.uint32(cuda.threadIdx.x), np.uint32(LANES)
    warps = np.uint32(np.uint32(cuda.blockDim.x) // lanes)
    lane = np.uint32(thread % lanes)
    word = warp_max(word)
    if lane == ZERO:
        slots[np.uint32(thread // lanes)] = word
    cuda.syncthreads()
    word = slots[lane] if lane < warps else ZERO
    if SIMULATED:
        for i in range(warps):
            word = larger(word, slots[i])
    return warp_max(word)


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        source: type of x: "bfloat16", "float16" or "float32"; or that of `stored`, whose values are moved as they are.
        stored: "int8" or "float8_e4m3fn"; for images also "bfloat16" or "float16".
        vectors: 16-byte loads a thread makes, of rows of up to 1024 times as many; 0: element by element, any row.
        windows: of the pattern, if values are lifted; else 0.
        image: lifted values are laid out as arch/operand.py has it, in stages, swizzled; else in rows.
        generation: which instructions it may use: 80; 89: conversion to float8; 90: packed maxima, and it is launched before
            the grid before it is complete, for which it waits.
    """

    source: str
    stored: str
    vectors: int
    windows: int = 0
    image: bool = False
    generation: int = 80

    @property
    def name(self) -> str:
        parts = ["activations", f"rows{self.vectors}" if self.vectors else "any", self.source, self.stored]
        parts += [f"{'image' if self.image else 'lift'}{self.windows}"] * (self.windows > 0)
        return "_".join([*parts, f"g{self.generation}"])

    @property
    def quantizes(self) -> bool:
        return Scheme.of(self.stored).scaled and self.source != self.stored

    @property
    def source_bytes(self) -> int:
        """Bytes of an element of x."""
        return 4 if self.source == "float32" else Scheme.of(self.source).dtype.bits // 8

    @property
    def stored_bytes(self) -> int:
        return Scheme.of(self.stored).dtype.bits // 8

    @property
    def words(self) -> int:
        """Words of stored values that 16 bytes of x give."""
        return 4 * self.stored_bytes // self.source_bytes

    @property
    def period(self) -> int:
        """Pieces of 16 bytes after which windows are gathered alike; an even number, so that no 32-byte sector is cut."""
        return math.lcm(self.windows // math.gcd(self.windows, 2), 2)

    @property
    def steady(self) -> bool:
        """Whether every block steps by a multiple of the period."""
        return 0 < self.period <= 32


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, compiled where it is first launched."""
    dependent = variant.generation >= 90
    if variant.vectors:
        parameters = ("u32*", "u32*", "f32*", *["i64"] * 8)
        registers = 40 if variant.windows and variant.vectors <= 4 else 0  # 12 blocks of 128 threads a multiprocessor, not 10
        return Kernel(variant.name, row_in_registers(variant), *parameters, max_registers=registers, programmatic=dependent)
    parameters = (f"u{8 * variant.source_bytes}*", "u32*", "f32*", *["i64"] * 6)
    return Kernel(variant.name, row_from_memory(variant), *parameters, max_threads=256, programmatic=dependent)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _to_stored(variant: Variant) -> Any:
    """From four floats to a word of 8-bit values."""
    if variant.stored == INT8.name:
        return to_int8x4
    return to_float8x4 if variant.generation >= 89 else to_float8x4_early


def _largest(variant: Variant) -> Any:
    """t, the largest quantized magnitude; of no use to 16-bit types."""
    return np.float32(Scheme.of(variant.stored).weights.limit)


def _converter(variant: Variant) -> Any:
    """A device function: four words of x, and the inverse of the scale, to `variant.words` words of stored values."""
    words = ("u32",) * 4
    if variant.source == variant.stored:

        @device_function(words, *words, "f32")
        def as_they_are(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
            return a, b, c, d

        return as_they_are
    low, high = LOW[variant.source], HIGH[variant.source]
    if not variant.quantizes:
        two = ROUND_TWO[variant.stored]

        @device_function(words[:2], *words, "f32")
        def rounded_words(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
            return two(low(a), low(b)), two(low(c), low(d))

        @device_function(words, *words, "f32")
        def rounded_halves(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
            return two(low(a), high(a)), two(low(b), high(b)), two(low(c), high(c)), two(low(d), high(d))

        return rounded_words if variant.words == 2 else rounded_halves
    to_stored = _to_stored(variant)

    @device_function("u32", "f32", "f32", "f32", "f32", "f32")
    def four(a: Float, b: Float, c: Float, d: Float, inverse: Float) -> Word:
        return to_stored(multiply(a, inverse), multiply(b, inverse), multiply(c, inverse), multiply(d, inverse))

    @device_function(words[:1], *words, "f32")
    def quantized_words(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
        return (four(low(a), low(b), low(c), low(d), inverse),)

    @device_function(words[:2], *words, "f32")
    def quantized_halves(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
        return four(low(a), high(a), low(b), high(b), inverse), four(low(c), high(c), low(d), high(d), inverse)

    return quantized_words if variant.words == 1 else quantized_halves


@device_function("u32", "u32")
def place_in_stage(piece: Word) -> Word:
    """Where a piece of a stage of an 8-bit type stands, in the low three bits: `operand.HALVES`."""
    return HALVES >> np.uint32(np.uint32(4) * (piece & SEVEN))


@device_function("u32", "u32", "u32")
def larger_float32(peak: Word, word: Word) -> Word:
    """The largest magnitude so far, and that of one more float32: non-negative floats sort like their bits, NaN last."""
    return larger(peak, word & np.uint32(0x7FFFFFFF))


@device_function("u32", "u32", "u32")
def larger_float16x2(peak: Word, word: Word) -> Word:
    """The same of two 16-bit floats in a word."""
    return larger_halves(peak, word & np.uint32(0x7FFF7FFF))


@device_function("u32", "u32", "u32")
def larger_float16x2_early(peak: Word, word: Word) -> Word:
    """The same before sm_90."""
    low = larger(peak & np.uint32(0xFFFF), word & np.uint32(0x7FFF))
    return larger(peak & np.uint32(0xFFFF0000), word & np.uint32(0x7FFF0000)) | low


# ---- lifting ---------------------------------------------------------------------------------------------------------


def _gatherer(variant: Variant) -> tuple[Any, Any]:
    """Two device functions that gather a piece of 16 bytes from a row of words in shared memory.

    place(piece) -> the first word, words from it to the third, four selectors; words first, + 1, third, + 1 are read;
    joined(those four words, the selectors) -> the piece
    """
    windows = np.uint32(max(1, variant.windows))
    placed, words = ("u64", "u64", "u32", "u32", "u32", "u32"), ("u32",) * 4

    @device_function(placed, "u32")
    def place_two(piece: Word) -> tuple[Any, ...]:
        window = np.uint32(np.uint32(2) * piece)
        group = np.uint32(window // windows)
        left = np.uint32(windows - (window - group * windows))  # windows to the group's end, this one too
        return np.uint64(window + group), NEXT if left > np.uint32(1) else NEXT + NEXT, FIRST, FIRST, FIRST, FIRST

    @device_function(placed, "u32")
    def place_four(piece: Word) -> tuple[Any, ...]:
        window = np.uint32(np.uint32(4) * piece)
        group = np.uint32(window // windows)
        left = np.uint32(windows - (window - group * windows))
        pair = np.uint32(window + group)
        return (
            np.uint64(pair >> np.uint32(1)),
            NEXT + NEXT,
            MIDDLE if pair & np.uint32(1) else FIRST,
            MIDDLE if left > np.uint32(1) else SECOND,
            FIRST if left > np.uint32(2) else MIDDLE,
            MIDDLE if left > np.uint32(3) else SECOND,
        )

    @device_function(words, *words, *words)
    def as_read(a: Word, b: Word, c: Word, d: Word, s0: Word, s1: Word, s2: Word, s3: Word) -> tuple[Word, ...]:
        return a, b, c, d

    @device_function(words, *words, *words)
    def permuted(a: Word, b: Word, c: Word, d: Word, s0: Word, s1: Word, s2: Word, s3: Word) -> tuple[Word, ...]:
        a, b, c = permute(a, b, s0), permute(b, c, s0), permute(c, d, s0)
        return a, permute(a, b, s1), permute(b, c, s2), permute(b, c, s3)

    if variant.stored_bytes == 2:  # two windows of two words
        return place_two, as_read
    return place_four, as_read if variant.windows == 1 else permuted  # 2:4: nothing overlaps


# ---- kernels ---------------------------------------------------------------------------------------------------------


def row_in_registers(variant: Variant) -> Any:
    """A block holds its row in registers: thread t the 16-byte vectors t, t + threads, t + 2 threads ..."""
    convert, (place, joined) = _converter(variant), _gatherer(variant)
    low: Any = LOW.get(variant.source)
    t, quantizes, halves = _largest(variant), variant.quantizes, variant.source_bytes == 2
    more = larger_float32 if not halves else larger_float16x2 if variant.generation >= 90 else larger_float16x2_early
    vectors, held_words, stored_words, stored_bytes = variant.vectors, 4 * variant.vectors, variant.words, variant.stored_bytes
    lifted, image, steady, dependent = variant.windows > 0, variant.image, variant.steady, variant.generation >= 90

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes
        out: Any,  # [m, pitch] units of `stored_words` words; lifted [m, pitch] pieces of 16 bytes; image [stages, pitch]
        scale: Any,  # [m], if values are quantized
        m: Any,
        ld: int,
        filled: int,  # vectors of x that a row has
        total: int,  # vectors that are written, or, lifted, read by some window; those from `filled` on are zero
        pitch: int,
        pieces: int,  # of a lifted row
        step: int,  # pieces that the block makes at a time
        advance: int,  # words of a row from the first of one piece to the first of the piece `step` later, if steady
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        held = cuda.local.array(held_words, np.uint32)
        row, thread, threads = np.int64(cuda.blockIdx.x), np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        x_row, last = min(row, m - 1) * ld, np.uint32(filled - 1)  # an image has rows past m: zeros
        for v in range(vectors):  # past the end, the last vector again: no branch, and the same largest magnitude
            at = np.uint32(thread + np.uint32(v) * threads)
            a, b, c, d = load4(x, x_row + np.int64(min(at, last)))
            held[4 * v], held[4 * v + 1], held[4 * v + 2], held[4 * v + 3] = a, b, c, d
        live, inverse = np.uint32(0xFFFFFFFF) if row < m else np.uint32(0), np.float32(1)
        if quantizes:
            peak = np.uint32(0)
            for w in range(held_words):
                peak = more(peak, held[w])
            if halves:
                peak = larger(peak & np.uint32(0xFFFF), peak >> np.uint32(16))
            row_scaled, inverse = row_scale(low(block_max(peak)), t)
            if thread == 0 and row < m:
                scale[row] = row_scaled
            live = live if inverse > np.float32(0) else np.uint32(0)  # x 0 would keep signs, and NaN
        if lifted:
            line = cuda.shared.array(0, WORD, alignment=ALIGNMENT)
        for v in range(vectors):
            at = np.uint32(thread + np.uint32(v) * threads)
            if at < np.uint32(total):
                keep = live if at <= last else np.uint32(0)
                stored = convert(held[4 * v], held[4 * v + 1], held[4 * v + 2], held[4 * v + 3], inverse)
                if lifted:
                    word = np.uint64(at) * np.uint64(stored_words)
                    line[word] = stored[0] & keep
                    if stored_words > 1:
                        line[word + NEXT] = stored[1] & keep
                    if stored_words > 2:
                        line[word + NEXT + NEXT] = stored[2] & keep
                        line[word + NEXT + NEXT + NEXT] = stored[3] & keep
                elif stored_words == 1:
                    out[row * pitch + np.int64(at)] = stored[0] & keep
                else:
                    store2(out, row * pitch + np.int64(at), stored[0] & keep, stored[1] & keep)
        if lifted:
            cuda.syncthreads()
            piece = thread
            if piece < np.uint32(step):
                first, skip, s0, s1, s2, s3 = place(piece)
                at_row = (row >> 3) * 64 + (row & 7) * 8 if image else row * pitch
                while piece < np.uint32(pieces):
                    third = first + skip
                    a, b, c, d = line[first], line[first + NEXT], line[third], line[third + NEXT]
                    a, b, c, d = joined(a, b, c, d, s0, s1, s2, s3)
                    if image:
                        stands = (place_in_stage(piece) if stored_bytes == 1 else piece) ^ np.uint32(row)
                        to = np.int64(piece >> np.uint32(3)) * pitch + at_row + np.int64(stands & SEVEN)
                    else:
                        to = at_row + np.int64(piece)
                    store4(out, to, a, b, c, d)
                    piece = np.uint32(piece + np.uint32(step))
                    if steady:
                        first = first + np.uint64(advance)
                    else:
                        first, skip, s0, s1, s2, s3 = place(piece)

    return kernel


def row_from_memory(variant: Variant) -> Any:
    """A block reads its row twice, element by element; thread t writes the words t, t + threads ..."""
    low: Any = LOW.get(variant.source)
    two: Any = ROUND_TWO.get(variant.stored)
    quantizes, t, to_stored = variant.quantizes, _largest(variant), _to_stored(variant)
    stored_bytes = variant.stored_bytes
    per_word, same = 4 // stored_bytes, variant.source == variant.stored  # elements in a word
    bits = np.uint32(32 // per_word)
    magnitude = np.uint32(0x7FFFFFFF if variant.source == "float32" else 0x7FFF)
    windows, group, lifted = variant.windows, 2 * variant.windows + 2, variant.windows > 0
    image, dependent = variant.image, variant.generation >= 90

    def kernel(
        x: Any,  # [m, k] elements of strides ld, stride
        out: Any,  # [m, pitch] words, or image [stages, pitch] pieces of 16 bytes
        scale: Any,  # [m], if values are quantized
        m: int,
        ld: int,
        stride: int,
        k: int,
        pitch: int,
        words: int,  # that are written of a row
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        row, thread, threads = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        columns = k if row < m else 0  # an image has rows past m: zeros
        inverse = np.float32(1)
        if quantizes:
            peak = np.uint32(0)
            for column in range(thread, columns, threads):
                peak = larger(peak, x[row * ld + column * stride] & magnitude)
            row_scaled, inverse = row_scale(low(block_max(peak)), t)
            if thread == 0 and row < m:
                scale[row] = row_scaled
            if not inverse > np.float32(0):
                columns = 0
        for word in range(thread, words, threads):
            column = word * per_word
            if lifted:  # past the last group there are no columns: zeros
                window, inside = column // 4, column % 4
                column = window // windows * group + window % windows * 2 + inside
            if quantizes:
                q = cuda.local.array(4, np.float32)
                for i in range(4):
                    q[i] = np.float32(0)
                    if column + i < columns:
                        q[i] = multiply(low(x[row * ld + (column + i) * stride]), inverse)
                value = to_stored(q[0], q[1], q[2], q[3])
            elif same:
                value = np.uint32(0)
                for i in range(per_word):
                    if column + i < columns:
                        value |= np.uint32(np.uint32(x[row * ld + (column + i) * stride]) << np.uint32(np.uint32(i) * bits))
            else:
                first = second = np.float32(0)
                if column < columns:
                    first = low(x[row * ld + column * stride])
                if column + 1 < columns:
                    second = low(x[row * ld + (column + 1) * stride])
                value = two(first, second)
            if image:
                piece = np.uint32(word >> 2)
                stands = (place_in_stage(piece) if stored_bytes == 1 else piece) ^ np.uint32(row)
                to = (word >> 5) * pitch + (row >> 3) * 64 + (row & 7) * 8 + np.int64(stands & SEVEN)
                out[4 * to + (word & 3)] = value
            else:
                out[row * pitch + word] = value

    return kernel
