"""Kernels that quantize what a norm or a gated activation makes, against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from device_cases import bits, launch_rows

from slidesparse_nb.arch.operand import to_tiles
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import DType
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.cuda import quantize

EPSILON = 1e-5
GATES = {"silu_and_mul": reference.silu_and_mul, "gelu_and_mul": reference.gelu_and_mul}


def word(value: float) -> int:
    """The bits of a float32."""
    return int(np.float32(value).view(np.uint32))


def check_fused(
    kind: str, source: DType, dtype: DType, m: int, k: int, pattern: Pattern,
    move: Callable[[Any], Any] = lambda a: a, back: Callable[[Any], Any] = lambda a: a, every: bool = False,
    spread: int = 1,
) -> None:  # fmt: skip
    """Launch a kernel on rows among which are NaN, infinity, zeros, large and small ones; compare all that it writes.

    Args:
        move, back: to and from where it runs.
        every: gates of every 16-bit number, m * k = 65536 of them, times 1.
        spread: blocks that share a row.
    """
    rng = np.random.default_rng(k)
    gate = GATES.get(kind)
    rows = rng.standard_normal((m, 2 * k if gate else k)) * np.resize([1.0, 1e-3, 50.0], (m, 1))
    x, residual, gamma = (a.astype(source.numpy) for a in (rows, rng.standard_normal((m, k)), rng.standard_normal(k)))
    if m > 2:
        x[m - 1], x[m - 2, 5] = 0, np.nan
    x[0, 3] = np.inf if m > 4 else 1
    x[0, 4], x[0, 6] = -100, -3e4
    if every:
        x = np.concatenate(
            [np.arange(1 << 16, dtype=np.uint16).reshape(m, k).view(source.numpy), np.ones((m, k), source.numpy)], 1
        )
    plan = quantize.plan(source.name, dtype.name, k, x.strides, True, 90, pattern, kind=kind, spread=spread)
    scaled = Scheme.of(dtype).scaled

    with np.errstate(all="ignore"):
        if gate:
            wanted, kept = gate(x), None
        else:
            wanted, kept = reference.rms_norm(x, gamma, EPSILON, residual if kind == "add_rms_norm" else None)
        values, scale = reference.quantize(wanted, dtype) if scaled else (wanted, None)
    made = to_tiles(values, pattern)
    out, got = move(np.full(made.shape, 7, np.uint8)), move(np.full((m, 1), 7, np.float32))
    if gate:
        launch_rows(plan, m, move(bits(x)), out, got)
    else:
        sums = move(np.zeros((m, k), np.uint16))
        launch_rows(plan, m, move(bits(x)), move(bits(residual)), move(bits(gamma)), sums, out, got, word(EPSILON), word(k))
        if kind == "add_rms_norm":
            np.testing.assert_array_equal(*(a.view(source.numpy).astype(np.float32) for a in (back(sums), kept)))
    if scaled:
        np.testing.assert_array_equal(back(got), scale)
        np.testing.assert_array_equal(back(out), made)
    else:  # NaN has many bits
        found, want = (a.reshape(-1).view(dtype.numpy).astype(np.float32) for a in (back(out), made))
        np.testing.assert_array_equal(found, want)
