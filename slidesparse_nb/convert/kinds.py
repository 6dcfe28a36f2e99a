"""What a matrix of a checkpoint is, told by its name, its shape and the vocabularies: a linear layer, or why it is none."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

EMBEDDING = re.compile(
    r".*embed.*|wte|wpe|shared|emb|.*_emb|positions|position_ids|rel_pos.*|.*relative_\w*bias(_\w+)?|bias_values|codes|"
    r"(\w+_)?(mask|iou|cls|class|query|object|obj_score|bos|eos|pad|image|dist\w*)_tokens?|queries(_\w+)?|query_feat",
    re.IGNORECASE,
)
POSITIONS = {"embed_positions", "relative_attention_bias_layer"}
"""Modules whose own parts are tables, too."""
HEAD = re.compile(
    r"(?!multi_?head)(\w*_)?(heads?|classifier)|lm_head|head_dist|score|logits|logits_proj|to_logits|qa_outputs|embed_out|unembed|"
    r"vocab_projector|vocab_transform|output_layer|output_projection|regression_layer|bbox_predictor|class_predictor",
    re.IGNORECASE,
)
OUTER_HEADS = {"output", "proj_out", "ff_out", "fc_out", "final", "enc_to_logits"}
"""Names that mean a head outside of the numbered blocks, and a linear layer of a block inside them."""
HEAD_PARTS = {"cls", "generator_predictions", "discriminator_predictions", "generator_lm_head"}
ROUTER = re.compile(r"(\w*_)?(router|gating|gate_network)|gate|wg|routing|(experts?|shared_expert|switch|moe|routing)_gate")
EXPERT = re.compile(r"expert|(\w+_)?experts(_\w+)?|moe|switch_mlp|block_sparse_moe|switch_glu")
BESIDE = ("router", "gate", "wg", "gating")
"""Routers that tell of the experts beside them."""
QUANTIZER = re.compile(r"_?(quantizers?|r?vq|\w*codebooks?\w*)", re.IGNORECASE)
NORM = re.compile(r"(.*norm\d*|ln_?\d*|.*_ln|ln_f)", re.IGNORECASE)
ADAPTER = re.compile(
    r"lora_(a|b|up|down|mid|embedding_[ab]|magnitude_vector)|(hada|loha|lokr|oft|boft|vera|ia3|randlora)_\w+", re.IGNORECASE
)
"""One part of a name that belongs to an adapter of a fine-tuning tool."""
CONV1D = {"c_attn", "c_fc", "c_proj", "q_attn"}
"""Layers that GPT-2 and its relatives store as [k, n]; GPTBigCode and Qwen use the same names for [n, k]."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Sibling layers that engines run as one matrix product."""
STACKED = {"gate_up_proj", "down_proj", "w1", "v1", "w2", "input_linear", "output_linear"}
"""Tensors of a layer's experts, all of them in one."""

SMALLEST_VOCABULARY = 128
"""Fewer rows are not taken for a vocabulary by their number alone."""


def fused_key(name: str) -> str | None:
    """One name for all modules that engines run as one: q/k/v, gate/up, and the experts of a layer; None for other modules."""
    wrapped = ".base_layer" if name.endswith(".base_layer") else ""  # a layer inside an adapter's wrapper
    parts = name.removesuffix(wrapped).removesuffix(".weight").split(".")
    for i in range(len(parts) - 1):
        if parts[i] == "experts" and is_number(parts[i + 1]):
            return ".".join(parts[: i + 1])
    if parts[-1] in STACKED and {*parts[-3:-1]} & {"experts", "block_sparse_moe"}:
        return ".".join(parts[:-1])
    for siblings in FUSED:
        if parts[-1] in siblings:
            return ".".join([*parts[:-1], "+".join(siblings) + wrapped])
    return None


def fused_names(name: str) -> list[str]:
    """How engines name the one matrix that a module becomes a part of."""
    parent, _, last = name.rpartition(".")
    for siblings, fused in ((FUSED[0], "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
        if last in siblings:
            return [f"{parent}.{fused}"]
    return []


def not_linear(module: str, shape: Sequence[int], vocabularies: Collection[int] = ()) -> str | None:
    """What a module with a weight of two dimensions is, if it is no linear layer to be packed.

    Args:
        shape: (n, k). vocabularies: numbers of rows that embeddings and heads have, see `sources.Source`.
    """
    if 0 in shape:
        return "empty"
    if len(module) > 2000:
        return None  # no name that the rules below were made for
    block = in_block(module)
    if (told := _by_name(tuple(part for part in module.split(".") if not is_number(part)) or (module,), block)) is not None:
        return told
    if shape and 32 * shape[0] <= shape[1] and shape[0] <= 16:
        return f"of {shape[0]} outputs only: a head, a router or a table"
    return "as large as the vocabulary" if shape and _rows_of_vocabulary(shape, block, vocabularies) else None


@lru_cache(maxsize=1 << 14)
def _by_name(names: tuple[str, ...], block: bool) -> str | None:
    """What the parts of a module's name, numbers left out, say that it is. A model has few such names, and many layers."""
    *parents, last = names
    if is_adapter(".".join(names)):
        return "an adapter"
    if any(QUANTIZER.fullmatch(part) for part in names):
        return "a codebook or part of a vector quantizer"
    if EMBEDDING.fullmatch(last) or (parents and parents[-1] in POSITIONS):
        return "an embedding"
    if (HEAD.fullmatch(last) and last not in ("q_head", "k_head", "v_head")) or (last in OUTER_HEADS and not block):
        return "an output head"
    if any(part in HEAD_PARTS or HEAD.fullmatch(part) for part in parents):
        return "part of an output head"
    if ROUTER.fullmatch(last) or any(part.endswith("router") or part in ("gate", "gating") for part in parents):
        return "a router"
    if NORM.fullmatch(last) or (parents and NORM.fullmatch(parents[-1]) and last in ("scale", "shift")):
        return "a norm"
    return None


def _rows_of_vocabulary(shape: Sequence[int], block: bool, vocabularies: Collection[int]) -> bool:
    """Whether a matrix has a row for every token; a head outside of the blocks may be padded."""
    n, k = shape[0], shape[1]
    if block:
        return n in vocabularies and n > 4 * k
    return n in vocabularies or (n % 8 == 0 and any(v >= 1000 and 0 < n - v < 1024 for v in vocabularies))


def is_adapter(name: str) -> bool:
    """Whether a tensor or module belongs to an adapter that is not merged into the weights beside it."""
    parts = name.split(".")
    wrapped = any(a.endswith("lora") and b in ("up", "down") for a, b in pairwise(parts))
    return wrapped or any(ADAPTER.fullmatch(part) for part in parts)


def is_number(part: str) -> bool:
    """Whether a part of a name counts layers, experts or the like."""
    return part.isascii() and part.isdecimal() and len(part) < 10


def in_block(module: str) -> bool:
    """Whether a module is inside a numbered block, as in layers.0.mlp.up_proj."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if is_number(part)), len(parts))
    return any(not is_number(part) for part in parts[first:])


def stacked(name: str, shape: Sequence[int], shapes: Shapes) -> bool:
    """Whether a tensor is stacked matrices of a mixture of experts, by its name or because a router is beside it."""
    parts = name.split(".")
    if len(shape) not in (2, 3) or min(shape[-2:]) < 8 or shape[0] == 1 or parts[-1].endswith("bias"):
        return False
    if any(EXPERT.fullmatch(part) for part in parts):
        return True
    if len(shape) == 2 or any("conv" in part or "embed" in part for part in parts):
        return False
    for depth in (1, 2):
        prefix = ".".join(parts[:-depth])
        if any(f"{prefix}.{router}.weight" in shapes or f"{prefix}.{router}.layer.weight" in shapes for router in BESIDE):
            return True
    return False


def transposed(shapes: Shapes) -> str | None:
    """Why weights are stored as [k, n] instead of [n, k], told by their names and biases; None if nothing says so.

    A bias has one value for every output: one of k values beside a weight [k, n] tells the orientation. The layers of GPT-2
    and its relatives share names, so one of them tells for all; where none has a bias, the product's shape tells (c_attn has
    more outputs than inputs, c_fc too).
    """
    doubtful: str | None = None
    certain = False
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) != 2:
            continue
        module = name.removesuffix(".weight")
        bias = shapes.get(f"{module}.bias")
        if bias is not None and len(bias) == 1 and shape[0] != shape[1] and bias[0] == shape[1]:
            return f"{name} is {list(shape)} and its bias has {bias[0]} values"
        last = module.rpartition(".")[2]
        if last not in CONV1D and not last.startswith("c_fc"):
            continue
        wide = last == "c_attn" or last.startswith("c_fc")
        if (wide or module.endswith("mlp.c_proj")) and shape[0] != shape[1]:
            if (shape[0] < shape[1]) == wide:
                return f"{name} is {list(shape)}, and {last} has {'more' if wide else 'fewer'} outputs than inputs"
            certain = True
        doubtful = doubtful or f"{name} is a name of GPT-2's, and no shape tells how it is stored"
    return None if certain else doubtful
