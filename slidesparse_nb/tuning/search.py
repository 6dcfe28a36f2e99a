"""Timing the candidates for products on a GPU, and keeping what beats the model's choice (docs/tuning.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .. import cuda, packing
from ..arch import for_capability, require_support
from ..core.packed import size_problem
from ..core.problem import Asked, GemmProblem
from ..cuda import tuned_store
from ..cuda.ahead_of_time import compile_all, kernels_of
from ..cuda.jit import cache
from ..errors import OperandError, UnsupportedError
from .clock import GpuClock

LEAST_GAIN = 0.02
"""Share of the model's choice's time that another candidate must save to be kept; a smaller gain may not repeat."""


@dataclass(frozen=True)
class Tuned:
    """What was found for one product.

    Attributes:
        m, n, k, pattern, dtype, out: y [m, n] = x [m, k] @ w.T, of weights of this pattern and type, into the type `out`.
        candidates: how many were timed.
        model, best: the launches of the model's choice and of the fastest candidate.
        model_us, best_us: microseconds that they take.
        kept: `best` is used from now on, in processes that have not multiplied this shape yet.
        wrong: candidates whose results differed from the model's choice's; none, unless a kernel or the GPU is broken.
    """

    m: int
    n: int
    k: int
    pattern: str
    dtype: str
    out: str
    candidates: int
    model: tuple[str, ...]
    best: tuple[str, ...]
    model_us: float
    best_us: float
    kept: bool
    wrong: tuple[str, ...]

    @property
    def gain(self) -> float:
        """Share of the model's choice's time that the fastest candidate saves: 0 to 1."""
        return 1 - self.best_us / self.model_us


def tune_products(
    products: Iterable[Asked],
    seconds: float | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Tuned]:
    """Time the likely candidates for each product on the current GPU, and keep those that beat the model's choice.

    Args:
        products: (m, n, k, pattern, dtype of the weights, name of the type of y) of each. Products of the same weights should
            follow each other: the weights are packed once.
        seconds: time after which no further product is begun.
        tell: called with a line of text for each step.

    Yields:
        The result of each product, after it has been stored.

    Raises:
        OperandError: a product that cannot be.
        UnsupportedError: there is no GPU, or it does not multiply such weights, or they are not tuned, or the cache folder
            cannot be written.
    """
    wanted = [_checked(product) for product in products]
    capability = _capability()
    for problem in wanted:
        require_support(for_capability(capability, scheme=problem.scheme), capability, problem.scheme)
    end = None if seconds is None else time.monotonic() + seconds
    return _tuned(wanted, end, tell or (lambda text: None))


def forget_tuned() -> int:
    """Forget everything that was found, on every GPU, and return how much it was; needs no GPU."""
    return tuned_store.forget()


def _checked(asked: Asked) -> GemmProblem:
    problem = GemmProblem.of(asked)
    if problem.scheme.blocks:
        raise UnsupportedError(f"product: {problem.scheme} weights are not tuned; their launches are the model's choice")
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
    clock = GpuClock()
    track: Any = None
    of: Any = None
    for number, asked in enumerate(wanted):
        m, n, k, pattern, dtype, out = asked.m, asked.n, asked.k, asked.pattern, asked.dtype, asked.out
        if end is not None and time.monotonic() >= end:
            tell(f"time is up: {len(wanted) - number} of {len(wanted)} products were not begun")
            return
        if of != (n, k, pattern, dtype):
            track = None  # free its memory first
            packed = packing.pack(timing.normal(n, k), pattern, dtype, prune="magnitude")
            track, of = timing.Track(packed, clock), (n, k, pattern, dtype)
        problem = track.problem(m, out)
        candidates = track.likely(problem)
        jobs = kernels_of((config for launches in candidates for config in launches), problem.device.capability)
        name = f"{number + 1}/{len(wanted)}  {n} x {k}, {pattern}, {dtype} -> {out}, m={m}"
        tell(f"{name}: {len(candidates)} candidates, of {len(jobs)} kernels")
        compile_all(jobs, cache.device_compiler())
        race = track.race(m, out, candidates)
        model, best, *wrong = (tuple(map(str, launches)) for launches in (candidates[0], race.best, *race.wrong))
        kept = race.best_us <= (1 - LEAST_GAIN) * race.model_us
        if kept:
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            told = {"words": best, "us": race.best_us, "model_us": race.model_us, "when": when}
            tuned_store.keep(problem, race.best, told)
        else:
            tuned_store.drop(problem)
        joined = tuple(" + ".join(words) for words in wrong)
        product = (m, n, k, str(pattern), str(dtype), out)
        yield Tuned(*product, race.candidates, model, best, race.model_us, race.best_us, kept, joined)
