"""The whole library in NumPy, to be read from top to bottom: this file is the specification.

    weights       w [n, k]  -- prune -->  quantize  -->  slide -->  compress  -->  values, meta, scale
    activations   x [m, k]  --------- quantize (per token)  -->  lift  -->  xs [m, ks]
    product       y [m, n]  =  lift(x) @ slide(w).T  ==  x @ w.T,  exactly

Every faster implementation here (Numba on the CPU, CUDA on the GPU) has the same names and gives the same bits. Source of
the method: SlideSparse, arXiv 2603.05232, sections 3 and 4; index nibbles: PTX ISA, section "Warp-level matrix multiply
with sparse matrix A". Shapes: m tokens, n outputs, k inputs, ks slid inputs, L = 2N columns a group, N-1 windows a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OperandError, PatternError
from .dtypes import FLOAT32, DType
from .packed import PackedWeight
from .pattern import Pattern
from .scheme import Scheme

Array = NDArray[Any]

TINY = np.float32(2.0**-100)
"""Rows whose largest magnitude is below this quantize to zeros with scale 1: 1/absmax would leave float32's range."""


# ---- shapes ------------------------------------------------------------------------------------------------------


def pad(w: Array, pattern: Pattern) -> Array:
    """Zero columns up to a multiple of the slice unit: [n, k] -> [n, kp]."""
    return np.pad(w, ((0, 0), (0, pattern.padded_k(w.shape[1]) - w.shape[1])))


def in_groups(w: Array, group: int) -> Array:
    """Cut rows into runs of `group` elements: [n, k] -> [n, k / group, group], a view."""
    return w.reshape(w.shape[0], w.shape[1] // group, group)


def is_nonzero(w: Array) -> Array:
    """Which elements count as non-zero: all but 0.0 and -0.0. bool, the shape of w."""
    return np.not_equal(w, np.zeros((), w.dtype))


# ---- prune -------------------------------------------------------------------------------------------------------


def prune(w: Array, pattern: Pattern, score: Array | None = None) -> Array:
    """Keep the nnz weights of highest score in every group, zero the others; of equal scores the leftmost stay.

    Args:
        w: [n, k] of any number type.
        score: [n, k] >= 0, compared in float32; by default the magnitude |w|.
    """
    n, k = w.shape
    score = np.abs(w.astype(np.float32)) if score is None else score.astype(np.float32)
    padding = np.full((n, -k % pattern.group), -1, np.float32)  # columns past k go first
    groups = in_groups(np.concatenate([score, padding], axis=1), pattern.group)
    best_first = np.argsort(-groups, axis=2, kind="stable")
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, best_first[:, :, : pattern.nnz], True, axis=2)
    return np.where(keep.reshape(n, k + padding.shape[1])[:, :k], w, np.zeros((), w.dtype))


def violations(w: Array, pattern: Pattern) -> Array:
    """Where w breaks the pattern: int [count, 2], the (row, group) of every group with more than nnz non-zeros."""
    padded = np.pad(w, ((0, 0), (0, -w.shape[1] % pattern.group)))
    return np.argwhere(in_groups(is_nonzero(padded), pattern.group).sum(axis=2) > pattern.nnz)


# ---- quantize ----------------------------------------------------------------------------------------------------


def quantize(x: Array, dtype: DType) -> tuple[Array, Array]:
    """Symmetric quantization of every row, for weights (per output) and activations (per token) alike.

    In float32 and in this order: absmax = max|x|, scale = absmax / t, inv = t / absmax with t = dtype.largest, and
    q = round_half_even(x * inv), clipped to +-t; float8 is clipped, then rounded to nearest even in the type.

    A row whose absmax is below 2^-100 has scale 1 and zeros. A row that holds NaN or infinity has scale NaN and zeros, so
    that it stays NaN through any product (packing refuses such weights; activations propagate).

    Args:
        x: [m, k] of any real type.

    Returns:
        q: [m, k] of `dtype`; scale: [m, 1] float32, x ~= q * scale.
    """
    t = np.float32(dtype.largest)
    x = x.astype(np.float32)
    finite = np.isfinite(x).all(axis=1, keepdims=True)
    absmax = np.where(finite, np.abs(x).max(axis=1, keepdims=True, initial=0), np.float32(0))
    live = absmax >= TINY
    safe = np.where(live, absmax, np.float32(1))
    scale = np.where(finite, np.where(live, safe / t, np.float32(1)), np.float32(np.nan))
    scaled = np.where(live, x, np.float32(0)) * (t / safe)
    if dtype.numpy == np.int8:
        scaled = np.rint(scaled)
    return np.clip(scaled, -t, t).astype(dtype.numpy), scale


def dequantize(q: Array, scale: Array | None) -> Array:
    """q * scale in float32: [n, k], [n, 1] -> float32 [n, k]; with no scale, q in float32."""
    values = q.astype(np.float32)
    return values if scale is None else values * scale


# ---- slide and lift ----------------------------------------------------------------------------------------------


def slide(w: Array, pattern: Pattern) -> Array:
    """Spread every group over its windows: [n, k] -> [n, ks], a 2:4 sparse matrix.

    Left to right, each window takes the first two not yet taken non-zeros among its four columns. That covers every mask
    of at most nnz non-zeros: a window leaves something behind only when it is full, and then 2(j+1) columns up to its own
    middle are taken care of. -0.0 becomes 0.

    Raises:
        PatternError: a group has more than nnz non-zeros.
    """
    groups = in_groups(pad(w, pattern), pattern.group)
    left = is_nonzero(groups)
    slid = np.zeros((*groups.shape[:2], pattern.windows, 4), w.dtype)
    for j in range(pattern.windows):
        columns = slice(2 * j, 2 * j + 4)
        take = left[:, :, columns] & (np.cumsum(left[:, :, columns], axis=2) <= 2)
        slid[:, :, j] = np.where(take, groups[:, :, columns], np.zeros((), w.dtype))
        left[:, :, columns] &= ~take
    if left.any():
        bad = violations(w, pattern)
        raise pattern.violated(int(bad[0, 0]), int(bad[0, 1]), len(bad))
    return slid.reshape(w.shape[0], pattern.slid_k(w.shape[1]))


def unslide(ws: Array, pattern: Pattern, k: int) -> Array:
    """Inverse of slide: every slid value back to its column: [n, ks] -> [n, k]."""
    w = np.zeros((ws.shape[0], pattern.padded_k(k)), ws.dtype)
    slid = ws.reshape(ws.shape[0], w.shape[1] // pattern.group, pattern.windows, 4)
    columns = pattern.lift_index(k).reshape(-1, pattern.windows, 4)
    for j in range(pattern.windows):  # one window at a time: no column twice
        into = columns[:, j].ravel()
        values = slid[:, :, j].reshape(ws.shape[0], into.size)
        w[:, into] = np.where(is_nonzero(values), values, w[:, into])
    return w[:, :k]


def lift(x: Array, pattern: Pattern) -> Array:
    """Repeat activations as the windows overlap: [m, k] -> [m, ks], so that lift(x) @ slide(w).T == x @ w.T."""
    return pad(x, pattern)[:, pattern.lift_index(x.shape[1])]


def unlift(xs: Array, pattern: Pattern, k: int) -> Array:
    """Inverse of lift: [m, ks] -> [m, k]."""
    x = np.zeros((xs.shape[0], pattern.padded_k(k)), xs.dtype)
    x[:, pattern.lift_index(k)] = xs
    return x[:, :k]


# ---- compress ----------------------------------------------------------------------------------------------------


def compress(ws: Array) -> tuple[Array, Array]:
    """Keep two values of every four and where they stood: [n, ks] -> values [n, ks/2], meta uint8 [n, ks/8].

    A window with non-zeros at i0 < i1 has the nibble i0 | i1 << 2. With one non-zero, at p, it holds positions (0, p), or
    (0, 1) if p = 0; with none (0, 1). An unused slot holds +0. Nibbles stand in order, the low one first.

    Raises:
        PatternError: a window has more than two non-zeros.
    """
    windows = in_groups(ws, 4)
    nonzero = is_nonzero(windows)
    count = nonzero.sum(axis=2)
    if (count > 2).any():
        row, window = map(int, np.argwhere(count > 2)[0])
        raise PatternError(f"ws: row {row}, window {window} has more than two non-zeros; slide the weights first")
    first = nonzero.argmax(axis=2)
    last = 3 - nonzero[:, :, ::-1].argmax(axis=2)
    i0 = np.where(count == 2, first, 0)
    i1 = np.where((count == 0) | (last == 0), 1, last)
    index = np.stack([i0, i1], axis=2)
    values = np.take_along_axis(np.where(nonzero, windows, np.zeros((), ws.dtype)), index, axis=2)
    nibble = (i0 | i1 << 2).astype(np.uint8)
    return values.reshape(ws.shape[0], ws.shape[1] // 2), nibble[:, 0::2] | nibble[:, 1::2] << 4


def window_index(meta: Array) -> Array:
    """The two positions of every window: uint8 [n, ks/8] -> int [n, ks/4, 2]."""
    nibble = np.stack([meta & 15, meta >> 4], axis=2).reshape(meta.shape[0], 2 * meta.shape[1])
    return np.stack([nibble & 3, nibble >> 2], axis=2).astype(np.intp)


def decompress(values: Array, meta: Array) -> Array:
    """Inverse of compress: values [n, ks/2], meta [n, ks/8] -> [n, ks]."""
    n = values.shape[0]
    windows = np.zeros((n, values.shape[1] // 2, 4), values.dtype)
    np.put_along_axis(windows, window_index(meta), in_groups(values, 2), axis=2)
    return windows.reshape(n, 2 * values.shape[1])


# ---- the whole ---------------------------------------------------------------------------------------------------


def pack(w: Array, pattern: Pattern, scheme: Scheme | DType, scale: Array | None = None) -> PackedWeight:
    """[n, k] weights that obey the pattern -> PackedWeight.

    Args:
        w: real numbers, quantized here if the scheme has scales; or 8-bit values already quantized, with their `scale` [n, 1].

    Raises:
        OperandError: NaN or infinity in w, or a value that overflows a 16-bit type.
        PatternError: a group of stored values has more than nnz non-zeros.
    """
    scheme = Scheme.of(scheme)
    dtype = scheme.dtype
    if scale is not None:
        q = w
    elif scheme.scaled:
        q, scale = quantize(w, dtype)
        require_finite(w)
    else:
        with np.errstate(over="ignore"):
            q = w.astype(dtype.numpy)
    require_finite(q)
    values, meta = compress(slide(q, pattern))
    return PackedWeight(values, meta, scale, pattern, (w.shape[0], w.shape[1]), scheme)


def require_finite(w: Array) -> None:
    """Raise OperandError at the first NaN or infinity of w [n, k]."""
    if not (finite := np.isfinite(w.astype(np.float32))).all():
        row, column = map(int, np.argwhere(~finite)[0])
        raise OperandError(f"w: {w[row, column]} at row {row}, column {column}; weights must be finite as stored ({w.dtype})")


def unpack(packed: PackedWeight) -> Array:
    """The stored values at their dense places: [n, k] of packed.dtype. Times packed.scale they are the weights."""
    values = np.asarray(packed.values).view(packed.dtype.numpy)
    return unslide(decompress(values, packed.meta), packed.pattern, packed.k)


def matmul(x: Array, packed: PackedWeight, bias: Array | None = None, out_dtype: Any = FLOAT32) -> Array:
    """y = x @ w.T + bias, x [m, k] -> y [m, n], with exactly the numbers that a GPU kernel sees.

    8-bit weights: every token (row of x) is quantized to the weights' type; int8 products accumulate in int32 (exactly),
    float8 ones in float32; then y = (acc * scale_x) * scale_w + bias, each step rounded to float32. 16-bit weights: x is
    rounded to their type, products accumulate in float32. y is rounded to `out_dtype` last.

    Products of every slot are added up, so two values stored for one column, which no packer writes, both count.
    Only the two slots that a window stores meet an activation, an unused one as 0 at the position of its nibble. So infinity
    or NaN in a 16-bit x reaches exactly the outputs that the hardware lets it reach.

    Raises:
        FormatError: tensors of `packed` do not fit its shape, or k is so long that int32 sums could overflow.
    """
    packed.check_shapes()
    pattern = packed.pattern
    if not packed.scheme.scaled:
        with np.errstate(over="ignore"):  # to infinity
            xq, scale_x = x.astype(packed.dtype.numpy), None
    else:
        xq, scale_x = quantize(x, packed.dtype)
    accumulator = packed.scheme.accumulator
    xs = in_groups(lift(xq, pattern).astype(accumulator), 4)  # [m, windows, 4]
    values = in_groups(np.asarray(packed.values).view(packed.dtype.numpy).astype(accumulator), 2)
    index = window_index(packed.meta)
    windows = np.arange(index.shape[1])[:, None]
    acc = np.zeros((x.shape[0], packed.n), accumulator)
    with np.errstate(invalid="ignore", over="ignore"):
        for row in range(packed.n if packed.k else 0):  # of empty arrays, NumPy's einsum reads memory that is not theirs
            met = xs[:, windows, index[row]]  # [m, windows, 2]: the activations that this row's stored values meet
            acc[:, row] = np.einsum("mwi,wi->m", met, values[row])
        y = acc.astype(np.float32)
        if scale_x is not None:
            y = (y * scale_x) * packed.scale[:, 0]
        if bias is not None:
            y = y + bias.astype(np.float32)
        return y.astype(out_dtype)
