"""The table in the terminal, and the sentences below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from . import summary
from .figures import Figure, figures, layer_names
from .results import Results
from .selection import ALL, KINDS, PEERS, is_curve

Rows = list[tuple[str, ...]]
Column = tuple[str, Callable[[Figure], str]]

CURVE_ROWS = 24
"""Of a curve, rows that are shown unless all are asked for."""

CURVE_COLUMNS = ("us", "+-", "x dense", "x cuSPARSELt", "x PyTorch", "% of floor")
"""What a curve's table says of each type and pattern, side by side."""


def machine_line(results: Results) -> str:
    """The GPU, its driver, the versions, the measured bandwidth."""
    machine = results.machine
    words = [str(machine.get("gpu", "unknown GPU"))]
    words += [f"{machine['power_limit_w']:.0f} W"] if machine.get("power_limit_w") else []
    for key, name in (("driver", "driver"), ("cuda_runtime", "CUDA"), ("torch", "PyTorch"), ("cupy", "CuPy")):
        words += [f"{name} {machine[key]}"] if machine.get(key) else []
    words += [f"{name} {rate / 1e12:.2f} TB/s" for name, rate in results.bandwidth.items()]
    return ", ".join([*words, results.started[:10]])


def sections(results: Results, *, each: bool = False) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
    """Tables, as title, columns and rows: one for each part, suite and load; suites of one layer share theirs.

    Where there are many m, a row has one m, and the types and patterns side by side; each layer, and each suite of one, has a
    table of its own. Without `each` some of many m are left out, and what was never tried has no row: `blanks` counts it.
    """
    every = [figure for figure in figures(results, each=each) if each or figure.tried]
    tokens: dict[tuple[str, str, str], set[int]] = {}
    for figure in every:
        tokens.setdefault((figure.part, figure.suite, figure.load), set()).add(figure.m or 0)
    grouped: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in every:
        own = len(results.suites[figure.suite]) > 1 or is_curve(tokens[figure.part, figure.suite, figure.load])
        grouped.setdefault((figure.part, figure.suite if own else "", figure.load), []).append(figure)
    for (part, suite, load), found in grouped.items():
        if suite and is_curve(tokens[part, suite, load]):
            for layer in dict.fromkeys(figure.layer for figure in found):
                yield _curve(results, [figure for figure in found if figure.layer == layer], every_m=each)
            continue
        columns = _columns(found, part, load, each and bool(suite))
        if suite:
            title = f"{suite}, {part}, {load}: {_summed(results, suite, load, each)}"
        else:
            title = f"{part}, {load}"
            columns.insert(0, ("n x k" if "shape" in _layers(results, found) else "m x n x k", lambda f: f.suite))
        yield title, tuple(name for name, _ in columns), [tuple(cell(figure) for _, cell in columns) for figure in found]


def _curve(results: Results, found: Sequence[Figure], *, every_m: bool) -> tuple[str, tuple[str, ...], Rows]:
    """The table of one layer, or of the sum of all, over many m."""
    part, suite, load, layer = found[0].part, found[0].suite, found[0].load, found[0].layer
    tokens = sorted({figure.m for figure in found if figure.m is not None})
    shown = tokens
    if not every_m and len(tokens) > CURVE_ROWS:
        shown = [tokens[round(i * (len(tokens) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]
    heads, rows = ["m"], [[str(m)] for m in shown]
    for type, pattern in dict.fromkeys((figure.type, figure.pattern) for figure in found):
        of = {figure.m: figure for figure in found if (figure.type, figure.pattern) == (type, pattern)}
        for name, cell in _columns(list(of.values()), part, load, False):
            if name in CURVE_COLUMNS:
                heads.append(f"{KINDS[type].label} {pattern} us" if name == "us" else name)
                for row, m in zip(rows, shown, strict=True):
                    row.append(cell(of[m]) if m in of else "")
    shapes = layer_names(results, suite)
    what = _summed(results, suite, load, False) if layer == ALL else suite if len(shapes) == 1 else shapes[layer]
    title = f"{suite}, {part}, {load}: {what}" if len(shapes) > 1 else f"{part}, {load}: {suite}"
    if len(shown) < len(tokens):
        title += f"; {len(shown)} of {len(tokens)} m, -v shows all"
    return title, tuple(heads), [tuple(row) for row in rows]


def _summed(results: Results, suite: str, load: str, each: bool) -> str:
    shapes = ", ".join(layer_names(results, suite).values())
    return f"{'the layers in turn' if load == 'sustained' else 'each, and the sum' if each else 'sum'} of {shapes}"


def _layers(results: Results, found: Sequence[Figure]) -> set[str]:
    return {name for figure in found for name, _, _ in results.suites[figure.suite]}


def _columns(found: Sequence[Figure], part: str, load: str, each: bool) -> list[Column]:
    columns: list[Column] = [
        ("type", lambda f: f.label),
        ("pattern", lambda f: f.pattern),
    ]
    if each:
        columns.append(("layer", lambda f: "sum" if f.layer == ALL else f.layer))
    if part != "pack":
        columns.append(("m", lambda f: str(f.m)))
    columns += [
        ("us", lambda f: number(f.us) if f.us is not None else short(f.blank)),
        ("+-", lambda f: percent(f.spread)),
    ]
    if part in ("gemm", "linear"):
        columns += [("dense us", lambda f: number(f.dense)), ("x dense", lambda f: times(f.over(f.dense)))]
    if part == "gemm":
        columns.append(("x dense FP8", lambda f: times(f.over(f.dense_fp8))))
        columns += [("cuSPARSELt us", lambda f: number(f.cusparselt)), ("x cuSPARSELt", lambda f: times(f.over(f.cusparselt)))]
    if part == "linear":
        columns += [("PyTorch us", lambda f: number(f.torch)), ("x PyTorch", lambda f: times(f.over(f.torch)))]
    if part in ("gemm", "linear"):
        columns.append(("TFLOP/s", lambda f: number(f.tflops)))
    if part == "pack":
        columns.append(("Mweights/s", lambda f: number(f.weights / f.us if f.us else None)))
    columns += [("GB/s", lambda f: number(f.gbs)), ("% of floor", lambda f: percent(f.of_floor))]
    if load == "sustained":
        columns += [
            ("SM MHz", lambda f: number(f.cell.sm_mhz if f.cell else None)),
            ("W", lambda f: number(f.cell.watts if f.cell else None)),
            ("C", lambda f: number(f.cell.celsius if f.cell else None)),
            ("mJ", lambda f: number(f.cell.mj if f.cell else None)),
        ]
    return [(name, cell) for name, cell in columns if name == "us" or any(cell(figure) for figure in found)]


def number(value: float | None) -> str:
    """Three digits or more: 4.12, 41.2, 412, 4120."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def short(blank: str | None) -> str:
    """Why there is no time, in a word or two."""
    if blank is None:
        return ""
    return blank.partition(":")[0]


def crossovers(results: Results) -> Iterator[str]:
    """In bursts, for each part, suite, type and pattern: from which m on ours is faster. One sentence each.

    A product against the dense one; a whole linear against PyTorch's of 8 bits, and of 16 bits against the dense product,
    which is all there is to it. Suites that each have an m of their own are taken together.
    """
    grouped: dict[tuple[str, ...], dict[int, float]] = {}
    for figure in figures(results):
        if figure.part not in ("gemm", "linear") or figure.m is None or figure.load != "burst":
            continue
        dynamic = figure.part == "linear" and KINDS[figure.type].quantized
        ratio = figure.over(figure.torch if dynamic else figure.dense)
        if ratio is not None:
            suite = "m = n = k" if figure.layer == "square" else figure.suite
            peer = "PyTorch's dynamic linear" if dynamic else "dense cuBLASLt"
            grouped.setdefault((figure.part, suite, figure.type, figure.pattern, peer), {})[figure.m] = ratio
    for (part, suite, type, pattern, peer), ratios in grouped.items():
        yield summary.crossover_sentence(_subject(part, suite, type, pattern), peer, ratios)


def cliffs(results: Results) -> Iterator[str]:
    """In bursts, for each part, suite, type and pattern: the m that take longer than a larger one, layer by layer.

    One sentence each where there are such m, or where so many m were measured that it says something that there are none.
    """
    grouped: dict[tuple[str, str, str, str], dict[str, dict[int, float]]] = {}
    for figure in figures(results, each=True):
        one_layer = figure.layer != ALL and figure.load == "burst" and figure.part in ("gemm", "linear")
        if one_layer and figure.m is not None and figure.us is not None:
            layers = grouped.setdefault((figure.part, figure.suite, figure.type, figure.pattern), {})
            layers.setdefault(figure.layer, {})[figure.m] = figure.us
    for of, layers in grouped.items():
        subject, several = _subject(*of), len(results.suites[of[1]]) > 1
        found = {layer: summary.cliffs(times) for layer, times in layers.items()}
        told = [
            f"{f'{layer} ' * several}at {summary.cliffs_named(found[layer], sorted(times))}"
            for layer, times in layers.items()
            if found[layer]
        ]
        if told:
            yield f"{subject}: over {summary.CLIFF} times as long as with more tokens: {'; '.join(told)}."
        elif any(is_curve(times) for times in layers.values()):
            yield f"{subject}: at no m over {summary.CLIFF} times as long as with more tokens{', in any layer' * several}."


def _subject(part: str, suite: str, type: str, pattern: str) -> str:
    return f"{KINDS[type].label} {pattern} {'product' if part == 'gemm' else 'whole linear'}, {suite}, in bursts"


def blanks(results: Results) -> Iterator[str]:
    """Why cells are blank, each reason once."""
    seen: dict[tuple[str, str], int] = {}
    for cell in results.cells.values():
        if cell.blank:
            seen[cell.contender, cell.blank] = seen.get((cell.contender, cell.blank), 0) + 1
    for (contender, reason), count in seen.items():
        what = PEERS.get(contender, "this library").partition(",")[0]
        yield f"{count} blank of {contender} ({what}): {reason}"
