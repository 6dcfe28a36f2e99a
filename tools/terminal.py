"""What every command shares: sizes in and out, a progress bar on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

command = functools.partial(click.command, context_settings={"help_option_names": ["-h", "--help"]})
"""`click.command` for a command that is a script, too, and takes -h there as well."""

_DECIMAL = {unit: 1000**i for i, units in enumerate(("b", "k kb", "m mb", "g gb", "t tb")) for unit in units.split()}
_BINARY = {unit: 1024**i for i, unit in enumerate(("", "kib", "mib", "gib", "tib"))}
_UNITS = {**_DECIMAL, **_BINARY}


def say(text: str, *, err: bool = False) -> None:
    """Print a line; control characters, which names in an untrusted file may hold, are escaped."""
    click.echo(clean(text), err=err)


def clean(text: str) -> str:
    """`text` with everything but printable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases of click
    """Bytes: a number with an optional unit, 500MB, 2GiB, 5GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if not match or match[2].lower() not in _UNITS:
            self.fail(f"{value!r} is not a size such as 500MB or 2GiB", param, ctx)
        if (size := float(match[1]) * _UNITS[match[2].lower()]) > 2**62:
            self.fail(f"{value!r} is larger than any machine", param, ctx)
        return int(size)


def size_text(count: float) -> str:
    """Bytes for a reader: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count(number: int, noun: str, many: str = "") -> str:
    """ "1 module", "2 modules"; `many` for a plural without s."""
    return f"{number:,} {noun if number == 1 else many or f'{noun}s'}"


@contextlib.contextmanager
def progress_bar(show: bool, counted: str = "") -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr with time left, one line a phase, of bytes and their rate, or of what is `counted`.

    Yields what `Run(progress=...)` takes.
    """
    if not show:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    amount = (MofNCompleteColumn(), TextColumn(counted)) if counted else (DownloadColumn(), TransferSpeedColumn())
    columns = TextColumn("{task.description:<10}"), BarColumn(), *amount, TimeRemainingColumn()
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as bar:

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield update


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: Sequence[int] = (0,)) -> None:
    """A table on stdout, columns numbered in `left` to the left, the others to the right; never cut by a narrow window."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(clean(str(cell))) for cell in row))
    out = Console()
    needed = sum(max(len(str(cell)) for cell in column) + 2 for column in zip(columns, *rows, strict=True))
    Console(width=max(out.width, needed), highlight=False).print(table)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror}); name another place", str(path)) from error
