"""A better mask and better weights than SparseGPT's, from these (ALPS: Meng, Behdin, Wang, Mazumder, 2024).

    minimize  sum of e H e^T over rows e of (w - v),   v [n, k] obeys the pattern,   H = X^T X + damping   [k, k]

SparseGPT fixes columns from left to right, and a column that goes is made up for by those right of it alone. So here:

    mask             ADMM: v takes turns with weights that obey the pattern, and a penalty rho draws both together
    least squares    conjugate gradients: all weights of a row that stay make up for all that went

Both take matrix products for all rows at once: every row has its own mask, so its own part of H, and to factor each takes
k^3 / 3 operations. ADMM works on columns scaled so that H has a diagonal of ones, and need not find a better mask: a row keeps
SparseGPT's if that has the smaller error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.pattern import Pattern
from .groups import kept, namespace

ROUNDS, RHO, GROWTH = 30, np.float32(0.1), np.float32(1.1)
"""Of ADMM: rounds, the first rho, and rho over that of the round before."""
STEPS = 10
"""Of conjugate gradients; more lower the error on the calibration text, but hardly that on another."""
TINY = np.float32(1e-35)
"""Below it nothing is left to gain in a row."""


def refine(columns: Any, w: Any, hessian: Any, keep: Any, pattern: Pattern | None) -> tuple[Any, Any]:
    """Better retained weights and, where `pattern` is given, a better mask.

    Args:
        columns: float32 [k, n], pruned weights, transposed.
        w: float32 [k, n], the dense weights, transposed.
        hessian: float32 [k, k], damped, of about unit diagonal.
        keep: bool [k, n], the mask of `columns`.

    Returns:
        (float32 [k, n], bool [k, n]), new.
    """
    xp, found = namespace(columns), least_squares(columns, w, hessian, keep)
    if pattern is None:
        return found, keep
    other, mask = admm(found, w, hessian, pattern)
    other = least_squares(other, w, hessian, mask)
    better = cost(other, w, hessian) < cost(found, w, hessian)
    return xp.where(better, other, found), xp.where(better, mask, keep)


def cost(columns: Any, w: Any, hessian: Any) -> Any:
    """float32 [n], the error of every row."""
    lost = w - columns
    return (lost * (hessian @ lost)).sum(axis=0)


def admm(columns: Any, w: Any, hessian: Any, pattern: Pattern) -> tuple[Any, Any]:
    """Weights near the least error that obey the pattern, and their mask; arguments as for `refine`."""
    xp, zero, rho = namespace(columns), np.float32(0), RHO
    scale = xp.sqrt(xp.diagonal(hessian))[:, None]
    values, vectors = xp.linalg.eigh(hessian / scale / scale.T)
    goal = hessian @ w / scale
    obeys, dual, mask = columns * scale, xp.zeros_like(columns), xp.ones(columns.shape, bool)
    for _ in range(ROUNDS):
        free = vectors @ ((vectors.T @ (goal + rho * obeys - dual)) / (values[:, None] + rho))
        drawn = xp.where(w == 0, zero, free + dual / rho)
        mask = kept(xp.where(w == 0, np.float32(-1), drawn * drawn).T, pattern).T
        obeys = xp.where(mask, drawn, zero)
        dual = dual + rho * (free - obeys)
        rho = rho * GROWTH
    return obeys / scale, mask


def least_squares(columns: Any, w: Any, hessian: Any, keep: Any) -> Any:
    """The retained weights after STEPS steps of conjugate gradients towards their optimum; arguments as for `refine`."""
    xp, zero = namespace(columns), np.float32(0)
    inverse = 1 / xp.diagonal(hessian)[:, None]  # the preconditioner
    left = xp.where(keep, hessian @ (w - columns), zero)
    direction, size = xp.zeros_like(columns), xp.ones(columns.shape[1], np.float32)
    for _ in range(STEPS):
        scaled = inverse * left
        last, size = size, (left * scaled).sum(axis=0)
        direction = scaled + direction * (size / xp.maximum(last, TINY))
        moved = xp.where(keep, hessian @ direction, zero)
        step = size / xp.maximum((direction * moved).sum(axis=0), TINY)
        columns = columns + step * direction
        left = left - step * moved
    return columns
