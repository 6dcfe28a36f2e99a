"""The kernels over pairs on a GPU that lacks the instruction: all of them but that, which shuffles between lanes replace.

The tiles, their stages and their shared memory are those of compute capability 12.0.
"""

from __future__ import annotations

import cupy as cp
import numpy as np
import pytest
from gemm_cases import capability_here, compile_ahead, on_gpu, sms_here, tokens, weight

import slidesparse_nb as ss
from slidesparse_nb import arch
from slidesparse_nb.arch import sm80
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT16
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.cuda import plan, self_test
from slidesparse_nb.cuda.jit import cache
from slidesparse_nb.cuda.weight import shared_plans

pytestmark = pytest.mark.gpu
schemes = pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4"])

INSTRUCTION = """
#include "sm80/ptx.cuh"
// From the tables of "Warp-level matrix multiply-accumulate with sparse matrix A": window w is columns 8 w to 8 w + 7.
__noinline__ void played(int byte, float (&d)[4], const uint4& a, const u32 (&b)[4], u32 e, u32 scale_a, u32 scale_b) {
    const u32 held[4] = {a.x, a.y, a.z, a.w};
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto word = [](u32 mine, int from) { return __shfl_sync(~0u, mine, from); };
    auto e2m1 = [](u32 code) {
        float size = (code & 7) < 2 ? 0.5f * (code & 7) : (float)((2 | (code & 1)) << (code >> 1 & 3)) / 4;
        return code & 8 ? -size : size;
    };
    auto scale = [=](u32 word, int w) {
        if (SCALES == 4) return __uint_as_float((word >> 8 * (byte + w / 8) & 0xff) << 23);
        return __uint_as_float((word >> 8 * (w / 4) & 0x7f) << 20) * 0x1p120f;
    };
#pragma unroll
    for (int w = 0; w < 16; w++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 kept = word(held[half + 2 * (w / 8)], 4 * g + w % 8 / 2) >> 16 * (w % 2);
            const u32 index = word(e, 4 * g + half + 2 * (w / 8)) >> 4 * (w % 8);
            const float of_row = scale(word(scale_a, 4 * g + half), w);
            for (int c = 0; c < 2; c++) {
                const int column = 2 * q + c;
                const u32 x = word(b[w / 4], 4 * column + w % 4);
                const float both = of_row * scale(word(scale_b, 4 * column), w);
                for (int i = 0; i < 4; i++) {
                    const int pair = index >> 2 * (i / 2) & 3;
                    d[2 * half + c] += e2m1(kept >> 4 * i) * e2m1(x >> 4 * (2 * pair + i % 2)) * both;
                }
            }
        }
}
template <int BYTE>
INLINE void played_at(float (&d)[4], const uint4& a, const u32 (&b)[4], u32 e, u32 scale_a, u32 scale_b) {
    played(BYTE, d, a, b, e, scale_a, scale_b);
}
#define mma_sp_nvf4 played_at
#define mma_sp_mxf4 played_at
"""


@pytest.fixture(autouse=True)
def played(monkeypatch, tmp_path):
    generated, sm = cache.generated, sm80.sm_of((12, 0))
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", "1")
    monkeypatch.setattr(sm80, "BLOCK_SCALED", (capability_here(),))
    monkeypatch.setattr(sm80, "sm_of", lambda capability: sm)
    monkeypatch.setattr(cache, "generated", lambda *given: generated(*given).replace("#include", INSTRUCTION + "#include"))
    caches = arch.choose, plan.plan_of, plan._kernel, shared_plans
    for known in caches:
        known.cache_clear()
    yield
    for known in caches:
        known.cache_clear()


@schemes
def test_every_tile(scheme):
    """Whole and split k, tails of m, n and k, several tiles a block: exactly NumPy's products."""
    device = Device(capability_here(), sms_here(), portable=True)
    for text in ("6:8", "2:4"):
        problem = GemmProblem.of((40, 64, 96, text, scheme, "bfloat16"), device)
        configs = list(sm80.ARCH.kernels(problem.pattern, problem.scheme, "bfloat16", capability_here()))
        assert len(configs) == len(sm80.TILES)
        compile_ahead(configs)
        for config in configs:
            outcome = self_test.tested(problem, (config,), ("weights", "scale"), 0, str(config))
            assert outcome.passed, outcome.text


@schemes
@pytest.mark.parametrize("source", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("text", ["2:4", "6:8", "14:16"])
def test_matmul(source, text, scheme):
    """From 16-bit activations, quantized on the GPU, to y: the reference's but for the order of float32 sums."""
    rng = np.random.default_rng(3)
    for m, n, k in ((1, 1, 7), (7, 40, 301), (129, 200, 1000), (300, 136, 4096)):
        packed, x = weight(rng, n, k, text, scheme), tokens(rng, m, k, source.numpy)
        bias = rng.standard_normal(n).astype(np.float32)
        y = ss.matmul(on_gpu(x), packed, bias=cp.asarray(bias), out_dtype=np.float32).get()
        wanted = reference.matmul(x, packed, bias)
        assert np.linalg.norm(y - wanted) <= 1e-5 * np.linalg.norm(wanted)
