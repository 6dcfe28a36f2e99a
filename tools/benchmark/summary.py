"""Medians, spreads, ratios, from which m on something is faster, and which m takes longer than a larger one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 ... 1) of `values` lie, linear between neighbours; `values` must not be empty."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def spread(values: Sequence[float]) -> float:
    """From the 10th to the 90th percentile, as a share of the median."""
    middle = median(values)
    return (percentile(values, 0.9) - percentile(values, 0.1)) / middle if middle else 0.0


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of y over x through the points (x, y) at which y changed, first to last; None if it changed less than twice.

    For a counter that is refreshed now and then: the time before its first change in view, and after its last, is unknown.
    """
    changes = [after for before, after in itertools.pairwise(points) if after[1] != before[1]]
    if len(changes) < 2:
        return None
    (x0, y0), (x1, y1) = changes[0], changes[-1]
    return (y1 - y0) / (x1 - x0)


SHORT_RUN = 3
"""Neighbouring m that are named one by one; of more, only the first and the last are."""


def runs(picked: Collection[int], measured: Sequence[int]) -> Iterator[list[int]]:
    """The m of `picked` that are neighbours in `measured`, which ascends, together."""
    for is_picked, run in itertools.groupby(measured, lambda m: m in picked):
        if is_picked:
            yield list(run)


def named(ratios: Mapping[int, float], measured: Sequence[int]) -> str:
    """The m of `ratios`, each with its ratio: 1 (0.90x), 64 to 96 (0.91x to 0.99x)."""
    parts = []
    for run in runs(ratios, measured):
        if len(run) > SHORT_RUN:
            low, high = (f"{end(ratios[m] for m in run):.2f}x" for end in (min, max))
            parts.append(f"{run[0]} to {run[-1]} ({low if low == high else f'{low} to {high}'})")
        else:
            parts += [f"{m} ({_below(ratios[m])})" for m in run]
    return ", ".join(parts)


def _below(ratio: float) -> str:
    """A ratio of 1 or less, not as 1.00x unless it is."""
    return f"{ratio:.2f}x" if ratio == 1 or ratio < 0.995 else f"{ratio:.3f}x"


@dataclass(frozen=True)
class Crossover:
    """From which number of tokens on something is faster than its peer.

    Attributes:
        first: the smallest m measured from which on every ratio is above 1; None if the largest m is not.
        slower: the m measured at which the ratio is 1 or less, and that ratio.
        measured: all m, ascending.
    """

    first: int | None
    slower: Mapping[int, float]
    measured: tuple[int, ...]


def crossover(ratios: Mapping[int, float]) -> Crossover:
    """Of speed-ups by m; at least one."""
    measured = tuple(sorted(ratios))
    slower = {m: ratios[m] for m in measured if ratios[m] <= 1}
    above = [m for m in measured if m > max(slower, default=-1)]
    return Crossover(above[0] if above else None, slower, measured)


def crossover_sentence(subject: str, peer: str, ratios: Mapping[int, float]) -> str:
    """The crossover in plain words; ratios by m, at least one."""
    found = crossover(ratios)
    if len(found.measured) == 1:
        m, how = found.measured[0], "slower" if found.slower else "faster"
        return f"{subject}: {how} than {peer} at m = {m} ({ratios[m]:.2f}x), the only m measured."
    if not found.slower:
        return f"{subject}: faster than {peer} at every m measured, {found.measured[0]} to {found.measured[-1]}."
    slower = named(found.slower, found.measured)
    if len(found.slower) == len(found.measured):
        return f"{subject}: slower than {peer} at every m measured: m = {slower}."
    faster = set(found.measured) - set(found.slower)
    if found.first is not None and found.first == min(faster):
        return f"{subject}: faster than {peer} from m = {found.first} on; slower at m = {slower}."
    where = [
        f"{run[0]} to {run[-1]}" if len(run) > SHORT_RUN else ", ".join(map(str, run)) for run in runs(faster, found.measured)
    ]
    return f"{subject}: faster than {peer} only at m = {', '.join(where)}; slower at m = {slower}."


CLIFF = 1.1
"""An m that takes over so many times as long as a larger one is a cliff: what serves more tokens would have served it."""


@dataclass(frozen=True)
class Cliff:
    """An m that takes longer than a larger one.

    Attributes:
        larger: the larger m that takes least.
        ratio: of their times.
    """

    m: int
    larger: int
    ratio: float


def cliffs(times: Mapping[int, float]) -> list[Cliff]:
    """Every m, ascending, that takes over CLIFF times as long as a larger one; of times by m."""
    found: list[Cliff] = []
    descending = sorted(times, reverse=True)
    least = descending[0] if descending else 0
    for m in descending:
        if times[m] > CLIFF * times[least]:
            found.append(Cliff(m, least, times[m] / times[least]))
        if times[m] < times[least]:
            least = m
    return found[::-1]


def cliffs_named(found: Sequence[Cliff], measured: Sequence[int]) -> str:
    """In words: m = 40 (1.18x m = 48), 65 to 80 (up to 1.21x m = 96)."""
    by_m = {cliff.m: cliff for cliff in found}
    parts = []
    for run in runs(by_m, measured):
        if len(run) > SHORT_RUN:
            worst = max((by_m[m] for m in run), key=lambda cliff: cliff.ratio)
            parts.append(f"{run[0]} to {run[-1]} (up to {worst.ratio:.2f}x m = {worst.larger})")
        else:
            parts += [f"{m} ({by_m[m].ratio:.2f}x m = {by_m[m].larger})" for m in run]
    return f"m = {', '.join(parts)}"
