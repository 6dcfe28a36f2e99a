"""A language model of Llama's kind in NumPy, whose linear layers may be dense or packed, and its tokenizer (arXiv 2302.13971).

Letters: b windows of s tokens, h heads of d values, g key-value heads that r = h / g heads share (arXiv 2305.13245).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import slidesparse_nb as ss

Array = NDArray[np.float32]
Linear = Callable[[Array], Array]
"""A linear layer: x [m, k] -> x @ w.T [m, n]."""
Cache = dict[int, tuple[Array, Array]]
"""Layer -> keys and values [b, t, g, d] of the tokens so far."""

EXACT = 1024
"""Products of two int8 values whose sum float32 holds exactly: 1024 * 127 * 127 < 2^24."""


class LanguageModel:
    """Tokens -> logits of the next token, with an output head that is the embedding table.

    Args:
        weights: float32 arrays by Hugging Face's names.
        heads, kv_heads: of queries; of keys and values. epsilon: of the norms. theta: base of the rotary embedding.
        linears: layers to use in place of their weights, by name without ".weight".

    Attributes:
        squares: if not None, sums of squares of what enters each linear layer are gathered here: name -> [k].
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        *,
        heads: int,
        kv_heads: int,
        epsilon: float,
        theta: float,
        linears: Mapping[str, Linear] | None = None,
    ) -> None:
        self.weights, self.linears, self.heads, self.kv_heads = weights, linears or {}, heads, kv_heads
        self.epsilon, self.theta = np.float32(epsilon), theta
        self.squares: dict[str, Array] | None = None
        self.layers = sum(name.endswith("input_layernorm.weight") for name in weights)

    def __call__(self, tokens: NDArray[np.integer[Any]], cache: Cache | None = None) -> Array:
        """Token numbers [b, s] -> logits [b, s, vocabulary]; with a cache, they follow the tokens that it holds."""
        table = self.weights["model.embed_tokens.weight"]
        x = table[tokens]
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            x = x + self.attention(i, self.norm(f"{layer}input_layernorm", x), cache)
            inner = self.norm(f"{layer}post_attention_layernorm", x)
            gate, up = (self.linear(f"{layer}mlp.{part}_proj", inner) for part in ("gate", "up"))
            x = x + self.linear(f"{layer}mlp.down_proj", silu(gate) * up)
        return np.asarray(self.norm("model.norm", x) @ table.T)

    def attention(self, i: int, x: Array, cache: Cache | None) -> Array:
        """Causal attention of layer i: [b, s, hidden] -> [b, s, hidden]."""
        b, s, _ = x.shape
        name = f"model.layers.{i}.self_attn."
        q, k, v = (
            self.linear(f"{name}{part}_proj", x).reshape(b, s, heads, -1)
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        start = cache[i][0].shape[1] if cache and i in cache else 0
        q, k = rotary(q, start, self.theta), rotary(k, start, self.theta)
        if cache is not None:
            if start:
                k, v = (np.concatenate(pair, axis=1) for pair in zip(cache[i], (k, v), strict=True))
            cache[i] = k, v
        q = q.reshape(b, s, self.kv_heads, -1, q.shape[3]).transpose(0, 2, 3, 1, 4)  # [b, g, r, s, d]
        scores: Array = q @ (k.transpose(0, 2, 3, 1)[:, :, None] / np.float32(math.sqrt(k.shape[3])))  # [b, g, r, s, t]
        future = np.arange(k.shape[1]) > start + np.arange(s)[:, None]
        mixed = softmax(np.where(future, np.float32(-np.inf), scores)) @ v.transpose(0, 2, 1, 3)[:, :, None]
        return self.linear(f"{name}o_proj", mixed.transpose(0, 3, 1, 2, 4).reshape(b, s, -1))

    def linear(self, name: str, x: Array) -> Array:
        """x [b, s, k] -> [b, s, n], through the layer in whatever form it is."""
        rows = x.reshape(-1, x.shape[2])
        if self.squares is not None:
            self.squares[name] = self.squares.get(name, np.float32(0)) + np.square(rows).sum(axis=0)
        y = self.linears[name](rows) if name in self.linears else rows @ self.weights[f"{name}.weight"].T
        return y.reshape(*x.shape[:2], -1)

    def norm(self, name: str, x: Array) -> Array:
        """Root mean square normalization of every token (arXiv 1910.07467)."""
        scaled: Array = x / np.sqrt(np.square(x).mean(axis=2, keepdims=True) + self.epsilon) * self.weights[f"{name}.weight"]
        return scaled


class Int8Linear:
    """A linear layer of int8 values, every token in int8 as well: `ss.matmul` of the packed weight, to the bit.

    The values are decompressed once and held as float32, since BLAS multiplies that fastest; `ss.matmul` decompresses at every
    call.
    """

    def __init__(self, values: NDArray[np.int8], scale: Array) -> None:
        """values [n, k] and scale [n, 1], w ~= values * scale."""
        self.values, self.scale = values.astype(np.float32), scale.T

    @classmethod
    def of_packed(cls, packed: ss.PackedWeight) -> Int8Linear:
        return cls(ss.unpack(packed), packed.scale)

    @classmethod
    def of_dense(cls, w: Array) -> Int8Linear:
        """w [n, k] in int8 and nothing pruned."""
        return cls(*ss.reference.quantize(w, ss.Scheme.of("INT8_W8A8").dtype))

    def __call__(self, x: Array) -> Array:
        q = ss.quantize(x, "6:8", "int8")  # which does not depend on the pattern
        values = np.asarray(q.values).astype(np.float32)
        parts = (slice(first, first + EXACT) for first in range(0, x.shape[1], EXACT))
        sums = sum((values[:, part] @ self.values[:, part].T).astype(np.int32) for part in parts)
        return np.asarray(np.asarray(sums, np.float32) * q.scale * self.scale)


def rotary(x: Array, start: int, theta: float) -> Array:
    """Turn the values i and i + d / 2 of x [b, s, h, d] by the angle position * theta^(-2i / d) (arXiv 2104.09864)."""
    half = x.shape[3] // 2
    angles = (start + np.arange(x.shape[1]))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))  # [s, 1, d / 2]
    one, other = x[..., :half], x[..., half:]
    return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=3)


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)))


def softmax(x: Array) -> Array:
    """Along the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def perplexity(model: LanguageModel, windows: NDArray[np.integer[Any]], run: Callable[..., Iterable[float]] = map) -> float:
    """exp of the mean negative log-likelihood of every token of windows [b, s] but each window's first.

    run: calls a function on every window; the `map` of a thread pool takes several at once.
    """

    def loss(window: NDArray[np.integer[Any]]) -> float:
        logits = model(window[None])[0, :-1]
        logits -= logits.max(axis=1, keepdims=True)
        found = logits[range(len(logits)), window[1:]].astype(np.float64)
        return float((np.log(np.exp(logits).sum(axis=1, dtype=np.float64)) - found).sum())

    return math.exp(sum(run(loss, windows)) / windows[:, 1:].size)


def continuation(model: LanguageModel, tokens: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow `tokens`, each the likeliest one."""
    cache: Cache = {}
    found, given = list[int](), np.array([tokens])
    for _ in range(count):
        found.append(int(model(given, cache)[0, -1].argmax()))
        given = np.array([found[-1:]])
    return found


def bpe_tokenizer(tokens: Sequence[str], merges: Sequence[str], special: Sequence[str]) -> Tokenizer:
    """SmolLM2's tokenizer: digits apart, then byte-level pair encoding.

    Args:
        tokens: in the order of their numbers. merges: pairs of tokens, a space between them.
        special: tokens that are no text.
    """
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)])
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
