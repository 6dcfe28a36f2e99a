"""pack(w) -> PackedWeight and back: check the operands, then prune, quantize, slide and compress block by block of rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import cuda
from ..core import prune as pruning
from ..core.checks import (
    check_weights,
    on_gpu,
    require_finite,
    require_kernel,
    require_no_overflow,
    require_size,
    row_scales,
    stored_scheme,
)
from ..core.dtypes import BFLOAT16, DType
from ..core.packed import PackedWeight, part_dtypes, part_shapes, require_packed
from ..core.pattern import Pattern, known_patterns
from ..core.prune import NOTHING, Pruning
from ..core.scheme import Scheme
from ..cpu import block_scales, kernels, threads
from ..errors import PatternError
from .experts import each, of_expert
from .proof import stored_twice, unpack_blocks, verify, verify_rows

__all__ = ["of_expert", "pack", "pack_rows", "store_rows", "unpack", "verify", "verify_rows", "violations_hint"]

Array = NDArray[Any]

ALIGNMENT = 128
"""Columns after which some pruning tools start a new group, whether or not the last one was full."""


# ---- the whole ---------------------------------------------------------------------------------------------------


def pack(
    w: Array,
    pattern: Pattern | str | tuple[int, int] = "6:8",
    dtype: object = None,
    *,
    scale: Array | float | None = None,
    prune: str | Array = "none",
    seed: int = 0,
    statistics: Array | None = None,
    max_workers: int | None = None,
) -> PackedWeight:
    """Pack weights: (prune), quantize, slide and compress.

    Args:
        w: [*lead, n, k] NumPy array of any strides: float32, float16 or bfloat16; or int8 or float8_e4m3fn with `scale`. Or
            an array on a GPU, which is packed there (a method that no kernel knows scores a copy on the host); float8_e4m3fn as
            its bits, uint8, with `dtype`.
        pattern: "6:8", (6, 8) or a Pattern: non-zeros:total; over pairs of columns for NVFP4 and MXFP4.
        dtype: the scheme, by name ("int8", "fp8", "INT8_W8A8", "W4A8", "NVFP4" ...), or the dtype that tells it. By default
            that of w's type; bfloat16 for float32. Weights of 8 bits keep their bytes and scales: another scheme is refused.
        scale: of 8-bit w only, w ~= w * scale, of any float type: [*lead, n, 1] or [*lead, n], one a row; or one for all rows.
        prune: "none" (weights that break the pattern are refused), "magnitude", "random", "wanda" (by `statistics`), or scores
            [*lead, n, k] >= 0: of the weights in a group, those with the highest stay; of pairs, by their sum, for
            "magnitude" of their squares. Pruning comes before quantization; 8-bit w is pruned by its |q|.
            Scores and scales of a w on a GPU may be there or on the host; "random" draws there what it draws on the CPU.
        seed: of prune="random", any integer, modulo 2^64; w[i] of a stack has seed + i.
        statistics: of a method that needs more than the weights, on the host: real numbers [*lead, k] or [*lead, n, k].
        max_workers: threads; by default as many as there are processors, up to 8.

    Returns:
        The packed weight, its arrays NumPy's, or CuPy's for a w on a GPU.

    Raises:
        OperandError: an argument of the wrong type, shape or value; NaN, infinity, or overflow of a 16-bit dtype in w.
        PatternError: weights as stored (that is, after quantization; with block scales, w itself) have a group with more than
            nnz non-zeros.
    """
    if getattr(w, "ndim", 2) > 2:
        pattern, count, seed = Pattern.of(pattern), w.shape[0], pruning.check_seed(seed)

        def expert(i: int) -> PackedWeight:
            parts = {"scale": scale, "prune": prune, "statistics": statistics}
            given = {name: of_expert(name, value, i, count) for name, value in parts.items()}
            return pack(w[i], pattern, dtype, **given, seed=seed + i, max_workers=max_workers)

        return PackedWeight.stack(each(count, expert))
    if on_gpu(w):
        return _pack_on_gpu(w, pattern, dtype, scale, prune, pruning.check_seed(seed), statistics)
    w = check_weights(w)
    scheme = stored_scheme(w, dtype)
    pattern = scheme.pattern(pattern)
    require_size(pattern, w.shape, scheme)
    n, k = w.shape
    scales = row_scales(w, scale)
    method = pruning.bind(prune, w.shape, pruning.check_seed(seed), statistics)
    shapes = part_shapes(pattern, (n, k), scheme)
    parts: dict[str, Array] = {part: np.empty(shape, part_dtypes(part, scheme)[0]) for part, shape in shapes.items()}

    def block(rows: slice) -> PatternError | None:
        q, q_scale = store_rows(
            w[rows],
            pattern,
            scheme,
            scale=None if scales is None else scales[rows],
            prune=method.rows(rows),
            first_row=rows.start,
        )
        try:
            packed = pack_rows(q, q_scale, pattern, scheme, first_row=rows.start)
        except PatternError as error:
            return error
        for part, array in parts.items():
            array[rows] = getattr(packed, part)
        return None

    broken = [error for error in threads.over_blocks(block, n, k, max_workers) if error is not None]
    if broken:
        first, count = broken[0], sum(error.count for error in broken)
        raise pattern.violated(first.row, first.group, count, violations_hint(w, pattern))
    return PackedWeight(**{"scale": None, **parts}, pattern=pattern, shape=(n, k), scheme=scheme)


def _pack_on_gpu(
    w: Any, given_pattern: Pattern | str | tuple[int, int], dtype: object, scale: Any, prune: Any, seed: int, statistics: Any
) -> PackedWeight:
    """`pack` on the device of w."""
    scheme = Scheme.of(BFLOAT16 if dtype is None else dtype)
    require_kernel(scheme)
    pattern = scheme.pattern(given_pattern)
    arrays, weights = cuda.module("arrays", "pack"), cuda.module("pack", "pack")
    given = arrays.as_cupy("w", w)
    scale = arrays.as_cupy("scale", scale) if on_gpu(scale) else scale
    prune = arrays.as_cupy("prune", prune) if on_gpu(prune) else prune
    try:
        packed: PackedWeight = weights.pack(given, pattern, dtype, scale=scale, prune=prune, seed=seed, statistics=statistics)
    except PatternError as error:
        hint = violations_hint(given, pattern, functools.partial(weights.obeys, dtype=dtype))
        raise pattern.violated(error.row, error.group, error.count, hint) from None
    return packed


def unpack(packed: PackedWeight) -> Array:
    """The stored values at their dense places, bit for bit: [*lead, n, k] of packed.dtype.numpy. Times packed.scale: weights.

    Of weights on a GPU the result stays there, and has the dtype of packed.values, which may be raw bits. With block scales,
    it is float32: each stored value times the scale of its block.

    Raises:
        OperandError: `packed` is no PackedWeight.
        FormatError: a tensor of `packed` has the wrong dtype or shape, or holds an index out of order; or two windows store a
            value for the same column, which no dense form holds.
    """
    require_packed(packed).validate()
    if packed.lead:
        with contextlib.nullcontext() if isinstance(packed.values, np.ndarray) else packed.values.device:
            return np.stack(each(packed.lead[0], lambda i: unpack(packed[i])))
    if on_gpu(packed.values):
        require_kernel(packed.scheme)
        return _unpack_on_gpu(packed)
    out = np.empty((packed.n, packed.k), np.float32 if packed.scheme.blocks else packed.dtype.numpy)

    def block(rows: slice) -> None:
        out[rows] = _unpack_rows(packed.rows(rows.start, rows.stop), rows.start)

    for _ in threads.over_blocks(block, packed.n, packed.k, None):
        pass
    return out


def _unpack_on_gpu(packed: PackedWeight) -> Array:
    """`unpack` on the device of `packed`."""
    weights = cuda.module("pack", "unpack")
    dense: Array
    dense, row = weights.unpack(packed)
    if row is not None:  # say what is wrong with it as on the host
        _unpack_rows(weights.on_host(packed, slice(row, row + 1)).validate(first_row=row), row)
    return dense


def _unpack_rows(packed: PackedWeight, first_row: int) -> Array:
    """`unpack` of a block of rows of a valid packed weight, on one thread; rows first_row ... of the whole."""
    if packed.scheme.blocks:
        return unpack_blocks(packed, first_row)
    values = packed.values.view(packed.dtype.numpy)
    dense = kernels.decompress(values, packed.meta, packed.pattern, packed.pattern.padded_k(packed.k), packed.dtype)
    if np.count_nonzero(kernels.nonzero(dense)) != np.count_nonzero(kernels.nonzero(values)):
        raise stored_twice(values, packed.meta, packed, first_row)
    return dense[:, : packed.k]


# ---- blocks of rows ----------------------------------------------------------------------------------------------


def store_rows(
    w: Array,
    pattern: Pattern | str,
    dtype: Scheme | DType | str,
    *,
    scale: Array | float | None = None,
    prune: Pruning = NOTHING,
    first_row: int = 0,
) -> tuple[Array, Array | None]:
    """Prune and quantize a block of rows, on one thread; whether the pattern holds is for `pack_rows` to find.

    Args:
        w: [rows, k], rows first_row ... of the whole matrix; types as for `pack`.
        scale: as for `pack`, of these rows. prune: of these rows too.
        first_row: what errors and random scores count rows from.

    Returns:
        q: [rows, k] of dtype.numpy, new; scale: float32 [rows, 1], None for 16-bit types. Of a scheme with block scales:
        float32 weights and None, since they are quantized in their windows.

    Raises:
        OperandError: as for `pack`.
    """
    w = check_weights(w)
    scheme = stored_scheme(w, dtype)
    pattern, stored = scheme.pattern(pattern), scheme.dtype
    require_size(pattern, w.shape, scheme)
    scales = row_scales(w, scale, first_row)
    require_finite(w, first_row)
    q = np.array(w, order="C", subok=False) if w.dtype == stored.numpy else kernels.to_float32(w)
    if prune.pruner is not None:  # |w| is what kernels.prune goes by where it gets no scores
        by_magnitude = prune.kernel == "magnitude"
        kernels.prune(q, pattern, None if by_magnitude else prune.scores(kernels.to_float32(q), first_row))
    if w.dtype == stored.numpy or scheme.blocks:
        return q, scales
    if scheme.scaled:
        return kernels.quantize(q, stored)
    return require_no_overflow(kernels.round16(q, stored), w, first_row), None


def pack_rows(
    q: Array, scale: Array | None, pattern: Pattern | str, dtype: Scheme | DType | str, *, first_row: int = 0
) -> PackedWeight:
    """Slide and compress a block of stored rows, on one thread.

    Args:
        q, scale: as `store_rows` returns them.
        first_row: what the error counts rows from.

    Raises:
        PatternError: a group has more than nnz non-zeros; row, group, and the count in this block.
    """
    scheme = Scheme.of(dtype)
    pattern = scheme.pattern(pattern)
    if scheme.blocks:
        packed, count = block_scales.pack_rows(q, pattern, scheme)
    else:
        values, meta, count = kernels.slide_compress(q, pattern)
        packed = PackedWeight(values, meta, scale, pattern, (q.shape[0], q.shape[1]), scheme)
    if count:
        row, group = map(int, kernels.violations(q, pattern)[0])
        raise pattern.violated(first_row + row, group, count)
    return packed


def violations_hint(w: Any, pattern: Pattern | str, obeys: Callable[[Any, Pattern], bool] | None = None) -> str:
    """What weights that break `pattern` look like instead: one sentence without its full stop, or "".

    Args:
        w: [n, k] of any real type, dense or as stored.
        obeys: whether an array like w obeys a pattern; of arrays that are not NumPy's.
    """
    obeys = obeys or _obeys
    pattern = Pattern.of(pattern)
    # first, since 4:6 in pieces of 128 columns often happens to be 6:8 as well
    if ALIGNMENT % pattern.columns and w.shape[1] > ALIGNMENT:
        starts = range(0, w.shape[1], ALIGNMENT)
        if all(obeys(w[:, first : first + ALIGNMENT], pattern) for first in starts):
            return (
                f"they obey {pattern} if groups start anew every {ALIGNMENT} columns, as some pruning tools cut them, but here"
                f" groups run on to the end of the row: prune again without that alignment, or to a group that divides"
                f" {ALIGNMENT}, such as 6:8"
            )
    for known in (replace(known, unit=pattern.unit) for known in known_patterns()):
        if known.columns <= w.shape[1] and known.nnz * pattern.group > pattern.nnz * known.group and obeys(w, known):
            return (
                f"they do obey {known.described}, which tools that count zeros call 2:{known.group}:"
                f" pass {str(known)!r} if that is what they were pruned to"
            )
    return ""


def _obeys(w: Array, pattern: Pattern) -> bool:
    return not any(kernels.violations(w[rows], pattern).size for rows in threads.blocks(*w.shape))
