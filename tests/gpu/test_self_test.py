"""The test of kernels before their first product, on a GPU on which we pretend to have run none; some are wrong on purpose."""

from __future__ import annotations

import time

import cupy as cp
import numpy as np
import pytest
from gemm_cases import capability_here, check, compile_ahead, sms_here, tokens, weight

import slidesparse_nb as ss
from slidesparse_nb import arch, doctor
from slidesparse_nb.arch import sm80, sm90_launch
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.cuda import self_test
from slidesparse_nb.cuda.plan import device_facts, plan_of
from slidesparse_nb.cuda.weight import shared_plans

pytestmark = pytest.mark.gpu

F32 = np.dtype(np.float32)
FAULT = "(threadIdx.x % 32 == 31 && e >> 28 == 14 ? 3u << 28 : 0)"
"""Of the last lane, the last nibble, only where it is (2, 3): it becomes (1, 3)."""


@pytest.fixture(autouse=True)
def unknown_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(arch, "RAN", frozenset())
    monkeypatch.setattr(arch, "LEFT_ASIDE", set())
    for known in (self_test._known, self_test._decided):
        known.clear()
    shared_plans.cache_clear()
    yield
    for known in (self_test._known, self_test._decided):
        known.clear()
    shared_plans.cache_clear()
    plan_of.cache_clear()


def device():
    return Device(*device_facts(cp.cuda.runtime.getDevice()))


@pytest.mark.parametrize(
    ("portable", "dtype", "pattern"),
    [(False, INT8, "6:8"), (False, FLOAT8, "6:8"), (True, INT8, "6:8"), (True, BFLOAT16, "6:8"), (True, INT8, "16:18")],
    ids=str,
)
def test_right_kernels_pass(monkeypatch, portable, dtype, pattern):
    """16:18 is lifted in memory for the portable kernel."""
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", str(int(portable)))
    rng = np.random.default_rng(1)
    packed, x = weight(rng, 200, 300, pattern, dtype), tokens(rng, 40, 300, F32)
    check(ss.matmul(cp.asarray(x), packed).get(), x, packed)
    there = ss.to_device(packed)
    problem, buffers = there.problem(40, "float32"), tuple(there.buffers)
    (config, *_) = there.plans[40, "float32"].plan.configs
    start = time.perf_counter()
    outcome = self_test.tested(problem, (config,), buffers, there.ordinal, "again")
    print(f"{config}: {time.perf_counter() - start:.2f} s")
    assert outcome.passed, outcome.text
    assert there.device.portable == portable
    assert all(outcome.passed for outcome in self_test.outcomes(device()))


@pytest.mark.parametrize("scheme", ["int8", "NVFP4", "MXFP4"])
def test_every_portable_tile_passes(monkeypatch, scheme):
    """Of pairs where the GPU has the instruction; elsewhere it is refused."""
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", "1")
    packed = weight(np.random.default_rng(2), 64, 96, "6:8", scheme)
    if sm80.ARCH.refuses(capability_here(), packed.scheme):
        with pytest.raises(ss.UnsupportedError, match=f"^packed: {scheme} weights need compute capability"):
            ss.to_device(packed)
        return
    there = ss.to_device(packed)
    problem = GemmProblem.of((40, 64, 96, "6:8", scheme, "bfloat16"), Device(capability_here(), sms_here(), portable=True))
    configs = list(sm80.ARCH.kernels(problem.pattern, problem.scheme, "bfloat16", capability_here()))
    compile_ahead(configs)
    for config in configs:
        outcome = self_test.tested(problem, (config,), tuple(there.buffers), there.ordinal, str(config))
        assert outcome.passed, outcome.text


def test_a_kernel_with_one_wrong_nibble_is_found_and_left_aside(monkeypatch):
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", "1")
    rng = np.random.default_rng(3)
    packed, x = weight(rng, 200, 300, "6:8", INT8), tokens(rng, 40, 300, F32)
    first = arch.choose(ss.to_device(packed).problem(40, "float32"), tuple(ss.to_device(packed).buffers))[0]
    defines = sm80.Config.defines
    monkeypatch.setattr(
        sm80.Config, "defines", lambda config: defines(config) | ({"FAULT": FAULT} if config.tile == first.tile else {})
    )
    check(ss.matmul(cp.asarray(x), packed).get(), x, packed)
    (chosen,) = ss.to_device(packed).plans[40, "float32"].plan.configs
    assert chosen.tile != first.tile
    failed = next(finding for finding in doctor.self_tests() if finding.state == "broken")
    print(failed.text)
    assert f"{device().name}, compute capability " in failed.text
    assert "elements of y are wrong, the first at row " in failed.text


def test_the_portable_kernel_serves_where_the_own_one_is_wrong(monkeypatch):
    """Every kernel of sm_90a multiplies int8 as if it were float8."""
    if arch.for_capability(capability_here()).portable:
        return
    defines = sm90_launch.Config.defines
    monkeypatch.setattr(sm90_launch.Config, "defines", lambda config: defines(config) | {"DTYPE": 1})
    rng = np.random.default_rng(4)
    packed, x = weight(rng, 200, 300, "6:8", INT8), tokens(rng, 40, 300, F32)
    check(ss.matmul(cp.asarray(x), packed).get(), x, packed)
    assert ss.to_device(packed).arch is sm80.ARCH
    outcomes = self_test.outcomes(device())
    assert [outcome.passed for outcome in outcomes].count(False) == self_test.TRIED
    assert outcomes[-1].passed
