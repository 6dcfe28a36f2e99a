"""NVFP4 and MXFP4 through the `mma.sp` kernel: a byte holds a pair of columns, block scales lie beside values. Data and NumPy.

The instruction (m16n8k128, mma_sp_nvf4 and mma_sp_mxf4 in cuda_src/sm80/ptx.cuh) takes the fragments and index words of the
8-bit one with a pair of e2m1 for a byte, so weights over pairs are arranged as slid weights of bytes, 2:4, whose x is lifted in
memory. To that are added

    a row tile   words of scales of 16 rows, after the index words: [words][8 g][rows g, g + 8][4 scales]
    a row of x   128 bytes of values, the scales of a block of k, one byte each, and zeros

    NVFP4   ue4m3, for 32 lifted columns: one register, 4 windows of x and as many of the weights, in four lanes side by side;
            8 a row and block, a word an instruction
    MXFP4   ue8m0, for 64: two registers; 4 a row and block, a word for both instructions, each of which takes two bytes
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.dtypes import INT8
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.scheme import Block, Scheme
from . import sm80_layout
from .operand import SCALED_BLOCK, Operand
from .sm80_layout import Layout

PAIRS = Pattern(2, 4)


def layout(block: Block) -> Layout:
    """Pairs as bytes: a lane has each fourth word of a row, as ldmatrix gives it; rows of x need no padding but scales."""
    return Layout(PAIRS, 8, words=8, run=2, load=16, stride=SCALED_BLOCK, scales=256 // block.columns)


def bytes_of(pattern: Pattern, k: int) -> int:
    """Bytes of a lifted row of k columns."""
    return pattern.expanded_k(k) // 2


def operand(pattern: Pattern, k: int, block: Block) -> Operand:
    """Rows of x as the kernel loads them: whole blocks, with their scales."""
    return Operand(False, pattern, layout(block).blocks(bytes_of(pattern, k)) * SCALED_BLOCK, block)


def arrange(packed: PackedWeight, xp: Any = np) -> Any:
    """Weights over pairs in the order in which lanes load them: uint8 [blocks, row tiles, block_bytes].

    Args:
        xp: numpy or cupy, whichever made the arrays of `packed`.
    """
    assert packed.scheme.weights.block is not None
    lay, size = layout(packed.scheme.weights.block), bytes_of(packed.pattern, packed.k)
    as_bytes = PackedWeight(packed.values, packed.meta, None, PAIRS, (packed.n, size), Scheme.of(INT8))
    plain = sm80_layout.arrange(as_bytes, xp, lay)
    blocks, row_tiles = plain.shape[:2]
    scales = xp.zeros((16 * row_tiles, blocks * lay.scales), np.uint8)
    scales[: packed.n, : packed.block_scale.shape[1]] = packed.block_scale.view(np.uint8)
    words = scales.reshape(row_tiles, 2, 8, blocks, lay.scales // 4, 4).transpose(3, 0, 4, 2, 1, 5)  # row = 8 half + g
    return xp.concatenate([plain, xp.ascontiguousarray(words).reshape(blocks, row_tiles, 16 * lay.scales)], axis=2)
