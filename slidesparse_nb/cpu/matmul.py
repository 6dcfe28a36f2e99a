"""`reference.matmul` on the CPU: packed weights are decompressed into float32 tile by tile and multiplied by BLAS.

Products of int8 values are sums of whole numbers below 2^24 as long as no more than 1024 of them are added, so float32 holds
them exactly; the sums of `EXACT` columns are added in int32. Where two windows store the same column, as the format allows and
no packer does, the two weights are added up first: the same sum for int8, for other types to the order of accumulation.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from . import block_scales, kernels, threads
from .kernels import contiguous, float32_table, jit, raw_bits

Array = NDArray[Any]

TILE = 2**20
"""Weights that are decompressed at once: 4 MiB of float32 ..."""

TILE_ROWS = 256
"""... but no fewer rows than BLAS needs to be fast."""

THREADED = 2**20
"""Weights from which threads are worth their start, about a tenth of a millisecond."""

EXACT = 1024
"""Products of two int8 values, at most 2^14 each, whose sum float32 holds exactly. 1024 columns are multiplied by 1024
slots at most: windows that reach into them on one side reach out on the other; inside a longer group, by two more."""


def matmul(x: Array, scale_x: Array | None, packed: PackedWeight, bias: Array | None, out: Array) -> None:
    """out = x @ w.T * scale_x * scale + bias, with the numbers of `reference.matmul`; int8 to the bit.

    Args:
        x: [m, k] as the scheme stores activations, quantized or rounded already; of any float type, if they are lifted first.
        scale_x: float32 [m, 1]; None for 16-bit types, and for activations that are lifted first.
        bias: float32 [n] or None.
        out: [m, n] of any float type, any strides; overwritten.
    """
    if packed.scheme.blocks:
        _matmul_blocks(x, scale_x, packed, bias, out)
        return
    pattern, dtype, (n, k) = packed.pattern, packed.dtype, packed.shape
    xs = kernels.to_float32(x)
    odd = np.flatnonzero(~np.isfinite(xs).all(axis=1))  # rows that unused slots multiply too: 0 * infinity is NaN
    odd_xs = xs[odd]
    xs[odd] = 0
    step = max(1, min(n, max(TILE_ROWS, TILE // max(1, k))))
    weights = np.empty((step, pattern.padded_k(k)), np.float32)
    workers = 1 if n * k < THREADED else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, n, step):
            tile = slice(first, min(n, first + step))
            values, meta = packed.values[tile], packed.meta[tile]
            w = weights[: values.shape[0]]

            def decompress(rows: slice, values: Array = values, meta: Array = meta, w: Array = w) -> None:
                kernels.decompress_float32(values[rows], meta[rows], pattern, w[rows], dtype)

            parts = threads.blocks(values.shape[0], k)
            if workers > 1:
                list(pool.map(decompress, parts))
            else:
                for rows in parts:
                    decompress(rows)
            exact = packed.scheme.accumulator == np.int32
            y = _exact_product(xs, w[:, :k], EXACT - 2 * (pattern.group > EXACT)) if exact else xs @ w[:, :k].T
            if odd.size:
                y[odd] = dot(odd_xs, values, meta, pattern, dtype)
            if scale_x is not None:
                y *= scale_x
                y *= packed.scale[tile, 0]
            if bias is not None:
                y += bias[tile]
            out[:, tile] = y


def _matmul_blocks(x: Array, scale_x: Array | None, packed: PackedWeight, bias: Array | None, out: Array) -> None:
    """`matmul` of a scheme with block scales: windows times lifted activations."""
    xs, scale_x = block_scales.lifted(x, scale_x, packed)
    for tile in threads.blocks(packed.n, packed.k):
        with np.errstate(over="ignore"):
            y = xs @ block_scales.in_windows(packed.rows(tile.start, tile.stop)).T
            y *= scale_x
            y *= packed.scale[tile, 0]
            if bias is not None:
                y += bias[tile]
            out[:, tile] = y


def _exact_product(x: Array, w: Array, step: int) -> Array:
    """x [m, k] @ w [n, k].T of whole numbers; sums of `step` columns are exact in float32, the whole in int32, then rounded."""
    sums = (x[:, first : first + step] @ w[:, first : first + step].T for first in range(0, x.shape[1], step))
    total = next(sums, np.zeros((x.shape[0], w.shape[0]))).astype(np.int32)
    for part in sums:
        total += part.astype(np.int32)
    return total.astype(np.float32)


@jit
def _dot(x: Array, values: Array, meta: Array, windows: int, table: Array, out: Array) -> None:
    for r in range(values.shape[0]):
        out[r, :] = 0
        for at in range(2 * meta.shape[1]):
            nibble = np.int64(meta[r, at >> 1]) >> (4 * (at & 1))
            start = at // windows * (2 * windows + 2) + at % windows * 2
            first, second = table[values[r, 2 * at]], table[values[r, 2 * at + 1]]
            c0, c1 = start + (nibble & 3), start + (nibble >> 2 & 3)
            for i in range(x.shape[1]):
                out[r, i] += first * x[c0, i] + second * x[c1, i]


def dot(x: Array, values: Array, meta: Array, pattern: Pattern, dtype: DType) -> Array:
    """x float32 [m, k] times packed rows as the hardware does it: float32 [m, rows].

    Every slot of a window is multiplied by an activation, an unused one too, so that NaN and infinity in x reach exactly the
    outputs of `reference.matmul`. This is for the few rows of x that hold them; for finite rows decompressed weights and a
    dense product are right, and faster.
    """
    columns = np.zeros((pattern.padded_k(x.shape[1]), x.shape[0]), np.float32)
    columns[: x.shape[1]] = x.T
    out = np.empty((values.shape[0], x.shape[0]), np.float32)
    _dot(columns, raw_bits(contiguous(values)), contiguous(meta), pattern.windows, float32_table(dtype), out)
    return out.T
