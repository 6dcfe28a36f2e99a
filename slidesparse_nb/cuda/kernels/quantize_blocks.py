"""The kernel of `reference.quantize_blocks` for pairs, and its stages: four columns of x, and scales of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.dtypes import FLOAT4
from ...core.scheme import Block, Storage
from ..jit.numba import cuda, device_function
from .numbers import HIGH, LOW, ONE, row_scale, to_float4
from .ptx import Float, Word, as_float, as_word, divide, larger, load2, load4, multiply, store4_in_bytes, to_float8x2
from .quantize_stages import ZERO, Variant, starter
from .reductions import NOTHING, block_max

LARGEST, MAGNITUDE = np.float32(FLOAT4.largest), np.uint32(0x7FFFFFFF)


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


def row_in_blocks(variant: Variant, block: Block) -> Any:
    """A block reads its row twice, four columns at a time; thread t writes the runs t, t + threads ... that share a scale.

    A product with the inverse may round to just above the limit, which the scale of its run and `to_float4` clip.
    """
    load, windows, begin = quad_loader(variant), variant.windows, starter(variant)
    (block_scale, inverse_scale), limit = block_scaler(block), np.float32(Storage(FLOAT4, block=block).limit)
    lifted = block.columns
    per_block, words_of = 256 // lifted, lifted // 8  # a word is a window

    def kernel(
        x: Any,  # [m, k] elements of strides ld, stride; whole words in vectors
        out: Any,  # [m, blocks, 144] bytes: 128 of values, the scales, zeros
        scale: Any,  # [m]
        m: int,
        ld: int,
        stride: int,
        k: int,
        filled: int,  # runs of a row
        runs: int,  # and with those that fill the last block, which are zeros and have scale 0
    ) -> None:
        begin()
        row, thread, threads = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        held = cuda.local.array(lifted, np.float32)
        words = cuda.local.array(words_of, np.uint32)
        peak = ZERO
        for column in range(4 * thread, k, 4 * threads):
            for y in load(x, row * ld + column * stride, stride, k - column):
                peak = larger(peak, as_word(y) & MAGNITUDE)
        of_row, inverse = row_scale(as_float(block_max(peak)), limit)
        if thread == 0:
            scale[row] = of_row
        columns = k if inverse > NOTHING else 0
        for run in range(thread, runs, threads):
            peak = ZERO
            for i in range(0, lifted, 4):
                window = run * words_of + (i >> 3)
                group = window // windows
                column = group * (4 * windows + 4) + (window - group * windows) * 4 + (i & 4)
                a, b, c, d = NOTHING, NOTHING, NOTHING, NOTHING
                if column < columns:
                    a, b, c, d = load(x, row * ld + column * stride, stride, columns - column)
                held[i], held[i + 1] = multiply(a, inverse), multiply(b, inverse)
                held[i + 2], held[i + 3] = multiply(c, inverse), multiply(d, inverse)
            for i in range(lifted):
                peak = larger(peak, as_word(held[i]) & MAGNITUDE)
            code = block_scale(as_float(peak)) if run < filled else ZERO
            by = inverse_scale(code) if run < filled else NOTHING
            for w in range(words_of):
                word = ZERO
                for i in range(8):
                    word |= np.uint32(to_float4(multiply(held[8 * w + i], by)) << np.uint32(4 * i))
                words[w] = word
            at, place = (row * runs + run) // per_block, run % per_block
            for w in range(0, words_of, 4):
                chunk = 9 * at + (place * words_of + w) // 4
                store4_in_bytes(out, chunk, words[w], words[w + 1], words[w + 2], words[w + 3])
            out[144 * at + 128 + place] = code
            for i in range(per_block, 16, per_block):
                out[144 * at + 128 + i + place] = ZERO

    return kernel
