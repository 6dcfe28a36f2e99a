"""GGUF files, written by the library's own writer, against the Hugging Face weights that they were made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from commands import slidesparse
from gguf_models import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, VOCABULARY, write

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_tensor_and_any_part_of_it(tmp_path: Path, architecture: str) -> None:
    expected = write(path := tmp_path / "m.gguf", architecture)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, w in expected.items():
            found = checkpoint.array(name)
            np.testing.assert_array_equal(found.astype(np.float32), w)
            np.testing.assert_array_equal(checkpoint.rows(name, 5, 31), found[5:31])
            np.testing.assert_array_equal(checkpoint.raw(name, 7, 131), found.reshape(-1).view(np.uint8)[7:131])
            assert checkpoint.raw(name).nbytes == checkpoint.tensors[name][0].nbytes == found.nbytes
            checkpoint.release(name, 3)
        config = checkpoint.config
        assert config is not None
        names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
        assert [config[name] for name in names] == [architecture, 2, HEADS, KV_HEADS, HEAD, VOCABULARY]
        sizes = ("hidden_size", "intermediate_size", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")
        assert [config[name] for name in sizes] == [HIDDEN, INNER, 1e-5, 50000.0, None, True]


def test_packed_it_equals_what_its_dense_weights_pack_to(tmp_path: Path) -> None:
    expected = write(path := tmp_path / "tiny.gguf")
    models.write(tmp_path / "dense.safetensors", expected)
    options = ss.Options("6:8", scheme="INT8_W8A8", prune="magnitude")
    report = ss.pack_checkpoint(path, None, options)
    assert Path(report.output) == tmp_path / "tiny-6of8-int8"
    assert any(note.startswith("dequantized from Q8_0 (3 tensors), Q4_0 (2 tensors)") for note in report.notes)
    assert "quantization_config" in json.loads((tmp_path / "tiny-6of8-int8" / "config.json").read_text())
    ss.pack_checkpoint(tmp_path / "dense.safetensors", tmp_path / "same.safetensors", options)
    ours, theirs = ss.load(report.output), ss.load(tmp_path / "same.safetensors")
    for name, w in theirs.items():
        if isinstance(w, ss.PackedWeight):
            same = ours[name]
            assert isinstance(same, ss.PackedWeight)
            for one, other in zip(same.tensors("x").values(), w.tensors("x").values(), strict=True):
                np.testing.assert_array_equal(one, other)
    assert ss.verify_checkpoint(report.output, path).modules == 14
    with pytest.raises(ss.OperandError, match=r"is one file, but the output of .* is a folder"):
        ss.pack_checkpoint(path, tmp_path / "out.safetensors", options)


def test_the_way_to_a_gguf_file_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.gguf").read_bytes())
    with pytest.raises(ss.FormatError, match=r"is a GGUF file, no .safetensors file; give it a name that ends in .gguf"):
        Checkpoint.open(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(ss.UnsupportedError, match=r"holds weights only as m.gguf; name that file"):
        Checkpoint.open(tmp_path)


def test_rope_scaling_and_an_output_head_are_carried_over(tmp_path: Path) -> None:
    def change(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
        tensors["output.weight"] = tensors["token_embd.weight"]

    write(path := tmp_path / "m.gguf", change=change)
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
    assert config is not None
    assert config["tie_word_embeddings"] is False
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def put(**given: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda values, tensors: values.update({key.replace("__", "."): value for key, value in given.items()})


def tensor(name: str, like: str | None) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Give a tensor the contents of another, or take it away."""
    return lambda values, tensors: tensors.update({name: tensors[like]}) if like else tensors.pop(name)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("gemma3", put(), "general.architecture is 'gemma3', must be one of llama, qwen2, qwen3; start from"),
        ("llama", put(expert_count=8), "'llama.expert_count' is unknown and may change what the model computes; start from"),
        ("llama", put(rope__scaling__type="longrope"), "rope scaling 'longrope' must be none, linear or yarn; start from"),
        ("llama", put(rope__scaling__type="linear"), "'llama.rope.scaling.factor' is None, must be one positive number"),
        ("llama", put(attention__head_count_kv=[2, 1]), r"'llama.attention.head_count_kv' is \[2, 1\], must be one positive"),
        ("llama", put(attention__head_count_kv=3), "4 heads of 32 values over 3 key-value heads are impossible"),
        ("llama", put(rope__dimension_count=16), "'llama.rope.dimension_count' is 16, must be 32 beside the other sizes"),
        ("llama", put(block_count=3), "tensor 'blk.2.attn_q.weight' is missing"),
        ("llama", put(block_count=1), "tensor 'blk.1.attn_q.weight' is not one of llama's"),
        ("llama", put(embedding_length=128), r"tensor 'token_embd.weight' is \[96, 64\], must be \[96, 128\]"),
        ("llama", put(split__count=2), "is one of 2 files; join them with llama-gguf-split --merge first"),
        ("llama", put(general__type="adapter"), r"is an adapter or a part \('adapter'\) and no model"),
        ("llama", tensor("rope_freqs.weight", "output_norm.weight"), "tensor 'rope_freqs.weight' is not one of llama's"),
        ("llama", tensor("token_embd.weight", None), "tensor 'token_embd.weight' is missing"),
        ("qwen2", tensor("blk.1.attn_k.bias", None), "tensor 'blk.1.attn_k.bias' is missing"),
        ("llama", tensor("blk.1.attn_k.bias", "blk.1.attn_norm.weight"), "tensor 'blk.1.attn_k.bias' is not one of llama's"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(tmp_path: Path, architecture: str, change: Any, message: str) -> None:
    write(path := tmp_path / "m.gguf", architecture, change)
    with pytest.raises((ss.UnsupportedError, ss.FormatError), match=message):
        Checkpoint.open(path)


def test_truncated_and_damaged_files_get_a_sentence(tmp_path: Path) -> None:
    write(path := tmp_path / "m.gguf")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    cuts = [whole[:length] for length in (*range(0, 4000, 97), len(whole) - 1)]
    damaged = []
    for _ in range(300):
        data = bytearray(whole)
        for at in random.integers(0, 4000, 3):
            data[at] = random.integers(256) if random.random() < 0.5 else 255
        damaged.append(bytes(data))
    huge = whole[:8] + b"\xff" * 16 + whole[24:]
    for data in (*cuts, huge):
        path.write_bytes(data)
        with pytest.raises(ss.FormatError, match=str(path)):
            Checkpoint.open(path)
    refused = 0
    for data in damaged:  # some of which is only another name or weight
        path.write_bytes(data)
        try:
            with Checkpoint.open(path) as checkpoint:
                for name in checkpoint.tensors:
                    checkpoint.array(name)
        except (ss.FormatError, ss.UnsupportedError):
            refused += 1
    assert refused > len(damaged) // 3


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path := tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = slidesparse("pack", path)
    assert done.exit_code == 5
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("the library gguf is needed (import of gguf halted; None in sys.modules); pip install gguf\n")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
