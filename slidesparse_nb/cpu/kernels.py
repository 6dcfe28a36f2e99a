"""The Numba versions of `reference`: the same names, the same bits, at the speed of a compiled loop.

Stored values are handled as raw bits (`dtype.raw`) and their non-zero mask, so that one kernel a width serves int8 and
float8, bfloat16 and float16. Each function here checks nothing and runs on one thread, with the interpreter's lock released:
callers check operands and thread over blocks of rows. Arrays are [rows, k], any strides; blocks of about 2^18 weights
stay in L2 between one step and the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import caching
from numpy.typing import NDArray

from ..core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, DType
from ..core.pattern import Pattern
from ..core.reference import TINY, nonzero_units, unit_scores
from ..core.scheme import Scheme

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)

_FunctionCache: Any = caching.FunctionCache


class _Cache(_FunctionCache):  # type: ignore[misc]
    """Numba's cache of compiled kernels, of which no fault is more than a lost cache: then a kernel is compiled again."""

    def load_overload(self, *args: Any) -> Any:
        try:
            return super().load_overload(*args)
        except Exception:  # a file cut short or garbled fails in any way that unpickling can
            return None

    def save_overload(self, *args: Any) -> None:
        try:
            super().save_overload(*args)
        except Exception:
            with contextlib.suppress(Exception):  # a full disk
                self.flush()  # an index that cannot be read would stay in the way
                super().save_overload(*args)


def jit(function: F) -> F:
    """Compile on first use, once per machine where Numba finds a folder to cache in. No fastmath: bits matter here."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError, OSError):  # neither the package's folder nor the user's cache folder can be written
        compiled._cache = _Cache(function)  # what cache=True does, with a cache of Numba's own
    return cast(F, compiled)


def contiguous(a: Array) -> Array:
    """`a`, or a contiguous writable copy: Numba would compile every kernel again for strided and for read-only arrays."""
    return a if a.flags.c_contiguous and a.flags.writeable else np.array(a, order="C")


def raw_bits(a: Array) -> Array:
    """The stored bits of a."""
    return a.view(np.dtype(f"u{a.dtype.itemsize}"))


# ---- conversions -------------------------------------------------------------------------------------------------


@cache
def float32_table(dtype: DType) -> Array:
    """The float32 value of every stored pattern of an 8- or 16-bit type: float32 [2^bits]."""
    return np.arange(2**dtype.bits, dtype=dtype.raw).view(dtype.numpy).astype(np.float32)


@jit
def _look_up(raw: Array, table: Array, out: Array) -> None:
    for i in range(raw.size):
        out[i] = table[raw[i]]


def to_float32(w: Array) -> Array:
    """A new contiguous float32 array of w (float32, float16, bfloat16, int8 or float8_e4m3fn); exact."""
    if w.dtype == BFLOAT16.numpy:
        return np.left_shift(raw_bits(w), np.uint32(16), dtype=np.uint32, order="C").view(np.float32)
    if w.dtype not in (FLOAT8.numpy, FLOAT16.numpy):
        return np.array(w, np.float32, order="C")
    out = np.empty(w.shape, np.float32)
    _look_up(contiguous(raw_bits(w)).reshape(-1), float32_table(Scheme.of(w.dtype).dtype), out.reshape(-1))
    return out


@jit
def _bfloat16(bits: Array, out: Array) -> None:
    for i in range(bits.size):
        b = bits[i]
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = ((b >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0)  # one that must not carry into its sign
        out[i] = rounded if (b & MAGNITUDE) <= INFINITY else nan


@jit
def _float16(bits: Array, out: Array) -> None:
    for i in range(bits.size):
        b = bits[i] & MAGNITUDE
        sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
        # 13 mantissa bits go, to nearest even; the exponent's bias falls from 127 to 15
        normal = ((b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)) - np.uint32(112 << 10)
        normal = min(normal, np.uint32(0x7C00))
        # below 2^-14 a step is 2^-24: adding 1/2, whose own step that is, rounds to it
        subnormal = np.float32(np.uint32(b).view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        finite = subnormal if b < np.uint32(0x38800000) else normal
        out[i] = sign | (finite if b <= INFINITY else np.uint32(0x7E00))


def round16(w: Array, dtype: DType) -> Array:
    """w float32 rounded to bfloat16 or float16, nearest even; what overflows becomes infinity. [..., k], contiguous."""
    out = np.empty(w.shape, np.uint16)
    convert = {BFLOAT16: _bfloat16, FLOAT16: _float16}[dtype]
    convert(contiguous(w).view(np.uint32).reshape(-1), out.reshape(-1))
    return out.view(dtype.numpy)


# ---- prune -------------------------------------------------------------------------------------------------------


@jit
def _prune(raw: Array, score: Array, group: int) -> None:
    rows, k = raw.shape
    highest = np.int64(0x7FFFFFFFFFFFFFFF)
    for r in range(rows):
        for start in range(0, k, group):
            size = min(group, k - start)
            # the score above, the place from the right below: unique keys, and of equal scores the rightmost is lowest
            lowest = second = highest
            for j in range(size):
                key = (np.int64(score[r, start + j]) << 32) | (size - 1 - j)
                second = min(second, max(lowest, key))
                lowest = min(lowest, key)
            if size > group - 2:
                raw[r, start + size - 1 - (lowest & 0xFFFFFFFF)] = 0
            if size == group:
                raw[r, start + size - 1 - (second & 0xFFFFFFFF)] = 0


def prune(w: Array, pattern: Pattern, score: Array | None = None) -> None:
    """`reference.prune` in place.

    Args:
        w: [rows, k] contiguous and writable, of any type up to 32 bits.
        score: float32 [rows, k], the weights or pairs with the highest stay; by default |w|, of pairs the sum of squares. Those
            below zero go first, in any order; -0.0 counts as such, so none may be there by chance.
    """
    if score is None:
        score = np.abs(w) if w.dtype == np.float32 else np.abs(to_float32(w))
        with np.errstate(over="ignore"):  # to infinity, of which the leftmost stay
            score = score * score if pattern.unit > 1 else score
    if pattern.unit == 1:
        _prune(raw_bits(w), contiguous(score).view(np.int32), pattern.group)
        return
    score = unit_scores(score, pattern.unit)
    keep = np.ones(score.shape, np.uint8)
    _prune(keep, score.view(np.int32), pattern.group)
    w[np.repeat(keep == 0, pattern.unit, axis=1)[:, : w.shape[1]]] = 0


@jit
def _violations(raw: Array, mask: Any, group: int, over: Array) -> None:
    for r in range(raw.shape[0]):
        for g in range(over.shape[1]):
            count = 0
            for c in range(g * group, min(g * group + group, raw.shape[1])):
                count += (raw[r, c] & mask) != 0
            over[r, g] = count > group - 2


def violations(w: Array, pattern: Pattern) -> Array:
    """`reference.violations`: int [count, 2], the (row, group) of every group of w with more than nnz non-zeros."""
    if pattern.unit > 1:
        w = nonzero_units(w, pattern.unit).view(np.uint8)
    over = np.empty((w.shape[0], -(-w.shape[1] // pattern.group)), np.bool_)
    raw = raw_bits(contiguous(w))
    _violations(raw, raw.dtype.type(nonzero_mask(w.dtype)), pattern.group, over)
    return np.argwhere(over)


def nonzero_mask(dtype: np.dtype[Any]) -> int:
    """The bits that tell a non-zero value of any real type: all of an integer's, all but the sign of a float's."""
    bits = dtype.itemsize * 8
    return (1 << bits) - 1 if dtype.kind in "iu" else (1 << (bits - 1)) - 1


def nonzero(w: Array) -> Array:
    """Which elements count as non-zero, as bits that are zero or not: the shape of w, unsigned."""
    raw = raw_bits(w)
    return raw if w.dtype.kind in "iu" else raw & raw.dtype.type(nonzero_mask(w.dtype))


# ---- quantize ----------------------------------------------------------------------------------------------------


@jit
def row_scale(bits: Array, r: int, t: np.float32) -> tuple[np.float32, np.float32]:
    """scale and inv of one row of float32 bits; inv is 0 where the row must become zeros."""
    largest = np.uint32(0)
    for c in range(bits.shape[1]):  # of non-negative floats the larger has the larger bits, NaN above all
        largest = max(largest, bits[r, c] & MAGNITUDE)
    if largest >= INFINITY:
        return np.float32(np.nan), np.float32(0)
    absmax = np.uint32(largest).view(np.float32)
    if absmax < TINY:
        return np.float32(1), np.float32(0)
    return absmax / t, t / absmax


@jit
def _quantize_int8(x: Array, q: Array, scale: Array) -> None:
    bits = x.view(np.uint32)
    for r in range(x.shape[0]):
        scale[r, 0], inv = row_scale(bits, r, np.float32(127))
        if inv == 0:
            q[r, :] = 0
            continue
        for c in range(x.shape[1]):
            # adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves it in the low bits
            rounded = np.float32(x[r, c] * inv + np.float32(12582912)).view(np.int32) - np.int32(0x4B400000)
            q[r, c] = min(max(rounded, np.int32(-127)), np.int32(127))


@jit
def float8_bits(v: np.float32) -> np.uint32:
    """float8_e4m3fn of 0 <= v <= 448, to nearest even."""
    b = np.float32(v).view(np.uint32)
    # 20 mantissa bits go, to nearest even; the exponent's bias falls from 127 to 7
    normal = ((b + np.uint32(0x7FFFF) + ((b >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(960)
    # below 2^-6 a step is 2^-9: adding 2^14, whose own step that is, rounds to it
    subnormal = np.float32(v + np.float32(16384)).view(np.uint32) - np.uint32(0x46800000)
    return subnormal if v < np.float32(0.015625) else normal


@jit
def _quantize_float8(x: Array, q: Array, scale: Array) -> None:
    bits = x.view(np.uint32)
    for r in range(x.shape[0]):
        scale[r, 0], inv = row_scale(bits, r, np.float32(448))
        if inv == 0:
            q[r, :] = 0
            continue
        for c in range(x.shape[1]):
            v = np.float32(x[r, c] * inv)
            sign = (np.float32(v).view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)
            q[r, c] = sign | float8_bits(min(abs(v), np.float32(448)))


def quantize(x: Array, dtype: DType) -> tuple[Array, Array]:
    """`reference.quantize`: float32 [rows, k] -> q [rows, k] of an 8-bit `dtype`, scale float32 [rows, 1].

    A row that holds NaN or infinity has scale NaN and zeros.
    """
    raw = np.empty(x.shape, np.int8 if dtype is INT8 else np.uint8)
    scale = np.empty((x.shape[0], 1), np.float32)
    {INT8: _quantize_int8, FLOAT8: _quantize_float8}[dtype](contiguous(x), raw, scale)
    return raw.view(dtype.numpy), scale


# ---- slide and compress ------------------------------------------------------------------------------------------


def _window_steps() -> Array:
    """What a window does with the non-zeros that its four columns have left: uint8 [16], indexed by their mask.

    Bits 0 to 3 are the nibble, bits 4 and 5 tell whether its first and second slot hold a value, bits 6 and 7 which of the
    window's last two columns are left to the next window. (What is left always stands there: two values come before it.)
    """
    steps = np.zeros(16, np.uint8)
    for mask in range(16):
        columns = [c for c in range(4) if mask >> c & 1]
        taken = columns[:2]
        left = sum(1 << c for c in columns[2:])
        if len(taken) == 2:
            i0, i1, used = taken[0], taken[1], 0b11
        elif taken and taken[0] > 0:
            i0, i1, used = 0, taken[0], 0b10
        else:
            i0, i1, used = 0, 1, len(taken)
        steps[mask] = i0 | i1 << 2 | used << 4 | (left >> 2) << 6
    return steps


STEPS = _window_steps()


@jit
def _slide_compress(raw: Array, mask: int, windows: int, values: Array, meta: Array) -> int:
    """Fill values and meta; return how many groups have more than nnz non-zeros."""
    k = raw.shape[1]
    group = 2 * windows + 2
    groups = 2 * meta.shape[1] // windows
    row = np.zeros(groups * group, raw.dtype)  # columns past k stay zero
    pairs = np.zeros(groups * (windows + 1), np.uint8)  # which of two neighbouring columns are non-zero
    nibbles = np.zeros(groups * windows, np.uint8)
    over = 0
    for r in range(raw.shape[0]):
        for c in range(k):
            row[c] = raw[r, c]
        for p in range(pairs.size):
            pairs[p] = ((row[2 * p] & mask) != 0) | ((row[2 * p + 1] & mask) != 0) << 1
        for g in range(groups):
            left = np.int64(pairs[g * (windows + 1)])
            for j in range(windows):
                step = np.int64(STEPS[left | np.int64(pairs[g * (windows + 1) + j + 1]) << 2])
                at = g * windows + j
                start = g * group + 2 * j
                values[r, 2 * at] = row[start + (step & 3)] * (step >> 4 & 1)
                values[r, 2 * at + 1] = row[start + (step >> 2 & 3)] * (step >> 5 & 1)
                nibbles[at] = step & 15
                left = step >> 6
            over += left != 0
        for b in range(meta.shape[1]):
            meta[r, b] = nibbles[2 * b] | nibbles[2 * b + 1] << 4
    return over


def slide_compress(q: Array, pattern: Pattern) -> tuple[Array, Array, int]:
    """`reference.slide` and `reference.compress` in one pass over stored values q [rows, k].

    Returns:
        values [rows, ks/2] of q's dtype; meta uint8 [rows, ks/8]; and how many groups break the pattern: if any does, the
        two arrays are worthless.
    """
    ks = pattern.expanded_k(q.shape[1])
    values = np.empty((q.shape[0], ks // 2), q.dtype)
    meta = np.empty((q.shape[0], ks // 8), np.uint8)
    if not q.shape[0]:  # the kernel would work in memory for a whole row, and k alone may be anything
        return values, meta, 0
    over = _slide_compress(raw_bits(contiguous(q)), nonzero_mask(q.dtype), pattern.windows, raw_bits(values), meta)
    return values, meta, int(over)


# ---- back --------------------------------------------------------------------------------------------------------


@jit
def _decompress(values: Array, meta: Array, mask: int, windows: int, table: Array, out: Array) -> None:
    """out [rows, kp] = the sum of table[values] at every column; a zero slot adds nothing."""
    two = np.uint64(2)  # unsigned indices: signed ones are tested for being negative
    for r in range(values.shape[0]):
        row, index, dense = values[r], meta[r], out[r]
        dense[:] = 0
        at = np.uint64(0)
        start = np.uint64(0)
        left = windows  # windows left in the group
        for byte in range(index.size):
            nibbles = np.uint64(index[byte])
            for _ in range(2):
                first, second = row[at], row[at + np.uint64(1)]
                if first & mask:
                    dense[start + (nibbles & np.uint64(3))] += table[first]
                if second & mask:
                    dense[start + (nibbles >> two & np.uint64(3))] += table[second]
                nibbles >>= np.uint64(4)
                at += two
                start += two
                left -= 1
                if left == 0:
                    left = windows
                    start += two


def decompress(values: Array, meta: Array, pattern: Pattern, k: int, dtype: DType) -> Array:
    """`reference.decompress` and `reference.unslide`: the stored values at their columns, [rows, k] of dtype.numpy.

    A column that two windows store, as `pack` never does, is worthless: it holds the sum of their bits.
    """
    out = np.empty((values.shape[0], pattern.padded_k(k)), dtype.raw)
    same = np.arange(2**dtype.bits, dtype=dtype.raw)
    _decompress(raw_bits(contiguous(values)), contiguous(meta), dtype.nonzero_mask, pattern.windows, same, out)
    return out.view(dtype.numpy)[:, :k]


def decompress_float32(values: Array, meta: Array, pattern: Pattern, out: Array, dtype: DType) -> None:
    """The same, converted to float32 into `out` [rows, kp], contiguous; a column that two windows store is the sum of both."""
    _decompress(raw_bits(contiguous(values)), contiguous(meta), dtype.nonzero_mask, pattern.windows, float32_table(dtype), out)
