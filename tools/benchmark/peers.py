"""The baselines, through PyTorch: dense cuBLASLt, cuSPARSELt with its algorithm search, vLLM's linears, PyTorch's own.

PyTorch's operations allocate, so they are captured by PyTorch's own CUDA graphs, whose memory is their own; those are replayed
on the clock's stream and timed by the same events as everything else. A new baseline is a row of PEERS and a method of
`TorchPeers` or `VllmPeers`, `_NAME`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import slidesparse_nb as ss

from .cases import KINDS, MODELS, PARTS, Call, Calls, Case, Kind, Linear, Peer, Selection

PEERS = {
    "dense": Peer("cuBLASLt, dense weights of the same type", "dense"),
    "cusparselt": Peer("cuSPARSELt, 2:4 weights at the expanded k: the published method", "cuSPARSELt", sparse=True, late=True),
    "cutlass": Peer("vLLM's 8-bit linear: CUTLASS, dynamic scales a token", "vLLM", "linear", ("fp8", "int8"), "vllm"),
    "marlin-w4a8": Peer("vLLM's Marlin, 4-bit weights, 8-bit tokens", "Marlin W4A8", "linear", ("fp8", "int8"), "vllm"),
    "marlin-w4a16": Peer("vLLM's Marlin, 4-bit weights", "Marlin W4A16", "linear", ("fp8", "int8", "bf16"), "vllm"),
    "torch": Peer("a dynamic 8-bit linear of PyTorch operations, unless vLLM is there", "PyTorch", "linear", ("fp8", "int8")),
}


def default(peers: dict[str, Peer]) -> dict[str, Peer]:
    """Without what is measured only where it is named: vLLM's where there is none, PyTorch's own linear where there is."""
    there = importlib.util.find_spec("vllm") is not None
    return {name: peer for name, peer in peers.items() if (name != "torch" if there else peer.package != "vllm")}


QUICK = Selection(
    (MODELS["qwen2.5-7b"],), ("6:8",), (KINDS["fp8"], KINDS["int8"], KINDS["bf16"]), (16, 1024, 4096), ("gemm",),
    {"dense": PEERS["dense"]}, (), budget=50, products_only=True,
)  # fmt: skip
FULL = Selection(
    (MODELS["qwen2.5-7b"],), ("6:8", "2:4", "4:6", "8:10"), tuple(KINDS.values()), (1, 16, 64, 256, 1024, 4096, 16384),
    tuple(PARTS), PEERS, (4096, 16384), budget=510, products_only=True,
)  # fmt: skip

LARGEST = {"int8": 127.0, "fp8": 448.0}
DEVIATIONS = 4.0
"""The largest of some thousand normal numbers, in standard deviations."""

NOTES = {
    "bf16": "dense: cuBLASLt's own heuristic chose the algorithm, since PyTorch offers no search of it",
    "int8": "dense, INT8: torch._int_mm writes int32, which nothing scales to 16 bits",
    "fp8": "dense, FP8: one scale a tensor, fast accumulation, bfloat16 out",
}


class TorchPeers:
    """Baselines on the current device.

    Args:
        stream: address of the clock's stream.

    Raises:
        ImportError: PyTorch cannot be imported.
        RuntimeError: it has no CUDA.
    """

    def __init__(self, stream: int) -> None:
        self.torch: Any = importlib.import_module("torch")
        if not self.torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {self.torch.__version__} cannot use the GPU")
        self.torch.manual_seed(0)
        self._stream = self.torch.cuda.ExternalStream(stream)
        self._found: dict[tuple[Any, ...], dict[str, int]] = {}
        self._of: tuple[Any, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Versions, as the results keep them."""
        torch = self.torch
        facts: dict[str, Any] = {"torch": str(torch.__version__), "torch_cuda": torch.version.cuda}
        with contextlib.suppress(Exception):
            facts["cusparselt"] = torch.backends.cusparselt.version()
        return facts

    def release(self) -> None:
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # libraries load, workspaces are made
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        torch.cuda.synchronize()
        stream = self._stream

        def launch(_kept: list[Any] = kept) -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return launch

    def prepare(self, case: Case, linear: Linear, copies: int) -> Calls:
        assert case.m is not None
        if self._of != (of := (case.suite.name, case.kind.key, case.pattern)):
            self._of = of
            self.torch.cuda.empty_cache()  # shapes change: what was kept would serve nobody
        made: Calls = getattr(self, f"_{case.provider.replace('-', '_')}")(case, linear, case.m, copies)
        made.rows = None if made.rows == case.m else made.rows
        return made

    # ---- baselines -----------------------------------------------------------------------------------------------

    def _dense(self, case: Case, linear: Linear, m: int, copies: int) -> Calls:
        torch, kind = self.torch, case.kind
        rows = max(m, 32) if kind.key == "int8" else m  # _int_mm takes more than 16
        ws = [self._random(linear.n, linear.k, kind) for _ in range(copies)]
        xs = [self._random(rows, linear.k, kind) for _ in range(copies)]
        if kind.key == "fp8":
            one = torch.ones(1, device="cuda", dtype=torch.float32)
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
            calls = [partial(torch._scaled_mm, x, w.t(), one, one, **options) for x, w in zip(xs, ws, strict=True)]
        else:
            multiply, out = (torch._int_mm, torch.int32) if kind.key == "int8" else (torch.mm, xs[0].dtype)
            ys = [torch.empty(rows, linear.n, device="cuda", dtype=out) for _ in range(copies)]
            calls = [partial(multiply, x, w.t(), out=y) for x, w, y in zip(xs, ws, ys, strict=True)]
        return Calls(calls, rows=rows, notes=[NOTES[key] for key in ("bf16", kind.key) if key in NOTES])

    def _cusparselt(self, case: Case, linear: Linear, m: int, copies: int) -> Calls:
        torch, kind = self.torch, case.kind
        assert case.pattern is not None
        ks = -(-ss.Pattern.of(case.pattern).expanded_k(linear.k) // 64) * 64
        rows = -(-m // 32) * 32 if kind.key == "int8" else -(-m // 16) * 16
        ws = [torch._cslt_compress(self._two_of_four(self._random(linear.n, ks, kind))) for _ in range(copies)]
        xs = [self._random(rows, ks, kind) for _ in range(copies)]
        options: dict[str, Any] = {"out_dtype": torch.bfloat16 if kind.quantized else None}
        options |= self._search(ws[0], xs[0], options["out_dtype"], (linear.n, ks, rows, kind.key))
        calls = [partial(torch._cslt_sparse_mm, w, x.t(), **options) for x, w in zip(xs, ws, strict=True)]
        notes = ["cusparselt: algorithm and split-K by its own search; activations are slid beforehand, outside the time"]
        return Calls(calls, rows=rows, notes=notes)

    def _torch(self, case: Case, linear: Linear, m: int, copies: int) -> Calls:
        """Scale per token, quantize, multiply, scale: each an operation of PyTorch's (eager, not torch.compile)."""
        torch, kind = self.torch, case.kind
        rows = max(m, 32) if kind.key == "int8" else m
        ws = [self._random(linear.n, linear.k, kind) for _ in range(copies)]
        xs = [torch.randn(rows, linear.k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        scale_w = torch.rand(1, linear.n, device="cuda", dtype=torch.float32)
        most = LARGEST[kind.key]

        def int8(x: Any, w: Any) -> Any:
            scale = x.abs().amax(1, keepdim=True).float() / most
            q = (x.float() / scale).round().clamp(-most, most).to(torch.int8)
            return (torch._int_mm(q, w.t()).float() * scale * scale_w).to(torch.bfloat16)

        def fp8(x: Any, w: Any) -> Any:
            scale = x.abs().amax(1, keepdim=True).float() / most
            q = (x.float() / scale).clamp(-most, most).to(torch.float8_e4m3fn)
            return torch._scaled_mm(q, w.t(), scale, scale_w, out_dtype=torch.bfloat16, use_fast_accum=True)

        calls = [partial(int8 if kind.key == "int8" else fp8, x, w) for x, w in zip(xs, ws, strict=True)]
        notes = ["torch: eager PyTorch operations in a graph, not torch.compile, which takes minutes to compile them all"]
        return Calls(calls, rows=rows, notes=notes)

    # ---- operands ------------------------------------------------------------------------------------------------

    def _random(self, rows: int, columns: int, kind: Kind) -> Any:
        """As ours are: of a normal distribution; of 8 bits, scaled to fill the type's range. (Power depends on them.)"""
        torch = self.torch
        numbers = torch.randn(rows, columns, device="cuda", dtype=getattr(torch, kind.activations))
        if not kind.quantized:
            return numbers
        most = LARGEST[kind.key]
        scaled = numbers.mul_(most / DEVIATIONS).clamp_(-most, most)
        return scaled.round_().to(torch.int8) if kind.key == "int8" else scaled.to(torch.float8_e4m3fn)

    def _search(self, weight: Any, x: Any, out_dtype: Any, key: tuple[Any, ...]) -> dict[str, int]:
        """Options of _cslt_sparse_mm, the fastest that cuSPARSELt's search finds; remembered."""
        if key not in self._found:
            torch = self.torch
            try:
                algorithm, split, mode, *_ = torch._C._cusparselt.mm_search(weight, x.t(), None, None, out_dtype, False)
                found = {"alg_id": int(algorithm), "split_k": int(split), "split_k_mode": int(mode)}
                torch._cslt_sparse_mm(weight, x.t(), out_dtype=out_dtype, **found)
            except Exception:  # releases before that function, or that name its results otherwise
                found = {"alg_id": int(torch._cslt_sparse_mm_search(weight, x.t(), out_dtype=out_dtype))}
            torch.cuda.synchronize()
            self._found[key] = found
        return self._found[key]

    def _two_of_four(self, w: Any) -> Any:
        """w with the second and last of every four zero."""
        fours = (w.view(self.torch.uint8) if w.itemsize == 1 else w).view(w.shape[0], -1, 4).clone()
        fours[..., 1::2] = 0
        return fours.view(w.shape[0], -1).view(w.dtype)


class VllmPeers(TorchPeers):
    """vLLM's linears: bfloat16 in and out, random weights and scales; what they compute is not checked.

    Raises:
        ImportError: vLLM cannot be imported.
    """

    def __init__(self, stream: int) -> None:
        super().__init__(stream)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.ops: Any = importlib.import_module("vllm._custom_ops")

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "vllm": str(importlib.import_module("vllm").__version__)}

    def _tokens(self, m: int, linear: Linear, copies: int) -> list[Any]:
        return [self.torch.randn(m, linear.k, device="cuda", dtype=self.torch.bfloat16) for _ in range(copies)]

    def _cutlass(self, case: Case, linear: Linear, m: int, copies: int) -> Calls:
        torch, ops = self.torch, self.ops
        scale_w = torch.rand(linear.n, 1, device="cuda")

        def multiply(x: Any, w: Any) -> Any:
            if case.kind.key == "fp8":
                q, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
            else:
                q, scale, _ = ops.scaled_int8_quant(x)
            return ops.cutlass_scaled_mm(q, w.t(), scale, scale_w, torch.bfloat16)

        ws = [self._random(linear.n, linear.k, case.kind) for _ in range(copies)]
        return Calls([partial(multiply, x, w) for x, w in zip(self._tokens(m, linear, copies), ws, strict=True)])

    def _marlin_w4a16(self, case: Case, linear: Linear, m: int, copies: int) -> Calls:
        return self._marlin(linear, m, copies, None)

    def _marlin_w4a8(self, case: Case, linear: Linear, m: int, copies: int) -> Calls:
        return self._marlin(linear, m, copies, getattr(self.torch, case.kind.name))

    def _marlin(self, linear: Linear, m: int, copies: int, quantized: Any) -> Calls:
        """4-bit weights with a scale for 128 of k; tokens of 16 bits, or quantized to `quantized` within the call."""
        torch, ops, (n, k) = self.torch, self.ops, (linear.n, linear.k)
        of: Any = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
        type = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8
        none = torch.empty(0, dtype=torch.int, device="cuda")
        workspace = of.marlin_make_workspace_new(torch.device("cuda", torch.cuda.current_device()))
        bits = torch.iinfo(torch.int32)

        def weight() -> tuple[Any, Any]:
            codes = torch.randint(bits.min, bits.max, (k // 8, n), device="cuda", dtype=torch.int32)
            scales = torch.rand(k // 128, n, device="cuda").to(torch.bfloat16) * 0.01
            return ops.gptq_marlin_repack(codes, none, k, n, 4, quantized is not None), scales

        def multiply(x: Any, w: Any, scale_w: Any) -> Any:
            q, scale = (x, None) if quantized is None else of.marlin_quant_input(x, quantized)
            atomic = of.should_use_atomic_add_reduce(m, n, k, x.device, torch.bfloat16)
            facts = (None, None, none, none, workspace, type, m, n, k, True, atomic, True, False)
            return ops.marlin_gemm(q, None, w, None, scale_w, scale, *facts)

        return Calls([partial(multiply, x, *weight()) for x in self._tokens(m, linear, copies)])
