"""Times that no test asserts, printed: `python tests/costs.py`. They are true of a quiet machine only.

Anywhere: what a warm call costs the thread that makes it, with NumPy in CuPy's place and a C function in the driver's. With an
NVIDIA GPU and CuPy: the same of real calls. What kernels take: slidesparse bench.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
from device_cases import bits
from numpy_gpu import BF16, array, empty, numpy_for_cupy, ops, weight

import slidesparse_nb as ss
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8


def host_us(call: Callable[[], object], calls: int, wait: Callable[[], object] = lambda: None, runs: int = 20) -> float:
    """Microseconds that a call takes, in the fastest of several runs; `wait` is called after each, outside of its time."""
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
        wait()
    return min(samples)


# ---- anywhere --------------------------------------------------------------------------------------------------------


def launcher(parameters: Sequence[str]) -> Any:
    """A launcher with a function of the C library that does nothing in the driver's place."""
    nothing = ctypes.CDLL(None).getppid
    nothing.restype = None  # counts as 0, the status of success
    launch: Any = importlib.import_module("slidesparse_nb.cuda.launch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_driver", lambda: SimpleNamespace(cuLaunchKernelEx=nothing))
        return launch.Launcher(SimpleNamespace(ptr=1), parameters)


def python_costs(portable: bool) -> None:
    """A launch and a warm 8-bit linear: all of the Python, nothing of CuPy and the driver."""
    with pytest.MonkeyPatch.context() as patch, numpy_for_cupy(patch, portable):
        run, arguments = launcher(["address"] * 15), range(2**40, 2**40 + 15)
        launch_us = host_us(lambda: run((1, 1, 1), (128, 1, 1), 0, 12345, True, *arguments), 500)
        packed, x, y = weight(64, 128, INT8), array(np.ones((8, 128), BF16)), empty((8, 64), BF16)
        there = ops().to_device(packed)
        workspace = empty(there.workspace_bytes(8, "bfloat16"), np.uint8)
        kernel = importlib.import_module("slidesparse_nb.cuda.jit.numba").Kernel
        patch.setattr(kernel, "on", lambda kernel, *_: launcher(["integer"] * len(kernel.parameters)))
        run = launcher(list(there.arch.parameters.values()))
        plan = there.bound(8, "bfloat16").plan
        patch.setattr(plan, "launches", tuple(dataclasses.replace(launch, run=run) for launch in plan.launches))
        there.plans[8, "bfloat16"] = there.bind(8, "bfloat16", plan.configs)
        matmul_us = host_us(lambda: ops().matmul(x, packed, out=y, workspace=workspace), 100)
        at = 8, x.data.ptr, "bfloat16", x.strides, y.data.ptr, 64, "bfloat16", workspace.data.ptr, 12345
        linear_us = host_us(lambda: there.linear(*at), 500)
        first, again = (iter(range(2049, 4096)) for _ in range(2))
        first_us = host_us(lambda: there.bound(next(first), "bfloat16"), 1000, runs=1)
        other = ops().to_device(weight(64, 128, INT8, seed=1))
        again_us = host_us(lambda: other.bound(next(again), "bfloat16"), 50)
    kernel = "portable" if portable else "Hopper's"
    told = f"by addresses {linear_us:.1f} us, by matmul {matmul_us:.1f} us; a number of tokens for the first time"
    told += f" {first_us:.0f} us, for other weights of the shape {again_us:.1f} us"
    print(f"  a launch {launch_us:.2f} us; a warm 8-bit linear, {kernel} kernel, {told}")


# ---- with a GPU ------------------------------------------------------------------------------------------------------


def real_costs(cp: Any) -> None:
    """A whole 8-bit linear and its parts; packing of a large layer."""
    rng = np.random.default_rng(21)
    packed = ss.pack(rng.standard_normal((256, 512)).astype(np.float32), "6:8", "int8", prune="magnitude")
    x = cp.asarray(bits(rng.standard_normal((8, 512)).astype(BF16))).view(BF16)
    q, y = ss.quantize(x, packed), cp.empty((8, 256), BF16)
    workspace = cp.empty(ss.workspace_bytes(8, packed, BF16), np.uint8)
    there, stream = ss.to_device(packed), cp.cuda.get_current_stream().ptr
    at = 8, x.data.ptr, "bfloat16", x.strides, y.data.ptr, 256, "bfloat16", workspace.data.ptr, stream
    wait = cp.cuda.Device().synchronize
    for name, call in (
        ("linear, allocating", lambda: ss.matmul(x, packed)),
        ("linear, with out and workspace", lambda: ss.matmul(x, packed, out=y, workspace=workspace)),
        ("linear by addresses", lambda: there.linear(*at)),
        ("product, quantized before", lambda: ss.matmul(q, packed, out=y, workspace=workspace)),
        ("quantize", lambda: ss.quantize(x, packed)),
    ):
        call()
        print(f"  {name:32} {host_us(call, 50, wait):5.1f} us")
    w = cp.random.default_rng(0).standard_normal((18944, 3584), dtype=cp.float32).astype(BF16)
    for dtype in (INT8, FLOAT8, BFLOAT16):
        pack = partial(ss.pack, w, "6:8", dtype, prune="magnitude")
        pack()
        print(f"  pack 18944 x 3584 bfloat16 to {dtype!s:14} {host_us(pack, 1, wait) / 1e3:.2f} ms")


def main() -> None:
    print("Python alone:")
    for portable in (False, True):
        python_costs(portable)
    try:
        import cupy as cp

        if not cp.cuda.runtime.getDeviceCount():
            raise RuntimeError("no device")
    except Exception as error:  # no CuPy, no driver, no device
        print(f"no GPU ({error}): nothing more is measured")
        return
    print("time of the calling thread:")
    real_costs(cp)


if __name__ == "__main__":
    main()
