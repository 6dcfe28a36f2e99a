"""Packing and unpacking on the GPU: prune, round, slide and compress. Bit-equal twins of `reference`, on CuPy arrays.

    w [n, k] --prune--> [n, k] --quantize or round--> stored bits [n, k] --slide, compress--> values [n, ks/2], meta [n, ks/8]

What the kernels find wrong they write into a report of six words, the only thing that the host waits for and reads: the
weights stay where they are.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from ..dtypes import FLOAT16, FLOAT32, INT8, DType, packed_dtype
from ..errors import OperandError
from ..operands import has_scales, stored_dtype
from ..packed import PackedWeight
from ..pattern import Pattern
from . import activations
from .numba_kernel import SIMULATED, Kernel, arrays
from .weight_kernels import (
    BAD_SCALE,
    COUNT,
    FIRST,
    NOT_FINITE,
    NOTHING,
    OVERFLOW,
    STORED_NOT_FINITE,
    THREADS,
    check_scales_kernel,
    prune_kernel,
    round_kernel,
    slide_compress_kernel,
    unpack_kernel,
)

# ---- the whole ---------------------------------------------------------------------------------------------------


def pack(w: Any, pattern: Pattern, dtype: object = None, *, scale: Any = None, prune: Any = "none") -> PackedWeight:
    """`slidesparse_nb.pack` on the device of w; waits for it once, for the report.

    Args:
        w: [n, k] CuPy array, any strides: float32, float16 or bfloat16; or int8, or the bits of `dtype` as uint8
            (float8_e4m3fn), and their `scale`.
        dtype, scale: as for `slidesparse_nb.pack`; scales and scores may be on the host, and are copied then.
        prune: "none", "magnitude", or scores [n, k] >= 0, which are not checked.

    Returns:
        The packed weight; its arrays stay on the device, float8 and bfloat16 values as their bits (`dtype.raw`).

    Raises:
        OperandError: w, scale or prune has the wrong type or shape; NaN, infinity, or overflow of a 16-bit dtype in w.
        PatternError: weights as stored have a group with more than nnz non-zeros.
    """
    if w.ndim != 2:
        raise OperandError(f"w: shape {w.shape} must be [n, k]; reshape it to two dimensions")
    if w.dtype == np.uint8 and dtype is not None and packed_dtype(dtype).bits == 8:
        stored = packed_dtype(dtype)
        source = stored.name
    elif w.dtype in activations.SOURCES or w.dtype == INT8.numpy:
        stored = stored_dtype(w, dtype)
        source = activations.SOURCES.get(w.dtype, INT8.name)
    else:
        way = "; of float8_e4m3fn weights pass the bits as uint8, and the dtype" if w.dtype.itemsize == 1 else ""
        raise OperandError(f"w: {w.dtype} cannot be packed; it must be float32, float16, bfloat16 or int8{way}")
    with contextlib.nullcontext() if SIMULATED else w.device:
        return _pack(w, source, pattern, stored, _row_scales(w, source, scale), prune)


def _row_scales(w: Any, source: str, scale: Any) -> Any:
    """float32 [n, 1] on the device; None for weights that are quantized here. Whether they are finite, a kernel finds out."""
    if not has_scales(w.dtype.itemsize, source, scale):
        return None
    n = w.shape[0]
    given = arrays.asarray(scale, dtype=np.float32)
    if given.shape not in ((n, 1), (n,), (), (1,), (1, 1)):
        raise OperandError(f"scale: shape {given.shape} must be [{n}, 1], [{n}], or one number for all rows")
    return arrays.ascontiguousarray(arrays.broadcast_to(given.reshape(-1, 1), (n, 1)))


def _pack(w: Any, source: str, pattern: Pattern, dtype: DType, scale: Any, prune: Any) -> PackedWeight:
    n, k = w.shape
    report = _new_report()
    q = _pruned(w, source, pattern, prune, report)
    if source != dtype.name:
        if dtype.qmax is not None:
            q, scale = activations.quantize(q, dtype)
        else:
            unrounded, q = q, arrays.empty((n, k), np.uint16)
            _launch(round_kernel(source, dtype.name), n, k, unrounded, q, report, *_strides(unrounded), k)
    if scale is not None:
        _launch(check_scales_kernel(), -(-n // THREADS), 1, scale, report, n)
    values = arrays.empty((n, pattern.slid_k(k) // 2), dtype.numpy if dtype in (INT8, FLOAT16) else dtype.raw)
    meta = arrays.empty((n, pattern.slid_k(k) // 8), np.uint8)
    units = pattern.padded_k(k) // pattern.slice_unit
    _launch(slide_compress_kernel(dtype, pattern.windows), n, units, q, values, meta, report, *_strides(q), k, units)
    _raise_for(_host(report), w, source, pattern, dtype, scale)
    return PackedWeight(values, meta, scale, pattern, (n, k), dtype)


def prune(w: Any, pattern: Pattern, score: Any = None, *, dtype: DType | None = None) -> Any:
    """`reference.prune`: a new contiguous array [n, k] of w's dtype.

    Args:
        w: [n, k] CuPy array, any strides, float32, float16, bfloat16 or 8-bit.
        score: [n, k] >= 0, by default |w|; weights that are zero go first.
        dtype: what 8-bit w holds; by default int8.
    """
    source = activations.SOURCES.get(w.dtype, (dtype or INT8).name)
    report = _new_report()
    return _pruned(w, source, pattern, "magnitude" if score is None else score, report)


def unpack(packed: PackedWeight) -> Any:
    """`reference.unpack`: the stored values at their dense places, [n, k] of packed.values' dtype, on its device."""
    n, k = packed.shape
    pattern, dtype = packed.pattern, packed.dtype
    out = arrays.empty((n, k), packed.values.dtype)
    units = pattern.padded_k(k) // pattern.slice_unit
    _launch(unpack_kernel(dtype.bits, dtype.nonzero_mask, pattern.windows), n, units, packed.values, packed.meta, out, k, units)
    return out


def _new_report() -> Any:
    return arrays.asarray(np.array([NOTHING] * COUNT + [0], np.uint64))


def _pruned(w: Any, source: str, pattern: Pattern, method: Any, report: Any) -> Any:
    """w, or a pruned copy."""
    if isinstance(method, str):
        if method == "none":
            return w
        if method != "magnitude":
            raise OperandError(f"prune: {method!r} on a device must be 'none', 'magnitude' or scores [n, k]")
    elif method.shape != w.shape:
        raise OperandError(f"prune: scores of shape {method.shape} must have one score a weight, {w.shape}")
    n, k = w.shape
    pruned = arrays.empty((n, k), w.dtype)
    scored = not isinstance(method, str)
    score = arrays.ascontiguousarray(arrays.asarray(method, dtype=np.float32)) if scored else pruned  # else not read
    made = prune_kernel(source, pattern.group, scored)
    _launch(made, n, -(-k // pattern.group), w, score, pruned, report, *_strides(w), k)
    return pruned


def _launch(kernel: Kernel, rows: int, per_row: int, *args: Any) -> None:
    """One thread for each of `per_row` things in each row."""
    if rows and per_row:
        kernel((rows, -(-per_row // THREADS)), THREADS, *args)


def _strides(a: Any) -> tuple[int, int]:
    """Strides in elements."""
    return a.strides[0] // a.itemsize, a.strides[1] // a.itemsize


def _host(a: Any) -> Any:
    return a if SIMULATED else a.get()


def _raise_for(report: Any, w: Any, source: str, pattern: Pattern, dtype: DType, scale: Any) -> None:
    """The error that a report tells of, if it does; the sentences of the CPU."""
    k = w.shape[1]
    first = [int(i) for i in report]
    if source == dtype.name:
        first[NOT_FINITE] = min(first[NOT_FINITE], first[STORED_NOT_FINITE])
    if first[BAD_SCALE] != NOTHING and source == dtype.name:
        row = first[BAD_SCALE]
        raise OperandError(f"scale: {float(_host(scale[row, 0]))} at row {row} must be finite and not negative")
    if first[BAD_SCALE] != NOTHING and first[NOT_FINITE] == NOTHING:  # of a row quantized here: find the weight
        first[NOT_FINITE] = first[BAD_SCALE] * k + int(np.flatnonzero(~np.isfinite(_values(w, first[BAD_SCALE], source)))[0])
    if first[NOT_FINITE] != NOTHING:
        row, column = divmod(first[NOT_FINITE], k)
        value = _values(w, row, source)[column]
        raise OperandError(f"w: {value} at row {row}, column {column}; weights must be finite ({source})")
    if first[OVERFLOW] != NOTHING:
        row, column = divmod(first[OVERFLOW], k)
        value = _values(w, row, source)[column]
        raise OperandError(f"w: {value} at row {row}, column {column} overflows {dtype}; store the weights in another type")
    if first[COUNT]:
        row, group = divmod(first[FIRST], pattern.padded_k(k) // pattern.group)
        raise pattern.violated(row, group, first[COUNT])


def _values(w: Any, row: int, source: str) -> Any:
    """One row as NumPy numbers."""
    return _host(arrays.ascontiguousarray(w[row])).view(FLOAT32 if source == "float32" else packed_dtype(source).numpy)
