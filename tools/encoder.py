"""A BERT sentence encoder in NumPy, whose linear layers may be dense or packed; the demonstration's model.

Tokens of all sentences stand in one matrix [m, hidden] without padding, as serving engines batch them: linear layers see
m rows, attention sees one sentence at a time, and a sentence's embedding cannot depend on its neighbours in the batch.
Source: Devlin et al., arXiv 1810.04805 (post-norm layers, learned positions); pooling: Reimers and Gurevych, arXiv 1908.10084.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import slidesparse_nb as ss

Array = NDArray[np.float32]

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Keys of config.json whose values are whole numbers."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UnsupportedError if the file holds none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ss.UnsupportedError(f"{path.parent}: holds no {path.name}; name the folder of a BERT model") from None
    except ValueError as error:
        raise ss.UnsupportedError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ss.UnsupportedError(f"{path}: is a {type(value).__name__}, must be a JSON object")
    return value


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Every tensor that the encoder reads, and its shape; None where any size will do."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    for part in ("word", "position", "token_type"):
        yield f"embeddings.{part}_embeddings.weight", (None, hidden)
    parts: dict[str, tuple[int, ...]] = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
    parts |= {"attention.output.dense": (hidden, hidden), "attention.output.LayerNorm": (hidden,)}
    parts |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner), "output.LayerNorm": (hidden,)}
    layers = (f"encoder.layer.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in parts)
    for name in itertools.chain(["embeddings.LayerNorm"], layers):
        shape = parts.get(name.split(".", 3)[-1], (hidden,))
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def linear_layers(weights: Mapping[str, Any]) -> dict[str, Array]:
    """The encoder's linear layers in a dense checkpoint: module name -> weight [n, k]."""
    return {name.removesuffix(".weight"): w for name, w in weights.items() if name.startswith("encoder.layer.") and w.ndim == 2}


class Encoder:
    """Sentences -> unit vectors, as the model folder's configuration says: mean of the token vectors, then L2 normalization.

    Args:
        folder: a Hugging Face folder of a BERT model with `config.json` and `tokenizer.json`.
        weights: tensors by name, as `slidesparse_nb.load` returns them. A linear layer X is a float32 tensor `X.weight` [n, k],
            or under X itself a `PackedWeight` or `QuantizedWeight`.

    Raises:
        UnsupportedError: the folder holds another kind of model, or not all of one.
    """

    def __init__(self, folder: Path, weights: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer  # of the extra `demo`

        config = read_json(folder / "config.json")
        for key, wanted in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if config.get(key, wanted) != wanted:
                raise ss.UnsupportedError(f"{folder}: {key} is {config[key]!r}, but this encoder knows only {wanted!r}")
        for key in SIZES:
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise ss.UnsupportedError(f"{folder}: {key} is {config.get(key)!r} in config.json, and must be a whole number")
        for name, shape in tensor_shapes(config):
            w = weights.get(name.removesuffix(".weight"), weights.get(name))
            if isinstance(w, ss.PackedWeight | QuantizedWeight):
                continue
            if w is None or w.dtype != np.float32 or w.shape != tuple(b or a for a, b in zip(w.shape, shape, strict=False)):
                found = "is missing" if w is None else f"is {w.dtype} {list(w.shape)}"
                wanted = ", ".join("rows" if size is None else str(size) for size in shape)
                raise ss.UnsupportedError(f"{folder}: {name} {found}, but this encoder needs float32 [{wanted}]")
        self.weights = weights
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.epsilon = np.float32(config.get("layer_norm_eps", 1e-12))
        read_json(folder / "tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the only class that it raises
            raise ss.UnsupportedError(f"{folder / 'tokenizer.json'}: is no tokenizer ({error})") from None
        self.tokenizer.no_padding()
        limits = folder / "sentence_bert_config.json"  # sentence-transformers' own limit, shorter than the model's
        longest = config["max_position_embeddings"]
        if limits.exists():
            longest = min(longest, read_json(limits).get("max_seq_length") or longest)
        rows = [weights[f"embeddings.{part}_embeddings.weight"].shape[0] for part in ("word", "position")]
        if self.tokenizer.get_vocab_size() > rows[0] or longest > rows[1]:
            raise ss.UnsupportedError(
                f"{folder}: {self.tokenizer.get_vocab_size()} words and {longest} positions, of tokenizer.json and config.json,"
                f" are more than the {rows[0]} and {rows[1]} rows of the embeddings"
            )
        self.tokenizer.enable_truncation(longest)

    def __call__(self, sentences: Sequence[str]) -> Array:
        """Unit vectors [len(sentences), hidden], float32."""
        ids = [np.array(encoding.ids) for encoding in self.tokenizer.encode_batch(list(sentences))]
        ends = np.cumsum([len(i) for i in ids])
        spans = [slice(end - len(i), end) for end, i in zip(ends, ids, strict=True)]
        x = self.embed(np.concatenate(ids), np.concatenate([np.arange(len(i)) for i in ids]))
        for layer in range(self.layers):
            x = self.layer(f"encoder.layer.{layer}.", x, spans)
        pooled = np.stack([x[span].mean(axis=0) for span in spans])
        unit: Array = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit

    def embed(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Array:
        """Token ids [m] and their places in the sentence [m] -> [m, hidden]."""
        part = "embeddings.{}_embeddings.weight".format
        x = self.weights[part("word")][tokens] + self.weights[part("position")][positions]
        return self.norm("embeddings.LayerNorm", x + self.weights[part("token_type")][0])

    def layer(self, name: str, x: Array, spans: Sequence[slice]) -> Array:
        """One transformer layer: x [m, hidden] -> [m, hidden]; `spans` are the rows of each sentence."""
        q, k, v = (self.linear(f"{name}attention.self.{part}", x) for part in ("query", "key", "value"))
        met = np.concatenate([attention(q[span], k[span], v[span], self.heads) for span in spans])
        x = self.norm(f"{name}attention.output.LayerNorm", x + self.linear(f"{name}attention.output.dense", met))
        inner = gelu()(self.linear(f"{name}intermediate.dense", x))
        return self.norm(f"{name}output.LayerNorm", x + self.linear(f"{name}output.dense", inner))

    def linear(self, name: str, x: Array) -> Array:
        """x [m, k] @ w.T + bias -> [m, n], by whatever form the weight has."""
        w, bias = self.weights.get(name), self.weights[f"{name}.bias"]
        if isinstance(w, ss.PackedWeight):
            y: Array = ss.matmul(x, w, bias=bias)
        elif isinstance(w, QuantizedWeight):
            y = w.matmul(x) + bias
        else:
            y = x @ self.weights[f"{name}.weight"].T + bias
        return y

    def norm(self, name: str, x: Array) -> Array:
        """Layer normalization of every row."""
        centred = x - x.mean(axis=1, keepdims=True)
        variance = np.square(centred).mean(axis=1, keepdims=True)
        out: Array = centred / np.sqrt(variance + self.epsilon) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return out


class QuantizedWeight:
    """w [n, k] in int8 with one scale a row and nothing pruned: what quantization alone costs."""

    def __init__(self, w: Array) -> None:
        self.values, self.scale = int8_rows(w)
        self.nbytes = w.size + self.scale.nbytes  # `values` are int8, held as float32 because BLAS multiplies that fast

    def matmul(self, x: Array) -> Array:
        """x [m, k] @ w.T -> [m, n]; every token in int8 as well. float32 holds these integer sums exactly up to 2^24."""
        values, scale = int8_rows(x)
        y: Array = (values @ self.values.T) * scale * self.scale.T
        return y


def int8_rows(x: Array) -> tuple[Array, Array]:
    """x [m, k] -> whole numbers from -127 to 127 [m, k] and a scale a row [m, 1], so that x ~= values * scale."""
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
    return np.rint(x / scale), scale


def attention(q: Array, k: Array, v: Array, heads: int) -> Array:
    """softmax(q @ k.T / sqrt(d)) @ v for every head of one sentence: [s, hidden] each -> [s, hidden]."""
    tokens, hidden = q.shape
    q, k, v = (a.reshape(tokens, heads, -1).transpose(1, 0, 2) for a in (q, k, v))  # [heads, s, d]
    scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(hidden // heads))
    scores = np.exp(scores - scores.max(axis=2, keepdims=True))
    met: Array = (scores / scores.sum(axis=2, keepdims=True)) @ v
    return met.transpose(1, 0, 2).reshape(tokens, hidden)


@functools.cache
def gelu() -> Any:
    """x * Phi(x) element by element, with the exact erf: NumPy has none, so Numba compiles the C library's once."""
    import numba

    def exact(x: float) -> float:
        return x * 0.5 * (1.0 + math.erf(x * math.sqrt(0.5)))

    return numba.vectorize(["float32(float32)"])(exact)  # type: ignore[no-untyped-call]
