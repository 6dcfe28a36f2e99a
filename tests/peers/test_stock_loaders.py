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
from dataclasses import dataclass
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
        "config_groups": groups or {"group_0": models.group(kind, dynamic=not static)},
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


# ---- cases

SKIPPED = r"layers\.1\..*_proj$|layers\.0\.(self_attn\..*|mlp\.(gate|up))_proj$"
"""The modules that are packed where DOWN is not."""
NO_KEY = r"layers\.0\..*_proj$|layers\.1\.(self_attn\.o|mlp\..*)_proj$"
"""Those where one of q, k and v of layer 1 is not, and the other two with it."""
NO_DOWN = r"(q|k|v|o|gate|up)_proj$"
LAYERS = r"layers\.\d+\.(self_attn|mlp)\..*_proj$"
EXPERTS = r"self_attn\.._proj$|experts\.\d+\..*_proj$"
ONE_EXPERT = "model.layers.0.mlp.experts.1.down_proj"
TOGETHER = r"self_attn\.._proj$|layers\.1\.mlp\.experts\.\d+\..*_proj$"
"""Those where an expert of layer 0 is not packed: transformers makes one tensor of a layer's experts."""


@dataclass(frozen=True)
class Case:
    """What is converted, and what must come of it.

    Attributes:
        kind: of KINDS.
        options: of packing, beside `prune` by magnitude.
        packed: see `judge`.
        made: (folder of the kind, new folder) -> the source; None for that folder itself.
        kept: a module that stays quantized: in dense format it is right; in packed format, whose config describes no other
            quantized layers, it is refused by this name.
        refused: who may be refused by this name instead.
        finite: see `judge`.
        ways: of making a dense output.
    """

    kind: str
    options: dict[str, Any]
    packed: str | None = None
    made: Callable[[Path, Path], Path] | None = None
    kept: str = ""
    refused: str = ""
    finite: bool = True
    ways: tuple[str, ...] = ("dense", "unpacked")


def eight_bits(**facts: Any) -> Callable[[Path, Path], Path]:
    return lambda source, out: quantized(source, out, **copy.deepcopy(facts))


def all_but(module: str, value: float | None = None) -> Callable[[Path, Path], Path]:
    return lambda source, out: obeying(source, out, module, value)


def groups(*found: dict[str, Any]) -> dict[str, Any]:
    return {f"group_{i}": group for i, group in enumerate(found)}


CHANNEL, TENSOR = models.group(), models.group(strategy="tensor")
HEAD = {"strategies": {LAYERS: "channel", "lm_head": "channel"}, "ignore": ()}
TENSORS_HEAD = {
    "strategies": {LAYERS: "channel", "lm_head": "tensor"}, "ignore": (),
    "groups": groups(CHANNEL, {**TENSOR, "targets": ["lm_head"]}),
}  # fmt: skip
TWO_GROUPS = {
    "strategies": {"down_proj": "tensor", LAYERS: "channel"},
    "groups": groups({**TENSOR, "targets": ["re:.*down_proj$"]}, CHANNEL),
}
LAYER_IGNORED = {"strategies": {r"layers\.0\..*_proj$": "channel"}, "ignore": ("lm_head", r"re:.*layers\.1\.")}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8": ("llama", {}),
    "INT8": ("llama", {"scheme": "INT8_W8A8"}),
    "FP8 tied": ("llama, tied", {}),
    "INT8 tied": ("llama, tied", {"scheme": "INT8_W8A8", "ignore": ("re:.*lm_head",)}),
    "FP8 biases": ("qwen2, biases", {}),
    "FP8 with head": ("llama", HEAD),
    "FP8 with a tensor's head": ("llama", TENSORS_HEAD),
    "FP8 per tensor": ("llama", {"strategies": {LAYERS: "tensor"}, "groups": groups(TENSOR)}),
    "FP8 in two groups": ("llama", TWO_GROUPS),
    "FP8 static": ("llama", {"static": True}),
    "FP8 with a layer ignored": ("llama", LAYER_IGNORED),
}
"""Name -> kind of model, arguments of `quantized`: folders in 8 bits that stock loaders read rightly."""

INT8_ONLY, FP8_ONLY = {"scheme": "INT8_W8A8"}, {"scheme": "FP8_DYNAMIC"}
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "one kind ignored": ({"ignore": ("*down_proj",)}, NO_DOWN),
    "one of q, k, v ignored": ({"ignore": (r"re:.*layers\.1\.self_attn\.k_proj",)}, NO_KEY),
    "one kind targeted": ({"targets": (r"re:.*mlp.*",)}, r"mlp.*_proj$"),
}
BLOCK = models.group(
    "float", "block", targets=[DOWN], weights={"block_structure": [32, 32]},
    input_activations={"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
)  # fmt: skip
IN_BLOCKS = {"strategies": {DOWN: "block", LAYERS: "channel"}}
HEAD_ONLY = eight_bits(strategies={"lm_head": "channel"}, groups={"head": models.group(targets=["lm_head"])}, ignore=())
MOE = {"strategies": {EXPERTS: "channel"}, "ignore": ("lm_head", r"re:.*mlp\.gate$")}

CASES: dict[str, Case] = {
    **{
        f"{kind}, {way}": Case(kind, options, ways=(way,))
        for kind in KINDS if kind != "qwen3_moe"
        for way, options in (("dense", INT8_ONLY), ("unpacked", FP8_ONLY))
    },
    **{  # by the names of the file, which are not those of the loaded model
        f"{kind} without {name}": Case(kind, {**INT8_ONLY, "ignore": (name,)}, ways=("dense",))
        for kind, name in (("llava", "*vision_tower*"), ("qwen2_vl", "*visual*"), ("llama, tied, base", "*down_proj"))
    },
    **{
        f"{kind}, {scheme}, {what}": Case(kind, {"scheme": scheme, **options}, packed)
        for kind in ("llama", "llama, tied") for scheme in SCHEMES for what, (options, packed) in PARTS.items()
    },
    **{
        f"{scheme}, a head targeted": Case("llama", {"scheme": scheme, "targets": ("*_proj", "lm_head")}, r"_proj$|^lm_head$")
        for scheme in SCHEMES
    },
    **{
        f"{kind}, {scheme}, a layer breaks the pattern": Case(
            kind, {"scheme": scheme, "skip_bad": True, "prune": "none"}, NO_KEY, all_but("model.layers.1.self_attn.q_proj")
        )
        for kind in ("llama", "llama, tied") for scheme in SCHEMES
    },
    "a layer with NaN": Case("llama", {**INT8_ONLY, "skip_bad": True}, SKIPPED, all_but(DOWN, np.nan), finite=False),
    # mixtures of experts: vLLM has one scheme for those of a layer, and INT8 ones it cannot load
    "experts": Case("qwen3_moe", FP8_ONLY, EXPERTS),
    "experts, one ignored": Case("qwen3_moe", {**FP8_ONLY, "ignore": (ONE_EXPERT,)}, TOGETHER, refused=ONE_EXPERT),
    "experts, one skipped": Case(
        "qwen3_moe", {**FP8_ONLY, "skip_bad": True, "prune": "none"}, TOGETHER, all_but(ONE_EXPERT), refused=ONE_EXPERT
    ),
    **{
        what: Case(
            kind, {}, r"layers\.0\..*_proj$" if "ignored" in what else LAYERS, eight_bits(**facts),
            kept="lm_head" * ("head" in what),
        )
        for what, (kind, facts) in SOURCES.items()
    },
    **{
        f"{what}, a kind ignored": Case(
            kind, {"ignore": ("*down_proj",)}, NO_DOWN, eight_bits(**facts), kept="lm_head" if "head" in what else DOWN
        )
        for what, (kind, facts) in SOURCES.items() if "ignored" not in what
    },
    "FP8, a layer skipped": Case(
        "llama", {"skip_bad": True, "prune": "none"}, SKIPPED, kept=DOWN,
        made=lambda source, out: quantized(obeying(source, out.with_name("obeying"), DOWN), out),
    ),
    "FP8, a layer with scales a block": Case(
        "llama", {"skip_bad": True}, SKIPPED, eight_bits(**IN_BLOCKS, groups=groups(BLOCK, CHANNEL)), refused="group_0"
    ),
    "FP8, a layer with scales a block, not declared": Case(
        "llama", {"skip_bad": True}, SKIPPED, eight_bits(**IN_BLOCKS), refused=DOWN
    ),
    **{
        f"FP8 head alone, {scheme}": Case("llama", {"scheme": scheme}, packed, HEAD_ONLY, refused="lm_head")
        for scheme, packed in {**dict.fromkeys(SCHEMES, LAYERS), "BF16": None}.items()
    },
    "FP8 experts": Case("qwen3_moe", {}, EXPERTS, eight_bits(**MOE)),
    "FP8 experts, one ignored": Case("qwen3_moe", {"ignore": (ONE_EXPERT,)}, TOGETHER, eight_bits(**MOE), kept="experts"),
}  # fmt: skip


@pytest.mark.parametrize("what", SOURCES)
def test_the_sources_are_right(what: str, source: Any, tmp_path: Path) -> None:
    """Their logits are near those of the unquantized model."""
    kind, facts = SOURCES[what]
    auto, given = KINDS[kind][0], eight_bits(**facts)(source(kind), tmp_path / "source")
    if what != "FP8 static":  # its activation scale is made up
        got, want = loaded(auto, given)[1].flatten(), loaded(auto, source(kind))[1].flatten()
        assert torch.nn.functional.cosine_similarity(got, want, 0) > 0.98


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, case in CASES.items() for way in case.ways])
def test_an_output(name: str, way: str, source: Any, tmp_path: Path) -> None:
    """It is right; or it is refused in a sentence that has the culprit's name, with nothing left behind."""
    case, out = CASES[name], tmp_path / "out"
    given = source(case.kind) if case.made is None else case.made(source(case.kind), tmp_path / "source")
    refusal = None
    try:
        convert(given, out, way, **{"prune": "magnitude", **case.options})
    except UnsupportedError as error:
        refusal = str(error)
    culprit = case.kept if case.kept and way == "unpacked" else case.refused
    assert (refusal is not None) == bool(culprit) or (culprit == case.refused != "")
    if refusal is not None:
        assert culprit in refusal
        assert {path.name for path in tmp_path.iterdir()} <= {"source", "obeying"}
    else:
        judge(case.kind, given, out, case.packed, finite=case.finite)
