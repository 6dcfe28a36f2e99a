"""The output of a conversion as it grows, beside OUT and under a lock, so that it can be killed at any moment and resumed.

    OUT.partial/    every shard at full size from the start, filled piece by piece (write)
    OUT.journal     line 1: fingerprint of source, options and layout; then one line a finished piece, with its CRC-32
    OUT.replaced    what was at OUT, between two renames

A finished output is renamed to OUT in one step, so OUT is whole or absent. The journal vouches for what is beside it: nothing
else there is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors_writer import naming
from ..errors import OperandError
from .layout import Layout

JOURNAL_HEAD = b'{"slidesparse": 1, "fingerprint": "'
"""How every journal begins."""


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
        OperandError: an unfinished or a running job is there, or something that is not ours.
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
        sync_folder(self.out.parent)
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


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
