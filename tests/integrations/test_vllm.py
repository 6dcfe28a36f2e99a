"""The vLLM plugin's own steps on the CPU, with stand-ins for the classes of vLLM that it builds on.

vLLM itself needs a GPU: that it finds the plugin, loads and serves a packed folder was seen there (docs/engines.md).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import slidesparse_nb as ss
from slidesparse_nb.integrations.torch import SparseLinear

LAYERS, EXPERTS = "vllm.model_executor.layers", "model.layers.0.mlp.experts"


class Parameter(torch.nn.Parameter):
    """Any of vLLM's, which take the data and where it is cut."""

    def __new__(cls, data: torch.Tensor, **_: Any) -> Any:
        return super().__new__(cls, data, requires_grad=False)


class LinearBase(torch.nn.Module):
    pass


class FusedMoE(torch.nn.Module):
    pass


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """integrations.vllm.method, over the stand-ins; and vLLM's configuration."""
    methods: list[str] = ["fp8"]
    config = SimpleNamespace(lora_config=None)
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.model_executor": {},
        LAYERS: {},
        f"{LAYERS}.quantization": {
            "QUANTIZATION_METHODS": methods,
            "register_quantization_config": lambda name: lambda made: methods.append(name),
        },
        f"{LAYERS}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{LAYERS}.quantization.compressed_tensors": {},
        f"{LAYERS}.quantization.compressed_tensors.utils": {"should_ignore_layer": lambda name, ignore, fused: name in ignore},
        f"{LAYERS}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
            "register_weight_loader_v2_supported_method": lambda method: method,
        },
        "vllm.model_executor.parameter": dict.fromkeys(
            ("BasevLLMParameter", "ChannelQuantScaleParameter", "ModelWeightParameter"), Parameter
        ),
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "slidesparse_nb.integrations.vllm.method", raising=False)
    from slidesparse_nb.integrations.vllm import register

    register()
    register()
    assert methods == ["fp8", "slidesparse"]
    return SimpleNamespace(method=importlib.import_module("slidesparse_nb.integrations.vllm.method"), config=config)


def loaded(plugin: Any, scheme: str) -> tuple[Any, Any, SparseLinear]:
    """A method, a layer of three fused parts with loaded parameters, and the layer that they are of."""
    config = plugin.method.SlideSparseConfig.from_config(ss.PackedConfig.of("6:8", scheme, ("lm_head",)).written())
    layer = LinearBase()
    method = config.get_quant_method(layer, "model.layers.0.qkv_proj")
    method.create_weights(layer, 96, [24, 8, 8], 96, 40, torch.bfloat16, weight_loader=None)
    torch.manual_seed(0)
    source = SparseLinear.from_linear(torch.nn.Linear(96, 40).to(torch.bfloat16), "6:8", scheme)
    for name, tensor in source.state_dict().items():
        if name != "bias":
            getattr(layer, name).data.copy_(tensor)
    return method, layer, source


@pytest.mark.parametrize("scheme", ["INT8_W8A8", "FP8_DYNAMIC", "BF16"])
def test_a_layer(plugin: Any, scheme: str) -> None:
    method, layer, source = loaded(plugin, scheme)
    for _ in range(2):
        method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight_packed")
    x = torch.randn(5, 96).to(torch.bfloat16)
    assert torch.equal(method.apply(layer, x, source.bias), source(x))


def test_files_of_another_model(plugin: Any) -> None:
    method, layer, _ = loaded(plugin, "INT8_W8A8")
    layer.weight_shape.data[1] = 95
    with pytest.raises(ss.FormatError, match=r"^model.layers.0.qkv_proj: the file has k=95, the layer k=96"):
        method.process_weights_after_loading(layer)
    layer.weight_shape.data[1] = 96
    layer.weight_meta.data[3, 3] = 0
    with pytest.raises(ss.FormatError, match=r"the file has a nibble of weight_meta out of order"):
        method.process_weights_after_loading(layer)


def test_what_is_refused(plugin: Any) -> None:
    method, layer, _ = loaded(plugin, "INT8_W8A8")
    with pytest.raises(ss.UnsupportedError, match="k=180 over 2 GPUs gives 90 columns each, which must be a multiple of 16"):
        method.create_weights(layer, 90, [40], 180, 40, torch.bfloat16, weight_loader=None)
    plugin.config.lora_config = object()
    with pytest.raises(ss.UnsupportedError, match="take no LoRA adapters"):
        method.create_weights(layer, 96, [40], 96, 40, torch.bfloat16, weight_loader=None)
    for ignore in ((f"{EXPERTS}.0.gate_proj",), ("re:.*[.]experts[.].*",)):
        config = plugin.method.SlideSparseConfig(ss.PackedConfig.of("6:8", "INT8_W8A8", ignore))
        assert config.get_quant_method(FusedMoE(), EXPERTS) is None
    with pytest.raises(ss.UnsupportedError, match=f"^{EXPERTS}: packed experts are not served by vLLM yet"):
        plugin.method.SlideSparseConfig(ss.PackedConfig.of("6:8", "INT8_W8A8", ("lm_head",))).get_quant_method(
            FusedMoE(), EXPERTS
        )
