"""The stages of a token's activations, as device functions: load, largest, convert, store, lift; their values' places.

How windows are gathered. Shared memory holds a row in pairs of columns, two bytes each, or four of a 16-bit type. Window w
starts at pair w + w // windows, for a group has one pair more than windows. A thread makes 16 bytes: four windows of an 8-bit
type, from six pairs in a row, or two of a 16-bit type. It reads four words, moves them by half a word if the first
pair is an odd one, and takes each window from two words by one byte permute, whose selector says whether the group has ended
before it. Where threads step by a multiple of the period of all that, selectors are made once a thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arch.operand import HALVES as HALVES_AT
from ...core.dtypes import FLOAT8, INT8
from ...core.scheme import Block
from ..jit.numba import device_function
from .numbers import HIGH, LOW, ROUND_TWO, to_float8x4_early, to_int8x4
from .ptx import (
    Float,
    Word,
    arrive_in_cluster,
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
)

ZERO, SEVEN = np.uint32(0), np.uint32(7)
NEXT = np.uint64(1)
"""From a word of shared memory to the next; signed indices might count from the end, and cost more."""

HALVES = np.uint32(sum(int(place) << 4 * chunk for chunk, place in enumerate(HALVES_AT)))
"""A nibble a chunk."""

# Selectors of a byte permute of two words, seen as four half-words, lowest first.
FIRST, MIDDLE, SECOND = (np.uint32(s) for s in (0x3210, 0x5432, 0x7654))


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        source: type of x: "bfloat16", "float16" or "float32"; or that of `stored`, whose values are moved as they are.
        stored: "int8" or "float8_e4m3fn"; for tiles also "bfloat16" or "float16"; "float4_e2m1fn" with block scales.
        vectors: 16-byte loads a thread makes, of rows of up to 1024 times as many; 0: element by element, any row. With block
            scales 1: four columns at a time.
        windows: of the pattern, if values are lifted; else 0.
        tiled: lifted values are written in swizzled tiles (arch/operand.py); else in rows.
        architecture: the oldest it runs on: 80; 89: converts to float8 by an instruction; 90: packed maxima, and PDL.
        block: scales of what is quantized after it is lifted.
        spread: blocks of a cluster that share a row, with vectors.
    """

    source: str
    stored: str
    vectors: int
    windows: int = 0
    tiled: bool = False
    architecture: int = 80
    block: Block | None = None
    spread: int = 1

    @property
    def name(self) -> str:
        parts = ["activations", f"rows{self.vectors}" if self.vectors else "any", self.source, self.stored]
        parts += [self.block.scale.name] if self.block else []
        parts += [f"{'tiles' if self.tiled else 'lift'}{self.windows}"] * (self.windows > 0)
        parts += [f"by{self.spread}"] * (self.spread > 1)
        return "_".join([*parts, f"g{self.architecture}"])

    @property
    def programmatic(self) -> bool:
        """Whether kernels are launched with PDL."""
        return self.architecture >= 90

    @property
    def quantizes(self) -> bool:
        return self.stored in (INT8.name, FLOAT8.name) and self.source != self.stored

    @property
    def source_bytes(self) -> int:
        """Bytes of an element of x."""
        return {"float32": 4, INT8.name: 1, FLOAT8.name: 1}.get(self.source, 2)

    @property
    def stored_bytes(self) -> int:
        return 1 if self.stored in (INT8.name, FLOAT8.name) else 2

    @property
    def words(self) -> int:
        """Words of stored values that 16 bytes of x give."""
        return 4 * self.stored_bytes // self.source_bytes

    @property
    def period(self) -> int:
        """16-byte chunks after which windows are gathered alike; an even number, so that no 32-byte sector is cut."""
        return math.lcm(self.windows // math.gcd(self.windows, 2), 2)

    @property
    def steady(self) -> bool:
        """Whether every block steps by a multiple of the period."""
        return 0 < self.period <= 32


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _to_stored(variant: Variant) -> Any:
    """From four floats to a word of 8-bit values."""
    if variant.stored == INT8.name:
        return to_int8x4
    return to_float8x4 if variant.architecture >= 89 else to_float8x4_early


def converter(variant: Variant) -> Any:
    """A device function: four words of x, and the inverse of the scale, to four words, of which `variant.words` are stored."""
    words = ("u32",) * 4
    low: Any = LOW.get(variant.source)
    high: Any = HIGH.get(variant.source)
    two: Any = ROUND_TWO.get(variant.stored)
    to_stored = _to_stored(variant)

    @device_function("u32", *("f32",) * 5)
    def four(a: Float, b: Float, c: Float, d: Float, inverse: Float) -> Word:
        return to_stored(multiply(a, inverse), multiply(b, inverse), multiply(c, inverse), multiply(d, inverse))

    @device_function(words, *words, "f32")
    def as_they_are(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
        return a, b, c, d

    @device_function(words, *words, "f32")
    def rounded_words(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
        return two(low(a), low(b)), two(low(c), low(d)), ZERO, ZERO

    @device_function(words, *words, "f32")
    def rounded_halves(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
        return two(low(a), high(a)), two(low(b), high(b)), two(low(c), high(c)), two(low(d), high(d))

    @device_function(words, *words, "f32")
    def quantized_words(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
        return four(low(a), low(b), low(c), low(d), inverse), ZERO, ZERO, ZERO

    @device_function(words, *words, "f32")
    def quantized_halves(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> tuple[Word, ...]:
        return four(low(a), high(a), low(b), high(b), inverse), four(low(c), high(c), low(d), high(d), inverse), ZERO, ZERO

    if variant.source == variant.stored:
        return as_they_are
    if variant.source == "float32":
        return quantized_words if variant.quantizes else rounded_words
    return quantized_halves if variant.quantizes else rounded_halves


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
    """Two device functions that gather a 16-byte chunk from a row of words in shared memory.

    first_words(chunk) -> the first word, words from it to the third, four selectors; words first, + 1, third, + 1 are read;
    joined(those four words, the selectors) -> the chunk
    """
    windows = np.uint32(max(1, variant.windows))
    placed, words = ("u64", "u64", "u32", "u32", "u32", "u32"), ("u32",) * 4

    @device_function(placed, "u32")
    def place_two(chunk: Word) -> tuple[Any, ...]:
        window = np.uint32(np.uint32(2) * chunk)
        group = np.uint32(window // windows)
        left = np.uint32(windows - (window - group * windows))  # windows to the group's end, this one too
        return np.uint64(window + group), NEXT if left > np.uint32(1) else NEXT + NEXT, FIRST, FIRST, FIRST, FIRST

    @device_function(placed, "u32")
    def place_four(chunk: Word) -> tuple[Any, ...]:
        window = np.uint32(np.uint32(4) * chunk)
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


def starter(variant: Variant) -> Any:
    """begin(): with PDL, let the grid after this one start, once those before are complete; tell the cluster that it runs."""
    shares = variant.spread > 1 and variant.quantizes

    @device_function("void")
    def at_once() -> None:
        pass

    @device_function("void")
    def after_earlier_grids() -> None:
        if shares:
            arrive_in_cluster()
        wait_for_earlier_grids()
        launch_later_grid()

    return after_earlier_grids if variant.programmatic else at_once


# ---- stages ----------------------------------------------------------------------------------------------------------


def placer(variant: Variant) -> Any:
    """place(chunk, row, pitch) -> where a 16-byte chunk of a row of `out` is stored: in rows, or tiles (arch/operand.py)."""
    tiled, narrow = variant.tiled, variant.stored_bytes == 1

    @device_function("i64", "u32", "i64", "i64")
    def place(chunk: Word, row: int, pitch: int) -> Any:
        if not tiled:
            return row * pitch + np.int64(chunk)
        inside = HALVES >> np.uint32(np.uint32(4) * (chunk & SEVEN)) if narrow else chunk
        swizzled = np.int64((inside ^ np.uint32(row)) & SEVEN)
        return np.int64(chunk >> np.uint32(3)) * pitch + ((row >> 3) * 64 + (row & 7) * 8) + swizzled

    return place


def loader(variant: Variant) -> tuple[Any, Any]:
    """Two device functions over the registers of a thread: load(its vectors of x); largest(magnitude in them)."""
    vectors, words, halves = variant.vectors, 4 * variant.vectors, variant.source_bytes == 2
    more = larger_float32 if not halves else larger_float16x2 if variant.architecture >= 90 else larger_float16x2_early

    @device_function("void", "u32*", "i64", "u32", "u32", "u32", "u32[]")
    def load(x: Any, row_start: int, last: Word, thread: Word, threads: Word, held: Any) -> None:
        for v in range(vectors):  # past the end, the last vector again: no branch, and the same largest magnitude
            at = np.uint32(thread + np.uint32(v) * threads)
            a, b, c, d = load4(x, row_start + np.int64(min(at, last)))
            held[4 * v], held[4 * v + 1], held[4 * v + 2], held[4 * v + 3] = a, b, c, d

    @device_function("u32", "u32[]")
    def largest(held: Any) -> Word:
        peak = ZERO
        for w in range(words):
            peak = more(peak, held[w])
        return larger(peak & np.uint32(0xFFFF), peak >> np.uint32(16)) if halves else peak

    return load, largest


def storer(variant: Variant) -> Any:
    """A vector of stored values: to its words of the row in shared memory (lifted), or of the row of `out`."""
    words = variant.words

    @device_function("void", "u32[]", "u64", *("u32",) * 4)
    def to_shared(line: Any, at: int, a: Word, b: Word, c: Word, d: Word) -> None:
        line[at] = a
        if words > 1:
            line[at + NEXT] = b
        if words > 2:
            line[at + NEXT + NEXT] = c
            line[at + NEXT + NEXT + NEXT] = d

    @device_function("void", "u32*", "i64", *("u32",) * 4)
    def to_row(out: Any, at: int, a: Word, b: Word, c: Word, d: Word) -> None:
        if words == 1:
            out[at] = a
        else:
            store2(out, at, a, b)

    return to_shared if variant.windows else to_row


def lifter(variant: Variant) -> Any:
    """From a row in shared memory to its 16-byte chunks in `out`, the first of which is `origin`: `reference.lift`."""
    (first_words, joined), place, steady = _gatherer(variant), placer(variant), variant.steady

    @device_function("void", "u32[]", "u32*", "i64", "i64", "u32", "u32", "u32", "u64", "u32")
    def lift(
        line: Any, out: Any, row: int, pitch: int, thread: Word, chunks: Word, step: Word, advance: int, origin: Word
    ) -> None:
        chunk = thread
        if chunk < step:
            first, skip, s0, s1, s2, s3 = first_words(chunk)
            while chunk < chunks:
                third = first + skip
                a, b, c, d = line[first], line[first + NEXT], line[third], line[third + NEXT]
                a, b, c, d = joined(a, b, c, d, s0, s1, s2, s3)
                store4(out, place(np.uint32(origin + chunk), row, pitch), a, b, c, d)
                chunk = np.uint32(chunk + step)
                if steady:
                    first = first + advance
                else:
                    first, skip, s0, s1, s2, s3 = first_words(chunk)

    return lift


def word_maker(variant: Variant) -> Any:
    """word(x, start, stride, left, inverse) -> a word of stored values, from elements of x; those past `left` are zeros."""
    low: Any = LOW.get(variant.source)
    two: Any = ROUND_TWO.get(variant.stored)
    to_stored, per_word = _to_stored(variant), 4 // variant.stored_bytes
    bits = 32 // per_word
    signature = "u32", f"u{8 * variant.source_bytes}*", "i64", "i64", "i64", "f32"

    @device_function("f32", *signature[1:5], "i64")
    def number(x: Any, start: int, stride: int, left: int, i: int) -> Float:
        return low(x[start + i * stride]) if i < left else np.float32(0)

    @device_function(*signature)
    def quantized(x: Any, start: int, stride: int, left: int, inverse: Float) -> Word:
        a, b = number(x, start, stride, left, 0), number(x, start, stride, left, 1)
        c, d = number(x, start, stride, left, 2), number(x, start, stride, left, 3)
        return to_stored(multiply(a, inverse), multiply(b, inverse), multiply(c, inverse), multiply(d, inverse))

    @device_function(*signature)
    def rounded(x: Any, start: int, stride: int, left: int, inverse: Float) -> Word:
        return two(number(x, start, stride, left, 0), number(x, start, stride, left, 1))

    @device_function(*signature)
    def as_they_are(x: Any, start: int, stride: int, left: int, inverse: Float) -> Word:
        word = ZERO
        for i in range(per_word):
            if i < left:
                word |= np.uint32(np.uint32(x[start + i * stride]) << np.uint32(i * bits))
        return word

    return quantized if variant.quantizes else as_they_are if variant.source == variant.stored else rounded
