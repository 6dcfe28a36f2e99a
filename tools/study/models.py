"""The dense model, weights of it pruned layer by layer in memory, and sparse copies of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import slidesparse_nb as ss
from slidesparse_nb.integrations.operators import as_cupy, as_numpy
from slidesparse_nb.integrations.perplexity import load
from slidesparse_nb.integrations.torch import SparseLinear
from slidesparse_nb.pruning.sparsegpt import sparsegpt
from slidesparse_nb.pruning.wanda import wanda

BATCH_TOKENS = 1 << 15
"""Calibration tokens that go through a block at once."""

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


class Inputs:
    """Second moments of the inputs of linear layers, added up while the model runs; layers that read one tensor share them.

    Args:
        gram: whether X^T X [k, k] is wanted, besides the sums of squares of the columns.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], gram: bool) -> None:
        self.gram, self.tokens = gram, 0
        self.shared: dict[str, str] = {}
        self.moments: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[str, Tensor]] | None = {}
        self._hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Linear, given: tuple[Tensor, ...]) -> None:
            if self._seen is not None:  # the first batch tells who reads the same tensor, which is held until it ends
                self.shared[name] = self._seen.setdefault(id(given[0]), (name, given[0]))[0]
            if self.shared[name] == name:
                x = given[0].reshape(-1, layer.in_features).float()
                found = x.T @ x if self.gram else x.square().sum(0)
                self.moments[name] = self.moments[name] + found if name in self.moments else found

        return hook

    def end_batch(self, tokens: int) -> None:
        self._seen = None
        self.tokens += tokens

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def groups(self) -> dict[str, list[str]]:
        """Layer -> the layers that read the same tensor, itself first."""
        found: dict[str, list[str]] = {}
        for name, first in self.shared.items():
            found.setdefault(first, []).append(name)
        return found

    def norms(self, name: str) -> Tensor:
        """Root mean square of the columns that a layer reads, float32 [k]."""
        found = self.moments[self.shared[name]]
        return (found.diagonal() if self.gram else found).div(self.tokens).sqrt()


def array(tensor: Tensor) -> Any:
    """A float32 tensor as an array of CuPy or NumPy, in its memory."""
    return as_cupy(tensor) if tensor.is_cuda else as_numpy(tensor)


def pruned(
    layers: Mapping[str, Tensor], inputs: Inputs, pattern: ss.Pattern, method: str, scheme: str | None
) -> dict[str, Tensor]:
    """Weights [n, k] of layers that read one tensor, pruned as one matrix; of the type of the given ones."""
    names, first = list(layers), next(iter(layers.values()))
    w = torch.cat([layers[name].float() for name in names]).contiguous()
    statistic = inputs.norms(names[0]) if method == "wanda" else inputs.moments[inputs.shared[names[0]]]
    if w.is_cuda:
        torch.cuda.synchronize()  # CuPy's stream is not PyTorch's
    given = array(w), array(statistic.contiguous()), pattern
    found = wanda(*given) if method == "wanda" else sparsegpt(*given, scheme)
    made = torch.from_numpy(found) if isinstance(found, np.ndarray) else torch.from_dlpack(found)
    if w.is_cuda:
        torch.cuda.synchronize()
    parts = made.to(first.dtype).split([len(layers[name]) for name in names])
    return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}


def prune_layers(model: Any, ids: Tensor, patterns: Patterns, method: str, scheme: str | None = None) -> dict[str, Tensor]:
    """Weights pruned block by block, each with the activations that the pruned blocks before it give.

    Args:
        model: a decoder whose blocks take the same arguments; it is left as it was.
        ids: int64 [windows, tokens], the calibration text.
        method: "wanda" or "sparsegpt".
        scheme: of SparseGPT, which then makes up for quantization, too.
    """
    model = copy.deepcopy(model)
    found: dict[str, Tensor] = {}
    name, blocks = blocks_of(model)
    batches = list(_first_inputs(model, blocks[0], ids))
    for number, block in enumerate(blocks):
        inner = {f"{name}.{number}.{each}": layer for each, layer in block.named_modules() if type(layer) is nn.Linear}
        inputs = Inputs({each: layer for each, layer in inner.items() if each in patterns}, gram=method == "sparsegpt")
        for hidden, others in batches:
            _run(block, hidden, others)
            inputs.end_batch(hidden.shape[0] * hidden.shape[1])
        inputs.close()
        for group in inputs.groups().values():
            for pattern in dict.fromkeys(patterns[each] for each in group):
                weights = {each: inner[each].weight.data for each in group if patterns[each] == pattern}
                found |= pruned(weights, inputs, pattern, method, scheme)
        for each in inputs.shared:
            inner[each].weight.data = found[each]
        batches = [(_run(block, hidden, others), others) for hidden, others in batches]
    return found


def _run(block: Any, hidden: Tensor, others: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        out = block(hidden, **others)
    return out[0] if isinstance(out, tuple) else out


class _Stop(Exception):
    """The first block was reached."""


def _first_inputs(model: Any, block: Any, ids: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """What the first block is called with, batch by batch: hidden states, and all other arguments."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(module: Any, given: tuple[Tensor, ...], others: dict[str, Any]) -> None:
        caught.append((given[0], others))
        raise _Stop

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
            try:
                with torch.no_grad():
                    model(batch.to(model.device), use_cache=False)
            except _Stop:
                yield caught.pop()
    finally:
        hook.remove()
