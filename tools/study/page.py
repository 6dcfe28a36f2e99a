"""Tables in Markdown, and a picture, of what a study measured; nothing that was not measured appears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import slidesparse_nb as ss

START, END = "<!-- accuracy: written by `python tools/accuracy.py page` -->", "<!-- end of accuracy -->"
NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "joint": "SparseGPT, joint"}
COLOURS = {"magnitude": "#6b7280", "wanda": "#c2410c", "sparsegpt": "#0f766e", "joint": "#1d4ed8"}
DENSE = {"dense": "dense BF16", "dense INT8_W8A8": "dense INT8, simulated", "dense FP8_DYNAMIC": "dense FP8, simulated"}
MIXED = "mixed"
LARGEST = 8
"""Times the dense perplexity, at the top of the picture."""

Points = Mapping[str, Mapping[str, Any]]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def patterns_of(points: Points) -> list[str]:
    """The patterns of the points, the fastest first."""
    found = {point["pattern"] for point in points.values() if ":" in point.get("pattern", "")}
    return sorted(found, key=lambda each: -ss.Pattern.of(each).speedup)


def page(found: Mapping[str, Any], picture: str | None = None) -> str:
    """Everything that was measured, as Markdown."""
    points: Points = found.get("points", {})
    parts = [*_setup(found)]
    if picture is not None:
        parts.append(f"![Perplexity over ideal speed-up]({picture})")
    for text, facts in found.get("setup", {}).get("texts", {}).items():
        rows = _rows(
            points, lambda point, text=text: f"{point['texts'][text]['perplexity']:.2f}" if text in point["texts"] else ""
        )
        if rows:
            dense = {name: point["texts"][text] for name, point in points.items() if name.split()[0] == "dense"}
            told = ", ".join(f"{DENSE.get(name, name)} {each['perplexity']:.2f}" for name, each in dense.items())
            tokens = next(iter(points.values()))["texts"][text]["predicted"]
            parts.append(f"**Perplexity, {facts['title']}**, {tokens:,} predicted tokens ({told}):")
            parts.append(table(["method", "scheme", *patterns_of(points)], rows))
    parts += _against(points)
    parts += _mixed(points, found)
    parts += _sensitivity(found)
    parts += _encoder(found)
    parts += _times(found)
    return "\n\n".join(parts) + "\n"


def _setup(found: Mapping[str, Any]) -> Iterator[str]:
    setup = found.get("setup", {})
    if "machine" in setup:
        calibration = setup["calibration"]
        yield (
            f"{setup['model']}, {setup['machine']}. Windows of {setup['window']} tokens that do not overlap; calibrated on"
            f" {calibration['tokens']:,} tokens of {calibration['title']} in windows of {calibration['window']}."
        )


def _rows(points: Points, cell: Callable[..., str]) -> list[list[str]]:
    """A row a method and scheme, a column a pattern; rows without a figure are left out."""
    rows = []
    for method, name in NAMES.items():
        schemes = dict.fromkeys(p["scheme"] for p in points.values() if p.get("method") == method and p.get("pattern") != MIXED)
        for scheme in sorted(schemes):
            named = (points.get(f"{pattern} {method} {scheme}") for pattern in patterns_of(points))
            cells = [cell(point) if point else "" for point in named]
            rows += [[name, scheme, *cells]] if any(cells) else []
    return rows


def _against(points: Points) -> Iterator[str]:
    """Divergence and agreement of the text for which they were measured."""
    text = next((name for p in points.values() for name, each in p["texts"].items() if "divergence" in each), None)
    if text is not None:
        cells = _rows(points, lambda p: f"{p['texts'][text]['divergence']:.3f}, {p['texts'][text]['agreement']:.0%}")
        yield "**KL divergence from the dense model** in nats a token, and how often the first choice is the same (first text):"
        yield table(["method", "scheme", *patterns_of(points)], cells)


def _mixed(points: Points, found: Mapping[str, Any]) -> Iterator[str]:
    mixed = [point for point in points.values() if point.get("pattern") == MIXED]
    if mixed:
        titles = {name: facts["title"] for name, facts in found["setup"]["texts"].items()}
        yield (
            "**A pattern for each layer**, chosen by the measured costs below for an ideal speed-up; the packed format has one"
            " pattern a file so far, so that these points are of layers packed one by one:"
        )
        rows = []
        for point in sorted(mixed, key=lambda each: (each["ideal_speedup"], each["scheme"])):
            used = list(point["patterns"].values())
            counts = ", ".join(f"{used.count(each)} {each}" for each in sorted(set(used)))
            figures = [f"{point['texts'][text]['perplexity']:.2f}" if text in point["texts"] else "" for text in titles]
            rows.append([f"{point['ideal_speedup']:.2f}x", NAMES[point["method"]], point["scheme"], counts, *figures])
        yield table(["ideal speed-up", "method", "scheme", "parts", *titles.values()], rows)


def _sensitivity(found: Mapping[str, Any]) -> Iterator[str]:
    """What whole kinds and blocks cost alone."""
    costs = found.get("sensitivity", {})
    groups: dict[str, dict[str, float]] = {}
    for name, cost in costs.items():
        part, _, pattern = name.rpartition(" ")
        if part.startswith(("kind ", "block ")):
            groups.setdefault(part, {})[pattern] = cost
    if not groups:
        return
    patterns = list(dict.fromkeys(pattern for each in groups.values() for pattern in each))
    shown = sorted(groups, key=lambda part: (part.startswith("block"), -max(groups[part].values())))
    kinds = [part for part in shown if part.startswith("kind")]
    blocks = [part for part in shown if part.startswith("block")]
    tokens = found["setup"].get("sensitivity_tokens", 0)
    yield (
        f"**What a part costs alone**, pruned by Wanda: KL divergence in nats a token on {tokens:,} tokens of the calibration"
        f" text; all kinds, and of {len(blocks)} blocks the four that cost most and the two that cost least:"
    )
    rows = [[part, *(f"{groups[part][each]:.4f}" if each in groups[part] else "" for each in patterns)] for part in kinds]
    chosen = blocks if len(blocks) <= 6 else [*blocks[:4], *blocks[-2:]]
    rows += [[part, *(f"{groups[part][each]:.4f}" if each in groups[part] else "" for each in patterns)] for part in chosen]
    yield table(["pruned alone", *patterns], rows)


def _encoder(found: Mapping[str, Any]) -> Iterator[str]:
    points: Points = found.get("encoder", {})
    if points:
        facts = found["setup"]["encoder"]
        yield (
            "**all-MiniLM-L6-v2**, a sentence encoder: mean cosine with the dense float32 model's embeddings of"
            f" {facts['passages']} passages of {facts['length']} tokens of Brown's odd documents, and how many keep their"
            f" nearest neighbour; statistics of the dense model on {facts['calibration_tokens']:,} tokens of even ones:"
        )
        rows = _rows(points, lambda point: f"{point['cosine']:.3f}, {point['nearest']:.0%}")
        yield table(["method", "scheme", *patterns_of(points)], rows)


def _times(found: Mapping[str, Any]) -> Iterator[str]:
    times = found.get("pruning", {})
    rows = []
    for method in ("wanda", "sparsegpt", "joint"):
        of = [each for name, each in times.items() if method in name.split() and not name.startswith(MIXED)]
        if of:
            seconds, peak = [each["seconds"] for each in of], max(each.get("bytes", 0) for each in of)
            memory = f"{peak / 1e9:.1f} GB" if peak else ""
            rows.append([NAMES[method], str(len(of)), f"{min(seconds):.1f} to {max(seconds):.1f}", memory])
    if rows:
        yield "**Seconds to prune the model once**, where processes may have shared the device, and PyTorch's memory at most:"
        yield table(["method", "runs", "seconds", "memory"], rows)


def draw(found: Mapping[str, Any], path: Path, scheme: str = "INT8_W8A8") -> None:
    """Perplexity over ideal speed-up, a line a method, a panel a text; mixed patterns are stars. Raises FormatError."""
    points: Points = found.get("points", {})
    texts = found.get("setup", {}).get("texts", {})
    if "dense" not in points or not patterns_of(points):
        raise ss.FormatError("--picture: nothing but the dense model was measured; run the table first")
    figure = Figure(figsize=(1 + 4.6 * len(texts), 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for panel, (text, facts) in zip(panels, texts.items(), strict=True):
        dense = points["dense"]["texts"][text]["perplexity"]
        panel.axhline(dense, color="black", linewidth=0.8, label="dense bfloat16")
        for method, name in NAMES.items():
            measured = [(p, points.get(f"{p} {method} {scheme}")) for p in reversed(patterns_of(points))]
            line = [(float(ss.Pattern.of(p).speedup), point["texts"][text]["perplexity"]) for p, point in measured if point]
            if line:
                panel.plot(*zip(*line, strict=True), color=COLOURS[method], marker="o", markersize=4, label=name)
        stars = [p for p in points.values() if p.get("pattern") == MIXED and p["scheme"] == scheme]
        if stars:
            xy = [(p["ideal_speedup"], p["texts"][text]["perplexity"]) for p in stars]
            panel.plot(*zip(*xy, strict=True), "*", color="black", markersize=10, label="a pattern for each layer")
        panel.set_yscale("log")
        panel.set_ylim(dense * 0.95, dense * LARGEST)
        marks = [dense * each for each in (1, 1.1, 1.25, 1.5, 2, 3, 5)]
        panel.set_yticks(marks, [f"{each:.0f}" for each in marks], minor=False)
        panel.set_yticks([], minor=True)
        ticks = {float(ss.Pattern.of(p).speedup): p for p in patterns_of(points)}
        panel.set_xticks(list(ticks), [f"{p}\n{speedup:.2f}x" for speedup, p in ticks.items()])
        panel.set_title(facts["title"], loc="left", fontweight="bold")
        panel.set_ylabel("perplexity")
    panels[-1].legend(frameon=False)
    figure.suptitle(f"{found['setup']['model']}, {scheme}: perplexity over ideal speed-up; above {LARGEST}x dense is cut off")
    figure.savefig(path, format="png")
