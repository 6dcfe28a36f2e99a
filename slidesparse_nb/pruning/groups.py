"""Which weights of a group stay, by their scores: `core.reference.prune`'s rule for NumPy's arrays and CuPy's alike."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..core.pattern import Pattern
from ..errors import OperandError, shown


def namespace(a: Any) -> Any:
    """numpy for a NumPy array, cupy for a CuPy one.

    Raises:
        OperandError: `a` is neither.
    """
    if isinstance(a, np.ndarray):
        return np
    if type(a).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    raise OperandError(f"w: {type(a).__name__} must be an array of NumPy or CuPy")


def matrix(name: str, a: Any, shape: tuple[int, ...] | None = None) -> Any:
    """A new C-ordered float32 copy of an array of NumPy or CuPy.

    Args:
        shape: that it must have; by default any of two dimensions.

    Raises:
        OperandError: no array of real numbers of that shape, or one that holds NaN or infinity.
    """
    xp = namespace(a)
    if a.ndim != 2 if shape is None else a.shape != shape:
        raise OperandError(f"{name}: shape {a.shape} must be {'[n, k]' if shape is None else shape}")
    try:
        with np.errstate(over="ignore"):
            copy = xp.array(a, dtype=np.float32, order="C")
    except (TypeError, ValueError):
        raise OperandError(f"{name}: {shown(a.dtype)} must be real numbers") from None
    if not bool(xp.isfinite(copy).all()):
        raise OperandError(f"{name}: holds NaN or infinity (in float32); every number must be finite")
    return copy


def kept(score: Any, pattern: Pattern) -> Any:
    """Which weights stay: in every group those of highest score; of equal scores the leftmost.

    A last group that is not full has as many weights as others: of 7 columns at 6:8 one goes, of 6 none.

    Args:
        score: float32 [n, k], not NaN; -1 for weights that are zero already. A pair's score is the sum of its two, but -1 only
            if both are.

    Returns:
        bool [n, k].
    """
    xp = namespace(score)
    n, k = score.shape
    full = -(-k // pattern.columns) * pattern.columns
    if full > k:
        score = xp.concatenate([score, xp.full((n, full - k), -1, np.float32)], axis=1)
    units = score.reshape(n, full // pattern.columns, pattern.group, pattern.unit)
    if pattern.unit == 2:
        units = xp.where(units.max(axis=3) < 0, np.float32(-1), xp.maximum(units, 0).sum(axis=3))
    units = xp.ascontiguousarray(xp.moveaxis(units.reshape(units.shape[:3]), 2, 0))  # [group, n, groups]: places side by side
    place = xp.arange(pattern.group)[:, None, None]
    stays = xp.ones(units.shape, bool)
    for _ in range(pattern.group - pattern.nnz):
        worst = pattern.group - 1 - xp.argmin(xp.where(stays, units, np.float32(np.inf))[::-1], axis=0)
        stays &= place != worst
    columns = xp.repeat(xp.moveaxis(stays, 0, 2), pattern.unit, axis=2)
    return columns.reshape(n, full)[:, :k]
