"""transformers with compressed-tensors, on the CPU and with default options, loads what we write for stock engines.

An output is right if
- `from_pretrained` finds every tensor that it wants and wants every tensor that it finds,
- every parameter, once decompressed, is the value that our own reader gives: weight * scale,
- logits are finite, and near those of a float32 model with these values,
- these values are the source's own where a module stays as it is, and near them, or zero, where it is packed.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import slidesparse_nb as ss
from slidesparse_nb import Options, Pattern, UnsupportedError
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import FLOAT8, INT8

SCHEMES = {"INT8_W8A8": INT8, "FP8_DYNAMIC": FLOAT8}
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": 1024,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
MOE = {**SIZES, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}

TIED, UNTIED = {**SIZES, "tie_word_embeddings": True}, {**SIZES, "tie_word_embeddings": False}
SMALL_BERT = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 1024}
TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
SIGHT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAVA = {
    "text_config": {"model_type": "llama", **SIZES},
    "vision_config": {"model_type": "clip_vision_model", **SIGHT, "image_size": 28, "patch_size": 14},
    "image_token_index": 1,
}
QWEN_VL = {
    "text_config": {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "vision_config": {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
}

KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, "llama", UNTIED),
    "llama, tied": (AutoModelForCausalLM, "llama", TIED),
    "llama, tied, base": (AutoModelForCausalLM, "llama", TIED),
    "qwen2, biases": (AutoModelForCausalLM, "qwen2", UNTIED),
    "gpt_neox, tied": (AutoModelForCausalLM, "gpt_neox", TIED),
    "bert, tied": (AutoModelForMaskedLM, "bert", TIED),
    "roberta, tied": (AutoModelForMaskedLM, "roberta", TIED),
    "distilbert, tied": (AutoModelForMaskedLM, "distilbert", SMALL_BERT),
    "electra, tied": (AutoModelForMaskedLM, "electra", {**TIED, "embedding_size": 64}),
    "modernbert, tied": (AutoModelForMaskedLM, "modernbert", {**TIED, **TOKENS}),
    "t5, tied": (AutoModelForSeq2SeqLM, "t5", {**T5, "tie_word_embeddings": True}),
    "llava": (AutoModelForImageTextToText, "llava", LLAVA),
    "qwen2_vl": (AutoModelForImageTextToText, "qwen2_vl", QWEN_VL),
    "qwen3_moe": (AutoModelForCausalLM, "qwen3_moe", {**MOE, "tie_word_embeddings": False}),
}
"""Name -> the class that loads it, model type, config.

The loader makes the head of a tied one, which has no tensor. A base's file, llava's and qwen2_vl's call modules by other
names than the loaded model.
"""

DOWN = "model.layers.0.mlp.down_proj"
IDS = torch.arange(1, 25)[None] * 37
ROUNDING = 2**-7
"""Relative: a bfloat16 model rounds the scale and then the product, each to 8 bits."""


# ---- sources


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that transformers wrote, of one of KINDS: random weights in bfloat16, rows of unlike size."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = folder = tmp_path_factory.mktemp("source")
            auto, model_type, sizes = KINDS[kind]
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(model_type, **sizes, dtype="bfloat16")
            model = auto.from_config(config).to(torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.06)
                    if parameter.dim() > 1:
                        parameter *= 2.0 ** torch.randint(-1, 2, (*parameter.shape[:-1], 1))
                    else:
                        parameter += 1
            (model.base_model if kind.endswith("base") else model).save_pretrained(folder)
        return made[kind]

    return make


def group(kind: str, strategy: str = "channel", targets: tuple[str, ...] = ("Linear",), static: bool = False) -> dict[str, Any]:
    """A config group of 8-bit weights and activations."""
    element = {"num_bits": 8, "type": kind, "symmetric": True}
    inputs = {"strategy": "tensor", "dynamic": False} if static else {"strategy": "token", "dynamic": True}
    weights = {**element, "strategy": strategy, "dynamic": False}
    if strategy == "block":
        weights["block_structure"] = [32, 32]
        inputs = {"strategy": "group", "group_size": 32, "dynamic": True}
    return {"targets": list(targets), "weights": weights, "input_activations": {**element, **inputs}}


def quantized(
    source: Path,
    out: Path,
    scheme: str = "FP8_DYNAMIC",
    *,
    strategies: Mapping[str, str] | None = None,
    groups: Mapping[str, Any] | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    static: bool = False,
) -> Path:
    """The source as compressed-tensors writes it in 8 bits.

    Args:
        strategies: pattern of a module's name -> strategy of its scales; the first that matches; others stay bfloat16.
        groups: config_groups; one of all linear layers, per channel, by default.
    """
    dtype, kind = SCHEMES[scheme], "int" if scheme == "INT8_W8A8" else "float"
    strategies = {r"layers\.\d+\.(self_attn|mlp)\..*_proj$": "channel"} if strategies is None else strategies
    parts: dict[str, np.ndarray] = {}
    for name, w in ss.load(source).items():
        module = name.removesuffix(".weight")
        strategy = next((s for pattern, s in strategies.items() if re.search(pattern, module)), None)
        if strategy is None:
            parts[name] = w
            continue
        n, k = w.shape
        rows, columns = {"channel": (1, k), "tensor": (n, k), "block": (32, 32)}[strategy]
        blocks = w.astype(np.float32).reshape(n // rows, rows, k // columns, columns).swapaxes(1, 2)
        q, scale = reference.quantize(blocks.reshape(-1, rows * columns), dtype)
        parts[name] = q.reshape(blocks.shape).swapaxes(1, 2).reshape(n, k)
        parts[f"{module}.weight_scale"] = scale.reshape((1,) if strategy == "tensor" else (n // rows, k // columns))
        if static:
            parts[f"{module}.input_scale"] = np.full(1, 0.05, np.float32)
    shutil.copytree(source, out)
    models.write(out / "model.safetensors", parts)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": groups or {"group_0": group(kind, static=static)},
        "ignore": list(ignore),
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def obeying(source: Path, out: Path, but: str, value: float | None = None) -> Path:
    """The source with every layer pruned to 6:8 but one, where `value` takes the place of one weight."""
    shutil.copytree(source, out)
    parts = {key: np.array(part) for key, part in ss.load(source).items()}
    for name, part in parts.items():
        if name == f"{but}.weight":
            part[3, 5] = part[3, 5] if value is None else value
        elif name.endswith("_proj.weight"):
            parts[name] = reference.prune(part.astype(np.float32), Pattern.of("6:8")).astype(part.dtype)
    models.write(out / "model.safetensors", parts)
    return out


# ---- outputs


def convert(source: Path, out: Path, way: str, **options: Any) -> Path:
    """A dense output: at once, or packed and then unpacked."""
    if way == "dense":
        ss.pack_checkpoint(source, out, Options(**options, format="dense"))
        return out
    ss.pack_checkpoint(source, out.with_name("packed"), Options(**options))
    ss.unpack_checkpoint(out.with_name("packed"), out)
    return out


def values(folder: Path) -> dict[str, np.ndarray]:
    """Every weight of a dense folder in float32, dequantized; bias, norms and so on as they are."""
    parts = {name: np.asarray(part) for name, part in ss.load(folder).items()}
    found = {}
    for name, part in parts.items():
        if not name.endswith(("_scale", "_zero_point")):
            scale = parts.get(f"{name}_scale", np.float32(1)).astype(np.float32)
            if scale.ndim == 2 and scale.shape[1] > 1:  # blocks
                scale = np.repeat(np.repeat(scale, part.shape[0] // scale.shape[0], 0), part.shape[1] // scale.shape[1], 1)
            found[name] = part.astype(np.float32) * scale
    return found


def in_float(folder: Path, out: Path, found: Mapping[str, np.ndarray]) -> Path:
    """A folder that a loader takes for an unquantized model in float32 with these values."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "slidesparse", "torch_dtype")}
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    models.write(out / "model.safetensors", dict(found))
    return out


def loaded(auto: Any, folder: Path) -> tuple[Any, torch.Tensor]:
    """A model as a user loads it, which misses nothing and passes nothing over, and its logits."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        return model, model(**inputs).logits.double()


def judge(kind: str, source: Path, out: Path, packed: str | None = None, *, finite: bool = True) -> None:
    """The four demands at this file's head.

    Args:
        packed: regular expression of the modules that must be packed; None: those whose type is another than in the source.
        finite: whether the source itself has finite logits.
    """
    auto = KINDS[kind][0]
    mine, theirs = values(out), values(source)
    model, logits = loaded(auto, out)
    reference_model, expected = loaded(auto, in_float(out, out.with_name(f"{out.name}-float"), mine))
    parameters = dict(model.named_parameters())
    for name, want in reference_model.named_parameters():
        got = parameters[name].detach().float()
        torch.testing.assert_close(got, want.detach(), rtol=ROUNDING, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    if finite:
        assert torch.isfinite(logits).all()
        assert torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), 0) > 0.98
    before, after = ss.load(source), ss.load(out)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        module = name.removesuffix(".weight")
        was_packed = re.search(packed, module) is not None if packed else before[name].dtype != after[name].dtype
        near = theirs[name]
        if not was_packed:
            np.testing.assert_array_equal(value, near, err_msg=name)
            continue
        assert after[name].dtype.itemsize == 1, name
        step = np.abs(near).max(1, keepdims=True) / 200  # INT8: half of 1/127; FP8: 1/16 of the value
        assert ((value == 0) | (np.abs(value - near) <= np.maximum(np.abs(near) / 15, step))).all(), name
        kept = (value != 0).reshape(len(value), -1, 8).sum(2)
        assert kept.max() <= 6, name
        assert kept.mean() > 5, name


def judge_or_refused(kind: str, source: Path, out: Path, way: str, name: str, packed: str | None, **options: Any) -> None:
    """Right, or refused in a sentence that has the culprit's name, with nothing left behind."""
    refusal = None
    try:
        convert(source, out, way, **options)
    except UnsupportedError as error:
        refusal = str(error)
    if refusal is not None:
        assert name in refusal
        assert list(out.parent.glob(f"{out.name}*")) == []
        return
    judge(kind, source, out, packed)


def judge_kept(kind: str, source: Path, out: Path, way: str, name: str, packed: str | None, **options: Any) -> None:
    """Right in dense format; refused by the layer's name in packed format, whose config describes no other quantized layers."""
    if way == "unpacked":
        with pytest.raises(UnsupportedError, match=name):
            convert(source, out, way, **options)
        assert list(out.parent.glob("packed*")) == []
    else:
        judge(kind, source, convert(source, out, way, **options), packed)


ways = pytest.mark.parametrize("way", ["dense", "unpacked"])
schemes = pytest.mark.parametrize("scheme", list(SCHEMES))


# ---- unquantized sources


@schemes
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3_moe"])
def test_a_whole_model(kind: str, scheme: str, source: Any, tmp_path: Path) -> None:
    way = "dense" if scheme == "INT8_W8A8" else "unpacked"
    judge(kind, source(kind), convert(source(kind), tmp_path / "out", way, scheme=scheme, prune="magnitude"))


@pytest.mark.parametrize(
    ("kind", "ignore"), [("llava", "*vision_tower*"), ("qwen2_vl", "*visual*"), ("llama, tied, base", "*down_proj")]
)
def test_unquantized_layers_by_the_names_of_the_file(kind: str, ignore: str, source: Any, tmp_path: Path) -> None:
    out = convert(source(kind), tmp_path / "out", "dense", scheme="INT8_W8A8", prune="magnitude", ignore=(ignore,))
    judge(kind, source(kind), out)


@ways
@schemes
@pytest.mark.parametrize("kind", ["llama", "llama, tied"])
@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({"ignore": ("*down_proj",)}, r"(q|k|v|o|gate|up)_proj$"),
        ({"ignore": (r"re:.*layers\.1\.self_attn\.k_proj",)}, r"layers\.0\..*_proj$|layers\.1\.(self_attn\.o|mlp\..*)_proj$"),
        ({"targets": (r"re:.*mlp.*",)}, r"mlp.*_proj$"),
    ],
    ids=["one kind ignored", "one of q, k, v ignored", "one kind targeted"],
)
def test_a_part_of_a_model(
    kind: str, scheme: str, way: str, options: dict[str, Any], packed: str, source: Any, tmp_path: Path
) -> None:
    out = convert(source(kind), tmp_path / "out", way, scheme=scheme, prune="magnitude", **options)
    judge(kind, source(kind), out, packed)


@ways
@schemes
def test_a_head_among_the_targets(scheme: str, way: str, source: Any, tmp_path: Path) -> None:
    out = convert(source("llama"), tmp_path / "out", way, scheme=scheme, prune="magnitude", targets=("*_proj", "lm_head"))
    judge("llama", source("llama"), out, r"_proj$|^lm_head$")


@ways
@schemes
@pytest.mark.parametrize("kind", ["llama", "llama, tied"])
def test_a_layer_that_breaks_the_pattern_is_skipped(kind: str, scheme: str, way: str, source: Any, tmp_path: Path) -> None:
    """q_proj is left dense, and k_proj and v_proj with it."""
    bad = obeying(source(kind), tmp_path / "source", "model.layers.1.self_attn.q_proj")
    out = convert(bad, tmp_path / "out", way, scheme=scheme, skip_bad=True)
    judge(kind, bad, out, r"layers\.0\..*_proj$|layers\.1\.(self_attn\.o|mlp\..*)_proj$")


@ways
def test_a_layer_with_nan_is_skipped(way: str, source: Any, tmp_path: Path) -> None:
    bad = obeying(source("llama"), tmp_path / "source", DOWN, np.nan)
    out = convert(bad, tmp_path / "out", way, scheme="INT8_W8A8", prune="magnitude", skip_bad=True)
    judge("llama", bad, out, r"layers\.1\..*_proj$|layers\.0\.(self_attn\..*|mlp\.(gate|up))_proj$", finite=False)


# ---- mixtures of experts: transformers makes one tensor of a layer's experts, vLLM one scheme; INT8 experts it cannot load

EXPERTS = r"self_attn\.._proj$|experts\.\d+\..*_proj$"


@ways
def test_experts(way: str, source: Any, tmp_path: Path) -> None:
    out = convert(source("qwen3_moe"), tmp_path / "out", way, scheme="FP8_DYNAMIC", prune="magnitude")
    judge("qwen3_moe", source("qwen3_moe"), out, EXPERTS)


@ways
@pytest.mark.parametrize("option", ["ignore", "skip_bad"])
def test_experts_of_a_layer_stay_together(option: str, way: str, source: Any, tmp_path: Path) -> None:
    """One expert that is left dense beside packed ones would give all of them wrong scales: all are dense, or it is refused."""
    name = "model.layers.0.mlp.experts.1.down_proj"
    given = obeying(source("qwen3_moe"), tmp_path / "source", name)
    options: dict[str, Any] = {"skip_bad": True} if option == "skip_bad" else {"ignore": (name,), "prune": "magnitude"}
    together = r"self_attn\.._proj$|layers\.1\.mlp\.experts\.\d+\..*_proj$"
    judge_or_refused("qwen3_moe", given, tmp_path / "out", way, name, together, scheme="FP8_DYNAMIC", **options)


# ---- sources in 8 bits

LAYERS = r"layers\.\d+\.(self_attn|mlp)\..*_proj$"
KEPT_DOWN = r"(q|k|v|o|gate|up)_proj$"


def eight_bits(source: Any, tmp_path: Path, what: str) -> tuple[str, Path]:
    """Kind of model, and a folder that stock loaders read rightly."""
    kind, scheme, facts = SOURCES[what]
    return kind, quantized(source(kind), tmp_path / "source", scheme, **copy.deepcopy(facts))


TWO_GROUPS = {"group_0": group("float", "tensor", ("re:.*down_proj$",)), "group_1": group("float")}
SOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FP8": ("llama", "FP8_DYNAMIC", {}),
    "INT8": ("llama", "INT8_W8A8", {}),
    "FP8 tied": ("llama, tied", "FP8_DYNAMIC", {}),
    "INT8 tied": ("llama, tied", "INT8_W8A8", {"ignore": ("re:.*lm_head",)}),
    "FP8 biases": ("qwen2, biases", "FP8_DYNAMIC", {}),
    "FP8 with head": ("llama", "FP8_DYNAMIC", {"strategies": {LAYERS: "channel", "lm_head": "channel"}, "ignore": ()}),
    "FP8 with a tensor's head": (
        "llama",
        "FP8_DYNAMIC",
        {
            "strategies": {LAYERS: "channel", "lm_head": "tensor"},
            "groups": {"group_0": group("float"), "head": group("float", "tensor", ("lm_head",))},
            "ignore": (),
        },
    ),
    "FP8 per tensor": (
        "llama",
        "FP8_DYNAMIC",
        {"strategies": {LAYERS: "tensor"}, "groups": {"group_0": group("float", "tensor")}},
    ),
    "FP8 in two groups": (
        "llama",
        "FP8_DYNAMIC",
        {"strategies": {"down_proj": "tensor", LAYERS: "channel"}, "groups": TWO_GROUPS},
    ),
    "FP8 static": ("llama", "FP8_DYNAMIC", {"static": True}),
    "FP8 with a layer ignored": (
        "llama",
        "FP8_DYNAMIC",
        {"strategies": {r"layers\.0\..*_proj$": "channel"}, "ignore": ("lm_head", r"re:.*layers\.1\.")},
    ),
}
"""Name -> kind of model, scheme, arguments of `quantized`."""


@pytest.mark.parametrize("what", SOURCES)
def test_the_sources_are_right(what: str, source: Any, tmp_path: Path) -> None:
    """Their logits are near those of the unquantized model."""
    kind, given = eight_bits(source, tmp_path, what)
    auto = KINDS[kind][0]
    if what != "FP8 static":  # its activation scale is made up
        got, want = loaded(auto, given)[1].flatten(), loaded(auto, source(kind))[1].flatten()
        assert torch.nn.functional.cosine_similarity(got, want, 0) > 0.98


@ways
@pytest.mark.parametrize("what", SOURCES)
def test_a_quantized_source(what: str, way: str, source: Any, tmp_path: Path) -> None:
    kind, given = eight_bits(source, tmp_path, what)
    packed = r"layers\.0\..*_proj$" if "ignored" in what else LAYERS
    if "head" in what:
        judge_kept(kind, given, tmp_path / "out", way, "lm_head", packed, prune="magnitude")
    else:
        judge(kind, given, convert(given, tmp_path / "out", way, prune="magnitude"), packed)


@ways
@pytest.mark.parametrize("what", [what for what in SOURCES if "ignored" not in what])
def test_a_quantized_layer_that_stays(what: str, way: str, source: Any, tmp_path: Path) -> None:
    """It stays in 8 bits with its own scales, and is described as such; in packed form that is refused."""
    kind, given = eight_bits(source, tmp_path, what)
    name = "lm_head" if "head" in what else DOWN
    judge_kept(kind, given, tmp_path / "out", way, name, KEPT_DOWN, prune="magnitude", ignore=("*down_proj",))


@ways
def test_a_quantized_layer_that_is_skipped(way: str, source: Any, tmp_path: Path) -> None:
    bad = quantized(obeying(source("llama"), tmp_path / "obeying", DOWN), tmp_path / "source")
    packed = r"layers\.1\..*_proj$|layers\.0\.(self_attn\..*|mlp\.(gate|up))_proj$"
    judge_kept("llama", bad, tmp_path / "out", way, DOWN, packed, skip_bad=True)


@ways
@pytest.mark.parametrize("declared", [True, False])
def test_a_layer_with_scales_a_block(declared: bool, way: str, source: Any, tmp_path: Path) -> None:
    """It cannot be packed; skipped, it gets a group of its own, or it is refused."""
    groups = {"group_0": group("float", "block", (DOWN,)), "group_1": group("float")}
    given = quantized(
        source("llama"),
        tmp_path / "source",
        strategies={DOWN: "block", LAYERS: "channel"},
        groups=groups if declared else None,
    )
    packed = r"layers\.1\..*_proj$|layers\.0\.(self_attn\..*|mlp\.(gate|up))_proj$"
    culprit = "group_0" if declared else DOWN
    judge_or_refused("llama", given, tmp_path / "out", way, culprit, packed, prune="magnitude", skip_bad=True)


@ways
@pytest.mark.parametrize("scheme", ["INT8_W8A8", "FP8_DYNAMIC", "BF16"])
def test_only_the_head_is_quantized(scheme: str, way: str, source: Any, tmp_path: Path) -> None:
    groups = {"head": group("float", targets=("lm_head",))}
    given = quantized(source("llama"), tmp_path / "source", strategies={"lm_head": "channel"}, groups=groups, ignore=())
    judge_or_refused(
        "llama", given, tmp_path / "out", way, "lm_head", LAYERS if scheme != "BF16" else None, scheme=scheme, prune="magnitude"
    )


@ways
def test_quantized_experts(way: str, source: Any, tmp_path: Path) -> None:
    """One that stays keeps all of its layer, as loaders make one tensor of them."""
    experts = {"strategies": {EXPERTS: "channel"}, "ignore": ("lm_head", r"re:.*mlp\.gate$")}
    given = quantized(source("qwen3_moe"), tmp_path / "source", **experts)
    judge("qwen3_moe", given, convert(given, tmp_path / "out", way, prune="magnitude"), EXPERTS)
    one, packed = "model.layers.0.mlp.experts.1.down_proj", r"self_attn\.._proj$|layers\.1\.mlp\.experts\."
    judge_kept("qwen3_moe", given, tmp_path / "b" / "out", way, "experts", packed, prune="magnitude", ignore=(one,))
