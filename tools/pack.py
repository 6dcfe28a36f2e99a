"""Pack a checkpoint: python tools/pack.py INPUT [-o OUT], or slidesparse pack."""

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
from .terminal import Size, command, count, print_table, progress_bar, say, size_text

SCHEMES = ("auto", *ss.Scheme.names(), "int8", "fp8")


@command(epilog=EXIT_CODES)
@click.argument("input", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder, or .safetensors file; default: beside INPUT.")
@click.option("--pattern", help="Non-zeros:total of each group along k.  [default: 6:8]")
@click.option("--zeros", type=int, help="With --group: the pattern by its zeros; --zeros 2 --group 8 is 6:8.")
@click.option("--group", type=int, help="See --zeros.")
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES, case_sensitive=False),
    default="auto",
    show_default=True,
    help="Type of weights and activations; auto keeps the source's (float32 becomes bfloat16).",
)
@click.option(
    "--prune",
    metavar="METHOD",
    default="none",
    show_default=True,
    help="What to do with weights that break the pattern: none refuses them; magnitude or random prunes them.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of --prune random.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["packed", "dense"]),
    default="packed",
    show_default=True,
    help="dense: pruned and quantized weights under their own names, for stock engines.",
)
@click.option("--max-workers", type=click.IntRange(1), help="Threads.  [default: all cores]")
@click.option(
    "--max-memory", type=Size(), default="2GiB", show_default=True, help="Memory to work in, the largest tensor apart."
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Prove the output equal to the source before it appears."
)
@click.option(
    "--strict/--skip-bad", default=True, show_default=True, help="Fail on modules that cannot be packed, or leave them dense."
)
@conversion
@exits
def pack(
    input: Path, output: Path | None, quiet: bool, verbose: int, as_json: bool, report: Path | None, dry_run: bool, **given: Any
) -> None:
    """Pack the linear layers of a checkpoint into (2N-2):2N sparse form.

    INPUT is a .safetensors file, a Hugging Face folder, an index file, or a .gguf file (llama, qwen2, qwen3). Embeddings,
    heads, norms, routers and biases pass through unchanged.
    """
    if given["prune"] == "wanda":
        raise click.UsageError(
            "--prune wanda needs norms of activations; run `slidesparse prune --method wanda`, and pack that"
        )
    options = ss.Options(
        pattern=_pattern(given["pattern"], given["zeros"], given["group"]),
        scheme=given["scheme"],
        prune=given["prune"],
        seed=given["seed"],
        targets=given["targets"],
        ignore=given["ignore"],
        format=given["format_"],
        max_shard_size=given["max_shard_size"],
        skip_bad=not given["strict"],
    )
    if report is not None:
        check_report(report, input, given["overwrite"])
    with progress_bar(not quiet) as progress:
        keys = ("max_workers", "max_memory", "resume", "overwrite", "verify")
        run = ss.Run(**{key: given[key] for key in keys}, progress=progress)
        done = ss.pack_checkpoint(input, output, options, run, dry_run=dry_run)
    tell(done, report, as_json, quiet, lambda: _print(done, options.pattern, verbose))
    if done.refused:
        first = done.refused[next(iter(done.unsupported or done.refused))]
        kind = ss.UnsupportedError if done.unsupported else ss.PatternError
        total = len({*done.refused, *(m.name for m in done.modules)})
        way = "" if done.unsupported else "; prune with --prune magnitude, or leave such modules dense with --skip-bad"
        raise kind(f"{len(done.refused)} of {count(total, 'module')} would be refused, the first: {first}{way}")


def _pattern(pattern: str | None, zeros: int | None, group: int | None) -> ss.Pattern:
    if (zeros is None) != (group is None):
        raise click.UsageError("--zeros and --group go together: --zeros 2 --group 8 is 6:8")
    if zeros is None or group is None:
        return ss.Pattern.of("6:8" if pattern is None else pattern)
    if pattern is not None:
        raise click.UsageError("give --pattern, or --zeros and --group, not both")
    return ss.Pattern(group - zeros, group)


def _print(done: ss.Report, pattern: ss.Pattern, verbose: int) -> None:
    rows = [
        (
            m.name,
            m.size,
            f"{m.source} -> {m.stored}",
            size_text(m.source_bytes),
            size_text(m.bytes),
            f"{m.bits_per_weight:.2f}",
        )
        for m in done.modules
    ]
    if verbose or done.dry_run:
        print_table(("module", "n x k", "type", "source", "output", "bits/weight"), rows)
        for name, reason in done.left_dense.items():
            say(f"{name}: left dense ({reason})")
        for reason in done.refused.values():
            say(f"refused: {reason}")
    for reason in done.skipped.values():
        say(f"skipped: {reason}")
    for note in done.notes:
        say(f"note: {note}")
    before, after = sum(m.source_bytes for m in done.modules), sum(m.bytes for m in done.modules)
    others = f"{len(done.left_dense)} left dense" + f", {len(done.skipped)} skipped" * bool(done.skipped)
    say(
        f"{count(len(done.modules), 'module')}, {done.weights:,} weights at {pattern.described}, {done.scheme}:"
        f" {size_text(before)} -> {size_text(after)} ({8 * after / max(1, done.weights):.2f} bits a weight); {others}"
    )
    if done.format == "packed":
        say(f"k grows {done.expansion:.3g}x when slid; ideal speed-up over dense {done.ideal_speedup:.3g}x")
    copied = f" and {size_text(done.copied_bytes)} of other files" * bool(done.copied_bytes)
    if verbose or done.dry_run:
        parts = {"packed": done.packed_bytes, "left dense": done.dense_bytes, "refused": done.refused_bytes}
        sums = [f"{size_text(size)} {name}" for name, size in parts.items() if size or name != "refused"]
        say(f"of {size_text(done.source_bytes)}: {', '.join(sums)}, {size_text(done.other_bytes)} norms, biases and the like")
    if done.dry_run:
        if done.refused:
            say("dry run: a run would fail, and write nothing")
        else:
            say(f"dry run: would write {size_text(done.output_bytes)}{copied} to {done.output}")
    elif done.already_complete:
        say(f"{done.output} is complete already, and proved so")
    else:
        proof = f"verified in {done.verify_seconds:.1f} s" if done.verified else "not verified"
        rate = "" if done.resumed else f" ({done.weights_per_second / 1e6:.3g} million weights a second)"
        say(f"wrote {size_text(done.output_bytes)}{copied} to {done.output} in {done.seconds:.1f} s{rate}; {proof}")


if __name__ == "__main__":
    pack(prog_name="pack.py")
