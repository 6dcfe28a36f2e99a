"""Tables of whole models in an engine, for the terminal and README: one for each question, a line for each kind of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .cases import KINDS, OURS
from .engines import ENGINES, weights
from .results import Cell, Results


def over(results: Results, cell: Cell, type: str, time: str = "us") -> float | None:
    """How many times as fast as the engine's own weights of `type`, by `time`: "us" or "gpu_us"."""
    own = results.cells.get((cell.load, *cell.key[1:4], type, None, *cell.key[6:]))
    ours, theirs = getattr(cell, time), getattr(own, time, None)
    return theirs / ours if ours and theirs and cell.provider == OURS else None


def label(cell: Cell) -> str:
    return f"{cell.part} {cell.layer}"


def tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and lines, those of each model together; what nothing is known of is left out."""
    for engine, model in dict.fromkeys((cell.load, cell.suite) for cell in results.served):
        cells = [cell for cell in results.served if (cell.load, cell.suite) == (engine, model)]
        where, columns = f"{model} in {ENGINES[engine].title}", list(dict.fromkeys(map(label, cells)))
        questions: list[tuple[str, Callable[[Cell], float | None]]] = [
            ("milliseconds of a prefill, or of a step of decoding (prompts x tokens)", lambda cell: cell.us and cell.us / 1e3),
            ("milliseconds of these in which the GPU was busy", lambda cell: cell.gpu_us and cell.gpu_us / 1e3),
            ("tokens a second", lambda cell: cell.us and (cell.m or 0) / cell.us * 1e6),
        ]
        for type in ENGINES[engine].own:
            for time, how in (("us", ""), ("gpu_us", ", by the GPU's time")):
                question = f"times as fast as {ENGINES[engine].title} {KINDS[type].label}{how}"
                questions.append((question, partial(over, results, type=type, time=time)))
        for question, value in questions:
            values = {(weights(cell), label(cell)): value(cell) for cell in cells}
            lines = [[name, *(_text(values.get((name, at))) for at in columns)] for name in dict.fromkeys(map(weights, cells))]
            if lines := [line for line in lines if any(line[1:])]:
                yield f"{where}: {question}", ["", *columns], lines
        if sizes := {weights(cell): f"{cell.bytes / 2**30:.2f}" for cell in cells if cell.bytes}:
            yield f"{where}: GiB of all tensors", [*sizes], [[*sizes.values()]]


def _text(value: float | None) -> str:
    return f"{value:.{2 if value < 100 else 0}f}" if value else ""
