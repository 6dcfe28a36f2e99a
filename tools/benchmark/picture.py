"""The picture of a run: a column a type; microseconds over m above, times as fast as dense below; a line a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

import slidesparse_nb as ss

from .cases import KINDS
from .results import Results, Row, rows

QUIET, COLOURS = "#6b7280", ("#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#a16207", "#475569")


def draw(results: Results, path: Path) -> None:
    """Write a PNG of the products in bursts of the first suite that has a dense baseline.

    Raises:
        FormatError: there is none.
    """
    found = [
        row for row in rows(results) if (row.cell.part, row.cell.load) == ("gemm", "burst") and row.over("dense") and row.cell.m
    ]
    if not found:
        raise ss.FormatError("--plot: the results hold no product with a dense baseline; measure --part gemm --peers dense")
    found = [row for row in found if row.cell.suite == found[0].cell.suite]
    types, patterns = (list(dict.fromkeys(getattr(row.cell, name) for row in found)) for name in ("type", "pattern"))
    figure = Figure(figsize=(max(6.0, 1 + 3.6 * len(types)), 7.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, len(types), squeeze=False, sharex="col", sharey="row")
    for (above, below), type in zip(panels.T, types, strict=True):
        of = [row for row in found if row.cell.type == type]
        above.set_title(KINDS[type].label, loc="left", fontweight="bold")
        _line(above, {row.cell.m: row.peers["dense"] for row in of}, QUIET, "dense cuBLASLt")
        below.axhline(1, color=QUIET)
        for pattern, colour in zip(patterns, COLOURS * len(patterns), strict=False):
            ours = [row for row in of if row.cell.pattern == pattern]
            known, ideal = ss.Pattern.of(pattern), float(ss.Pattern.of(pattern).speedup)
            _line(above, {row.cell.m: row.cell.us for row in ours}, colour, known.described, marker="o", markersize=2.5)
            _line(above, {row.cell.m: row.floor for row in ours if row.floor}, colour, "", linestyle="--", linewidth=0.8)
            _line(below, {row.cell.m: row.over("dense") for row in ours}, colour, "", marker="o", markersize=2.5)
            below.axhline(ideal, color=colour, linestyle="--", linewidth=0.8)
    _axes(panels, found)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(patterns) + 1, frameon=False)
    where = f"{results.machine.get('gpu', '')}, {results.started[:10]}, bursts; dashed: floor, ideal speed-up"
    figure.suptitle(f"{found[0].cell.suite}: products of one layer\n{where}")
    figure.savefig(path, format="png")


def _line(axes: Any, values: dict[Any, Any], colour: str, label: str, **look: Any) -> None:
    ms = sorted(values)
    axes.plot(ms, [values[m] for m in ms], color=colour, label=label or None, **look)


def _axes(panels: Any, found: list[Row]) -> None:
    tokens = sorted({row.cell.m for row in found if row.cell.m is not None})
    ticks = tokens if len(tokens) < 9 else [m for m in (4**i for i in range(11)) if tokens[0] <= m <= tokens[-1]]
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{m // 1024}k" if m >= 1024 and m % 1024 == 0 else str(m) for m in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", color="#e5e7eb")
        axes.spines[:].set_visible(False)
    for axes in panels[0]:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in panels[1]:
        axes.set(xlabel="m, tokens", ylim=(0, None))
    panels[0, 0].set_ylabel("microseconds")
    panels[1, 0].set_ylabel("times as fast as dense cuBLASLt")
