"""JSON from strangers: headers, indexes and metadata, parsed so that two readers cannot understand them differently."""

from __future__ import annotations

import contextlib
import gc
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from .errors import FormatError, shown


def parse_json(data: bytes, where: object, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in `data`.

    Args:
        where: what error messages call it.
        strict: refuse repeated keys, NaN and Infinity, and strings that are not Unicode text (lone surrogates).

    Raises:
        FormatError: `data` is not UTF-8, not JSON, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{where}: key {shown(twice)} stands twice in one object; every key must be unique")
        return found

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{where}: {constant} is no JSON number")

    try:
        text = data.decode("utf-8")
        options: dict[str, Any] = {"object_pairs_hook": unique, "parse_constant": refuse} if strict else {}
        value = json.loads(text, **options)
        if strict and "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escape may spell half a character
    except FormatError:
        raise
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: byte {error.start} is not UTF-8, but JSON must be") from error
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: a string holds a lone surrogate, which is no Unicode text") from error
    except RecursionError as error:
        raise FormatError(f"{where}: is nested too deeply to be read") from error
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise FormatError(f"{where}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: is {shown(value)}, must be a JSON object")
    return value


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
