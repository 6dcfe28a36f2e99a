"""BitNet b1.58 checkpoints, packed and as masters, read as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, WeightQuant, pack_weights, unpack_weights

import slidesparse_nb as ss
from slidesparse_nb.convert.sources import open_source
from slidesparse_nb.integrations.torch import SparseLinear

SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """What transformers compiles runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def masters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = BitNetForCausalLM(BitNetConfig(**SIZES, tie_word_embeddings=True)).to(torch.bfloat16)
    return {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def ternary(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    """int8 -1, 0, 1, and mean |w|, of float32 arithmetic as in the paper."""
    mean = w.float().abs().mean().clamp(min=1e-5)
    return (w.float() / mean).round().clamp(-1, 1).to(torch.int8), float(mean)


def folder(path: Path, tensors: dict[str, torch.Tensor], **said: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = BitNetConfig(**SIZES, tie_word_embeddings=True, architectures=["BitNetForCausalLM"]).to_dict()
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitnet", **said}}))
    return path


def packed_folder(path: Path, linear_class: str | None, **more: Any) -> Path:
    """What transformers and the model's makers write: U8 and a scale that divides (bitlinear) or multiplies (autobitlinear)."""
    tensors = {}
    for name, w in masters().items():
        if linear(name):
            q, mean = ternary(w)
            tensors[name] = pack_weights(q)
            scale = mean if linear_class == "autobitlinear" else 1 / mean
            tensors[name.replace("weight", "weight_scale")] = torch.tensor([scale], dtype=torch.bfloat16)
        else:
            tensors[name] = w
    said = {} if linear_class is None else {"linear_class": linear_class, "quantization_mode": "offline"}
    return folder(path, tensors, **said, **more)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear", None])
def test_packed_form(linear_class: str | None, tmp_path: Path) -> None:
    source = packed_folder(tmp_path / "in", linear_class)
    with open_source(source) as checkpoint:
        for name, w in masters().items():
            if linear(name):
                q, mean = ternary(w)
                assert np.array_equal(checkpoint.array(name), q.numpy())
                stored = unpack_weights(pack_weights(q.clone()), torch.int8)
                assert torch.equal(stored, q)
                assert np.array_equal(checkpoint.rows(name, 5, 40), q.numpy()[5:40])
                scale = checkpoint.array(name.replace("weight", "weight_scale"))
                assert scale.dtype == np.float32
                assert scale[0] == pytest.approx(mean, rel=2**-8)
            else:
                assert checkpoint.array(name).tobytes() == w.view(torch.int16).numpy().tobytes()


def test_masters(tmp_path: Path) -> None:
    tensors = masters()
    source = folder(tmp_path / "in", tensors, linear_class="autobitlinear", quantization_mode="online")
    with open_source(source) as checkpoint:
        for name, w in tensors.items():
            if linear(name):
                want = WeightQuant.apply(w)
                q, scale = checkpoint.array(name), checkpoint.array(name.replace("weight", "weight_scale"))
                assert q.dtype == np.int8
                assert np.array_equal(q * scale, want.float().numpy())
                assert 0 < (q == 0).mean() < 1


@pytest.mark.parametrize("form", ["packed", "masters"])
def test_packing_loses_nothing_where_the_pattern_holds(form: str, tmp_path: Path) -> None:
    """And where it does not, zeros that are there go first; every weight that stays is the source's."""
    if form == "packed":
        source = packed_folder(tmp_path / "in", "autobitlinear")
    else:
        source = folder(tmp_path / "in", masters(), linear_class="autobitlinear", quantization_mode="online")
    with pytest.raises(ss.PatternError, match=r"groups .* break 6:8"):
        ss.pack_checkpoint(source, tmp_path / "no", ss.Options("6:8"))
    report = ss.pack_checkpoint(source, tmp_path / "out", ss.Options("6:8", prune="magnitude"))
    assert report.scheme == "INT8_W8A8"
    assert ss.verify_checkpoint(tmp_path / "out", source).modules == 14
    loaded, over, groups = ss.load(tmp_path / "out"), 0, 0
    for name, w in masters().items():
        if linear(name):
            q, kept = ternary(w)[0].numpy(), ss.unpack(loaded[name.removesuffix(".weight")])
            assert np.array_equal(kept[kept != 0], q[kept != 0])
            many = (q.reshape(len(q), -1, 8) != 0).sum(-1)
            lost = many - (kept.reshape(len(q), -1, 8) != 0).sum(-1)
            assert np.array_equal(lost, np.maximum(many - 6, 0))
            over, groups = over + int((many > 6).sum()), groups + many.size
    assert any(
        f"{over:,} of {groups:,} groups ({over / groups:.1%}) have more than 6 non-zeros" in note for note in report.notes
    )
    assert any("BitNet: 14 matrices of -1, 0 and 1 are read as INT8" in note for note in report.notes)


def test_what_of_bitnet_is_not_understood(tmp_path: Path) -> None:
    def refused(said: dict[str, Any], says: str, tensors: dict[str, torch.Tensor] | None = None, name: str = "x") -> None:
        source = folder(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", masters() if tensors is None else tensors, **said)
        with pytest.raises((ss.UnsupportedError, ss.FormatError), match=says):
            ss.pack_checkpoint(source, tmp_path / "out", ss.Options("6:8", prune="magnitude"))
        assert not (tmp_path / "out").exists()

    online = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    offline = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    refused({**online, "use_rms_norm": True}, "use_rms_norm True")
    refused({"linear_class": "other"}, "linear_class 'other'")
    refused({"linear_class": "bitlinear", "quantization_mode": "online"}, "'online' needs linear_class 'autobitlinear'")
    refused({**online, "group_size": 128}, "'group_size': 128, which is unknown of BitNet")
    refused({**online, "modules_to_not_convert": ["("]}, "must be a list of names or expressions")
    refused(offline, r"is BF16, but linear layers of BitNet's quantization_mode 'offline' are U8")
    with_scale = {**masters(), "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    refused(online, "with quantization_mode 'online' no scale is stored", with_scale)
    name = "model.layers.0.mlp.up_proj.weight"
    for value, says in ((0.0, "is 0.0, must be positive"), (float("nan"), "is nan, must be positive")):
        tensors = _tensors(packed_folder(tmp_path / f"p{says[3:6]}", "autobitlinear"))
        tensors[f"{name}_scale"] = torch.tensor([value])
        refused(offline, says, tensors)
    tensors = _tensors(packed_folder(tmp_path / "bits", "autobitlinear"))
    tensors[name][0, 3] |= 3 << 2
    refused(offline, "the two bits of row 40, column 3 are 3", tensors)
    broken = masters()
    broken[name][0, 0] = float("inf")
    refused(online, "up_proj.weight': holds NaN or infinity", broken)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_modules_that_are_not_ternary(tmp_path: Path) -> None:
    source = folder(
        tmp_path / "in",
        masters(),
        linear_class="autobitlinear",
        quantization_mode="online",
        modules_to_not_convert=["down_proj"],
    )
    report = ss.pack_checkpoint(source, tmp_path / "out", ss.Options("6:8", prune="magnitude"))
    assert len(report.modules) == 12
    assert "model.layers.0.mlp.down_proj" in report.left_dense


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_a_packed_layer_computes_what_bitnets_does(linear_class: str) -> None:
    """Activations are rounded a token to INT8 by both; sums of integers are exact here, and rounded to bfloat16 there."""
    torch.manual_seed(1)
    q = torch.randint(-1, 2, (48, 64), dtype=torch.int8)
    q[:, 0::8] = q[:, 5::8] = 0  # two of eight
    x, scale = torch.randn(7, 64, dtype=torch.bfloat16), torch.tensor([0.75], dtype=torch.bfloat16)
    made: Any = (BitLinear if linear_class == "bitlinear" else AutoBitLinear)(64, 48, False, dtype=torch.bfloat16)
    made.weight_scale.copy_(scale)
    if linear_class == "bitlinear":
        made.weight.copy_(pack_weights(q.clone()))
    else:
        made.weight.data = q.to(torch.bfloat16)
    factor = float(1 / scale if linear_class == "bitlinear" else scale)
    packed = ss.pack(q.numpy(), "6:8", "int8", scale=np.float32(factor))
    with torch.no_grad():
        want, got = made(x).float(), SparseLinear.from_packed(packed)(x).float()
    assert torch.allclose(got, want, rtol=2**-6, atol=2**-6 * float(want.abs().max()))
