"""The numbers of `reference.quantize_blocks` for NVFP4, as device functions: four columns of x, limits, scales of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.scheme import SCHEMES
from ..jit.numba import device_function
from .numbers import HIGH, LOW, ONE
from .ptx import Float, Word, as_float, divide, load2, load4, multiply, to_float8x2
from .quantize_stages import Variant

STORAGE = SCHEMES["NVFP4"].activations
assert STORAGE.block is not None
LIMIT, LARGEST = np.float32(STORAGE.limit), np.float32(STORAGE.element.largest)
SMALLEST = np.float32(STORAGE.block.smallest)
NOTHING = np.float32(0)


@device_function("u32", "f32")
def block_scale(peak: Float) -> Word:
    """The e4m3 bits of the scale of a block whose largest magnitude this is."""
    s = divide(peak, LARGEST)
    if s < SMALLEST:
        s = SMALLEST
    return to_float8x2(s, NOTHING) & np.uint32(0x7F)


@device_function("f32", "u32")
def inverse_scale(code: Word) -> Float:
    """1 / the e4m3 number of these bits, which is above 0: its exponent's bias is 120 below that of float32."""
    return divide(ONE, multiply(as_float(np.uint32(code << np.uint32(20))), np.float32(2.0**120)))


def quad_loader(variant: Variant) -> Any:
    """A device function: four neighbouring columns of x, from index `at` on, of which `left` are there; the others are 0."""
    low: Any = LOW[variant.source]
    high: Any = HIGH[variant.source]
    result, integers = ("f32",) * 4, ("i64",) * 3

    if variant.vectors and variant.source_bytes == 4:

        @device_function(result, "u32*", *integers)
        def load(x: Any, at: int, stride: int, left: int) -> tuple[Float, ...]:
            a, b, c, d = load4(x, at >> 2)
            return as_float(a), as_float(b), as_float(c), as_float(d)

    elif variant.vectors:

        @device_function(result, "u32*", *integers)
        def load(x: Any, at: int, stride: int, left: int) -> tuple[Float, ...]:
            a, b = load2(x, at >> 2)
            return low(a), high(a), low(b), high(b)

    else:

        @device_function(result, f"u{8 * variant.source_bytes}*", *integers)
        def load(x: Any, at: int, stride: int, left: int) -> tuple[Float, ...]:
            b = low(x[at + stride]) if left > 1 else NOTHING
            c = low(x[at + 2 * stride]) if left > 2 else NOTHING
            d = low(x[at + 3 * stride]) if left > 3 else NOTHING
            return low(x[at]), b, c, d

    return load
