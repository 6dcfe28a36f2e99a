"""The table in the terminal, and the sentences below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .figures import Figure, figures
from .results import Results
from .selection import ALL, KINDS, PEERS
from .summary import crossover_sentence

Rows = list[tuple[str, ...]]


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
    """Tables, as title, columns and rows: one for each part, suite and load; suites of one layer share theirs."""
    grouped: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in figures(results, each=each):
        suite = figure.suite if len(results.suites[figure.suite]) > 1 else ""
        grouped.setdefault((figure.part, suite, figure.load), []).append(figure)
    for (part, suite, load), found in grouped.items():
        columns = _columns(found, part, load, each and bool(suite))
        if suite:
            title = f"{suite}, {part}, {load}: {_summed(results, suite, load, each)}"
        else:
            title = f"{part}, {load}"
            columns.insert(0, ("n x k" if "shape" in _layers(results, found) else "m x n x k", lambda f: f.suite))
        yield title, tuple(name for name, _ in columns), [tuple(cell(figure) for _, cell in columns) for figure in found]


def _summed(results: Results, suite: str, load: str, each: bool) -> str:
    layers = results.suites[suite]
    shapes = ", ".join(f"{name} ({n}, {k})" for name, n, k in layers)
    return f"{'the layers in turn' if load == 'sustained' else 'each, and the sum' if each else 'sum'} of {shapes}"


def _layers(results: Results, found: Sequence[Figure]) -> set[str]:
    return {name for figure in found for name, _, _ in results.suites[figure.suite]}


def _columns(found: Sequence[Figure], part: str, load: str, each: bool) -> list[tuple[str, Callable[[Figure], str]]]:
    columns: list[tuple[str, Callable[[Figure], str]]] = [
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
        what = "product" if part == "gemm" else "whole linear"
        yield crossover_sentence(f"{KINDS[type].label} {pattern} {what}, {suite}, in bursts", peer, ratios)


def blanks(results: Results) -> Iterator[str]:
    """Why cells are blank, each reason once."""
    seen: dict[tuple[str, str], int] = {}
    for cell in results.cells.values():
        if cell.blank:
            seen[cell.contender, cell.blank] = seen.get((cell.contender, cell.blank), 0) + 1
    for (contender, reason), count in seen.items():
        what = PEERS.get(contender, "this library").partition(",")[0]
        yield f"{count} blank of {contender} ({what}): {reason}"
