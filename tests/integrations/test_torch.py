"""The operators and SparseLinear on the CPU: reference, torch.compile, opcheck. GPU: tests/gpu/test_sparse_linear.py."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slidesparse_nb as ss
from slidesparse_nb.core import reference
from slidesparse_nb.integrations import tensors
from slidesparse_nb.integrations.tensors import as_numpy
from slidesparse_nb.integrations.torch import SparseLinear

SCHEMES = ("INT8_W8A8", "FP8_DYNAMIC", "BF16", "W4A8", "FP16", "NVFP4", "MXFP4")


def linear(n: int = 40, k: int = 96, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    torch.manual_seed(n + k)
    return torch.nn.Linear(k, n).to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_from_linear(scheme: str, dtype: torch.dtype) -> None:
    """The reference of the pruned weights, and so the dense layer but for pruning and rounding."""
    dense = linear(dtype=dtype)
    layer = SparseLinear.from_linear(dense, "6:8", scheme)
    x, found = tokens(2, 5, 96, dtype=dtype), ss.Scheme.of(scheme)
    pattern = found.pattern("6:8")
    packed = reference.pack(reference.prune(as_numpy(dense.weight), pattern), pattern, found)
    bias = as_numpy(dense.bias)
    wanted = reference.matmul(as_numpy(x).reshape(10, 96), packed, bias, as_numpy(x).dtype).reshape(2, 5, 40)
    got = layer(x)
    assert got.dtype == dtype
    np.testing.assert_allclose(as_numpy(got).astype(np.float32), wanted.astype(np.float32), rtol=2.0**-6, atol=2.0**-6)
    assert found.lift_first or torch.equal(layer(layer.quantize(x)), got)
    assert layer(x[:0]).shape == (0, 5, 40)
    assert pattern.described in repr(layer)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state(scheme: str) -> None:
    """Saved, loaded (copied and assigned, from meta), cast, copied: the same bytes and the same products."""
    layer, x = SparseLinear.from_linear(linear(), "6:8", scheme), tokens(3, 96)
    state, y = layer.state_dict(), layer(tokens(3, 96))
    loaded = SparseLinear(96, 40, "6:8", scheme, dtype=torch.bfloat16)
    loaded.load_state_dict(state)
    meta = SparseLinear(96, 40, "6:8", scheme, device="meta")
    meta.load_state_dict(state, assign=True)
    again = SparseLinear.from_packed(layer.packed(), layer.bias)
    for other in (loaded, meta, again, copy.deepcopy(layer)):
        assert torch.equal(other(x), y)
        assert {name: tensor.dtype for name, tensor in other.state_dict().items()} == {n: t.dtype for n, t in state.items()}
    loaded.to(torch.float32)
    assert loaded.bias is not None
    assert loaded.bias.dtype == torch.float32
    assert loaded.weight_packed.dtype == layer.weight_packed.dtype
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), y)
    with pytest.raises(RuntimeError, match=r"weight_shape: \[40, 96\] must be \[40, 95\]"):  # padded, they look the same
        SparseLinear(95, 40, "6:8", scheme).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight_packed: .* must be .*, as .* weights have it"):
        SparseLinear(96, 40, "6:8", "FP8_DYNAMIC" if scheme == "INT8_W8A8" else "INT8_W8A8").load_state_dict(state)


def test_dropped() -> None:
    """What is gone is not saved, nor moved, as if it were there."""
    layer = SparseLinear.from_linear(linear())
    layer.arranged = layer._operands()  # as on a GPU
    layer.drop_packed()
    for use in (layer.packed, layer.state_dict, lambda: layer.to("meta")):
        with pytest.raises(ss.OperandError, match="the packed tensors were dropped"):
            use()
    assert layer(tokens(3, 96)).shape == (3, 40)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weight_that_code_for_dense_layers_reads(scheme: str) -> None:
    """Its facts cost nothing, what is computed with it is right, and it cannot be changed."""
    dense = linear()
    layer, x = SparseLinear.from_linear(dense, "6:8", scheme), tokens(3, 96)
    weight, held = layer.weight, layer.dense()
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device, weight.is_meta) == (dense.weight.shape, torch.bfloat16, x.device, False)
    assert x.float().to(weight.dtype).dtype == torch.bfloat16
    assert type(weight @ x.T) is torch.Tensor
    assert torch.equal(weight @ x.T, held @ x.T)
    assert torch.equal(weight.data[:2].float(), held[:2].float())
    kept = held != 0
    rounding = {"BF16": 0, "FP16": 2.0**-8, "INT8_W8A8": 2.0**-6}.get(scheme, 0.3)
    assert kept.float().mean() <= 0.75
    assert ((held - dense.weight)[kept].float().abs() <= rounding * dense.weight.abs().max().float()).all()
    assert torch.equal(torch.zeros_like(held).copy_(weight), held)
    assert torch.equal(torch.nn.functional.relu(weight), held.relu())
    for change in (
        weight.fill_,
        weight.data.mul_,
        lambda _: torch.nn.init.normal_(weight),
        lambda _: weight.__setitem__(0, 1),
        lambda _: torch.add(held, 1, out=weight),
        lambda _: torch.clamp_(input=weight, min=9),
        lambda factor: torch._foreach_mul_([weight], factor),
        lambda _: torch.nn.functional.relu(weight, inplace=True),
    ):
        with pytest.raises(ss.UnsupportedError, match=r"^weight: of a packed layer, cannot be changed"):
            change(0)
    with pytest.raises(ss.UnsupportedError, match=r"has no memory of its own \(data_ptr\)"):
        weight.data_ptr()  # the dense weight is freed after each use
    assert layer.half().weight.dtype == torch.float16
    assert "weight" not in {name for name, _ in layer.named_parameters()}


@pytest.mark.parametrize("scheme", SCHEMES[:4])
def test_operators(scheme: str) -> None:
    layer, x = SparseLinear.from_linear(linear(), "6:8", scheme), tokens(7, 96)
    q, facts = layer.quantize(x), (40, 96, layer.facts)
    weight, bias = layer._operands(), layer.bias
    ops = torch.ops.slidesparse
    torch.library.opcheck(ops.linear, (x, weight, bias, *facts))
    torch.library.opcheck(ops.quantize, (x, weight, *facts))
    torch.library.opcheck(ops.product, (q.operand, q.scale, weight, bias, torch.bfloat16, *facts))


def test_compiled() -> None:
    layers = [SparseLinear.from_linear(linear(), "6:8", scheme) for scheme in SCHEMES[:2]]

    def both(x: torch.Tensor) -> torch.Tensor:
        q = layers[0].quantize(x)
        return layers[0](q) + layers[0](x) + layers[1](x)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (1, 3, 4, 0):
        x = tokens(m, 96)
        assert torch.equal(compiled(x), both(x))


def test_compiled_with_grad() -> None:
    """A gradient is not lost in a graph either."""
    layer, before = SparseLinear.from_linear(linear()), linear(96)
    for use in (layer, layer.quantize):
        with pytest.raises(Exception, match="x: requires grad, but packed linears are for inference only"):
            torch.compile(lambda x, use=use: use(before(x)), backend="aot_eager")(tokens(3, 96))


def refused() -> list[tuple[str, Any]]:
    layer, fp8 = SparseLinear.from_linear(linear()), SparseLinear.from_linear(linear(), scheme="FP8_DYNAMIC")
    x = tokens(3, 96)
    return [
        (r"^x: requires grad, but packed linears are for inference only", lambda: layer(x.clone().requires_grad_())),
        (r"^x: torch.bfloat16 \(3, 95\) must be .* of shape \[..., 96\]$", lambda: layer(x[:, 1:])),
        (r"^x: torch.int64 \(3, 96\) must be float32, float16 or bfloat16", lambda: layer(x.long())),
        (r"^x: was quantized for 6:8 int8 of k=96, this layer is 6:8 float8_e4m3fn", lambda: fp8(layer.quantize(x))),
        (r"^bias: torch.float64 \(40,\) on cpu must be float32", lambda: copy.deepcopy(layer).double()(x)),
        (r"^linear: its weight is torch.float64 on cpu", lambda: SparseLinear.from_linear(linear(dtype=torch.float64))),
        (
            r"^dtype: NVFP4 activations are quantized in the product, after they are lifted; give it x itself$",
            lambda: SparseLinear.from_linear(linear(), scheme="NVFP4").quantize(x),
        ),
        (r"^pattern: 5:8 is not of the form", lambda: SparseLinear(96, 40, "5:8")),
        (r"^w: .*more than 6", lambda: SparseLinear.from_linear(linear(), prune="none")),
    ]


@pytest.mark.parametrize("case", refused(), ids=lambda case: case[0][:24])
def test_refused(case: Any) -> None:
    with pytest.raises(ss.SlideSparseError, match=case[0]):
        case[1]()


def test_an_arranged_weight_tells_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head, not a graph, has the buffers; another weight at the same address, or none, is no mistake to multiply by."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tensors, "as_cupy", lambda tensor: tensor)
    monkeypatch.setattr(tensors.ss, "device_weight", lambda *given: made.append(given) or object())
    weight = torch.zeros(1024, dtype=torch.uint8)
    weight[:256] = torch.frombuffer(bytearray(b"6:8 int8 16 32 values:300,scale:64".ljust(256)), dtype=torch.uint8)
    tensors.device_weight([weight], 16, 32, "6:8 int8")
    assert {name: len(part) for name, part in made[0][0].items()} == {"values": 300, "scale": 64}
    assert made[0][0]["scale"].data_ptr() == weight.data_ptr() + 256 + 512
    for operands, facts in (([weight], "6:8 float8_e4m3fn"), ([weight * 0], "6:8 int8"), ([weight, weight], "6:8 int8")):
        with pytest.raises(ss.OperandError, match=r"^weight: is not arranged for a GPU as .* call settle\(\)"):
            tensors.device_weight(operands, 16, 32, facts)
    with pytest.raises(ss.OperandError, match=r"^weight: is arranged for a GPU, but on the CPU; call settle\(\)"):
        tensors.packed_of([weight], 16, 32, "6:8 int8")


def test_a_weight_on_meta_multiplies_nothing() -> None:
    layer = SparseLinear(32, 16, device="meta")
    with pytest.raises(ss.OperandError, match=r"^x: is on cpu, the weight on meta; move one of them"):
        layer(torch.zeros(2, 32))
    with pytest.raises(ss.OperandError, match=r"^x: is on cpu, the weight on meta; move one of them"):
        layer.quantize(torch.zeros(2, 32))


def test_two_processes_share_an_mlp() -> None:
    """examples/two_gpus.py without GPUs."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/two_gpus.py"]
    told = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    found = re.search(r"2 processes on (cpu|cuda): relative difference from one (\S+)", told.stdout)
    assert found, told.stderr
    assert 0 < float(found[2]) < 0.03  # quantization of x alone
