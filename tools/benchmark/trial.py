"""What a contender offers to the clock: calls with operands of their own, and proof that they compute the right thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .selection import Group, Kind, Linear

Call = Callable[[], Any]
Launch = Callable[[], None]
Verdict = Callable[[], None]
"""Compares on the host what was fetched from the device, which it leaves alone; raises VerificationError if that is wrong."""

CACHES = 5
"""Second-level caches that a graph's operands fill at least, so that every call finds its weights in memory, cold."""

MOST_CALLS = 32


def nothing() -> None:
    """The verdict on what is not checked."""


def _no_check() -> Verdict:
    return nothing


@dataclass
class Trial:
    """One layer of a group, ready to run.

    Attributes:
        calls: each with weights, activations and output of its own.
        check: makes the first call and fetches a sample of what it computes; called before anything is timed, and so is the
            verdict that it returns.
        poison: fills what the graph will write last with NaN; called when it is captured, and before it runs.
        check_again: the same as `check`, of what the graph wrote last.
        rows: tokens that were really given, if not m.
        notes: what a reader must know of it.
        on_host: the calls wait for the device and are timed by the host's clock, one after the other.
    """

    calls: Sequence[Call]
    check: Callable[[], Verdict] = _no_check
    poison: Callable[[], None] = nothing
    check_again: Callable[[], Verdict] = _no_check
    rows: int | None = None
    notes: list[str] = field(default_factory=list)
    on_host: bool = False


class Contender(Protocol):
    """Something that can be timed."""

    def trial(self, group: Group, linear: Linear, copies: int) -> Trial:
        """`copies` calls for one layer."""

    def capture(self, calls: Sequence[Call]) -> Launch:
        """One CUDA graph of these calls, and what replays it on the clock's stream."""

    def release(self) -> None:
        """Forget weights, and give memory back."""


def copies(linears: Sequence[Linear], kind: Kind, m: int | None, l2_bytes: int) -> int:
    """Calls in a graph, the same for every contender: so many that 2:4 weights, the smallest, with x and y fill the cache
    CACHES times over."""
    tokens = m or 0
    touched = sum(x.n * x.k * kind.size // 2 + tokens * (x.k * kind.size + 2 * x.n) for x in linears)
    return max(1, min(MOST_CALLS, math.ceil(CACHES * l2_bytes / max(1, touched))))
