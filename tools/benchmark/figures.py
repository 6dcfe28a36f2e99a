"""What cells say when put beside each other: ratios, rates, shares of the floor. Tables and pictures show these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .floors import Work, floor_us, work
from .results import Cell, Results
from .selection import ALL, KINDS, OURS


@dataclass(frozen=True)
class Figure:
    """Ours, for one layer or the sum of a suite's layers, and the peers' times for the same.

    Attributes:
        layer: its name, or "all".
        us, dense, cusparselt, torch: microseconds; None where there is no time.
        dense_fp8: of INT8 products, dense FP8's time, which is what INT8 stands against where dense INT8 is slow.
        spread: of ours; of a sum, the largest.
        floor: microseconds; None if not known.
        work: what must be done at least.
        weights: n k, of all layers.
        cell: of ours, under sustained load: clock, power, energy.
        blank: why there is no time.
        tried: any of the layers was, whatever came of it.
    """

    part: str
    suite: str
    type: str
    pattern: str
    m: int | None
    load: str
    layer: str
    us: float | None
    spread: float | None
    dense: float | None
    cusparselt: float | None
    torch: float | None
    dense_fp8: float | None
    floor: float | None
    work: Work
    weights: int
    cell: Cell | None
    blank: str | None
    tried: bool

    @property
    def label(self) -> str:
        return KINDS[self.type].label

    def over(self, peer: float | None) -> float | None:
        """How many times as fast as a peer."""
        return None if peer is None or not self.us else peer / self.us

    @property
    def tflops(self) -> float | None:
        """Of the dense product, 2 m n k."""
        return None if not self.us or not self.work.flops else self.work.flops / self.us * 1e-6

    @property
    def gbs(self) -> float | None:
        return None if not self.us else self.work.bytes / self.us * 1e-3

    @property
    def of_floor(self) -> float | None:
        return None if not self.us or self.floor is None else self.floor / self.us


def layer_names(results: Results, suite: str) -> dict[str, str]:
    """Of a suite's layers, what a reader calls each: qkv -> qkv (4608, 3584)."""
    return {name: f"{name} ({n}, {k})" for name, n, k in results.suites[suite]}


def figures(results: Results, *, each: bool = False) -> Iterator[Figure]:
    """In the order measured: the suites' totals, after each layer by itself if `each`."""
    for part, suite, type, pattern, m, load in results.ours():
        layers = results.suites[suite]
        if load != "sustained" and (each or len(layers) == 1):
            for layer in layers:
                yield _figure(results, part, suite, type, pattern, m, load, layer[0], [layer])
        if load == "sustained" or len(layers) > 1:
            yield _figure(results, part, suite, type, pattern, m, load, ALL, layers)


def _figure(
    results: Results,
    part: str,
    suite: str,
    type: str,
    pattern: str,
    m: int | None,
    load: str,
    layer: str,
    layers: list[tuple[str, int, int]],
) -> Figure:
    def peer(name: str) -> float | None:
        return results.peer_us(name, part, suite, layer, type, pattern, m, load)

    fp8 = results.peer_us("dense", part, suite, layer, "fp8", pattern, m, load) if (type, part) == ("int8", "gemm") else None
    names = [layer] if load == "sustained" else [name for name, _, _ in layers]
    found = (results.cells.get((OURS, part, suite, name, type, pattern, m, load)) for name in names)
    cells = [cell for cell in found if cell is not None]
    works = [work(part, KINDS[type], pattern, m, n, k) for _, n, k in layers]
    total = works[0]
    for other in works[1:]:
        total = total + other
    us = results.us(OURS, part, suite, layer, type, pattern, m, load)
    spreads = [cell.spread for cell in cells if cell.spread is not None]
    return Figure(
        part, suite, type, pattern, m, load, layer,
        us=us, spread=None if us is None else max(spreads, default=None),
        dense=peer("dense"), cusparselt=peer("cusparselt"), torch=peer("torch"),
        dense_fp8=fp8,
        floor=floor_us(results, part, type, pattern, layers, m, load),
        work=total,
        weights=sum(n * k for _, n, k in layers),
        cell=cells[0] if load == "sustained" and cells else None,
        blank=next((cell.blank for cell in cells if cell.blank), None),
        tried=any(not cell.untried for cell in cells),
    )  # fmt: skip
