"""From words of activations or weights to floats, and from floats to stored values: the arithmetic that fixes the bits.

Products and sums are rounded one by one, never fused; divisions are correctly rounded (`reference.quantize`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.reference import EXP_LIMIT, EXP_SERIES, GELU, GELU_CUBE, LN2_HIGH, LN2_LOW, LOG2_E
from ..jit.numba import device_function
from .ptx import (
    Float,
    Word,
    add,
    as_float,
    as_word,
    divide,
    high_float16,
    low_bytes,
    low_float16,
    low_halves,
    multiply,
    near_inverse,
    near_power_of_two,
    to_bfloat16x2,
    to_float16x2,
)

INFINITY = np.uint32(0x7F800000)
TINY = np.float32(2.0**-100)
NAN = np.float32(np.nan)

ROUND = np.float32(12582912)
"""1.5 * 2^23: adding it rounds a small float to a whole number, ties to even, and leaves that in the low bits."""


# Of `reference.exponential`, as float32: Python's floats would be float64 in a kernel.
LIMIT, LOG2, MINUS_LOG2, HIGH_LN2, LOW_LN2 = (np.float32(c) for c in (EXP_LIMIT, LOG2_E, -LOG2_E, -LN2_HIGH, -LN2_LOW))
C5, C4, C3, C2, C1, C0 = (np.float32(c) for c in EXP_SERIES)
ONE = np.float32(1)


@device_function("f32", "u32")
def low_bfloat16(word: Word) -> Float:
    """The bfloat16 in a word's low half, as float32; exact."""
    return as_float((word & np.uint32(0xFFFF)) << np.uint32(16))


@device_function("f32", "u32")
def high_bfloat16(word: Word) -> Float:
    """The bfloat16 in a word's high half, as float32; exact."""
    return as_float(word & np.uint32(0xFFFF0000))


LOW = {"bfloat16": low_bfloat16, "float16": low_float16, "float32": as_float}
HIGH = {"bfloat16": high_bfloat16, "float16": high_float16, "float32": as_float}
"""From a word of each type: the element in its low half (a whole word of float32), and the one in its high half."""


ROUND_TWO = {"bfloat16": to_bfloat16x2, "float16": to_float16x2}
"""For each 16-bit type: from two floats to a word."""


@device_function("u32", "f32", "f32", "f32", "f32")
def to_int8x4(a: Float, b: Float, c: Float, d: Float) -> Word:
    """Four floats of magnitude below 127.5 as int8, nearest even, a lowest."""
    ab = low_bytes(as_word(add(a, ROUND)), as_word(add(b, ROUND)))
    cd = low_bytes(as_word(add(c, ROUND)), as_word(add(d, ROUND)))
    return low_halves(ab, cd)


@device_function("u32", "f32")
def to_float8(value: Float) -> Word:
    """One float as float8_e4m3fn, nearest even, clipped to +-448, where no instruction does it (before sm_89)."""
    bits = as_word(value)
    sign = bits >> np.uint32(24) & np.uint32(0x80)
    size = bits & np.uint32(0x7FFFFFFF)
    if size < np.uint32(0x3C800000):  # below 2^-6 a step is 2^-9: adding 2^14, whose own step that is, rounds to it
        return sign | (as_word(add(as_float(size), np.float32(16384))) - np.uint32(0x46800000))
    # 20 mantissa bits go, to nearest even; the exponent's bias falls from 127 to 7
    rounded = (size + np.uint32(0x7FFFF) + (size >> np.uint32(20) & np.uint32(1)) >> np.uint32(20)) - np.uint32(960)
    return sign | min(rounded, np.uint32(0x7E))


@device_function("u32", "f32", "f32", "f32", "f32")
def to_float8x4_early(a: Float, b: Float, c: Float, d: Float) -> Word:
    """`to_float8x4` for architectures before sm_89."""
    return low_halves(low_bytes(to_float8(a), to_float8(b)), low_bytes(to_float8(c), to_float8(d)))


@device_function("u32", "f32")
def to_float4(value: Float) -> Word:
    """One float as float4_e2m1fn, nearest even, clipped to +-6; -0 becomes 0."""
    bits = as_word(value)
    size = min(bits & np.uint32(0x7FFFFFFF), np.uint32(0x40C00000))
    if size < np.uint32(0x3F800000):  # below 1 a step is 1/2: adding 2^22, whose own step that is, rounds to it
        code = np.uint32(as_word(add(as_float(size), np.float32(4194304))) - np.uint32(0x4A800000))
    else:  # 22 mantissa bits go, to nearest even; the exponent's bias falls from 127 to 1
        code = np.uint32(
            (size + np.uint32(0x1FFFFF) + (size >> np.uint32(22) & np.uint32(1)) >> np.uint32(22)) - np.uint32(252)
        )
    return code | (bits >> np.uint32(28) & np.uint32(8)) if code > np.uint32(0) else np.uint32(0)


@device_function(("f32", "f32"), "f32", "f32")
def row_scale(absmax: Float, t: Float) -> tuple[Float, Float]:
    """scale and inverse of a row; the inverse is 0 where the row becomes zeros: it is tiny, or not finite (scale NaN)."""
    if as_word(absmax) >= INFINITY:
        return NAN, np.float32(0)
    if absmax < TINY:
        return np.float32(1), np.float32(0)
    return divide(absmax, t), divide(t, absmax)


@device_function("f32", "f32", "f32")
def logistic(x: Float, inner: Float) -> Float:
    """x / (1 + exp(-inner)), the exponential as `reference.exponential`."""
    y = -inner
    above = y > LIMIT
    if above:
        y = LIMIT
    if y < -LIMIT:
        y = -LIMIT
    shifted = add(multiply(y, LOG2), ROUND)
    n = add(shifted, -ROUND)
    f = add(add(y, multiply(n, HIGH_LN2)), multiply(n, LOW_LN2))
    p = add(multiply(add(multiply(add(multiply(C5, f), C4), f), C3), f), C2)
    p = add(multiply(add(multiply(p, f), C1), f), C0)
    power = np.uint64(as_word(p)) + (np.uint64(as_word(shifted)) << np.uint64(23))
    word = INFINITY if above else np.uint32(power & np.uint64(0xFFFFFFFF))
    return divide(x, add(ONE, as_float(word)))


@device_function("f32", "f32")
def silu(x: Float) -> Float:
    """What SiLU's logistic function is taken of."""
    return x


@device_function("f32", "f32")
def gelu(x: Float) -> Float:
    """What GELU's is taken of, in the approximation by tanh."""
    return multiply(add(multiply(multiply(x, x), GELU_CUBE), GELU), x)


CLOSE = 20
"""Float32 steps by which `gate_two`'s estimate may be off at most, up to |inner| = 8: of all 16-bit x 14 are the most, with the
largest errors that PTX allows (tests/test_gates.py)."""
ESTIMATED = np.float32(8)
NORMAL = np.float32(2.0**-14)


def gate_two(source: str, inner: Any) -> Any:
    """A device function from a word of two 16-bit floats to x / (1 + exp(-inner(x))) of each, rounded: the reference's bits.

    It estimates by instructions that approximate. Where that leaves open which way the result is rounded (of 1 to 2 elements in
    400), or `inner` is large, it computes as the reference does.
    """
    low, high, two = LOW[source], HIGH[source], ROUND_TWO[source]
    kept = np.uint32({"bfloat16": 16, "float16": 19}[source])  # bits of a float32 that its rounding keeps
    tie, width = np.uint32(0x80000000 - (CLOSE << int(kept))), np.uint32(CLOSE << int(kept) + 1)
    early = source == "float16"  # below 2^-14 its rounding keeps fewer

    @device_function("f32", "f32", "f32")
    def estimate(x: Float, of: Float) -> Float:
        return multiply(x, near_inverse(add(ONE, near_power_of_two(multiply(of, MINUS_LOG2)))))

    @device_function("u32", "f32", "f32")
    def is_open(y: Float, of: Float) -> Word:
        from_tie = np.uint32((np.uint32(as_word(y)) << kept) - tie)
        return np.uint32((from_tie <= width) | (not abs(of) <= ESTIMATED) | (early and abs(y) < NORMAL))

    @device_function("u32", "u32")
    def both(word: Word) -> Word:
        a, b = low(word), high(word)
        of_a, of_b = inner(a), inner(b)
        y, z = estimate(a, of_a), estimate(b, of_b)
        y_open, z_open = is_open(y, of_a), is_open(z, of_b)
        if y_open | z_open:  # one branch of two elements: their estimates run side by side
            if y_open:
                y = logistic(a, of_a)
            if z_open:
                z = logistic(b, of_b)
        return two(y, z)

    return both
