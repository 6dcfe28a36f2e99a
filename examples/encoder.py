"""A BERT sentence encoder in NumPy whose linear layers may be dense or packed (arXiv 1810.04805; pooling: arXiv 1908.10084).

Tokens of all sentences form one matrix [m, hidden] without padding: linear layers multiply m rows, attention one sentence's.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import slidesparse_nb as ss

Array = NDArray[np.float32]

SUPPORTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""Keys of config.json that change the computation -> the one value that this encoder computes."""


class Encoder:
    """Sentences -> unit vectors: the mean of each sentence's token vectors, normalized.

    Args:
        folder: a Hugging Face folder of a BERT model with config.json and tokenizer.json.
        weights: float32 tensors by name; a linear layer X may be a `PackedWeight` under X itself.

    Raises:
        UnsupportedError: the folder holds another kind of model.
    """

    def __init__(self, folder: Path, weights: Mapping[str, Any]) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in SUPPORTED.items():
            if config.get(key, value) != value:
                raise ss.UnsupportedError(f"{folder}: {key} is {config[key]!r}, but this encoder knows only {value!r}")
        if wrong := [name for name, w in weights.items() if name.endswith(".weight") and w.dtype != np.float32]:
            raise ss.UnsupportedError(f"{folder}: {wrong[0]} is {weights[wrong[0]].dtype}, but this encoder needs float32")
        self.weights, self.layers, self.heads = weights, config["num_hidden_layers"], config["num_attention_heads"]
        self.epsilon = np.float32(config.get("layer_norm_eps", 1e-12))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        limits = folder / "sentence_bert_config.json"  # sentence-transformers' own limit, shorter than the model's
        own = json.loads(limits.read_text()).get("max_seq_length") if limits.exists() else None
        self.tokenizer.enable_truncation(min(own or math.inf, config["max_position_embeddings"]))

    def __call__(self, sentences: Sequence[str]) -> Array:
        """Unit vectors [len(sentences), hidden]."""
        ids = [np.array(encoding.ids) for encoding in self.tokenizer.encode_batch(list(sentences))]
        ends = np.cumsum([len(i) for i in ids])
        spans = [slice(end - len(i), end) for end, i in zip(ends, ids, strict=True)]
        word, position, token_type = (
            self.weights[f"embeddings.{t}_embeddings.weight"] for t in ("word", "position", "token_type")
        )
        x = word[np.concatenate(ids)] + position[np.concatenate([np.arange(len(i)) for i in ids])]
        x = self.norm("embeddings.LayerNorm", x + token_type[0])
        for layer in range(self.layers):
            x = self.layer(f"encoder.layer.{layer}.", x, spans)
        pooled = np.stack([x[span].mean(axis=0) for span in spans])
        unit: Array = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit

    def layer(self, name: str, x: Array, spans: Sequence[slice]) -> Array:
        """One transformer layer: x [m, hidden] -> [m, hidden]; `spans` are the rows of each sentence."""
        q, k, v = (self.linear(f"{name}attention.self.{part}", x) for part in ("query", "key", "value"))
        mixed = np.concatenate([attention(q[span], k[span], v[span], self.heads) for span in spans])
        x = self.norm(f"{name}attention.output.LayerNorm", x + self.linear(f"{name}attention.output.dense", mixed))
        inner = gelu()(self.linear(f"{name}intermediate.dense", x))
        return self.norm(f"{name}output.LayerNorm", x + self.linear(f"{name}output.dense", inner))

    def linear(self, name: str, x: Array) -> Array:
        """x [m, k] @ w.T + bias -> [m, n], with w in whatever form it is stored."""
        w, bias = self.weights.get(name), self.weights[f"{name}.bias"]
        if isinstance(w, ss.PackedWeight):
            return np.asarray(ss.matmul(x, w, bias=bias))
        return np.asarray(x @ self.weights[f"{name}.weight"].T + bias)

    def norm(self, name: str, x: Array) -> Array:
        """Layer normalization of every row."""
        centred = x - x.mean(axis=1, keepdims=True)
        unit: Array = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + self.epsilon)
        return np.asarray(unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])


def attention(q: Array, k: Array, v: Array, heads: int) -> Array:
    """softmax(q @ k.T / sqrt(d)) @ v for every head of one sentence: [s, hidden] each -> [s, hidden]."""
    tokens, hidden = q.shape
    q, k, v = (a.reshape(tokens, heads, -1).transpose(1, 0, 2) for a in (q, k, v))  # [heads, s, d]
    scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(hidden // heads))
    scores = np.exp(scores - scores.max(axis=2, keepdims=True))
    mixed: Array = (scores / scores.sum(axis=2, keepdims=True)) @ v
    return mixed.transpose(1, 0, 2).reshape(tokens, hidden)


@functools.cache
def gelu() -> Any:
    """x * Phi(x) element by element, with the exact erf: NumPy has none, so Numba compiles the C library's."""
    vectorize: Any = numba.vectorize
    return vectorize(["float32(float32)"])(lambda x: x * 0.5 * (1.0 + math.erf(x * math.sqrt(0.5))))
