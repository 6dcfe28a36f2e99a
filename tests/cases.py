"""Inputs that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidesparse_nb import PackedWeight, Pattern
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import INT8, DType
from slidesparse_nb.core.scheme import SCHEMES

Array = NDArray[Any]

SMALL = [Pattern(n, n + 2) for n in range(2, 12, 2)]
"""2:4 to 10:12, whose masks can be exhausted."""

LARGE = [Pattern(12, 14), Pattern(14, 16), Pattern(22, 24), Pattern(30, 32)]

FLOATS = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]

SHAPES = [(0, 16), (3, 0), (0, 0), (1, 1), (2, 3), (3, 7), (5, 16), (2, 97), (4, 240)]
"""Rows of nothing, of less than a group, with tails; k prime."""

schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
"""Of a test that is run for every scheme."""


def same(a: PackedWeight, b: PackedWeight) -> None:
    """Assert that two packed weights are equal byte for byte."""
    assert (a.pattern, a.shape, a.scheme) == (b.pattern, b.shape, b.scheme)
    for part in ("values", "meta", "scale", "block_scale"):
        one, other = getattr(a, part), getattr(b, part)
        if one is None or other is None:
            assert one is other, part
        else:
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), part


def every_mask(pattern: Pattern) -> Array:
    """Every way to place at most nnz non-zeros in one group: int8 [count, group], all values different."""
    masks = np.arange(2**pattern.group)[:, None] >> np.arange(pattern.group) & 1
    masks = masks[masks.sum(axis=1) <= pattern.nnz]
    return (masks * np.arange(1, pattern.group + 1)).astype(np.int8)


def drop_two(w: Array, pattern: Pattern, seed: int = 0) -> Array:
    """w with two random weights of every whole group zeroed, and one of a tail of group - 1."""
    rng = np.random.default_rng(seed)
    out = np.zeros((w.shape[0], -(-w.shape[1] // pattern.group) * pattern.group), w.dtype)
    out[:, : w.shape[1]] = w
    groups = out.reshape(w.shape[0], out.shape[1] // pattern.group, pattern.group)
    order = np.argsort(rng.random(groups.shape), axis=2)
    np.put_along_axis(groups, order[:, :, :2], np.zeros((), w.dtype), axis=2)
    if w.shape[1] % pattern.group == pattern.group - 1:
        groups[:, -1, 0] = 0
    return out[:, : w.shape[1]].copy()


def awkward(shape: tuple[int, int], seed: int = 0) -> Array:
    """float32 with rows of every size, zeros, and columns of very different magnitude."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 2.0 ** rng.integers(-120, 20, (shape[0], 1)) * 2.0 ** rng.integers(-12, 1, shape)
    w[rng.random(shape) < 0.2] = 0
    w[rng.random(shape) < 0.05] = -0.0
    return w.astype(np.float32)


def weights(shape: tuple[int, int], dtype: Any = np.float32, seed: int = 0) -> Array:
    """Normal weights with a few zeros of both signs."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32)
    w[rng.random(shape) < 0.1] = 0
    w[rng.random(shape) < 0.05] = -0.0
    return w.astype(dtype)


def inputs(tokens: int, k: int, seed: int = 0) -> Any:
    """Correlated activations whose columns differ in size: float32 [tokens, k]."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, k)) @ (np.eye(k) + 0.2 * rng.standard_normal((k, k)))
    return (mixed * np.exp(rng.standard_normal(k))).astype(np.float32)


def packed_weight(n: int, k: int, pattern: str | Pattern = "6:8", dtype: DType = INT8, seed: int = 0) -> PackedWeight:
    """Normal weights [n, k], pruned by magnitude and packed by the reference."""
    pattern = Pattern.of(pattern)
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return reference.pack(reference.prune(w, pattern), pattern, dtype)


def stored(shape: tuple[int, int], pattern: Pattern, dtype: DType, seed: int = 0) -> Array:
    """Random finite stored values of any bit pattern, -0.0 and int8's -128 too, that obey the pattern."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2**dtype.bits, shape, dtype=dtype.raw)
    if dtype.inf_bits is not None:
        raw[(raw & dtype.raw.type(dtype.nonzero_mask)) >= dtype.inf_bits] = 1
    raw[rng.random(shape) < 0.3] = 0
    if dtype.inf_bits is not None:
        raw[rng.random(shape) < 0.1] = dtype.nonzero_mask + 1  # -0.0
    return drop_two(raw.view(dtype.numpy), pattern, seed)


def stored_twice(dtype: DType) -> PackedWeight:
    """A legal 6:8 weight [4, 24] that `pack` never makes: row 2 stores column 19 as 3 and, in the next window, as 5."""
    packed = reference.pack(np.eye(4, 24, 17, np.float32) * 3, Pattern(6, 8), dtype)
    values, meta = packed.values.copy(), packed.meta.copy()
    values[2, 12:16] = np.array([0, 3, 0, 5], dtype.numpy)
    meta[2, 3] = (0 | 3 << 2) | (0 | 1 << 2) << 4
    return replace(packed, values=values, meta=meta).validate()


def faulty(dtype: DType, fault: str) -> PackedWeight | None:
    """A packed weight that `unpack` refuses for a "twice", an "index" or a "scale"; None if the type has no scale."""
    packed = stored_twice(dtype)
    if fault == "index":
        packed.meta[3, 2] = 0x45
    if fault == "scale":
        if packed.scale is None:
            return None
        packed.scale[1] = -1
    return packed


def chosen_by_hand(row: list[float], pattern: Pattern) -> Iterator[list[int]]:
    """For every window of a row, whole groups long: the columns whose values it takes, by the words of the format."""
    for group in range(len(row) // pattern.group):
        taken: set[int] = set()
        for window in range(pattern.windows):
            start = group * pattern.group + 2 * window
            mine = [c for c in range(start, start + 4) if row[c] != 0 and c not in taken][:2]
            taken.update(mine)
            yield mine


@st.composite
def sparse_rows(draw: st.DrawFn, patterns: list[Pattern]) -> tuple[Array, Pattern]:
    """int8 [n, k] that obeys the pattern, tails and empty sizes included."""
    pattern = draw(st.sampled_from(patterns))
    n, k = draw(st.integers(0, 4)), draw(st.integers(0, 5 * pattern.group))
    seed, zeros = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    rng = np.random.default_rng(seed)
    w = rng.integers(-128, 128, (n, k)).astype(np.int8)
    w[rng.random((n, k)) < zeros] = 0
    return drop_two(w, pattern, seed), pattern
