"""`slidesparse eval` on the CPU: a tiny random Llama, dense and packed, against a plain computation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_llama import TEXT, folder_of
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

import slidesparse_nb as ss
import slidesparse_nb.integrations.perplexity as perplexity
from tools.cli import main


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("eval") / "dense")


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    out = dense.with_name("packed")
    ss.pack_checkpoint(dense, out, ss.Options("6:8", "INT8_W8A8", "magnitude"), ss.Run())
    return out


@pytest.fixture(scope="module")
def text(dense: Path) -> Path:
    file = dense.with_name("text")
    file.write_text(TEXT)
    return file


def call(*given: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, given)])


def test_a_model_that_sees_what_it_is_to_predict(dense: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 256}
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(dense.with_name("encoder"))
    with pytest.raises(ss.UnsupportedError, match=r"encoder: is no causal language model: what it says of a token depends on"):
        perplexity.load(dense.with_name("encoder"))


def test_few_tokens_and_few_positions(dense: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=6, max_position_embeddings=4)).save_pretrained(dense.with_name("few"))
    assert perplexity.load(dense.with_name("few")).config.vocab_size == 6


def plain(folder: Path, window: int, stride: int, bos: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """The distribution of every predicted token, one window and one token after the other, and the token itself."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [int(word[1:]) + 2 for word in TEXT.split()]
    found, last = [], 0
    for first in range(0, len(ids), stride):
        part = [*bos, *ids[first : first + window]]
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([part])).logits[0].double(), -1)
        for i in range(max(last, first + 1), min(first + window, len(ids))):
            found.append(torch.cat([logs[i - first - 1 + len(bos)], torch.tensor([float(ids[i])])]))
        last = max(last, min(first + window, len(ids)))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 4), (10, 7), (101, 101)])
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_is_that_of_a_plain_computation(window: int, stride: int, bos: bool, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", bos=bos)
    if window > 64:
        with pytest.raises(ss.OperandError, match=r"^window: 10[12] tokens must be at most 64, the positions of Llama"):
            perplexity.evaluate(folder, TEXT, window, stride)
        return
    want = plain(folder, window, stride, (0,) * bos)
    found = perplexity.evaluate(folder, TEXT, window, stride)
    assert found.predicted == len(want)
    assert found.perplexity == pytest.approx(math.exp(mean([-float(d[int(d[-1])]) for d in want])), rel=1e-3)
    assert found.divergence is None


def test_against_another_model(dense: Path, packed: Path, text: Path, tmp_path: Path) -> None:
    want, own = plain(dense, 16, 16), plain(packed, 16, 16)
    out = tmp_path / "found.json"
    result = call(packed, "--text", text, "--window", 16, "--against", dense, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    divergence = mean([float((d[:-1].exp() * (d[:-1] - o[:-1])).sum()) for d, o in zip(want, own, strict=True)])
    agreement = mean([float(d[:-1].argmax() == o[:-1].argmax()) for d, o in zip(want, own, strict=True)])
    assert found["divergence"] == pytest.approx(divergence, rel=1e-3)
    assert divergence > 0.01
    assert found["agreement"] == pytest.approx(agreement, abs=0.011)
    assert found["perplexity"] == pytest.approx(math.exp(mean([-float(o[int(o[-1])]) for o in own])), rel=1e-3)
    assert found["dense_perplexity"] == pytest.approx(perplexity.evaluate(dense, TEXT, 16, 16).perplexity, rel=1e-6)
    assert (found["tokens"], found["predicted"], found["windows"], found["stride"]) == (101, 94, 7, 16)
    assert "94 tokens predicted of 101" in result.stdout
    assert "7 windows of 16, stride 16" in result.stdout
    full = call(packed, "--text", text, "--window", 16, "--json", "/dev/full")
    assert (full.exit_code, "cannot be written (No space left on device); name another place" in full.stderr) == (1, True)


def test_what_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    def refused(code: int, says: str, *given: object) -> None:
        result = call(*given)
        assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
        assert says in result.stderr
        assert result.stdout == ""

    refused(2, "text: has 101 tokens, fewer than one window of 512", dense, "--text", text)
    refused(2, "text: has 9 tokens, fewer than one window of 16", dense, "--text", text, "--window", 16, "--tokens", 9)
    refused(2, "stride: 17 must be 1 to 16", dense, "--text", text, "--window", 16, "--stride", 17)
    other = folder_of(tmp_path / "other", bos=True)
    refused(2, "its tokenizer cuts the text into other tokens", dense, "--text", text, "--window", 16, "--against", other)
    for name, vocabulary in (("few", 20), ("more", 70)):
        model = AutoModelForCausalLM.from_pretrained(dense)
        model.resize_token_embeddings(vocabulary)
        model.save_pretrained(shutil.copytree(dense, tmp_path / name))
    refused(2, "must be below 20, the vocabulary of LlamaForCausalLM", tmp_path / "few", "--text", text, "--window", 16)
    more = [tmp_path / "more", "--text", text, "--window", 16, "--against", dense]
    refused(2, "against: its vocabulary has 60 tokens, not 70; compare models of one vocabulary", *more)
    broken = shutil.copytree(dense, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    refused(5, "logits of LlamaForCausalLM are not finite in window 0", broken, "--text", text, "--window", 16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    refused(5, "holds no tokenizer", broken, "--text", text)
    (other / "config.json").unlink()
    refused(5, "has no config.json", other, "--text", text, "--window", 16)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    refused(5, "is not UTF-8", dense, "--text", tmp_path / "latin")
