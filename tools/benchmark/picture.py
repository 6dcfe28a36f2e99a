"""The picture of a run: speed-up over dense by m, a panel a type, a line a pattern, its ideal dashed; or a curve (curve.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import slidesparse_nb as ss

from . import curve, style
from .figures import figures
from .results import Results
from .selection import KINDS, is_curve


def curves(results: Results, part: str = "gemm") -> tuple[str, dict[str, dict[str, dict[int, float]]]]:
    """The suite drawn, the first that has any; and type -> pattern -> m -> speed-up over dense in bursts."""
    suite, found = "", dict[str, dict[str, dict[int, float]]]()
    for figure in figures(results):
        ratio = figure.over(figure.torch if part == "linear" and figure.torch else figure.dense)
        if (figure.part, figure.load) != (part, "burst") or ratio is None or figure.m is None:
            continue
        suite = suite or figure.suite
        if figure.suite == suite:
            found.setdefault(figure.type, {}).setdefault(figure.pattern, {})[figure.m] = ratio
    return suite, found


def draw(results: Results, path: Path) -> None:
    """Write the PNG.

    Raises:
        FormatError: the results hold no product with a dense peer.
    """
    suite, found = curves(results)
    if not found:
        raise ss.FormatError("--plot: the results hold no product with a dense peer; measure --part gemm --peers dense")
    with mpl.rc_context(style.FONT):
        if is_curve({m for panel in found.values() for line in panel.values() for m in line}):
            figure = curve.times(results, suite)
        else:
            figure = _speedups(results, suite, found)
        figure.savefig(path, format="png")


def _speedups(results: Results, suite: str, found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    patterns = list(dict.fromkeys(p for panel in found.values() for p in panel))
    colours = style.colours(patterns)
    figure = Figure(figsize=(max(7.0, 0.9 + 3.1 * len(found)), 4.8), dpi=160)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.55 / figure.get_figwidth() + 0.02, right=0.985, top=0.70, bottom=0.13, wspace=0.08)
    highest = max(max(line.values()) for panel in found.values() for line in panel.values())
    ideal = max(_ideal(p) for p in patterns)
    for axes, (type, lines) in zip(panels, found.items(), strict=True):
        _panel(axes, KINDS[type].label, lines, colours)
        axes.set_ylim(0, max(highest, ideal) * 1.1)
    panels[0].set_ylabel("times as fast as dense cuBLASLt")
    left = panels[0].get_position().x0
    title = f"{suite}: products of one layer, sparse over dense"
    figure.text(left, 0.94, title, fontsize=14, fontweight="bold", va="center")
    where = f"{results.machine.get('gpu', '')}, {results.started[:10]}; above the line at 1, sparse is faster; dashed: ideal"
    figure.text(left, 0.875, where, color=style.QUIET, va="center", fontsize=9.5)
    labels = [(f"{style.described(p)}, ideal {_ideal(p):.2f}x", colours[p]) for p in patterns]
    style.words(figure, left, 0.815, labels)
    return figure


def _panel(axes: Any, title: str, lines: Mapping[str, Mapping[int, float]], colours: Mapping[str, str]) -> None:
    axes.axhline(1, color=style.INK, linewidth=1)
    for pattern, line in lines.items():
        ms = sorted(line)
        axes.plot(ms, [line[m] for m in ms], color=colours[pattern], linewidth=2.2, marker="o", markersize=4.5, zorder=3)
        axes.axhline(_ideal(pattern), color=colours[pattern], linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11.5)
    style.over_tokens(axes, sorted({m for line in lines.values() for m in line}))


def _ideal(pattern: str) -> float:
    return float(ss.Pattern.of(pattern).speedup)
