"""A .safetensors file written piece by piece: its layout first, then its tensors in any order; or all at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import SAFETENSORS_BITS
from ..core.untrusted_json import uncollected
from ..errors import FormatError, OperandError, shown
from .safetensors import LARGEST_HEADER, TensorInfo, tensor_bytes


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file an OSError is about that names none, as those of read, write and fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@uncollected()
def header_bytes(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a file: its first bytes (length and header), and where every tensor goes.

    Tensors stand by element size, largest first, then by name, and the header ends on a multiple of 8 bytes: so every
    tensor is aligned, and the same entries give the same bytes in whatever order they come.

    Args:
        entries: (name, code, shape) of every tensor.
        metadata: the file's `__metadata__`; left out where empty.

    Raises:
        OperandError: a name that stands twice or is "__metadata__", an unknown code, a negative dimension, or text that is
            not Unicode.
    """
    entries = list(entries)
    for name, code, shape in entries:
        if code not in SAFETENSORS_BITS or any(dim < 0 for dim in shape):
            raise OperandError(f"{shown(name)}: {shown(code)} {shown(shape)} is no type and shape of a tensor")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    placed: list[TensorInfo] = []
    end = 0
    for name, code, shape in sorted(entries, key=lambda entry: (-SAFETENSORS_BITS[entry[1]], entry[0])):
        if name in header or name == "__metadata__":
            raise OperandError(f"{shown(name)}: must name one tensor, once")
        try:
            start, end = end, end + tensor_bytes(code, shape)
        except FormatError as error:
            raise OperandError(f"{shown(name)}: {error}") from None
        placed.append(TensorInfo(name, code, tuple(map(int, shape)), start, end))
        header[name] = {"dtype": code, "shape": placed[-1].shape, "data_offsets": [start, end]}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise OperandError("names and metadata: a string holds a lone surrogate, which is no Unicode text") from error
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise OperandError(f"entries: the header would take {len(text)} bytes, above the limit of {LARGEST_HEADER}")
    data = 8 + len(text)
    found = {t.name: TensorInfo(t.name, t.code, t.shape, data + t.start, data + t.stop) for t in placed}
    return len(text).to_bytes(8, "little") + text, found


class SafetensorsWriter:
    """Writes a .safetensors file whose layout is known beforehand, its tensors in any order, piece by piece; a context manager.

    It writes exactly the path given (and follows no link there): to replace a file, write beside it and rename. What has
    not been written is zero. Threads may share it.

    Args:
        path: the file.
        entries: (name, code, shape) of every tensor.
        metadata: its `__metadata__`.
        resume: go on with a file that an earlier writer of the same entries and metadata left behind.

    Raises:
        OperandError: the entries make no file (see `header_bytes`).
        OSError: the path cannot be opened for writing, or (resume) is not there.
        FormatError: it is no regular file, or (resume) holds another header or size.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        header, self.tensors = header_bytes(entries, metadata)
        self.size = max((tensor.stop for tensor in self.tensors.values()), default=len(header))
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if resume else os.O_CREAT)
        self._descriptor = os.open(path, flags, 0o666)
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path}: is not a regular file")
            if not resume:
                with naming(self.path):
                    os.ftruncate(self._descriptor, 0)
                    os.ftruncate(self._descriptor, self.size)
                self._write_at(memoryview(header), 0)
            elif status.st_size != self.size or os.pread(self._descriptor, len(header), 0) != header:
                raise FormatError(f"{path}: was begun with other tensors or settings and cannot be resumed; start anew")
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(sync=kind is None)

    def write(self, name: str, data: bytes | bytearray | memoryview | NDArray[Any], offset: int = 0) -> None:
        """Write `data`, its bytes in row-major order, at byte `offset` of a tensor.

        Raises:
            OperandError: no such tensor, or the bytes do not fit into it.
            OSError: the disk is full or fails.
        """
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        if name not in self.tensors:
            raise OperandError(f"name: {shown(name)} is no tensor of {self.path}")
        info, stop = self.tensors[name], offset + len(view)
        if not 0 <= offset <= stop <= info.nbytes:
            raise OperandError(f"bytes {offset} to {stop} are not inside tensor {shown(name)} of {info.nbytes} bytes")
        self._write_at(view, info.start + offset)

    def read(self, name: str, offset: int, count: int) -> bytes:
        """`count` bytes from byte `offset` of a tensor, as they are in the file now; fewer where it ends, none if unknown."""
        if name not in self.tensors or offset < 0:
            return b""
        info, parts = self.tensors[name], []
        count = min(count, info.nbytes - offset)
        while count > 0 and (part := os.pread(self._descriptor, count, info.start + offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def _write_at(self, view: memoryview, position: int) -> None:
        with naming(self.path):
            while view:
                if not (done := os.pwrite(self._descriptor, view, position)):  # at most 2 GiB at a time
                    raise OSError(errno.EIO, "wrote nothing")
                view, position = view[done:], position + done

    def close(self, *, sync: bool = True) -> None:
        """Close the file, by default after it is on the disk."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            if sync:
                with naming(self.path):
                    os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(
    path: Path,
    entries: Iterable[tuple[str, str, tuple[int, ...]]],
    arrays: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file beside `path` and rename it, so that nobody sees half of one; a failure leaves what was there.

    Raises:
        OperandError: the entries make no file (see `header_bytes`).
        OSError: it cannot be written; it names `path`.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with SafetensorsWriter(beside, entries, metadata) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error  # the user's file, not the one beside it
        raise
