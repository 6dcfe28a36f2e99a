"""Show what a checkpoint holds: python tools/show.py PATH, or slidesparse show."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

import re
from dataclasses import asdict
from pathlib import Path

import click

import slidesparse_nb as ss

from .exit_codes import EXIT_CODES, exits
from .terminal import command, count, print_json, print_table, progress_bar, say, size_text

ITSELF = "-"


@command(epilog=EXIT_CODES)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--verify",
    is_flag=False,
    flag_value=ITSELF,
    metavar="[DENSE]",
    help="Prove a packed checkpoint against itself, or against its dense source.",
)
@click.option(
    "--unpack",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Write a packed checkpoint back dense.",
)
@click.option("--overwrite", is_flag=True, help="Let --unpack replace OUT.")
@click.option("--resume", is_flag=True, help="Let --unpack continue an interrupted run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", count=True, help="-vv shows where an error came from.")
@exits
def show(
    path: Path, verify: str | None, unpack: Path | None, overwrite: bool, resume: bool, as_json: bool, quiet: bool, verbose: int
) -> None:
    """What PATH (a .safetensors file, a folder, an index file) holds.

    A packed checkpoint: every module, its pattern, type and size. A dense one: which patterns its weights already satisfy.
    """
    if unpack is None and (overwrite or resume):
        raise click.UsageError("--overwrite and --resume go with --unpack")
    if verify not in (None, ITSELF) and not (verify and Path(verify).exists()):
        raise click.BadParameter(f"{verify!r} does not exist", param_hint="--verify")
    with progress_bar(not quiet) as progress:
        proof = result = facts = None
        if verify is not None:
            proof = ss.verify_checkpoint(path, None if verify == ITSELF else verify, progress=progress)
        if unpack is not None:
            result = ss.unpack_checkpoint(path, unpack, ss.Run(overwrite=overwrite, resume=resume, progress=progress))
        if verify is None and unpack is None:
            facts = ss.inspect_checkpoint(path, progress=progress)
    if as_json:
        told = {"verify": proof and asdict(proof), "unpack": result and result.as_dict()}
        print_json(asdict(facts) if facts else {key: value for key, value in told.items() if value})
        return
    if proof is not None:
        say(_proof_text(proof))
    if result is not None:
        say(_unpacked_text(result))
    if facts is not None:
        _print(facts)


def _unpacked_text(result: ss.Report) -> str:
    what = f"{count(len(result.modules), 'module')} unpacked"
    if result.already_complete:
        return f"{result.output} is complete already"
    return f"{what}; wrote {size_text(result.output_bytes)} to {result.output}"


def _proof_text(proof: ss.Verification) -> str:
    text = f"verified: {count(proof.modules, 'module')}, {proof.weights:,} weights in canonical form"
    if not proof.against_source:
        text += "; values were not compared, since no source is given"
    else:
        how = f" ({'by' if proof.by_magnitude else 'not by'} magnitude)" if proof.pruned else ""
        text += f"; every stored weight is its source's: {proof.pruned:,} of the source were pruned{how},"
        text += f" {proof.rounded:,} round to zero, pruned or not; {count(proof.copies, 'other tensor')} equal byte for byte"
    return text


def _print(facts: ss.Facts) -> None:
    rows = []
    for m in facts.modules:
        state = f"packed {m.packed}" if m.packed else "dense"
        satisfies = "" if m.packed else ", ".join(m.satisfies) or "none"
        zeros = "" if m.zeros is None else f"{100 * m.zeros:.1f} %"
        sizes = (m.size, m.stored, size_text(m.bytes), f"{m.bits_per_weight:.2f}")
        rows.append((m.name, state, *sizes, zeros, satisfies, m.reason))
    rows.sort(key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row[0])])
    head = ("module", "state", "n x k", "type", "bytes", "bits/weight", "zeros", "satisfies", "would stay dense")
    used = [i for i, name in enumerate(head) if i == 0 or any(row[i] for row in rows)]
    if rows:
        left = [j for j, i in enumerate(used) if i in (0, 1, 7, 8)]
        print_table([head[i] for i in used], [[row[i] for i in used] for row in rows], left=left)
    packed = [m for m in facts.modules if m.packed]
    dense = [m for m in facts.modules if not m.packed]
    say(
        f"{facts.path}: {facts.tensors} tensors, {size_text(facts.bytes)} in {count(facts.files, 'file')};"
        f" {count(len(packed), 'packed module')} ({size_text(sum(m.bytes for m in packed))}),"
        f" {count(len(dense), 'dense matrix', 'dense matrices')} ({size_text(sum(m.bytes for m in dense))}),"
        f" {count(facts.other_tensors, 'other tensor')} ({size_text(facts.other_bytes)})"
    )
    for note in facts.notes:
        say(f"note: {note}")


if __name__ == "__main__":
    show(prog_name="show.py")
