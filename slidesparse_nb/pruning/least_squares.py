"""Least squares of the weights that a mask retains, by conjugate gradients (Hestenes, Stiefel 1952).

    minimize  sum of e H e^T over rows e of (w - v),   v [n, k] zero outside the mask,   H = X^T X + damping   [k, k]

SparseGPT fixes columns from left to right, and a column that goes is made up for by those right of it alone. Here all retained
weights of a row make up for all that went. Every row has its own mask, so its own part of H; to factor each takes k^3 / 3
operations. A step of conjugate gradients takes one matrix product for all rows, and lowers the error of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .groups import namespace

STEPS = 10
"""Steps by default; more lower the error on the calibration text, but hardly that on another."""


def least_squares(columns: Any, w: Any, hessian: Any, keep: Any, steps: int = STEPS) -> Any:
    """Retained weights after some steps towards their optimum.

    Args:
        columns: float32 [k, n], weights to start from, transposed; zero outside the mask.
        w: float32 [k, n], the dense weights, transposed.
        hessian: float32 [k, k], damped, of about unit diagonal.
        keep: bool [k, n], the mask.

    Returns:
        float32 [k, n], new.
    """
    xp, zero = namespace(columns), np.float32(0)
    inverse = 1 / xp.diagonal(hessian)[:, None]  # the preconditioner
    left = xp.where(keep, hessian @ (w - columns), zero)
    direction = xp.zeros_like(columns)
    size = xp.ones(columns.shape[1], np.float32)
    for _ in range(steps):
        scaled = inverse * left
        last, size = size, (left * scaled).sum(axis=0)
        direction = scaled + direction * (size / xp.maximum(last, TINY))
        moved = xp.where(keep, hessian @ direction, zero)
        step = size / xp.maximum((direction * moved).sum(axis=0), TINY)
        columns = columns + step * direction
        left = left - step * moved
    return columns


TINY = np.float32(1e-35)
"""Below it nothing is left to gain in a row."""
