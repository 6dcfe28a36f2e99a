"""What was measured, as cells, and the JSON file it is kept in (docs/benchmarks.md describes its keys)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slidesparse_nb as ss

from .rules import check_file, parse, shown
from .selection import ALL, OURS

SCHEMA = 1

UNMEASURED = "not measured"
"""How a blank begins that was never tried; why not follows a colon."""


@dataclass(frozen=True)
class Cell:
    """One measurement, or why there is none.

    Attributes:
        contender, part, suite, type, pattern, m, load: see `selection.Group`; type is the key of a Kind.
        layer, n, k: the linear layer; "all" and None under sustained load.
        us: microseconds of one call, the median; None if there is no time.
        spread: (90th - 10th percentile) / median.
        repeats: timings that the median is of.
        calls: calls in a graph, each with operands of its own.
        rows: tokens that the contender was really given, where it takes no m; else None.
        sm_mhz, celsius, watts, mj: under sustained load: means over the timed span; millijoules of one pass over the layers.
        blank: why there is no time.
        wrong: whether that is a wrong result.
    """

    contender: str
    part: str
    suite: str
    layer: str
    n: int | None
    k: int | None
    type: str
    pattern: str | None
    m: int | None
    load: str
    us: float | None = None
    spread: float | None = None
    repeats: int | None = None
    calls: int | None = None
    rows: int | None = None
    sm_mhz: float | None = None
    celsius: float | None = None
    watts: float | None = None
    mj: float | None = None
    blank: str | None = None
    wrong: bool = False

    @property
    def untried(self) -> bool:
        """There was no time for it."""
        return (self.blank or "").startswith(UNMEASURED)

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured; two cells of a run never agree in it."""
        return (self.contender, self.part, self.suite, self.layer, self.type, self.pattern, self.m, self.load)


@dataclass
class Results:
    """A run.

    Attributes:
        started: UTC, ISO 8601.
        machine: device, driver, versions.
        selection: what was asked for.
        suites: name -> layers as (name, n, k).
        bandwidth: "copy" (read and written) and "read", bytes a second, as far as measured.
        ceilings: type -> load -> operations a second of the sparse instruction alone, where known.
        complete: whether everything that was asked for has a cell with a time or a reason of its own.
    """

    started: str
    machine: dict[str, Any]
    selection: dict[str, Any]
    suites: dict[str, list[tuple[str, int, int]]]
    bandwidth: dict[str, float] = field(default_factory=dict)
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False
    cells: dict[tuple[Any, ...], Cell] = field(default_factory=dict)

    def add(self, cell: Cell) -> None:
        self.cells[cell.key] = cell

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def wrong(self) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.wrong]

    def us(
        self, contender: str, part: str, suite: str, layer: str, type: str, pattern: str | None, m: int | None, load: str
    ) -> float | None:
        """A time in microseconds; layer "all": of a sustained pass, or else the sum of the layers' medians. None: not known."""
        if layer != ALL or load == "sustained":
            cell = self.cells.get((contender, part, suite, layer, type, pattern, m, load))
            return None if cell is None else cell.us
        times = [self.us(contender, part, suite, name, type, pattern, m, load) for name, _, _ in self.suites[suite]]
        return None if any(t is None for t in times) else sum(t for t in times if t is not None)

    def ours(self) -> list[tuple[str, str, str, str, int | None, str]]:
        """(part, suite, type, pattern, m, load) of everything of ours that has a cell, in the order measured."""
        found = {
            (c.part, c.suite, c.type, str(c.pattern), c.m, c.load): None for c in self.cells.values() if c.contender == OURS
        }
        return list(found)

    def peer_us(
        self, peer: str, part: str, suite: str, layer: str, type: str, pattern: str, m: int | None, load: str
    ) -> float | None:
        """The time of what stands against ours. A whole linear has two peers: "dense", its product alone, and "torch"."""
        if part == "linear" and peer != "torch":
            part = "gemm"
        return self.us(peer, part, suite, layer, type, pattern if peer == "cusparselt" else None, m, load)

    # ---- file ----------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cells"}
        cells = [
            {k: v for k, v in dataclasses.asdict(c).items() if v is not None and v is not False} for c in self.cells.values()
        ]
        return {"schema": SCHEMA, "slidesparse_nb": ss.__version__, **facts, "cells": cells}

    def save(self, path: Path) -> None:
        """Write the JSON file: whole, or as it was before."""
        head = self.as_dict()
        cells = head.pop("cells")
        text = json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "cells": [\n'
        text += ",\n".join("  " + json.dumps(cell, allow_nan=False) for cell in cells) + "\n ]\n}\n"
        write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside `path`, then put it there: whole, or as it was before."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, beside)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # the name itself may be too long
            beside.unlink(missing_ok=True)


def load(path: Path) -> Results:
    """Read a JSON file of results.

    Raises:
        FormatError: it is none, is of another schema, or breaks a rule of rules.py.
    """
    again = "; run slidesparse bench --json again"
    try:
        given = parse(path.read_bytes(), path)
        found = given.get("schema")
        if type(found) is not int or found != SCHEMA:
            raise ss.FormatError(f"{path}: schema {shown(found)} must be {SCHEMA}")
        check_file(given, path)
    except ss.FormatError as error:
        raise ss.FormatError(f"{error}{again}") from None
    facts = {f.name: given[f.name] for f in dataclasses.fields(Results) if f.name != "cells"}
    facts["suites"] = {name: [(a, n, k) for a, n, k in layers] for name, layers in given["suites"].items()}
    cells = [Cell(**{"n": None, "k": None, "pattern": None, "m": None, **cell}) for cell in given["cells"]]
    results = Results(**facts, cells={cell.key: cell for cell in cells})
    if len(results.cells) != len(cells):
        raise ss.FormatError(f"{path}: two of its cells measure the same{again}")
    return results
