"""Untrusted JSON: headers, indexes and metadata, parsed so that two readers cannot understand them differently."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from ..errors import FormatError, shown
from .file_kind import LOOKED_AT, is_pointer, mistaken


def parse_json(data: bytes, where: object, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in `data`.

    Args:
        where: what error messages call it.
        strict: refuse repeated keys, NaN and Infinity, and strings that are not Unicode text (lone surrogates).

    Raises:
        FormatError: `data` is not UTF-8, not JSON, or not an object; or it holds a number that no double holds (1e999), which
            would come back as Infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{where}: key {shown(twice)} stands twice in one object; every key must be unique")
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{where}: {constant} is no JSON number")

    def number(text: str) -> float:
        if math.isinf(value := float(text)):
            raise FormatError(f"{where}: number {shown(text)} is beyond the range of a double; write one below 1.8e308")
        return value

    try:
        text = data.decode("utf-8")
        options: dict[str, Any] = {"object_pairs_hook": unique, "parse_constant": refuse} if strict else {}
        value = json.loads(text, parse_float=number, **options)
        if strict and "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escape may spell half a character
    except FormatError:
        raise
    except UnicodeDecodeError as error:
        why = mistaken(data[:LOOKED_AT], "JSON file") or f"byte {error.start} is not UTF-8, but JSON must be; save it as UTF-8"
        raise FormatError(f"{where}: {why}") from error
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: a string holds a lone surrogate, which is no Unicode text") from error
    except RecursionError as error:
        raise FormatError(f"{where}: is nested too deeply to be read") from error
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise FormatError(f"{where}: {_no_json(data, error)}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: is {shown(value)}, must be a JSON object")
    return value


def _no_json(data: bytes, error: ValueError) -> str:
    """What `data`, in which json found `error`, is instead; a clause."""
    if data.startswith(b"\xef\xbb\xbf") and not is_pointer(data):
        return "begins with a byte-order mark, which JSON must not; save it as UTF-8 without BOM"
    if not data.strip():
        return "is empty, and so is not JSON"
    began = data[:1] in (b"{", b"[")  # then the reason is worth more than the kind
    return ("" if began else mistaken(data[:LOOKED_AT], "JSON file")) or f"is not JSON ({error})"


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Hold the garbage collector: it would walk a growing header again and again, three quarters of the time to read it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Keep the garbage collector from walking what exists now: a plan of many tensors is a million objects."""
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()
