"""The dense model, weights of it pruned layer by layer in memory, and sparse copies of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import slidesparse_nb as ss
from slidesparse_nb.integrations.perplexity import load
from slidesparse_nb.integrations.torch import SparseLinear
from slidesparse_nb.pruning.model import BlockwiseModel, as_array, namespace_of
from slidesparse_nb.pruning.statistics import Statistics
from slidesparse_nb.pruning.together import prune_together

Patterns = Mapping[str, ss.Pattern]
"""Linear layer -> its pattern; layers that are not named stay dense."""


def dense_model(path: Path, device: str) -> Any:
    """The causal language model of a folder or a .gguf file, in bfloat16."""
    if path.suffix != ".gguf":
        return load(path).to(torch.bfloat16).to(device)
    found = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    config = copy.deepcopy(found.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(found)(config)  # a model that transformers read from GGUF refuses another dtype
    plain.load_state_dict(found.state_dict())
    return plain.to(torch.bfloat16).to(device).eval().requires_grad_(False)


def blocks_of(model: Any) -> tuple[str, Any]:
    """(name, the decoder blocks): the longest list of modules."""
    lists = ((name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList))
    return max(lists, key=lambda found: len(found[1]))


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks, by name."""
    prefix, blocks = blocks_of(model)
    return {f"{prefix}.{name}": each for name, each in blocks.named_modules() if type(each) is nn.Linear}


def sparse_copy(model: Any, weights: Mapping[str, Tensor], patterns: Patterns, scheme: str, prune: str = "none") -> Any:
    """A copy of the dense model with packed layers.

    Args:
        weights: of layers that were pruned already; others are those of the model, pruned as `prune` says.
    """
    made = copy.deepcopy(model)
    for name, pattern in patterns.items():
        layer = made.get_submodule(name)
        if name in weights:
            layer.weight.data = weights[name]
        made.set_submodule(name, SparseLinear.from_linear(layer, pattern, scheme, prune))
    return made


def rounded(x: Tensor, scheme: ss.Scheme) -> Tensor:
    """[..., k] -> float32, the nearest values of a scheme with a scale a row."""
    largest, x = scheme.dtype.largest, x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    q = (x / scale).clamp(-largest, largest)
    return scale * (q.round() if scheme.dtype.name == "int8" else q.to(torch.float8_e4m3fn).float())


def simulated_copy(model: Any, scheme: ss.Scheme) -> Any:
    """A copy of the dense model, not pruned, whose linear layers multiply rounded weights and activations in float32."""
    made = copy.deepcopy(model)
    for layer in linears(made).values():
        dtype = layer.weight.dtype
        layer.float()
        layer.weight.data = rounded(layer.weight.data, scheme)
        layer.register_forward_pre_hook(lambda _, given: (rounded(given[0], scheme),))
        layer.register_forward_hook(lambda _, given, y, dtype=dtype: y.to(dtype))
    return made


def statistics(model: Any, ids: Tensor, gram: bool) -> Statistics:
    """What the linear layers of the blocks read while a text runs through the model; X^T X, too, where `gram` says so.

    Args:
        ids: int64 [windows, tokens].
    """
    made, found = BlockwiseModel(copy.deepcopy(model), set(linears(model)), model.device.type), Statistics()
    for _, block in made.walk(ids, gram=gram, prunes=False):
        found.inputs |= block.inputs
        found.moments |= block.moments
    return found


def pruned(
    layers: Mapping[str, nn.Linear], found: Statistics, patterns: Patterns, method: str, scheme: str | None = None
) -> dict[str, Tensor]:
    """Weights [n, k] of layers by what they read: those of one input and pattern as one matrix, of the type of the layers.

    Args:
        method: "wanda" or "sparsegpt".
        scheme: of SparseGPT, which then makes up for quantization, too.
    """
    made: dict[str, Tensor] = {}
    for of, names in found.groups().items():
        for pattern in dict.fromkeys(patterns[name] for name in names):
            given = {name: layers[name].weight for name in names if patterns[name] == pattern}
            arrays = {name: as_array(w, namespace_of(w.device.type)) for name, w in given.items()}
            for name, w in prune_together(arrays, found.moments[of], method, pattern, scheme=scheme).items():
                made[name] = torch.from_dlpack(w).to(given[name])
    return made


def prune_layers(model: Any, ids: Tensor, patterns: Patterns, method: str, scheme: str | None = None) -> dict[str, Tensor]:
    """Weights pruned block by block, each with the activations that the pruned blocks before it give.

    Args:
        model: it is left as it was.
        ids: int64 [windows, tokens], the calibration text.
        method, scheme: as for `pruned`.
    """
    made = BlockwiseModel(copy.deepcopy(model), set(patterns), model.device.type)
    weights: dict[str, Tensor] = {}
    for i, found in made.walk(ids, gram=method == "sparsegpt", prunes=True):
        new = pruned(made.linears[i], found, patterns, method, scheme)
        for name, weight in new.items():
            made.linears[i][name].weight.data = weight
        weights |= new
    return weights
