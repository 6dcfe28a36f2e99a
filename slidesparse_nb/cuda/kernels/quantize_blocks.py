"""The numbers of `reference.quantize_blocks` for NVFP4: limits, and the scale of a block from its largest magnitude."""

from __future__ import annotations

import numpy as np

from ...core.scheme import SCHEMES
from ..jit.numba import device_function
from .numbers import ONE
from .ptx import Float, Word, as_float, divide, multiply, to_float8x2

STORAGE = SCHEMES["NVFP4"].activations
assert STORAGE.block is not None
LIMIT, LARGEST = np.float32(STORAGE.limit), np.float32(STORAGE.element.largest)
SMALLEST = np.float32(STORAGE.block.smallest)


@device_function("u32", "f32")
def block_scale(peak: Float) -> Word:
    """The e4m3 bits of the scale of a block whose largest magnitude this is."""
    s = divide(peak, LARGEST)
    if s < SMALLEST:
        s = SMALLEST
    return to_float8x2(s, np.float32(0)) & np.uint32(0x7F)


@device_function("f32", "u32")
def inverse_scale(code: Word) -> Float:
    """1 / the e4m3 number of these bits, which is above 0: its exponent's bias is 120 below that of float32."""
    return divide(ONE, multiply(as_float(np.uint32(code << np.uint32(20))), np.float32(2.0**120)))
