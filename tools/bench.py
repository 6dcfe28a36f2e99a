"""Check, then time, then show: python tools/bench.py, or slidesparse bench. docs/benchmarks.md tells how.

python tools/bench.py --quick                         under a minute: 6:8 against dense, three types, three m
python tools/bench.py --full --json run.json --plot run.png
python tools/bench.py --model qwen2.5-7b --pattern 6:8 --dtype fp8 -m 16,1024 --part gemm --peers dense
python tools/bench.py -m 1-64,72-256:8 --dtype fp8 --plot curve.png   time over m as a curve
python tools/bench.py --engine vllm --model qwen2.5-7b --json served.json   whole models in vLLM
python tools/bench.py --from run.json --plot run.png  no GPU needed
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

import contextlib
import importlib
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

import slidesparse_nb as ss

from .arguments import Listed, Seconds, Shape, Tokens, one_of
from .benchmark import show
from .benchmark.cases import KINDS, MODELS, PARTS, SQUARES, Linear, Selection, Suite
from .benchmark.engines import ENGINES, MEASURED
from .benchmark.measure import Tell, measure
from .benchmark.peers import FULL, PEERS, QUICK, default
from .benchmark.processes import measure_engines
from .benchmark.results import Results, load
from .documents import rewrite
from .exit_codes import EXIT_CODES, exits
from .terminal import command, say

LONGEST = 540.0
"""Seconds a run may take that names its own measurements."""

LINEARS = ("square", "shape", "tokens", "part", "peers", "sustained", "quick", "full")
MEASURE = ("model", "pattern", "dtype", "engine", "rounds", "budget", *LINEARS)
"""Parameters that say what to measure: of linear layers alone; and all."""

READ, WRITTEN = (click.Path(exists=exists, dir_okay=False, path_type=Path) for exists in (True, False))


@command(epilog=EXIT_CODES)
@click.option("--model", type=Listed("names", one_of(MODELS)), help=f"Linear layers of {', '.join(MODELS)}.")
@click.option("--square", is_flag=True, help="m = n = k: 1024 to 16384.")
@click.option("--shape", type=Shape(), multiple=True, help="A layer of your own. Repeatable.")
@click.option(
    "-m",
    "tokens",
    type=Tokens(),
    help="Tokens: 1,16,64; ranges, 1-64; with a step, 64-1024:32. Many give a curve, time over m.",
)
@click.option(
    "--pattern",
    type=Listed("patterns", lambda text: str(ss.Pattern.of(text))),
    help="Non-zeros:total: 6:8,2:4; most telling first.",
)
@click.option("--dtype", type=Listed("types", one_of(KINDS)), help=f"Of {', '.join(KINDS)}.")
@click.option("--part", type=Listed("parts", one_of(PARTS)), help="; ".join(f"{k}: {v}" for k, v in PARTS.items()) + ".")
@click.option(
    "--peers",
    type=Listed("names", one_of([*PEERS, "none"])),
    help="; ".join(f"{k}: {v.words}" for k, v in PEERS.items()) + "; or none.",
)
@click.option("--engine", type=Listed("names", one_of(ENGINES)), help=f"Whole models in {', '.join(ENGINES)}, random weights.")
@click.option("--rounds", type=click.IntRange(min=1), help="With --engine: how often each is measured, in turn.  [default: 1]")
@click.option("--sustained", type=Tokens(), help="m of -m at which sustained load is measured, too.")
@click.option("--quick", is_flag=True, help="Under a minute; what --full measures is cut to the most telling.  [default]")
@click.option("--full", is_flag=True, help="Under nine minutes: every part of 6:8, products of four patterns, all types.")
@click.option("--budget", type=Seconds(min=1), help="Seconds after which nothing more is begun.")
@click.option("--json", "json_path", type=WRITTEN, help="Keep the results here, as they come.")
@click.option("--plot", type=WRITTEN, help="Draw times and speed-ups of the products over m; a PNG.")
@click.option("--from", "from_path", type=READ, help="Show earlier results.")
@click.option("--readme", "readme_path", type=READ, help="Write README's section from these results.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@click.option("-v", "--verbose", count=True, help="Every layer by itself, and every m; -vv also where an error came from.")
@exits
def bench(
    json_path: Path | None, plot: Path | None, from_path: Path | None, readme_path: Path | None, quiet: bool, verbose: int,
    **asked: Any,
) -> None:  # fmt: skip
    """Check and time sparse products on the GPU, beside dense cuBLASLt and cuSPARSELt, or whole models in an engine.

    Every result is compared with the reference before it is timed. Named options replace those of --quick or --full.
    """
    named = [name for name in MEASURE if asked[name]]
    if readme_path is not None:
        if named or json_path or from_path or plot or quiet or verbose:
            raise click.UsageError("--readme stands alone")
        _write_readme(readme_path)
    elif from_path is not None:
        if named or json_path:
            raise click.UsageError("--from measures nothing, and goes with --plot and -v only")
        draw, results = _drawing(plot, from_path), load(from_path)
        show.show(results, each=verbose > 0)
        draw(results)
    else:
        selection = _selection(asked)
        if plot is not None and not (selection.engines or ("gemm" in selection.parts and "dense" in selection.peers)):
            raise click.UsageError("--plot draws products over the dense baseline: measure --part gemm --peers dense, too")
        _can_be_written("--json", json_path)
        draw = _drawing(plot, json_path)
        results = Results(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine={},
            selection=selection.as_dict(),
            suites={suite.name: list(suite.linears) for suite in selection.suites},
        )
        tell: Tell = (lambda text: None) if quiet else lambda text: say(text, err=True)
        try:
            (measure_engines if selection.engines else measure)(results, selection, json_path, tell)
        finally:  # also of a run that is stopped
            if results.cells:
                show.show(results, each=verbose > 0)
            if results.wrong:
                with contextlib.suppress(Exception):  # whatever the picture lacks, wrong results come first
                    draw(results)
                _refuse(results)
        draw(results)


def _refuse(results: Results) -> None:
    first = results.wrong[0]
    raise ss.VerificationError(
        f"{len(results.wrong)} results are wrong and have no time, the first {first.part} {first.type} {first.pattern}"
        f" {first.layer} m={first.m}: {first.blank}"
    )


def _selection(asked: dict[str, Any]) -> Selection:
    """What the options name, the preset for the rest."""
    if asked["quick"] and asked["full"]:
        raise click.UsageError("give --quick or --full, not both")
    if asked["engine"]:
        _require_served(asked)
    elif asked["rounds"]:
        raise click.UsageError("--rounds goes with --engine")
    preset = FULL if asked["full"] else QUICK
    suites = [MODELS[name] for name in asked["model"] or ()]
    suites += [Suite(f"{n} x {k}", (Linear("shape", n, k),)) for n, k in dict.fromkeys(asked["shape"])]
    suites += SQUARES if asked["square"] else ()
    peers = asked["peers"] or tuple(default(preset.peers))
    if "none" in peers and len(peers) > 1:
        raise click.UsageError("--peers: none goes with no other")
    tokens, sustained = asked["tokens"] or preset.tokens, asked["sustained"] or ()
    if lacking := [m for m in sustained if m not in tokens]:
        raise click.UsageError(f"--sustained: m={lacking[0]} is not among those of -m")
    own = any(asked[name] for name in MEASURE if name != "budget") and not asked["quick"] and not asked["full"]
    return Selection(
        suites=tuple(suites) or preset.suites,
        patterns=asked["pattern"] or preset.patterns,
        kinds=tuple(KINDS[key] for key in asked["dtype"] or ()) or preset.kinds,
        tokens=() if asked["engine"] else tokens,
        parts=("prefill", "decode") if asked["engine"] else asked["part"] or preset.parts,
        peers={name: PEERS[name] for name in peers if name in PEERS and not asked["engine"]},
        sustained=sustained or tuple(m for m in preset.sustained if m in tokens),
        budget=asked["budget"] or (LONGEST if own else preset.budget),
        products_only=not asked["part"],
        engines=asked["engine"] or (),
        rounds=asked["rounds"] or 1,
    )


def _require_served(asked: dict[str, Any]) -> None:
    """UsageError where the options name what is not measured in an engine."""
    if any(asked[name] for name in LINEARS):
        raise click.UsageError("--engine measures whole models: name --model, --pattern, --dtype, --rounds, --budget alone")
    for option, known in MEASURED.items():
        if unknown := [name for name in asked[option[2:]] or () if name not in known]:
            raise click.UsageError(f"{option}: {unknown[0]!r} is not measured in an engine; {', '.join(known)} are")


def _can_be_written(option: str, path: Path | None) -> None:
    if path is None:
        return
    if not path.name or (path.exists() and not path.is_file()):
        raise click.UsageError(f"{option}: {str(path)!r} is not the name of a file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise click.UsageError(f"{path}: {path.absolute().parent} is no folder that can be written")


def _drawing(plot: Path | None, other: Path | None) -> Callable[[Results], None]:
    """What draws the picture; whatever can be known to fail is refused before anything is measured."""
    if plot is None:
        return lambda results: None
    _can_be_written("--plot", plot)
    if plot.suffix.lower() != ".png":
        raise click.UsageError(f"--plot: {plot} must end in .png")
    if other is not None and plot.resolve() == other.resolve():
        raise click.UsageError(f"--plot: {plot} is the file of the results, too; give it a name of its own")
    try:
        picture = importlib.import_module(".benchmark.picture", __package__)
    except ImportError as error:
        raise click.ClickException(
            f"--plot needs matplotlib, which cannot be imported ({error}); pip install matplotlib"
        ) from None
    return lambda results: picture.draw(results, plot)


def _write_readme(path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    where = root / "README.md"
    if not where.exists():
        raise click.UsageError("--readme works in a checkout, where README.md is")
    if path.resolve() not in [root / each for each in show.PUBLISHED]:
        raise click.UsageError(f"--readme: {path} is not {' or '.join(show.PUBLISHED)}, which README names as its sources")
    results = load(path)
    changed = rewrite(where, show.BEGIN.format(show.published(results)), show.END, show.section(results))
    say(f"{where}: {'rewritten' if changed else 'as it was'}")


if __name__ == "__main__":
    bench(prog_name="bench.py")
