"""What commands that convert a checkpoint share: options, and the report on every module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import slidesparse_nb as ss

from .terminal import Size, print_json, write_json

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.option(
        "--targets", multiple=True, metavar="NAME", help="Only these modules: exact, glob ('*q_proj'), or 're:...'. Repeatable."
    ),
    click.option("--ignore", multiple=True, metavar="NAME", help="Leave these modules dense. Repeatable."),
    click.option("--max-shard-size", type=Size(), help="Bytes of one output file in a folder.  [default: 5GB]"),
    click.option("--resume", is_flag=True, help="Continue an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace OUT if this tool wrote it; start over an unfinished run."),
    click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write the whole report as JSON."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table."),
    click.option("-q", "--quiet", is_flag=True, help="No progress, no table."),
    click.option("-v", "--verbose", count=True, help="List every module; -vv also where an error came from."),
)


def conversion(function: F) -> F:
    """Give a command these options."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def tell(done: ss.Report, report: Path | None, as_json: bool, quiet: bool, in_words: Callable[[], None]) -> None:
    """Report in the form that the options of `conversion` name."""
    if report is not None:
        write_json(report, done.as_dict())
    if as_json:
        print_json(done.as_dict())
    elif not quiet:
        in_words()


def check_report(report: Path, source: Path, overwrite: bool) -> None:
    """Refuse a place for the report before the work begins, not after it."""
    where, origin = report.absolute(), source.resolve()
    if not where.parent.is_dir() or not os.access(where.parent, os.W_OK):
        raise click.BadParameter(f"{where.parent} is no folder that can be written", param_hint="--report")
    if where.resolve() == origin or origin in where.resolve().parents:
        raise click.BadParameter(f"{report} is in the source", param_hint="--report")
    if where.exists() and not (overwrite and where.suffix == ".json"):
        raise click.BadParameter(f"{report} exists; --overwrite replaces a .json file", param_hint="--report")
