"""The picture of a run: speed-up over dense by m, a panel a type, a line a pattern, its ideal dashed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import slidesparse_nb as ss

from .figures import figures
from .results import Results
from .selection import KINDS

INK, QUIET = "#1f2937", "#6b7280"
COLOURS = ("#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#a16207", "#475569")
"""The first for the pattern measured first."""


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
    patterns = list(dict.fromkeys(p for panel in found.values() for p in panel))
    colours = {pattern: COLOURS[i % len(COLOURS)] for i, pattern in enumerate(patterns)}
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10.5, "text.color": INK}):
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
        figure.text(
            left, 0.94, f"{suite}: products of one layer, sparse over dense", fontsize=14, fontweight="bold", va="center"
        )
        where = (
            f"{results.machine.get('gpu', '')}, {results.started[:10]}; above the line at 1, sparse is faster; dashed: ideal"
        )
        figure.text(left, 0.875, where, color=QUIET, va="center", fontsize=9.5)
        at = left
        for pattern in patterns:
            text = figure.text(
                at,
                0.815,
                f"{ss.Pattern.of(pattern).described}, ideal {_ideal(pattern):.2f}x",
                color=colours[pattern],
                va="center",
                fontweight="bold",
            )
            at += text.get_window_extent().width / figure.bbox.width + 0.02
        figure.savefig(path, format="png")


def _panel(axes: Any, title: str, lines: Mapping[str, Mapping[int, float]], colours: Mapping[str, str]) -> None:
    tokens = sorted({m for line in lines.values() for m in line})
    axes.set_xscale("log", base=2)
    axes.axhline(1, color=INK, linewidth=1)
    for pattern, line in lines.items():
        ms = sorted(line)
        axes.plot(ms, [line[m] for m in ms], color=colours[pattern], linewidth=2.2, marker="o", markersize=4.5, zorder=3)
        axes.axhline(_ideal(pattern), color=colours[pattern], linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11.5)
    axes.set_xlabel("m, tokens")
    axes.set_xticks(tokens)
    axes.set_xticklabels([_short(m) for m in tokens], fontsize=8.5)
    axes.minorticks_off()
    axes.tick_params(colors=QUIET, length=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _ideal(pattern: str) -> float:
    return float(ss.Pattern.of(pattern).speedup)


def _short(m: int) -> str:
    """1, 64, 1k, 16k."""
    return f"{m // 1024}k" if m >= 1024 and m % 1024 == 0 else str(m)
