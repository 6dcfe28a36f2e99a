"""README's benchmark section, made from a results file and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import slidesparse_nb as ss

from .figures import Figure, figures
from .results import Cell, Results, write_whole
from .selection import KINDS
from .table import crossovers, machine_line, number

BEGIN = "<!-- benchmarks: written by `python tools/bench.py --readme docs/results/h100.json` -->"
END = "<!-- end of benchmarks -->"
PUBLISHED = "docs/results/h100.json"
PATTERN, PARTS = "6:8", ("gemm", "linear")


NAMES = {"dense": "dense", "cusparselt": "cuSPARSELt", "torch": "PyTorch"}
"""Of the peers, as the tables' heads have them."""


def section(results: Results | None) -> str:
    """The lines between the markers; without results, that there are none."""
    if results is None:
        return "No results yet: no full run has been published. `slidesparse bench` makes one on your GPU.\n"
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    kept = [f for f in figures(results) if f.pattern == PATTERN and f.part in PARTS and f.m is not None]
    for part, suite in dict.fromkeys((f.part, f.suite) for f in kept):
        here = [f for f in kept if (f.part, f.suite) == (part, suite)]
        layers = ", ".join(f"({n}, {k})" for _, n, k in results.suites[suite])
        if part == "gemm":
            yield f"Products of one layer of {suite} at {ss.Pattern.of(PATTERN).described}, (n, k) = {layers}:"
            yield "microseconds in all, and how many times as fast as dense cuBLASLt / as cuSPARSELt at the slid k."
        else:
            yield "Whole linears, 16-bit in and out, quantization included: microseconds, and how many times as fast as the"
            yield "dense product alone / as a dynamic 8-bit linear of PyTorch operations."
        yield ""
        yield from _table(here)
        yield ""
    yield f"![Speed-up over dense cuBLASLt by m]({PUBLISHED.removesuffix('.json')}.png)"
    yield ""
    yield f"{machine_line(results)}. Everything measured: [{PUBLISHED}]({PUBLISHED})."
    shown = [c for c in results.cells.values() if c.pattern in (None, PATTERN) and c.part in PARTS]
    yield from _padded(shown)
    if not results.complete:
        missing = any(c.untried for c in shown)
        yield f"The run reached its time budget; {'what is missing was not' if missing else 'everything shown was'} measured."
    sentences = [s for s in crossovers(results) if f" {PATTERN} " in s]
    if sentences:
        yield ""
        yield from (f"- {sentence}" for sentence in sentences)


def _padded(cells: list[Cell]) -> Iterator[str]:
    """Who was timed with more tokens than m, since it takes no fewer."""
    padded: dict[tuple[str, str, int], set[int]] = {}
    for c in cells:
        if c.rows and c.m and c.rows > c.m:
            padded.setdefault((c.contender, c.type, c.rows), set()).add(c.m)
    if padded:
        each = (
            f"{NAMES[contender]} {KINDS[type].label} {rows} at m = {', '.join(map(str, sorted(tokens)))}"
            for (contender, type, rows), tokens in padded.items()
        )
        yield f"Timed with more tokens than m, since they take no fewer: {'; '.join(each)}."


def _table(found: list[Figure]) -> Iterator[str]:
    tokens = sorted({f.m for f in found if f.m is not None})
    yield f"| m | {' | '.join(map(str, tokens))} |"
    yield "|---" * (len(tokens) + 1) + "|"
    for type, load in dict.fromkeys((f.type, f.load) for f in found):
        row = {f.m: f for f in found if (f.type, f.load) == (type, load)}
        cells = [_cell(row[m]) if m in row else "" for m in tokens]
        if any(cells):
            yield f"| {KINDS[type].label}{', sustained' if load == 'sustained' else ''} | {' | '.join(cells)} |"


def _cell(figure: Figure) -> str:
    if figure.us is None:
        return ""
    second = figure.torch if figure.part == "linear" else figure.cusparselt
    ratios = [f"{ratio:.2f}" if ratio is not None else "-" for ratio in (figure.over(figure.dense), figure.over(second))]
    return f"{number(figure.us)}: {ratios[0]} / {ratios[1]}"


def rewrite(readme: Path, results: Results | None) -> bool:
    """Put the section into a README; True if that changed it.

    Raises:
        FormatError: the markers are not there, in order and once.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ss.FormatError(f"{readme}: must hold the lines {BEGIN!r} and {END!r}, once and in this order")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n\n{section(results)}\n{END}{tail}"
    if new != text:
        write_whole(readme, new)
    return new != text
