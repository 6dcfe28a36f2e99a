"""What is shown of whole models in an engine: tables, a sentence of memory, README's section."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from .cases import KINDS, OURS
from .engines import ENGINES, STEPS, Load
from .results import Results, Served


@dataclass(frozen=True)
class ServedRow:
    """Ours, and the engine's own of the same load: type -> cell."""

    cell: Served
    own: dict[str, Served]

    @property
    def load(self) -> Load:
        return Load(self.cell.phase, self.cell.batch, self.cell.prompt)

    def over(self, type: str, time: str = "ms") -> float | None:
        """How many times as fast as the engine's own, by `time`, "ms" or "gpu_ms"."""
        ours, own = getattr(self.cell, time), getattr(self.own.get(type), time, None)
        return own / ours if own and ours else None


def served_rows(results: Results) -> list[ServedRow]:
    """In the order measured."""
    found = []
    for cell in results.served.values():
        if cell.provider == OURS:
            at = (cell.phase, cell.batch, cell.prompt)
            own = {type: (cell.engine, cell.model, cell.engine, type, None, *at) for type in ENGINES[cell.engine].own}
            found.append(ServedRow(cell, {type: results.served[key] for type, key in own.items() if key in results.served}))
    return found


def title(cell: Served) -> str:
    """ "INT8 6:8", or "vLLM FP8"."""
    label = KINDS[cell.type].label
    return f"{label} {cell.pattern}" if cell.provider == OURS else f"{ENGINES[cell.provider].title} {label}"


Columns = list[tuple[str, Callable[[ServedRow], str]]]


def columns(engine: str, number: Callable[[float | None], str], ratio: Callable[[float | None], str]) -> Columns:
    """Every column that could say something of rows of one engine."""

    def tokens(row: ServedRow) -> str:
        return f"{row.load.tokens(row.cell.ms):.0f}" if row.cell.ms else ""

    def own(type: str) -> Columns:
        name = f"{ENGINES[engine].title} {KINDS[type].label}"
        return [
            (f"{name} ms", lambda row: number(getattr(row.own.get(type), "ms", None))),
            (f"x {name}", lambda row: ratio(row.over(type))),
            ("x by GPU time", lambda row: ratio(row.over(type, "gpu_ms"))),
        ]

    return [
        ("model", lambda row: row.cell.model), ("type", lambda row: KINDS[row.cell.type].label),
        ("pattern", lambda row: row.cell.pattern or ""), ("batch", lambda row: row.load.size),
        ("ms", lambda row: (row.cell.blank or "").partition(":")[0] if row.cell.ms is None else number(row.cell.ms)),
        ("+-", lambda row: "" if row.cell.spread is None else f"{row.cell.spread:.0%}"),
        ("GPU ms", lambda row: number(row.cell.gpu_ms)), ("tokens/s", tokens),
        *(column for type in ENGINES[engine].own for column in own(type)),
    ]  # fmt: skip


def phase_title(engine: str, phase: str, prompt: int) -> list[str]:
    what = "" if phase == "prefill" else f"one of {STEPS} steps after prompts of {prompt} tokens"
    return [ENGINES[engine].title, phase, what]


def memory(results: Results) -> Iterator[str]:
    """The tensors of each model, one sentence each."""
    models: dict[tuple[str, str], dict[str, int]] = {}
    for cell in results.served.values():
        if cell.bytes:
            models.setdefault((cell.engine, cell.model), {})[title(cell)] = cell.bytes
    for (engine, model), sizes in models.items():
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
        yield f"{model} in {ENGINES[engine].title}, GiB of all tensors: {listed}."


def section(results: Results, number: Callable[[float | None], str]) -> Iterator[str]:
    """README's lines, without those of the machine: a table a question."""
    of = list(results.served.values())
    for engine, model in dict.fromkeys((cell.engine, cell.model) for cell in of):
        cells = [cell for cell in of if (cell.engine, cell.model) == (engine, model)]
        rows = [row for row in served_rows(results) if (row.cell.engine, row.cell.model) == (engine, model)]
        name = ENGINES[engine].title
        what = f"{model} in {name}, **milliseconds** of a prefill (prompts x tokens) and of a step of decoding (by batch)"
        yield from _table(f"{what}:", [(cell, number(cell.ms)) for cell in cells])
        for type, time in (("fp8", "ms"), ("fp8", "gpu_ms"), ("bf16", "ms")):
            how = " by the GPU's time alone" if time == "gpu_ms" else ""
            ratio = partial(ServedRow.over, type=type, time=time)
            texts = [(row.cell, f"{found:.2f}" if (found := ratio(row)) else "") for row in rows]
            if any(text for _, text in texts):
                yield from _table(f"**Times as fast as {name}'s {KINDS[type].label}**{how}:", texts)
    yield from (f"- {sentence}" for sentence in memory(results))
    yield ""


def _table(head: str, texts: list[tuple[Served, str]]) -> Iterator[str]:
    loads = list(dict.fromkeys(Load(cell.phase, cell.batch, cell.prompt) for cell, _ in texts))
    yield f"{head}\n\n| | {' | '.join(f'{x.phase} {x.size}' for x in loads)} |\n{'|---' * (len(loads) + 1)}|"
    for name in dict.fromkeys(title(cell) for cell, _ in texts):
        found = {Load(cell.phase, cell.batch, cell.prompt): text for cell, text in texts if title(cell) == name}
        if any(found.values()):
            yield f"| {name} | {' | '.join(found.get(load, '') for load in loads)} |"
    yield ""
