"""Packing and unpacking on the GPU: prune, round, slide and compress CuPy arrays, with the bits of `reference`.

    w [n, k] --prune, quantize or round, slide, compress--> values [n, ks/2], meta [n, ks/8], scale [n, 1]

The kernels write the faults they find into a report of a few words, the only thing that the host waits for and reads. For the
error message the host then reads the row of the first fault.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from ..core.checks import SOURCES, has_scales, is_real, require_finite, require_size, row_scale, stored_scheme, unpackable
from ..core.dtypes import FLOAT8, FLOAT16, FLOAT32, INT8, DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.prune import GIVEN, bind, require_no_statistics
from ..core.scheme import Scheme
from ..errors import OperandError
from . import quantize
from .jit.numba import SIMULATED, arrays, current_device
from .kernels.pack import MOST_THREADS, pack_kernel
from .kernels.pack_stages import BAD_SCORE, BITS, COUNT, FIRST, LARGEST_HELD, NOT_FINITE, NOTHING, OVERFLOW, Variant
from .kernels.ptx import LANES
from .kernels.unpack import BAD_INDEX, BAD_SCALE, TWICE, unpack_kernel

ELEMENTS_AT_ONCE = 2**26
"""Weights whose non-zeros `obeys` counts at once."""


# ---- pack --------------------------------------------------------------------------------------------------------


def pack(
    w: Any,
    pattern: Pattern,
    dtype: object = None,
    *,
    scale: Any = None,
    prune: Any = "none",
    seed: int = 0,
    statistics: Any = None,
) -> PackedWeight:
    """`slidesparse_nb.pack` on the device of w; waits for it once, for the report.

    Args:
        w: [n, k] CuPy array, any strides: float32, float16 or bfloat16; or int8, or the bits of `dtype` as uint8
            (float8_e4m3fn), and their `scale`.
        dtype, scale: as for `slidesparse_nb.pack`. Scales of a device are checked on the host, and go back as float32.
        prune: a name in `core.prune.PRUNERS`, or scores [n, k] >= 0 of any real type, on the device of w or the host.
        seed: of "random", below 2^64.
        statistics: as for `slidesparse_nb.pack`.

    Returns:
        The packed weight; its arrays stay on the device, float8 and bfloat16 values as their bits (`dtype.raw`).

    Raises:
        OperandError: w, scale, prune or statistics has the wrong type, shape or value; NaN, infinity, or overflow of a 16-bit
            dtype in w.
        PatternError: weights as stored have a group with more than nnz non-zeros.
    """
    source, stored = _types(w, dtype)
    require_size(pattern, w.shape, stored)
    scaled = has_scales(w.dtype.itemsize, source, scale)
    scales = row_scale(_host(scale) if isinstance(scale, arrays.ndarray) else scale, w.shape[0]) if scaled else None
    with contextlib.nullcontext() if SIMULATED else w.device:
        method, given = _method(prune, w, source, seed, statistics)
        score = None if given is None else _scores(given, w)
        packed, report = launch(w, source, pattern, stored, scales, method, score, seed)
        _raise_for(_host(report), w, source, pattern, stored, given)
    return packed


def _types(w: Any, dtype: object) -> tuple[str, DType]:
    """The name of the type that w holds, and the type that is stored; or OperandError."""
    if w.ndim != 2:
        raise OperandError(f"w: shape {w.shape} must be [n, k]; reshape it to two dimensions")
    if w.dtype == np.uint8 and dtype is not None and Scheme.of(dtype).dtype.bits == 8:
        return Scheme.of(dtype).dtype.name, Scheme.of(dtype).dtype
    if w.dtype not in SOURCES:
        raise unpackable(w.dtype, "of float8_e4m3fn weights pass the bits as uint8, and the dtype")
    return w.dtype.name, stored_scheme(w, dtype).dtype


def _method(prune: Any, w: Any, source: str, seed: int, statistics: Any) -> tuple[str, Any]:
    """The kernel's name of the method, and its scores, on the host or a device; None where the kernel makes its own."""
    if isinstance(prune, arrays.ndarray):
        require_no_statistics(statistics)
        return "scores", prune
    method = bind(prune, w.shape, seed, statistics)
    if method.kernel != "scores":
        return method.kernel, None
    if method.pruner is GIVEN:
        return "scores", method.statistics
    require_finite(dense := _values(w, slice(None), source))
    return "scores", np.maximum(method.scores(dense.astype(np.float32)), 0)  # the kernel itself tells zeros


def _scores(prune: Any, w: Any) -> Any:
    """Scores as contiguous float32 on the device of w; invalid ones stay invalid, and the kernel reports them."""
    if not SIMULATED and isinstance(prune, arrays.ndarray) and prune.device != w.device:
        raise OperandError(f"prune: scores on device {prune.device.id} must be on that of w, {w.device.id}; move them there")
    prune = arrays.asarray(prune)
    if prune.shape != w.shape:
        raise OperandError(f"prune: scores of shape {prune.shape} must have one score a weight, {w.shape}")
    if not is_real(prune.dtype):
        raise OperandError(f"prune: scores of type {prune.dtype} must be real numbers")
    with np.errstate(over="ignore", under="ignore"):
        score = arrays.ascontiguousarray(prune.astype(np.float32, copy=False))
    if prune.dtype.itemsize > score.itemsize and prune.dtype.kind == "f":  # a tiny negative one is a zero by now
        score = arrays.where(prune >= 0, score, arrays.float32(np.nan))
    return score


def launch(
    w: Any,
    source: str,
    pattern: Pattern,
    stored: DType,
    scales: Any,
    method: str = "none",
    score: Any = None,
    seed: int = 0,
) -> tuple[PackedWeight, Any]:
    """The work of `pack` on the current device, without waiting for it.

    Args:
        w: [n, k] of the type `source`.
        scales: float32 [n, 1] of 8-bit w, on the host.
        method: "none", "magnitude", "random" or "scores".
        score: float32 [n, k], contiguous.

    Returns:
        The packed weight, and the report on it, uint64 words (`kernels/pack_stages.py`).
    """
    n, k = w.shape
    report = _new_report(COUNT)
    values = arrays.empty((n, pattern.expanded_k(k) // 2), stored.numpy if stored in (INT8, FLOAT16) else stored.raw)
    meta = arrays.empty((n, pattern.expanded_k(k) // 8), np.uint8)
    scale = None
    if Scheme.of(stored).scaled:
        scale = arrays.empty((n, 1), np.float32) if scales is None else arrays.asarray(scales)
    units = pattern.padded_k(k) // pattern.slice_unit
    vector = _vector(w, pattern.group)
    native = stored is not FLOAT8 or source == stored.name or quantize.native_float8(current_device())
    if n:
        step = w.itemsize
        ld = w.strides[0] // (4 * vector if vector else step)
        pack_kernel(Variant(source, stored, pattern.windows, method, vector, native))(
            (n,),
            _threads(units),
            w,
            report if score is None else score,
            report if scale is None else scale,
            values,
            meta,
            report,
            *(ld, w.strides[1] // step, k, units, seed & 0xFFFFFFFF, seed >> 32),
        )
    return PackedWeight(values, meta, scale, pattern, (n, k), Scheme.of(stored)), report


def _vector(w: Any, group: int) -> int:
    """Words that a kernel loads at once: 4 or 1, or 0 where rows and groups of w are not whole aligned words."""
    row, address = w.shape[1] * w.itemsize, w.ctypes.data if SIMULATED else w.data.ptr
    if w.strides[1] == w.itemsize and group <= LARGEST_HELD:
        for words in (4, 1):
            if not any(part % (4 * words) for part in (group * w.itemsize, row, w.strides[0], address)):
                return words
    return 0


def _raise_for(report: Any, w: Any, source: str, pattern: Pattern, stored: DType, prune: Any) -> None:
    """The error that a report tells of, if it does; the sentences of the CPU."""
    k = w.shape[1]
    first = [int(i) for i in report]
    for word in (BAD_SCORE, NOT_FINITE, OVERFLOW):
        if first[word] == NOTHING:
            continue
        row, column = divmod(first[word], k)
        where = f"at row {row}, column {column}"
        if word == BAD_SCORE:
            raise OperandError(f"prune: score {_host(prune[row])[column]} {where} must be finite and not negative")
        value = f"w: {_values(w, row, source)[column]} {where}"
        if word == NOT_FINITE:
            raise OperandError(f"{value}; weights must be finite ({source})")
        raise OperandError(f"{value} overflows {stored}; store it in another type")
    if first[COUNT]:
        row, group = divmod(first[FIRST], pattern.padded_k(k) // pattern.group)
        raise pattern.violated(row, group, first[COUNT])


def _values(w: Any, row: int | slice, source: str) -> Any:
    """One row, or several, as NumPy numbers."""
    return _host(arrays.ascontiguousarray(w[row])).view(FLOAT32 if source == "float32" else Scheme.of(source).dtype.numpy)


def obeys(w: Any, pattern: Pattern, dtype: object = None) -> bool:
    """Whether no group of w [n, k] has more than nnz non-zeros; waits for the device.

    Args:
        w, dtype: as for `pack`.
    """
    source, _ = _types(w, dtype)
    nonzero = 2 ** BITS[source] - 1 if source == INT8.name else 2 ** (BITS[source] - 1) - 1
    (n, k), group = w.shape, pattern.group
    step = max(1, ELEMENTS_AT_ONCE // max(1, k))
    with contextlib.nullcontext() if SIMULATED else w.device:
        for first in range(0, n, step):
            raw = arrays.ascontiguousarray(w[first : first + step]).view(f"u{w.itemsize}")
            used = arrays.pad((raw & raw.dtype.type(nonzero)) != 0, ((0, 0), (0, -k % group)))
            counts = used.reshape(raw.shape[0], used.shape[1] // group, group).sum(axis=2)
            if bool((counts > pattern.nnz).any()):
                return False
    return True


# ---- unpack ------------------------------------------------------------------------------------------------------


def unpack(packed: PackedWeight) -> tuple[Any, int | None]:
    """`reference.unpack` on the device of `packed`; waits for it, for the report.

    Returns:
        dense: the stored values at their dense places, [n, k] of packed.values' dtype.
        row: the first invalid row, if any: it has an index out of order, or else a scale that is negative or not finite, or
            else a column that two windows store.
    """
    n, k = packed.shape
    pattern, dtype = packed.pattern, packed.dtype
    with contextlib.nullcontext() if SIMULATED else packed.values.device:
        report = _new_report(TWICE + 1)
        dense = arrays.empty((n, k), packed.values.dtype)
        units = pattern.padded_k(k) // pattern.slice_unit
        if n:
            tensors = [arrays.ascontiguousarray(a) for a in (packed.values, packed.meta)]
            scale = report if packed.scale is None else arrays.ascontiguousarray(packed.scale)
            unpack_kernel(dtype, pattern.windows)((n,), _threads(units), *tensors, scale, dense, report, k, units)
        found = [int(i) for i in _host(report)]
    return dense, next((found[word] for word in (BAD_INDEX, BAD_SCALE, TWICE) if found[word] != NOTHING), None)


def on_host(packed: PackedWeight, rows: slice) -> PackedWeight:
    """Some rows of a packed weight, in NumPy arrays."""
    values, meta = _host(packed.values[rows]).view(packed.dtype.numpy), _host(packed.meta[rows])
    scale = None if packed.scale is None else _host(packed.scale[rows])
    return PackedWeight(values, meta, scale, packed.pattern, (values.shape[0], packed.k), packed.scheme)


# ---- the device --------------------------------------------------------------------------------------------------


def _new_report(first_words: int) -> Any:
    """`first_words` words that hold NOTHING, and one that holds 0."""
    report = arrays.empty(first_words + 1, np.uint64)
    if SIMULATED:
        report[:first_words], report[first_words] = NOTHING, 0
    else:
        report.data.memset_async(0xFF, 8 * first_words)
        (report.data + 8 * first_words).memset_async(0, 8)
    return report


def _threads(units: int) -> int:
    """Threads of a block that handles `units` slice units of a row: whole warps."""
    return min(MOST_THREADS, max(1, -(-units // LANES)) * LANES)


def _host(a: Any) -> Any:
    return a if SIMULATED else a.get()
