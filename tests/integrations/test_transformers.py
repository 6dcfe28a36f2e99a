"""Packed folders in stock transformers, on the CPU: loaded, generated with, saved; and dense ones packed while they load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import slidesparse_nb as ss
import slidesparse_nb.integrations.transformers as st
from slidesparse_nb.integrations.torch import SparseLinear

SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "max_position_embeddings": 128,
}  # fmt: skip
TOKENS = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=request.param)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def packed(dense: Path, scheme: str) -> Path:
    out = dense.parent / f"{dense.name}-{scheme}"
    if not out.exists():
        ss.pack_checkpoint(dense, out, ss.Options(ss.Pattern.of("6:8"), scheme, "magnitude"), ss.Run())
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


@pytest.mark.parametrize("scheme", ["INT8_W8A8", "FP8_DYNAMIC", "BF16", "W4A8", "NVFP4", "MXFP4"])
def test_a_packed_folder(dense: Path, scheme: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(dense, scheme))
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert len(layers) == 14
    y = logits(model)
    pruned = AutoModelForCausalLM.from_pretrained(dense)
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            values = ss.unpack(layer.packed()).astype("float32")
            scale = 1 if layer.weight_scale is None else layer.weight_scale
            pruned.get_submodule(name).weight.data = (torch.from_numpy(values) * scale).to(torch.bfloat16)
    rounding = 0.15 if scheme in ("NVFP4", "MXFP4") else 0.05  # of activations, to four bits
    assert (y - logits(pruned)).norm() < rounding * y.norm()
    again = AutoModelForCausalLM.from_pretrained(dense, quantization_config=st.SlideSparseConfig("6:8", scheme))
    assert torch.equal(logits(again), y)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), y)
    assert ss.verify_checkpoint(tmp_path / "saved", dense).modules == 14
    tokens = model.generate(TOKENS, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True)
    assert tokens.shape == (2, 15)


def test_what_stays_dense(dense: Path) -> None:
    config = st.SlideSparseConfig("6:8", "INT8_W8A8", ignore=("lm_head", "re:.*mlp[.].*"))
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert sum(isinstance(layer, SparseLinear) for layer in model.modules()) == 8
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    folder = dense.parent / f"{dense.name}-experts"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=16)).to(torch.bfloat16).save_pretrained(folder)
    experts = AutoModelForCausalLM.from_pretrained(folder, quantization_config=st.SlideSparseConfig("6:8", "INT8_W8A8"))
    kinds = {name.rpartition(".")[2] for name, layer in experts.named_modules() if isinstance(layer, SparseLinear)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ss.UnsupportedError, match=r"^model.layers.0.mlp.experts.* is packed, but Qwen3MoeForCausalLM has no"):
        AutoModelForCausalLM.from_pretrained(packed(folder, "INT8_W8A8"))
    out = folder.with_name(f"{folder.name}-dense")
    ss.pack_checkpoint(folder, out, ss.Options("6:8", "INT8_W8A8", "magnitude", ignore=("*experts*",)), ss.Run())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(experts))


def test_a_linear_layer_of_another_class(tmp_path: Path) -> None:
    """Its weights would be made up by transformers, with a warning."""
    config = FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=256)
    FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    with pytest.raises(ss.UnsupportedError, match="is packed, but FalconForCausalLM has no"):
        AutoModelForCausalLM.from_pretrained(packed(tmp_path / "dense", "INT8_W8A8"))
    with pytest.raises(ss.UnsupportedError, match="has no linear layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=st.SlideSparseConfig())


VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
BIGCODE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 256}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 16}


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (T5ForConditionalGeneration, T5Config(**T5, vocab_size=256)),
        (GPTBigCodeForCausalLM, GPTBigCodeConfig(**BIGCODE, vocab_size=256)),
        (MambaForCausalLM, MambaConfig(**MAMBA, vocab_size=256)),
    ],
    ids=["t5", "gpt_bigcode", "mamba"],
)
def test_models_that_look_at_the_weights_of_their_layers(model: Any, config: Any, tmp_path: Path) -> None:
    """To initialize them, to tell their type, or (Mamba) to multiply by them."""
    torch.manual_seed(0)
    model(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    inputs = {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS} if model is T5ForConditionalGeneration else {})}

    def logits(**options: Any) -> torch.Tensor:
        folder = tmp_path / "dense" if options else packed(tmp_path / "dense", "INT8_W8A8")
        loaded = model.from_pretrained(folder, **options).eval()
        assert sum(isinstance(layer, SparseLinear) for layer in loaded.modules()) >= 8
        with torch.no_grad():
            return loaded(**inputs).logits

    assert torch.equal(logits(), logits(quantization_config=st.SlideSparseConfig("6:8", "INT8_W8A8")))


def test_layers_that_transformers_renames(tmp_path: Path) -> None:
    """What the files have packed is packed, and what they have dense is dense, whatever transformers calls it."""
    torch.manual_seed(0)
    config = Gemma3Config(text_config={**SIZES, "head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    (name,) = (name.removesuffix(".weight") for name in load_file(file) if name.endswith("layers.1.mlp.down_proj.weight"))
    ss.pack_checkpoint(
        tmp_path / "dense", tmp_path / "packed", ss.Options("6:8", "INT8_W8A8", "magnitude", ignore=(name,)), ss.Run()
    )
    model = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "packed")
    layers = model.model.language_model.layers
    assert [type(layer.mlp.down_proj) for layer in layers] == [SparseLinear, torch.nn.Linear]
    kept = load_file(file)[f"{name}.weight"]
    assert torch.equal(layers[1].mlp.down_proj.weight, kept)


def test_files_that_do_not_fit_the_config(dense: Path, tmp_path: Path) -> None:
    """Nothing is cast or made up: values of another type, a layer that is missing. Another task's head is new, and dense."""
    folder = packed(dense, "INT8_W8A8")
    scores = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    assert type(scores.score) is torch.nn.Linear
    name = "model.layers.0.mlp.up_proj.weight_packed"
    for case, gone, message in (
        ("cast", "nothing", f"{name}: F8_E4M3 must be I8"),
        ("layer", ".0.mlp.up_proj", "up_proj: is not in the files, which have 13 of 14"),
        ("scale", ".0.mlp.up_proj.weight_scale", r"model.layers.0.mlp.up_proj.weight_scale: is not in the files"),
        ("bias", ".1.self_attn.q_proj.bias", r"model.layers.1.self_attn.q_proj.bias: is not in the files"),
    ):
        out = tmp_path / case
        shutil.copytree(folder, out)
        tensors = load_file(out / "model.safetensors")
        if case == "cast":
            tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
        kept = {key: tensors[key] for key in tensors if gone not in key}
        save_file(kept, out / "model.safetensors", {"format": "pt"})
        with pytest.raises(ss.FormatError, match=message):
            AutoModelForCausalLM.from_pretrained(out)


def test_an_encoder(tmp_path: Path) -> None:
    """A head of any name that shares the embedding stays dense; the model without its head loads from the same folder."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 256}
    BertForMaskedLM(BertConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense", quantization_config=st.SlideSparseConfig(ignore=()))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.packed.ignore == ("cls.predictions.decoder",)
    body = AutoModel.from_pretrained(tmp_path / "packed", add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, model.bert(TOKENS).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9, weights .* are unknown here; update"),
        ({"order": "sm90"}, "'order' is an unknown key"),
        ({"format": "other"}, "format 'other' must be 'slidesparse-packed'"),
        ({"pattern": "6:8"}, "pattern '6:8' must be like"),
        ({"ignore": "lm_head"}, "ignore 'lm_head' must be a list of names"),
        ({"ignore": ["re:("]}, r"ignore 're:\(' is not a regular expression"),
        ({"k_slice_unit": 8}, "k_slice_unit 8 must be 16 at 6:8"),
    ],
)
def test_a_config_that_is_not_understood(change: dict[str, Any], message: str) -> None:
    written = ss.PackedConfig.of("6:8", "INT8_W8A8", ("lm_head",)).written()
    assert ss.PackedConfig.read(written).written() == written
    with pytest.raises(ss.FormatError, match=f"^config.json: quantization_config: {message}"):
        ss.PackedConfig.read({**written, **change})
