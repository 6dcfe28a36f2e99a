"""Finished parts of a long run beside its output, so that it can be killed at any moment and resumed.

OUT.blocks/journal              fingerprint of source and options; locked while a run is at work
OUT.blocks/00000.safetensors    the pruned weights of part 0, the errors of its modules, and a CRC-32 of both; whole or absent

On resume every part is read and checked, as `convert.write` does; a broken one is removed, to be made again.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors import SafetensorsFile
from ..convert.staging import JOURNAL_HEAD, begun_otherwise, lock, not_ours, read_journal, unfinished
from ..errors import FormatError, UnsupportedError
from .statistics import crc32, write_arrays


class Parts:
    """The folder of parts of one output.

    Args:
        out: where the output will be.
        fingerprint: of everything that decides the parts.
        resume: take up parts of the same fingerprint, if there are some.
        overwrite: drop those of another run.

    Attributes:
        errors: module -> error, of all parts.
        broken: how many parts of the run before were not what it had written.

    Raises:
        OperandError: an unfinished or a running job is stored there, or something that is not ours.
    """

    def __init__(self, out: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        self.folder = _place(out)
        found = _fingerprint(self.folder)
        if found and not (resume or overwrite):
            raise unfinished(out, self.folder)
        if found and resume and found != fingerprint and not overwrite:
            raise begun_otherwise(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = lock(self.folder / "journal", os.O_RDWR | os.O_CREAT, out)
        self.errors: dict[str, float] = {}
        self.broken = 0
        self._open: dict[int, SafetensorsFile] = {}
        self._home: dict[str, int] = {}
        for path in sorted(self.folder.glob("*.safetensors")) if resume and found == fingerprint else ():
            try:
                self._take(int(path.stem))
            except (ValueError, UnsupportedError):  # FormatError is the former
                path.unlink()
                self.broken += 1
        self.resumed = bool(self._open)
        if not self.resumed:
            for entry in self.folder.glob("*.safetensors*"):
                entry.unlink()
            try:
                self._file.truncate(0)
                os.write(self._file.fileno(), JOURNAL_HEAD + fingerprint.encode() + b'"}\n')
            except OSError:  # a full disk
                self.close(keep=False)
                raise

    def path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.safetensors"

    def __contains__(self, part: object) -> bool:
        return part in self._open

    def write(self, part: int, arrays: Mapping[str, Any], errors: Mapping[str, float]) -> None:
        """Store a part: arrays by the names of their tensors."""
        told = json.dumps(dict(errors))
        write_arrays(self.path(part), arrays, {"errors": told, "crc": str(_crc(told, arrays))})
        self._take(part)

    def _take(self, part: int) -> None:
        """Open a finished part. Raises FormatError unless it is what was written."""
        file = SafetensorsFile(self.path(part))
        told, arrays = file.metadata.get("errors", ""), {name: file.array(name) for name in file.tensors}
        if file.metadata.get("crc") != str(_crc(told, arrays)):
            raise FormatError(f"{file.path}: is not what was written; remove it")
        for name in arrays:
            file.release(name)
        self._open[part] = file
        self._home |= dict.fromkeys(arrays, part)
        self.errors |= json.loads(told)

    def array(self, name: str) -> Any:
        """A tensor of a part that is finished."""
        return self._open[self._home[name]].array(name)

    def close(self, *, keep: bool) -> bool:
        """Leave finished parts for a later run if `keep`, otherwise nothing; whether something is left."""
        keep = keep and bool(self._open)
        for file in self._open.values():
            file.close()
        self._open.clear()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._file.close()
        return keep


def _crc(told: str, arrays: Mapping[str, Any]) -> int:
    """CRC-32 of the errors of a part, and of the names, types, shapes and bytes of its arrays."""
    crc = zlib.crc32(told.encode())
    for name in sorted(arrays):
        crc = crc32(arrays[name], zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), crc))
    return crc


def clear_parts(out: Path) -> None:
    """Remove what a run leaves that was killed after OUT was in its place."""
    if _fingerprint(_place(out)) is not None:
        shutil.rmtree(_place(out), ignore_errors=True)


def _place(out: Path) -> Path:
    return out.with_name(f"{out.name}.blocks")


def _fingerprint(folder: Path) -> str | None:
    """That of an unfinished run, "" if it was cut in its first line; None where there is none.

    Raises:
        OperandError: something else is there.
    """
    if not os.path.lexists(folder):
        return None
    journal = folder / "journal"
    if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not journal.is_file()):
        raise not_ours(folder)
    if not journal.exists():
        return ""
    with journal.open("rb") as file:
        return read_journal(file, journal)[0] or ""
