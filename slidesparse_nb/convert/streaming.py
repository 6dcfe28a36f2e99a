"""Write a checkpoint larger than memory, a piece at a time, so that it can be killed at any moment and resumed.

    OUT.partial/    the output as it grows: every shard at full size from the start, filled piece by piece
    OUT.journal     line 1: fingerprint of source, options and layout; then one line a finished piece, with its CRC-32

A finished output is renamed to OUT in one step, so OUT is whole or absent. On resume every piece the journal lists is read back
and checked; what is missing or torn is written again. Pieces depend only on the plan, so the result does not depend on when or
how often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, OperandError
from ..safetensors_file import SafetensorsWriter
from .layout import Item, Layout, Shard, row_ranges


@dataclass(frozen=True)
class Done:
    """Where a finished unit of work was written, as (tensor, byte offset, bytes), and the CRC-32 of it all in that order."""

    spans: list[Any]
    crc: int


class Staging:
    """The partial folder and the journal beside OUT, held under a lock.

    Args:
        out: the final path, a folder, or one file if `single`.
        resume: continue from a journal with the same fingerprint, if there is one.
        overwrite: replace OUT, and forget an unfinished run.

    Raises:
        OperandError: OUT exists, or an unfinished or a running job stands there.
    """

    def __init__(self, out: Path, *, single: bool, fingerprint: str, resume: bool, overwrite: bool) -> None:
        self.out, self.single = out, single
        self.folder, self.journal, self.aside = _places(out)
        self.done: dict[str, Done] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.folder, self.journal):
            if path.is_symlink():
                raise OperandError(f"out: {path} is a symbolic link; remove it first")
        unfinished = self.journal.exists()
        if unfinished and not (resume or overwrite):
            self._lock(os.O_RDWR).close()  # says so if that run is alive
            raise OperandError(
                f"out: an unfinished run of {out} stands at {self.folder}; continue it with --resume, or start over with"
                " --overwrite"
            )
        self._file = self._lock(os.O_RDWR | os.O_CREAT)
        first = self._read_journal() if resume else None
        self.resumed = first == fingerprint
        if first is not None and first != fingerprint and not overwrite:
            self._file.close()
            raise OperandError(
                f"out: the unfinished run at {self.folder} was started with other options or another source; start over with"
                " --overwrite"
            )
        if not self.resumed:
            self.done.clear()
            self._file.truncate(0)
            shutil.rmtree(self.folder, ignore_errors=True)
            self._append({"fingerprint": fingerprint})
        self.folder.mkdir(exist_ok=True)

    def _lock(self, flags: int) -> Any:
        file = os.fdopen(os.open(self.journal, flags | os.O_APPEND | os.O_NOFOLLOW, 0o644), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OperandError(f"out: another run is writing {self.out} at this moment") from None
            raise
        return file

    def _read_journal(self) -> str | None:
        """The fingerprint of the first line, None if there is none; fills `done`. A torn last line is cut off."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        fingerprint = None
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            fingerprint = fingerprint or record.get("fingerprint")
            if "unit" in record:
                self.done[record["unit"]] = Done([tuple(span) for span in record["spans"]], record["crc"])
        return fingerprint

    def _append(self, record: dict[str, Any]) -> None:
        os.write(self._file.fileno(), json.dumps(record).encode() + b"\n")

    def finish(self, unit: str, done: Done) -> None:
        """Note that a unit of work is in its place."""
        self.done[unit] = done
        self._append({"unit": unit, "spans": done.spans, "crc": done.crc})

    def publish(self) -> None:
        """Turn the partial folder into OUT: one rename, after what stood there has been moved aside."""
        source = self.folder / self.out.name if self.single else self.folder
        if self.single:
            os.replace(source, self.out)
            shutil.rmtree(self.folder)
        else:
            if self.out.exists():
                shutil.rmtree(self.aside, ignore_errors=True)
                os.rename(self.out, self.aside)
            os.rename(source, self.out)
        _sync_folder(self.out.parent)
        self.journal.unlink()
        self._file.close()
        shutil.rmtree(self.aside, ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        self._file.close()

    def keep(self) -> None:
        """Leave everything for a later --resume."""
        self._file.close()


def _places(out: Path) -> tuple[Path, Path, Path]:
    """Beside OUT: the partial folder, the journal, and where a folder goes that OUT replaces."""
    return tuple(out.with_name(out.name + end) for end in (".partial", ".journal", ".replaced"))  # type: ignore[return-value]


def clear_leftovers(out: Path) -> None:
    """Remove what a run leaves that was killed after OUT was in its place."""
    folder, journal, aside = _places(out)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    journal.unlink(missing_ok=True)


def write_layout(
    layout: Layout,
    staging: Staging,
    *,
    workers: int,
    unit_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Make every piece of every shard that the journal does not hold already, several at a time.

    Args:
        workers: threads. The first failure in plan order is raised, after the pieces in flight have ended.
        unit_bytes: source bytes in one piece of work; with `workers` it bounds the memory in use.
        progress: called with the source bytes of each piece that is done.
    """
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        flight: deque[tuple[Future[Done], str, int]] = deque()

        def land() -> None:
            future, unit, count = flight.popleft()
            staging.finish(unit, future.result())
            progress(count)

        try:
            for shard in layout.shards:
                writer = _open_writer(shard, staging)
                stack.callback(writer.close, sync=staging.out.exists())  # what it replaces must not be lost to a power failure
                for item in shard.items:
                    for first, last in row_ranges(item.rows, item.row_bytes, unit_bytes):
                        unit, count = f"{shard.name}/{item.name}/{first}-{last}", (last - first) * item.row_bytes
                        if unit in staging.done and _still_there(writer, staging.done[unit]):
                            progress(count)
                            continue
                        flight.append((pool.submit(_write, writer, item, first, last), unit, count))
                        while len(flight) > 2 * workers:
                            land()
            while flight:
                land()
        finally:  # writers must outlive the work in flight
            for future, *_ in flight:
                future.cancel()
            wait([future for future, *_ in flight])
    for relative, write in layout.files:
        target = staging.folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target)
    _sync_folder(staging.folder)


def _open_writer(shard: Shard, staging: Staging) -> SafetensorsWriter:
    """The shard's file in the partial folder: as an earlier run left it, or new."""
    path = staging.folder / shard.name
    if staging.resumed and path.exists():
        with contextlib.suppress(FormatError):  # killed while the file was being laid out: make it again
            return SafetensorsWriter(path, shard.entries, shard.metadata, resume=True)
    return SafetensorsWriter(path, shard.entries, shard.metadata)


def _write(writer: SafetensorsWriter, item: Item, first: int, last: int) -> Done:
    """Make one unit of work and put it in its place."""
    spans, crc = [], 0
    for name, offset, data in item.make(first, last):
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        writer.write(name, view, offset)
        crc = zlib.crc32(view.data, crc)
        spans.append((name, offset, view.nbytes))
    return Done(spans, crc)


def _still_there(writer: SafetensorsWriter, done: Done) -> bool:
    """Whether the bytes that an earlier run noted are in the file."""
    crc = 0
    for name, offset, count in done.spans:
        crc = zlib.crc32(writer.read(name, offset, count), crc)
    return crc == done.crc


def _sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
