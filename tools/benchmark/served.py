"""Tables of whole models in an engine, for the terminal and README: one for each question, a line for each kind of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .cases import KINDS, OURS
from .engines import ENGINES, weights
from .results import Results, Served


def over(results: Results, cell: Served, type: str, time: str = "ms") -> float | None:
    """How many times as fast as the engine's own weights of `type`, by `time`: "ms" or "gpu_ms"."""
    own = results.served.get((cell.engine, cell.model, cell.engine, type, None, *cell.load))
    ours, theirs = getattr(cell, time), getattr(own, time, None)
    return theirs / ours if ours and theirs and cell.provider == OURS else None


def tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and lines, those of each model together; what nothing is known of is left out."""
    for engine, model in dict.fromkeys((cell.engine, cell.model) for cell in results.served.values()):
        cells = [cell for cell in results.served.values() if (cell.engine, cell.model) == (engine, model)]
        loads, served_by = list(dict.fromkeys(cell.load for cell in cells)), ENGINES[engine].title
        questions: list[tuple[str, Callable[[Served], str]]] = [
            ("milliseconds of a prefill (prompts x tokens), or of a step of decoding (prompts)", lambda cell: _number(cell.ms)),
            ("of these the GPU was busy", lambda cell: _number(cell.gpu_ms)),
            ("tokens a second", lambda cell: f"{cell.load.tokens(cell.ms):.0f}" if cell.ms else ""),
        ]
        for type in ENGINES[engine].own:
            for time, how in (("ms", ""), ("gpu_ms", ", by the GPU's time")):
                question = f"times as fast as {served_by} {KINDS[type].label}{how}"
                questions.append((question, partial(_ratio, results, type, time)))
        names = list(dict.fromkeys(map(weights, cells)))
        for question, text in questions:
            texts = {(weights(cell), cell.load): text(cell) for cell in cells}
            lines = [[name, *(texts.get((name, load), "") for load in loads)] for name in names]
            if lines := [line for line in lines if any(line[1:])]:
                yield f"{model} in {served_by}: {question}", ["", *map(str, loads)], lines
        if sizes := {weights(cell): f"{cell.bytes / 2**30:.2f}" for cell in cells if cell.bytes}:
            yield f"{model} in {served_by}: GiB of all tensors", [*sizes], [[*sizes.values()]]


def _ratio(results: Results, type: str, time: str, cell: Served) -> str:
    return _number(over(results, cell, type, time))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.{2 if value < 100 else 0}f}"
