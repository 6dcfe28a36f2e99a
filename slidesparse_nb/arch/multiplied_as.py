"""Weights of a scheme that no kernel multiplies, as those of the scheme that GPUs multiply instead, without rounding.

    q (e2m1) * 2^e (its block) * scale (the row)   ==   q * 2^(e - o) (e4m3) * (scale * 2^o)          -8 <= e - o <= 6

e2m1 holds the multiples of 1/2 of two significant bits up to 6, e4m3 those of 2^-9 of four bits up to 448. So every q * 2^d is
an e4m3 number for the 15 exponents d of that range, and for no others. A row's offset o is 0 unless one of its blocks has a
scale below 2^-8. NumPy, or CuPy by the same lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.dtypes import FLOAT4, FLOAT8
from ..core.packed import PackedWeight
from ..errors import UnsupportedError

LEAST, MOST = -8, 6
"""Exponents d for which every e2m1 value times 2^d is an e4m3 number."""

E8M0_BIAS = 127
"""The code of 2^0 in e8m0."""

_VALUES = np.arange(16, dtype=np.uint8).view(FLOAT4.numpy).astype(np.float32)
TABLE = np.ldexp(_VALUES, np.arange(LEAST, MOST + 1)[:, None]).astype(FLOAT8.numpy).view(np.uint8)
"""The bits of q * 2^d in e4m3: uint8 [15, 16], by d - LEAST and the nibble of q."""


def as_multiplied(packed: PackedWeight, xp: Any) -> PackedWeight:
    """The packed weight [n, k] in the scheme that GPUs multiply it as (`Scheme.kernel`): the same numbers, and for most itself.

    Args:
        packed: of arrays of `xp`, which is numpy or cupy.

    Raises:
        UnsupportedError: the scales of a row span more powers of two than e4m3 holds. Blocks of zeros do not count.
    """
    block = packed.scheme.weights.block
    if packed.scheme.multiplied_as is None or block is None:
        return packed
    n, slots, size = packed.n, packed.ks // 2, block.columns // 2
    count = packed.block_scale.shape[1] + 1  # a block of zeros ends every row
    q, exponent = xp.zeros((n, count * size), np.uint8), xp.zeros((n, count), np.int32)
    q[:, 0:slots:2], q[:, 1:slots:2] = packed.values & 15, packed.values >> 4
    exponent[:, :-1] = packed.block_scale.view(np.uint8).astype(np.int32) - E8M0_BIAS
    q = q.reshape(n, count, size)
    live = (q & 7).any(axis=2)
    highest = xp.where(live, exponent, np.int32(-1000)).max(axis=1, keepdims=True)
    lowest = xp.where(live, exponent, np.int32(1000)).min(axis=1, keepdims=True)
    offset = (lowest - LEAST).clip(None, 0)
    scale = xp.ldexp(packed.scale, offset)
    rounded = (highest - offset > MOST) | (xp.ldexp(scale, -offset) != packed.scale)
    if rounded.any():
        row = int(rounded.argmax())
        raise UnsupportedError(
            f"packed: row {row} has block scales 2^{int(lowest[row, 0])} to 2^{int(highest[row, 0])} and scale"
            f" {float(packed.scale[row, 0]):g}, which FP8 kernels cannot hold exactly (15 powers of two a row); pack as"
            " FP8_DYNAMIC, or use NumPy arrays"
        )
    q |= ((exponent - offset - LEAST).clip(0, MOST - LEAST) << 4).astype(np.uint8)[:, :, None]
    values = xp.asarray(TABLE.reshape(-1)).take(q).reshape(n, count * size)[:, :slots]
    return PackedWeight(xp.ascontiguousarray(values), packed.meta, scale, packed.pattern, packed.shape, packed.scheme.kernel)
