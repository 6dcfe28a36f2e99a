"""Several GPUs in one process: as many as there are, down to one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cupy as cp
import numpy as np
import pytest
from gemm_cases import check, tokens, weight

import slidesparse_nb as ss
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8

pytestmark = pytest.mark.gpu

F32 = np.dtype(np.float32)


def devices():
    return range(cp.cuda.runtime.getDeviceCount())


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
def test_one_weight_on_every_device_whichever_is_current(dtype):
    rng = np.random.default_rng(1)
    packed, x = weight(rng, 200, 300, "6:8", dtype), tokens(rng, 40, 300, F32)
    for ordinal in devices():
        with cp.cuda.Device(ordinal):
            there, bias = cp.asarray(x), cp.asarray(np.arange(200, dtype=np.float32))
        for current in devices():
            with cp.cuda.Device(current):
                y = ss.matmul(there, packed, bias=bias)
                assert y.device.id == ordinal
                assert cp.cuda.runtime.getDevice() == current
            with cp.cuda.Device(ordinal):
                check(y.get(), x, packed, np.arange(200, dtype=np.float32))


def test_packing_and_quantizing_stay_where_the_array_is():
    rng = np.random.default_rng(2)
    w = rng.standard_normal((64, 96)).astype(np.float32)
    want = ss.pack(w, "6:8", "int8", prune="magnitude")
    for ordinal in devices():
        with cp.cuda.Device(ordinal):
            there = cp.asarray(w)
        packed, q = ss.pack(there, "6:8", "int8", prune="magnitude"), ss.quantize(there, "6:8", "int8")
        assert packed.values.device.id == q.values.device.id == ordinal
        assert packed.values.get().tobytes() == want.values.tobytes()
        assert packed.meta.get().tobytes() == want.meta.tobytes()


def test_a_thread_a_device():
    rng = np.random.default_rng(3)
    packed = weight(rng, 300, 512, "6:8", INT8)
    inputs = [tokens(rng, 20 + ordinal, 512, F32) for ordinal in devices()]

    def work(ordinal):
        with cp.cuda.Device(ordinal):
            x = cp.asarray(inputs[ordinal])
            for _ in range(50):
                y = ss.matmul(x, packed)
            check(y.get(), inputs[ordinal], packed)

    with ThreadPoolExecutor(len(inputs)) as threads:
        list(threads.map(work, devices()))
