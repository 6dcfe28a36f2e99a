"""Which layers are packed, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint
from slidesparse_nb.convert.select import Selection, matcher, select

LAYER = "model.layers.0"


def chosen(
    tmp_path: Path, parts: dict[str, np.ndarray] | None = None, config: dict[str, Any] | None = None, **given: Any
) -> Selection:
    source = models.folder(tmp_path / "in", models.tensors(layers=1) if parts is None else parts, config=config)
    with Checkpoint.open(source) as checkpoint:
        return select(checkpoint, **given)


def names(selection: Selection) -> set[str]:
    return {module.name.removeprefix(f"{LAYER}.") for module in selection.modules}


def test_linear_layers_are_packed_and_the_others_say_why_not(tmp_path: Path) -> None:
    selection = chosen(tmp_path)
    assert names(selection) == set(models.MODULES)
    assert selection.left_dense == {
        "model.embed_tokens": "an embedding",
        "lm_head": "an output head",
        f"{LAYER}.mlp.gate": "a router",
    }
    assert not selection.bad


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (("*o_proj",), {"self_attn.o_proj"}),
        (("re:.*(down|o)_proj$",), {"self_attn.o_proj", "mlp.down_proj"}),
        ((f"{LAYER}.mlp.down_proj",), {"mlp.down_proj"}),
        ((f"{LAYER}.mlp.down_proj.weight",), {"mlp.down_proj"}),
        (("*.mlp.*_proj",), {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (("lm_head",), {"lm_head"}),  # named exactly: the user knows
        (("*head", "*o_proj"), {"self_attn.o_proj"}),  # a glob does not reach an output head
    ],
)
def test_targets(tmp_path: Path, targets: tuple[str, ...], wanted: set[str]) -> None:
    assert names(chosen(tmp_path, targets=targets)) == wanted


def test_fused_parts_are_decided_together(tmp_path: Path) -> None:
    selection = chosen(tmp_path, ignore=("*.k_proj",))
    assert names(selection) == {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert selection.left_dense[f"{LAYER}.self_attn.k_proj"] == "ignored by '*.k_proj'"
    assert f"fused by engines with '{LAYER}.self_attn.k_proj'" in selection.left_dense[f"{LAYER}.self_attn.v_proj"]
    assert names(chosen(tmp_path / "b", targets=("*gate_proj", "*down_proj"))) == {"mlp.down_proj"}


@pytest.mark.parametrize(
    ("option", "text"), [("targets", "q_proj"), ("targets", "Linear"), ("targets", "re:(["), ("ignore", "re:([")]
)
def test_a_target_that_matches_nothing_is_an_error(tmp_path: Path, option: str, text: str) -> None:
    with pytest.raises(ss.OperandError, match=f"{option}: "):
        chosen(tmp_path, **{option: (text,)})


def test_an_ignored_name_that_matches_nothing_is_noted(tmp_path: Path) -> None:
    selection = chosen(tmp_path, ignore=("lm_head", "vision*"))  # recipes name heads that tied models do not have
    assert selection.notes == ["--ignore 'vision*' matches nothing here"]
    assert names(selection) == set(models.MODULES)


def test_a_mistyped_name_to_ignore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ss.OperandError, match=rf"ignore: 'o_prj' is the name of no matrix here, but '{LAYER}.self_attn.o_proj' is"
    ):
        chosen(tmp_path, ignore=("o_prj",))


def test_an_embedding_is_never_packed(tmp_path: Path) -> None:
    selection = chosen(tmp_path, targets=("model.embed_tokens", "*o_proj"))
    assert names(selection) == {"self_attn.o_proj"}
    assert selection.left_dense["model.embed_tokens"] == "an embedding"


def test_matcher_tells_which_pattern_matched() -> None:
    match, astray = matcher(["a", "b*", "x"], "ignore", ["a", "bc", "d"])
    assert [match(name) for name in ("a", "bc", "d")] == ["a", "b*", None]
    assert astray == ["x"]


@pytest.mark.parametrize(
    "name",
    [
        "cls.predictions.decoder",
        "lm_head.decoder",
        "lm_head.dense",
        "qa_outputs",
        "vocab_projector",
        "output",
        "transformer.output_layer",
        "proj_out",
        "head",
        "v_head.summary",
        "classifier.dense",
        "tok_emb",
        "pos_emb",
        "emb",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "transformer.wte",
        "model.vision_embed_tokens",
    ],
)
def test_heads_and_embeddings_by_their_names(tmp_path: Path, name: str) -> None:
    parts = {f"{name}.weight": np.ones((32, 16), np.float32), "layers.0.fc.weight": np.zeros((8, 16), np.float32)}
    assert {m.name for m in chosen(tmp_path, parts).modules} == {"layers.0.fc"}


def test_heads_and_embeddings_by_their_size_and_weights_narrower_than_a_group(tmp_path: Path) -> None:
    parts = {
        name: np.zeros(shape, np.float32)
        for name, shape in {"a.w.weight": (4096, 16), "a.v.weight": (8, 16), "a.u.weight": (9, 7)}.items()
    }
    selection = chosen(tmp_path, parts, {"vocab_size": 4096}, pattern=ss.Pattern(6, 8))
    assert selection.left_dense == {"a.w": "as large as the vocabulary", "a.u": "narrower than a group of 6:8"}
    assert [m.name for m in selection.modules] == ["a.v"]


def test_types_that_cannot_be_packed_are_refused_and_not_passed_over(tmp_path: Path) -> None:
    (reason,) = chosen(tmp_path, {"a.x.weight": np.zeros((8, 16), np.float64)}).bad.values()
    assert "F64 weights cannot be packed" in reason


def with_scale(shape: tuple[int, ...], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {f"{LAYER}.x.weight": np.ones((8, 16), np.int8), f"{LAYER}.x.weight_scale": np.ones(shape, dtype)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (8, 1)])
def test_scales_per_tensor_and_per_channel(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (module,) = chosen(tmp_path, with_scale(shape)).modules
    assert module.scale == f"{LAYER}.x.weight_scale"
    assert module.replaced == (f"{LAYER}.x.weight", f"{LAYER}.x.weight_scale")


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (with_scale((8, 4)), "requantize per channel"),
        (with_scale((16,)), "requantize per channel"),
        (with_scale((8, 1), np.int32), "requantize per channel"),
        ({f"{LAYER}.x.weight": np.ones((8, 16), np.int8)}, "without"),
        ({**with_scale((8, 1)), f"{LAYER}.x.weight_scale_inv": np.ones((1, 1), np.float32)}, "block-wise"),
        ({**with_scale((8, 1)), f"{LAYER}.x.weight_zero_point": np.ones((8, 1), np.int8)}, "zero point"),
        ({f"{LAYER}.mlp.experts.down_proj": np.ones((2, 8, 8), np.float32)}, "stacked experts"),
    ],
)
def test_what_cannot_be_packed_is_bad_by_name(tmp_path: Path, parts: dict[str, np.ndarray], why: str) -> None:
    (reason,) = chosen(tmp_path, parts).bad.values()
    assert why in reason
    assert LAYER in reason


def test_zero_points_that_are_zero_and_static_activation_scales_are_dropped(tmp_path: Path) -> None:
    extra = {f"{LAYER}.x.weight_zero_point": np.zeros((8, 1), np.int8), f"{LAYER}.x.input_scale": np.ones(1, np.float32)}
    selection = chosen(tmp_path, {**with_scale((8, 1)), **extra})
    assert set(selection.modules[0].replaced) == {
        f"{LAYER}.x.{part}" for part in ("weight", "weight_scale", "weight_zero_point", "input_scale")
    }
    assert any("input_scale" in note for note in selection.notes)


def test_unquantized_layers_of_a_quantized_checkpoint_stay(tmp_path: Path) -> None:
    parts, config = models.quantized("int8")
    parts["model.layers.0.extra.weight"] = np.ones((8, 16), models.BF16)
    selection = chosen(tmp_path, parts, config)
    assert selection.left_dense["model.layers.0.extra"] == "not quantized in the source (BF16)"


def compressed(weights: dict[str, Any] | None = None, inputs: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 8, "strategy": "channel", **(weights or {})}, "input_activations": inputs}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **given}}


OK = {"num_bits": 8, "dynamic": True}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq', which is not supported"),
        (compressed({"num_bits": 4}, OK), "num_bits = 4"),
        (compressed({"strategy": "group"}, OK), "strategy = 'group'"),
        (compressed({"symmetric": False}, OK), "symmetric = False"),
        (compressed({}, None), "weight-only"),
        (compressed({}, {"num_bits": 16}), "input_activations"),
    ],
)
def test_checkpoints_of_other_kinds_are_refused(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    with pytest.raises(ss.UnsupportedError, match=why):
        chosen(tmp_path, with_scale((8, 1)), config)


def test_packed_and_foreign_packed_checkpoints_are_refused(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    ss.pack_checkpoint(source, tmp_path / "out")
    with pytest.raises(ss.UnsupportedError, match="packed already"):
        ss.pack_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ss.UnsupportedError, match="another tool"):
        chosen(tmp_path / "b", {"x.weight_packed": np.ones((4, 4), np.int32)})
    with pytest.raises(ss.UnsupportedError, match="holds no packed weights"):
        ss.unpack_checkpoint(source, tmp_path / "dense")
    with pytest.raises(ss.UnsupportedError, match="nothing to pack"):
        ss.pack_checkpoint(models.write(tmp_path / "n.safetensors", {"a": np.ones(3, np.float32)}))


def test_quantized_weights_do_not_change_their_type_and_types_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(ss.UnsupportedError, match="already quantized to int8"):
        chosen(tmp_path, with_scale((8, 1)), scheme="FP8_DYNAMIC")
    mixed = {"a.x.weight": np.ones((8, 8), np.float16), "a.y.weight": np.ones((8, 8), np.float32)}
    with pytest.raises(ss.UnsupportedError, match="choose one with --scheme"):
        chosen(tmp_path / "b", mixed)
    assert len(chosen(tmp_path / "c", mixed, scheme="BF16").modules) == 2
