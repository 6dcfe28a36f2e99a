"""One .safetensors file: strict header, memory map (safetensors_writer writes one).

    8 bytes     n, the length of the header, little-endian unsigned
    n bytes     the header, one JSON object, spaces at its end:
                {"__metadata__": {str: str}, NAME: {"dtype": CODE, "shape": [...], "data_offsets": [start, stop]}, ...}
    the rest    the tensors' bytes, row-major, little-endian; offsets count from here, without holes or overlaps

A file is untrusted: everything in the header is checked before anything is used, and names are only names, never paths.
Source: the safetensors format, https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import NUMPY_OF, SAFETENSORS_BITS
from ..core.file_kind import LOOKED_AT, mistaken
from ..core.untrusted_json import parse_json, uncollected
from ..errors import FormatError, OperandError, UnsupportedError, shown

LARGEST_HEADER = 100_000_000
"""Bytes; the limit that other readers of the format set, too."""

_COUNT_LIMIT = 1 << 63  # sizes beyond it fit in no signed 64-bit integer
_KEYS = {"dtype", "shape", "data_offsets"}


T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        name: its name in the file.
        code: its type, e.g. "BF16"; a key of `dtypes.SAFETENSORS_BITS`.
        shape: its dimensions; () for a scalar.
        start, stop: its bytes, counted from the first byte of the file.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def tensor_bytes(code: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a known `code` and non-negative dimensions.

    Raises:
        FormatError: the size does not fit in 63 bits, or is no whole number of bytes.
    """
    count = 1
    for dim in shape:
        count *= dim
        if count >= _COUNT_LIMIT:  # at once: the product of a hostile shape may have millions of digits
            raise FormatError(f"shape {shown(list(shape))} has 2^63 elements or more")
    bits = count * SAFETENSORS_BITS[code]
    if bits % 8:
        raise FormatError(f"{count} elements of {code} are no whole number of bytes")
    return bits // 8


def _sizes(value: object) -> bool:
    """Whether `value` is a list of integers from 0 to 2^63 - 1. A header may hold a million lists; True is an int, too."""
    return isinstance(value, list) and not [v for v in value if type(v) is not int or not 0 <= v < _COUNT_LIMIT]


def _parse_entry(name: str, entry: object, data_start: int) -> TensorInfo:
    """One entry of a header. FormatError says which rule it breaks; the caller adds where."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise FormatError(f"is {shown(entry)}, must have exactly the keys dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in SAFETENSORS_BITS:
        raise FormatError(f"dtype {shown(code)} is unknown; it must be one of {', '.join(SAFETENSORS_BITS)}")
    if not _sizes(shape):
        raise FormatError(f"shape {shown(shape)} must be a list of integers from 0 to 2^63 - 1")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"data_offsets {shown(offsets)} must be two integers, 0 <= start <= stop")
    if (nbytes := tensor_bytes(code, shape)) != offsets[1] - offsets[0]:
        raise FormatError(f"{code} {shown(shape)} takes {nbytes} bytes, but data_offsets span {offsets[1] - offsets[0]}")
    return TensorInfo(name, code, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _parse_header(header: dict[str, Any], data_start: int, size: int, path: object) -> dict[str, TensorInfo]:
    """Check every entry of a header; the tensors in the order of their bytes, placed in the file."""
    found = []
    for name, entry in header.items():
        try:
            found.append(_parse_entry(name, entry, data_start))
        except FormatError as error:
            raise FormatError(f"{path}: tensor {shown(name)}: {error}") from None
    found.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = data_start
    for tensor in found:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise FormatError(
                f"{path}: tensor {shown(tensor.name)}: starts at byte {tensor.start - data_start} of the data and {what};"
                f" it must start at {end - data_start}"
            )
        end = tensor.stop
    if end != size:
        what = "is truncated" if end > size else "has bytes after its last tensor"
        raise FormatError(f"{path}: {what}: its header describes {end} bytes, the file has {size}; download it again")
    return {tensor.name: tensor for tensor in found}


def checked_path(path: object, name: str) -> Path:
    """`path`, the argument called `name`, as a Path.

    Raises:
        OperandError: it is no path, or one that no file can have: with a NUL, or characters the file system cannot encode.
    """
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # TypeError is what we ask for
        bad = b"\0" in os.fsencode(text)
    except TypeError:
        raise OperandError(f"{name}: {type(path).__name__} must be a path, such as 'model.safetensors'") from None
    except UnicodeError:
        bad = True
    if bad:
        raise OperandError(f"{name}: {shown(path)} holds a character that no path can hold; remove it")
    return Path(text)


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file and nothing else (a FIFO would hang) for reading; a file descriptor.

    Raises:
        FormatError: it cannot be opened, or is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name that an index gives
        raise FormatError(f"{shown(os.fspath(path))}: cannot be opened: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path}: is not a regular file")
    return descriptor


def file_state(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """What changes when a file is written to or replaced: its size and the time of its last change (ns); () if it is gone."""
    try:
        return _state(os.stat(path))
    except OSError:
        return ()


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns


def _no_header(head: bytes, length: int, size: int) -> str:
    """Why a file of `size` bytes that begins with `head` has no header of `length` bytes; a clause."""
    if size < 8:
        return f"has {size} bytes, but 8 alone hold the length of its header; download it again"
    if length > LARGEST_HEADER:
        return f"header length {length} is above the limit of {LARGEST_HEADER} bytes; is this a .safetensors file?"
    if length > size - 8:
        return f"header length {length} reaches past the end of the file ({size} bytes); download it again"
    return f"header starts with {head[8 : min(16, 8 + length)]!r}, must start with '{{'; is this a .safetensors file?"


class TensorFile:
    """A file of tensors, memory-mapped and read-only; a context manager.

    The arrays that are views of it keep the map alive, so they stay valid even after `close()`, and after the file is replaced
    by a rename or unlinked (but a file cut short while it is mapped takes the process with it). Threads may share it.

    Attributes:
        path: the file.
        metadata: its `__metadata__`.
        tensors: name -> TensorInfo, in the order of their bytes.
        state: what tells whether the file at `path` is still the one that was opened; see `file_state`.

    Raises:
        OperandError: `path` is none.
        FormatError: the file cannot be opened, or `head_problem` finds one.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = checked_path(path, "path")
        descriptor = open_regular(path)
        try:
            status = os.fstat(descriptor)
            self.state = _state(status)
            if problem := self.head_problem(os.pread(descriptor, LOOKED_AT, 0), status.st_size):
                raise FormatError(f"{path}: {problem}")
            self._map: mmap.mmap | None = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
        finally:
            os.close(descriptor)
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)

    def head_problem(self, head: bytes, size: int) -> str:
        """Why a file of `size` bytes that begins with `head` is of another format: a clause with the way out, or ""."""
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the map. Arrays that are still in use keep it until they go."""
        self._bytes = self._map = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.tensors)} tensors)"

    def info(self, name: str) -> TensorInfo:
        """The tensor's entry.

        Raises:
            OperandError: no tensor has that name.
        """
        if name not in self.tensors:
            raise OperandError(f"name: {shown(name)} is no tensor of {self.path}")
        return self.tensors[name]

    @property
    def mapped(self) -> NDArray[np.uint8]:
        """All bytes of the file: read-only uint8, a view of the map.

        Raises:
            OperandError: the file is closed.
        """
        if self._bytes is None:
            raise OperandError(f"{self.path}: is closed; read its tensors before that")
        return self._bytes

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Bytes [start, stop) of a tensor, all by default: read-only uint8, a view of the map."""
        info = self.info(name)
        return self.mapped[info.start : info.stop][start:stop]

    def rows(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Rows first to last - 1 of a tensor; see `array`."""
        rows: NDArray[Any] = self.array(name)[first:last]
        return rows

    def array(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only array of `dtypes.NUMPY_OF[code]`: a view of the map, or a copy if its bytes are unaligned.

        Raises:
            OperandError: no tensor has that name.
            UnsupportedError: NumPy has no such type (elements below one byte) or no such shape.
        """
        info, raw = self.info(name), self.raw(name)
        if info.code not in NUMPY_OF:
            raise UnsupportedError(f"{self.path}: tensor {shown(name)}: NumPy has no type for {info.code}; only its bytes")
        try:
            array: NDArray[Any] = raw.view(NUMPY_OF[info.code]).reshape(info.shape)
        except ValueError as error:  # more dimensions than NumPy has, or [2**62, 0]
            raise UnsupportedError(f"{self.path}: tensor {shown(name)}: NumPy has no shape {shown(info.shape)}") from error
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let go of the memory behind bytes [start, stop) of a tensor; they are read again when somebody touches them.

        The pages a process has touched count as its memory until then. A checkpoint larger than memory is streamed so.
        """
        info = self.info(name)
        first = info.start + start
        last = info.stop if stop is None else min(info.stop, info.start + stop)
        self._forget(first, last)

    def _forget(self, first: int, last: int) -> None:
        """Let go of the memory behind bytes [first, last) of the file."""
        page = first - first % mmap.PAGESIZE  # a neighbour's part of a page goes, too, and comes back like the rest
        if self._map is not None and first < last:
            self._map.madvise(mmap.MADV_DONTNEED, page, last - page)


class SafetensorsFile(TensorFile):
    """A .safetensors file.

    Raises:
        As `TensorFile`, and FormatError where its header breaks a rule of the format.
    """

    @uncollected()
    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        length = _header_length(self.mapped[:8].tobytes())
        header = parse_json(self.mapped[8 : 8 + length].tobytes(), f"{self.path}: header")
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(value, str) for value in self.metadata.values()):
            raise FormatError(f"{self.path}: __metadata__ is {shown(self.metadata)}, must map strings to strings")
        self.tensors = _parse_header(header, 8 + length, self.mapped.size, self.path)

    def head_problem(self, head: bytes, size: int) -> str:
        length = _header_length(head)
        if size < 8 or length > size - 8 or length > LARGEST_HEADER or head[8 : 9 if length else 8] != b"{":
            return mistaken(head, ".safetensors file") or _no_header(head, length, size)
        return ""


def _header_length(head: bytes) -> int:
    return int.from_bytes(head[:8], "little")
