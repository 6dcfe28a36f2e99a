"""The header of a .gguf file: metadata and tensors, checked against the file's size.

It is parsed here since the reader of the library `gguf` accepts lengths beyond the end of the file, and loops over them.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.untrusted_json import uncollected
from ..errors import FormatError, UnsupportedError, shown

ELSEWHERE = "start from the model's .safetensors files"
"""The way out where a GGUF file cannot be read."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata type -> `struct` code."""
_STRING, _ARRAY = 8, 9


@dataclass
class _Cursor:
    """Reads little-endian values of a file in order; every length is checked against the file's size first."""

    data: NDArray[np.uint8]
    path: object
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > self.data.size - self.at:
            raise FormatError(
                f"{self.path}: is truncated: its header reaches past its {self.data.size} bytes; download it again"
            )
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: a string before byte {self.at} is not UTF-8; download it again") from error

    def value(self, kind: int) -> Any:
        """A metadata value of a type; an array is a list."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise FormatError(f"{self.path}: metadata type {kind} before byte {self.at} is unknown; download it again")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        if inner != _STRING:
            raise UnsupportedError(f"{self.path}: an array of type {inner} before byte {self.at} cannot be read; {ELSEWHERE}")
        return [self.text() for _ in range(count)]


@dataclass(frozen=True)
class Entry:
    """A tensor as the file describes it: its shape (rows first), type number, and offset in the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@uncollected()
def read_header(data: NDArray[np.uint8], path: object) -> tuple[dict[str, Any], dict[str, Entry], int]:
    """Metadata, tensors, and where the data begins."""
    cursor = _Cursor(data, path, at=4)
    version = cursor.number("I")
    if version not in (2, 3):
        what = "is big-endian" if version and not version & 0xFFFF else f"has version {version}, must be 2 or 3"
        raise UnsupportedError(f"{path}: {what}; {ELSEWHERE}")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    tensors: dict[str, Entry] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata:
            raise FormatError(f"{path}: metadata {shown(key)} is given twice; download it again")
        metadata[key] = cursor.value(cursor.number("I"))
    for _ in range(tensor_count):
        name = cursor.text()
        if (dimensions := cursor.number("I")) > 4 or name in tensors:
            why = "is given twice" if name in tensors else f"has {dimensions} dimensions, at most 4 are allowed"
            raise FormatError(f"{path}: tensor {shown(name)} {why}; download it again")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        tensors[name] = Entry(shape, cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise FormatError(f"{path}: general.alignment is {shown(alignment)}, must be from 1 to {1 << 20}; download it again")
    return metadata, tensors, -(-cursor.at // alignment) * alignment
