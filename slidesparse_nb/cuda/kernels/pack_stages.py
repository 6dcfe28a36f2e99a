"""The stages of packing a row of weights, as device functions: load, prune, largest, quantize, slide, compress, store.

prune, quantize, slide and compress give the bits of the functions of these names in `core.reference`. Most stages are made for
a `Variant` of the kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.dtypes import FLOAT8, INT8, PACKED, DType
from ...core.scheme import Scheme
from ..jit.numba import device_function
from .numbers import INFINITY, LOW, ROUND, to_float8
from .ptx import Float, Word, add, as_word, larger, load4, multiply, to_bfloat16, to_float8x2, to_float16

LARGEST_HELD = 16
"""Longest group (columns) that a thread holds in registers."""

NOTHING = 2**64 - 1
REPORT = 5
NOT_FINITE, OVERFLOW, BAD_SCORE, FIRST, COUNT = range(REPORT)
"""Words of a report on packing: lowest row * k + column of a NaN or infinity in w; of an infinity that rounding made; of a
score that is negative or not finite; lowest row * groups + group that breaks the pattern; how many do. `NOTHING`: none."""

BITS = {"float32": 32} | {d.name: d.bits for d in PACKED}
NUMBERS = {"float32": INFINITY} | {d.name: np.uint32(d.inf_bits or 2**32 - 1) for d in PACKED}
"""Least magnitude bits, by type, that are not a number's."""

NONE = np.uint32(2**32 - 1)
"""No column."""

METHODS = {
    "none": (False, False, False),
    "magnitude": (True, False, False),
    "scores": (True, True, False),
    "random": (True, False, True),
}
"""Name of a method that the kernels know -> whether it prunes, by scores that are given, by random numbers."""

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

    @property
    def ranked(self) -> bool:
        """Pruning goes by something else than magnitude: a row may lose its largest."""
        return any(METHODS[self.prune][1:])

    @property
    def bits(self) -> int:
        """Of an element of w."""
        return BITS[self.source]

    @property
    def ones(self) -> Word:
        return np.uint32(2**self.bits - 1)

    @property
    def magnitude(self) -> Word:
        """Mask of an element without its sign; int8 keeps it."""
        return self.ones if self.source == "int8" else np.uint32(self.ones >> 1)

    @property
    def pointer(self) -> str:
        """How the kernel sees w: words, or elements."""
        return "u32*" if self.vector else f"u{self.bits}*"

    @property
    def group(self) -> int:
        """Columns of a group."""
        return 2 * self.windows + 2

    @property
    def groups(self) -> int:
        """Groups of a slice unit, which has whole index bytes."""
        return 1 + self.windows % 2

    @property
    def span(self) -> int:
        """Groups that are loaded at a time: more would not stay in registers."""
        return self.groups if self.group <= 8 else 1

    @property
    def held(self) -> int:
        """Words of a span in registers; 0: none."""
        return self.span * self.group * self.bits // 32 if self.vector else 0


# ---- tables -------------------------------------------------------------------------------------------------


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
    """The finalizer of SplitMix64, as in `core.prune.uniform`."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@device_function("u64", "i64", "i64", "i64")
def key_of_row(seed_low: int, seed_high: int, row: int) -> Any:
    """What the random numbers of a row start from."""
    key = mixed(np.uint64(seed_high) << np.uint64(32) | np.uint64(seed_low))
    return mixed(key + np.uint64(row + 1) * GAMMA)


# ---- stages ------------------------------------------------------------------------------------------------------
#
# A span is one or two groups of a row, as a tuple (w, held, at, step, start, left): words in the registers `held` (vector
# loads), else elements of w from `at` on, `step` apart. Its first column is `start`; the row has `left` columns from there on,
# further ones are zeros. `dropped` and `second`: columns of a group that pruning zeroes, or NONE. `found`: a thread's part of
# the report, the lowest column of each fault, and COUNT.


def _span_type(variant: Variant) -> Any:
    return variant.pointer, "u32[]", *("i64",) * 4


@functools.cache
def loader(variant: Variant) -> tuple[Any, Any]:
    """load(...) -> the span of group g of a slice unit, in registers if they hold it; element(span, i) -> its bits."""
    bits, vector, ones, group, span_groups = variant.bits, variant.vector, variant.ones, variant.group, variant.span
    per_word, per_load, groups = 32 // bits, vector * 32 // bits, variant.groups
    loads = variant.held // vector if vector else 0

    @device_function(_span_type(variant), variant.pointer, "u32[]", *("i64",) * 5)
    def load(w: Any, held: Any, row_start: int, unit: int, g: int, step: int, k: int) -> Any:
        start = (unit * groups + g) * group
        left = k - start
        at = row_start + ((unit * groups + g) // span_groups * loads if vector else start * step)
        for v in range(loads):
            if vector == 4:
                x = y = z = u = np.uint32(0)
                if v * per_load < left:
                    x, y, z, u = load4(w, at + v)
                held[4 * v], held[4 * v + 1], held[4 * v + 2], held[4 * v + 3] = x, y, z, u
            else:
                held[v] = np.uint32(w[at + v]) if v * per_load < left else np.uint32(0)
        return w, held, at, step, start, left

    @device_function("u32", _span_type(variant), "i64")
    def element(span: Any, i: int) -> Word:
        w, held, at, step, _, left = span
        if vector:
            return np.uint32(held[i // per_word] >> np.uint32(bits * (i % per_word)) & ones)
        return np.uint32(w[at + i * step]) if i < left else np.uint32(0)

    return load, element


def pruner(variant: Variant) -> Any:
    """The two columns of a group that `reference.prune` zeroes: those of lowest score, of equal ones the rightmost."""
    pruned, scored, random = METHODS[variant.prune]
    _, element = loader(variant)
    group, magnitude, signed = variant.group, variant.magnitude, variant.source == "int8"
    narrow = variant.bits <= 16 and not variant.ranked
    Key, word = (np.uint32, "u32") if narrow else (np.uint64, "u64")
    shift, places, highest = (Key(16), Key(0xFFFF), Key(2**32 - 1)) if narrow else (Key(32), Key(0xFFFF), Key(2**64 - 1))

    @device_function(word, word, word)
    def lower(a: Any, b: Any) -> Any:  # of the operands' own type: Numba's min of two words has 64 bits
        return a if a < b else b

    @device_function(word, word, word)
    def higher(a: Any, b: Any) -> Any:
        return b if a < b else a

    @device_function(word, "u32", "i64", "i64", "u32*", "i64", "u64", "u32[]")
    def rank(element: Word, column: int, left: int, score: Any, at: int, row_key: Any, found: Any) -> Any:
        size = np.uint32(element & magnitude)
        if signed and size > np.uint32(128):
            size = np.uint32(256) - size
        key = Key(size)
        if scored:
            given = np.uint32(score[at + column]) if left > 0 else np.uint32(0)
            absolute = given & np.uint32(0x7FFFFFFF)
            if absolute >= INFINITY or given > np.uint32(0x80000000):
                found[BAD_SCORE] = min(found[BAD_SCORE], np.uint32(column))
            key = Key(absolute) + Key(1)
        if random:
            key = (mixed(row_key + np.uint64(column + 1) * GAMMA) >> np.uint64(40)) + Key(1)
        return Key(0) if size == np.uint32(0) else key  # zeros go first, those past k before all

    @device_function(("u32", "u32"), _span_type(variant), "i64", "u32*", "i64", "u64", "u32[]")
    def prune(span: Any, first: int, score: Any, at: int, row_key: Any, found: Any) -> tuple[Word, Word]:
        if not pruned:
            return NONE, NONE
        start, left = span[4], span[5]
        lowest = second = highest
        for j in range(group):
            i = first + j
            ranked = rank(element(span, i), start + i, left - i, score, at, row_key, found)
            key = Key(ranked << shift | Key(group - 1 - j))  # unique; of equal scores the rightmost is lowest
            second = lower(second, higher(lowest, key))
            lowest = lower(lowest, key)
        last = np.uint32(group - 1)
        return np.uint32(last - np.uint32(lowest & places)), np.uint32(last - np.uint32(second & places))

    return prune


@device_function("u32", "u32", "i64", "u32", "u32")
def unless_dropped(element: Word, column: int, dropped: Word, second: Word) -> Word:
    """An element of a group, or 0 if pruning zeroes its column."""
    return np.uint32(0) if dropped == np.uint32(column) or second == np.uint32(column) else element


@device_function("void", "u32[]", "i64", "i64", "u32", "u32", "u32")
def find(found: Any, word: int, column: int, x: Word, y: Word, limit: Word) -> None:
    """found[word] is at most the column of the first of two magnitudes that is not below the limit."""
    if larger(x, y) >= limit:
        found[word] = min(found[word], np.uint32(column if x >= limit else column + 1))


def largest(variant: Variant) -> tuple[Any, Any]:
    """The largest magnitude bits that a thread sees: in vectors of its row; in a group, of what pruning keeps."""
    _, element = loader(variant)
    vector, bits, magnitude, group = variant.vector, variant.bits, variant.magnitude, variant.group
    per_load = vector * 32 // bits if vector else 1

    @device_function("u32", "u32", "u32", "u32", "u32")
    def largest_of_four(x: Word, y: Word, z: Word, u: Word) -> Word:
        return larger(larger(x & magnitude, y & magnitude), larger(z & magnitude, u & magnitude))

    @device_function("u32", variant.pointer, *("i64",) * 5)
    def largest_in_row(w: Any, row_start: int, step: int, k: int, thread: int, threads: int) -> Word:
        peak = np.uint32(0)
        at = thread
        while at * per_load < k:
            if vector == 4:
                x, y, z, u = load4(w, row_start + at)
            else:
                x = y = z = u = np.uint32(w[row_start + at * step])
            peak = larger(peak, largest_of_four(x, y, z, u))
            if vector and bits == 16:
                h = np.uint32(16)
                peak = larger(peak, largest_of_four(x >> h, y >> h, z >> h, u >> h))
            at += threads
        return peak

    @device_function("u32", _span_type(variant), "i64", "u32", "u32")
    def largest_kept(span: Any, first: int, dropped: Word, second: Word) -> Word:
        peak = np.uint32(0)
        for j in range(group):
            peak = larger(peak, unless_dropped(element(span, first + j), j, dropped, second) & magnitude)
        return peak

    return largest_in_row, largest_kept


def quantizer(variant: Variant) -> Any:
    """Two elements' stored bits: `reference.quantize`'s values, or `round16`'s, or as they are."""
    low: Any = LOW.get(variant.source)
    source, stored = variant.source, variant.stored
    rounded = to_bfloat16 if stored.name == "bfloat16" else to_float16
    native = variant.native
    signature = ("u32", "u32"), "u32", "u32", "f32"

    @device_function(*signature)
    def as_they_are(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        return x, y

    @device_function(*signature)
    def to_int8(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        p, q = as_word(add(multiply(low(x), inverse), ROUND)), as_word(add(multiply(low(y), inverse), ROUND))
        return p & np.uint32(0xFF), q & np.uint32(0xFF)

    @device_function(*signature)
    def to_float8_pair(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        p, q = multiply(low(x), inverse), multiply(low(y), inverse)
        if native:
            pair = to_float8x2(p, q)
            return pair & np.uint32(0xFF), pair >> np.uint32(8)
        return to_float8(p), to_float8(q)

    @device_function(*signature)
    def to_half(x: Word, y: Word, inverse: Float) -> tuple[Word, Word]:
        return rounded(low(x)), rounded(low(y))

    if source == stored.name:
        return as_they_are
    return {INT8: to_int8, FLOAT8: to_float8_pair}.get(stored, to_half)


@device_function(("u32",) * 5, *("u32",) * 4)
def compress(a: Word, b: Word, c: Word, d: Word) -> tuple[Word, Word, Word, Word, Word]:
    """A window takes its first two non-zeros (`reference.compress`): its nibble, those two, and what it leaves of c and d."""
    taken = np.uint32(4 if a != np.uint32(0) else 0)
    taken = np.uint32(taken | np.uint32(8 if b != np.uint32(0) else 0))
    taken = np.uint32(taken | np.uint32(16 if c != np.uint32(0) else 0))
    table = NIBBLES_OF_LAST if d != np.uint32(0) else NIBBLES
    nibble = np.uint32(np.uint32(table >> taken) & np.uint32(15))
    i0, i1 = np.uint32(nibble & np.uint32(3)), np.uint32(nibble >> np.uint32(2))
    first = a if i0 == np.uint32(0) else b if i0 == np.uint32(1) else c
    last = b if i1 == np.uint32(1) else c if i1 == np.uint32(2) else d
    c = np.uint32(0) if i0 == np.uint32(2) or i1 == np.uint32(2) else c
    return nibble, first, last, c, np.uint32(0) if i1 == np.uint32(3) else d


def slider(variant: Variant) -> Any:
    """A group through its overlapping windows: drop, quantize, `reference.slide`, compress, store.

    `to` is a tuple (meta, at_meta, out, at_out, before) of a slice unit: where its index bytes go, and the words of its values;
    `before` has the nibble of the window before, and its pair of 8-bit values: two windows share a byte, and a word.
    """
    _, element = loader(variant)
    quantize, stored, windows = quantizer(variant), variant.stored, variant.windows
    magnitude, infinite, overflowing = variant.magnitude, NUMBERS[variant.source], NUMBERS[stored.name]
    rounds = not variant.quantized and variant.source != stored.name
    mask, stored_bits, wide = np.uint32(stored.nonzero_mask), np.uint32(stored.bits), stored.bits == 16
    to_type = "u8*", "i64", "u32[]" if variant.vector else "u32*", "i64", "u32[]"

    @device_function("void", to_type, "i64", *("u32",) * 3)
    def store(to: Any, window: int, nibble: Word, one: Word, two: Word) -> None:
        meta, at_meta, out, at_out, before = to
        pair = np.uint32(one | two << stored_bits)
        if window & 1:
            meta[at_meta + (window >> 1)] = before[0] | nibble << np.uint32(4)
        if wide:
            out[at_out + window] = pair
        elif window & 1:
            out[at_out + (window >> 1)] = np.uint32(before[1] | pair << np.uint32(16))
        before[0], before[1] = nibble, pair

    @device_function("void", _span_type(variant), to_type, *("i64",) * 2, *("u32",) * 2, "f32", "u32", "u32[]")
    def slide(
        span: Any, to: Any, g: int, window: int, dropped: Word, second: Word, inverse: Float, live: Word, found: Any
    ) -> None:
        first, column = g * (windows + 1) * 2, span[4] + g * (windows + 1) * 2
        a = b = np.uint32(0)  # what the window before left of its last two columns
        for j in range(windows + 1):
            x, y = element(span, first + 2 * j), element(span, first + 2 * j + 1)
            find(found, NOT_FINITE, column + 2 * j, x & magnitude, y & magnitude, infinite)
            x, y = unless_dropped(x, 2 * j, dropped, second), unless_dropped(y, 2 * j + 1, dropped, second)
            c, d = quantize(x & live, y & live, inverse)
            if rounds:
                find(found, OVERFLOW, column + 2 * j, c & mask, d & mask, overflowing)
            c = c if c & mask != np.uint32(0) else np.uint32(0)
            d = d if d & mask != np.uint32(0) else np.uint32(0)
            if j > 0:
                nibble, one, two, c, d = compress(a, b, c, d)
                store(to, window + j - 1, nibble, one, two)
            a, b = c, d
        if a | b != np.uint32(0):  # no window took them: the group has more than nnz non-zeros
            found[FIRST] = min(found[FIRST], np.uint32(column))
            found[COUNT] += np.uint32(1)

    return slide
