"""Kernels that make an operand from what stands before a linear layer, in one pass: RMSNorm of a sum, SiLU times a gate.

A block takes a token and holds it in registers, as kernels/quantize.py does, whose `finisher` does the rest:

    x, residual --> sum --> mean square --> times 1 / root, rounded; times gamma, rounded --\
    gate, up    --> SiLU, rounded; times up, rounded ---------------------------------------+--> quantized, lifted, stored

They give the bits of `reference.rms_norm` and `reference.silu_and_mul`, then `reference.quantize`: each product and sum is
rounded, never fused; roots and divisions are correctly rounded; squares are added in the order that the reference states.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.reference import EXP_LIMIT, EXP_SERIES, LN2_HIGH, LN2_LOW, LOG2_E
from ..jit.numba import SIMULATED, Kernel, cuda, device_function
from .numbers import HIGH, LOW, ROUND, ROUND_TWO
from .ptx import (
    Float,
    add,
    as_float,
    as_word,
    divide,
    launch_later_grid,
    multiply,
    square_root,
    store4,
    wait_for_earlier_grids,
    warp_sum,
)
from .quantize import finisher
from .quantize_stages import ZERO, Variant, loader

KINDS = "rms_norm", "add_rms_norm", "silu_and_mul"
LANES = np.uint32(32)
ONE, NOTHING = np.float32(1), np.float32(0)

# As literals of kernels: float32, since Python's floats would be float64 there.
LIMIT, LOG2, HIGH_LN2, LOW_LN2 = (np.float32(c) for c in (EXP_LIMIT, LOG2_E, -LN2_HIGH, -LN2_LOW))
C5, C4, C3, C2, C1, C0 = (np.float32(c) for c in EXP_SERIES)

if SIMULATED:

    def block_sum(part: Float) -> Float:
        """`reference.sum_of_squares`'s sum over the threads of a block, to all of them."""
        slots = cuda.shared.array(1024, np.float32)
        slots[cuda.threadIdx.x] = part
        cuda.syncthreads()
        sums = [slots[i] for i in range(cuda.blockDim.x)]
        cuda.syncthreads()
        warps = [_halved(sums[i : i + 32]) for i in range(0, len(sums), 32)]
        return _halved(warps + [NOTHING] * (32 - len(warps)))

    def _halved(sums: list[Float]) -> Float:
        while (half := len(sums) // 2) > 0:
            sums = [np.float32(a) + np.float32(b) for a, b in zip(sums[:half], sums[half:], strict=True)]
        return sums[0]
else:

    @device_function("f32", "f32")
    def block_sum(part: Float) -> Float:
        """`reference.sum_of_squares`'s sum over the threads of a block, to all of them."""
        slots = cuda.shared.array(32, np.float32)
        thread = np.uint32(cuda.threadIdx.x)
        lane, warps = np.uint32(thread % LANES), np.uint32(np.uint32(cuda.blockDim.x) // LANES)
        part = warp_sum(part)
        if lane == ZERO:
            slots[np.uint32(thread // LANES)] = part
        cuda.syncthreads()
        return warp_sum(slots[lane] if lane < warps else NOTHING)


@device_function("f32", "f32")
def silu(x: Float) -> Float:
    """x / (1 + exp(-x)), the exponential as `reference.exponential`."""
    y = -x
    if y > LIMIT:
        y = LIMIT
    if y < -LIMIT:
        y = -LIMIT
    shifted = add(multiply(y, LOG2), ROUND)
    n = add(shifted, -ROUND)
    f = add(add(y, multiply(n, HIGH_LN2)), multiply(n, LOW_LN2))
    p = add(multiply(add(multiply(add(multiply(C5, f), C4), f), C3), f), C2)
    p = add(multiply(add(multiply(p, f), C1), f), C0)
    power = np.uint32(as_word(p)) + np.uint32(np.uint32(as_word(shifted)) << np.uint32(23))
    return divide(x, add(ONE, as_float(np.uint32(power))))


@functools.cache
def kernel(variant: Variant, kind: str) -> Kernel:
    """The kernel of a kind and a variant of 16-bit x, compiled where it is first launched."""
    made = silu_and_mul(variant) if kind == "silu_and_mul" else rms_norm(variant, kind == "add_rms_norm")
    pointers = ("u32*",) * (2 if kind == "silu_and_mul" else 5)
    parameters = (*pointers, "f32*", *["i64"] * (8 if kind == "silu_and_mul" else 10))
    return Kernel(f"{kind}_{variant.name}", made, *parameters, programmatic=variant.architecture >= 90)


def rms_norm(variant: Variant, adds: bool) -> Any:
    """RMSNorm of x, or of x + residual."""
    (load, _), finish = loader(variant), finisher(variant)
    low: Any = LOW[variant.source]
    high: Any = HIGH[variant.source]
    two: Any = ROUND_TWO[variant.source]
    vectors, words, numbers = variant.vectors, 4 * variant.vectors, 8 * variant.vectors
    dependent = variant.architecture >= 90

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes
        residual: Any,  # [m, filled] vectors, and so is kept, which gets the sum
        gamma: Any,  # [filled] vectors
        kept: Any,
        out: Any,  # this and all else as in kernels/quantize.py
        scale: Any,
        epsilon: int,  # bits of a float32, as is the number of columns
        columns: int,
        m: Any,
        ld: int,
        filled: int,
        total: int,
        pitch: int,
        chunks: int,
        step: int,
        advance: int,
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        held = cuda.local.array(words, np.uint32)
        more = cuda.local.array(words, np.uint32)
        s = cuda.local.array(numbers, np.float32)
        row, thread, threads = np.int64(cuda.blockIdx.x), np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        last, read = np.uint32(filled - 1), min(row, m - 1)
        load(x, read * ld, last, thread, threads, held)
        if adds:
            load(residual, read * filled, last, thread, threads, more)
        squares = NOTHING
        for v in range(vectors):
            at = np.uint32(thread + np.uint32(v) * threads)
            for w in range(4 * v, 4 * v + 4):
                a, b = low(held[w]), high(held[w])
                if adds:
                    a, b = add(a, low(more[w])), add(b, high(more[w]))
                    more[w] = two(a, b)
                s[2 * w], s[2 * w + 1] = a, b
                if at <= last:
                    squares = add(add(squares, multiply(a, a)), multiply(b, b))
            if adds and at <= last and row < m:
                w = 4 * v
                store4(kept, row * filled + np.int64(at), more[w], more[w + 1], more[w + 2], more[w + 3])
        mean = divide(block_sum(squares), as_float(np.uint32(columns)))
        inverse = divide(ONE, square_root(add(mean, as_float(np.uint32(epsilon)))))
        load(gamma, np.int64(0), last, thread, threads, more)
        for w in range(words):
            normed = two(multiply(s[2 * w], inverse), multiply(s[2 * w + 1], inverse))
            held[w] = two(multiply(low(normed), low(more[w])), multiply(high(normed), high(more[w])))
        finish(
            held, out, scale, row, m, thread, threads, last, np.uint32(total), pitch, np.uint32(chunks), np.uint32(step),
            np.uint64(advance),
        )  # fmt: skip

    return kernel


def silu_and_mul(variant: Variant) -> Any:
    """SiLU of the first half of a row, times the second."""
    (load, _), finish = loader(variant), finisher(variant)
    low: Any = LOW[variant.source]
    high: Any = HIGH[variant.source]
    two: Any = ROUND_TWO[variant.source]
    words, dependent = 4 * variant.vectors, variant.architecture >= 90

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes: `filled` of the gate, `filled` that it multiplies
        out: Any,  # this and all else as in kernels/quantize.py
        scale: Any,
        m: Any,
        ld: int,
        filled: int,
        total: int,
        pitch: int,
        chunks: int,
        step: int,
        advance: int,
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        held = cuda.local.array(words, np.uint32)
        up = cuda.local.array(words, np.uint32)
        row, thread, threads = np.int64(cuda.blockIdx.x), np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        last, start = np.uint32(filled - 1), min(row, m - 1) * ld
        load(x, start, last, thread, threads, held)
        load(x, start + filled, last, thread, threads, up)
        for w in range(words):
            gate = two(silu(low(held[w])), silu(high(held[w])))
            held[w] = two(multiply(low(gate), low(up[w])), multiply(high(gate), high(up[w])))
        finish(
            held, out, scale, row, m, thread, threads, last, np.uint32(total), pitch, np.uint32(chunks), np.uint32(step),
            np.uint64(advance),
        )  # fmt: skip

    return kernel
