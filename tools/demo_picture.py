"""The demonstration's picture: what every pattern costs in agreement with the dense model, next to what it buys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.transforms import Bbox, blended_transform_factory

if TYPE_CHECKING:
    from .demo import Outcome

INK, QUIET, KEPT, LOST = "#1f2937", "#6b7280", "#0f766e", "#c2410c"
LEFT = 0.03
COLOUR = {"6:8": KEPT, "2:4": LOST}


def draw(outcomes: Sequence[Outcome], setting: str, path: Path) -> None:
    """One column an outcome: a dot a sentence at its cosine to the dense embedding, a bar at the mean, the facts below.

    Args:
        outcomes: left to right; those of patterns 6:8 and 2:4 carry the title.
        setting: what was run, for the line below the title.
        path: the PNG to write, 1600 x 1000 pixels.
    """
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10.5, "text.color": INK}):
        figure = Figure(figsize=(8, 5), dpi=200)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.235, 0.33, 0.74, 0.46))
        lowest = min(float(outcome.cosine.min()) for outcome in outcomes)
        jitter = np.random.default_rng(0)
        for x, outcome in enumerate(outcomes):
            colour, mean = COLOUR.get(outcome.name, QUIET), float(outcome.cosine.mean())
            at = x + jitter.uniform(-0.17, 0.17, outcome.cosine.size)
            axes.scatter(at, outcome.cosine, s=13, color=colour, alpha=0.35, linewidths=0)
            axes.plot([x - 0.24, x + 0.24], [mean, mean], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.text(x + 0.29, mean, f"{mean:.2f}", color=colour, va="center", fontweight="bold", fontsize=11.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        axes.set_xlim(-0.5, len(outcomes) - 0.35)
        axes.set_ylim(lowest - 0.04, 1.02)
        axes.set_xticks([])
        axes.tick_params(axis="y", colors=QUIET, length=0)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)

        rows = [
            ("", [outcome.name for outcome in outcomes]),
            ("ideal speed-up", [f"{float(outcome.speedup):.2f}x" for outcome in outcomes]),
            ("bits per weight", [f"{outcome.bits_per_weight:.2f}" for outcome in outcomes]),
            ("nearest sentence kept", [f"{outcome.top1:.0%}" for outcome in outcomes]),
            ("three nearest kept", [f"{outcome.top3:.0%}" for outcome in outcomes]),
        ]
        below = blended_transform_factory(axes.transData, figure.transFigure)
        for line, (label, cells) in enumerate(rows):
            y = (0.275, 0.21, 0.157, 0.104, 0.051)[line]
            figure.text(LEFT, y, label, color=QUIET, va="center_baseline")
            for x, (outcome, cell) in enumerate(zip(outcomes, cells, strict=True)):
                weight = "bold" if line == 0 or outcome.name in COLOUR else "normal"
                axes.text(x, y, cell, color=COLOUR.get(outcome.name, INK), fontsize=10.5 if line else 12.5, fontweight=weight,
                          ha="center", va="center_baseline", transform=below)  # fmt: skip

        means = {outcome.name: float(outcome.cosine.mean()) for outcome in outcomes}
        words = [("Agreement with the dense model: ", INK)]
        words += [(f"{means['6:8']:.2f} at 6:8", KEPT), (", ", INK), (f"{means['2:4']:.2f} at 2:4", LOST)]
        style = {"fontsize": 15, "fontweight": "bold"}
        parts: list[Artist] = [TextArea(text, textprops={"color": colour, **style}) for text, colour in words]
        row = HPacker(children=parts, pad=0, sep=0)
        title = AnchoredOffsetbox("center left", child=row, pad=0, borderpad=0, frameon=False)
        title.set_bbox_to_anchor(Bbox.from_bounds(LEFT, 0.945, 0, 0), figure.transFigure)
        figure.add_artist(title)
        figure.text(LEFT, 0.885, setting, color=QUIET, va="center")
        axis = "cosine to the dense float32 embedding, one dot a sentence, a bar at the mean"
        figure.text(LEFT, 0.838, axis, color=QUIET, va="center")
        figure.savefig(path)
