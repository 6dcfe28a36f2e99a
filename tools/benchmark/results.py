"""What was measured: cells, the JSON file they are kept in, and rows that put cells beside each other.

Tables, sentences, README and picture show rows and nothing else. docs/benchmarks.md describes the file's keys.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slidesparse_nb as ss

from ..documents import write_whole
from .cases import ALL, KINDS, OURS, Kind, Linear
from .engines import ENGINES
from .peers import PEERS

SCHEMA = 2

UNMEASURED = "not measured"
"""How the blank of a cell begins that was never tried; why not follows a colon."""

CEILINGS = {
    "NVIDIA H200": {
        "fp8": {"burst": 3172e12, "sustained": 2763e12},
        "int8": {"burst": 3350e12, "sustained": 3152e12},
        "bf16": {"burst": 1662e12, "sustained": 1495e12},
        "fp16": {"burst": 1662e12, "sustained": 1495e12},
    }
}
"""GPU -> type -> load -> operations a second of wgmma.sp m64n256 alone, both operands in shared memory, nothing loaded, random
operands, 132 SMs: measured 2026-11-22. They count two operations for each of the m n ks products of the expanded weights, zeros
too. fp16 has bf16's, whose rate it shares."""

Number = int | float


@dataclass(frozen=True)
class Cell:
    """One measurement, or why there is none.

    Attributes:
        provider, part, suite, type, pattern, m, load: see `cases.Case`; type is the key of a Kind.
            A whole model: provider "ours" or the engine, part "prefill" or "decode", suite the model, load the engine.
        layer: of the suite; "all" under sustained load; of a whole model prompts x tokens of each.
        us: microseconds of one call, the median (sustained: of one pass over the layers); None if there is no time.
        gpu_us: of them the GPU was busy, of a whole model.
        bytes: of a whole model's tensors.
        spread: (90th - 10th percentile) / median.
        rows: tokens that the provider was given, where it does not take m; else None.
        sm_mhz, celsius, watts, mj: means under sustained load; millijoules of one pass over the layers.
        blank: why there is no time.
        wrong: whether that is a wrong result.
    """

    provider: str
    part: str
    suite: str
    layer: str
    type: str
    pattern: str | None
    m: int | None
    load: str
    us: Number | None = None
    spread: Number | None = None
    rows: int | None = None
    sm_mhz: Number | None = None
    celsius: Number | None = None
    watts: Number | None = None
    mj: Number | None = None
    gpu_us: Number | None = None
    bytes: Number | None = None
    blank: str | None = None
    wrong: bool = False

    def __post_init__(self) -> None:
        for name, type in _CELL_TYPES.items():
            if not isinstance(getattr(self, name), type):
                raise TypeError(f"{name} is {getattr(self, name)!r:.80}")
        if self.us is not None and not 0 < self.us < 1e18:
            raise ValueError(f"us is {self.us!r:.80}")

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured; two cells of a run never agree in it."""
        return (self.provider, self.part, self.suite, self.layer, self.type, self.pattern, self.m, self.load)


_CELL_TYPES = typing.get_type_hints(Cell)


@dataclass
class Results:
    """A run.

    Attributes:
        started: UTC, ISO 8601.
        machine: GPU, driver, versions.
        selection: what was asked for.
        suites: name -> layers.
        bandwidth: "copy" (read and written) and "read", bytes a second, as far as measured.
        seconds: how long the run took.
        complete: whether everything that was asked for was tried.
    """

    started: str
    machine: dict[str, Any]
    selection: dict[str, Any]
    suites: dict[str, list[Linear]]
    bandwidth: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False
    slidesparse_nb: str = ss.__version__
    cells: dict[tuple[Any, ...], Cell] = field(default_factory=dict)

    def add(self, cell: Cell) -> None:
        self.cells[cell.key] = cell

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def served(self) -> list[Cell]:
        """Those of whole models."""
        return [cell for cell in self.cells.values() if cell.load in ENGINES]

    @property
    def wrong(self) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.wrong]

    def us(
        self, provider: str, part: str, suite: str, layer: str, type: str, pattern: str | None, m: int | None, load: str
    ) -> float | None:
        """A time in microseconds; layer "all": of a sustained pass, or else the sum of the layers' medians. None: not known."""
        layers = [layer] if layer != ALL or load == "sustained" else [linear.name for linear in self.suites[suite]]
        cells = [self.cells.get((provider, part, suite, name, type, pattern, m, load)) for name in layers]
        times = [cell.us for cell in cells if cell is not None and cell.us is not None]
        return sum(times) if len(times) == len(layers) else None

    def save(self, path: Path) -> None:
        """Write the JSON file, a cell a line: whole, or as it was before."""
        facts = {"schema": SCHEMA, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cells"}}
        facts["suites"] = {name: [dataclasses.astuple(linear) for linear in linears] for name, linears in self.suites.items()}
        cells = [{k: v for k, v in vars(cell).items() if v is not None and v is not False} for cell in self.cells.values()]
        lines = [f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in facts.items()]
        listed = ",\n".join(f"  {json.dumps(cell, allow_nan=False)}" for cell in cells)
        write_whole(path, "{\n" + ",\n".join(lines) + f',\n "cells": [\n{listed}\n ]\n}}\n')


def load(path: Path) -> Results:
    """Read a JSON file of results.

    Raises:
        FormatError: it is none, or of another schema.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        if given.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        cells = [Cell(**{"pattern": None, "m": None, **cell}) for cell in given.pop("cells")]
        given["suites"] = {name: [Linear(str(a), int(n), int(k)) for a, n, k in of] for name, of in given["suites"].items()}
        results = Results(**given)
        for cell in cells:
            known = {OURS, cell.load} if cell.load in ENGINES else {OURS, *PEERS}
            _ = KINDS[cell.type], ss.Pattern.of(cell.pattern or "2:4"), dict.fromkeys(known)[cell.provider]
            if cell.load not in ENGINES and cell.layer not in (ALL, *(linear.name for linear in results.suites[cell.suite])):
                raise ValueError(f"{cell.suite} has no layer {cell.layer}")
            results.add(cell)
        _ = [*rows(results, each=True)], "".join([results.started, *results.notes]), float(results.seconds)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ss.SlideSparseError) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise ss.FormatError(
            f"{path}: is no file of results of schema {SCHEMA} ({what}); run slidesparse bench --json again"
        ) from None
    return results


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Ours, for one layer or the sum of a suite's layers, and the baselines' times for the same.

    Attributes:
        cell: ours; for a sum one of layer "all", with the largest spread and the first blank.
        peers: title of a baseline -> its microseconds.
        floor: microseconds that the work takes at least; None if not known.
        flops: 2 m n k, of the dense product.
        bytes: weights, x and y, each once.
        tried: whether any of the layers was.
    """

    cell: Cell
    peers: dict[str, float]
    floor: float | None
    flops: float
    bytes: float
    tried: bool

    def over(self, title: str) -> float | None:
        """How many times as fast as a baseline."""
        return self.peers[title] / self.cell.us if self.cell.us and title in self.peers else None


def rows(results: Results, *, each: bool = False) -> Iterator[Row]:
    """In the order measured: the suites' totals, after each layer by itself if `each`."""
    ours = (c for c in results.cells.values() if c.provider == OURS and c.load not in ENGINES)
    for part, suite, type, pattern, m, load in dict.fromkeys(
        (c.part, c.suite, c.type, str(c.pattern), c.m, c.load) for c in ours
    ):
        linears = results.suites[suite]
        if load != "sustained" and (each or len(linears) == 1):
            for linear in linears:
                # a run that was stopped lacks some
                if (OURS, part, suite, linear.name, type, pattern, m, load) in results.cells:
                    yield _row(results, part, suite, linear.name, type, pattern, m, load)
        if load == "sustained" or len(linears) > 1:
            yield _row(results, part, suite, ALL, type, pattern, m, load)


def _row(results: Results, part: str, suite: str, layer: str, type: str, pattern: str, m: int | None, load: str) -> Row:
    linears = [linear for linear in results.suites[suite] if layer in (linear.name, ALL)]
    names = [layer] if load == "sustained" else [linear.name for linear in linears]
    found = (results.cells.get((OURS, part, suite, name, type, pattern, m, load)) for name in names)
    cells = [cell for cell in found if cell is not None]
    peers: dict[str, float | None] = {}
    for name, peer in PEERS.items():
        if part == peer.part or (part, name) == ("linear", "dense"):  # whole linears: the dense product alone, too
            at = pattern if peer.sparse else None
            peers[peer.title] = results.us(name, peer.part, suite, layer, type, at, m, load)
    if (type, part) == ("int8", "gemm"):  # for GPUs whose dense INT8 is slow
        peers["dense FP8"] = results.us("dense", "gemm", suite, layer, "fp8", None, m, load)
    works = [work(part, KINDS[type], pattern, m or 0, linear.n, linear.k) for linear in linears]
    bandwidth = max(results.bandwidth.values(), default=None)  # of a copy, or of reading alone, which few tokens amount to
    rate = CEILINGS.get(str(results.machine.get("gpu")), {}).get(type, {}).get(load)
    least = [max(moved / bandwidth, slid / rate if rate else 0.0) * 1e6 for _, slid, moved in works] if bandwidth else []
    cell = cells[0]
    if layer == ALL and load != "sustained":
        us = results.us(OURS, part, suite, ALL, type, pattern, m, load)
        spread = max((c.spread for c in cells if c.spread is not None), default=None) if us else None
        blank = next((c.blank for c in cells if c.blank), None)
        cell = Cell(OURS, part, suite, ALL, type, pattern, m, load, us, spread, blank=blank)
    return Row(
        cell,
        {title: time for title, time in peers.items() if time is not None},
        floor=sum(least) if bandwidth else None,
        flops=sum(flops for flops, _, _ in works),
        bytes=sum(moved for _, _, moved in works),
        tried=any(not (c.blank or "").startswith(UNMEASURED) for c in cells),
    )


def work(part: str, kind: Kind, pattern: str, m: int, n: int, k: int) -> tuple[float, float, float]:
    """What one layer takes at least: operations of the dense product, of the expanded one, and bytes read and written once.

    Activations are counted as they are, not as any kernel lays them out; weights are `PackedWeight.nbytes`.
    """
    ks = ss.Pattern.of(pattern).expanded_k(k)
    weights = n * (ks // 2 * kind.size + ks // 8 + 4 * kind.quantized)
    x16, x = m * k * 2, m * (k * kind.size + 4 * kind.quantized)
    if part == "pack":
        return 0, 0, n * k * 2 + weights
    if part == "quantize":
        return 0, 0, x16 + x
    return 2.0 * m * n * k, 2.0 * m * n * ks, weights + (x16 if part == "linear" else x) + m * n * 2
