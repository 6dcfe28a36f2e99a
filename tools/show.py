"""Show what a checkpoint holds: python tools/show.py PATH, or slidesparse show."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

from dataclasses import asdict
from pathlib import Path

import click

import slidesparse_nb as ss

from .terminal import EXIT_CODES, exits, print_json, print_table, progress_bar, size_text

ITSELF = "-"


@click.command(epilog=EXIT_CODES)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--verify",
    is_flag=False,
    flag_value=ITSELF,
    metavar="[DENSE]",
    help="Prove a packed checkpoint against itself, or against its dense source.",
)
@click.option(
    "--unpack", type=click.Path(path_type=Path), metavar="OUT", help="Write a packed checkpoint back dense, bit for bit."
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
    with progress_bar(not quiet) as progress:
        if unpack is not None:
            result = ss.unpack_checkpoint(path, unpack, ss.Run(overwrite=overwrite, resume=resume, progress=progress))
        if verify is not None:
            if verify != ITSELF and not Path(verify).exists():
                raise click.BadParameter(f"{verify!r} does not exist", param_hint="--verify")
            proof = ss.verify_checkpoint(path, None if verify == ITSELF else verify, progress=progress)
        if unpack is None and verify is None:
            facts = ss.inspect_checkpoint(path, progress=progress)
    if unpack is not None:
        done = (
            f"{result.output} is complete already"
            if result.already_complete
            else f"wrote {size_text(result.output_bytes)} to {result.output}"
        )
        print_json(result.as_dict()) if as_json else click.echo(f"{len(result.modules)} modules unpacked; {done}")
    if verify is not None:
        print_json(asdict(proof)) if as_json else click.echo(_proof_text(proof))
    if unpack is None and verify is None:
        print_json(asdict(facts)) if as_json else _print(facts)


def _proof_text(proof: ss.Verification) -> str:
    text = f"verified: {proof.modules} modules, {proof.weights:,} weights in canonical form"
    if proof.against_source:
        text += f", equal to their source ({proof.pruned:,} of its non-zeros are not stored);"
        text += f" {proof.copies} other tensors are equal byte for byte"
    return text


def _print(facts: ss.Facts) -> None:
    rows = []
    for m in facts.modules:
        state = f"packed {m.packed}" if m.packed else "dense"
        satisfies = "" if m.packed else ", ".join(m.satisfies) or "none"
        zeros = "" if m.zeros is None else f"{100 * m.zeros:.1f} %"
        rows.append(
            (
                m.name,
                state,
                m.reason,
                satisfies,
                f"{m.n} x {m.k}",
                m.stored,
                size_text(m.bytes),
                f"{m.bits_per_weight:.2f}",
                zeros,
            )
        )
    head = ("module", "state", "would stay dense", "satisfies", "n x k", "type", "bytes", "bits/weight", "zeros")
    used = [i for i, name in enumerate(head) if i == 0 or any(row[i] for row in rows)]
    if rows:
        print_table([head[i] for i in used], [[row[i] for i in used] for row in rows], left=sum(i < 4 for i in used))
    click.echo(
        f"{facts.path}: {facts.tensors} tensors, {size_text(facts.bytes)} in {facts.files} file{'s' * (facts.files != 1)};"
        f" {sum(m.packed is not None for m in facts.modules)} packed modules,"
        f" {facts.other_tensors} other tensors ({size_text(facts.other_bytes)})"
    )
    for note in facts.notes:
        click.echo(f"note: {note}")


if __name__ == "__main__":
    show()
