"""Write a checkpoint larger than memory, a piece at a time, into a `Staging`.

On resume every piece that the journal lists is read back and checked; what is missing or torn is written again. Pieces depend
only on the plan, so the result does not depend on when or how often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from ..checkpoint.safetensors_writer import SafetensorsWriter
from ..errors import FormatError, SlideSparseError
from .layout import Item, Layout, Piece, Shard, row_ranges
from .staging import Done, Staging, sync_folder

MOST_UNITS = 256
"""Units of work, however small, that a thread does in one go."""

COPIES = 16
"""Memory that a piece takes while it is made, in times its source: a float32 copy, scores, results, what they pass through."""


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
    sync_folder(staging.folder)


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
