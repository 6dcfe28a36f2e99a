"""transformers: import this module, then load packed folders as any other, or pack while loading.

    import slidesparse_nb.integrations.transformers as st
    model = AutoModelForCausalLM.from_pretrained("model-6of8-int8", device_map="cuda")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=st.SlideSparseConfig("6:8", "INT8_W8A8"))

Linear layers become `SparseLinear`; embeddings, the output head, norms, experts stored as one stacked parameter and whatever
`ignore` names stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

import slidesparse_nb as ss

from .torch import SparseLinear

NAME = "slidesparse"
HEADS = ("lm_head",)
"""Dense by default where a model is packed while it is loaded."""


class SlideSparseConfig(QuantizationConfigMixin):
    """How to pack a dense model while it is loaded; or how a packed one is stored, from its config.json.

    Args:
        pattern: "6:8", (6, 8) or a Pattern.
        scheme: "INT8_W8A8", "FP8_DYNAMIC", "BF16" or "FP16".
        prune: "magnitude", "random", or "none" for a model that obeys the pattern.
        ignore: layers that stay dense: exact names, or "re:" and a regular expression that matches from the name's start.
    """

    def __init__(
        self,
        pattern: Any = "6:8",
        scheme: Any = "INT8_W8A8",
        prune: str = "magnitude",
        ignore: Any = HEADS,
        **written: Any,
    ) -> None:
        self.quant_method = NAME
        if written:  # config.json's entry
            written.pop("quant_method", None)
            read = ss.PackedConfig.read({"quant_method": NAME, "pattern": pattern, "ignore": list(ignore), **written})
            self.packed = read.without_stacks("transformers")
        else:
            self.packed = ss.PackedConfig.of(pattern, scheme, tuple(ignore))
        self.prune = prune

    def to_dict(self) -> dict[str, Any]:
        return self.packed.written()

    def __repr__(self) -> str:
        return f"SlideSparseConfig({self.packed.pattern.described}, {self.packed.scheme}, ignore={list(self.packed.ignore)})"

    def ignores(self, name: str) -> bool:
        """Whether a layer stays dense."""
        return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in self.packed.ignore)


class SlideSparseQuantizer(HfQuantizer):
    """Swaps linear layers for `SparseLinear` before weights are loaded (packed folders), or after (dense ones)."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return torch.bfloat16 if dtype is None else dtype

    def _layers(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        config = self.quantization_config
        return [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and not config.ignores(name)]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            packed = self.quantization_config.packed
            for name, layer in self._layers(model):
                bias, dtype = layer.bias is not None, layer.weight.dtype
                facts = packed.pattern, packed.scheme, bias, "meta", dtype
                model.set_submodule(name, SparseLinear(layer.in_features, layer.out_features, *facts))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if self.pre_quantized:
            for name, layer in model.named_modules():
                if isinstance(layer, SparseLinear):
                    with named(name):
                        layer.settle()
        else:
            for name, dense in self._layers(model):
                with named(name):
                    packed = SparseLinear.from_linear(dense, config.packed.pattern, config.packed.scheme, config.prune)
                model.set_submodule(name, packed)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, str]]:
        """What `save_pretrained` writes beside its own: that the files hold packed weights."""
        return None, dict(self.quantization_config.packed.metadata())

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class named:
    """Errors inside name the layer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ss.SlideSparseError):
            raise type(error)(f"{self.name}: {error}") from error


if NAME not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(NAME)(SlideSparseQuantizer)
if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(NAME)(SlideSparseConfig)
