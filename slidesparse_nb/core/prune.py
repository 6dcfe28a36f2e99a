"""Methods of pruning: each scores the weights, and in every group those of highest score stay; of equal scores the leftmost.

    name, or scores --bind--> Pruning --rows--> Pruning of a block of rows --scores--> float32 [rows, k]

NumPy only: what then goes is for `kernels.prune` of the CPU and the kernel of a GPU. A new method is a class that obeys
`Pruner`, and a row in PRUNERS.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import OperandError, shown
from .checks import real_numbers, require_unmasked

Array = NDArray[Any]


# ---- methods -----------------------------------------------------------------------------------------------------


class Pruner(Protocol):
    """A method of pruning.

    Attributes:
        kernel: what the packing kernel of a GPU calls the method, if it ranks weights by it; "scores" of every other one, whose
            scores are made on the host, from a copy of the weights.
        seeded: scores depend on the seed and on where a row stands.
        statistics: what it must know of a module besides its weights: "none", "column" (an array [k], such as norms of the
            activations) or "weight" ([n, k]).
    """

    kernel: str
    seeded: bool
    statistics: str

    def scores(self, w: Array, seed: int, first_row: int, statistics: Array | None) -> Array:
        """Scores of some rows; of nothing but these arguments, and each row of its own weights, so that blocks do not matter.

        Args:
            w: float32 [rows, k], rows first_row ... of the module; its own.
            seed: 0 to 2^64 - 1.
            statistics: real numbers, [k] or [rows, k] as the method asks for; None if it asks for none.

        Returns:
            [rows, k] >= 0 of any real type, compared in float32. Weights that are zero go first whatever their scores.
        """
        ...


class _Magnitude:
    kernel, seeded, statistics = "magnitude", False, "none"

    def scores(self, w: Array, seed: int, first_row: int, statistics: Array | None) -> Array:
        return np.abs(w)


class _Random:
    kernel, seeded, statistics = "random", True, "none"

    def scores(self, w: Array, seed: int, first_row: int, statistics: Array | None) -> Array:
        return uniform(seed, first_row, *w.shape)


class _Wanda:
    """|w| times the norm of its column of inputs; see `pruning.wanda`."""

    kernel, seeded, statistics = "scores", False, "column"

    def scores(self, w: Array, seed: int, first_row: int, statistics: Array | None) -> Array:
        assert statistics is not None
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(np.abs(w) * statistics.astype(np.float32))


class _Given:
    """Scores that the caller has: a statistic of every weight."""

    kernel, seeded, statistics = "scores", False, "weight"

    def scores(self, w: Array, seed: int, first_row: int, statistics: Array | None) -> Array:
        assert statistics is not None
        return statistics


GIVEN: Pruner = _Given()
PRUNERS: dict[str, Pruner | None] = {"none": None, "magnitude": _Magnitude(), "random": _Random(), "wanda": _Wanda()}
"""none: the weights obey the pattern already. magnitude: the smallest |w| go. random: for tests and speed measurements.
wanda: the smallest |w| * norm of the input column go; statistics are those norms, [k]."""


def takes_statistics(method: str) -> bool:
    """Whether a method in PRUNERS needs statistics."""
    pruner = PRUNERS[method]
    return pruner is not None and pruner.statistics != "none"


def by_row(method: str) -> bool:
    """Whether scores of a method in PRUNERS depend on the weights of a row alone: modules may be pruned row below row."""
    pruner = PRUNERS[method]
    return pruner is None or not (pruner.seeded or takes_statistics(method))


# ---- a method and the weights that it prunes ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pruning:
    """A method with all that it must know of some weights.

    Attributes:
        name: in PRUNERS, or "scores".
        pruner: None leaves the weights alone.
        seed: None if it is not known, of weights to be verified.
        statistics: as `pruner` asks for; or the scores.
    """

    name: str = "none"
    pruner: Pruner | None = None
    seed: int | None = 0
    statistics: Array | None = None

    @property
    def kernel(self) -> str:
        return "none" if self.pruner is None else self.pruner.kernel

    def rows(self, rows: slice) -> Pruning:
        """The same for some rows of the weights."""
        if self.statistics is None or self.statistics.ndim == 1:
            return self
        return replace(self, statistics=self.statistics[rows])

    def scores(self, w: Array, first_row: int = 0) -> Array:
        """A score for every weight, -1 for those that are zero already.

        Args:
            w: float32 [rows, k], rows first_row ... of the whole matrix.

        Returns:
            float32 [rows, k].

        Raises:
            OperandError: what the method returns is no array of scores.
        """
        assert self.pruner is not None
        score = self.pruner.scores(w, self.seed or 0, first_row, self.statistics)
        if self.kernel == "scores":
            score = _checked(score, w.shape, first_row)
        return np.where(w == 0, np.float32(-1), score)


NOTHING = Pruning()


def bind(method: object, shape: tuple[int, ...], seed: int | None = 0, statistics: object = None) -> Pruning:
    """`method` for weights of `shape`.

    Args:
        method: a name in PRUNERS; or scores of any method of your own, [n, k] >= 0 of any real type: of two weights in a group
            the one with the higher score stays.
        shape: (n, k).
        statistics: as the method of that name asks for; None if it takes none.

    Raises:
        OperandError: an unknown name; scores of another shape, masked, of no real type, negative or not finite; statistics that
            are missing, of another shape or no real type, or that the method does not take.
    """
    names = ", ".join(PRUNERS)
    if not isinstance(method, str):
        if not isinstance(method, np.ndarray):
            raise OperandError(f"prune: {type(method).__name__} must be one of {names}, or a NumPy array of scores")
        require_no_statistics(statistics)
        return Pruning("scores", GIVEN, seed, _checked(method, shape))
    if method not in PRUNERS:
        raise OperandError(f"prune: {shown(method)} is not a method; it must be one of {names}, or an array of scores")
    pruner = PRUNERS[method]
    if pruner is None or pruner.statistics == "none":
        require_no_statistics(statistics, method)
        return Pruning(method, pruner, seed)
    wanted = {"column": shape[1:], "weight": tuple(shape)}[pruner.statistics]
    if statistics is None:
        raise OperandError(
            f"statistics: are missing; prune={method!r} needs one number a {pruner.statistics}, an array of shape {wanted}"
        )
    given = real_numbers("statistics", statistics)
    if given.shape != wanted:
        raise OperandError(f"statistics: shape {given.shape} must be {wanted}, one number a {pruner.statistics}")
    return Pruning(method, pruner, seed, given)


def require_no_statistics(statistics: object, method: str | None = None) -> None:
    """Raise OperandError for statistics that no method will look at; `method` is None of scores."""
    if statistics is not None:
        whose = "scores" if method is None else f"prune={method!r}"
        raise OperandError(f"statistics: {type(statistics).__name__} is given, but {whose} takes none; leave it out")


def _checked(scores: Array, shape: tuple[int, ...], first_row: int = 0) -> Array:
    """Scores [n, k] as float32; or OperandError."""
    require_unmasked("prune", scores)
    if scores.shape != tuple(shape):
        raise OperandError(f"prune: scores of shape {scores.shape} must have one score a weight, {tuple(shape)}")
    try:
        given = real_numbers("prune", scores)
    except OperandError:
        raise OperandError(f"prune: scores of type {scores.dtype} must be real numbers") from None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result = given.astype(np.float32) + np.float32(0)  # and -0.0 is 0: its bits are compared
        good = np.isfinite(result) & (given >= np.zeros((), given.dtype))
    if not good.all():
        row, column = map(int, np.argwhere(~good)[0])
        raise OperandError(
            f"prune: score {given[row, column]} at row {first_row + row}, column {column} must be finite and not negative"
        )
    return result


def check_seed(seed: object) -> int:
    """`seed` modulo 2^64.

    Raises:
        OperandError: it is no integer, of Python or NumPy.
    """
    try:
        return operator.index(seed) % 2**64  # type: ignore[arg-type]
    except TypeError:
        raise OperandError(f"seed: {shown(seed)} must be an integer") from None


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
