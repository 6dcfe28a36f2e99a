"""Small made-up models, in the shapes that real checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cases import same

import slidesparse_nb as ss
from slidesparse_nb import Pattern
from slidesparse_nb.checkpoint import index_bytes
from slidesparse_nb.checkpoint.safetensors_writer import SafetensorsWriter
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import CODE_OF, FLOAT8, INT8

BF16 = np.dtype(ml_dtypes.bfloat16)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    """One .safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [(name, CODE_OF[array.dtype], array.shape) for name, array in tensors.items()]
    with SafetensorsWriter(path, entries, {"format": "pt"} if metadata is None else metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return path


def tensors(
    dtype: Any = BF16, *, layers: int = 2, hidden: int = 48, seed: int = 0, prune: str | None = "6:8"
) -> dict[str, np.ndarray]:
    """A decoder's tensors: attention with biases, gated MLP, norms, a router, embeddings and a head."""
    rng = np.random.default_rng(seed)

    def dense(*shape: int) -> np.ndarray:
        w = rng.standard_normal(shape).astype(np.float32)
        if prune and len(shape) == 2:
            w = reference.prune(w, Pattern.of(prune))
        return w.astype(dtype)

    found = {"model.embed_tokens.weight": rng.standard_normal((64, hidden)).astype(dtype)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{at}.self_attn.{part}.weight"] = dense(hidden, hidden)
        found[f"{at}.self_attn.q_proj.bias"] = rng.standard_normal(hidden).astype(dtype)
        for part in ("gate_proj", "up_proj"):
            found[f"{at}.mlp.{part}.weight"] = dense(2 * hidden, hidden)
        found[f"{at}.mlp.down_proj.weight"] = dense(hidden, 2 * hidden)
        found[f"{at}.mlp.gate.weight"] = rng.standard_normal((4, hidden)).astype(dtype)
        found[f"{at}.input_layernorm.weight"] = np.ones(hidden, dtype)
    found["model.norm.weight"] = np.ones(hidden, dtype)
    found["lm_head.weight"] = rng.standard_normal((64, hidden)).astype(dtype)
    return found


MODULES = tuple(
    [f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
)


def folder(
    path: Path, parts: dict[str, np.ndarray] | None = None, *, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A Hugging Face folder: weights in `shards` files, config.json, a tokenizer, a subfolder."""
    parts = tensors() if parts is None else parts
    path.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        write(path / "model.safetensors", parts)
    else:
        homes: dict[str, str] = {}
        for i in range(shards):
            name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            mine = {key: parts[key] for key in list(parts)[i::shards]}
            write(path / name, mine)
            homes.update(dict.fromkeys(mine, name))
        (path / "model.safetensors.index.json").write_bytes(index_bytes(homes, sum(a.nbytes for a in parts.values())))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 48, **(config or {})}))
    (path / "tokenizer.json").write_text("{}")
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text('{"mode": "mean"}')
    (path / "pytorch_model.bin").write_bytes(b"weights of another format")
    return path


def group(kind: str = "float", strategy: str = "channel", dynamic: bool = True, **given: Any) -> dict[str, Any]:
    """A config group of compressed-tensors, of 8-bit weights and activations."""
    args = {"num_bits": 8, "type": kind, "symmetric": True}
    inputs = {**args, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    weights = {**args, "strategy": strategy, "dynamic": False, **given.pop("weights", {})}
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **given}


def quantization(*groups: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The quantization_config of these groups."""
    named = {f"group_{i}": each for i, each in enumerate(groups)}
    base = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": named, "ignore": ["lm_head"]}
    return {"quantization_config": {**base, **given}}


def quantized(kind: str, scales: str = "channel", *, prune: str | None = "6:8") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The same decoder as compressed-tensors writes it: tensors and config; `scales` per "channel" or per "tensor"."""
    dtype, name = (INT8, "int") if kind == "int8" else (FLOAT8, "float")
    parts: dict[str, np.ndarray] = {}
    for tensor, w in tensors(prune=prune).items():
        module = tensor.removesuffix(".weight")
        if not tensor.endswith(".weight") or not module.endswith(MODULES):
            parts[tensor] = w
            continue
        q, scale = reference.quantize(w if scales == "channel" else w.reshape(1, -1), dtype)
        parts[tensor] = q.reshape(w.shape)
        parts[f"{module}.weight_scale"] = (scale if scales == "channel" else scale.reshape(1)).astype(BF16)
    return parts, quantization(group(name, scales), format=f"{name}-quantized")


def assert_made(out: Path, source: Path, report: ss.Report) -> None:
    """Assert that an output holds what the reference makes of its source, whose other tensors are copied, and nothing else.

    Weights that were pruned at random are not looked at.
    """
    stored, given = ss.load(out), dict(ss.load(source))
    for module in report.modules:
        name, scheme = module.name, ss.Scheme.of(report.scheme)
        w, scale = given.pop(f"{name}.weight"), given.pop(f"{name}.weight_scale", None)
        for part in ("weight_zero_point", "input_scale", "input_zero_point"):
            given.pop(f"{name}.{part}", None)
        if scale is not None:
            scale = np.broadcast_to(scale.astype(np.float32).reshape(-1, 1), (w.shape[0], 1))
        made = stored.pop(name if report.format == "packed" else f"{name}.weight")
        if report.format == "dense":
            stored.pop(f"{name}.weight_scale", None)
            assert not len(reference.violations(made, Pattern.of(report.pattern))), f"{name} breaks the pattern"
        if report.prune == "random":
            continue
        pattern = scheme.pattern(report.pattern)
        wanted = reference.pack(reference.prune(w, pattern) if report.prune == "magnitude" else w, pattern, scheme, scale)
        if report.format == "packed":
            same(made, wanted)
        else:  # where -0.0 may stand
            assert (made.dtype, made.shape) == (wanted.dtype.numpy, wanted.shape), name
            np.testing.assert_array_equal(made.astype(np.float32), reference.unpack(wanted).astype(np.float32), err_msg=name)
    assert stored.keys() == given.keys()
    for name, value in given.items():
        if isinstance(value, ss.PackedWeight):
            same(stored[name], value)
        else:
            assert (stored[name].dtype, stored[name].shape, stored[name].tobytes()) == (
                value.dtype,
                value.shape,
                value.tobytes(),
            )
