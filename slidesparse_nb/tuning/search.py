"""Timing the ways to compute products on a GPU, and keeping what beats the model's choice (docs/tuning.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .. import cuda, packing
from ..arch import Candidate, for_capability, require_support
from ..core.packed import size_problem
from ..core.problem import Asked, GemmProblem
from ..cuda import tuned_store
from ..cuda.ahead_of_time import compile_all, kernels_of
from ..cuda.jit import cache
from ..errors import OperandError

LEAST_GAIN = 0.02
"""Of the time of the model's choice, what another way must save to be kept: less is not sure to be there tomorrow."""


@dataclass(frozen=True)
class Tuned:
    """What was found for one product.

    Attributes:
        m, n, k, pattern, dtype, out: y [m, n] = x [m, k] @ w.T, of weights of this pattern and type, into the type `out`.
        ways: how many were timed.
        model, best: the launches of the model's choice and of the fastest way.
        model_us, best_us: microseconds that they take.
        kept: `best` is used from now on, in processes that have not multiplied this shape yet.
        wrong: ways whose results differed from the model's choice's; none, unless a kernel or the GPU is broken.
    """

    m: int
    n: int
    k: int
    pattern: str
    dtype: str
    out: str
    ways: int
    model: tuple[str, ...]
    best: tuple[str, ...]
    model_us: float
    best_us: float
    kept: bool
    wrong: tuple[str, ...]

    @property
    def gain(self) -> float:
        """Of the time of the model's choice, what the fastest way saves: 0 to 1."""
        return 1 - self.best_us / self.model_us


def tune_products(
    products: Iterable[Asked],
    seconds: float | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Tuned]:
    """Time the likely ways to compute each product on the current GPU, and keep those that beat the model's choice.

    Args:
        products: (m, n, k, pattern, dtype of the weights, name of the type of y) of each. Those with the same weights are best
            named one after the other.
        seconds: after which no further product is begun.
        tell: is told what is being done, a line at a time.

    Yields:
        What was found, product by product; it has been written down by then.

    Raises:
        OperandError: a product that cannot be.
        UnsupportedError: there is no GPU, or it does not multiply such weights, or the cache folder cannot be written.
    """
    wanted = [_checked(product) for product in products]
    capability = _capability()
    for problem in wanted:
        require_support(for_capability(capability), capability, problem.dtype)
    end = None if seconds is None else time.monotonic() + seconds
    return _tuned(wanted, end, tell or (lambda text: None))


def forget_tuned() -> int:
    """Forget everything that was found, on every GPU, and return how much it was; needs no GPU."""
    return tuned_store.forget()


def _checked(asked: Asked) -> GemmProblem:
    problem = GemmProblem.of(asked)
    for name, value in (("m", problem.m), ("n", problem.n), ("k", problem.k)):
        if value < 1:
            raise OperandError(f"{name}: {value} must be 1 or more")
    if why := size_problem(problem.pattern, (problem.n, problem.k), problem.scheme):
        raise OperandError(f"product: {why}")
    return problem


def _capability() -> tuple[int, int]:
    """Compute capability of the current GPU."""
    runtime = cuda.cupy("tune", "run it where the products will run").cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return properties["major"], properties["minor"]


def _tuned(wanted: list[GemmProblem], end: float | None, tell: Callable[[str], None]) -> Iterator[Tuned]:
    timing = cuda.importing("slidesparse_nb.tuning.race", "tune")
    clock = timing.GpuClock()
    track: Any = None
    of: Any = None
    for number, asked in enumerate(wanted):
        m, n, k, pattern, dtype, out = asked.m, asked.n, asked.k, asked.pattern, asked.dtype, asked.out
        if end is not None and time.monotonic() >= end:
            tell(f"time is up: {len(wanted) - number} of {len(wanted)} products were not begun")
            return
        name = f"{number + 1}/{len(wanted)}  {n} x {k}, {pattern}, {dtype} -> {out}, m={m}"
        if of != (n, k, pattern, dtype):
            track = None  # its memory is wanted
            packed = packing.pack(timing.normal(n, k), pattern, dtype, prune="magnitude")
            track, of = timing.Track(packed, clock), (n, k, pattern, dtype)
        problem = track.problem(m, out)
        ways = tuned_store.likely(problem)
        jobs = kernels_of((config for way in ways for config in way), problem.device.capability)
        tell(f"{name}: {len(ways)} ways, of {len(jobs)} kernels")
        compile_all(jobs, cache.device_compiler())
        race = track.race(m, out, ways)
        found = Tuned(
            m, n, k, str(pattern), str(dtype), out, race.ways, _words(ways[0]), _words(race.best), race.model_us, race.best_us,
            race.best_us <= (1 - LEAST_GAIN) * race.model_us, tuple(" + ".join(_words(way)) for way in race.wrong),
        )  # fmt: skip
        if found.kept:
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            told = {"words": found.best, "us": found.best_us, "model_us": found.model_us, "when": when}
            tuned_store.keep(problem, race.best, told)
        else:
            tuned_store.drop(problem)
        yield found


def _words(way: Candidate) -> tuple[str, ...]:
    return tuple(map(str, way))
