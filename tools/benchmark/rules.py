"""The rules of a results file: what is read from one may be used without a further look."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import slidesparse_nb as ss

from .selection import ALL, KINDS, OURS, PARTS, PEERS

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 120
shown = _shortened.repr
"""repr, cut to a length that an error message can bear."""


def parse(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        FormatError: it is none, or holds NaN or Infinity.
    """

    def refuse(constant: str) -> NoReturn:
        raise ss.FormatError(f"{where}: {constant} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, thousands of digits, nested too deeply
        raise ss.FormatError(f"{where}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ss.FormatError(f"{where}: is {shown(value)}, must be a JSON object")
    return value


Layers = Mapping[str, tuple[int, int]]
"""name -> (n, k)."""


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _one_of(known: Collection[str]) -> Rule:
    return Rule(f"one of {', '.join(known)}", lambda x: isinstance(x, str) and x in known)


def _parses(parse: Callable[[str], object]) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        try:
            return isinstance(value, str) and bool(parse(value))
        except ValueError:
            return False

    return holds


def _number(least: float) -> Callable[[Any], bool]:
    """Bounded, so that no ratio and no sum of such numbers overflows; bool is no number."""
    return lambda x: type(x) in (int, float) and least <= x <= 1e18


TEXT = Rule("text", lambda x: isinstance(x, str))
FLAG = Rule("true or false", lambda x: isinstance(x, bool))
NUMBER = Rule("a number", _number(-1e18))
AMOUNT = Rule("a number, 0 or more", _number(0))
POSITIVE = Rule("a number above 0", _number(1e-9))
COUNT = Rule("a whole number, 1 or more", lambda x: type(x) is int and 1 <= x <= 1 << 40)
FACT = Rule("text, a number, true, false or null", lambda x: x is None or any(r.holds(x) for r in (TEXT, FLAG, NUMBER)))
OBJECT = Rule("an object", lambda x: isinstance(x, dict))
LIST = Rule("a list", lambda x: isinstance(x, list))
TIME = Rule("a time, ISO 8601", _parses(datetime.fromisoformat))
PATTERN = Rule("a pattern such as 6:8", _parses(lambda text: str(ss.Pattern.of(text)) == text))
LOADS = _one_of(("burst", "sustained"))
TYPES = _one_of(KINDS)

FILE = {
    "schema": COUNT, "slidesparse_nb": TEXT, "started": TIME, "machine": OBJECT, "selection": OBJECT, "suites": OBJECT,
    "bandwidth": OBJECT, "ceilings": OBJECT, "notes": LIST, "seconds": AMOUNT, "complete": FLAG, "cells": LIST,
}  # fmt: skip
CELL = {
    "contender": _one_of((OURS, *PEERS)), "part": _one_of(PARTS), "suite": TEXT, "layer": TEXT, "type": TYPES, "load": LOADS,
}  # fmt: skip
CELL_IF_KNOWN = {
    "n": COUNT, "k": COUNT, "m": COUNT, "pattern": PATTERN, "us": POSITIVE, "spread": AMOUNT, "repeats": COUNT, "calls": COUNT,
    "rows": COUNT, "sm_mhz": AMOUNT, "celsius": NUMBER, "watts": AMOUNT, "mj": AMOUNT, "blank": TEXT, "wrong": FLAG,
}  # fmt: skip


def check_file(given: dict[str, Any], where: object) -> None:
    """Raise FormatError, naming the place in the file `where`, unless `given` is a whole file of results."""
    try:
        _file(given)
    except ss.FormatError as error:
        raise ss.FormatError(f"{where}: {error}") from None


def _file(given: dict[str, Any]) -> None:
    _fields("", given, FILE)
    facts = given["machine"]
    states = {f"machine.{key}": facts[key] for key in ("before", "after") if key in facts}
    for place, state in states.items():
        _obeys(place, state, OBJECT)
    for place, values in {"machine": {key: facts[key] for key in facts if f"machine.{key}" not in states}, **states}.items():
        _each(place, values, TEXT, FACT)
    _obeys(
        "machine.power_limit_w", facts.get("power_limit_w", 0), Rule("a number or null", lambda x: x is None or AMOUNT.holds(x))
    )
    _each("bandwidth", given["bandwidth"], _one_of(("copy", "read")), POSITIVE)
    _each("ceilings", given["ceilings"], TYPES, OBJECT)
    for key, rates in given["ceilings"].items():
        _each(f"ceilings.{key}", rates, LOADS, POSITIVE)
    for i, note in enumerate(given["notes"]):
        _obeys(f"notes[{i}]", note, TEXT)
    suites = {name: _layers(f"suites.{name}", layers) for name, layers in given["suites"].items()}
    for i, cell in enumerate(given["cells"]):
        _cell(f"cells[{i}]", cell, suites)


def _layers(place: str, given: Any) -> Layers:
    _obeys(place, given, Rule("a list of layers", lambda x: isinstance(x, list) and bool(x)))
    layers: dict[str, tuple[int, int]] = {}
    triple = Rule(
        "a layer of its own name, [name, n, k]",
        lambda x: isinstance(x, list) and len(x) == 3 and TEXT.holds(x[0]) and x[0] not in (*layers, ALL)
        and COUNT.holds(x[1]) and COUNT.holds(x[2]),
    )  # fmt: skip
    for i, layer in enumerate(given):
        _obeys(f"{place}[{i}]", layer, triple)
        layers[layer[0]] = (layer[1], layer[2])
    return layers


def _cell(place: str, cell: Any, suites: Mapping[str, Layers]) -> None:
    _obeys(place, cell, OBJECT)
    _fields(f"{place}.", cell, CELL, CELL_IF_KNOWN)
    _obeys(f"{place}.suite", cell["suite"], Rule("one of suites", lambda x: x in suites))
    layers: Mapping[str, tuple[int | None, int | None]]
    layers = {ALL: (None, None)} if cell["load"] == "sustained" else suites[cell["suite"]]
    known = layers.get(cell["layer"]) == (cell.get("n"), cell.get("k"))
    for holds, rule in (
        (known, "layer, n and k must be those of its suite; under sustained load, all"),
        (("m" in cell) == (cell["part"] != "pack"), "m belongs to every part but pack"),
        (("pattern" in cell) == (cell["contender"] not in ("dense", "torch")), "a pattern belongs to sparse weights alone"),
        (("us" in cell) != ("blank" in cell), "there must be us or blank, not both"),
        ("blank" in cell or not cell.get("wrong"), "wrong goes with blank"),
    ):
        if not holds:
            raise ss.FormatError(f"{place}: {rule}")


def _fields(place: str, given: dict[str, Any], needed: Mapping[str, Rule], if_known: Mapping[str, Rule] | None = None) -> None:
    rules = {**needed, **(if_known or {})}
    for key in needed:
        if key not in given:
            raise ss.FormatError(f"{place}{key} is missing")
    for key, value in given.items():
        if key not in rules:
            raise ss.FormatError(f"{place}{key} is no key of a results file")
        _obeys(f"{place}{key}", value, rules[key])


def _each(place: str, given: Mapping[str, Any], keys: Rule, values: Rule) -> None:
    for key, value in given.items():
        _obeys(f"a key of {place}", key, keys)
        _obeys(f"{place}.{key}", value, values)


def _obeys(place: str, value: Any, rule: Rule) -> None:
    if not rule.holds(value):
        raise ss.FormatError(f"{place} is {shown(value)} and must be {rule.words}")
