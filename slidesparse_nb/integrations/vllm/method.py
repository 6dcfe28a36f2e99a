"""The quantization method of vLLM for packed linears; vLLM's classes of that kind are its public way in.

A layer loads the tensors of the packed format, cut along n and k by vLLM's own parameter classes (fused q/k/v and gate/up,
tensor parallelism by columns and rows). Then they are arranged for the GPU in PyTorch's memory, and freed.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

import slidesparse_nb as ss

from ... import env
from .. import operators as operators  # defines torch.ops.slidesparse
from ..tensors import TORCH, arrange, as_cupy, as_numpy, device_weight, facts_of, named

try:
    from .fusion import install
except ImportError:  # a vLLM that keeps its passes elsewhere: it quantizes in launches of their own

    def install(config: Any) -> None:
        pass


PLACED = {
    "weight_packed": ModelWeightParameter,
    "weight_meta": ModelWeightParameter,
    "weight_scale": ChannelQuantScaleParameter,
    "weight_block_scale": ModelWeightParameter,
}
"""Tensor of the packed format -> the class of parameters that knows how vLLM cuts it."""

EMPTY = {"weight_meta": 0x44, "weight_block_scale": 1}
"""Of weights that are all zero: the metadata of two windows, and the code of the smallest block scale."""

COMPILED: set[tuple[Any, ...]] = set()
"""n, k, facts, most tokens and type of y of the layers whose kernels were compiled in this process."""


class SlideSparseConfig(QuantizationConfig):
    """`quantization_config` of a packed model's config.json."""

    def __init__(self, packed: ss.PackedConfig) -> None:
        super().__init__()
        self.packed, self.ignore = packed, list(packed.ignore)

    def get_name(self) -> str:
        return "slidesparse"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SlideSparseConfig:
        return cls(ss.PackedConfig.read(config).without_stacks("vLLM"))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        ignored = should_ignore_layer(prefix, self.ignore, self.packed_modules_mapping)
        if isinstance(layer, LinearBase) and ignored:
            return UnquantizedLinearMethod()
        if isinstance(layer, LinearBase) or (isinstance(layer, ParallelLMHead) and not ignored):
            if env.fuse():
                install(get_current_vllm_config())
            return SlideSparseMethod(self.packed, prefix)
        experts = "Experts" in type(layer).__name__ or "MoE" in type(layer).__name__
        if experts and not (ignored or self._experts_ignored(prefix)):
            raise ss.UnsupportedError(
                f"{prefix}: packed experts are not served by vLLM yet; pack the model with its experts dense (--targets for the"
                " other layers)"
            )
        return None

    def _experts_ignored(self, prefix: str) -> bool:
        """Whether the experts, which this layer fuses, stay dense: the packer keeps those of a layer together."""
        names = [f"{prefix}.0.{part}" for part in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")]
        patterns = [entry[3:] for entry in self.ignore if entry.startswith("re:")]
        return any(entry.startswith(f"{prefix}.") for entry in self.ignore) or any(
            re.match(pattern, name) for pattern in patterns for name in names
        )


@register_weight_loader_v2_supported_method
class SlideSparseMethod(LinearMethodBase):
    """y = x @ w.T + bias with packed weights.

    Args:
        name: of the layer, for messages.
    """

    def __init__(self, packed: ss.PackedConfig, name: str) -> None:
        self.packed, self.name = packed, name

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Parameters of the packed format, for vLLM to load into."""
        config = get_current_vllm_config()
        if config.lora_config is not None:
            raise ss.UnsupportedError(f"{self.name}: packed layers take no LoRA adapters; merge them before packing")
        pattern, scheme = self.packed.pattern, self.packed.scheme
        if scheme.kernel.blocks:
            raise ss.UnsupportedError(f"{self.name}: {scheme} weights have no kernel in vLLM; pack as W4A8, int8 or fp8")
        k, unit = input_size_per_partition, scheme.slice_unit(pattern)
        if k != input_size and k % unit:
            gpus = input_size // k
            fit = ", ".join(str(fewer) for fewer in range(1, gpus) if input_size % (fewer * unit) == 0 or fewer == 1)
            raise ss.UnsupportedError(
                f"{self.name}: k={input_size} over {gpus} GPUs gives {k} columns each, which must be a multiple of {unit}, the"
                f" slice unit of {pattern.described}; numbers of GPUs that fit: {fit}"
            )
        shape, load = (sum(output_partition_sizes), k), extra["weight_loader"]
        for name, (kind, size) in self.packed.tensors(*shape).items():
            data = torch.empty(size, dtype=TORCH[kind])
            if name == "weight_shape":  # of the whole weight, and of one of those that a layer fuses
                parameter = BasevLLMParameter(data=data, weight_loader=load)
            elif (place := PLACED[name]) is ModelWeightParameter:
                parameter = place(data=data, input_dim=1, output_dim=0, weight_loader=load)
            else:
                parameter = place(data=data, output_dim=0, weight_loader=load)
            layer.register_parameter(name, parameter)
        layer.slidesparse_shape, layer.slidesparse_whole_k = shape, input_size
        layer.slidesparse_products = config.scheduler_config.max_num_batched_tokens, operators.FLOATS[params_dtype][0]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Arrange the loaded weight, and free what was loaded; a second call, with nothing loaded since, does nothing."""
        if not hasattr(layer, "weight_packed"):
            return
        n, k = layer.slidesparse_shape
        pattern, scheme = self.packed.pattern, self.packed.scheme
        held = {name: getattr(layer, name).data for name in (*PLACED, "weight_shape") if hasattr(layer, name)}
        if isinstance(layer, ParallelLMHead):  # the rows that fill up its vocabulary are all zeros, which no metadata is
            rows = held["weight_meta"].sum(1) == 0
            for name in EMPTY.keys() & held.keys():
                held[name].view(torch.uint8)[rows] = EMPTY[name]
        self._check(held["weight_shape"], held["weight_meta"], layer.slidesparse_whole_k)
        on_gpu = held["weight_packed"].is_cuda
        view = as_cupy if on_gpu else as_numpy
        tensors = {name: view(tensor) for name, tensor in held.items() if name != "weight_shape"}
        with named(self.name):
            packed = ss.PackedWeight.from_tensors({**tensors, "weight_shape": [n, k]}, pattern, scheme)
            if on_gpu:
                buffers = {"arranged": arrange(packed, held["weight_packed"].device)}
            else:
                buffers = {name: tensor for name, tensor in held.items() if name != "weight_shape"}
        for name in held:
            delattr(layer, name)
        for name, tensor in buffers.items():
            layer.register_parameter(f"slidesparse_{name}", Parameter(tensor, requires_grad=False))
        layer.slidesparse_names = tuple(f"slidesparse_{name}" for name in buffers)
        layer.slidesparse_facts = facts_of(self.packed)
        if on_gpu and (kind := (n, k, layer.slidesparse_facts, *layer.slidesparse_products)) not in COMPILED:
            device_weight([buffers["arranged"]], *kind[:3]).compile_ahead(*kind[3:])
            COMPILED.add(kind)

    def _check(self, shape: torch.Tensor, meta: torch.Tensor, k: int) -> None:
        """FormatError unless the loaded tensors are of a packed weight of k columns."""
        unordered = ((meta & 3) >= (meta >> 2 & 3)) | ((meta >> 4 & 3) >= (meta >> 6))
        if int(shape[1]) != k or bool(unordered.any()):
            found = f"k={int(shape[1])}" if int(shape[1]) != k else "a nibble of weight_meta out of order"
            raise ss.FormatError(
                f"{self.name}: the file has {found}, the layer k={k}; load a folder that slidesparse pack wrote (packed layers"
                " have no --load-format dummy)"
            )

    def tie_weights(self, layer: torch.nn.Module, embedding: torch.nn.Module) -> Any:
        raise ss.UnsupportedError(
            f"{self.name}: is packed, but config.json ties it to the embedding; set tie_word_embeddings to false"
        )

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        n, k = layer.slidesparse_shape
        weight = [getattr(layer, name) for name in layer.slidesparse_names]
        return torch.ops.slidesparse.linear(x, weight, bias, n, k, layer.slidesparse_facts)
