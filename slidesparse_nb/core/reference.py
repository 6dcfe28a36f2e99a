"""The whole library in NumPy, to be read from top to bottom: this file is the specification.

    weights       w [n, k]  -- prune -->  quantize  -->  slide -->  compress  -->  values, meta, scale
    activations   x [m, k]  --------- quantize (per token)  -->  lift  -->  xs [m, ks]
    product       y [m, n]  =  lift(x) @ slide(w).T  ==  x @ w.T,  exactly

Schemes with block scales quantize after they slide or lift, since a block is a run of the expanded k:

    weights       w [n, k]  -- prune -->  slide  -->  quantize_blocks  -->  compress  -->  values, meta, block_scale, scale
    activations   x [m, k]  ------------  lift   -->  quantize_blocks  -->  xs [m, ks]               (W4A8: as above)

Every faster implementation here (Numba on the CPU, CUDA on the GPU) has the same names and gives the same bits. Source of
the method: SlideSparse, arXiv 2603.05232, sections 3 and 4; index nibbles: PTX ISA, section "Warp-level matrix multiply
with sparse matrix A". Shapes: m tokens, n outputs, k inputs, ks expanded inputs, L = 2N columns a group, N-1 windows a group.
Of patterns over pairs (unit = 2), read "pair of columns" for "column"; a pair is non-zero if one of its two columns is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OperandError, PatternError
from .dtypes import FLOAT4, FLOAT32, DType
from .packed import PackedWeight
from .pattern import Pattern
from .scheme import Scheme, Storage

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


def in_units(w: Array, unit: int) -> Array:
    """Columns that are kept or dropped together, the last with zeros to fill it: [n, k] -> [n, ceil(k / unit), unit]."""
    return in_groups(np.pad(w, ((0, 0), (0, -w.shape[1] % unit))), unit)


def nonzero_units(w: Array, unit: int) -> Array:
    """Which columns or pairs count as non-zero: [n, k] -> bool [n, ceil(k / unit)]."""
    nonzero = in_units(is_nonzero(w), unit)
    return np.asarray(nonzero[:, :, 0] | nonzero[:, :, -1])


# ---- prune -------------------------------------------------------------------------------------------------------


def prune(w: Array, pattern: Pattern, score: Array | None = None) -> Array:
    """Keep the nnz weights of highest score in every group, zero the others; of equal scores the leftmost stay.

    Args:
        w: [n, k] of any number type.
        score: [n, k] >= 0, compared in float32; by default the magnitude |w|. A pair's is the sum of its two, by default of
            their squares.
    """
    n, k = w.shape
    if score is None:
        score = np.abs(w.astype(np.float32))
        with np.errstate(over="ignore"):
            score = score * score if pattern.unit > 1 else score
    score = unit_scores(score.astype(np.float32), pattern.unit)
    padding = np.full((n, -score.shape[1] % pattern.group), -1, np.float32)  # columns past k go first
    groups = in_groups(np.concatenate([score, padding], axis=1), pattern.group)
    best_first = np.argsort(-groups, axis=2, kind="stable")
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, best_first[:, :, : pattern.nnz], True, axis=2)
    return np.where(
        np.repeat(keep.reshape(n, score.shape[1] + padding.shape[1]), pattern.unit, axis=1)[:, :k], w, np.zeros((), w.dtype)
    )


def unit_scores(score: Array, unit: int) -> Array:
    """The scores of columns or pairs: float32 [n, k] -> [n, ceil(k / unit)], a sum; of -1, none, only if both are."""
    if unit == 1:
        return score
    pairs = in_groups(np.pad(score, ((0, 0), (0, -score.shape[1] % unit)), constant_values=-1), unit)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    return np.where(np.maximum(first, second) < 0, np.float32(-1), np.maximum(first, 0) + np.maximum(second, 0))


def violations(w: Array, pattern: Pattern) -> Array:
    """Where w breaks the pattern: int [count, 2], the (row, group) of every group with more than nnz non-zeros."""
    nonzero = nonzero_units(w, pattern.unit)
    padded = np.pad(nonzero, ((0, 0), (0, -nonzero.shape[1] % pattern.group)))
    return np.argwhere(in_groups(padded, pattern.group).sum(axis=2) > pattern.nnz)


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
    scaled, scale = scale_rows(x, t)
    if dtype.numpy.kind == "i":
        scaled = np.rint(scaled)
    return np.clip(scaled, -t, t).astype(dtype.numpy), scale


def scale_rows(x: Array, t: np.float32) -> tuple[Array, Array]:
    """x * (t / absmax), and absmax / t, in float32, row by row with the exceptions of `quantize`: [m, k], [m, 1]."""
    x = x.astype(np.float32)
    finite = np.isfinite(x).all(axis=1, keepdims=True)
    absmax = np.where(finite, np.abs(x).max(axis=1, keepdims=True, initial=0), np.float32(0))
    live = absmax >= TINY
    safe = np.where(live, absmax, np.float32(1))
    scale = np.where(finite, np.where(live, safe / t, np.float32(1)), np.float32(np.nan))
    return np.where(live, x, np.float32(0)) * (t / safe), scale


def quantize_blocks(x: Array, storage: Storage) -> tuple[Array, Array, Array]:
    """Symmetric quantization of every block of the expanded k, for slid weights and for lifted activations alike.

    In float32 and in this order, with e the largest element (6) and t = storage.limit (e times the largest block scale):
    rows as in `quantize`: absmax = max|x|, scale = absmax / t, inv = t / absmax, y = x * inv clipped to +-t;
    blocks: s = max|y| / e, but at least the smallest block scale, rounded to its type (e4m3: to nearest even; e8m0: up to a
    power of two), so that it is never 0 or NaN; q = y * (1 / s) clipped to +-e and rounded to nearest even. -0 becomes 0.

    Special rows are those of `quantize`: scale 1 or NaN, and zeros.

    Args:
        x: [m, ks] of any real type.

    Returns:
        q: [m, ks] of the element type; block_scale: [m, ceil(ks / columns)]; scale: [m, 1] float32: x ~= q * block_scale
        * scale.
    """
    element, block, t = storage.element, storage.block, np.float32(storage.limit)
    assert block is not None
    (m, ks), e = x.shape, np.float32(element.largest)
    y, scale = scale_rows(x, t)
    y = in_groups(np.pad(np.clip(y, -t, t), ((0, 0), (0, -ks % block.columns))), block.columns)
    s = np.maximum(np.abs(y).max(axis=2) / e, np.float32(block.smallest))
    if block.up:
        mantissa, exponent = np.frexp(s)  # s = mantissa * 2^exponent, 1/2 <= mantissa < 1
        s = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    block_scale = s.astype(block.scale.numpy)
    q = np.clip(y * (np.float32(1) / block_scale.astype(np.float32))[:, :, None], -e, e).astype(element.numpy)
    q = np.where(is_nonzero(q), q, np.zeros((), element.numpy)).reshape(m, y.shape[1] * block.columns)
    return q[:, :ks], block_scale, scale


def dequantize(q: Array, scale: Array | None) -> Array:
    """q * scale in float32: [n, k], [n, 1] -> float32 [n, k]; with no scale, q in float32."""
    values = q.astype(np.float32)
    return values if scale is None else values * scale


def times_blocks(q: Array, block_scale: Array, size: int) -> Array:
    """q * block_scale, exact in float32: [m, c], one scale a run of `size` columns [m, ceil(c / size)] -> float32 [m, c]."""
    return q.astype(np.float32) * np.repeat(block_scale.astype(np.float32), size, axis=1)[:, : q.shape[1]]


# ---- slide and lift ----------------------------------------------------------------------------------------------


def slide(w: Array, pattern: Pattern) -> Array:
    """Spread every group over its windows: [n, k] -> [n, ks], a 2:4 sparse matrix.

    Left to right, each window takes the first two not yet taken non-zeros among its four columns. That covers every mask
    of at most nnz non-zeros: a window leaves something behind only when it is full, and then 2(j+1) columns up to its own
    middle are taken care of. -0.0 becomes 0.

    Raises:
        PatternError: a group has more than nnz non-zeros.
    """
    n, unit = w.shape[0], pattern.unit
    groups = pad(w, pattern).reshape(n, pattern.padded_k(w.shape[1]) // pattern.columns, pattern.group, unit)
    groups = np.where(is_nonzero(groups), groups, np.zeros((), w.dtype))
    left = np.asarray(is_nonzero(groups).any(axis=3))
    slid = np.zeros((*groups.shape[:2], pattern.windows, 4, unit), w.dtype)
    for j in range(pattern.windows):
        columns = slice(2 * j, 2 * j + 4)
        take = left[:, :, columns] & (np.cumsum(left[:, :, columns], axis=2) <= 2)
        slid[:, :, j] = np.where(take[..., None], groups[:, :, columns], np.zeros((), w.dtype))
        left[:, :, columns] &= ~take
    if left.any():
        bad = violations(w, pattern)
        raise pattern.violated(int(bad[0, 0]), int(bad[0, 1]), len(bad))
    return slid.reshape(n, pattern.expanded_k(w.shape[1]))


def unslide(ws: Array, pattern: Pattern, k: int) -> Array:
    """Inverse of slide: every slid value back to its column: [n, ks] -> [n, k]."""
    w = np.zeros((ws.shape[0], pattern.padded_k(k)), ws.dtype)
    slid = ws.reshape(ws.shape[0], w.shape[1] // pattern.columns, pattern.windows, 4 * pattern.unit)
    columns = pattern.lift_index(k).reshape(-1, pattern.windows, 4 * pattern.unit)
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


def compress(ws: Array, unit: int = 1) -> tuple[Array, Array]:
    """Keep two values of every four and where they stood: [n, ks] -> values [n, ks/2], meta uint8 [n, ks/8].

    A window with non-zeros at i0 < i1 has the nibble i0 | i1 << 2. With one non-zero, at p, it holds positions (0, p), or
    (0, 1) if p = 0; with none (0, 1). An unused slot holds +0. Nibbles are in order, the low one first.

    Args:
        unit: 2 keeps two pairs of every four: meta uint8 [n, ks/16].

    Raises:
        PatternError: a window has more than two non-zeros.
    """
    n, ks = ws.shape
    windows = ws.reshape(n, ks // (4 * unit), 4, unit)
    nonzero = np.asarray(is_nonzero(windows).any(axis=3))
    count = nonzero.sum(axis=2)
    if (count > 2).any():
        row, window = map(int, np.argwhere(count > 2)[0])
        raise PatternError(f"ws: row {row}, window {window} has more than two non-zeros; slide the weights first")
    first = nonzero.argmax(axis=2)
    last = 3 - nonzero[:, :, ::-1].argmax(axis=2)
    i0 = np.where(count == 2, first, 0)
    i1 = np.where((count == 0) | (last == 0), 1, last)
    index = np.stack([i0, i1], axis=2)[..., None]
    values = np.take_along_axis(np.where(nonzero[..., None], windows, np.zeros((), ws.dtype)), index, axis=2)
    nibble = (i0 | i1 << 2).astype(np.uint8)
    return values.reshape(n, ks // 2), nibble[:, 0::2] | nibble[:, 1::2] << 4


def nibbles(octets: Array) -> Array:
    """Two of every byte, the low one first: uint8 [n, c/2] -> uint8 [n, c]."""
    return np.stack([octets & 15, octets >> 4], axis=2).reshape(octets.shape[0], 2 * octets.shape[1])


def window_index(meta: Array) -> Array:
    """The two positions of every window: uint8 [n, windows / 2] -> int [n, windows, 2]."""
    nibble = nibbles(meta)
    return np.stack([nibble & 3, nibble >> 2], axis=2).astype(np.intp)


def decompress(values: Array, meta: Array, unit: int = 1) -> Array:
    """Inverse of compress: values [n, ks/2], meta [n, ks/8], of pairs [n, ks/16] -> [n, ks]."""
    n, slots = values.shape
    windows = np.zeros((n, slots // (2 * unit), 4, unit), values.dtype)
    np.put_along_axis(windows, window_index(meta)[..., None], values.reshape(n, slots // (2 * unit), 2, unit), axis=2)
    return windows.reshape(n, 2 * slots)


def pack_nibbles(q: Array) -> Array:
    """Two 4-bit values a byte, the low nibble first: float4_e2m1fn [n, c] -> uint8 [n, c/2]."""
    bits = q.view(np.uint8)
    return bits[:, 0::2] | bits[:, 1::2] << 4


def unpack_nibbles(packed: Array) -> Array:
    """Inverse of pack_nibbles: uint8 [n, c/2] -> float4_e2m1fn [n, c]."""
    return nibbles(packed).view(FLOAT4.numpy)


# ---- the whole ---------------------------------------------------------------------------------------------------


def pack(w: Array, pattern: Pattern, scheme: Scheme | DType, scale: Array | None = None) -> PackedWeight:
    """[n, k] weights that obey the pattern -> PackedWeight.

    Args:
        w: real numbers, quantized here if the scheme has scales; or 8-bit values already quantized, with their `scale` [n, 1].

    Raises:
        OperandError: NaN or infinity in w, or a value that overflows a 16-bit type.
        PatternError: a group has more than nnz non-zeros: of stored values or, where blocks are quantized, of w.
    """
    scheme = Scheme.of(scheme)
    pattern, shape, storage = scheme.pattern(pattern), (w.shape[0], w.shape[1]), scheme.weights
    if storage.block:
        require_finite(w)
        q, block_scale, scale = quantize_blocks(slide(w, pattern), storage)
        values, meta = compress(q, pattern.unit)
        return PackedWeight(pack_nibbles(values), meta, scale, pattern, shape, scheme, block_scale)
    if scale is not None:
        q = w
    elif storage.row_scale:
        q, scale = quantize(w, scheme.dtype)
        require_finite(w)
    else:
        with np.errstate(over="ignore"):
            q = w.astype(scheme.dtype.numpy)
    require_finite(q)
    values, meta = compress(slide(q, pattern))
    return PackedWeight(values, meta, scale, pattern, shape, scheme)


def require_finite(w: Array) -> None:
    """Raise OperandError at the first NaN or infinity of w [n, k]."""
    if not (finite := np.isfinite(w.astype(np.float32))).all():
        row, column = map(int, np.argwhere(~finite)[0])
        raise OperandError(f"w: {w[row, column]} at row {row}, column {column}; weights must be finite as stored ({w.dtype})")


def unpack(packed: PackedWeight) -> Array:
    """The stored values at their dense places: [n, k] of packed.dtype. Times packed.scale they are the weights.

    With block scales: float32 [n, k], the stored values times the scales of their blocks.
    """
    return unslide(decompress(stored_values(packed), packed.meta, packed.pattern.unit), packed.pattern, packed.k)


def stored_values(packed: PackedWeight) -> Array:
    """The values of all slots: [n, ks/2] of packed.dtype; or float32, each times the scale of its block."""
    values, block = np.asarray(packed.values), packed.scheme.weights.block
    if block is None:
        return values.view(packed.dtype.numpy)
    return times_blocks(unpack_nibbles(values), packed.block_scale.view(block.scale.numpy), block.columns // 2)


def lifted(x: Array, pattern: Pattern, scheme: Scheme) -> tuple[Array, Array | None]:
    """Activations as they are multiplied: xs [m, ks] of the accumulator's type, and the scales of tokens [m, 1]."""
    storage = scheme.activations
    if storage.block:
        q, block_scale, scale = quantize_blocks(lift(x, pattern), storage)
        return times_blocks(q, block_scale, storage.block.columns), scale
    if storage.row_scale:
        q, scale = quantize(x, storage.element)
        return lift(q, pattern).astype(scheme.accumulator), scale
    with np.errstate(over="ignore"):  # to infinity
        return lift(x.astype(storage.element.numpy), pattern).astype(scheme.accumulator), None


def matmul(x: Array, packed: PackedWeight, bias: Array | None = None, out_dtype: Any = FLOAT32) -> Array:
    """y = x @ w.T + bias, x [m, k] -> y [m, n], with exactly the numbers that a GPU kernel sees.

    Schemes with scales: every token (row of x) is quantized; int8 products accumulate in int32 (exactly), others, each value
    times its block's scale if it has one, in float32; then y = (acc * scale_x) * scale_w + bias, each step rounded to float32.
    16-bit weights: x is rounded to their type, products accumulate in float32. y is rounded to `out_dtype` last.

    Products of every slot are added up, so two values stored for one column, which no packer writes, both count.
    Only the two slots that a window stores meet an activation, an unused one as 0 at the position of its nibble. So infinity
    or NaN in a 16-bit x reaches exactly the outputs that the hardware lets it reach.

    Raises:
        FormatError: tensors of `packed` do not fit its shape, or k is so long that int32 sums could overflow.
    """
    packed.check_shapes()
    pattern, scheme = packed.pattern, packed.scheme
    xs, scale_x = lifted(x, pattern, scheme)
    xs = xs.reshape(x.shape[0], packed.ks // (4 * pattern.unit), 4, pattern.unit)  # [m, windows, 4, unit]
    index = window_index(packed.meta)
    values = stored_values(packed).astype(scheme.accumulator).reshape(packed.n, xs.shape[1], 2, pattern.unit)
    windows = np.arange(index.shape[1])[:, None]
    acc = np.zeros((x.shape[0], packed.n), scheme.accumulator)
    with np.errstate(invalid="ignore", over="ignore"):
        for row in range(packed.n if packed.k else 0):  # of empty arrays, NumPy's einsum reads memory that is not theirs
            met = xs[:, windows, index[row]]  # [m, windows, 2, unit]: the activations that multiply this row's stored values
            acc[:, row] = np.einsum("mwiu,wiu->m", met, values[row])
        y = acc.astype(np.float32)
        if scale_x is not None:
            y = (y * scale_x) * packed.scale[:, 0]
        if bias is not None:
            y = y + bias.astype(np.float32)
        return y.astype(out_dtype)


# ---- what comes before a linear layer --------------------------------------------------------------------------------
#
# A GPU kernel does one of these and quantizes its result, which is why every step and the order of the sum are fixed.


def rms_norm(x: Array, gamma: Array, epsilon: float, residual: Array | None = None) -> tuple[Array, Array]:
    """RMSNorm of s = x + residual: s / sqrt(mean(s^2) + epsilon), rounded, times gamma, rounded; as vLLM defines it.

    Args:
        x, residual: [m, k], gamma: [k], of one float type; sums and squares are float32.

    Returns:
        [m, k] of that type; and s rounded to it, x itself without a residual.
    """
    with np.errstate(all="ignore"):
        s = x.astype(np.float32) if residual is None else x.astype(np.float32) + residual.astype(np.float32)
        mean = sum_of_squares(s) / np.float32(s.shape[1])
        inverse = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
        normed = (s * inverse[:, None]).astype(x.dtype)
        return (normed.astype(np.float32) * gamma.astype(np.float32)).astype(x.dtype), s.astype(x.dtype)


def norm_threads(k: int) -> int:
    """Threads that add up the squares of a row of k columns: 128, or more so that none has more than 64 columns."""
    threads = 128
    while 64 * threads < k + 256:
        threads *= 2
    return threads


def sum_of_squares(s: Array) -> Array:
    """Of every row of s [m, k] float32, in the order of a thread block: float32 [m].

    Thread t adds, one by one, the squares of columns 8t to 8t+7, then of those 8 threads further on, and so on. Of 32 threads,
    a warp, the upper 16 sums are added to the lower 16, of these the upper 8 to the lower 8, and so on; likewise of 32 warps.
    """
    m, k = s.shape
    threads = norm_threads(k)
    squares = np.pad(s * s, ((0, 0), (0, -k % (8 * threads)))).reshape(m, -(-k // (8 * threads)), threads, 8)
    sums = np.zeros_like(s, shape=(m, threads))
    for part in range(squares.shape[1]):
        for column in range(8):
            sums = sums + squares[:, part, :, column]
    sums = _halved(sums.reshape(m, threads // 32, 32))
    return _halved(np.pad(sums, ((0, 0), (0, 32 - sums.shape[1]))))


def _halved(sums: Array) -> Array:
    while (half := sums.shape[-1] // 2) > 0:
        sums = sums[..., :half] + sums[..., half:]
    halved: Array = sums[..., 0]
    return halved


def silu_and_mul(x: Array) -> Array:
    """SiLU of the first half of the columns, rounded, times the second half, rounded: [m, 2k] -> [m, k] of x's type.

    silu(g) = g / (1 + e^-g).
    """
    return _gate_and_mul(x, lambda gate: gate)


GELU, GELU_CUBE = np.float32(1.5957691216057308), np.float32(0.07135481282930404)
"""2 sqrt(2 / pi), and 0.044715 times that."""


def gelu_and_mul(x: Array) -> Array:
    """`silu_and_mul` with GELU in its tanh form: g / (1 + e^-h), h = (2 sqrt(2 / pi) (1 + 0.044715 g^2)) g."""
    return _gate_and_mul(x, lambda gate: (gate * gate * GELU_CUBE + GELU) * gate)


def _gate_and_mul(x: Array, inner: Callable[[Array], Array]) -> Array:
    half = x.shape[1] // 2
    gate, up = x[:, :half].astype(np.float32), x[:, half:].astype(np.float32)
    with np.errstate(all="ignore"):
        act = (gate / (np.float32(1) + exponential(-inner(gate)))).astype(x.dtype)
        return (act.astype(np.float32) * up).astype(x.dtype)


EXP_LIMIT = 87.0
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -0.00021219444005469057
"""ln 2 in two parts, the first of so few bits that its multiples here are exact."""
EXP_SERIES = (
    0.008296939544379711,
    0.04192034900188446,
    0.1666761189699173,
    0.49998849630355835,
    0.9999997019767761,
    1.0000001192092896,
)
"""exp(f) for |f| <= ln 2 / 2, highest power first: a polynomial fitted to its relative error, which is below 1e-7."""
ROUND = np.float32(12582912)
"""1.5 * 2^23: adding it to a small float32 leaves the nearest whole number in the low bits."""


def exponential(x: Array) -> Array:
    """exp(x) of float32 by a polynomial and a power of two, each step rounded; e^-87 below -87, infinity above 87."""
    above, x = x > np.float32(EXP_LIMIT), np.clip(x, np.float32(-EXP_LIMIT), np.float32(EXP_LIMIT))
    shifted = x * np.float32(LOG2_E) + ROUND
    n = shifted - ROUND
    f = (x - n * np.float32(LN2_HIGH)) - n * np.float32(LN2_LOW)
    p: Any = np.float32(EXP_SERIES[0])
    for c in EXP_SERIES[1:]:
        p = p * f + np.float32(c)
    power = (p.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))).view(np.float32)
    return np.where(above, np.float32(np.inf), power)
