"""The NumPy encoder on a tiny random BERT made here, against another implementation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder import Encoder
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import slidesparse_nb as ss

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
OTHERS = ["the cat slept .", "rain fell on the street", "she sold the house"]
WORDS = [*SPECIAL, *sorted({word for sentence in [*OTHERS, "a dog chased postman down"] for word in sentence.split()})]
HIDDEN, INNER, LAYERS, HEADS, LONGEST, EPSILON = 40, 96, 2, 4, 24, 1e-5
SHAPES = {f"attention.self.{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")} | {
    "attention.output.dense": (HIDDEN, HIDDEN), "intermediate.dense": (INNER, HIDDEN), "output.dense": (HIDDEN, INNER),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT folder with random weights; its tokenizer pads to a fixed length, as the real one does."""
    path, random = tmp_path_factory.mktemp("tiny-bert"), np.random.default_rng(1)
    sizes = {"word": len(WORDS), "position": LONGEST, "token_type": 2}
    shapes: dict[str, tuple[int, ...]] = {f"embeddings.{part}_embeddings.weight": (n, HIDDEN) for part, n in sizes.items()}
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{i}." for i in range(LAYERS)):
        for name, (n, k) in SHAPES.items():
            shapes |= {f"{layer}{name}.weight": (n, k), f"{layer}{name}.bias": (n,)}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    shapes |= {f"{name}.{part}": (HIDDEN,) for name in norms for part in ("weight", "bias")}
    weights = {name: (0.3 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    for name in norms:
        weights[f"{name}.weight"] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "layer_norm_eps": EPSILON, "num_attention_heads": HEADS, "intermediate_size": INNER, "max_position_embeddings": LONGEST,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.enable_padding(length=LONGEST)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Any]:
    return dict(ss.load(folder))


def plain_bert(words: list[str], w: dict[str, Any]) -> Any:
    """BERT, mean pooling and normalization of one sentence in float64, token by token and head by head."""

    def linear(name: str, x: Any) -> Any:
        return np.einsum("mk,nk->mn", x, w[f"{name}.weight"].astype(float)) + w[f"{name}.bias"]

    def norm(name: str, x: Any) -> Any:
        rows = [(row - row.mean()) / math.sqrt(row.var() + EPSILON) for row in x]
        return np.array(rows) * w[f"{name}.weight"] + w[f"{name}.bias"]

    ids = [WORDS.index(word) for word in ["[CLS]", *words, "[SEP]"]]
    word, position, token_type = (w[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type"))
    x = norm("embeddings.LayerNorm", np.array([word[t] + position[at] + token_type[0] for at, t in enumerate(ids)], float))
    size = HIDDEN // HEADS
    for layer in (f"encoder.layer.{i}." for i in range(LAYERS)):
        q, k, v = (linear(f"{layer}attention.self.{part}", x) for part in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for c in (slice(h * size, (h + 1) * size) for h in range(HEADS)):
            for i in range(len(x)):
                weight = [math.exp(q[i, c] @ k[j, c] / math.sqrt(size)) for j in range(len(x))]
                mixed[i, c] = sum(a * v[j, c] for j, a in enumerate(weight)) / sum(weight)
        x = norm(f"{layer}attention.output.LayerNorm", x + linear(f"{layer}attention.output.dense", mixed))
        inner = np.vectorize(lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)))(linear(f"{layer}intermediate.dense", x))
        x = norm(f"{layer}output.LayerNorm", x + linear(f"{layer}output.dense", inner))
    pooled = x.mean(axis=0)
    return pooled / np.linalg.norm(pooled)


@pytest.mark.parametrize("words", [["rain"], ["a", "dog", "chased", "the", "postman", "down", "the", "street", "."]])
def test_encoder_equals_another_implementation(folder: Path, weights: dict[str, Any], words: list[str]) -> None:
    encoder = Encoder(folder, weights)
    np.testing.assert_allclose(encoder([" ".join(words)]), [plain_bert(words, weights)], atol=2e-6)
    together = encoder([*OTHERS, " ".join(words)])
    np.testing.assert_allclose(encoder([" ".join(words)])[0], together[-1], atol=2e-6)  # whatever else is in the batch
    one, two = encoder([" ".join(["rain"] * 40), " ".join(["rain"] * (LONGEST - 2))])
    np.testing.assert_allclose(one, two, atol=2e-6)  # cut at the model's limit


def test_every_form_of_a_linear_layer(folder: Path, weights: dict[str, Any]) -> None:
    name = "encoder.layer.1.output.dense"
    w, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    x = np.random.default_rng(2).standard_normal((7, INNER)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T + bias
    packed = ss.pack(w, "4:6", "int8", prune="magnitude")
    dense, sparse = (Encoder(folder, {**weights, **form}).linear(name, x) for form in ({}, {name: packed}))
    np.testing.assert_allclose(dense, exact, atol=1e-5)
    np.testing.assert_array_equal(sparse, ss.reference.matmul(x, packed, bias))


@pytest.mark.parametrize("key", ["model_type", "hidden_act"])
def test_other_models_are_refused(folder: Path, tmp_path: Path, weights: dict[str, Any], key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), key: "other"}))
    with pytest.raises(ss.UnsupportedError, match=f"{key} is 'other', but this encoder knows only"):
        Encoder(tmp_path, weights)
