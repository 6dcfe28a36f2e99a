"""Results against the reference, on a sample of rows and columns, in float64 on the host. What fails is not timed.

The bounds, which GPU tests share, follow from the order of summation alone, so for long k they are wide where signs cancel; the
error of the whole sample, in the norm, is bounded too, and narrowly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import slidesparse_nb as ss

Array = NDArray[Any]

ROWS, COLUMNS = 16, 64
"""Largest number of tokens and outputs of a result that are checked: first and last among them."""

ADDITION = 2.0**-23
"""Error of one addition in float32 that truncates, as tensor cores may, relative to the largest sum of magnitudes."""

FLOAT8_STEP = 2.0**-10
"""Error of one float8 instruction of 64 expanded columns on Hopper: sums have 13 bits of fraction (docs/hopper.md)."""

ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Relative error of rounding y to its type."""


def sample(count: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """At most `most` of 0 ... count-1, ascending: the first, the last, and others at random."""
    if count <= most:
        return np.arange(count)
    inner = rng.choice(count - 2, most - 2, replace=False) + 1
    return np.sort(np.concatenate([[0], inner, [count - 1]]))


def quantized(x: Array, packed: ss.PackedWeight) -> tuple[Array, Array | None]:
    """Tokens x [r, k] as the scheme of the weights stores them, and their scales [r, 1]; 16-bit types have none."""
    if not packed.scheme.scaled:
        return x.astype(packed.dtype.numpy), None
    return ss.reference.quantize(x, packed.scheme.activations.element)


def product(x: Array, packed: ss.PackedWeight, bias: Array | None = None) -> tuple[Array, Array]:
    """x [r, k] @ w [c, k].T before it is rounded to the type of y, and the sum of magnitudes |x| |w|: both [r, c].

    float64; with int8 weights the first is float32 and exact: integers below 2^53 add up in float64, and the epilogue is the
    reference's.
    """
    q, scale = quantized(x, packed)
    w, q64 = ss.reference.unpack(packed).astype(np.float64), q.astype(np.float64)
    exact, magnitude = q64 @ w.T, np.abs(q64) @ np.abs(w).T
    if packed.scheme.accumulator == np.int32:
        assert scale is not None
        y = (exact.astype(np.int32).astype(np.float32) * scale) * packed.scale[:, 0]
        return (y if bias is None else y + bias.astype(np.float32)), magnitude
    if scale is not None:
        scales = scale.astype(np.float64) * packed.scale[:, 0]
        exact, magnitude = exact * scales, magnitude * scales
    if bias is not None:
        exact, magnitude = exact + bias.astype(np.float64), magnitude + np.abs(bias.astype(np.float64))
    return exact, magnitude


def allowed(
    exact: Array, magnitude: Array, packed: ss.PackedWeight, y_type: np.dtype[Any], short_sums: bool = True
) -> tuple[Array, float]:
    """How far y may be from its `product`, element by element [r, c], and all of it in the norm.

    int8: not at all, once the product is rounded to the type of y. float8 with short sums, as of Hopper's own instruction: they
    have 13 bits of fraction, so each instruction of 64 expanded columns is off by at most a few of their last places, and half
    that in the norm, where errors add up like a random walk. Others: at most ks products and as many additions, each off by at
    most ADDITION of a partial sum, which no order of them makes larger than the sum of magnitudes; three roundings by scales
    and bias; then that to the type of y.
    """
    if packed.scheme.accumulator == np.int32:
        return np.zeros_like(magnitude), 0.0
    rounding = ROUNDING[y_type.name]
    if short_sums and packed.scheme.activations.element.name == "float8_e4m3fn":
        steps = -(-packed.ks // 64)
        bound, overall = steps * FLOAT8_STEP * magnitude, FLOAT8_STEP / 2 * steps**0.5
    else:
        bound, overall = (packed.ks + 4) * ADDITION * magnitude, 2.0**-10
    return bound + rounding * (np.abs(exact) + bound) + (2.0**-25 if y_type == np.float16 else 0), overall + rounding


def check_product(y: Array, x: Array, packed: ss.PackedWeight) -> None:
    """Compare y with x @ w.T as `reference.matmul` defines it.

    Args:
        y: [r, c] bfloat16, float16 or float32: the result's rows for x, and its columns for packed.
        x: [r, k] float: tokens, before quantization.
        packed: [c, k] weights as NumPy arrays: some rows of the whole matrix.

    Raises:
        VerificationError: int8 results differ at all; others by more than the order of summation explains.
    """
    (exact, magnitude), got = product(x, packed), y.astype(np.float64)
    if not np.isfinite(got).all():
        raise ss.VerificationError(f"{np.count_nonzero(~np.isfinite(got))} of {got.size} sampled results are not finite")
    if packed.scheme.accumulator == np.int32:
        if differ := np.count_nonzero(exact.astype(y.dtype) != y):
            raise ss.VerificationError(f"{differ} of {y.size} sampled int8 results differ from the reference")
        return
    bound, overall = allowed(exact, magnitude, packed, y.dtype)
    error = np.abs(got - exact)
    if (error > bound).any():
        worst = np.unravel_index((error - bound).argmax(), error.shape)
        raise ss.VerificationError(f"a sampled result is off by {error[worst]:.3g}, where {bound[worst]:.3g} is explained")
    off = float(np.linalg.norm(error) / max(float(np.linalg.norm(exact)), 1e-30))
    if off > overall:
        raise ss.VerificationError(f"sampled results are off by {off:.2g} of their norm, where {overall:.2g} is explained")


def check_equal(what: str, got: tuple[Array | None, ...], wanted: tuple[Array | None, ...]) -> None:
    """Raise VerificationError unless the arrays are the reference's, byte for byte."""
    if any(
        (a is None) != (b is None) or (a is not None and b is not None and a.tobytes() != b.tobytes())
        for a, b in zip(got, wanted, strict=True)
    ):
        raise ss.VerificationError(f"{what} differ from the reference's")


def check_packed(packed: ss.PackedWeight, w: Array) -> None:
    """Compare some rows of packed weights, NumPy arrays, with what the reference makes of w [c, k], pruned by magnitude."""
    wanted = ss.reference.pack(ss.reference.prune(w, packed.pattern), packed.pattern, packed.dtype)
    check_equal("packed weights", *((p.values, p.meta, p.scale) for p in (packed, wanted)))
