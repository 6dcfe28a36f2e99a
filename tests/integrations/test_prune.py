"""Pruning by a text with transformers on the CPU: block by block, killed and resumed, then packed without pruning."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import slidesparse
from faults import contents, interrupting
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import slidesparse_nb as ss
from slidesparse_nb.core import reference
from slidesparse_nb.pruning.model import BATCH_TOKENS
from slidesparse_nb.pruning.sparsegpt import sparsegpt
from slidesparse_nb.pruning.wanda import wanda

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
TEXT = {"tokens": 320, "window": 32}


def folder(path: Path, model: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with a tokenizer of single bytes."""
    model.to(dtype).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="\0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\0").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return folder(tmp_path_factory.mktemp("model"), LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(c) for c in np.random.default_rng(0).integers(33, 120, 400)))
    return path


def arrays(path: Path) -> dict[str, Any]:
    return {name: np.asarray(a, np.float32) for name, a in ss.load(path).items()}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_by_layer_is_the_definition(
    method: str, dtype: torch.dtype, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is pruned by what its own layers read when the blocks before it are pruned: by hooks in a whole model."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 100)  # three windows, and one in the last batch
    torch.manual_seed(1)
    source = folder(tmp_path / "in", LlamaForCausalLM(LlamaConfig(**SIZES)), dtype)
    options = ss.PruneOptions(method=method, calibration=text, **TEXT)
    report = ss.prune_checkpoint(source, tmp_path / "out", options)
    made, dense = arrays(tmp_path / "out"), arrays(source)
    assert report.verified
    assert report.calibration == {"tokens": 320, "window": 32, "windows": 10}
    ids = torch.tensor([ord(c) for c in text.read_text()[:320]]).reshape(10, 32)
    whole = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for i, block in enumerate(whole.model.layers):
        linears = {f"model.layers.{i}.{name}": m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        seen: dict[str, Any] = {}
        hooks = [m.register_forward_pre_hook(lambda _, a, n=n, seen=seen: seen.update({n: a[0]})) for n, m in linears.items()]
        with torch.no_grad():
            whole(ids)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            x, w = seen[name].reshape(-1, linear.in_features).numpy(), dense[f"{name}.weight"]
            wanted = wanda(w, np.linalg.norm(x, axis=0), "6:8") if method == "wanda" else sparsegpt(w, x.T @ x, "6:8")
            found = made[f"{name}.weight"]
            assert ((found != 0) == (wanted != 0)).mean() > 0.99, name
            np.testing.assert_allclose(np.where((found != 0) == (wanted != 0), found - wanted, 0), 0, atol=5e-3)
            error = (((w - found) @ x.T) ** 2).sum() / ((w @ x.T) ** 2).sum()
            assert report.errors[name] == pytest.approx(error, rel=1e-2)
            linear.weight.data = torch.from_numpy(found.copy())


@pytest.mark.parametrize("scheme", [None, "INT8_W8A8"])
def test_the_command_and_what_pack_makes_of_it(model: Path, text: Path, tmp_path: Path, scheme: str | None) -> None:
    out, report = tmp_path / "out", tmp_path / "r.json"
    given = ["--scheme", scheme] if scheme else []
    line = ["prune", model, "-o", out, "--method", "sparsegpt", "--calibration", text, "--tokens", 320, "--window", 32, *given]
    done = slidesparse(*line, "--report", report)
    assert done.exit_code == 0, done.output
    assert "21 modules, " in done.stdout
    assert "6:8 (2 zeros in 8) by sparsegpt on 10 windows of 32 tokens" in done.stdout
    assert len(json.loads(report.read_text())["errors"]) == 21
    before, after = ss.load(model), ss.load(out)
    assert {name: (a.dtype, a.shape) for name, a in before.items()} == {name: (a.dtype, a.shape) for name, a in after.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert after[name].tobytes() == before[name].tobytes()
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.json"]
    assert slidesparse(*line).exit_code == 2
    assert slidesparse(*line, "--resume").exit_code == 0
    LlamaForCausalLM.from_pretrained(out)
    packed = slidesparse("pack", out, "-o", tmp_path / "packed", "--scheme", scheme or "BF16")
    assert packed.exit_code == 0, packed.output
    for name, w in ss.load(tmp_path / "packed").items():
        if isinstance(w, ss.PackedWeight):  # nothing is pruned, and with a scheme nothing rounded anew
            stored = reference.dequantize(reference.unpack(w), w.scale)
            np.testing.assert_allclose(stored, np.asarray(after[f"{name}.weight"], np.float32), rtol=2**-8, atol=0)


def test_statistics_serve_every_pattern(model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    line = ["prune", model, "--calibration", text, "--tokens", 320, "--window", 32, "--save-statistics", file]
    assert slidesparse(*line, "--method", "sparsegpt").exit_code == 0
    assert slidesparse(*line, "--method", "wanda").exit_code == 2, "the file exists"
    by_text = ss.PruneOptions(method="sparsegpt", calibration=text, **TEXT)
    ss.prune_checkpoint(model, tmp_path / "by-text", by_text)
    for pattern in ("2:4", "6:8"):
        out = tmp_path / pattern.replace(":", "of")
        done = slidesparse("prune", model, "-o", out, "--method", "sparsegpt", "--statistics", file, "--pattern", pattern)
        assert done.exit_code == 0, done.output
        assert slidesparse("pack", out, "-o", f"{out}-packed", "--pattern", pattern).exit_code == 0
    one, other = arrays(tmp_path / "6of8"), arrays(tmp_path / "by-text")
    np.testing.assert_array_equal(one["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])
    assert (one["model.layers.2.mlp.up_proj.weight"] != other["model.layers.2.mlp.up_proj.weight"]).any()
    other = slidesparse("prune", tmp_path / "2of4", "-o", tmp_path / "x", "--method", "sparsegpt", "--statistics", file)
    assert (other.exit_code, "statistics: are of another model, whose 'model.layers." in other.stderr) == (2, True)
    norms = tmp_path / "n.safetensors"
    assert slidesparse(*line[:-1], norms, "--method", "wanda").exit_code == 0
    assert norms.stat().st_size < file.stat().st_size / 4
    short = slidesparse("prune", model, "-o", tmp_path / "x", "--method", "sparsegpt", "--statistics", norms)
    assert short.exit_code == 2
    assert "statistics hold column norms alone" in short.stderr
    assert not (tmp_path / "x.blocks").exists()


def test_killed_and_resumed(model: Path, text: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ss.PruneOptions(method="sparsegpt", calibration=text, **TEXT)
    ss.prune_checkpoint(model, whole, options)
    line = [sys.executable, "-m", "tools.cli", "prune", str(model), "-o", str(out), "--method", "sparsegpt", "-q"]
    line += ["--calibration", str(text), "--tokens", "320", "--window", "32"]
    run = subprocess.Popen(line, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE)
    while run.poll() is None and not (tmp_path / "out.blocks" / "00000.safetensors").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists(), "it was killed too late to tell"
    with pytest.raises(ss.OperandError, match=r"an unfinished run of .* continue it with --resume"):
        ss.prune_checkpoint(model, out, options)
    with pytest.raises(ss.OperandError, match="was started with other options"):
        ss.prune_checkpoint(model, out, ss.PruneOptions(method="wanda", calibration=text, **TEXT), ss.Run(resume=True))
    first = (tmp_path / "out.blocks" / "00000.safetensors").stat()
    interrupt = interrupting(lambda phase, done, total: phase == "pruning")
    with pytest.raises(KeyboardInterrupt, match="--resume continues"):
        ss.prune_checkpoint(model, out, options, ss.Run(resume=True, progress=interrupt))
    assert (tmp_path / "out.blocks" / "00000.safetensors").stat().st_mtime_ns == first.st_mtime_ns, "made once"
    report = ss.prune_checkpoint(model, out, options, ss.Run(resume=True))
    assert len(report.errors) == 21
    assert contents(out) == contents(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("kind", ["gemma", "bert"])
def test_other_architectures(kind: str, text: Path, tmp_path: Path) -> None:
    """Masks and embeddings that differ from block to block; an encoder whose pooler no text reaches through a block."""
    torch.manual_seed(0)
    if kind == "gemma":
        sizes = {
            **SIZES,
            "head_dim": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 8,
        }
        made: Any = Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    else:
        made = BertForMaskedLM(BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}))
    source = folder(tmp_path / "in", made)
    ids = torch.tensor([ord(c) for c in text.read_text()[:64]]).reshape(2, 32)
    report = ss.prune_checkpoint(
        source,
        tmp_path / "out",
        ss.PruneOptions(method="wanda", calibration=text, tokens=64, window=32, ignore=("*transform.dense",)),
    )
    whole = type(made).from_pretrained(source, dtype=torch.float32).eval()
    pruned = type(made).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (whole(ids).logits - pruned(ids).logits).abs().mean() < 0.5 * whole(ids).logits.std()
    assert set(report.errors) == {module.name for module in report.modules}
    assert max(report.errors.values()) < 0.2


def test_layers_that_transformers_renames(text: Path, tmp_path: Path) -> None:
    """Gemma 3's checkpoints say language_model.model.layers, its class model.language_model.layers."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    language, tower = Gemma3TextConfig(**SIZES, head_dim=12).to_dict(), {**tower, "image_size": 28}
    made = Gemma3ForConditionalGeneration(Gemma3Config(text_config=language, vision_config=tower, mm_tokens_per_image=4))
    how = "--method", "wanda", "--calibration", text, "--tokens", 64, "--window", 32
    given = "prune", folder(tmp_path / "in", made), "-o", tmp_path / "out", *how
    done = slidesparse(*given)
    assert (done.exit_code, "leave it dense with --ignore 'vision_tower.*'" in done.stderr) == (5, True), done.output
    done = slidesparse(*given, "--ignore", "vision_tower.*")
    assert (done.exit_code, "21 modules" in done.stdout) == (0, True), done.output


def test_what_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out, short, latin = tmp_path / "out", tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("too short")
    latin.write_bytes("é".encode("latin-1"))
    torch.manual_seed(0)
    broken = LlamaForCausalLM(LlamaConfig(**SIZES))
    broken.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    sick = folder(tmp_path / "sick", broken)
    few = folder(tmp_path / "few", LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 64})))
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 12}
    moe = folder(tmp_path / "moe", Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))
    bare = tmp_path / "bare"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(bare)
    words = shutil.copytree(bare, tmp_path / "words")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")).save(str(words / "tokenizer.json"))
    for source, given, code, message in (
        (model, ["--calibration", short, "--window", 32], 2, "has 9 tokens, less than one window of 32; give more text"),
        (model, ["--calibration", latin, "--window", 1], 5, "is not UTF-8 (unexpected end of data at byte 0)"),
        (model, ["--calibration", text, "--window", 65], 2, "window: 65 tokens must be at most 64, the positions of Llama"),
        (few, ["--calibration", text, "--window", 32], 2, " must be below 64, the vocabulary of LlamaForCausalLM"),
        (
            sick,
            ["--calibration", text, "--window", 32],
            5,
            "'model.layers.1.self_attn.q_proj': its inputs hold NaN or infinity",
        ),
        (moe, ["--calibration", text, "--window", 32], 5, "is no linear layer of a block that transformers runs"),
        (bare, ["--calibration", text, "--window", 32], 5, "holds no tokenizer; copy that of its model"),
        (words, ["--calibration", text, "--window", 32], 5, "words: its tokenizer cannot read the text ("),
        (model / "model.safetensors", ["--calibration", text, "--window", 32], 2, "calibration: needs a model's folder"),
        (model, ["--calibration", text, "--window", 32, "--device", "cuda"], 2, "device: PyTorch finds no GPU"),
    ):
        done = slidesparse("prune", source, "-o", out, "--method", "sparsegpt", *given)
        assert (done.exit_code, message in done.stderr) == (code, True), done.output
        assert not list(tmp_path.glob("out*")), "leaves nothing behind"
