"""What commands that time products take on their lines: lists with commas, tokens and ranges of them, shapes, seconds."""

from __future__ import annotations

import math
import re
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


MOST_TOKENS = 1 << 20
MOST_COUNTS = 4096
"""Numbers of tokens that a command may name."""


def token_range(text: str) -> range:
    """The numbers of tokens that 64, 1-64 or 64-1024:32 (64, 96, ... 1024) means; ValueError if it is none of these."""
    match = re.fullmatch(r"(\d{1,7})(?: *- *(\d{1,7})(?: *: *(\d{1,7}))?)?", text.strip(), re.ASCII)
    first, last, step = (None if part is None else int(part) for part in match.groups()) if match else (0, 0, 0)
    if not all(part is None or 1 <= part <= MOST_TOKENS for part in (first, last, step)) or first is None:
        raise ValueError(f"{text!r} must be a number of tokens, 1 to {MOST_TOKENS}, or a range such as 1-64 or 64-1024:32")
    if last is None:
        return range(first, first + 1)
    if first >= last:
        raise ValueError(f"{text!r} must name the smaller number of tokens first")
    if step is not None and step > last - first:
        raise ValueError(f"{text!r} has a step longer than the range; it must be at most {last - first}")
    return range(first, last + 1, step or 1)


class Tokens(Listed):
    """Numbers of tokens and ranges of them, with commas between; each number once, in the order in which they are named."""

    def __init__(self) -> None:
        super().__init__("M,M-M:STEP", token_range)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        named = super().convert(value, param, ctx)
        if (count := sum(map(len, named))) > MOST_COUNTS:
            self.fail(f"names {count} numbers of tokens, where {MOST_COUNTS} are the most; give ranges a step", param, ctx)
        return tuple(dict.fromkeys(m for each in named for m in each))


class Shape(click.ParamType):  # type: ignore[type-arg]
    """N,K."""

    name = "N,K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"\s*(\d{1,8})\s*,\s*(\d{1,8})\s*", str(value), re.ASCII)
        if not match or not all(1 <= int(part) <= 1 << 24 for part in match.groups()):
            self.fail(f"{value!r} must be outputs and inputs, N,K, as in 4096,11008", param, ctx)
        return int(match[1]), int(match[2])


class Seconds(click.FloatRange):
    """1 or more, and no end of time."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds
