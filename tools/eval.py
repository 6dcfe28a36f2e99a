"""Measure the perplexity of a model on a text: python tools/eval.py MODEL --text FILE, or slidesparse eval."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

import importlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import slidesparse_nb as ss

from .exit_codes import EXIT_CODES, exits
from .terminal import command, count, progress_bar, say, write_json

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def perplexity_module() -> Any:
    """`slidesparse_nb.integrations.perplexity`.

    Raises:
        UnsupportedError: PyTorch or transformers is missing.
    """
    try:
        return importlib.import_module("slidesparse_nb.integrations.perplexity")
    except ImportError as error:
        raise ss.UnsupportedError(
            f"eval needs PyTorch and transformers ({error}); install the extra: pip install 'slidesparse_nb[transformers]'"
        ) from error


@command(epilog=EXIT_CODES)
@click.argument("model", type=FOLDER)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="UTF-8.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens of one window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next.  [default: the window]")
@click.option("--tokens", type=click.IntRange(2), help="Stop after this many tokens of the text.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--against", type=FOLDER, metavar="DENSE", help="Compare with this model: KL divergence and first choices.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there, too.")
@click.option("-v", "--verbose", count=True, help="-vv: where an error came from.")
@exits
def eval(  # the command's name
    model: Path, text: Path, window: int, stride: int | None, device: str, json_file: Path | None, verbose: int, **given: Any
) -> None:
    """Perplexity of a dense, pruned or packed model on a text.

    MODEL is a folder that transformers loads, with its tokenizer. The text is cut into windows; the first token of each, or
    those that it shares with the window before, are context and not counted.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.BadParameter(f"{json_file.absolute().parent} is no folder", param_hint="--json")
    module, start = perplexity_module(), time.monotonic()
    module.transformers.utils.logging.set_verbosity_error()
    module.transformers.utils.logging.disable_progress_bar()
    with progress_bar(True, "windows") as progress:
        found = module.evaluate(
            model, text, window, stride or window, given["tokens"], device, given["against"], progress=progress
        )
    seconds = time.monotonic() - start
    cut = f"{count(found.windows, 'window')} of {found.window}, stride {found.stride}"
    say(f"{model}: perplexity {found.perplexity:.4g}, loss {found.loss:.4f} nats a token")
    if given["against"] is not None:
        say(
            f"against {given['against']}: its perplexity {found.dense_perplexity:.4g},"
            f" {found.perplexity / found.dense_perplexity:.3f}x; KL divergence {found.divergence:.4g} nats;"
            f" same first choice for {found.agreement:.1%} of the tokens"
        )
    say(f"{found.predicted:,} tokens predicted of {found.tokens:,} of {text}; {cut}; {device}, {seconds:.0f} s")
    if json_file is not None:
        facts = {"model": str(model), "text": str(text), "against": given["against"] and str(given["against"])}
        versions = {name: getattr(module, name).__version__ for name in ("torch", "transformers")}
        write_json(json_file, {**facts, **asdict(found), "device": device, "seconds": seconds, "versions": versions})


if __name__ == "__main__":
    eval(prog_name="eval.py")
