"""Trouble that users of such tools report: inputs that say something of themselves which a converter must not lose or misread.

Each kind has several examples: heads that loaders make, layers that stay quantized, quantization told in odd places, weights
stored another way, folders that are not whole, files that go along.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import pytest

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint
from slidesparse_nb.convert import kinds

D, F, VOCABULARY = 32, 64, 1024
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
MAGNITUDE = {"prune": "magnitude"}


def matrix(*shape: int, dtype: Any = models.BF16) -> np.ndarray:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * (60 if dtype == FP8 else 0.05)).astype(dtype)


def layer(prefix: str = "model.layers.0.", dtype: Any = models.BF16) -> dict[str, np.ndarray]:
    shapes = {"q": (D, D), "k": (16, D), "v": (16, D), "o": (D, D)}
    found = {f"{prefix}self_attn.{part}_proj.weight": matrix(*shape, dtype=dtype) for part, shape in shapes.items()}
    for part, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
        found[f"{prefix}mlp.{part}_proj.weight"] = matrix(*shape, dtype=dtype)
    return found


def scaled(parts: dict[str, np.ndarray], shape: Any = lambda n: (n, 1), dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """With a weight_scale beside every 8-bit matrix."""
    scales = {f"{name}_scale": np.full(shape(len(w)), 0.002, dtype) for name, w in parts.items() if w.dtype.itemsize == 1}
    return parts | scales


EMBEDDING = {"model.embed_tokens.weight": matrix(VOCABULARY, D)}
HEAD = {"lm_head.weight": matrix(VOCABULARY, D)}
LLAMA = {"model_type": "llama", "vocab_size": VOCABULARY}


def group(strategy: str = "channel", dynamic: bool = True, **given: Any) -> dict[str, Any]:
    return models.group("float", strategy, dynamic, **given)


def fp8_config(*groups: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {**LLAMA, **models.quantization(*(groups or (group(),)), **given)}


def source(path: Path, parts: dict[str, np.ndarray], config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A folder with one file of weights, config.json and other JSON files (their names without .json)."""
    path.mkdir(parents=True, exist_ok=True)
    models.write(path / "model.safetensors", parts)
    for name, value in {"config": config, **files}.items():
        if value is not None:
            (path / f"{name}.json").write_text(json.dumps(value))
    return path


def pack(tmp_path: Path, parts: dict[str, np.ndarray], config: dict[str, Any] | None = LLAMA, **given: Any) -> dict[str, Any]:
    """Pack, and give the output's config.json."""
    ss.pack_checkpoint(source(tmp_path / "in", parts, config), tmp_path / "out", ss.Options(**{**MAGNITUDE, **given}))
    found: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    return found


def refused(path: Path, why: str, **given: Any) -> None:
    """Packing fails with one sentence and leaves nothing behind; a dry run fails, too, or lists what it would refuse."""
    before = sorted(path.parent.rglob("*"))
    for dry_run in (False, True):
        try:
            report = ss.pack_checkpoint(path, path.parent / "o", ss.Options(**{**MAGNITUDE, **given}), dry_run=dry_run)
            assert dry_run
            text = " ".join(report.refused.values())
        except (ss.UnsupportedError, ss.FormatError) as error:
            text = str(error)
        assert re.search(why, text), text
        assert "\n" not in text
    assert sorted(path.parent.rglob("*")) == before


def ignores(config: dict[str, Any], module: str) -> bool:
    """Whether a loader leaves a module unquantized."""
    names = config["quantization_config"]["ignore"]
    return any(name == module or (name.startswith("re:") and re.match(name[3:], module) is not None) for name in names)


# ---- heads that loaders make out of the embedding --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["packed", "dense", "unpacked"])
@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"model_type": "qwen3", "tie_word_embeddings": True, "architectures": ["Qwen3ForCausalLM"]}, "lm_head"),
        ({"model_type": "gemma3", "text_config": {"vocab_size": VOCABULARY}}, "model.language_model.lm_head"),
        ({"model_type": "gpt_neox"}, "embed_out"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "cls.predictions.decoder"),  # loaded as a language model
        ({"model_type": "modernbert"}, "decoder"),
        ({"model_type": "esm", "vocab_size": 33}, "lm_head.decoder"),
        ({"model_type": "esm"}, "output_projection"),
    ],
)
def test_a_head_without_a_tensor_is_ignored(tmp_path: Path, config: dict[str, Any], head: str, form: str) -> None:
    format_ = "dense" if form == "dense" else "packed"
    made = pack(tmp_path, {**EMBEDDING, **layer()}, {**LLAMA, **config}, scheme="INT8_W8A8", format=format_)
    if form == "unpacked":
        ss.unpack_checkpoint(tmp_path / "out", tmp_path / "dense")
        made = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert ignores(made, head)
    assert ignores(made, "lm_head")
    assert not ignores(made, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("ignored", "called"),
    [
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("thinker.visual.blocks.0.attn.qkv", "thinker.model.visual.blocks.0.attn.qkv"),
        ("language_model.model.layers.0.mlp.down_proj", "model.language_model.layers.0.mlp.down_proj"),
        ("visual.merger.mlp.2", "model.visual.merger.mlp.2"),
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"),
    ],
)
def test_what_stays_is_ignored_by_the_names_that_loaders_give_it(tmp_path: Path, ignored: str, called: str) -> None:
    """Its like in another layer and another tower is packed."""
    config = {"model_type": "vlm", "text_config": {"model_type": "llama"}}
    other = {ignored.replace(".0.", ".1."), ignored.replace("language_model", "visual").replace("visual", "audio")} - {ignored}
    other |= {"model.layers.0.mlp.up_proj"}
    parts = {f"{name}.weight": matrix(D, F) for name in (ignored, *(name for name in other if "gate" not in name))}
    made = pack(tmp_path, parts, config, scheme="INT8_W8A8", format="dense", ignore=(ignored,))
    assert ignores(made, called)
    for name in other:
        assert not ignores(made, name) or "gate" in name


# ---- what stays quantized --------------------------------------------------------------------------------------------


def described(config: dict[str, Any], module: str) -> dict[str, Any]:
    """The config group of a module, as compressed-tensors finds it: `ignore`, then names, then the class; {} if none."""
    groups = [] if ignores(config, module) else list(config["quantization_config"]["config_groups"].values())
    named = [each for each in groups if module in each["targets"]]
    return next(iter(named or [each for each in groups if "Linear" in each["targets"]]), {})


DOWN = "model.layers.0.mlp.down_proj"


def test_a_layer_that_the_user_ignores_stays_described_as_quantized(tmp_path: Path) -> None:
    parts = {**EMBEDDING, **scaled(layer(dtype=FP8)), **HEAD}
    made = pack(tmp_path, parts, fp8_config(), ignore=("*down_proj",), format="dense")
    found = described(made, DOWN)
    assert found["weights"]["strategy"] == "channel"
    assert not described(made, "lm_head")
    assert ss.load(tmp_path / "out")[f"{DOWN}.weight"].tobytes() == parts[f"{DOWN}.weight"].tobytes()


def test_a_layer_with_another_scale_has_a_group_of_its_own(tmp_path: Path) -> None:
    parts = scaled(layer(dtype=FP8))
    parts[f"{DOWN}.weight_scale"], parts[f"{DOWN}.input_scale"] = np.full(1, 0.002, np.float32), np.ones(1, np.float32)
    config = fp8_config(group(), group("tensor", dynamic=False, targets=["re:.*down_proj"]))
    made = pack(tmp_path, {**EMBEDDING, **parts, **HEAD}, config, ignore=("*down_proj",), format="dense")
    found = described(made, DOWN)
    assert found["weights"]["strategy"] == "tensor"
    assert found["input_activations"] | {"strategy": "tensor", "dynamic": False} == found["input_activations"]
    other = described(made, "model.layers.0.mlp.up_proj")
    assert (other["weights"]["strategy"], other["input_activations"]["dynamic"]) == ("channel", True)
    assert list(made["quantization_config"]["config_groups"].values())[-1]["targets"] == ["Linear"]  # loaders take names first


def test_a_quantized_head_is_named(tmp_path: Path) -> None:
    parts = {**EMBEDDING, **scaled({**layer(dtype=FP8), "lm_head.weight": matrix(VOCABULARY, D, dtype=FP8)})}
    made = pack(tmp_path, parts, fp8_config(ignore=[]), format="dense")
    found = described(made, "lm_head")
    assert set(found["targets"]) == {"Linear", "lm_head"}  # engines do not count a head among linear layers


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_what_no_config_can_describe_is_refused(tmp_path: Path, form: str) -> None:
    parts = scaled(layer(dtype=FP8))
    parts[f"{DOWN}.weight_scale"] = np.full((1, 2), 0.002, np.float32)
    path = source(tmp_path / "in", {**EMBEDDING, **parts, **HEAD}, fp8_config())
    refused(path, r"mlp\.down_proj\.weight.*would stay F8_E4M3", skip_bad=True, format=form)
    refused(path, r"mlp\.down_proj\.weight_scale.*neither per channel", format=form)


def test_a_packed_checkpoint_has_no_other_quantized_layers(tmp_path: Path) -> None:
    path = source(tmp_path / "in", {**EMBEDDING, **scaled(layer(dtype=FP8)), **HEAD}, fp8_config())
    refused(path, "--format dense", ignore=("*down_proj",))


def test_a_table_of_small_integers_is_no_quantized_layer(tmp_path: Path) -> None:
    pack(tmp_path, {**EMBEDDING, **layer(), "positions.weight": np.ones((16, 64), np.int8)})
    assert len([w for w in ss.load(tmp_path / "out").values() if isinstance(w, ss.PackedWeight)]) == 7


def test_a_layer_whose_name_looks_like_an_expression_is_ignored_by_name(tmp_path: Path) -> None:
    made = pack(tmp_path, {**layer(), "re:(.weight": matrix(D, F)}, ignore=("re:re:",), scheme="int8", format="dense")
    assert ignores(made, "re:(")
    assert not ignores(made, "model.layers.0.mlp.up_proj")


def test_names_that_the_source_ignores_are_kept_and_nothing_else_of_its_config(tmp_path: Path) -> None:
    config = fp8_config(ignore=["lm_head", "re:vision.*"], global_compression_ratio=1.5, kv_cache_scheme={"num_bits": 8})
    config["text_config"] = {"quantization_config": config["quantization_config"], "hidden_size": D}
    made = pack(tmp_path, {**EMBEDDING, **scaled(layer(dtype=FP8)), **HEAD}, config, format="dense")
    assert {"lm_head", "re:vision.*"} <= set(made["quantization_config"]["ignore"])
    assert made["quantization_config"]["kv_cache_scheme"] == {"num_bits": 8}
    assert made["text_config"] == {"hidden_size": D}
    assert "global_compression_ratio" not in made["quantization_config"]


def test_a_layers_experts_are_packed_together_or_not_at_all(tmp_path: Path) -> None:
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight": matrix(*shape)
        for i in range(2) for e in range(3) for part, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items()
    }  # fmt: skip
    path = source(tmp_path / "in", {**EMBEDDING, **experts}, LLAMA)
    report = ss.pack_checkpoint(
        path, tmp_path / "out", ss.Options(**MAGNITUDE, ignore=("model.layers.0.mlp.experts.1.down_proj",))
    )
    assert {m.name.split(".")[2] for m in report.modules} == {"1"}
    assert len(report.modules) == 9
    assert kinds.fused_key("encoder.query") == kinds.fused_key("encoder.key") != kinds.fused_key("decoder.key")
    assert kinds.fused_key("o_proj") is None
    assert kinds.fused_key("linear_attn.in_proj_b") == kinds.fused_key("linear_attn.in_proj_a")


def test_a_table_with_a_row_for_each_code_of_each_codebook(tmp_path: Path) -> None:
    """Inkling's audio tokens, which its files call an encoder."""
    config = {**LLAMA, "audio_config": {"num_codebooks": 20, "codebook_size": 16}}
    tensors = {**EMBEDDING, "model.audio.encoder.weight": matrix(320, D), "model.layers.0.mlp.up_proj.weight": matrix(F, D)}
    report = ss.pack_checkpoint(source(tmp_path / "in", tensors, config), tmp_path / "out", ss.Options(**MAGNITUDE))
    assert [module.name for module in report.modules] == ["model.layers.0.mlp.up_proj"]


# ---- a quantization told in other places, adapters -------------------------------------------------------------------

GPTQ = {"bits": 4, "group_size": 32, "sym": True}
ROTATION = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}


@pytest.mark.parametrize(
    ("config", "files", "why"),
    [
        ({"llm_config": {"quantization_config": {"quant_method": "awq"}}}, {}, r"llm_config.quantization_config .*'awq'"),
        ({"thinker_config": {"text_config": {"compression_config": {"format": "x"}}}}, {}, r"thinker_config.text_config.comp"),
        ({"quantization": {"bits": 4, "group_size": 64}}, {}, r"config.json: quantization says"),
        ({"quantization_config": 3}, {}, r"quantization_config is 3, not an object"),
        ({}, {"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}}, r"hf_quant_config.json: quantization .*'FP8'"),
        ({}, {"quantize_config": GPTQ}, r"quantize_config.json says"),
        ({}, {"quant_config": {"w_bit": 4, "q_group_size": 128}}, r"quant_config.json says"),
        ({"quantization_bit": 4}, {}, r"config.json: quantization_bit is 4"),
        ({}, {"params": {"dim": 32, "quantization": {"qformat_weight": "fp8_e4m3"}}}, r"params.json: quantization says"),
        ({}, {"adapter_config": {"peft_type": "LORA"}}, r"adapter_config.json: .* merge"),
        (fp8_config(transform_config=ROTATION), {}, r"transform_config.config_groups.R4 acts on activations"),
        (fp8_config(sparsity_config={"format": "sparse-24-bitmask"}), {}, r"sparsity_config"),
        (fp8_config(quarot={"had": 1}), {}, r"'quarot'"),
        (fp8_config(group(), {"targets": ["LlamaAttention"], "input_activations": {"num_bits": 8}}), {}, "group_1"),
        (fp8_config(group(output_activations={"num_bits": 8})), {}, r"output_activations"),
        (fp8_config(group(zero_mean=True)), {}, r"'zero_mean'"),
        (fp8_config(group(weights={"num_bits": 4})), {}, "num_bits = 4"),
        (fp8_config(group("group")), {}, "strategy = 'group'"),
        (fp8_config(group(weights={"symmetric": False})), {}, "symmetric = False"),
        (fp8_config(group(input_activations=None)), {}, "weight-only"),
        (fp8_config(group(input_activations={"num_bits": 16})), {}, "input_activations"),
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "'gptq', which is not supported"),
        (models.quantization({"weights": [1]}), {}, "must be objects"),
        (fp8_config(ignore=["re:("]), {}, r"re:\(.* is not a regular expression"),
        ({**fp8_config(), "text_config": fp8_config(ignore=[])}, {}, "say different things"),
    ],
)  # fmt: skip
def test_what_a_source_says_anywhere_is_understood_or_refused(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], why: str
) -> None:
    eight = scaled(layer(dtype=FP8)) if "compressed-tensors" in json.dumps(config) else layer()
    refused(source(tmp_path / "in", {**EMBEDDING, **eight}, {**LLAMA, **config}, **files), why)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {}},
        {"quantization": {"n_q": 8}},
        {"compression_config": None, "quantization_config": None},
        {"a": "\ud800"},
    ],
)
def test_configs_that_say_nothing_are_no_quantization(tmp_path: Path, config: dict[str, Any]) -> None:
    made = pack(tmp_path, {**EMBEDDING, **layer()}, {**LLAMA, **config})
    assert made["quantization_config"]["quant_method"] == "slidesparse"


def test_a_transform_of_weights_alone_is_merged_into_them(tmp_path: Path) -> None:
    merged = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}}}
    path = source(tmp_path / "in", {**EMBEDDING, **scaled(layer(dtype=FP8))}, fp8_config(transform_config=merged))
    report = ss.pack_checkpoint(path, tmp_path / "out", ss.Options(**MAGNITUDE))
    assert any("transform_config" in note for note in report.notes)


def test_an_adapter_that_the_user_ignores_stays_dense(tmp_path: Path) -> None:
    parts = layer()
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj"
        w = parts.pop(f"{name}.weight")
        parts |= {
            f"{name}.base_layer.weight": w,
            f"{name}.lora_A.d.weight": matrix(8, D),
            f"{name}.lora_B.d.weight": matrix(len(w), 8),
        }
    path = source(tmp_path / "in", {**EMBEDDING, **parts}, LLAMA)
    report = ss.pack_checkpoint(path, tmp_path / "out", ss.Options(**MAGNITUDE, ignore=("*lora*", "*k_proj.base_layer")))
    assert {m.name.rpartition("layers.0.")[2] for m in report.modules} == {
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    }  # fmt: skip  # q and v stay with k


# ---- what is a linear layer ------------------------------------------------------------------------------------------


def gpt2(prefix: str = "h.0.", transpose: bool = True) -> dict[str, np.ndarray]:
    shapes = {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
    return {f"{prefix}{name}.weight": matrix(*(shape[::-1] if transpose else shape)) for name, shape in shapes.items()}


def biases(parts: dict[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
    return parts | {name.replace(".weight", ".bias"): matrix(w.shape[axis]) for name, w in parts.items()}


REST = {**EMBEDDING, **{name: w for name, w in layer().items() if "down" not in name}}
FOREIGN: list[tuple[dict[str, np.ndarray], str]] = [  # beside the rest of a layer
    ({f"{DOWN}.qweight": np.ones((8, D), np.int32)}, "GPTQ or AWQ"),
    ({f"{DOWN}.weight": np.ones((D, F), np.int8), f"{DOWN}.SCB": np.ones(D, np.float32)}, "bitsandbytes"),
    ({f"{DOWN}.weight.absmax": np.ones(8, np.uint8)}, "bitsandbytes"),
    ({f"{DOWN}.pre_quant_scale": np.ones(F, np.float32)}, "ModelOpt"),
    ({f"{DOWN}.compressed": np.ones(8, np.float32), f"{DOWN}.bitmask": np.ones((D, 8), np.uint8)}, "sparse format"),
    ({f"{DOWN}.codes": np.ones((D, 8), np.int16), f"{DOWN}.scales": np.ones((D, 1), np.float16)}, "I16 .* beside 'scales'"),
    ({f"{DOWN}.W_q": np.ones((D, 8), np.uint8)}, "HQQ"),
    ({f"{DOWN}._weight_qdata": np.ones((D, F), np.int8)}, "torchao"),
    ({f"{DOWN}.lora_A.default.weight": matrix(8, F), f"{DOWN}.base_layer.weight": matrix(D, F)}, "adapter .* merge"),
    ({f"{DOWN}_lora.down.weight": matrix(8, F)}, "adapter .* merge"),
    ({f"{DOWN}.weight": matrix(D, F), f"{DOWN}.rotation.weight": matrix(F, F)}, r"rotation\.weight.*packing does not know"),
    ({f"{DOWN}.weight": matrix(D, F), f"{DOWN}.bias": matrix(D + 1)}, r"down_proj\.bias.*does not fit"),
    ({f"{DOWN}.weight": np.zeros(0, np.float32)}, r"layers\.0.* is empty .*gather"),
    (scaled({"lm_head.weight": matrix(VOCABULARY, D, dtype=FP8)}), r"lm_head\.weight.*would stay F8_E4M3"),
    (scaled({"adapter.weight": matrix(D, D, dtype=FP8)}), r"adapter\.weight.*among unquantized"),
    *(
        ({f"{DOWN}.weight": matrix(D, F), f"{DOWN}.{part}": matrix(D, 1)}, rf"down_proj\.{part}")
        for part in ("weight_scale", "input_scale", "R4_input.weight", "gamma")
    ),
]
CONTRADICTION = fp8_config(ignore=["re:.*down_proj"])
K_N = r"\[k, n\].*transpose|no shape tells"


@pytest.mark.parametrize(
    ("parts", "config", "why"),
    [
        *(({**REST, **parts}, LLAMA, why) for parts, why in FOREIGN),
        (scaled(layer(dtype=FP8)), CONTRADICTION, r"down_proj\.weight.*ignores it.*without its scale"),
        ({f"base_model.{DOWN}.lora_A.d.weight": matrix(8, F)}, None, "is an adapter and no model"),
        (gpt2(), {"model_type": "gpt2"}, K_N),
        (gpt2("decoder.h.0."), {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, K_N),
        (gpt2("encoder.h.0."), {"model_type": "decision_transformer"}, K_N),
        (gpt2(), None, K_N),
        (biases(gpt2("gpt.h.0."), 1), {"model_type": "xtts"}, K_N),
        ({"h.0.attn.c_proj.weight": matrix(D, D)}, None, K_N),
        (biases({"layers.0.fc.weight": matrix(D, F)}, 1), None, K_N),
    ],
)
def test_tensors_that_packing_would_misread_are_refused(tmp_path: Path, parts: Any, config: Any, why: str) -> None:
    refused(source(tmp_path / "in", parts, config), why)


def test_metadata_that_tells_of_a_quantization_is_refused(tmp_path: Path) -> None:
    models.write(tmp_path / "in" / "model.safetensors", layer(), {"_quantization_metadata": '{"layers": {}}'})
    refused(tmp_path / "in", r"__metadata__: '_quantization_metadata' is")


EXAONE = {"mlp.c_fc_0": (F, D), "mlp.c_fc_1": (F, D), "mlp.c_proj": (D, F), "attn.c_proj": (D, D)}


@pytest.mark.parametrize(
    "parts",
    [
        biases(gpt2(transpose=False), 0),
        gpt2(transpose=False),
        {f"transformer.h.0.{name}.weight": matrix(*shape) for name, shape in EXAONE.items()},
    ],
)
def test_linear_layers_with_the_names_of_gpt2_are_packed(tmp_path: Path, parts: dict[str, np.ndarray]) -> None:
    pack(tmp_path, parts, {"model_type": "gpt_bigcode"})
    assert len([w for w in ss.load(tmp_path / "out").values() if isinstance(w, ss.PackedWeight)]) == 4


def test_layers_that_are_missing(tmp_path: Path) -> None:
    path = source(tmp_path / "b" / "in", layer(), {**LLAMA, "num_hidden_layers": 2})
    report = ss.pack_checkpoint(path, tmp_path / "out", ss.Options(**MAGNITUDE))
    assert any("config.json says 2 layers, the weights have 1" in note for note in report.notes)
    parts = {f"model.layers.{i}.fc.weight": matrix(D, F) for i in ("0", "2", "²", "9" * 5000)}
    report = ss.pack_checkpoint(source(tmp_path / "c" / "in", parts), tmp_path / "c" / "o", ss.Options(**MAGNITUDE))
    assert any("layers 0 to 2, but none of number 1" in note for note in report.notes)
    (path / "model_index.json").write_text("{}")
    refused(path, "pipeline of several models; pack its folders")


@pytest.mark.parametrize(
    ("name", "shape", "bad"),
    [
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, F, D), True),
        ("model.layers.0.mlp.switch_mlp.gate_proj.weight", (4, F, D), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, D, F), True),
        ("transformer.blocks.0.ffn.experts.mlp.w1", (4 * F, D), True),
        ("model.layers.0.feed_forward.w13", (4, F, D), True),  # beside a router
        ("model.layers.0.conv1d.weight", (D, 1, 4), False),
        ("model.layers.0.fc.weight_v", (D, F), False),
        ("paligemma_with_expert.patch_embedding.weight", (D, 3, 14, 14), False),
        ("vision.query_tokens", (1, 32, D), False),
        ("vision.proj", (D, F), False),
        ("vision.patch_embed.proj.weight", (D, 3, 14, 14), False),
    ],
)
def test_every_matrix_is_packed_left_dense_or_refused(tmp_path: Path, name: str, shape: tuple[int, ...], bad: bool) -> None:
    router = {"model.layers.0.feed_forward.router.weight": matrix(4, D)}
    parts = {**EMBEDDING, **layer(), **router, name: matrix(*shape), "model.norm.weight": matrix(D)}
    path = source(tmp_path / "in", parts, LLAMA)
    for skip_bad in (False, True):
        report = ss.pack_checkpoint(path, tmp_path / "o", ss.Options(**MAGNITUDE, skip_bad=skip_bad), dry_run=True)
        assert name in (report.left_dense if not bad else report.skipped if skip_bad else report.refused)
        accounts = (report.packed_bytes, report.dense_bytes, report.refused_bytes, report.other_bytes)
        assert sum(accounts) == report.source_bytes == sum(w.nbytes for w in parts.values())
        assert report.other_bytes == 2 * D
        assert report.refused_bytes == (parts[name].nbytes if bad and not skip_bad else 0)
    facts = ss.inspect_checkpoint(path)
    listed = {m.name.removesuffix(".weight") for m in facts.modules}
    assert listed == {key.removesuffix(".weight") for key, w in parts.items() if w.ndim >= 2}
    assert sum(m.bytes for m in facts.modules) + facts.other_bytes == facts.bytes
    if bad:
        with pytest.raises(ss.UnsupportedError, match="stacked experts"):
            ss.pack_checkpoint(path, tmp_path / "o", ss.Options(**MAGNITUDE))


# ---- whole or refused, and what goes along ---------------------------------------------------------------------------


def shard(i: int, n: int, stem: str = "model") -> str:
    return f"{stem}-{i:05d}-of-{n:05d}.safetensors"


def index(path: Path, names: dict[str, str]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("files", "indexed", "why"),
    [
        ([shard(1, 3)], None, "lacks 'model-00002-of-00003.safetensors', 'model-00003-of-00003"),
        (["model.safetensors-00001-of-00002.safetensors"], None, "one of 2 shards"),
        (["model_00001of00003.safetensors"], None, "one of 3 shards"),
        (["model-rank-1-part-0.safetensors"], None, "one rank's part"),
        (["pytorch_model_2_of_2.safetensors"], None, "lacks 'pytorch_model_1_of_2"),
        ([shard(1, 3), shard(2, 3)], [0, 1], "lacks 'model-00003-of-00003"),
        ([shard(1, 2), shard(2, 2)], [0], "lacks 'model-00002-of-00002.safetensors'.*in the folder"),
        ([shard(1, 2), shard(2, 2), shard(3, 3)], [0, 1], "'model-00003-of-00003.safetensors' is in the folder, but"),
        (["model.safetensors", "model.safetensors.incomplete"], None, "did not finish"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(tmp_path: Path, files: list[str], indexed: list[int] | None, why: str) -> None:
    path = tmp_path / "in"
    parts = [{f"model.layers.{i}.fc.weight": matrix(D, F)} for i in range(len(files))]
    for name, part in zip(files, parts, strict=True):
        models.write(path / name, part)
    if indexed is not None:
        index(path, {key: files[i] for i in indexed for key in parts[i]})
    refused(path, why)
    with pytest.raises(ss.FormatError, match=why):
        ss.inspect_checkpoint(path)
    ss.pack_checkpoint(path / files[0], tmp_path / "one.safetensors", ss.Options(**MAGNITUDE))  # on purpose


@pytest.mark.parametrize("stem", ["consolidated", "diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_names_that_loaders_look_up_stay(tmp_path: Path, stem: str, shards: int) -> None:
    path = tmp_path / "in"
    parts = layer()
    if shards == 1:
        models.write(path / f"{stem}.safetensors", parts)
    else:
        homes = {name: shard(1 + i % 2, 2, stem) for i, name in enumerate(parts)}
        for file in set(homes.values()):
            models.write(path / file, {name: parts[name] for name, home in homes.items() if home == file})
        (path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    report = ss.pack_checkpoint(path, tmp_path / "out", ss.Options(**MAGNITUDE, max_shard_size=10_000 if shards == 2 else None))
    made = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert all(name.startswith(stem) for name in made)
    assert (f"{stem}.safetensors" in made) == (shards == 1)
    assert sorted(report.files) == made
    with Checkpoint.open(tmp_path / "out") as written:
        assert len(written.tensors) == 21


def test_files_that_go_along_are_counted_and_others_are_named(tmp_path: Path) -> None:
    path = source(tmp_path / "in", {**EMBEDDING, **layer()}, LLAMA, tokenizer={"a": 1})
    models.write(path / "original" / "model.safetensors", layer())
    models.write(path / "speech" / "model.safetensors", {"conv": matrix(8)})
    (path / "spk_dict.pt").write_bytes(bytes(1000))
    (path / "optimizer.pt").write_bytes(bytes(1000))
    report = ss.pack_checkpoint(path, tmp_path / "out", ss.Options(**MAGNITUDE))
    made = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert made == {"config.json", "model.safetensors", "tokenizer.json", "speech/model.safetensors", "spk_dict.pt"}
    along = ("tokenizer.json", "speech/model.safetensors", "spk_dict.pt")
    assert report.copied_bytes == sum((path / name).stat().st_size for name in along)
    notes = "\n".join(report.notes)
    assert "not copied (the state of a training run): 'optimizer.pt'" in notes
    assert "not copied (the model once more, not packed): 'original/'" in notes
    assert "copied as they are, not packed: 'spk_dict.pt', 'speech/model.safetensors'" in notes
