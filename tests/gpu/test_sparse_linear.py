"""SparseLinear on a GPU: the CPU's results, compiled, in CUDA graphs, on two streams and in two threads, on any device."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import slidesparse_nb as ss
from slidesparse_nb.arch import MOST_UNQUANTIZED
from slidesparse_nb.core import reference
from slidesparse_nb.integrations import tensors
from slidesparse_nb.integrations.torch import SparseLinear

SCHEMES = ("INT8_W8A8", "FP8_DYNAMIC", "BF16", "W4A8")
N, K = 384, 512


def tokens(m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def layer(scheme: str, device: str = "cuda") -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear.from_linear(torch.nn.Linear(K, N).to(torch.bfloat16).to(device), "6:8", scheme)


def same(scheme: str, y: torch.Tensor, wanted: torch.Tensor) -> None:
    if scheme == "INT8_W8A8":
        assert torch.equal(y.cpu(), wanted)
    else:
        torch.testing.assert_close(y.cpu().float(), wanted.float(), rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_on_the_cpu(scheme: str) -> None:
    host, there = layer(scheme, "cpu"), layer(scheme)
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), there.state_dict()[name].cpu().view(torch.uint8)), name
    for m in (0, 1, 5, 64, 300, 2000):
        x = tokens(m)
        y = there(x.cuda())
        same(scheme, y, host(x))
        again = there(there.quantize(x.cuda()))
        if m > MOST_UNQUANTIZED or scheme == "BF16":
            assert torch.equal(again, y)
        else:  # blocks quantized x themselves, and may have added in another order
            same(scheme, again, host(x))
        assert torch.equal(there(x.cuda().T.contiguous().T), y)
    assert torch.equal(copy.deepcopy(there)(tokens(5).cuda()), there(tokens(5).cuda()))
    moved = copy.deepcopy(there).to("cpu")
    assert not moved.arranged
    assert torch.equal(moved.to("cuda")(tokens(5).cuda()), there(tokens(5).cuda()))
    there.drop_packed()
    same(scheme, there(tokens(5).cuda()), host(tokens(5)))
    with pytest.raises(ss.OperandError, match="the packed tensors were dropped"):
        there.packed()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_and_captured(scheme: str) -> None:
    there, x = layer(scheme), tokens(28).cuda().reshape(4, 7, K)
    y = there(x)
    torch.library.opcheck(torch.ops.slidesparse.linear, (x, there._operands(), there.bias, N, K, there.facts))
    assert torch.equal(torch.compile(there, fullgraph=True)(x), y)
    graphs = torch.compile(there, mode="reduce-overhead")
    for _ in range(4):
        assert torch.equal(graphs(x), y)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        out = there(x)
    x.copy_(tokens(28, 1).reshape(4, 7, K))
    graph.replay()
    assert torch.equal(out, there(x))
    with pytest.raises(ss.OperandError, match=r"^x: 77 tokens were not multiplied by this weight before the capture"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            there(torch.empty(77, K, dtype=torch.bfloat16, device="cuda"))


def test_streams_and_threads() -> None:
    there = layer("INT8_W8A8")
    xs = [tokens(40, seed).cuda() for seed in range(4)]
    wanted = [there(x) for x in xs]
    torch.cuda.synchronize()
    own = [torch.cuda.Stream(), torch.cuda.Stream()]

    def work(i: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(own[i // 2]):  # two threads on each stream
            for _ in range(200):
                assert torch.equal(there(xs[i]), wanted[i])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


def test_weights_are_forgotten_with_their_layer() -> None:
    before = len(tensors.WEIGHTS)
    layers = [layer("INT8_W8A8") for _ in range(3)]
    for each in layers:
        each(tokens(3).cuda())
    assert len(tensors.WEIGHTS) == before + 3
    del layers, each
    gc.collect()
    assert len(tensors.WEIGHTS) == before


@pytest.mark.parametrize("scheme", ["INT8_W8A8", "BF16"])
@pytest.mark.parametrize("m", [1, 2, 37])
def test_linears_of_norms_and_gates(scheme: str, m: int) -> None:
    """The fused operators beside the reference and the plain linear: the same bits; captured, too."""
    there, (x, residual) = layer(scheme), torch.randn(2, m, K).to(torch.bfloat16).cuda()
    gamma, gate = torch.rand(K, device="cuda").to(torch.bfloat16), torch.randn(m, 2 * K, device="cuda").to(torch.bfloat16)
    facts, ops = (there._operands(), there.bias, N, K, there.facts), torch.ops.slidesparse

    def products() -> tuple[torch.Tensor, ...]:
        added, kept = ops.rms_norm_linear(x, residual, gamma, 1e-6, *facts)
        normed, none = ops.rms_norm_linear(x, None, gamma, 1e-6, *facts)
        assert none.numel() == 0
        return added, ops.silu_and_mul_linear(gate, *facts), ops.gelu_and_mul_linear(gate, *facts), normed, kept

    *got, kept = products()
    host = [tensors.as_numpy(t.cpu()) for t in (x, residual, gamma, gate)]
    normed, sums = reference.rms_norm(host[0], host[2], 1e-6, host[1])
    plain = reference.rms_norm(host[0], host[2], 1e-6)[0]
    assert torch.equal(kept.cpu(), tensors.from_numpy(sums))
    for y, before in zip(got, (normed, reference.silu_and_mul(host[3]), reference.gelu_and_mul(host[3]), plain), strict=True):
        assert torch.equal(y, there(tensors.from_numpy(before).cuda()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, (*got, kept), strict=True))
    torch.library.opcheck(ops.rms_norm_linear, (x, residual, gamma, 1e-6, *facts))
    torch.library.opcheck(ops.silu_and_mul_linear, (gate, *facts))
    torch.library.opcheck(ops.gelu_and_mul_linear, (gate, *facts))
    for short in ((residual[:, 8:], gamma), (residual, gamma[8:])):
        with pytest.raises(RuntimeError, match="size of tensor"):  # nothing is read past their ends
            ops.rms_norm_linear(x, *short, 1e-6, *facts)


def test_another_device_and_bad_operands() -> None:
    there = layer("INT8_W8A8")
    last = torch.cuda.device_count() - 1
    x = tokens(5).to(f"cuda:{last}")
    if last:
        with pytest.raises(ss.OperandError, match=r"^x: is on cuda"):
            there(x)
        same("INT8_W8A8", there.to(f"cuda:{last}")(x), layer("INT8_W8A8", "cpu")(tokens(5)))
    q = there.quantize(x)
    with pytest.raises(ss.OperandError, match=r"^operand: .* bytes must be"):
        torch.ops.slidesparse.product(
            q.operand, q.scale.new_ones(50), there._operands(), None, torch.bfloat16, N, K, there.facts
        )
