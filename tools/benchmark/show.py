"""What a reader sees of results: tables, sentences, README's section. All of it is made from `results.rows`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import slidesparse_nb as ss

from ..terminal import print_table, say
from . import served
from .cases import ALL, KINDS, OURS, is_curve
from .engines import ENGINES
from .peers import PEERS
from .results import Cell, Results, Row, rows

CURVE_ROWS = 24
"""Number of m of a curve that are shown unless all are asked for."""

CLIFF = 1.1
"""An m that takes over CLIFF times as long as a larger one is named: the kernel that serves more tokens could serve it."""

SHORT_RUN = 3
"""Neighbouring m that are named one by one; of more, only the first and the last are."""

BASELINE = {
    "dense": "dense cuBLASLt", "PyTorch": "PyTorch's dynamic linear", "cuSPARSELt": "cuSPARSELt at the expanded k",
    "vLLM": "vLLM's linear",
}  # fmt: skip
"""Title of a baseline -> its name in sentences, where that is longer."""

WHAT = {"gemm": "product", "linear": "whole linear"}


def show(results: Results, *, each: bool) -> None:
    """Print everything; with `each` every layer by itself, and every m."""
    say(machine_line(results))
    for suite, linears in results.suites.items():
        if len(linears) > 1:
            say(f"{suite}: {', '.join(f'{x.name} ({x.n}, {x.k})' for x in linears)}")
    for title, columns, lines in (*tables(results, each=each), *served.tables(results)):
        say("")
        say(title)
        print_table(columns, lines)
    for heading, sentences in (("", [*crossovers(results), *cliffs(results)]), ("notes", results.notes), ("", blanks(results))):
        for i, sentence in enumerate(sentences):
            if not i:
                say(heading)
            say(sentence)
    say("")
    say(f"took {results.seconds:.0f} s{'; not everything was measured' * (not results.complete)}; see docs/benchmarks.md")


_VERSIONS = {
    "driver": "driver", "cuda_runtime": "CUDA", "torch": "PyTorch", "cupy": "CuPy", "vllm": "vLLM",
    "transformers": "transformers",
}  # fmt: skip


def machine_line(results: Results) -> str:
    """The GPU, its driver, the versions, the measured bandwidth."""
    machine = results.machine
    words = [str(machine.get("gpu", "unknown GPU"))]
    words += [f"{machine['power_limit_w']} W"] if machine.get("power_limit_w") else []
    for key, name in _VERSIONS.items():
        words += [f"{name} {machine[key]}"] if machine.get(key) else []
    words += [f"{name} {rate / 1e12:.2f} TB/s" for name, rate in results.bandwidth.items()]
    return ", ".join([*words, results.started[:10]])


def number(value: float | None) -> str:
    """Three digits or more: 4.12, 41.2, 412, 4120."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


# ---- tables ----------------------------------------------------------------------------------------------------------

Column = tuple[str, Callable[[Row], str]]


def tables(results: Results, *, each: bool = False) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and lines: one table for each part and load. What is the same in every line is in the title.

    Without `each`, some of many m are left out, and what was never tried has no line: `blanks` counts it.
    """
    shown = [row for row in rows(results, each=each) if each or row.tried]
    for part, load in dict.fromkeys((row.cell.part, row.cell.load) for row in shown):
        found = [row for row in shown if (row.cell.part, row.cell.load) == (part, load)]
        curves = list(dict.fromkeys(row.cell.key[2:6] for row in found))  # suite, layer, type, pattern
        found.sort(key=lambda row: (curves.index(row.cell.key[2:6]), row.cell.m or 0))
        tokens, title = sorted({row.cell.m for row in found if row.cell.m is not None}), [part, load]
        if is_curve(tokens) and not each and len(tokens) > CURVE_ROWS:
            kept = {tokens[round(i * (len(tokens) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)}
            title.append(f"{len(kept)} of {len(tokens)} m, -v shows all")
            found = [row for row in found if row.cell.m in kept or row.cell.layer == "square"]
        columns = []
        for name, text in _columns(results, found):
            texts = {text(row) for row in found}
            if name not in ("type", "pattern", "suite", "layer", "m"):
                columns += [(name, text)] if texts != {""} or name == "us" else []
            elif len(texts) > 1:
                columns.append((name, text))
            else:
                title += [f"m = {text(found[0])}" if name == "m" and text(found[0]) else text(found[0])]
        yield (
            ", ".join(filter(None, title)),
            [name for name, _ in columns],
            [[text(row) for _, text in columns] for row in found],
        )


def _columns(results: Results, found: Sequence[Row]) -> list[Column]:
    """Every column that could say something of these rows; peers in the order in which they are listed."""

    def layer(row: Row) -> str:
        if row.cell.layer == ALL:
            return "the layers in turn" if row.cell.load == "sustained" else "sum of the layers"
        return row.cell.layer if len(results.suites[row.cell.suite]) > 1 else ""

    def peer(title: str) -> list[Column]:
        return [
            (f"{title} us", lambda row: number(row.peers.get(title))),
            (f"x {title}", lambda row: _ratio(row.over(title))),
        ]

    def sensor(name: str) -> Callable[[Row], str]:
        return lambda row: number(getattr(row.cell, name))

    return [
        ("suite", lambda row: row.cell.suite), ("layer", layer), ("type", lambda row: KINDS[row.cell.type].label),
        ("pattern", lambda row: row.cell.pattern), ("m", lambda row: "" if row.cell.m is None else str(row.cell.m)),
        ("us", lambda row: (row.cell.blank or "").partition(":")[0] if row.cell.us is None else number(row.cell.us)),
        ("+-", lambda row: _percent(row.cell.spread)),
        *(column for title in dict.fromkeys(title for row in found for title in row.peers) for column in peer(title)),
        ("TFLOP/s", lambda row: number(row.flops / row.cell.us * 1e-6 if row.cell.us and row.flops else None)),
        ("GB/s", lambda row: number(row.bytes / row.cell.us * 1e-3 if row.cell.us else None)),
        ("% of floor", lambda row: _percent(row.floor / row.cell.us if row.cell.us and row.floor is not None else None)),
        ("SM MHz", sensor("sm_mhz")), ("W", sensor("watts")), ("C", sensor("celsius")), ("mJ", sensor("mj")),
    ]  # fmt: skip


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


# ---- sentences -------------------------------------------------------------------------------------------------------


def spans(picked: Collection[int], measured: Sequence[int], text: Callable[[list[int]], str] = lambda run: "") -> str:
    """The m of `picked`, runs of more than SHORT_RUN neighbours as 1 to 64; after each m or run what `text` says of it."""
    parts = []
    for chosen, group in itertools.groupby(measured, lambda m: m in picked):
        run = list(group) if chosen else []
        for few in [run] if len(run) > SHORT_RUN else [[m] for m in run]:
            parts.append((f"{few[0]} to {few[-1]}" if len(few) > 1 else str(few[0])) + text(few))
    return ", ".join(parts)


def _subject(cell: Cell) -> str:
    suite = "m = n = k" if cell.layer == "square" else cell.suite
    return f"{KINDS[cell.type].label} {cell.pattern} {WHAT[cell.part]}, {suite}"


def crossovers(results: Results) -> Iterator[str]:
    """In bursts, for each part, suite, type and pattern: at which m ours is faster. One sentence each.

    A product is compared with the dense one; a whole linear of 8 bits with vLLM's or else PyTorch's, of 16 bits with the
    dense product.
    """
    grouped: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows(results):
        if row.cell.part in WHAT and row.cell.load == "burst" and row.cell.m is not None:
            linears = ("vLLM", "PyTorch") if row.cell.part == "linear" and KINDS[row.cell.type].quantized else ("dense",)
            title = next((title for title in linears if title in row.peers), linears[-1])
            if (ratio := row.over(title)) is not None:
                grouped.setdefault((_subject(row.cell), BASELINE[title]), {})[row.cell.m] = ratio
    for (subject, baseline), ratios in grouped.items():
        yield f"{subject}, in bursts: {compared(baseline, ratios)}."


def compared(baseline: str, ratios: Mapping[int, float]) -> str:
    """faster than dense at m = 1 to 64; slower at m = 128 (0.97x)."""
    measured = sorted(ratios)
    slower = {m for m in measured if ratios[m] <= 1}

    def how(run: list[int]) -> str:
        texts = dict.fromkeys(f"{x:.2f}x" if x == 1 or x < 0.995 else f"{x:.3f}x" for x in sorted(ratios[m] for m in run))
        return f" ({' to '.join([*texts][:: max(1, len(texts) - 1)])})"

    if not slower:
        return f"faster than {baseline} at every m measured, {spans(measured, measured)}"
    where = f"m = {spans(slower, measured, how)}"
    if len(slower) == len(measured):
        return f"slower than {baseline} at every m measured: {where}"
    return f"faster than {baseline} at m = {spans(set(measured) - slower, measured)}; slower at {where}"


def slow(times: Mapping[int, float]) -> dict[int, tuple[float, int]]:
    """Every m that takes over CLIFF times as long as a larger one -> how many times as long as the fastest larger m; that m."""
    found = {}
    for m in times:
        best = min((larger for larger in times if larger >= m), key=lambda larger: times[larger])
        if times[m] > CLIFF * times[best]:
            found[m] = (times[m] / times[best], best)
    return found


def cliffs(results: Results) -> Iterator[str]:
    """In bursts, each layer whose time falls with m somewhere by more than CLIFF."""
    grouped: dict[str, dict[int, float]] = {}
    for cell in (row.cell for row in rows(results, each=True)):
        if cell.part in WHAT and cell.load == "burst" and cell.layer not in (ALL, "square") and cell.m is not None and cell.us:
            grouped.setdefault(f"{_subject(cell)} {cell.layer}", {})[cell.m] = cell.us
    for subject, times in grouped.items():
        found = slow(times)

        def how(run: list[int], found: Mapping[int, tuple[float, int]] = found) -> str:
            ratio, larger = max(found[m] for m in run)
            return f" ({'up to ' * (len(run) > 1)}{ratio:.2f}x m = {larger})"

        if found:
            yield f"{subject}: over {CLIFF} times as long as with more tokens at m = {spans(found, sorted(times), how)}."


def blanks(results: Results) -> Iterator[str]:
    """Why cells are blank, each reason once."""
    seen: dict[tuple[str, str], int] = {}
    for cell in results.cells.values():
        if cell.blank:
            seen[cell.provider, cell.blank] = seen.get((cell.provider, cell.blank), 0) + 1
    titles = {OURS: "this library", **{name: engine.title for name, engine in ENGINES.items()}}
    for (provider, reason), count in seen.items():
        what = titles.get(provider) or PEERS[provider].words.partition(",")[0]
        yield f"{count} blank of {provider} ({what}): {reason}"


# ---- README ----------------------------------------------------------------------------------------------------------

PUBLISHED = ("docs/results/h200.json", "docs/results/engines.json")
"""Of linear layers, and of whole models: README has a section of each."""

BEGIN, END = "<!-- benchmarks: written by `python tools/bench.py --readme {}` -->", "<!-- end of benchmarks -->"
PATTERN = "6:8"


def published(results: Results) -> str:
    """The file that README names as the source of such results."""
    return PUBLISHED[bool(results.served)]


def section(results: Results) -> str:
    """The lines between the markers: a table a question."""
    return "\n".join(_section(results)) + "\n"


def _section(results: Results) -> Iterator[str]:
    for question, columns, lines in served.tables(results):
        yield f"**{question}**:\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
        yield from (f"| {' | '.join(line)} |" for line in lines)
        yield ""
    kept = [row for row in rows(results) if row.cell.pattern == PATTERN and row.cell.part in WHAT and row.cell.m is not None]
    for part, suite in dict.fromkeys((row.cell.part, row.cell.suite) for row in kept):
        here = [row for row in kept if (row.cell.part, row.cell.suite) == (part, suite)]
        if part == "gemm":
            layers = ", ".join(f"({x.n}, {x.k})" for x in results.suites[suite])
            what = f"The products of one layer of {suite} at {ss.Pattern.of(PATTERN).described}, (n, k) = {layers}"
        else:
            what = "The same as whole linears: 16-bit x in, 16-bit y out, quantization included"
        yield from _table(f"{what}. **Microseconds**, by m:", here, lambda row: number(row.cell.us))
        for title in dict.fromkeys(title for row in here for title in row.peers):
            name = BASELINE.get(title, title) + " (the product alone)" * (part == "linear" and title == "dense")
            yield from _table(f"**Times as fast as {name}**:", here, partial(_over, title))
    what = "Speed-up in an engine" if results.served else "Microseconds and speed-up over dense cuBLASLt by m"
    path = published(results)
    yield f"![{what}]({path.removesuffix('.json')}.png)\n"
    yield f"{machine_line(results)}. Everything measured: [{path}]({path})."
    padded: dict[str, set[int]] = {}
    for cell in results.cells.values():
        if cell.rows and cell.m and cell.pattern in (None, PATTERN) and cell.part in WHAT:
            padded.setdefault(f"{PEERS[cell.provider].title} {KINDS[cell.type].label} {cell.rows}", set()).add(cell.m)
    if padded:
        each = (f"{what} at m = {', '.join(map(str, sorted(tokens)))}" for what, tokens in padded.items())
        yield f"Timed with more tokens than m, since they take no fewer: {'; '.join(each)}."
    if not results.complete:
        yield "The run reached its time budget; everything shown was measured."
    yield ""
    yield from (f"- {sentence}" for sentence in crossovers(results) if f" {PATTERN} " in sentence)


def _over(title: str, row: Row) -> str:
    return _ratio(row.over(title)).removesuffix("x")


def _table(head: str, found: Sequence[Row], text: Callable[[Row], str]) -> Iterator[str]:
    tokens = sorted({row.cell.m for row in found if row.cell.m is not None})
    yield f"{head}\n\n| m | {' | '.join(map(str, tokens))} |\n{'|---' * (len(tokens) + 1)}|"
    for type, load in dict.fromkeys((row.cell.type, row.cell.load) for row in found):
        texts = {row.cell.m: text(row) for row in found if (row.cell.type, row.cell.load) == (type, load)}
        if any(texts.values()):
            label = KINDS[type].label + ", sustained" * (load == "sustained")
            yield f"| {label} | {' | '.join(texts.get(m, '') for m in tokens)} |"
    yield ""
