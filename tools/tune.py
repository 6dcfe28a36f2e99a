"""Time the candidates for your products on your GPU, and keep the fastest: python tools/tune.py, or slidesparse tune.

slidesparse tune model-6of8-int8/                             the products of a packed checkpoint
slidesparse tune --model qwen2.5-7b --dtype fp8 -m 1,16,1024  as engines fuse them
slidesparse tune --shape 4608,3584 --pattern 6:8,4:6 --json
slidesparse tune --forget                                     back to the choice without measurements
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click

import slidesparse_nb as ss

from .arguments import Listed, Seconds, Shape, Tokens, one_of
from .benchmark.cases import KINDS, MODELS
from .exit_codes import EXIT_CODES, exits
from .terminal import command, count, print_json, print_table, say

STORED = {"I8": "int8", "F8_E4M3": "fp8", "BF16": "bf16", "F16": "fp16", "W4A8": "fp8"}
"""Types of packed values in a file, or schemes with block scales -> keys of KINDS: what they are multiplied as."""

OUTS = ("bfloat16", "float16", "float32")
COLUMNS = ("n, k", "pattern", "type", "m", "candidates", "model us", "best us", "gain", "kept")

Asked = tuple[int, int, int, str, str, str]
"""m, n, k, pattern, type of the weights, type of y."""


@command(epilog=EXIT_CODES)
@click.argument("checkpoints", nargs=-1, type=click.Path(exists=True, path_type=Path), metavar="[CHECKPOINT]...")
@click.option("--shape", "shapes", type=Shape(), multiple=True, help="A layer of your own. Repeatable.")
@click.option("--model", "models", type=Listed("names", one_of(MODELS)), help=f"Linear layers of {', '.join(MODELS)}.")
@click.option(
    "--pattern",
    "patterns",
    type=Listed("patterns", lambda text: str(ss.Pattern.of(text))),
    help="Non-zeros:total, of --shape and --model.  [default: 6:8]",
)
@click.option(
    "--dtype", "kinds", type=Listed("types", one_of(KINDS)), help=f"Of {', '.join(KINDS)}; likewise.  [default: int8]"
)
@click.option(
    "-m", "tokens", type=Tokens(), default="1,16,64,256,1024", show_default=True,
    help="Tokens: 1,16,64; ranges, 1-64; with a step, 64-1024:32. What is found for one m serves that m alone.",
)  # fmt: skip
@click.option("--out", type=click.Choice(OUTS), help="Type of y.  [default: bfloat16; float16 for fp16]")
@click.option("--seconds", type=Seconds(min=1), default=300, show_default=True, help="After which nothing more is begun.")
@click.option("--forget", is_flag=True, help="Forget everything that was found, for every GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@click.option("-v", "--verbose", count=True, help="The launches that were kept; -vv also where an error came from.")
@exits
def tune(
    checkpoints: tuple[Path, ...], shapes: tuple[tuple[int, int], ...], models: tuple[str, ...] | None,
    patterns: tuple[str, ...] | None, kinds: tuple[str, ...] | None, tokens: tuple[int, ...], out: str | None, seconds: float,
    forget: bool, as_json: bool, quiet: bool, verbose: int,
) -> None:  # fmt: skip
    """Time the likely candidates for products on this GPU; where one beats the model's choice, it is used from now on.

    CHECKPOINT: packed; its own shapes, patterns and types. What is found is in the cache folder. Nothing needs it.
    """
    named = bool(checkpoints or shapes or models)
    if forget:
        if named:
            raise click.UsageError("--forget stands alone")
        say(f"{count(ss.forget_tuned(), 'result')} forgotten")
        return
    if not named:
        raise click.UsageError("name a packed checkpoint, --shape or --model")
    if (patterns or kinds) and not (shapes or models):
        raise click.UsageError("--pattern and --dtype go with --shape and --model; a checkpoint has its own")
    layers = [*shapes, *((linear.n, linear.k) for name in models or () for linear in MODELS[name].linears)]
    weights = [(n, k, p, kind) for p, kind, (n, k) in product(patterns or ("6:8",), kinds or ("int8",), layers)]
    weights += [weight for path in checkpoints for weight in _packed(path)]
    asked: list[Asked] = [
        (m, n, k, p, KINDS[kind].name, out or KINDS[kind].activations)
        for n, k, p, kind in dict.fromkeys(weights)
        for m in tokens
    ]
    found = []
    try:
        for one in ss.tune_products(asked, seconds, None if quiet else lambda text: say(text, err=True)):
            found.append(one)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was found until now is kept") from None
    finally:
        if found or as_json:
            _show(found, as_json, verbose)
    if wrong := [(one, candidate) for one in found for candidate in one.wrong]:
        first, candidate = wrong[0]
        raise ss.VerificationError(
            f"{count(len(wrong), 'result')} differed from that of the model's choice, and such candidates were not timed; the"
            f" first: {first.n} x {first.k} {first.pattern} {first.dtype} m={first.m}, {candidate}"
        )


def _packed(path: Path) -> Iterator[tuple[int, int, str, str]]:
    """n, k, pattern and type of the packed weights of a checkpoint."""
    modules = [module for module in ss.inspect_checkpoint(path).modules if module.packed is not None]
    if not modules:
        raise ss.UnsupportedError(f"{path}: holds no packed weights; slidesparse pack makes them")
    for module in modules:
        if module.stored not in STORED:
            rule = f"{module.stored} weights are not tuned; their launches are the model's choice"
            raise ss.UnsupportedError(f"{path}: {module.name}: {rule}")
        yield module.n // module.matrices, module.k, str(module.packed), STORED[module.stored]


def _show(found: list[Any], as_json: bool, verbose: int) -> None:
    if as_json:
        print_json([{**asdict(one), "gain": round(one.gain, 4)} for one in found])
        return
    rows = []
    for one in found:
        times = (f"{one.model_us:.1f}", f"{one.best_us:.1f}", f"{100 * one.gain:.1f}%")
        kept = (" + ".join(one.best) if verbose else "yes") if one.kept else "-"
        rows.append((f"{one.n}, {one.k}", one.pattern, f"{one.dtype} -> {one.out}", one.m, one.candidates, *times, kept))
    print_table(COLUMNS, rows, left=(0, 1, 2, 8))
    kept = sum(one.kept for one in found)
    say(f"{kept} of {count(len(found), 'product')} kept; new processes use them, SLIDESPARSE_TUNED=0 leaves them aside")


if __name__ == "__main__":
    tune(prog_name="tune.py")
