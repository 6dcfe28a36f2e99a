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
        (("model.embed_tokens", "*o_proj"), {"self_attn.o_proj"}),  # an embedding is never packed
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


def test_an_ignored_name_that_matches_nothing_is_noted(tmp_path: Path) -> None:
    selection = chosen(tmp_path, ignore=("lm_head", "vision*"))  # recipes name heads that tied models do not have
    assert selection.notes == ["--ignore 'vision*' matches nothing here"]
    assert names(selection) == set(models.MODULES)


def test_matcher_tells_which_pattern_matched() -> None:
    match, astray = matcher(["a", "b*", "x"], "ignore", ["a", "bc", "d"])
    assert [match(name) for name in ("a", "bc", "d")] == ["a", "b*", None]
    assert astray == ["x"]


NO_LINEAR_LAYERS = """
    cls.predictions.decoder lm_head.decoder lm_head.dense qa_outputs vocab_projector output transformer.output_layer proj_out
    head v_head.summary classifier.dense tok_emb pos_emb emb encoder.block.0.layer.0.SelfAttention.relative_attention_bias
    transformer.wte model.vision_embed_tokens _orig_mod.output module.lm_head talker.code_predictor.lm_head.3 decoder.to_logits
    audio.quantizer.layers.0.codebook char_embeddings.HashBucketCodepointEmbedder_3 mask_decoder.mask_tokens
    classification_head.out_proj detector.class_head.dense model.layers.0.altup.modality_router model.layers.0.mlp.gate.linear
    vq.layers.0.project model.tok_embeddings.0 encoder.positions model.layers.0.moe.gate_network model.layers.0.ffn.router.layer
"""
AS_LARGE_AS_A_VOCABULARY = {
    "language_model.output": {"llm_config": {"model_type": "internlm2", "vocab_size": 1024}},
    "transformer.ff_out": {"vocab_size": 1000, "embedding_size": 1024},
    "talker.codec_head": {"talker_config": {"vocab_size": 1024}},
    "medusa_head.0.1": {"vocab_size": 1024},
    "predict": {"vocab_size": 1024},
}


@pytest.mark.parametrize(
    ("name", "rows", "config"),
    [
        *((name, 32, None) for name in NO_LINEAR_LAYERS.split()),
        *((name, 1024, config) for name, config in AS_LARGE_AS_A_VOCABULARY.items()),
        ("predict.tokens", 2048, {"vocab_size": 1000}),  # padded: as many rows as the embedding
    ],
)
def test_matrices_that_are_no_linear_layers_stay(tmp_path: Path, name: str, rows: int, config: dict[str, Any] | None) -> None:
    shapes = {name: (rows, 16), "model.embed_tokens": (2048, 16), "layers.0.fc": (8, 16)}
    selection = chosen(tmp_path, {f"{each}.weight": np.zeros(shape, np.float32) for each, shape in shapes.items()}, config)
    assert {m.name for m in selection.modules} == {"layers.0.fc"}
    assert name in selection.left_dense


def test_layers_as_wide_as_a_small_vocabulary_are_packed_and_those_narrower_than_a_group_are_not(tmp_path: Path) -> None:
    """An audio model with 1024 codes and 1024 hidden units."""
    parts = {f"model.layers.{i}.mlp.fc.weight": np.zeros((1024, 512), np.float32) for i in range(2)}
    parts |= {"a.v.weight": np.zeros((8, 8), np.float32), "a.u.weight": np.zeros((9, 7), np.float32)}
    selection = chosen(tmp_path, parts, {"vocab_size": 1024}, pattern=ss.Pattern(6, 8))
    assert selection.left_dense == {"a.u": "narrower than a group of 6:8"}
    assert len(selection.modules) == 3


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
        ({f"{LAYER}.x.weight": np.zeros((8, 16), np.float64)}, "F64 weights cannot be packed"),
    ],
)
def test_what_cannot_be_packed_is_bad_by_name(tmp_path: Path, parts: dict[str, np.ndarray], why: str) -> None:
    (reason,) = chosen(tmp_path, parts).bad.values()
    assert why in reason
    assert LAYER in reason


def test_unquantized_layers_of_a_quantized_checkpoint_stay(tmp_path: Path) -> None:
    parts, config = models.quantized("int8")
    selection = chosen(tmp_path, {**parts, "model.layers.0.extra.weight": np.ones((8, 16), models.BF16)}, config)
    assert selection.left_dense["model.layers.0.extra"] == "not quantized in the source (BF16)"


def test_zero_points_that_are_zero_and_static_activation_scales_are_dropped(tmp_path: Path) -> None:
    extra = {f"{LAYER}.x.weight_zero_point": np.zeros((8, 1), np.int8), f"{LAYER}.x.input_scale": np.ones(1, np.float32)}
    selection = chosen(tmp_path, {**with_scale((8, 1)), **extra})
    assert set(selection.modules[0].replaced) == {
        f"{LAYER}.x.{part}" for part in ("weight", "weight_scale", "weight_zero_point", "input_scale")
    }
    assert any("input_scale" in note for note in selection.notes)


def test_checkpoints_that_are_packed_or_hold_nothing(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    ss.pack_checkpoint(source, tmp_path / "out")
    with pytest.raises(ss.UnsupportedError, match=r"packed already; `slidesparse show --unpack OUT` writes it back dense$"):
        ss.pack_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ss.UnsupportedError, match="holds no packed weights"):
        ss.unpack_checkpoint(source, tmp_path / "dense")
    with pytest.raises(ss.UnsupportedError, match="nothing to pack"):
        ss.pack_checkpoint(models.write(tmp_path / "n.safetensors", {"a": np.ones(3, np.float32)}))


MIXED = {"a.x.weight": np.ones((8, 8), np.float16), "a.y.weight": np.ones((8, 8), np.float32)}


@pytest.mark.parametrize(
    ("parts", "given", "why"),
    [
        *((None, {"targets": (text,)}, "targets: ") for text in ("q_proj", "Linear", "re:([")),
        (None, {"ignore": ("re:([",)}, "ignore: "),
        (None, {"ignore": ("o_prj",)}, rf"ignore: 'o_prj' is the name of no matrix here, but '{LAYER}.self_attn.o_proj' is"),
        ({"x.weight_packed": np.ones((4, 4), np.int32)}, {}, "another tool"),
        (with_scale((8, 1)), {"scheme": "FP8_DYNAMIC"}, "already quantized to int8"),
        (MIXED, {}, "choose one with --scheme"),
    ],
)
def test_what_is_refused_as_a_whole(tmp_path: Path, parts: Any, given: dict[str, Any], why: str) -> None:
    with pytest.raises(ss.OperandError if "targets" in given or "ignore" in given else ss.UnsupportedError, match=why):
        chosen(tmp_path, parts, **given)


def test_one_scheme_is_chosen_for_several_types(tmp_path: Path) -> None:
    assert len(chosen(tmp_path, MIXED, scheme="BF16").modules) == 2
