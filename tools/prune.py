"""Prune a checkpoint: python tools/prune.py MODEL -o OUT --method sparsegpt --calibration TEXT, or slidesparse prune."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

from pathlib import Path
from typing import Any

import click

import slidesparse_nb as ss

from .conversion import check_report, conversion, tell
from .exit_codes import EXIT_CODES, exits
from .terminal import command, count, print_table, progress_bar, say, size_text

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@command(epilog=EXIT_CODES)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder, or .safetensors file; default: beside MODEL.")
@click.option("--method", type=click.Choice(["magnitude", "wanda", "sparsegpt"]), help="How to choose what goes.")
@click.option("--pattern", default="6:8", show_default=True, help="Non-zeros:total of each group along k.")
@click.option("--calibration", type=FILE, metavar="TEXT", help="Of wanda and sparsegpt: a text in UTF-8 to run the model on.")
@click.option("--tokens", type=click.IntRange(1), default=65536, show_default=True, help="Of the text, from its beginning.")
@click.option("--window", type=click.IntRange(1), default=2048, show_default=True, help="Tokens that the model reads at once.")
@click.option("--scheme", metavar="TYPE", help="Of sparsegpt: make up for rounding to INT8_W8A8, FP8_DYNAMIC ..., too.")
@click.option("--damping", type=float, help="Of sparsegpt: share of the Hessian's diagonal.  [default: 0.1]")
@click.option("--statistics", type=FILE, help="In place of a text: a file that --save-statistics made.")
@click.option(
    "--save-statistics",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Prune nothing; write statistics of the dense model on the text, for every pattern.",
)
@click.option("--scores", type=FILE, help="In place of a method: a .safetensors file of scores or 0/1 masks made elsewhere.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@conversion
@exits
def prune(
    model: Path,
    output: Path | None,
    save_statistics: Path | None,
    resume: bool,
    overwrite: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **given: Any,
) -> None:
    """Prune the linear layers of a dense checkpoint to a (2N-2):2N pattern, for `slidesparse pack`.

    The output is dense, of the types and names of MODEL. wanda and sparsegpt need a text (and PyTorch and transformers) or
    statistics made of one.
    """
    unused = {"--output": output, "--report": report, "--resume": resume or None, "--json": as_json or None}
    unused |= {f"--{name.replace('_', '-')}": given[name] for name in ("scheme", "damping", "max_shard_size")}
    if save_statistics is not None and (found := [name for name, value in unused.items() if value is not None]):
        raise click.UsageError(f"--save-statistics prunes nothing: leave out {' and '.join(found)}")
    options = ss.PruneOptions(**{**given, "method": given["method"] or ""})
    if report is not None:
        check_report(report, model, overwrite)
    with progress_bar(not quiet) as progress:
        run = ss.Run(resume=resume, overwrite=overwrite, progress=progress)
        if save_statistics is not None:
            ss.collect_statistics(model, save_statistics, options, run)
            say(f"wrote {size_text(save_statistics.stat().st_size)} to {save_statistics}")
            return
        done = ss.prune_checkpoint(model, output, options, run)
    tell(done, report, as_json, quiet, lambda: _print(done, options.pattern, verbose))


def _print(done: ss.PruneReport, pattern: ss.Pattern, verbose: int) -> None:
    if verbose:
        rows = [(m.name, m.size, m.stored, f"{done.errors[m.name]:.3g}" if m.name in done.errors else "") for m in done.modules]
        print_table(("module", "n x k", "type", "relative error"), rows)
        for name, reason in done.left_dense.items():
            say(f"{name}: left dense ({reason})")
    for note in done.notes:
        say(f"note: {note}")
    text = "{windows} windows of {window} tokens".format(**done.calibration) if done.calibration else ""
    say(
        f"{count(len(done.modules), 'module')}, {done.weights:,} weights at {pattern.described} by {done.prune}"
        f"{f' on {text}' if text else ''}; {len(done.left_dense)} left dense"
    )
    if done.errors:
        worst = max(done.errors, key=lambda name: done.errors[name])
        mean = sum(done.errors.values()) / len(done.errors)
        say(f"relative error of a layer's outputs: {mean:.3g} on average, {done.errors[worst]:.3g} at most ({worst})")
    if done.already_complete:
        say(f"{done.output} is complete already, and obeys the pattern")
    else:
        times = f"in {done.seconds:.1f} s; verified in {done.verify_seconds:.1f} s"
        say(f"wrote {size_text(done.output_bytes)} to {done.output} {times}")


if __name__ == "__main__":
    prune(prog_name="prune.py")
