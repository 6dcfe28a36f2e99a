"""What the pictures share: colours, and how axes look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import slidesparse_nb as ss

INK, QUIET, GRID, WARNING = "#1f2937", "#6b7280", "#e5e7eb", "#dc2626"
COLOURS = ("#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#a16207", "#475569")
"""The first for the pattern measured first."""

FONT: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10.5, "text.color": INK}


def colours(patterns: Sequence[str]) -> dict[str, str]:
    """A colour for each pattern."""
    return {pattern: COLOURS[i % len(COLOURS)] for i, pattern in enumerate(patterns)}


def described(pattern: str) -> str:
    """6:8 (2 zeros in 8)."""
    return ss.Pattern.of(pattern).described


def short(m: int) -> str:
    """1, 64, 1k, 16k."""
    return f"{m // 1024}k" if m >= 1024 and m % 1024 == 0 else str(m)


def words(figure: Any, x: float, y: float, parts: Sequence[tuple[str, str]]) -> None:
    """Write (text, colour) after (text, colour) in bold, from x on at height y: shares of a matplotlib figure."""
    for text, colour in parts:
        written = figure.text(x, y, text, color=colour, va="center", fontweight="bold")
        x += written.get_window_extent().width / figure.bbox.width + 0.02


def over_tokens(axes: Any, ticks: Sequence[int]) -> None:
    """m along x, doubling; a quiet grid, no frame."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("m, tokens")
    axes.set_xticks(ticks)
    axes.set_xticklabels([short(m) for m in ticks], fontsize=8.5)
    axes.minorticks_off()
    axes.tick_params(colors=QUIET, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
