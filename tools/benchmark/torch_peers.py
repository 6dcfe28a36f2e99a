"""The peers, through PyTorch: dense cuBLASLt, cuSPARSELt with its algorithm search, a dynamic 8-bit linear.

PyTorch's operations allocate, so they are captured by PyTorch's own CUDA graphs, whose memory is their own; those are replayed
on the clock's stream and timed by the same events as everything else.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .gpu import library_version
from .selection import Group, Kind, Linear, slid_k
from .trial import Call, Launch, Trial

HEURISTIC = (
    "dense: cuBLASLt's own heuristic chose the algorithm, since PyTorch offers no search of it; nvmath-python was not used"
)
INT8_DENSE = "dense, INT8: torch._int_mm writes int32, which nothing scales to 16 bits"
FP8_DENSE = "dense, FP8: one scale a tensor, fast accumulation, bfloat16 out"


LARGEST = {"int8": 127.0, "fp8": 448.0}
DEVIATIONS = 4.0
"""Of some thousand normal numbers the largest is about so many standard deviations from zero."""


class TorchPeers:
    """Peers on the current device.

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
        self._weights: dict[tuple[Any, ...], list[Any]] = {}
        self._of: dict[str, tuple[Any, ...]] = {}
        self._found: dict[tuple[Any, ...], dict[str, int]] = {}

    def facts(self) -> dict[str, Any]:
        """Versions, as the results keep them."""
        torch = self.torch
        facts: dict[str, Any] = {"torch": str(torch.__version__), "torch_cuda": torch.version.cuda}
        with contextlib.suppress(Exception):
            facts["cusparselt"] = torch.backends.cusparselt.version()
        with contextlib.suppress(Exception):  # what PyTorch has loaded
            facts["cublaslt"] = library_version("cublasLtGetVersion", "libcublasLt.so.13", "libcublasLt.so.12")
        return facts

    def release(self) -> None:
        self._weights.clear()
        self._of.clear()
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()

    def capture(self, calls: Sequence[Call]) -> Launch:
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

    def trial(self, group: Group, linear: Linear, copies: int) -> Trial:
        assert group.m is not None
        family = "sparse" if group.contender == "cusparselt" else "dense"
        of = (group.suite.name, group.kind.key, group.pattern)
        if self._of.get(family) != of:
            self._of[family] = of
            for key in [key for key in self._weights if key[0] == family]:
                del self._weights[key]
            self.torch.cuda.empty_cache()
        make = {"dense": self._dense, "cusparselt": self._cusparselt, "torch": self._linear}[group.contender]
        made: Trial = make(group, linear, copies)
        return made

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

    def _kept(self, key: tuple[Any, ...], copies: int, make: Callable[[], Any]) -> list[Any]:
        known = self._weights.setdefault(key, [])
        while len(known) < copies:
            known.append(make())
        return known[:copies]

    # ---- contenders ----------------------------------------------------------------------------------------------

    def _dense(self, group: Group, linear: Linear, copies: int) -> Trial:
        torch, kind, m = self.torch, group.kind, group.m
        assert m is not None
        weights = self._kept(("dense", linear), copies, lambda: self._random(linear.n, linear.k, kind))
        rows = max(m, 32) if kind.key == "int8" else m  # _int_mm takes more than 16
        xs = [self._random(rows, linear.k, kind) for _ in range(copies)]
        notes = [HEURISTIC]
        if kind.key == "int8":
            notes.append(INT8_DENSE)
            ys = [torch.empty(rows, linear.n, device="cuda", dtype=torch.int32) for _ in range(copies)]
            calls = [partial(torch._int_mm, x, w.t(), out=y) for x, w, y in zip(xs, weights, ys, strict=True)]
        elif kind.key == "fp8":
            notes.append(FP8_DENSE)
            one = torch.ones(1, device="cuda", dtype=torch.float32)
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
            calls = [partial(torch._scaled_mm, x, w.t(), one, one, **options) for x, w in zip(xs, weights, strict=True)]
        else:
            ys = [torch.empty(rows, linear.n, device="cuda", dtype=xs[0].dtype) for _ in range(copies)]
            calls = [partial(torch.mm, x, w.t(), out=y) for x, w, y in zip(xs, weights, ys, strict=True)]
        return Trial(calls, rows=_if_other(rows, m), notes=notes)

    def _linear(self, group: Group, linear: Linear, copies: int) -> Trial:
        """Scale per token, quantize, multiply, scale: each an operation of PyTorch's (eager, not torch.compile)."""
        torch, kind, m = self.torch, group.kind, group.m
        assert m is not None
        weights = self._kept(("dense", linear), copies, lambda: self._random(linear.n, linear.k, kind))
        rows = max(m, 32) if kind.key == "int8" else m
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

        linear_of = int8 if kind.key == "int8" else fp8
        calls = [partial(linear_of, x, w) for x, w in zip(xs, weights, strict=True)]
        notes = ["torch: eager PyTorch operations in a graph, not torch.compile, which takes minutes to compile them all"]
        return Trial(calls, rows=_if_other(rows, m), notes=notes)

    def _cusparselt(self, group: Group, linear: Linear, copies: int) -> Trial:
        torch, kind, m = self.torch, group.kind, group.m
        assert m is not None
        assert group.pattern is not None
        ks = -(-slid_k(group.pattern, linear.k) // 64) * 64
        rows = -(-m // 32) * 32 if kind.key == "int8" else -(-m // 16) * 16
        weights = self._kept(
            ("sparse", linear, ks), copies, lambda: torch._cslt_compress(self._two_of_four(self._random(linear.n, ks, kind)))
        )
        xs = [self._random(rows, ks, kind) for _ in range(copies)]
        out_dtype = torch.bfloat16 if kind.quantized else None
        options = self._search(weights[0], xs[0], out_dtype, (linear.n, ks, rows, kind.key))
        calls = [
            partial(torch._cslt_sparse_mm, w, x.t(), out_dtype=out_dtype, **options) for x, w in zip(xs, weights, strict=True)
        ]
        notes = ["cusparselt: algorithm and split of k by its own search; activations are slid beforehand, outside the time"]
        return Trial(calls, rows=_if_other(rows, m), notes=notes)

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
        bits = w.view(self.torch.uint8) if w.itemsize == 1 else w
        fours = bits.view(w.shape[0], -1, 4).clone()
        fours[..., 1] = 0
        fours[..., 3] = 0
        return fours.view(bits.shape).view(w.dtype)


def _if_other(rows: int, m: int) -> int | None:
    return None if rows == m else rows
