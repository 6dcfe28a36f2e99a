"""Schemes with block scales on the CPU: pack a block of rows, and multiply; the bits of `reference`, by its compiled kernels.

Non-zero columns or pairs are numbered from 1, and the numbers are slid as any stored values are. The weights that they stand
for are quantized in their windows; then every window is compressed again, since some of its values became zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import FLOAT4, FLOAT8, INT8
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.reference import in_units, lift, nonzero_units, pack_nibbles, times_blocks, unpack_nibbles
from ..core.scheme import Scheme, Storage
from . import kernels
from .kernels import contiguous, float8_bits, float32_table, jit, row_scale

Array = NDArray[Any]

WINDOWS = Pattern(2, 4)
"""What is in windows already: each is a group of its own."""


E4M3, VALUES = float32_table(FLOAT8), float32_table(FLOAT4)
"""The float32 value of every block scale, and of every nibble."""


@jit
def _quantize_blocks(
    x: Array, size: int, up: bool, smallest: np.float32, t: np.float32, q: Array, block: Array, scale: Array
) -> None:
    bits, six = x.view(np.uint32), np.float32(6)
    for r in range(x.shape[0]):
        scale[r, 0], inv = row_scale(bits, r, t)
        for b in range(block.shape[1]):
            columns = range(b * size, min(b * size + size, x.shape[1]))
            largest = np.float32(0)
            for c in columns:
                q[r, c] = 0
                if inv != 0:
                    largest = max(largest, abs(np.float32(x[r, c] * inv)))
            s = max(np.float32(min(largest, t) / six), smallest)
            if up:  # a code is the biased exponent of a float32
                code = (np.float32(s).view(np.uint32) + np.uint32(0x7FFFFF)) >> np.uint32(23)
                s = np.uint32(code << np.uint32(23)).view(np.float32)
            else:
                code = float8_bits(s)
                s = E4M3[code]
            block[r, b] = code
            if inv == 0:
                continue
            inverse = np.float32(np.float32(1) / s)
            for c in columns:
                y = min(max(np.float32(x[r, c] * inv), -t), t)
                v = abs(np.float32(y * inverse))  # to the nearest of 0 0.5 1 1.5 2 3 4 6, ties to even
                nibble = int(v > 0.25) + int(v >= 0.75) + int(v > 1.25) + int(v >= 1.75)
                nibble += int(v > 2.5) + int(v >= 3.5) + int(v > 5)
                q[r, c] = nibble | 8 if y < 0 and nibble else nibble


def quantize_blocks(x: Array, storage: Storage, size: int) -> tuple[Array, Array, Array]:
    """`reference.quantize_blocks` of float32 x [rows, c], with a scale for every `size` columns.

    Returns:
        q: uint8 [rows, c], a nibble each; block_scale: [rows, ceil(c / size)] of its type; scale: float32 [rows, 1].
    """
    block = storage.block
    assert block is not None
    q = np.empty(x.shape, np.uint8)
    codes = np.empty((x.shape[0], -(-x.shape[1] // size)), np.uint8)
    scale = np.empty((x.shape[0], 1), np.float32)
    limits = np.float32(block.smallest), np.float32(storage.limit)
    _quantize_blocks(contiguous(x), size, block.up, *limits, q, codes, scale)
    return q, codes.view(block.scale.numpy), scale


def pack_rows(w: Array, pattern: Pattern, scheme: Scheme) -> tuple[PackedWeight, int]:
    """`reference.pack` of finite float32 w [rows, k], pruned; and how many groups break the pattern.

    If any group does, the packed weight is worthless.
    """
    rows, storage = w.shape[0], scheme.weights
    assert storage.block is not None
    units = in_units(w, pattern.unit)
    numbers = nonzero_units(w, pattern.unit) * np.arange(1, units.shape[1] + 1, dtype=np.uint32)
    slots, meta, over = kernels.slide_compress(numbers, Pattern(pattern.nnz, pattern.group))
    padded = np.concatenate([np.zeros((rows, 1, pattern.unit), np.float32), units], axis=1)
    numbers = slots + np.arange(rows)[:, None] * padded.shape[1]
    kept = np.take(padded.reshape(-1, pattern.unit), numbers, axis=0).reshape(rows, pattern.expanded_k(w.shape[1]) // 2)
    q, block_scale, scale = quantize_blocks(kept, storage, storage.block.columns // 2)
    slots = q if pattern.unit == 1 else pack_nibbles(q)
    in_windows = kernels.decompress(slots.view(np.int8), meta, WINDOWS, 2 * slots.shape[1], INT8)
    values, meta, _ = kernels.slide_compress(in_windows, WINDOWS)
    values = values.view(np.uint8)
    values = values if pattern.unit == 2 else pack_nibbles(values).view(np.uint8)
    return PackedWeight(values, meta, scale, pattern, (rows, w.shape[1]), scheme, block_scale), over


def in_windows(packed: PackedWeight) -> Array:
    """The stored values in their windows, each times the scale of its block: float32 [n, ks]."""
    block, values = packed.scheme.weights.block, packed.values
    assert block is not None
    slots = values if packed.pattern.unit == 2 else unpack_nibbles(values).view(np.uint8)
    q = kernels.decompress(slots.view(np.int8), packed.meta, WINDOWS, 2 * slots.shape[1], INT8).view(np.uint8)
    q = q if packed.pattern.unit == 1 else unpack_nibbles(q).view(np.uint8)
    return times_blocks(VALUES[q], packed.block_scale.view(block.scale.numpy), block.columns)


def lifted(x: Array, scale_x: Array | None, packed: PackedWeight) -> tuple[Array, Array]:
    """Activations as they are multiplied: float32 [m, ks], and the scales of tokens [m, 1].

    Args:
        x: [m, k], quantized already, with `scale_x`; or of any float type, where they are quantized after they are lifted.
    """
    storage = packed.scheme.activations
    xs = lift(kernels.to_float32(x), packed.pattern)
    if scale_x is not None:
        return xs, scale_x
    assert storage.block is not None
    q, block_scale, scale = quantize_blocks(xs, storage, storage.block.columns)
    return times_blocks(VALUES[q], block_scale, storage.block.columns), scale
