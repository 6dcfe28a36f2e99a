"""What a matrix of a checkpoint is, told by its name, its shape and the vocabularies: a linear layer, or why it is none."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

EMBEDDINGS = {
    "wte",
    "wpe",
    "shared",
    "emb",
    "relative_attention_bias",
    "positions",
    "position_ids",
    "rel_pos",
    "codes",
}
HEADS = {
    "lm_head", "score", "head", "heads", "qa_outputs", "embed_out", "unembed", "vocab_projector", "vocab_transform",
    "output_layer", "output_projection", "logits", "logits_proj", "to_logits",
}  # fmt: skip
OUTER_HEADS = {"output", "proj_out", "ff_out", "fc_out", "final"}
"""Names that mean a head outside of the numbered blocks, and a linear layer of a block inside them."""
HEAD_PARTS = {"lm_head", "lm_heads", "cls", "v_head", "generator"}
ROUTERS = {"router", "gate", "wg", "shared_expert_gate", "gating", "gate_network", "switch_gate"}
QUANTIZERS = {"quantizer", "quantizers", "vq", "rvq", "codebook", "codebooks"}
EXPERTS = {"moe", "switch_mlp", "block_sparse_moe", "switch_glu"}
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
)
"""Sibling layers that engines run as one matrix product."""

SMALLEST_VOCABULARY = 128
"""Fewer rows are not taken for a vocabulary by their number alone."""


def fused_key(name: str) -> str | None:
    """One name for all modules that engines run as one: q/k/v, gate/up, and the experts of a layer; None for other modules."""
    wrapped = ".base_layer" if name.endswith(".base_layer") else ""  # a layer inside an adapter's wrapper
    parts = name.removesuffix(wrapped).split(".")
    for i in range(len(parts) - 1):
        if parts[i] == "experts" and parts[i + 1].isdigit():
            return ".".join(parts[: i + 1])
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
        shape: (n, k). vocabularies: numbers of rows that embeddings and heads have, see `source.Source`.
    """
    *parents, last = module.split(".")
    names = [part for part in (*parents, last) if not part.isdigit()] or [last]
    last = names[-1]
    block = in_block(module)
    if 0 in shape:
        return "empty"
    if is_adapter(module):
        return "an adapter"
    if any(part.lower().lstrip("_") in QUANTIZERS or "codebook" in part.lower() for part in names):
        return "a codebook or part of a vector quantizer"
    if "embed" in last or last in EMBEDDINGS or last.endswith("_emb"):
        return "an embedding"
    if last in HEADS or last.endswith(("classifier", "_head", "_heads", "lm_head")) or (last in OUTER_HEADS and not block):
        return "an output head"
    if any(part in HEAD_PARTS or part.endswith(("classifier", "medusa_head")) for part in names[:-1]):
        return "part of an output head"
    if last in ROUTERS or "router" in names[:-1]:
        return "a router"
    if len(last) < 200 and NORM.fullmatch(last):
        return "a norm"
    large = shape and shape[0] in vocabularies and (not block or shape[0] > 4 * shape[1])
    return "as large as the vocabulary" if large else None


def is_adapter(name: str) -> bool:
    """Whether a tensor or module belongs to an adapter that is not merged into the weights beside it."""
    parts = name.split(".")
    wrapped = any(a.endswith("lora") and b in ("up", "down") for a, b in pairwise(parts))
    return wrapped or any(ADAPTER.fullmatch(part) for part in parts)


def in_block(module: str) -> bool:
    """Whether a module is inside a numbered block, as in layers.0.mlp.up_proj."""
    *parents, last = module.split(".")
    return any(part.isdigit() for part in parents) and not last.isdigit()


def stacked(name: str, shape: Sequence[int], shapes: Shapes) -> str | None:
    """What a tensor is that is neither a vector nor the weight [n, k] of a module; the second word of the reason says experts.

    Returns:
        "experts" for stacked matrices of a mixture of experts, by name or because a router is beside them; else None.
    """
    parts = name.split(".")
    if len(shape) == 2 and not any("expert" in part for part in parts):
        return None
    if any("expert" in part or part in EXPERTS for part in parts):
        return "experts"
    if len(shape) != 3 or shape[0] == 1 or min(shape[1:]) < 8 or any("conv" in part or "embed" in part for part in parts):
        return None
    for depth in (1, 2):
        prefix = ".".join(parts[:-depth])
        if any(f"{prefix}.{router}.weight" in shapes or f"{prefix}.{router}.layer.weight" in shapes for router in ROUTERS):
            return "experts"
    return None


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
        if last not in CONV1D:
            continue
        if last in ("c_attn", "c_fc") and shape[0] != shape[1]:
            if shape[0] < shape[1]:
                return f"{name} is {list(shape)}, and {last} has more outputs than inputs"
            certain = True
        doubtful = doubtful or f"{name} is a name of GPT-2's, and no shape tells how it is stored"
    return None if certain else doubtful
