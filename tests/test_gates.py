"""The gates' estimate: no error that PTX allows the instructions it is made of may change a rounded result."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels are Numba CUDA's: pip install 'slidesparse_nb[cuda13]'")

from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT16
from slidesparse_nb.cuda.kernels import numbers

POWER, INVERSE = 2, 1
"""Most float32 steps by which ex2.approx.ftz.f32 and rcp.approx.ftz.f32 miss the correctly rounded result ("Floating Point
Instructions" of PTX ISA 9.1: 2 ulp from that, 1 ulp)."""


def off(value, steps):
    """A positive number, rounded to float32, and so many steps from there."""
    return (value.astype(np.float32).view(np.int32) + np.int32(steps)).view(np.float32)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_the_estimate_is_close(kind, dtype) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype.numpy).astype(np.float32)
    with np.errstate(all="ignore"):
        inner = x if kind == "silu" else (x * x * np.float32(reference.GELU_CUBE) + np.float32(reference.GELU)) * x
        exact = x / (np.float32(1) + reference.exponential(-inner))
        taken = np.abs(inner) <= numbers.ESTIMATED
        worst = 0
        for power in (-POWER, 0, POWER):
            for inverse in (-INVERSE, 0, INVERSE):
                two = off(np.exp2((inner * numbers.MINUS_LOG2).astype(np.float64)), power)
                y = x * off(1 / (np.float32(1) + two).astype(np.float64), inverse)
                steps = np.abs(y.view(np.int32).astype(np.int64) - exact.view(np.int32))[taken]
                worst = max(worst, int(steps.max()))
    assert 0 < worst < numbers.CLOSE
