"""What GPU tests of matmul share: the kernels, operands, the exact product, how far from it a result may be."""

from __future__ import annotations

import os
from dataclasses import replace

import cupy
import numpy as np
import pytest

import slidesparse_nb as ss
from slidesparse_nb.arch import for_capability, sm90
from slidesparse_nb.core.dtypes import BFLOAT16, INT8
from tools.benchmark import check as bounds
from tools.benchmark.check import product


def capability_here():
    return divmod(int(cupy.cuda.Device().compute_capability), 10)


def sms_here():
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["multiProcessorCount"]


@pytest.fixture(scope="module")
def gemm():
    from slidesparse_nb.cuda import matmul as gemm

    return gemm


@pytest.fixture(scope="module", autouse=True, params=["own", "portable"])
def family(request):
    """Every test runs on the kernels that the device gets, and on the portable ones."""
    os.environ["SLIDESPARSE_PORTABLE"] = str(int(request.param == "portable"))
    yield for_capability(capability_here())
    del os.environ["SLIDESPARSE_PORTABLE"]


def compile_ahead(configs):
    """Compile the kernels of these configurations on all processors at once, as `slidesparse build` does it.

    Processes of pytest-xdist share them out: each starts at another one, and what is there by then is not compiled again.
    """
    from slidesparse_nb.cuda.ahead_of_time import compile_all, kernels_of
    from slidesparse_nb.cuda.jit import cache as jit

    jobs = kernels_of(configs, capability_here())
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    here = len(jobs) * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) // processes
    compile_all(jobs[here:] + jobs[:here], jit.device_compiler(), -(-(os.cpu_count() or 1) // processes))


def of_operands(family, pattern, dtype, out):
    """The kernels that multiply, and load x as an operand."""
    every = family.kernels(pattern, ss.Scheme.of(dtype), out, capability_here())
    return [c for c in every if not isinstance(c, sm90.Expansion) and not getattr(c, "own_x", 0)]


def with_expansion(launches, device):
    """The launches, after an expansion if they read expanded metadata and the weight has compact."""
    if "compact" not in device.buffers or all(launch.compact for launch in launches):
        return launches
    derived = (replace(launch, derived=not launch.compact) for launch in launches)
    return (sm90.Expansion(device.dtype, device.pattern.windows), *derived)


def on_gpu(a):
    """A NumPy array on the GPU; types that CuPy may not copy go as their bits."""
    return cupy.asarray(a.view(f"u{a.itemsize}")).view(a.dtype)


def host(a):
    return a.view(f"u{a.itemsize}").get().view(a.dtype)


def weight(rng, n, k, pattern, dtype, full=False):
    """Random weights [n, k], pruned and packed; about a tenth of the groups are all zero, unless all shall be `full`."""
    w = rng.standard_normal((n, k)).astype(np.float32)
    group = ss.Pattern.of(pattern).group
    empty = np.repeat(rng.random((n, -(-k // group))) < 0.1, group, axis=1)[:, :k]
    return ss.pack(np.where(empty & (not full), np.float32(0), w), pattern, dtype, prune="magnitude")


def tokens(rng, m, k, dtype):
    """Activations [m, k]: a row of zeros, one with an outlier, one of alternating saturated values, the rest normal."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    if m > 2:
        x[0] = 0
        x[1, k // 2] = 300
        x[2] = np.where(np.arange(k) % 2, -4, 4)
    return x.astype(dtype)


def allowed(exact, magnitude, packed, y_dtype):
    """How far y may be from the exact product on this GPU, element by element and in the norm."""
    return bounds.allowed(exact, magnitude, packed, y_dtype, for_capability(capability_here()) is sm90.ARCH)


def check(y, x, packed, bias=None):
    """Compare y, a NumPy array [m, n], with the exact product."""
    compare(y, *product(x, packed, bias), packed)


def compare(y, exact, magnitude, packed):
    """The same, of a `product` that is there: y is as far from it as `allowed`."""
    if packed.dtype is INT8:
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(y, exact.astype(y.dtype))
        return
    bound, overall = allowed(exact, magnitude, packed, y.dtype)
    error = np.abs(y.astype(np.float64) - exact)
    off = np.linalg.norm(error) / max(np.linalg.norm(exact), 1e-30)
    assert off <= overall, f"off by {off:.3g} of the norm"
    assert (error <= bound).all(), f"off by {error.max():.3g} where {bound[np.unravel_index(error.argmax(), error.shape)]:.3g}"


class Wanted:
    """The exact product of many tokens, on the GPU: what bfloat16 results of fewer tokens and outputs are compared with there.

    Args:
        exact, magnitude: `product` of all tokens with all of packed.
    """

    def __init__(self, exact, magnitude, packed):
        bound, self.overall = allowed(exact, magnitude, packed, BFLOAT16.numpy)
        if packed.dtype is INT8:
            exact = exact.astype(BFLOAT16.numpy).astype(np.float64)
        self.exact, self.bound = cupy.asarray(exact, np.float64), cupy.asarray(bound, np.float64)

    def off(self, y):
        """How many elements of y [m, n] are further off than allowed, and one more if all are in the norm: a CuPy scalar."""
        m, n = y.shape
        exact, bound = self.exact[:m, :n], self.bound[:m, :n]
        error = cupy.abs((y.view(np.uint16).astype(np.uint32) << 16).view(np.float32) - exact)
        off = (~(error <= bound)).sum()  # NaN is off
        return off + ~((error * error).sum() <= self.overall**2 * (exact * exact).sum())
