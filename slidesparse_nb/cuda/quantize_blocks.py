"""NVFP4 activations on the GPU as the kernel loads them: lifted, quantized, in rows of blocks (arch/operand.py)."""

from __future__ import annotations

from typing import Any

from ..arch.operand import SCALED_BLOCK
from ..core.dtypes import FLOATS
from ..core.pattern import Pattern
from .kernels.quantize import blocks_kernel


def write(x: Any, pattern: Pattern, out: Any, scale: Any) -> None:
    """Launch on x [m, k] of any strides; nothing is checked, allocated or awaited.

    Args:
        pattern: over pairs.
        out: uint8 [m, whole blocks of SCALED_BLOCK bytes].
        scale: float32 [m, 1].
    """
    m, k = x.shape
    runs = out.shape[1] // SCALED_BLOCK * 8
    if m and runs:
        ld, stride = (step // x.itemsize for step in x.strides)
        filled = -(-pattern.slid_k(k) // 32)
        threads = min(256, -(-runs // 32) * 32)
        blocks_kernel(FLOATS[x.dtype], pattern.windows)((m,), threads, x, out, out, scale, ld, stride, k, filled, runs)
