"""What an output says about itself: config.json and the metadata of its files (docs/format.md)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ..checkpoint import Checkpoint, slidesparse_metadata
from ..checkpoint.packed_config import PackedConfig, activation_facts, storage_facts
from ..checkpoint.packed_format import TOOL, pattern_facts, version_of
from ..checkpoint.stacked import Stacked
from ..core.pattern import Pattern
from ..core.scheme import Scheme
from ..errors import UnsupportedError, shown
from . import kinds
from .module import Module
from .select import QUANTIZED_CODES, QUANTIZED_PARTS, scale_problem
from .sources import Source, without_statements

DENSE_MARK = "slidesparse_dense"
"""Metadata key of files in dense format; its value is that of "slidesparse" in packed ones."""


def _stacked(modules: Iterable[Module]) -> dict[str, Stacked]:
    """The dense tensors of those that are experts."""
    return {module.name: module.stacked for module in modules if module.stacked is not None}


def output_metadata(
    source: Checkpoint, format: str, pattern: Pattern, scheme: Scheme | None, modules: Iterable[Module]
) -> dict[str, str]:
    """`__metadata__` of the output's files: the source's own entries, and what they hold."""
    kept = {key: value for key, value in source.metadata.items() if key not in ("slidesparse", DENSE_MARK)}
    mine = slidesparse_metadata(pattern, scheme, stacked=_stacked(modules) if format == "packed" else None)
    return {**kept, **(mine if format == "packed" else {"format": "pt", DENSE_MARK: mine["slidesparse"]})}


def is_ours(checkpoint: Checkpoint) -> bool:
    """Whether this library wrote a checkpoint: the metadata of its files says so."""
    return "slidesparse" in checkpoint.metadata or DENSE_MARK in checkpoint.metadata


def output_config(
    source: Checkpoint,
    said: Source,
    format: str,
    pattern: Pattern,
    scheme: Scheme,
    modules: Collection[Module],
    refused: Iterable[str] = (),
) -> dict[str, Any] | None:
    """The output's config.json; None if the source has none. Nothing that the source's config says of quantization is kept.

    Packed: `quantization_config` describes the packed weights. Dense: it is what compressed-tensors writes for 8-bit weights,
    so that stock engines load it, and a top-level "slidesparse" key names the pattern. Never a key "sparsity_config": engines
    refuse it. A module that stays quantized as it was has a config group, and everything else is in `ignore`: what is stored
    unquantized, an output head that loaders make out of the embedding, and the names that the source ignored.

    Args:
        said: what the source says of itself.
        modules: those that are packed. refused: names of others, which a real run would not leave as they are.

    Raises:
        UnsupportedError: a module stays quantized in a way that the output's config cannot describe.
    """
    stacked = _stacked(modules)
    packed = {module.name for module in modules} | {*refused}
    kept = _kept_quantized(source, said, format, scheme, packed)
    if source.config is None:
        return None
    config = without_statements(source.config)
    quantized = {*packed, *kept} - (stacked.keys() if format == "dense" else set())  # which dequantizes experts
    ignored = _ignored(source, said, quantized)
    facts = {
        "version": version_of(scheme),
        "pattern": pattern_facts(pattern),
        "k_slice_unit": scheme.slice_unit(pattern),
    }
    if format == "packed":
        config["quantization_config"] = PackedConfig(pattern, scheme, tuple(ignored), stacked).written()
        return config
    if scheme.scaled and quantized:
        name = "int-quantized" if scheme.dtype.numpy.kind == "i" else "float-quantized"
        main = {**_scheme(storage_facts(scheme.weights), activation_facts(scheme)), "format": name, "targets": ["Linear"]}
        groups: list[dict[str, Any]] = []
        for module, stays in kept.items():
            group = next((g for g in (main, *groups) if _scheme(g["weights"], g["input_activations"]) == stays), None)
            if group is None:
                groups.append(group := {**stays, "format": name, "targets": []})
            if group is not main or kinds.not_linear(module, ()) is not None:  # no engine counts a head among "Linear"
                group["targets"] += [_entry(module), *(kinds.fused_names(module) if group is not main else [])]
                others = {*packed, *(other for other in kept if kept[other] != stays)}
                form = next((form for form in _forms(module) if not _covers(form, others)), None)
                group["targets"] += [form] if form and form not in group["targets"] and is_renamed(source, said) else []
        groups.append(main)  # after those that name modules: a name goes before a class, and loaders warn otherwise
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": name,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": {**group, "output_activations": None} for i, group in enumerate(groups)},
            "ignore": ignored,
            "kv_cache_scheme": said.kv_cache_scheme,
        }
    config["slidesparse"] = {**facts, "dtype": scheme.dtype.name, "ignore": ignored, "tool": TOOL}
    return config


def _scheme(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"weights": dict(weights), "input_activations": None if inputs is None else dict(inputs)}


def _kept_quantized(
    source: Checkpoint, said: Source, format: str, scheme: Scheme, packed: Collection[str]
) -> dict[str, dict[str, Any]]:
    """The modules that stay in 8 bits with their scales, each with the scheme that describes it.

    Raises:
        UnsupportedError: the output's config cannot describe one.
    """
    kept = {}
    for name, (info, _) in source.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or module in packed or info.code not in QUANTIZED_CODES or len(info.shape) != 2:
            continue
        scales = [part for part in ("weight_scale", "weight_scale_inv") if f"{module}.{part}" in source.tensors]
        if not scales:
            continue  # a table of small integers
        role = kinds.not_linear(module, info.shape)
        problem = f"{role} in 8 bits" if role is not None and "head" not in role else scale_problem(source, module, info)
        code = scheme.dtype.safetensors if format == "dense" and scheme.scaled else None
        if problem is None and info.code == code and said.ignores(module) is None:
            kept[module] = _kept_scheme(source, said, module, scheme)
            continue
        what = problem or ("a packed checkpoint has no other quantized layers" if format == "packed" else None)
        raise UnsupportedError(
            f"{shown(name)}: would stay {info.code} with {shown(f'{module}.{scales[0]}')}, which the output's config cannot"
            f" describe ({what or f'its weights are {scheme}'}); pack it too, or dequantize it first"
            + ", or use --format dense"
            * (format == "packed" and problem is None and info.code == scheme.dtype.safetensors)
        )
    return kept


def _kept_scheme(source: Checkpoint, said: Source, module: str, scheme: Scheme) -> dict[str, Any]:
    """How a module that stays as it was is quantized, by its scales (weights) and the source's config (activations)."""
    scale = source.tensors[f"{module}.weight_scale"][0]
    strategy = "channel" if scale.shape and scale.shape[0] == source.tensors[f"{module}.weight"][0].shape[0] > 1 else "tensor"
    inputs = (said.group_of(module) or {}).get("input_activations") or {}
    static = f"{module}.input_scale" in source.tensors
    found = {key: inputs[key] for key in ("strategy", "dynamic") if key in inputs}
    return _scheme(
        {**storage_facts(scheme.weights), "strategy": strategy},
        {**(activation_facts(scheme) or {}), **({"strategy": "tensor", "dynamic": False} if static else {}), **found},
    )


HEADS = (
    "lm_head", "lm_head.decoder", "lm_head.out_proj", "predictions.decoder", "mlm_score.decoder", "vocab_projector",
    "generator_lm_head", "ctc_head", "embed_out", "proj_out", "output_projection", "output_layer", "lm_loss", "pred_layer.proj",
    "entity_predictions.decoder",
)  # fmt: skip
"""Heads that loaders make out of the embedding, by their names in Hugging Face's models."""
GENERIC = {"model", "module", "_orig_mod", "base_model", "transformer", "thinker"}
"""First parts of module names that loaders add, drop or move."""


def _ignored(source: Checkpoint, said: Source, quantized: set[str]) -> list[str]:
    """Names for `ignore`: matrices that are stored unquantized, heads without a tensor, and the source's own names."""
    names, anywhere = set(said.ignore), set()
    for name, (info, _) in source.tensors.items():
        module = name.removesuffix(".weight")
        parent, _, last = name.rpartition(".")
        if (
            len(info.shape) >= 2
            and not {module, parent} & quantized
            and last not in QUANTIZED_PARTS
            and not last.endswith("bias")
        ):
            names.add(_entry(module))
            if module == name and kinds.stacked(name, info.shape, {}):
                names.add(_entry(parent))  # experts: engines know the module by its parent's name
            if len(info.shape) == 2:
                anywhere.add(module)
    if is_renamed(source, said):
        covering: dict[str, bool] = {}
        for module in sorted(anywhere):
            for form in _forms(module):
                if form not in covering:
                    covering[form] = _covers(form, quantized)
                if not covering[form]:
                    names.add(form)
                    break
    heads = [head for head in HEADS if not any(module == head or module.endswith(f".{head}") for module in quantized)]
    if "lm_head" not in names:
        names |= {"lm_head", f"re:(.*[.])?({'|'.join(re.escape(head) for head in heads)}|lm_heads[.]\\d+)$"}
        names |= {"decoder"} if any(kind.startswith("modernbert") for kind in said.model_types.values()) else set()
    if any(kinds.not_linear(module, ()) == "a router" for module in anywhere) and not _covers(ROUTERS, quantized):
        names.add(ROUTERS)  # some loaders give them another parent
    return sorted(name for name in names if not _covers(name, quantized))


ROUTERS = "re:.*[.](gate|router)$"
"""Routers, whatever module loaders put them into."""


def is_renamed(source: Checkpoint, said: Source) -> bool:
    """Whether loaders may give modules other names than the files: a model of several, or one saved without its head."""
    usual = {"model", "transformer", "lm_head"}
    return len(said.model_types) > 1 or any(name.partition(".")[0] not in usual for name in source.tensors)


def _entry(module: str) -> str:
    """A name for `ignore` or `targets`; one that begins like a regular expression becomes the expression for itself."""
    return f"re:{re.escape(module)}$" if module.startswith("re:") else module


def _forms(module: str) -> Iterator[str]:
    """Regular expressions for a module whose name loaders may begin otherwise, the widest first.

    Its tower, anything, and its place in a block; then the whole name. Each with its like in other layers, then for it alone.
    """
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in GENERIC:
        parts = parts[1:]
    digit = next((i for i, part in enumerate(parts) if kinds.is_number(part)), len(parts) - 1)
    tail = max(0, digit - 1)
    for start in dict.fromkeys((tail, 0)):
        for numbers in (False, True):
            form = [re.escape(part) if numbers or not kinds.is_number(part) else r"\d+" for part in parts]
            tower = f"{form[0]}[.](.*[.])?" if start else ""
            yield f"re:(.*[.])?{tower}{'[.]'.join(form[start:])}$"


def _covers(name: str, quantized: Collection[str]) -> bool:
    """Whether an entry of `ignore` matches a module that is quantized in the output."""
    if name.startswith("re:"):
        return any(re.match(name[3:], module) for module in quantized)
    return name in quantized
