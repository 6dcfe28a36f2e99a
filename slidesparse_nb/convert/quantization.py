"""What a compressed-tensors config says of quantized weights: what packing keeps is understood, and all else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.packed_config import names_problem
from ..errors import UnsupportedError, shown

NOTHING: tuple[Any, ...] = (None, False, {}, [], "")
"""Values that say nothing."""

KNOWN_CONFIG = {
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "global_compression_ratio",
    "sparsity_config", "transform_config", "version", "packed_modules_mapping", "provider", "run_compressed", "dequantize",
}  # fmt: skip
KNOWN_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
KNOWN_WEIGHTS = {
    "num_bits", "type", "symmetric", "strategy", "dynamic", "group_size", "block_structure", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
WEIGHT_LOCATIONS = {"weight_input", "weight_output"}
"""Where a transform is merged into the weights; anywhere else it acts on activations."""


def understood(where: str, quantization: Any) -> dict[str, Any]:
    """A statement, once it is known to be of a kind that packing keeps: compressed-tensors' symmetric 8-bit weights.

    Raises:
        UnsupportedError: it is anything else.
    """
    if not isinstance(quantization, Mapping):
        raise UnsupportedError(f"{where} is {shown(quantization)}, not an object")
    method = quantization.get("quant_method", quantization.get("quant_algo"))
    if method != "compressed-tensors":
        said = "says" if method is None else f"says method {shown(method)}, which is not supported"
        raise UnsupportedError(
            f"{where} {said} {shown(dict(quantization)) if method is None else ''}".rstrip()
            + "; only compressed-tensors FP8 and INT8 W8A8 checkpoints, or unquantized ones, can be packed"
        )
    _known(where, quantization, KNOWN_CONFIG)
    sparsity = quantization.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"{where}.sparsity_config says {shown(sparsity)}; decompress the weights first")
    _refuse_transform(f"{where}.transform_config", quantization.get("transform_config") or {})
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise UnsupportedError(f"{where}.config_groups is {shown(groups)}, not an object")
    for label, group in groups.items():
        _refuse_group(f"{where}.config_groups.{label}" if len(label) < 100 else f"{where}.config_groups", group)
    if problem := names_problem("ignore", quantization.get("ignore") or []):
        raise UnsupportedError(f"{where}.{problem}")
    return dict(quantization)


def _known(where: str, value: Mapping[str, Any], known: set[str]) -> None:
    """Refuse an entry that this program does not know, unless it says nothing."""
    for key, inner in value.items():
        if key not in known and inner not in NOTHING:
            raise UnsupportedError(
                f"{where} has {shown(key)}: {shown(inner)}, which packing might lose; remove it if it says nothing"
            )


def _refuse_transform(where: str, transform: Any) -> None:
    """Refuse transforms that act on activations: the packed weights alone would not compute the layer."""
    groups = transform.get("config_groups", {}) if isinstance(transform, Mapping) else None
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise UnsupportedError(f"{where} is {shown(transform)}; only transforms that are merged into the weights can be packed")
    for label, group in groups.items():
        applied = group.get("apply") or [{}]
        for use in applied if isinstance(applied, list) else [{}]:
            location = use.get("location") if isinstance(use, Mapping) else None
            if location not in WEIGHT_LOCATIONS:
                raise UnsupportedError(
                    f"{where}.config_groups.{label} acts on activations at run time (location {shown(location)}), which packed"
                    " weights do not; start from a model without online rotations"
                )


def _refuse_group(where: str, group: Any) -> None:
    """One config group must be symmetric 8-bit weights, per channel or tensor, with 8-bit activations."""
    group = group if isinstance(group, Mapping) else {}
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs or {}, Mapping):
        raise UnsupportedError(f"{where}: weights and input_activations must be objects")
    _known(where, group, KNOWN_GROUP)
    targets = group.get("targets")
    if problem := names_problem("targets", [] if targets is None else targets):
        raise UnsupportedError(f"{where}.{problem}")
    if group.get("output_activations"):
        raise UnsupportedError(f"{where}: output_activations are quantized, which packed weights do not; leave them out")
    facts = {"num_bits": (8,), "type": ("int", "float"), "strategy": ("channel", "tensor"), "symmetric": (True,)}
    for key, allowed in facts.items():
        if weights.get(key, allowed[0]) not in allowed:
            raise UnsupportedError(
                f"{where} (of {shown(targets)}): weights.{key} = {shown(weights[key])}; only"
                f" {' or '.join(map(repr, allowed))} can be packed"
            )
    if not weights and (inputs or targets):
        raise UnsupportedError(f"{where}: quantizes something else than weights ({shown(targets)}), which packing would lose")
    if not inputs:
        raise UnsupportedError(
            f"{where}: weight-only quantization is not supported; 8-bit packed weights run with 8-bit activations"
        )
    if inputs.get("num_bits", 8) != 8 or inputs.get("symmetric", True) is not True:
        raise UnsupportedError(f"{where}: input_activations must be symmetric 8-bit, to run as per-token quantization")
    if inputs.get("type", weights.get("type")) != weights.get("type", inputs.get("type")):
        raise UnsupportedError(
            f"{where}: input_activations of type {shown(inputs['type'])} beside weights of type {shown(weights.get('type'))};"
            " the two must agree"
        )
    if inputs.get("strategy", "token") not in ("token", "tensor"):
        raise UnsupportedError(
            f"{where}: input_activations.strategy = {shown(inputs['strategy'])}; only 'token' or 'tensor' can be run per token"
        )
    for name, value in (("weights", weights), ("input_activations", inputs)):
        _known(f"{where}.{name}", value, KNOWN_WEIGHTS)
