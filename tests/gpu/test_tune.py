"""Tuning on a GPU: candidates are proved equal and timed, the fastest is kept, and matmul then uses it and is right."""

from __future__ import annotations

import json

import cupy as cp
import numpy as np
import pytest
from commands import slidesparse
from gemm_cases import check, tokens, weight

import slidesparse_nb as ss
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8
from slidesparse_nb.cuda import matmul, tuned_store

pytestmark = pytest.mark.gpu

M, N, K = 48, 2048, 2048
MOST = 6


@pytest.fixture(autouse=True, params=["own", "portable"])
def family(request, tmp_path, monkeypatch):
    """Results in a folder of their own; kernels stay in the cache. Few candidates, so that few kernels are compiled."""
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", str(int(request.param == "portable")))
    monkeypatch.delenv("SLIDESPARSE_TUNED", raising=False)
    monkeypatch.setattr(tuned_store, "folder", lambda: tmp_path / "tuned")
    monkeypatch.setattr(tuned_store, "MOST_CANDIDATES", MOST)
    tuned_store.look_again()
    yield request.param
    tuned_store.look_again()


def multiply(packed, x):
    """y on the host, and the launches that made it."""
    x_there = cp.asarray(x.view(f"u{x.itemsize}")).view(x.dtype)
    y = matmul.matmul(x_there, packed, out_dtype=BFLOAT16.numpy)
    return y.view(np.uint16).get().view(y.dtype), matmul.to_device(packed).bound(x.shape[0], "bfloat16").plan.configs


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
def test_the_fastest_is_kept_and_used(dtype, monkeypatch):
    """Against the slowest candidate there is, in the place of the model's choice."""

    def slowest_first(problem, buffers):
        ranked = tuned_store.ranked(problem, buffers)
        return [ranked[-1][1], *(candidate for _, candidate in ranked[: MOST - 1])]

    monkeypatch.setattr(tuned_store, "likely", slowest_first)
    (found,) = ss.tune_products([(M, N, K, "6:8", dtype, "bfloat16")], tell=print)
    print(found)
    assert not found.wrong
    assert found.kept
    assert 0 < found.best_us < found.model_us
    rng = np.random.default_rng(3)
    packed, x = weight(rng, N, K, "6:8", dtype, full=True), tokens(rng, M, K, BFLOAT16.numpy)  # 16-bit, too, it has codes
    y, used = multiply(packed, x)
    assert tuple(map(str, used)) == found.best
    check(y, x, packed)


def test_every_way_that_is_kept_is_used_and_right():
    rng = np.random.default_rng(4)
    x = tokens(rng, M, K, BFLOAT16.numpy)
    first = weight(rng, N, K, "6:8", INT8)
    problem = matmul.to_device(first).problem(M, "bfloat16")
    for candidate in tuned_store.likely(problem):
        tuned_store.keep(problem, candidate, {})
        packed = ss.PackedWeight(first.values, first.meta, first.scale, first.pattern, first.shape, first.dtype)
        y, used = multiply(packed, x)
        assert used == candidate
        check(y, x, packed)


def test_command():
    done = slidesparse("tune", "--shape", f"{N},{K}", "-m", f"1,{M}", "--json")
    print(done.output)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [one["m"] for one in told] == [1, M]
    assert all(one["best_us"] <= one["model_us"] or not one["kept"] for one in told)
    assert tuned_store.forget() == sum(one["kept"] for one in told)
