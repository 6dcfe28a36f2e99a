"""The picture of a run. Products: a column a type, times over m above, times as fast as dense below; a line a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

import slidesparse_nb as ss

from .cases import KINDS
from .engines import ENGINES, weights
from .results import Results, Row, rows
from .served import label, over

QUIET, COLOURS = "#6b7280", ("#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#a16207", "#475569")


def draw(results: Results, path: Path) -> None:
    """Write a PNG of the whole models, if there are any, or else of the products in bursts of the first suite that has a
    dense baseline.

    Raises:
        FormatError: there is nothing to draw.
    """
    if results.served:
        _draw_served(results, path)
        return
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


def _draw_served(results: Results, path: Path) -> None:
    """How many times as fast as the engine's FP8, or else its BF16: bars by wall time, dots by the GPU's time."""
    found = [
        (cell, base)
        for cell in results.served
        if (base := next((type for type in ("fp8", "bf16") if over(results, cell, type)), ""))
    ]
    if not found:
        raise ss.FormatError("--plot: the results hold no model of ours beside one of the engine's own; measure again")
    panels = list(dict.fromkeys((cell.load, cell.suite, base) for cell, base in found))
    loads, names = (list(dict.fromkeys(of(cell) for cell, _ in found)) for of in (label, weights))
    figure, width = Figure(figsize=(9, 1 + 3 * len(panels)), dpi=120, layout="constrained"), 0.8 / len(names)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for i, name in enumerate(names):
            here = [cell for cell, base in found if (cell.load, cell.suite, base) == panel and weights(cell) == name]
            at = [loads.index(label(cell)) + (i + 0.5) * width - 0.4 for cell in here]
            wall, busy = ([over(results, cell, panel[2], time) or float("nan") for cell in here] for time in ("us", "gpu_us"))
            axes.bar(at, wall, 0.9 * width, color=COLOURS[i % len(COLOURS)], label=name)
            axes.plot(at, busy, "ok", markersize=3)
        axes.axhline(1, color=QUIET)
        axes.set_xticks(range(len(loads)), [load.replace(" ", "\n", 1) for load in loads])
        axes.set_title(f"{panel[1]}: times as fast as {ENGINES[panel[0]].title} {KINDS[panel[2]].label}", loc="left")
        axes.spines[:].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"{results.machine.get('gpu', '')}, {results.started[:10]}; dots: by the GPU's time alone")
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
