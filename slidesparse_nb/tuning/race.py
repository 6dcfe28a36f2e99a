"""The candidates for a product timed against each other on the current GPU: proved equal, then timed in CUDA graphs.

A graph holds a call for each of several weights, which fill L2 several times over. Candidates are timed in turns, a short burst
each after a pause, so that a clock that drifts drifts for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, Protocol

import cupy
import numpy as np

from ..arch import Candidate
from ..core.dtypes import BFLOAT16, FLOATS
from ..core.packed import PackedWeight
from ..core.problem import GemmProblem
from ..cuda import matmul, self_test, tuned_store
from ..cuda.weight import to_device
from .clock import Launch, cold_calls, poison, replays

FINALISTS = 5
"""Candidates that are timed again after one burst each, the model's choice among them."""

AGAIN, LAST = 5, 7
"""Bursts a finalist; and bursts of the fastest finalist against the model's choice alone. Its time is the median of the latter,
because the fastest of many was also the luckiest."""

APART = 0.25
"""How far floating-point results may differ, in standard deviations of y. Another order of addition differs by less, even in
the 13 bits of a float8 sum (docs/hopper.md), and a wrong tile by more."""


class Clock(Protocol):
    """What captures calls and times them; see clock.GpuClock."""

    l2_bytes: int

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Launch: ...
    def burst(self, launch: Launch, replays: int) -> float: ...


@dataclass(eq=False)
class Lane:
    """One candidate, ready to run.

    Attributes:
        launch: runs its graph.
        kept: operands that must live as long as the graph.
        replays: replays of the graph in a burst.
        us: microseconds a replay, one number a burst.
    """

    candidate: Candidate
    launch: Launch
    kept: tuple[Any, ...]
    replays: int = 0
    us: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Race:
    """The result.

    Attributes:
        best: the fastest candidate.
        model_us, best_us: microseconds of the model's choice and of `best`, timed in turns.
        candidates: how many were timed.
        wrong: candidates whose results differ from the model's choice's; they are not timed.
    """

    best: Candidate
    model_us: float
    best_us: float
    candidates: int
    wrong: tuple[Candidate, ...]


class Track:
    """Weights of one shape and type on the current GPU, for products with any number of tokens."""

    def __init__(self, packed: PackedWeight, clock: Clock) -> None:
        self.weights, self.clock = [packed], clock

    def problem(self, m: int, out: str) -> GemmProblem:
        """What is computed for m tokens into the type named `out`."""
        return to_device(self.weights[0]).problem(m, out)

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the arranged buffers, on which the candidates depend."""
        return tuple(to_device(self.weights[0]).buffers)

    def likely(self, problem: GemmProblem) -> list[Candidate]:
        """The candidates that are worth timing, the model's choice first; none whose kernel fails its test."""
        ordinal, likely = to_device(self.weights[0]).ordinal, tuned_store.likely(problem, self.buffers)
        passing = list(self_test.passing(problem, likely, self.buffers, ordinal))
        return passing or [self_test.best(problem, self.buffers, ordinal)]

    def race(self, m: int, out: str, candidates: Sequence[Candidate]) -> Race:
        """Time the candidates for `problem(m, out)`, the model's choice first."""
        packed = self.weights[0]
        y_type = next(dtype for dtype, name in FLOATS.items() if name == out)
        touched = packed.nbytes + m * (packed.k * packed.dtype.bits // 8 + packed.n * y_type.itemsize)
        count = cold_calls(touched, self.clock.l2_bytes)
        while len(self.weights) < count:
            self.weights.append(replace(packed))  # to be arranged in memory of its own
        weights = self.weights[:count]
        x = normal(m, packed.k)
        xs = [matmul.quantize(x, packed.pattern, packed.dtype, weight)[0] for weight in weights]
        ys = [cupy.empty((m, packed.n), y_type) for _ in weights]
        there = [to_device(weight) for weight in weights]
        plans = {c: [weight.bind(m, out, c) for weight in there] for c in candidates}
        workspace = cupy.empty(max(each[0].plan.bytes for each in plans.values()), np.uint8)
        calls = [partial(matmul.matmul, *of[:2], out=of[2], workspace=workspace) for of in zip(xs, weights, ys, strict=True)]
        wanted: Any = None
        lanes: list[Lane] = []
        wrong: list[Candidate] = []
        try:
            for candidate, each in plans.items():
                for weight, plan in zip(there, each, strict=True):
                    weight.plans[m, out] = plan
                poison(ys[0])
                calls[0]()
                if wanted is None:
                    wanted = ys[0].copy()
                elif not _same(ys[0], wanted, exactly=packed.scheme.accumulator == np.int32):
                    wrong.append(candidate)
                    continue
                lanes.append(Lane(candidate, self.clock.capture(calls), (calls, each)))
        finally:
            for weight in there:
                weight.plans.clear()
        return run(lanes, self.clock, count, wrong)


def run(lanes: Sequence[Lane], clock: Clock, calls: int, wrong: Sequence[Candidate] = ()) -> Race:
    """Time lanes, the model's choice first, whose graphs hold `calls` calls each."""

    def time_in_turns(lanes: Sequence[Lane], times: int) -> None:
        for lane in lanes:
            lane.us.clear()
        for _ in range(times):
            for lane in lanes:
                lane.us.append(clock.burst(lane.launch, lane.replays))

    for lane in lanes:
        lane.replays = replays(clock.burst(lane.launch, 1))
    time_in_turns(lanes, 1)
    model, *others = lanes
    finalists = [model, *sorted(others, key=lambda lane: lane.us[0])[: FINALISTS - 1]]
    time_in_turns(finalists, AGAIN)
    best = min(finalists, key=lambda lane: median(lane.us))
    if best is not model:
        time_in_turns([model, best], LAST)
    return Race(best.candidate, median(model.us) / calls, median(best.us) / calls, len(lanes), tuple(wrong))


def normal(rows: int, columns: int) -> Any:
    """Random numbers float32 [rows, columns] on the current GPU; others for other rows: weights are not activations."""
    return cupy.random.default_rng(20240607 + rows).standard_normal((rows, columns), dtype=np.float32)


def _same(y: Any, wanted: Any, exactly: bool) -> bool:
    """Whether y is what is wanted, bit for bit or but for rounding."""
    if exactly:
        return bool((y.view(f"u{y.itemsize}") == wanted.view(f"u{y.itemsize}")).all())
    y, wanted = _float32(y), _float32(wanted)
    return bool((abs(y - wanted) <= APART * float((wanted * wanted).mean()) ** 0.5).all())


def _float32(y: Any) -> Any:
    """y in a type that CuPy computes in."""
    return (y.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if y.dtype == BFLOAT16.numpy else y.astype(np.float32)
