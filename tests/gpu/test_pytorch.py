"""PyTorch's tensors and streams: viewed where they are, in the stream that is given, and captured in PyTorch's CUDA graphs."""

from __future__ import annotations

import gc
import warnings

import cupy as cp
import numpy as np
import pytest
from gemm_cases import check, family, tokens, weight

import slidesparse_nb as ss
from slidesparse_nb.core.dtypes import BFLOAT16, INT8
from slidesparse_nb.errors import OperandError

torch = pytest.importorskip("torch")

__all__ = ["family"]  # the fixture
pytestmark = pytest.mark.gpu

BF16 = BFLOAT16.numpy
N, K = 256, 2048


def tensor(a):
    """bfloat16 from NumPy to PyTorch, on the GPU."""
    return torch.from_numpy(a.view(np.int16).copy()).cuda().view(torch.bfloat16)


def host(t):
    return t.view(torch.int16).cpu().numpy().view(BF16)


def operands(rng, m, dtype):
    """A packed weight, inputs, and tensors for x, y and a workspace."""
    packed = weight(rng, N, K, "6:8", dtype)
    inputs = [tokens(rng, m, K, BF16) for _ in range(3)]
    y = torch.empty((m, N), dtype=torch.bfloat16, device="cuda")
    workspace = torch.full((ss.workspace_bytes(m, packed, BF16),), 0xA5, dtype=torch.uint8, device="cuda")
    x = tensor(inputs[0])
    torch.cuda.synchronize()
    return packed, inputs, x, y, workspace


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("m", [5, 200])
def test_captured_on_a_side_stream(dtype, m):
    """Viewed in CuPy's own stream, x would make it wait for the stream under capture, which CUDA refuses."""
    packed, inputs, x, y, workspace = operands(np.random.default_rng(31), m, dtype)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        ss.matmul(x, packed, out=y, workspace=workspace, stream=side)  # compiled and loaded before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        assert ss.matmul(x, packed, out=y, workspace=workspace, stream=torch.cuda.current_stream()) is y
    for values in inputs:
        x.copy_(tensor(values))
        y.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        check(host(y), values, packed)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_works_in_the_order_of_the_stream(dtype):
    """x is written late in the side stream, and read after that; and the stream is PyTorch's still when CuPy has let it go."""
    packed, inputs, x, y, workspace = operands(np.random.default_rng(32), 40, dtype)
    new, side = tensor(inputs[1]), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), warnings.catch_warnings():
        warnings.filterwarnings("error", "ExternalStream")  # CuPy 14 deprecates it
        for given in (side, side.cuda_stream):
            x.zero_()
            torch.cuda._sleep(100_000_000)
            x.copy_(new)
            ss.matmul(x, packed, out=y, workspace=workspace, stream=given)
            direct = y.clone()
            y.zero_()
            ss.matmul(ss.quantize(x, packed, stream=given), packed, out=y, stream=given)
            x.zero_()
            gc.collect()
            side.synchronize()
            check(host(direct), inputs[1], packed)
            check(host(y), inputs[1], packed)
    assert cp.cuda.get_current_stream() == cp.cuda.Stream.null


@pytest.mark.parametrize("given", [False, True])
def test_tensors_give_tensors_in_pytorchs_stream(given):
    """x is written late in PyTorch's current stream, or in the one given, and y read there, with nothing in between."""
    packed, inputs, x, _, _ = operands(np.random.default_rng(35), 24, INT8)
    new, side = tensor(inputs[1]).reshape(2, 12, K), torch.cuda.Stream()
    x = x.reshape(2, 12, K)
    ss.matmul(x, packed)  # compiled
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.copy_(new)
    if given:
        y = ss.matmul(x, packed, stream=side)
    else:
        with torch.cuda.stream(side):
            y = ss.matmul(x, packed)
    assert isinstance(y, torch.Tensor)
    assert y.shape == (2, 12, N)
    assert y.dtype == torch.bfloat16
    side.synchronize()
    check(host(y.reshape(24, N)), inputs[1], packed)
    assert ss.matmul(x, packed, out_dtype="float32").dtype == torch.float32


def test_tensors_that_require_grad_are_refused_in_a_sentence():
    packed, _, x, _, _ = operands(np.random.default_rng(33), 5, INT8)
    with pytest.raises(OperandError, match=r"^x: Tensor is not an array on a GPU that CuPy can view \(.*grad"):
        ss.matmul(x.requires_grad_(), packed)


def test_devices_that_are_not_there():
    packed = weight(np.random.default_rng(34), 16, 64, "6:8", INT8)
    with pytest.raises(ss.UnsupportedError, match=r"^device 99: CuPy cannot use the GPU \(cudaErrorInvalidDevice.*doctor"):
        ss.to_device(packed, 99)
