"""Time over many m: a row a type, a panel for the sum of a suite's layers and for each of them; logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from . import style
from .figures import Figure, figures, layer_names
from .results import Results
from .selection import ALL, KINDS
from .summary import CLIFF, cliffs

WIDTH, HEIGHT, HEAD = 3.3, 2.7, 1.4
"""Inches of a panel, and of what is written above them all."""


def times(results: Results, suite: str) -> Picture:
    """Products of a suite in bursts: ours, dense ones, the floor; cliffs ringed."""
    found = [
        figure for figure in figures(results, each=True)
        if (figure.part, figure.suite, figure.load) == ("gemm", suite, "burst") and figure.m is not None
    ]  # fmt: skip
    types = list(dict.fromkeys(figure.type for figure in found))
    layers = sorted(dict.fromkeys(figure.layer for figure in found), key=lambda layer: layer != ALL)  # the sum first
    colours = style.colours(list(dict.fromkeys(figure.pattern for figure in found)))
    wide, high = max(7.0, WIDTH * len(layers)), HEAD + HEIGHT * len(types)
    picture = Picture(figsize=(wide, high), dpi=120)
    FigureCanvasAgg(picture)
    panels = picture.subplots(len(types), len(layers), squeeze=False)
    picture.subplots_adjust(
        left=0.65 / wide, right=1 - 0.12 / wide, top=1 - (HEAD + 0.1) / high, bottom=0.5 / high, wspace=0.2, hspace=0.45
    )
    shapes = layer_names(results, suite) | {ALL: "sum of the layers"}
    for row, type in zip(panels, types, strict=True):
        for axes, layer in zip(row, layers, strict=True):
            _panel(axes, [f for f in found if (f.type, f.layer) == (type, layer)], colours)
            axes.set_title(f"{KINDS[type].label}: {shapes[layer]}", loc="left", fontweight="bold", fontsize=10.5)
        row[0].set_ylabel("microseconds")
    left = 0.65 / wide
    title = f"{suite}: products of one layer, time over m"
    picture.text(left, 1 - 0.3 / high, title, fontsize=14, fontweight="bold", va="center")
    where = f"{results.machine.get('gpu', '')}, {results.started[:10]}, in bursts; dashed: floor; ringed: over {CLIFF} times as"
    picture.text(left, 1 - 0.6 / high, f"{where} long as with more tokens", color=style.QUIET, va="center", fontsize=9.5)
    labels = [(style.described(pattern), colour) for pattern, colour in colours.items()]
    style.words(picture, left, 1 - 0.88 / high, [*labels, ("dense cuBLASLt", style.QUIET)])
    return picture


def _panel(axes: Any, found: Sequence[Figure], colours: dict[str, str]) -> None:
    """One type and layer: a line a pattern, each with its floor, and the dense one."""
    dense = {f.m: f.dense for f in found if f.m is not None and f.dense is not None}
    _line(axes, dense, color=style.QUIET, linewidth=1.4)
    for pattern, colour in colours.items():
        of = [f for f in found if f.pattern == pattern and f.m is not None]
        ours = {f.m: f.us for f in of if f.m is not None and f.us is not None}
        _line(axes, {f.m: f.floor for f in of if f.floor is not None}, color=colour, linewidth=1, linestyle=(0, (4, 3)))
        _line(axes, ours, color=colour, linewidth=1.8, marker="o", markersize=2.2, zorder=3)
        marked = {cliff.m: ours[cliff.m] for cliff in cliffs(ours)}
        _line(axes, marked, color=style.WARNING, linestyle="", marker="o", markersize=8, fillstyle="none", zorder=4)
    most = max(f.m for f in found if f.m is not None)
    style.over_tokens(axes, [4**i for i in range(most.bit_length()) if 4**i <= most])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8.5)


def _line(axes: Any, values: dict[Any, Any], **look: Any) -> None:
    ms = sorted(values)
    axes.plot(ms, [values[m] for m in ms], **look)
