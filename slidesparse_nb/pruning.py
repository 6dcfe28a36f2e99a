"""Which weights go: scores by method. In every group the weights of highest score stay; of equal scores the leftmost."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cpu
from .errors import OperandError, shown
from .operands import real_numbers, require_unmasked
from .pattern import Pattern

Array = NDArray[Any]

METHODS = ("none", "magnitude", "random")
"""none: the weights obey the pattern already. magnitude: the smallest |w| go. random: for tests and speed measurements."""


def check(method: object, shape: tuple[int, ...]) -> str | Array:
    """`method` as one of METHODS, or as float32 scores.

    Args:
        method: a name in METHODS; or scores of any method of your own, [n, k] >= 0 of any real type: of two weights in a group
            the one with the higher score stays. (Wanda: |w| times the norm of the activations of its column.)
        shape: (n, k) of the weights.

    Raises:
        OperandError: an unknown name; scores of another shape, masked, of no real type, negative or not finite.
    """
    if isinstance(method, str):
        if method in METHODS:
            return method
        raise OperandError(
            f"prune: {shown(method)} is not a method; it must be one of {', '.join(METHODS)}, or an array of scores"
        )
    if not isinstance(method, np.ndarray):
        raise OperandError(f"prune: {type(method).__name__} must be one of {', '.join(METHODS)}, or a NumPy array of scores")
    require_unmasked("prune", method)
    if method.shape != tuple(shape):
        raise OperandError(f"prune: scores of shape {method.shape} must have one score a weight, {tuple(shape)}")
    try:
        given = real_numbers("prune", method)
    except OperandError:
        raise OperandError(f"prune: scores of type {method.dtype} must be real numbers") from None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scores = given.astype(np.float32) + np.float32(0)  # and -0.0 is 0: its bits are compared
        good = np.isfinite(scores) & (given >= np.zeros((), given.dtype))
    if not good.all():
        row, column = map(int, np.argwhere(~good)[0])
        raise OperandError(f"prune: score {method[row, column]} at row {row}, column {column} must be finite and not negative")
    return scores


def check_seed(seed: object) -> int:
    """`seed` modulo 2^64.

    Raises:
        OperandError: it is no integer, of Python or NumPy.
    """
    try:
        return operator.index(seed) % 2**64  # type: ignore[arg-type]
    except TypeError:
        raise OperandError(f"seed: {shown(seed)} must be an integer") from None


def scores(w: Array, method: str | Array, *, seed: int = 0, first_row: int = 0) -> Array:
    """A score for every weight, -1 for those that are zero already.

    Args:
        w: [rows, k], rows first_row ... of the whole matrix, so that blocks of rows give what the whole gives.
        method: "magnitude", "random", or scores [rows, k] of these rows.
        seed: of "random", any integer.

    Returns:
        float32 [rows, k].
    """
    weights = cpu.to_float32(w)
    if isinstance(method, str) and method == "magnitude":
        score = np.abs(weights)
    elif isinstance(method, str):
        score = uniform(seed, first_row, *w.shape)
    else:
        score = method
    return np.where(weights == 0, np.float32(-1), score)


def prune(w: Array, pattern: Pattern, method: str | Array, *, seed: int = 0, first_row: int = 0) -> None:
    """Zero all but nnz weights of every group, in place.

    Args:
        w: [rows, k] contiguous and writable; floating-point weights, or 8-bit ones, which are pruned as they are stored.
        method, seed, first_row: as for `scores`; "none" leaves w alone.
    """
    if isinstance(method, str) and method in ("none", "magnitude"):
        if method == "magnitude":
            cpu.prune(w, pattern)
    else:
        cpu.prune(w, pattern, scores(w, method, seed=seed, first_row=first_row))


def uniform(seed: int, first_row: int, rows: int, k: int) -> Array:
    """Uniform numbers in [0, 1), a function of seed, row and column alone: float32 [rows, k].

    The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014) over a counter.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)

    def mixed(z: Array) -> Array:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        return z

    start = mixed(np.array([[check_seed(seed)]], np.uint64))
    row = mixed(start + (np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None] + np.uint64(1)) * gamma)
    column = (np.arange(k, dtype=np.uint64) + np.uint64(1)) * gamma
    top24 = mixed(row + column) >> np.uint64(40)
    return np.asarray(top24.astype(np.float32) * np.float32(2.0**-24))
