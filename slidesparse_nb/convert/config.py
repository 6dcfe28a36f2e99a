"""What an output says about itself: config.json and the metadata of its files (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint import Checkpoint, slidesparse_metadata
from ..dtypes import DType
from ..packed_tensors import TOOL, VERSION
from ..pattern import Pattern

DENSE_MARK = "slidesparse_dense"
"""Metadata key of files in dense format; its value is that of "slidesparse" in packed ones."""


def output_metadata(source: Checkpoint, format: str, pattern: Pattern, dtype: DType | None) -> dict[str, str]:
    """`__metadata__` of the output's files: the source's own entries, and what they hold."""
    kept = {key: value for key, value in source.metadata.items() if key not in ("slidesparse", DENSE_MARK)}
    mine = slidesparse_metadata(pattern, dtype)
    return {**kept, **(mine if format == "packed" else {"format": "pt", DENSE_MARK: mine["slidesparse"]})}


def is_ours(checkpoint: Checkpoint) -> bool:
    """Whether this library wrote a checkpoint: the metadata of its files says so."""
    return "slidesparse" in checkpoint.metadata or DENSE_MARK in checkpoint.metadata


def output_config(
    source: Checkpoint, format: str, pattern: Pattern, dtype: DType, ignored: Sequence[str]
) -> dict[str, Any] | None:
    """The output's config.json; None if the source has none.

    Packed: `quantization_config` describes the packed weights. Dense: it is what compressed-tensors writes for 8-bit weights,
    so that stock engines load it, and a top-level "slidesparse" key names the pattern. Never a key "sparsity_config": engines
    refuse it.

    Args:
        ignored: names of linear layers that are not packed.
    """
    if source.config is None:
        return None
    config = {key: value for key, value in source.config.items() if key not in ("quantization_config", "compression_config")}
    config.pop("slidesparse", None)
    facts = {
        "version": VERSION,
        "pattern": {"nnz": pattern.nnz, "group": pattern.group},
        "k_slice_unit": pattern.slice_unit,
    }
    if format == "packed":
        config["quantization_config"] = {
            "quant_method": "slidesparse",
            "version": VERSION,
            "format": "slidesparse-packed",
            "pattern": facts["pattern"],
            "weights": _weights(dtype),
            "input_activations": _activations(dtype),
            "ignore": list(ignored),
            "k_slice_unit": facts["k_slice_unit"],
        }
        return config
    if dtype.qmax is not None:
        name = "int-quantized" if dtype.name == "int8" else "float-quantized"
        group = {"targets": ["Linear"], "weights": _weights(dtype), "input_activations": _activations(dtype), "format": name}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "output_activations": None}},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }
    config["slidesparse"] = {**facts, "dtype": dtype.name, "ignore": list(ignored), "tool": TOOL}
    return config


def ignored_modules(config: Mapping[str, Any] | None) -> list[str]:
    """The linear layers that a packed checkpoint's config.json says are not packed."""
    quantization = (config or {}).get("quantization_config")
    ignored = quantization.get("ignore", []) if isinstance(quantization, Mapping) else []
    return [str(name) for name in ignored] if isinstance(ignored, list) else []


def _weights(dtype: DType) -> dict[str, Any]:
    if dtype.qmax is None:
        return {"num_bits": 16, "type": "float", "dtype": dtype.name}
    kind = "int" if dtype.name == "int8" else "float"
    return {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}


def _activations(dtype: DType) -> dict[str, Any] | None:
    if dtype.qmax is None:
        return None
    return {**_weights(dtype), "strategy": "token", "dynamic": True}
