"""The numbers of `reference.quantize_blocks` for pairs, as device functions: four columns of x, and scales of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.dtypes import FLOAT4
from ...core.scheme import Block
from ..jit.numba import device_function
from .numbers import HIGH, LOW, ONE
from .ptx import Float, Word, as_float, as_word, divide, load2, load4, multiply, to_float8x2
from .quantize_stages import Variant

LARGEST, NOTHING = np.float32(FLOAT4.largest), np.float32(0)


def block_scaler(block: Block) -> tuple[Any, Any]:
    """Device functions: the bits of a block's scale, from its largest magnitude; and 1 / a scale above 0, from its bits."""
    smallest, largest = np.float32(block.smallest), np.float32(block.largest)

    @device_function("f32", "f32")
    def limited(peak: Float) -> Float:
        s = divide(peak, LARGEST)
        return smallest if s < smallest else largest if s > largest else s

    if block.up:

        @device_function("u32", "f32")
        def scale(peak: Float) -> Word:
            """Of e8m0, the exponent of a float32, rounded up."""
            return np.uint32((as_word(limited(peak)) + np.uint32(0x7FFFFF)) >> np.uint32(23))

        @device_function("f32", "u32")
        def inverse(code: Word) -> Float:
            return divide(ONE, as_float(np.uint32(code << np.uint32(23))))

    else:

        @device_function("u32", "f32")
        def scale(peak: Float) -> Word:
            """Of e4m3."""
            return to_float8x2(limited(peak), NOTHING) & np.uint32(0x7F)

        @device_function("f32", "u32")
        def inverse(code: Word) -> Float:
            """The exponent's bias is 120 below that of float32."""
            return divide(ONE, multiply(as_float(np.uint32(code << np.uint32(20))), np.float32(2.0**120)))

    return scale, inverse


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
