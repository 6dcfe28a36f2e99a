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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.safetensors import SafetensorsWriter, naming
from ..errors import FormatError, OperandError, SlideSparseError
from .layout import Item, Layout, Piece, Shard, row_ranges

JOURNAL_HEAD = b'{"slidesparse": 1, "fingerprint": "'
"""How every journal begins."""

MOST_UNITS = 256
"""Units of work, however small, that a thread does in one go."""

COPIES = 16
"""Memory that a piece takes while it is made, in times its source: a float32 copy, scores, results, what they pass through."""


@dataclass(frozen=True)
class Done:
    """Where a finished unit of work was written, as (tensor, byte offset, bytes), and the CRC-32 of it all in that order."""

    spans: list[Any]
    crc: int


class Staging:
    """The partial folder and the journal beside OUT, held under a lock.

    Nothing is removed or replaced that a journal of ours does not vouch for.

    Args:
        out: the final path, a folder, or one file if `single`.
        layout: what the partial folder will hold. Shards that an earlier run left are kept; beside a journal cut in its first
            line, files of other names are not ours.
        resume: continue from a journal with the same fingerprint, if there is one.
        may_replace: asked before something at OUT is replaced; None if nothing may be.

    Raises:
        OperandError: an unfinished or a running job stands there, or something that is not ours.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        fingerprint: str,
        *,
        single: bool,
        resume: bool,
        may_replace: Callable[[], bool] | None,
    ) -> None:
        self.out, self.single, self.may_replace = out, single, may_replace
        self.folder, self.journal, self.aside = _places(out)
        self.done: dict[str, Done] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        ours = self.journal.is_file() and not self.journal.is_symlink()
        if ours and not (resume or may_replace):
            with contextlib.suppress(FileNotFoundError), lock(self.journal, os.O_RDWR, out) as file:  # says so if it is alive
                if read_journal(file, self.journal)[2]:
                    raise unfinished(out, self.folder)
        self._refuse_foreign(ours)
        self._file = lock(self.journal, os.O_RDWR | os.O_CREAT, out)
        try:
            self._take_over(fingerprint, layout, resume)
        except BaseException as error:
            if isinstance(error, OSError) and not ours:  # a full disk: what began here leaves nothing
                self.discard()
            self._file.close()
            raise

    def _refuse_foreign(self, ours: bool) -> None:
        """Raise OperandError where something of the user's has the name of our side files."""
        foreign = [self.folder, self.aside] if not ours else []
        foreign += [p for p in (self.folder, self.journal, self.aside) if p.is_symlink()]
        foreign += [p for p in (self.folder, self.aside) if os.path.lexists(p) and not p.is_dir()]
        foreign += [self.journal] if os.path.lexists(self.journal) and not ours else []
        for path in foreign:
            if os.path.lexists(path):
                raise not_ours(path)

    def _take_over(self, fingerprint: str, layout: Layout, resume: bool) -> None:
        """Continue what the journal tells of, or start anew."""
        found, self.done, whole = read_journal(self._file, self.journal)
        if found is None:  # new, or cut in its first line: then it vouches for nothing but what looks like this output
            self._refuse_unvouched(layout.names)
        elif os.path.lexists(self.aside) and not os.path.lexists(self.out):
            os.rename(self.aside, self.out)  # killed between two renames: what stood there comes back first
        if resume and found is not None and found != fingerprint and not self.may_replace:
            raise begun_otherwise(self.folder)
        self.resumed = resume and found == fingerprint
        if self.resumed:
            self._file.truncate(whole)
        else:
            self.done = {}
            shutil.rmtree(self.folder, ignore_errors=True)
            self._file.truncate(0)
            self._append({"slidesparse": 1, "fingerprint": fingerprint})
            with naming(self.journal):
                os.fsync(self._file.fileno())
        self.folder.mkdir(exist_ok=True)
        keep = {shard.name for shard in layout.shards}
        for entry in os.scandir(self.folder):  # whatever else is there, this run did not make
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name not in keep or not entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)

    def _refuse_unvouched(self, names: set[str]) -> None:
        """Raise OperandError where a side folder holds what this output would not."""
        if os.path.lexists(self.aside):
            raise not_ours(self.aside)
        if self.folder.is_dir() and any(entry.name not in names for entry in os.scandir(self.folder)):
            raise not_ours(self.folder)

    def _append(self, *records: dict[str, Any]) -> None:
        lines = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
        with naming(self.journal):
            while lines:
                lines = lines[os.write(self._file.fileno(), lines) :]

    def finish(self, finished: Mapping[str, Done]) -> None:
        """Note that units of work are in their places."""
        self.done.update(finished)
        self._append(*({"unit": unit, "spans": done.spans, "crc": done.crc} for unit, done in finished.items()))

    def publish(self) -> None:
        """Turn the partial folder into OUT: one rename, after what it replaces has been moved aside.

        Raises:
            OperandError: something that may not be replaced has appeared at OUT.
        """
        source = self.folder / self.out.name if self.single else self.folder
        occupied = os.path.lexists(self.out) and (self.single or not self.out.is_dir() or any(self.out.iterdir()))
        if occupied and not (self.may_replace and self.may_replace()):
            raise OperandError(f"out: {self.out} has appeared meanwhile and is not replaced; name another place")
        if self.single:
            os.replace(source, self.out)
            shutil.rmtree(self.folder)
        elif occupied:
            shutil.rmtree(self.aside, ignore_errors=True)
            os.rename(self.out, self.aside)
            try:
                os.rename(source, self.out)
            except OSError:
                os.rename(self.aside, self.out)
                raise
        else:
            os.rename(source, self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(self.aside, ignore_errors=True)
        self.journal.unlink()
        self._file.close()

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


def not_ours(path: Path) -> OperandError:
    """The error to raise where something of the user's has the name of a side file."""
    return OperandError(f"out: {path} stands in the way and is not an unfinished run of this tool; move it first")


def unfinished(out: Path, at: Path) -> OperandError:
    """The error to raise where a run was cut that is not to be continued."""
    return OperandError(
        f"out: an unfinished run of {out} is stored at {at}; continue it with --resume, or start over with --overwrite"
    )


def begun_otherwise(at: Path) -> OperandError:
    """The error to raise where the run to be continued is another one."""
    return OperandError(
        f"out: the unfinished run at {at} was started with other options or another source; start over with --overwrite"
    )


def lock(journal: Path, flags: int, out: Path) -> Any:
    """The journal, open for appending and locked.

    Raises:
        OperandError: another process holds it. FileNotFoundError: it is not there, and `flags` do not create it.
    """
    while True:
        file = os.fdopen(os.open(journal, flags | os.O_APPEND | os.O_NOFOLLOW, 0o644), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(journal)):
                    return file
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OperandError(f"out: another run is writing {out} at this moment; wait for it, or stop it") from None
            raise
        file.close()  # between opening and locking it, the run that held it ended and removed it: look again


def read_journal(file: Any, path: Path) -> tuple[str | None, dict[str, Done], int]:
    """The fingerprint of a journal, its finished units, and its length in bytes up to the end of its last whole line.

    The fingerprint is None, and the length 0, where it is empty or was cut in its first line, as a power failure may do.

    Raises:
        OperandError: it is not a journal of ours.
    """
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    if not whole:
        begun = text.rstrip(b"\0")
        if not begun.startswith(JOURNAL_HEAD) and not JOURNAL_HEAD.startswith(begun):
            raise not_ours(path)
        return None, {}, 0
    lines = [_record(line) for line in whole.splitlines()]
    if lines[0].get("slidesparse") != 1 or not isinstance(lines[0].get("fingerprint"), str):
        raise not_ours(path)
    done = {}
    for record in lines[1:]:
        unit, spans, crc = record.get("unit"), record.get("spans"), record.get("crc")
        spans = spans if isinstance(spans, list) else []
        well = all(isinstance(span, list) and [*map(type, span)] == [str, int, int] for span in spans)
        if spans and well and isinstance(unit, str) and isinstance(crc, int):
            done[unit] = Done(spans, crc)
    return lines[0]["fingerprint"], done, len(whole)


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def clear_leftovers(out: Path) -> None:
    """Remove what a run leaves that was killed after OUT was in its place; nothing where there is no journal.

    Raises:
        OperandError: another run is at work, or the journal is not one of ours.
    """
    folder, journal, aside = _places(out)
    if journal.is_symlink() or not journal.is_file():
        return
    with contextlib.suppress(FileNotFoundError), lock(journal, os.O_RDWR, out) as file:
        if read_journal(file, journal)[0] is not None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
            journal.unlink(missing_ok=True)


def write_layout(
    layout: Layout,
    staging: Staging,
    *,
    workers: int,
    memory: int,
    unit_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Make every piece of every shard that the journal does not hold already, several at a time.

    Args:
        workers: threads. The first failure in plan order is raised, after the pieces in flight have ended.
        memory: bytes that pieces under way may take together; a piece alone may take more, for a row is never cut.
        unit_bytes: source bytes in one piece of work.
        progress: called with the source bytes of each piece that is done.
    """
    with ThreadPoolExecutor(workers) as pool:
        for shard in layout.shards:
            writer = _open_writer(shard, staging)
            try:
                _write_shard(
                    shard, writer, staging, pool, min(3 * workers * unit_bytes, memory // COPIES), unit_bytes, progress
                )
            finally:  # what it replaces must not be lost to a power failure
                writer.close(sync=os.path.lexists(staging.out))
    for file in layout.files:
        file.write(staging.folder)
    _sync_folder(staging.folder)


def _write_shard(
    shard: Shard,
    writer: SafetensorsWriter,
    staging: Staging,
    pool: ThreadPoolExecutor,
    most: int,
    unit_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """One shard, with pieces of at most `most` source bytes under way, or one piece."""
    flight: deque[tuple[Future[list[Done]], list[str], int]] = deque()
    waiting: list[tuple[str, Item, int, int]] = []  # small units, for one thread to do in one go
    flying = held = 0

    def land() -> None:
        nonlocal flying
        future, units, count = flight.popleft()
        flying -= count
        staging.finish(dict(zip(units, future.result(), strict=True)))
        progress(count)

    def take_off() -> None:
        nonlocal waiting, flying, held
        while flight and flying + held > most:
            land()
        if waiting:
            work = [unit[1:] for unit in waiting]
            flight.append((pool.submit(_write_all, writer, work), [unit for unit, *_ in waiting], held))
        waiting, flying, held = [], flying + held, 0

    try:
        for index, item in enumerate(shard.items):
            for first, last in row_ranges(item.rows, item.row_bytes, unit_bytes):
                unit, count = f"{shard.name}/{index}/{first}-{last}", (last - first) * item.row_bytes
                if unit in staging.done and _still_there(writer, staging.done[unit]):
                    progress(count)
                    continue
                if held + count > min(unit_bytes, most) or len(waiting) == MOST_UNITS:
                    take_off()
                waiting.append((unit, item, first, last))
                held += count
        take_off()
        while flight:
            land()
    finally:  # the writer must outlive the work in flight
        for future, *_ in flight:
            future.cancel()
        wait([future for future, *_ in flight])


def _open_writer(shard: Shard, staging: Staging) -> SafetensorsWriter:
    """The shard's file in the partial folder: as an earlier run left it, or new."""
    path = staging.folder / shard.name
    if staging.resumed and path.exists():
        with contextlib.suppress(FormatError):  # killed while the file was being laid out: make it again
            return SafetensorsWriter(path, shard.entries, shard.metadata, resume=True)
    return SafetensorsWriter(path, shard.entries, shard.metadata)


def _write_all(writer: SafetensorsWriter, work: list[tuple[Item, int, int]]) -> list[Done]:
    """Make units of work, those of one key together, and put them in their places."""
    groups: dict[object, list[int]] = {}
    for at, (item, first, last) in enumerate(work):
        if item.key is not None and last - first == item.rows:
            groups.setdefault(item.key, []).append(at)
    made: dict[int, Iterable[Piece]] = {}
    for group in groups.values():
        if len(group) > 1 and (together := work[group[0]][0].together) is not None:
            with contextlib.suppress(SlideSparseError):  # each alone will say what is wrong with it
                made.update(zip(group, together([work[at][0] for at in group]), strict=True))
    return [_write(writer, made.get(at) or item.make(first, last)) for at, (item, first, last) in enumerate(work)]


def _write(writer: SafetensorsWriter, pieces: Iterable[Piece]) -> Done:
    """Put one unit of work in its place."""
    spans, crc = [], 0
    for name, offset, data in pieces:
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
