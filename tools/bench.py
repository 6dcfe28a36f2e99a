"""Check, then time, then show: python tools/bench.py, or slidesparse bench. docs/benchmarks.md tells how.

python tools/bench.py --quick                         under a minute: 6:8 against dense, three types, three m
python tools/bench.py --full --json run.json --plot run.png
python tools/bench.py --model qwen2.5-7b --pattern 6:8 --dtype fp8 -m 16,1024 --part gemm --peers dense
python tools/bench.py -m 1-64,72-256:8 --dtype fp8 --plot curve.png   time over m as a curve
python tools/bench.py --from run.json --plot run.png  no GPU needed
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

import slidesparse_nb as ss

from .arguments import Listed, Seconds, Shape, Tokens, one_of
from .benchmark import gpu, readme, table, torch_peers
from .benchmark.floors import CEILINGS
from .benchmark.keeper import Keeper
from .benchmark.ours import Ours
from .benchmark.results import Results, load
from .benchmark.run import Bench
from .benchmark.selection import FULL, KINDS, MODELS, OURS, PARTS, PEERS, QUICK, SQUARES, Linear, Selection, Suite, plan
from .benchmark.trial import Contender
from .terminal import EXIT_CODES, command, exits, print_table, say

LONGEST = 540.0
"""Seconds a run may take that names its own measurements."""

COPIED = 1 << 30
"""Bytes of the copy whose bandwidth is the floor's."""

T = TypeVar("T")

MEASURE = ("model", "square", "shape", "tokens", "pattern", "dtype", "part", "peers", "sustained", "quick", "full", "budget")
"""Parameters that say what to measure."""


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
    help="; ".join(f"{k}: {v}" for k, v in PEERS.items()) + "; or none.",
)
@click.option("--sustained", type=Tokens(), help="m of -m at which sustained load is measured, too.")
@click.option("--quick", is_flag=True, help="Under a minute; what --full measures is cut to the most telling.  [default]")
@click.option("--full", is_flag=True, help="Under nine minutes: every part of 6:8, products of four patterns, all types.")
@click.option("--budget", type=Seconds(min=1), help="Seconds after which nothing more is begun.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results here, as they come."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the speed-ups over m, of many m the times; a PNG."
)
@click.option("--from", "from_path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Show earlier results.")
@click.option(
    "--readme",
    "readme_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Write README's section from these results.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@click.option("-v", "--verbose", count=True, help="Every layer by itself, and every m; -vv also where an error came from.")
@exits
def bench(
    json_path: Path | None, plot: Path | None, from_path: Path | None, readme_path: Path | None, quiet: bool, verbose: int,
    **asked: Any,
) -> None:  # fmt: skip
    """Check and time sparse products on the GPU, beside dense cuBLASLt and cuSPARSELt.

    Every result is compared with the reference before it is timed. Named options replace those of --quick or --full.
    """
    named = [name for name in MEASURE if asked[name]]
    if readme_path is not None or from_path is not None:
        if named or json_path or (readme_path and (from_path or plot or quiet or verbose)):
            rule = "--readme stands alone" if readme_path else "--from measures nothing, and goes with --plot and -v only"
            raise click.UsageError(rule)
        if readme_path is not None:
            _write_readme(readme_path)
            return
        assert from_path is not None
        draw = _drawing(plot, from_path)
        results, unsaved = load(from_path), None
    else:
        selection, budget = _selection(asked)
        _can_be_written("--json", json_path)
        draw = _drawing(plot, json_path, selection)
        tell: Callable[[str], None] = (lambda text: None) if quiet else (lambda text: say(text, err=True))
        results, unsaved = measure(selection, budget, json_path, tell)
    show(results, each=verbose > 0)
    _end(results, [unsaved, draw(results)])


def _selection(asked: dict[str, Any]) -> tuple[Selection, float]:
    """What the options name, the preset for the rest; and the seconds for it."""
    if asked["quick"] and asked["full"]:
        raise click.UsageError("give --quick or --full, not both")
    preset = FULL if asked["full"] else QUICK
    suites = [MODELS[name] for name in asked["model"] or ()]
    suites += [Suite(f"{n} x {k}", (Linear("shape", n, k),)) for n, k in dict.fromkeys(asked["shape"])]
    suites += SQUARES if asked["square"] else ()
    peers = asked["peers"] or preset.peers
    if "none" in peers and len(peers) > 1:
        raise click.UsageError("--peers: none goes with no other")
    tokens = asked["tokens"] or preset.tokens
    sustained = asked["sustained"] or ()
    if lacking := [m for m in sustained if m not in tokens]:
        raise click.UsageError(f"--sustained: m={lacking[0]} is not among those of -m")
    selection = Selection(
        suites=tuple(suites or (MODELS[name] for name in preset.models)),
        patterns=asked["pattern"] or preset.patterns,
        kinds=tuple(KINDS[key] for key in asked["dtype"] or preset.kinds),
        tokens=tokens,
        parts=asked["part"] or preset.parts,
        peers=() if "none" in peers else peers,
        sustained=sustained or tuple(m for m in preset.sustained if m in tokens),
        products_only=not asked["part"],
    )
    own = any(asked[name] for name in MEASURE if name != "budget") and not asked["quick"] and not asked["full"]
    return selection, asked["budget"] or (LONGEST if own else preset.budget)


def _can_be_written(option: str, path: Path | None) -> None:
    if path is None:
        return
    if not path.name or (path.exists() and not path.is_file()):
        raise click.UsageError(f"{option}: {str(path)!r} is not the name of a file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise click.UsageError(f"{path}: {path.absolute().parent} is no folder that can be written")


def _drawing(
    plot: Path | None, other: Path | None, selection: Selection | None = None
) -> Callable[[Results], Exception | None]:
    """What draws the picture and returns what went wrong; whatever can be known of that before measuring, is."""
    if plot is None:
        return lambda results: None
    _can_be_written("--plot", plot)
    if plot.suffix.lower() != ".png":
        raise click.UsageError(f"--plot: {plot} must end in .png")
    if other is not None and plot.resolve() == other.resolve():
        raise click.UsageError(f"--plot: {plot} is the file of the results, too; give it a name of its own")
    if selection is not None and not ("gemm" in selection.parts and "dense" in selection.peers):
        raise click.UsageError("--plot draws products over the dense peer: measure --part gemm --peers dense, too")
    try:
        picture = importlib.import_module(".benchmark.picture", __package__)
    except ImportError as error:
        raise click.ClickException(
            f"--plot needs matplotlib, which cannot be imported ({error}); pip install matplotlib"
        ) from None

    def draw(results: Results) -> Exception | None:
        try:
            picture.draw(results, plot)
        except Exception as error:  # the run is measured: whatever the picture lacks, the rest is told
            return error
        return None

    return draw


def _end(results: Results, failed: list[Exception | None]) -> None:
    """Raise what went wrong, wrong results first; the rest is told."""
    errors = [error for error in failed if error is not None]
    if wrong := results.wrong:
        first = wrong[0]
        errors.insert(0, ss.VerificationError(
            f"{len(wrong)} results are wrong and have no time, the first {first.part} {first.type} {first.pattern}"
            f" {first.layer} m={first.m}: {first.blank}"
        ))  # fmt: skip
    for error in errors[1:]:
        say(f"error: {error}", err=True)
    if errors:
        raise errors[0]


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    selection: Selection, budget: float, json_path: Path | None, tell: Callable[[str], None]
) -> tuple[Results, OSError | None]:
    """Run everything; the file, if any, is whole after every group. Also returns why the file lacks something, if it does.

    Raises:
        click.UsageError: the file cannot be written, which is found out before anything is measured.
    """
    began = time.perf_counter()
    device = gpu.open_gpu()
    contenders: dict[str, Contender | str] = {OURS: Ours(device)}
    results = Results(
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=device.facts(),
        selection={**selection.as_dict(), "budget_s": budget},
        suites={suite.name: [(x.name, x.n, x.k) for x in suite.linears] for suite in selection.suites},
    )
    keeper = Keeper(results, json_path, tell)
    keeper.begin()
    results.ceilings = CEILINGS.get(results.machine["gpu"], {})
    if not results.ceilings:
        results.note(f"no ceiling of the sparse instruction is known for {results.machine['gpu']}: floors count bytes alone")
    groups = plan(selection)
    beside = ThreadPoolExecutor(1)  # compiles while PyTorch is imported
    compiled = beside.submit(device.compile_ahead, groups)
    if selection.peers:
        contenders.update(peers(device, selection, results))
    for name, read in (("copy", device.copy_bandwidth), ("read", device.read_bandwidth)):
        try:
            results.bandwidth[name] = read(COPIED)
        except Exception as error:  # too little memory: no floors, but everything else
            results.note(f"{name} bandwidth: not measured ({type(error).__name__}: {str(error)[:120]})")
    device.free()
    if (failed := compiled.exception()) is not None:
        results.note(f"kernels were not compiled ahead ({type(failed).__name__}: {' '.join(str(failed).split())[:120]})")
    beside.shutdown()
    tell(table.machine_line(results))

    def stop(*_: object) -> NoReturn:
        raise SystemExit(143)

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if here else None  # as `timeout` sends it: keep what there is
    try:
        Bench(device, contenders, results, budget, began, keeper.save, tell).run(groups)
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)
        results.seconds = round(time.perf_counter() - began, 1)
        keeper.save(at_once=True)
        results.machine["after"] = device.state()
        keeper.save(at_once=True)
    return results, keeper.failed


def peers(device: gpu.Gpu, selection: Selection, results: Results) -> dict[str, Contender | str]:
    """PyTorch's peers under their names; the reason in their place if they cannot be had."""
    try:
        torch = torch_peers.TorchPeers(device.stream.ptr)
    except Exception as error:  # ImportError, or whatever a broken installation raises
        reason = f"PyTorch cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        results.note(f"no peers: {reason}")
        return dict.fromkeys(selection.peers, reason)
    results.machine.update(torch.facts())
    return dict.fromkeys(selection.peers, torch)


# ---- showing ---------------------------------------------------------------------------------------------------------


def show(results: Results, *, each: bool) -> None:
    """Tables, crossovers, cliffs, notes and blanks on stdout."""
    say(table.machine_line(results))
    for title, columns, rows in table.sections(results, each=each):
        say("")
        say(title)
        print_table(columns, rows)
    sentences = [*table.crossovers(results), *table.cliffs(results)]
    for heading, lines in (("", sentences), ("notes", results.notes), ("", list(table.blanks(results)))):
        if lines:
            say(heading)
        for line in lines:
            say(line)
    seconds = f"{results.seconds:.0f} s" + ("" if results.complete else "; not everything was measured")
    say("")
    say(f"took {seconds}; where dense is faster see docs/benchmarks.md")


def _write_readme(path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    where = root / "README.md"
    if not where.exists():
        raise click.UsageError("--readme works in a checkout, where README.md is")
    if path.resolve() != root / readme.PUBLISHED:
        raise click.UsageError(f"--readme: {path} is not {readme.PUBLISHED}, which README names as its source")
    changed = readme.rewrite(where, load(path))
    say(f"{where}: {'rewritten' if changed else 'as it was'}")


if __name__ == "__main__":
    bench(prog_name="bench.py")
