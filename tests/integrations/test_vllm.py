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
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_symbols

import slidesparse_nb as ss
from slidesparse_nb.integrations import operators
from slidesparse_nb.integrations.torch import SparseLinear

GATES = {"silu_and_mul": "silu_and_mul", "gelu_tanh_and_mul": "gelu_and_mul"}
"""Operators of vLLM, and what we call them."""
KEYS = "CompositeExplicitAutograd"
LAYERS, EXPERTS = "vllm.model_executor.layers", "model.layers.0.mlp.experts"


class Parameter(torch.nn.Parameter):
    """Any of vLLM's, which take the data and where it is cut."""

    def __new__(cls, data: torch.Tensor, **where: Any) -> Any:
        made = super().__new__(cls, data, requires_grad=False)
        made.input_dim = where.get("input_dim")
        return made


class LinearBase(torch.nn.Module):
    pass


class FusedMoE(torch.nn.Module):
    pass


class ParallelLMHead(torch.nn.Module):
    pass


class InductorPass:
    @staticmethod
    def hash_source(*sources: Any) -> str:
        return "-".join(getattr(source, "__qualname__", type(source).__name__) for source in sources)


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """integrations.vllm.method, over the stand-ins; and vLLM's configuration."""
    methods: list[str] = ["fp8"]
    config = SimpleNamespace(
        lora_config=None, compilation_config=SimpleNamespace(inductor_compile_config={}, custom_ops=[]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )  # fmt: skip
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
        f"{LAYERS}.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
        "vllm.compilation": {},
        "vllm.compilation.passes": {},
        "vllm.compilation.passes.inductor_pass": {"InductorPass": InductorPass},
        "vllm.model_executor.parameter": {
            name: type(name, (Parameter,), {})
            for name in ("BasevLLMParameter", "ChannelQuantScaleParameter", "ModelWeightParameter")
        },
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("method", "fusion"):
        monkeypatch.delitem(sys.modules, f"slidesparse_nb.integrations.vllm.{name}", raising=False)
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


@pytest.mark.parametrize("scheme", ["INT8_W8A8", "FP8_DYNAMIC", "BF16", "W4A8"])
def test_a_layer(plugin: Any, scheme: str) -> None:
    method, layer, source = loaded(plugin, scheme)
    for _ in range(2):
        method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight_packed")
    x = torch.randn(5, 96).to(torch.bfloat16)
    assert torch.equal(method.apply(layer, x, source.bias), source(x))


@pytest.mark.parametrize("scheme", ["INT8_W8A8", "W4A8"])
def test_a_layer_whose_k_is_cut_over_gpus(plugin: Any, scheme: str) -> None:
    """Each of three loads its third of every tensor along k, as vLLM's parameters are cut."""
    torch.manual_seed(0)
    source = SparseLinear.from_linear(torch.nn.Linear(384, 40, bias=False), "6:8", scheme)
    method = plugin.method.SlideSparseMethod(ss.PackedConfig.of("6:8", scheme), "down_proj")
    for rank in range(3):
        layer = LinearBase()
        method.create_weights(layer, 128, [40], 384, 40, torch.float32, weight_loader=None)
        for name, parameter in layer.named_parameters():
            tensor, axis = source.state_dict()[name], parameter.input_dim
            size = 0 if axis is None else parameter.shape[axis]
            parameter.data.copy_(tensor if axis is None else tensor.narrow(axis, rank * size, size))
        method.process_weights_after_loading(layer)
        x = torch.randn(5, 128)
        part = SparseLinear.from_packed(source.packed().columns(128 * rank, 128 * rank + 128))
        assert torch.equal(method.apply(layer, x), part(x))


@pytest.mark.parametrize("scheme", ["INT8_W8A8", "W4A8"])
def test_a_head_whose_vocabulary_is_filled_up(plugin: Any, scheme: str) -> None:
    config = plugin.method.SlideSparseConfig(ss.PackedConfig.of("6:8", scheme, ("model.embed_tokens",)))
    dense = torch.nn.Linear(96, 40, bias=False).to(torch.bfloat16)
    layer, source = ParallelLMHead(), SparseLinear.from_linear(dense, "6:8", scheme)
    method = config.get_quant_method(layer, "lm_head")
    method.create_weights(layer, 96, [64], 96, 64, torch.bfloat16, weight_loader=None)
    for name, tensor in source.state_dict().items():  # as vLLM's loader does
        parameter = getattr(layer, name).data
        parameter.zero_() if name == "weight_shape" else parameter[40:].zero_()
        parameter[: len(tensor)].copy_(tensor)
    method.process_weights_after_loading(layer)
    x = torch.randn(5, 96).to(torch.bfloat16)
    assert torch.equal(method.apply(layer, x), torch.nn.functional.pad(source(x), (0, 24)))
    with pytest.raises(ss.UnsupportedError, match=r"^lm_head: is packed, but config.json ties it"):
        method.tie_weights(layer, layer)
    assert (
        plugin.method.SlideSparseConfig(ss.PackedConfig.of("6:8", "INT8_W8A8", ("lm_head",))).get_quant_method(layer, "lm_head")
        is None
    )


def test_files_of_another_model(plugin: Any) -> None:
    method, layer, _ = loaded(plugin, "INT8_W8A8")
    layer.weight_shape.data[1] = 95
    with pytest.raises(ss.FormatError, match=r"^model.layers.0.qkv_proj: the file has k=95, the layer k=96"):
        method.process_weights_after_loading(layer)
    layer.weight_shape.data[1] = 96
    layer.weight_meta.data[3, 3] = 0
    with pytest.raises(ss.FormatError, match=r"the file has a nibble of weight_meta out of order"):
        method.process_weights_after_loading(layer)
    layer.weight_meta.data[3, 3], layer.weight_scale.data[3] = 0x44, -1
    with pytest.raises(ss.FormatError, match=r"^model.layers.0.qkv_proj: packed.scale: -1.0 at row 3"):
        method.process_weights_after_loading(layer)


def test_what_is_refused(plugin: Any) -> None:
    method, layer, _ = loaded(plugin, "INT8_W8A8")
    for scheme, unit in (("NVFP4", None), ("W4A8", 128)):
        other = plugin.method.SlideSparseMethod(ss.PackedConfig.of("6:8", scheme), "down_proj")
        message = "NVFP4 weights have no kernel in vLLM" if unit is None else f"must be a multiple of {unit}"
        with pytest.raises(ss.UnsupportedError, match=message):
            other.create_weights(layer, 96, [40], 192, 40, torch.bfloat16, weight_loader=None)
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


@pytest.fixture
def engine() -> Any:
    """Operators of vLLM that its compiled graphs hold, in PyTorch's operations."""
    ir, compiled = torch.library.Library("vllm_ir", "DEF"), torch.library.Library("_C", "DEF")
    ir.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")
    ir.define(
        "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None)"
        " -> (Tensor, Tensor)"
    )
    for name in GATES:
        compiled.define(f"{name}(Tensor(a!) result, Tensor input) -> ()")
    ir.impl("rms_norm", lambda x, weight, epsilon, size=None: operators._rms_norm(x, None, weight, epsilon)[0], KEYS)
    ir.impl("fused_add_rms_norm", lambda x, r, weight, epsilon, size=None: operators._rms_norm(x, r, weight, epsilon), KEYS)
    for name, kind in GATES.items():

        def gate(result: torch.Tensor, input: torch.Tensor, kind: str = kind) -> None:
            result.copy_(operators._gate_and_mul(kind, input))

        compiled.impl(name, gate, KEYS)
    yield torch.ops
    ir._destroy()
    compiled._destroy()


@pytest.mark.parametrize(("gate", "ours"), GATES.items())
def test_norms_and_activations_write_operands(gate: str, ours: str, plugin: Any, engine: Any) -> None:
    """A block as vLLM compiles it, traced for any number of tokens: the same bits before and after the pass."""
    torch.manual_seed(0)
    gate_up, down, qkv = (SparseLinear.from_linear(torch.nn.Linear(k, n, bias=b).to(torch.bfloat16), "6:8", "INT8_W8A8")
                          for n, k, b in ((128, 32, False), (32, 64, False), (48, 32, True)))  # fmt: skip
    gammas = [torch.rand(32).to(torch.bfloat16) for _ in range(3)]

    layers = [(layer._operands(), layer.bias) for layer in (gate_up, down, qkv)]

    def block(x: torch.Tensor, residual: torch.Tensor, layers: Any, gammas: Any) -> tuple[torch.Tensor, ...]:
        def linear(i: int, x: torch.Tensor) -> torch.Tensor:
            layer = (gate_up, down, qkv)[i]
            return engine.slidesparse.linear(x, *layers[i], layer.out_features, layer.in_features, layer.facts)

        h, residual = engine.vllm_ir.fused_add_rms_norm(x, residual, gammas[0], 1e-6)
        h = linear(0, h)
        h = auto_functionalized(getattr(engine._C, gate).default, result=h.new_empty((h.shape[0], 64)), input=h)[1]
        h = linear(1, h)
        read_twice = engine.vllm_ir.rms_norm(h, gammas[1], 1e-6)
        last, residual = engine.vllm_ir.fused_add_rms_norm(h, residual, gammas[2], 1e-6)
        return linear(2, last), residual, linear(2, read_twice), read_twice

    x, residual = torch.randn(2, 5, 32).to(torch.bfloat16)
    wanted = block(x, residual, layers, gammas)
    graph = make_fx(block, tracing_mode="symbolic")(x, residual, layers, gammas)
    hook = plugin.config.compilation_config.inductor_compile_config
    loaded(plugin, "INT8_W8A8")
    hook["post_grad_custom_post_pass"](graph.graph)
    assert plugin.config.compilation_config.custom_ops == ["+silu_and_mul", "+gelu_and_mul"]
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    names = [str(node.target) for node in graph.graph.nodes]
    counted = [names.count(f"slidesparse.{name}.default") for name in ("linear", "rms_norm_linear", f"{ours}_linear")]
    assert counted == [1, 2, 1]
    assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
    made = [node.meta["val"] for node in graph.graph.nodes if str(node.target) == "slidesparse.linear.default"]
    made += [node.meta["val"][0] for node in graph.graph.nodes if str(node.target) == "slidesparse.rms_norm_linear.default"]
    assert all(free_symbols(value.shape[0]) for value in made)  # of any number of tokens
    for got, want in zip(graph(x, residual, layers, gammas), wanted, strict=True):
        assert torch.equal(got, want)
    assert [len(y) for y in graph(*torch.randn(2, 9, 32).to(torch.bfloat16), layers, gammas)] == [9] * 4
