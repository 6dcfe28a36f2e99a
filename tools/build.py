"""Compile the GPU kernels for named architectures, on any machine: python tools/build.py, or slidesparse build."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

import re
from dataclasses import asdict
from typing import Any

import click

import slidesparse_nb as ss

from .exit_codes import exits
from .terminal import command, print_json, print_table, progress_bar

COLUMNS = ("arch", "pattern", "dtype", "configuration", "registers", "spilled B", "stack B", "shared B", "sparse MMA", "serial")


def _capability(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)a?", text)):  # the kernels decide which targets they need
        raise click.BadParameter(f"{text!r} is not an architecture such as sm_90")
    return int(match[1]), int(match[2])


def _told(value: Any) -> Any:
    return "-" if value is None else ("no", "yes")[value] if isinstance(value, bool) else value


@command(
    epilog="Exit codes: 0 done; 1 a kernel spills, holds no sparse instruction, or lets each wait for the last; 2 wrong usage; "
    "5 unsupported."
)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="sm_90",
    help="Architecture, with or without an a at its end; may be repeated. Default: sm_80 to sm_121.",
)
@click.option("--pattern", "patterns", multiple=True, metavar="6:8", help="Pattern; may be repeated. Default: 2:4 to 14:16.")
@click.option("--dtype", "dtypes", multiple=True, metavar="int8", help="Type of the weights; may be repeated. Default: all.")
@click.option("--out", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--jobs", "workers", type=click.IntRange(1), help="Kernels at a time. Default: as many as processors.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@exits
def build(
    archs: tuple[str, ...], patterns: tuple[str, ...], dtypes: tuple[str, ...], out: str, workers: int | None, as_json: bool
) -> None:
    """Compile every kernel into the cache, without a GPU, and print what the compiler made of each."""
    chosen: dict[str, Any] = {"capabilities": [_capability(a) for a in archs], "patterns": [ss.Pattern.of(p) for p in patterns]}
    chosen["dtypes"] = list(dtypes)
    with progress_bar(True, "kernels") as progress:
        named = {name: given for name, given in chosen.items() if given}
        reports = ss.build_kernels(**named, out=out, workers=workers, progress=progress)
    if as_json:
        print_json([asdict(r) for r in reports])
    else:
        print_table(COLUMNS, [[_told(v) for v in asdict(r).values()] for r in reports], left=(0, 1, 2, 3))
        if all(r.sparse is None for r in reports):
            click.echo("sparse MMA: not looked for, since NVIDIA's nvdisasm was not found", err=True)
    raise SystemExit(0 if all(r.good for r in reports) else 1)


if __name__ == "__main__":
    build(prog_name="build.py")
