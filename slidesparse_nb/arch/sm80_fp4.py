"""NVFP4 through the `mma.sp` kernel: a byte holds a pair of columns, and block scales lie beside the values. Data and NumPy.

The instruction (m16n8k128, mma_sp_nvf4 in cuda_src/sm80/ptx.cuh) takes the fragments and index words of the 8-bit one with a
pair of e2m1 for a byte, so weights over pairs are arranged as slid weights of bytes, 2:4, whose x is lifted in memory. To that
are added

    a row tile   an instruction's scales of 16 rows, after the index words: [steps][8 g][rows g, g + 8][4 of ue4m3]
    a row of x   128 bytes of values, 8 scales and 8 zeros a block of k

A scale is that of 32 lifted columns: of one register, 4 windows of x and as many of the weights, in four lanes side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.dtypes import INT8
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.scheme import Scheme
from . import sm80_layout
from .operand import SCALED_BLOCK
from .sm80_layout import Layout

LAYOUT = Layout(Pattern(2, 4), 8, words=8, run=2, load=16, stride=SCALED_BLOCK, scales=True)
"""Of pairs as bytes: a lane has each fourth word of a row, as ldmatrix gives it. Rows of x need no padding but their scales."""


def bytes_of(pattern: Pattern, k: int) -> int:
    """Bytes of a lifted row of k columns."""
    return pattern.expanded_k(k) // 2


def row_bytes(pattern: Pattern, k: int) -> int:
    """Bytes of a row of x as the kernel loads it: whole blocks, with their scales."""
    return LAYOUT.blocks(bytes_of(pattern, k)) * LAYOUT.stride


def arrange(packed: PackedWeight, xp: Any = np) -> Any:
    """NVFP4 weights in the order in which lanes load them: uint8 [blocks, row tiles, block_bytes].

    Args:
        xp: numpy or cupy, whichever made the arrays of `packed`.
    """
    size = bytes_of(packed.pattern, packed.k)
    as_bytes = PackedWeight(packed.values, packed.meta, None, LAYOUT.pattern, (packed.n, size), Scheme.of(INT8))
    plain = sm80_layout.arrange(as_bytes, xp, LAYOUT)
    blocks, row_tiles = plain.shape[:2]
    scales = xp.zeros((16 * row_tiles, blocks * 4 * LAYOUT.steps), np.uint8)
    scales[: packed.n, : packed.block_scale.shape[1]] = packed.block_scale.view(np.uint8)
    words = scales.reshape(row_tiles, 2, 8, blocks, LAYOUT.steps, 4).transpose(3, 0, 4, 2, 1, 5)  # row = 8 half + g
    return xp.concatenate([plain, xp.ascontiguousarray(words).reshape(blocks, row_tiles, 64 * LAYOUT.steps)], axis=2)
