"""Which tensors of a checkpoint are linear layers to be packed, of what type, and why the others are not.

The decisions are names, types and shapes; no weight is read. Parts that serving engines fuse into one
matrix (q/k/v, gate/up) are decided together: all are packed or none.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import dtypes
from ..checkpoint import Checkpoint
from ..dtypes import DType
from ..errors import OperandError, UnsupportedError, VerificationError
from ..pattern import Pattern

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Sibling layers that engines run as one matrix product."""

EMBEDDINGS = {"wte", "wpe", "shared", "emb", "relative_attention_bias"}
HEADS = {
    "lm_head",
    "score",
    "head",
    "qa_outputs",
    "embed_out",
    "vocab_projector",
    "vocab_transform",
    "output_layer",
    "output_projection",
}
HEAD_PARTS = {"lm_head", "cls", "v_head"}
ROUTERS = {"router", "gate", "wg", "shared_expert_gate"}
NORM = re.compile(r"(.*norm|ln_?\d*|.*_ln|ln_f)", re.IGNORECASE)
"""Names of modules with a two-dimensional weight that stay as they are, unless --targets names them exactly."""

TRANSPOSED = {"gpt2": "Conv1D", "openai-gpt": "Conv1D", "imagegpt": "Conv1D"}
"""Model types whose layers store w as [k, n]: packing would group the wrong axis."""

SOURCE_CODES = ("F32", "F16", "BF16", "F8_E4M3", "I8")
QUANTIZED_CODES = ("F8_E4M3", "I8")


@dataclass(frozen=True)
class Module:
    """One linear layer X: its tensors in the checkpoint and the type it will be stored in.

    Attributes:
        name: X, where the weight is `X.weight`.
        shape: (n, k).
        code: safetensors code of the source weight.
        dtype: the packed type.
        scale: name of the source's scale tensor, if the weight is already quantized.
        replaced: source tensors that packing replaces or makes meaningless.
    """

    name: str
    shape: tuple[int, int]
    code: str
    dtype: DType
    scale: str | None
    replaced: tuple[str, ...]

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


@dataclass
class Selection:
    """What to pack, and for every other candidate the reason why not."""

    modules: list[Module] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    """Modules that ought to be packed but cannot be: an error, or skipped if the user says so."""
    notes: list[str] = field(default_factory=list)

    def drop(self, name: str, reason: str) -> None:
        """Leave one more module dense, and with it the parts that an engine fuses with it."""
        gone = {name: reason}
        for sibling in fused_with(name):
            gone[sibling] = f"fused by engines with {name}, which stays dense"
        present = {m.name for m in self.modules}
        self.left_dense.update({n: r for n, r in gone.items() if n in present or n == name})
        self.modules = [m for m in self.modules if m.name not in gone]


def fused_with(name: str) -> list[str]:
    """Names of the modules that engines fuse with this one."""
    parent, _, last = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    return [prefix + part for parts in FUSED if last in parts for part in parts if part != last]


Matcher = Callable[[str], "str | None"]
"""From a module's name to the pattern that it matches."""


def matcher(patterns: Iterable[str], option: str, names: Iterable[str]) -> tuple[Matcher, list[str]]:
    """A function from a module's name to the first of `patterns` (exact, glob, or "re:" regular expression) that it matches.

    Returns:
        That function, and the patterns that match none of `names`.

    Raises:
        OperandError: a pattern is no regular expression.
    """
    exact: dict[str, str] = {}
    shapes: list[tuple[str, re.Pattern[str]]] = []
    for text in patterns:
        try:
            if text.startswith("re:"):
                shapes.append((text, re.compile(text[3:])))
                continue
        except re.error as error:
            raise OperandError(f"{option}: {text!r} is not a regular expression ({error})") from None
        name = text.removesuffix(".weight")
        exact.setdefault(name, text)
        if any(c in name for c in "*?["):
            shapes.append((text, re.compile(fnmatch.translate(name))))

    def match(name: str) -> str | None:
        return exact.get(name) or next((text for text, regex in shapes if regex.match(name)), None)

    names = set(names)
    found = {text for name, text in exact.items() if name in names}
    found |= {text for text, regex in shapes if any(regex.match(name) for name in names)}
    return match, [text for text in dict.fromkeys([*exact.values(), *(text for text, _ in shapes)]) if text not in found]


def select(
    checkpoint: Checkpoint,
    *,
    pattern: Pattern | None = None,
    scheme: str = "auto",
    targets: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
) -> Selection:
    """Decide what to pack.

    Args:
        pattern: to leave out weights that are narrower than one of its groups.
        scheme: "auto" (the source's type; float32 becomes bfloat16) or the name of a packed type.
        targets: pack only modules that match one of these; a module named exactly is packed whatever its kind.
        ignore: pack no module that matches one of these.

    Raises:
        OperandError: an unknown scheme, or a target that matches nothing.
        UnsupportedError: the checkpoint as a whole is of a kind that cannot be packed.
    """
    tensors = {name: (info.code, info.shape) for name, (info, _) in checkpoint.tensors.items()}
    selection = Selection()
    _refuse_config(checkpoint.config or {}, tensors, selection)
    quantized = any(code in QUANTIZED_CODES and name.endswith(".weight") for name, (code, _) in tensors.items())
    vocabulary = (checkpoint.config or {}).get("vocab_size")
    candidates = {name[:-7]: shape for name, (_, shape) in tensors.items() if name.endswith(".weight") and len(shape) == 2}
    targeted, astray = matcher(targets, "targets", candidates)
    if astray:
        example = next(
            (name for name, shape in candidates.items() if not _kind(name, shape, vocabulary)), "layers.0.mlp.up_proj"
        )
        raise OperandError(
            f"targets: {astray[0]!r} matches no two-dimensional weight; names look like {example!r} (exact, a glob such as"
            " '*_proj', or 're:...'; they are names of modules, not of classes)"
        )
    ignored, astray = matcher(ignore, "ignore", candidates)
    selection.notes += [f"--ignore {text!r} matches nothing here" for text in astray]
    for name, (code, shape) in tensors.items():
        if len(shape) == 3 and "expert" in name:
            selection.bad[name] = (
                f"{name}: stacked experts {list(shape)} are not supported yet; unstack them into one weight an expert"
            )
        if not name.endswith(".weight") or len(shape) != 2:
            continue
        module = name.removesuffix(".weight")
        kind = _kind(module, shape, vocabulary)
        if (by := ignored(module)) is not None:
            selection.left_dense[module] = f"ignored by {by!r}"
        elif targets and targeted(module) is None:
            selection.left_dense[module] = "not among the targets"
        elif kind is not None and module not in targets and name not in targets:
            selection.left_dense[module] = kind
        elif pattern is not None and shape[1] < pattern.group:
            selection.left_dense[module] = f"narrower than a group of {pattern}"
        elif quantized and code not in QUANTIZED_CODES:
            selection.left_dense[module] = f"not quantized in the source ({code})"
        elif code not in SOURCE_CODES:
            wanted = ", ".join(SOURCE_CODES)
            selection.bad[module] = f"{name}: {code} weights cannot be packed; convert them to one of {wanted}"
        else:
            _add(selection, module, code, (shape[0], shape[1]), checkpoint, scheme)
    for module in [m.name for m in selection.modules]:
        for sibling in fused_with(module):
            if sibling in selection.left_dense or sibling in selection.bad:
                selection.left_dense[module] = f"fused by engines with {sibling}, which stays dense"
    selection.modules = [m for m in selection.modules if m.name not in selection.left_dense]
    _one_type(selection)
    return selection


def _kind(module: str, shape: tuple[int, ...], vocabulary: object) -> str | None:
    """What a two-dimensional weight is, if it is no linear layer to be packed; by its name, and by the vocabulary's size."""
    if isinstance(vocabulary, int) and vocabulary >= 1000 and shape[0] == vocabulary:
        return "as large as the vocabulary"
    *parents, last = module.split(".")
    if 0 in shape:
        return "empty"
    if "embed" in last or last in EMBEDDINGS or last.endswith("_emb"):
        return "an embedding"
    if last in HEADS or last.endswith("classifier") or module in ("output", "proj_out"):
        return "an output head"
    if any(part in HEAD_PARTS or part.endswith("classifier") for part in parents):
        return "part of an output head"
    if last in ROUTERS or "router" in parents:
        return "a router"
    return "a norm" if len(last) < 200 and NORM.fullmatch(last) else None


def _add(selection: Selection, name: str, code: str, shape: tuple[int, int], checkpoint: Checkpoint, scheme: str) -> None:
    """Append one module, or say in `selection.bad` why it cannot be packed."""
    tensors = checkpoint.tensors
    source = {"F32": dtypes.BFLOAT16}.get(code) or next(t for t in dtypes.PACKED if t.safetensors == code)
    dtype = source if scheme == "auto" else dtypes.packed_dtype(scheme)
    parts = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point") if code in QUANTIZED_CODES else ()
    companions = tuple(f"{name}.{part}" for part in parts if f"{name}.{part}" in tensors)
    scale = None
    if code in QUANTIZED_CODES:
        scale = f"{name}.weight_scale"
        if f"{name}.weight_scale_inv" in tensors:
            selection.bad[name] = f"{name}.weight_scale_inv: block-wise scales are not supported; requantize per channel"
            return
        if scale not in tensors:
            selection.bad[name] = (
                f"{name}.weight: {code} values without {scale}; only per-channel or per-tensor scales can be packed"
            )
            return
        found = tensors[scale][0]
        rows = found.shape
        if found.code not in ("F32", "F16", "BF16") or rows not in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
            selection.bad[name] = (
                f"{scale}: {found.code} {list(rows)} is neither per channel [{shape[0]}, 1] nor per tensor [1];"
                " requantize per channel"
            )
            return
        if (zero := f"{name}.weight_zero_point") in companions and checkpoint.array(zero).any():
            selection.bad[name] = f"{zero}: a zero point other than 0 cannot be packed; requantize symmetrically"
            return
        if dtype is not source:
            raise UnsupportedError(
                f"{name}.weight: already quantized to {source}; it cannot become {dtype}: use --scheme auto, or start from the"
                " unquantized model"
            )
    selection.modules.append(Module(name, shape, code, dtype, scale, (f"{name}.weight", *companions)))


def named(checkpoint: Checkpoint, stored: Mapping[str, DType]) -> dict[str, Module]:
    """Modules by their exact names, whatever they are and whatever stands beside them, with the types they are stored in.

    Raises:
        VerificationError: the weight of that name could not have been packed into that type.
        UnsupportedError: the checkpoint as a whole is of a kind that cannot be packed.
    """
    selection = Selection()
    _refuse_config(checkpoint.config or {}, {name: info.shape for name, (info, _) in checkpoint.tensors.items()}, selection)
    for name, dtype in stored.items():
        info = checkpoint.tensors[f"{name}.weight"][0]
        if info.code not in SOURCE_CODES or (info.code in QUANTIZED_CODES and info.code != dtype.safetensors):
            raise VerificationError(f"{name}.weight: {info.code} weights of the source could not have been packed as {dtype}")
        scheme = "auto" if info.code in QUANTIZED_CODES else dtype.scheme
        _add(selection, name, info.code, (info.shape[0], info.shape[1]), checkpoint, scheme)
        if why := selection.bad.get(name):
            raise VerificationError(f"{why} (the source's weight of that name could not have been packed)")
    return {module.name: module for module in selection.modules}


def _one_type(selection: Selection) -> None:
    """All packed modules of a checkpoint share one type; say what fp32 became."""
    kinds = {m.dtype.name for m in selection.modules}
    if len(kinds) > 1:
        raise UnsupportedError(
            f"weights of several types ({', '.join(sorted(kinds))}) in one checkpoint; choose one with --scheme"
        )
    if any(m.code == "F32" and m.dtype is dtypes.BFLOAT16 for m in selection.modules):
        selection.notes.append("float32 weights are stored as bfloat16 (8 bits of precision); --scheme FP16 keeps 11")
    if any(part.endswith(".input_scale") for m in selection.modules for part in m.replaced):
        selection.notes.append(
            "static activation scales (input_scale) are dropped: activations are quantized per token at run time"
        )


def _refuse_config(config: Mapping[str, Any], tensors: Mapping[str, Any], selection: Selection) -> None:
    """Refuse a checkpoint whose config.json or tensor names say that it cannot be packed at all."""
    stray = next((name for name in tensors if name.endswith((".weight_meta", ".weight_shape"))), None)
    if stray is not None and not any(name.endswith(".weight_packed") for name in tensors):
        raise UnsupportedError(f"{stray}: a packed checkpoint could not be told from one of another tool; rename this tensor")
    if any(name.endswith(".weight_packed") for name in tensors):
        mine = any(name.endswith(".weight_meta") for name in tensors)
        what = (
            "is packed already; `slidesparse show --unpack OUT` writes it back dense"
            if mine
            else "holds another tool's packed weights"
        )
        raise UnsupportedError(f"this checkpoint {what}")
    model_type = str(config.get("model_type", ""))
    if model_type in TRANSPOSED:
        raise UnsupportedError(
            f"model_type {model_type!r} stores its {TRANSPOSED[model_type]} weights as [k, n]; transpose them to [n, k] first"
        )
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return
    if not isinstance(quantization, Mapping):
        raise UnsupportedError("config.json: quantization_config is not an object")
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise UnsupportedError(
            f"config.json: quant_method {method!r} is not supported; only compressed-tensors FP8 and INT8 W8A8 checkpoints, or"
            " unquantized ones, can be packed"
        )
    groups = quantization.get("config_groups")
    for label, group in groups.items() if isinstance(groups, Mapping) else ():
        _refuse_group(f"config.json: config_groups.{label}", group if isinstance(group, Mapping) else {})
    if quantization.get("kv_cache_scheme"):
        selection.notes.append("kv_cache_scheme of the source's config.json is not carried over; its scale tensors are")


def _refuse_group(where: str, group: Mapping[str, Any]) -> None:
    """One compressed-tensors config group must be symmetric 8-bit weights, per channel or tensor, with 8-bit activations."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs or {}, Mapping):
        raise UnsupportedError(f"{where}: weights and input_activations must be objects")
    facts = {"num_bits": (8,), "type": ("int", "float"), "strategy": ("channel", "tensor"), "symmetric": (True,)}
    for key, allowed in facts.items():
        if weights.get(key, allowed[0]) not in allowed:
            raise UnsupportedError(
                f"{where}: weights.{key} = {weights[key]!r}; only {' or '.join(map(repr, allowed))} can be packed"
            )
    if not inputs:
        raise UnsupportedError(
            f"{where}: weight-only quantization is not supported; 8-bit packed weights run with 8-bit activations"
        )
    if inputs.get("num_bits", 8) != 8 or inputs.get("symmetric", True) is not True:
        raise UnsupportedError(f"{where}: input_activations must be symmetric 8-bit, to run as per-token quantization")
