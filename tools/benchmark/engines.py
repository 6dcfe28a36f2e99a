"""What can be measured of whole models in an engine, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .cases import GEOMETRIES, KINDS, OURS, Selection


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        title: its name in tables.
        own: type -> why it has no weights of this type of its own; "" where it has.
    """

    title: str
    own: dict[str, str]


_MORE = "transformers has no FP8 linear of its own: those that it knows need more packages (kernels, fbgemm-gpu or torchao)"
ENGINES = {
    "vllm": Engine("vLLM", {"fp8": "", "bf16": ""}),
    "transformers": Engine("transformers", {"fp8": _MORE, "bf16": ""}),
}
MEASURED = {"--model": [name for name, of in GEOMETRIES.items() if of.family], "--dtype": ["int8", "fp8", "bf16"]}
"""Option -> what of it can be measured in an engine."""


class Load(NamedTuple):
    """Prompts of random tokens: how many, and the length of each."""

    phase: str
    batch: int
    prompt: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt}"

    @property
    def m(self) -> int:
        """Tokens of a prefill, or of a step."""
        return self.batch * (self.prompt if self.phase == "prefill" else 1)


LOADS = (
    *(Load("prefill", batch, prompt) for batch, prompt in ((8, 2048), (1, 2048), (4, 512))),
    *(Load("decode", batch, 128) for batch in (1, 8, 64, 256)),
)
STEPS = 64
"""Of decoding, whose mean time is one measurement."""


def weights(of: Any) -> str:
    """Whose and of which type, of a task or what was measured of it: "INT8 6:8", or "vLLM FP8"."""
    label = KINDS[of.type].label
    return f"{label} {of.pattern}" if of.provider == OURS else f"{ENGINES[of.provider].title} {label}"


class Task(NamedTuple):
    """What one process measures: one model with weights of one type, all loads."""

    engine: str
    model: str
    provider: str
    type: str
    pattern: str | None

    def __str__(self) -> str:
        return f"{self.model} in {ENGINES[self.engine].title}, {weights(self)}"


def tasks(selection: Selection) -> Iterator[Task]:
    """Of each model the engine's FP8, ours, the engine's BF16."""
    for engine in selection.engines:
        for model in (suite.name for suite in selection.suites):
            yield Task(engine, model, engine, "fp8", None)
            yield from (Task(engine, model, OURS, kind.key, at) for at in selection.patterns for kind in selection.kinds)
            yield Task(engine, model, engine, "bf16", None)
