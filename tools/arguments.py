"""What commands that time products take on their lines: lists with commas, shapes, tokens, seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases of click
    """Values with commas between them, each made by `make`, which raises ValueError or an OperandError."""

    def __init__(self, name: str, make: Callable[[str], Any]) -> None:
        self.name, self.make = name, make

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            made = dict.fromkeys(self.make(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not made:
            self.fail("names nothing", param, ctx)
        return tuple(made)


def one_of(known: Any) -> Callable[[str], str]:
    """What makes a name of `known` of a text, whatever its case; ValueError otherwise."""

    def make(text: str) -> str:
        if text.lower() not in known:
            raise ValueError(f"{text!r} is not one of {', '.join(known)}")
        return text.lower()

    return make


def _is_number(text: str, most: int) -> bool:
    """Whether it is 1 to `most` in digits 0 to 9."""
    return text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= most


def token_count(text: str) -> int:
    """A number of tokens; ValueError otherwise."""
    if not _is_number(text, 1 << 20):
        raise ValueError(f"{text!r} must be a number of tokens, 1 to {1 << 20}")
    return int(text)


class Shape(click.ParamType):  # type: ignore[type-arg]
    """N,K."""

    name = "N,K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if len(parts) != 2 or not all(_is_number(part, 1 << 24) for part in parts):
            self.fail(f"{value!r} must be outputs and inputs, N,K, as in 4096,11008", param, ctx)
        return int(parts[0]), int(parts[1])


class Seconds(click.FloatRange):
    """1 or more, and no end of time."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds
