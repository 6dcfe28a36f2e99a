"""Medians, spreads, ratios, and from which m on something is faster."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
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
    slower = ", ".join(f"{m} ({ratio:.2f}x)" for m, ratio in found.slower.items())
    if len(found.slower) == len(found.measured):
        return f"{subject}: slower than {peer} at every m measured: m = {slower}."
    if found.first is not None:
        return f"{subject}: faster than {peer} from m = {found.first} on; slower at m = {slower}."
    faster = ", ".join(str(m) for m in found.measured if m not in found.slower)
    return f"{subject}: faster than {peer} only at m = {faster}; slower at m = {slower}."
