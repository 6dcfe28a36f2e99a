"""y = x @ w.T on the GPU: one or two launches a call.

    x [m, k] --quantize (8-bit weights), or copy if its rows are not 16-byte aligned--> rows --gemm--> y [m, n]
    x [m, k] --quantize (8-bit weights) or round, slide, swizzle--> tiles --gemm--> y [m, n]         where a kernel loads tiles

What can be made once is in plan.py. A call checks its operands, looks that up, finds memory for what lies between the
kernels, and launches. Arrays are CuPy's at the borders only: a slice of one costs a microsecond. Nothing here waits for the
device.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import cupy
import numpy as np

from ..arch import for_capability
from ..arch.operand import image_rows
from ..core.checks import check_activations, check_bias, float_dtype, result_dtype
from ..core.dtypes import CUDA_CODES, FLOATS, INT8, DType
from ..core.packed import ActivationImage, PackedWeight, QuantizedActivations
from ..core.pattern import Pattern
from ..core.scheme import Scheme
from ..errors import OperandError
from . import quantize as activations
from .arrays import as_cupy, as_stream, device_of, require_own_memory
from .plan import COUNTERS, DeviceWeight, Plan, device_facts, rows_feed, to_device

__all__ = ["DeviceWeight", "Plan", "matmul", "quantize", "rows_of_image", "to_device", "workspace_bytes"]


@functools.cache
def _counters(ordinal: int, stream: int) -> Any:
    """Counters for the split tiles of launches on one stream, which follow each other: zeros, and left so."""
    return cupy.zeros(COUNTERS, np.uint32)


def workspace_bytes(m: int, packed: PackedWeight, out_dtype: Any) -> int:
    """Bytes of a workspace with which `matmul` of m tokens allocates nothing. Make it with cupy.zeros."""
    if m < 0:
        raise OperandError(f"m: {m} must be a number of tokens, 0 or more")
    dtype = float_dtype("out_dtype", out_dtype)
    weight = to_device(packed)
    return weight.plan(m, FLOATS[dtype]).bytes if m and packed.n else 4 * COUNTERS


def matmul(
    x: Any,
    packed: PackedWeight,
    bias: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
    workspace: Any = None,
) -> Any:
    """x @ w.T + bias where x lives; arguments and errors as `slidesparse_nb.matmul` has them.

    Args:
        x: [..., k] array on a GPU, or QuantizedActivations of one.
        workspace: uint8, 16-byte aligned, at least `workspace_bytes`; zeros before its first use, and used by one stream at a
            time. With it, and `out`, nothing is allocated, unless x or out has strides that need a copy, or x is quantized
            for another pattern.
    """
    given, quantized = x, isinstance(x, QuantizedActivations)
    held = given.held if quantized else given
    ordinal = device_of(held)
    if ordinal != cupy.cuda.runtime.getDevice():
        with cupy.cuda.Device(ordinal):
            return matmul(given, packed, bias, out, out_dtype, stream, workspace)
    if stream is not None:
        with as_stream(stream):
            return matmul(given, packed, bias, out, out_dtype, None, workspace)

    x = as_cupy("x", held)  # in the stream of the product: see `device_of`
    weight = packed.arranged.get(ordinal) or to_device(packed, ordinal)
    n, k = packed.shape
    scale_x = feed = None
    ready = False  # x is the operand
    if quantized:
        lead, source = given.lead, float_dtype("x.source", given.source)
        ready = given.image is not None and weight.operand.tiled and given.image.pattern == packed.pattern
        if not ready and given.image is not None:
            x = rows_of_image(given.image, given.m, given.dtype)  # for this call, and in its stream: not kept
        scale_x = None if given.scale is None else as_cupy("x.scale", given.scale)
        given.check(packed, None if ready else x, scale_x)
        m = given.m
    else:
        check_activations(x, k)
        lead, source = x.shape[:-1], x.dtype
        if x.ndim != 2:
            x = x.reshape(math.prod(lead), k)
        m = x.shape[0]
    y, name = _result((*lead, n), source, out, out_dtype)
    bias = None if bias is None else as_cupy("bias", bias)
    workspace = None if workspace is None else as_cupy("workspace", workspace)
    if out is not None:
        require_own_memory(y, (("x", x), ("x.scale", scale_x), ("bias", bias), ("workspace", workspace)))
    bias_type, bias = (0, None) if bias is None else _bias(bias, n)
    if m == 0 or n == 0:
        return y if out is None else out
    plan = weight.plans.get((m, name)) or weight.plan(m, name)
    if ready:
        _check_image(x, plan)
    else:
        feed = plan.feed(x, quantized)

    # what stands between the kernels: in the workspace, or in memory of its own, which the pool takes back on this stream
    address = cupy.cuda.get_current_stream().ptr
    start = plan.parts_at if feed is None else plan.operand_at
    base = counters = 0
    if workspace is not None:
        base = counters = _check_workspace(workspace, plan)
    elif plan.bytes > start:
        memory = cupy.cuda.alloc(plan.bytes - start)
        base = memory.ptr - start
        if plan.part_bytes:
            counters = _counters(ordinal, address).data.ptr

    scale = 0 if scale_x is None else scale_x.data.ptr
    if feed is None:
        operand = x.data.ptr
    else:
        operand = base + plan.operand_at
        if plan.quantizes and not quantized:
            scale = base + plan.scale_at
        feed(address, x.data.ptr, operand, scale)
    rows_y = y if y.ndim == 2 and (y.strides[1] == y.itemsize or n == 1) else _rows(y, m, n)
    given = {
        "x": operand,
        "x_pitch": x.strides[0] if feed is None else plan.row_pitch,
        "scale_x": scale,
        "bias": 0 if bias is None else bias.data.ptr,
        "bias_type": bias_type,
        "y": rows_y.data.ptr,
        "y_pitch": rows_y.strides[0] // rows_y.itemsize,
        "parts": base + plan.parts_at if plan.part_bytes else 0,
        "arrived": counters,
    }
    for it in plan.launches:
        it.run(it.grid, it.block, it.shared, address, it.programmatic, *it.ordered({**it.fixed, **given}))
    if rows_y is not y and rows_y.data.ptr != y.data.ptr:
        y[...] = rows_y.reshape(y.shape)
    return y if out is None else out


def quantize(
    x: Any, pattern: Pattern, dtype: DType, packed: PackedWeight | None = None, stream: Any = None
) -> QuantizedActivations:
    """x [..., k] on a GPU, quantized once for several products; `slidesparse_nb.quantize`.

    Args:
        packed: weights that it will be multiplied by, if they are known.
    """
    ordinal = device_of(x)
    if ordinal != cupy.cuda.runtime.getDevice():
        with cupy.cuda.Device(ordinal):
            return quantize(x, pattern, dtype, packed, stream)
    if stream is not None:
        with as_stream(stream):
            return quantize(x, pattern, dtype, packed)
    x = as_cupy("x", x)
    check_activations(x, None if packed is None else packed.k)
    lead, source, k = x.shape[:-1], x.dtype, x.shape[-1]
    m = math.prod(lead)
    flat = x if x.ndim == 2 else x.reshape(m, k)
    if packed is not None:
        tiled = to_device(packed, ordinal).operand.tiled
    else:
        tiled = for_capability(device_facts(ordinal)[0]).operand(pattern, k, dtype).tiled
    if tiled:
        made, scale = activations.image(flat, dtype, pattern)
        return QuantizedActivations(None, scale, lead, dtype, source, ActivationImage(made, pattern, k))
    if Scheme.of(dtype).scaled:
        values, scale = activations.quantize(flat, dtype)
        return QuantizedActivations(values[:, :k], scale, lead, dtype, source)
    pitch = -(-2 * k // 16) * 16
    values = cupy.empty((m, pitch // 2), dtype.raw)
    if m and k:
        feed = rows_feed(ordinal, flat, FLOATS[source], dtype, pitch, 0)
        feed(cupy.cuda.get_current_stream().ptr, flat.data.ptr, values.data.ptr, 0)
    return QuantizedActivations(values[:, :k], None, lead, dtype, source)


def rows_of_image(image: ActivationImage, m: int, dtype: DType) -> Any:
    """The values [m, k] that an image was made of: int8, or the bits of another type."""
    with cupy.cuda.Device(image.data.data.device_id):
        rows = image_rows(image.data, m, image.k, image.pattern, dtype, cupy)
        return rows.view(np.int8) if dtype is INT8 else rows


# ---- operands --------------------------------------------------------------------------------------------------------


def _check_image(data: Any, plan: Plan) -> None:
    size = plan.scale_at - plan.operand_at
    if data.nbytes != size or data.dtype != np.uint8 or data.data.ptr % 16 or not data.flags.c_contiguous:
        rule = f"must be {size} contiguous, 16-byte aligned bytes; make x with quantize(x, packed)"
        raise OperandError(f"x.image: {data.dtype} {data.shape} {rule}")


def _result(shape: tuple[int, ...], source: np.dtype[Any], out: Any, out_dtype: Any) -> tuple[Any, str]:
    """`out` as a CuPy array, checked, or a new one; and the name of its type."""
    y = None if out is None else as_cupy("out", out)
    dtype = result_dtype(shape, source, y, out_dtype)
    return cupy.empty(shape, dtype) if y is None else y, FLOATS[dtype]


def _rows(y: Any, m: int, n: int) -> Any:
    """y as [m, n] with neighbouring columns, for the kernel to write; new memory where y's strides are not like that."""
    if y.ndim == 2 and (y.strides[1] == y.itemsize or n == 1):
        return y
    return y.reshape(m, n) if y.flags.c_contiguous else cupy.empty((m, n), y.dtype)


def _bias(bias: Any, n: int) -> tuple[int, Any]:
    """The code of its type, and the bias as the kernel reads it."""
    check_bias(bias, n)
    if bias.dtype == np.float64:
        bias = bias.astype(np.float32)
    return CUDA_CODES[FLOATS[bias.dtype]], bias if bias.flags.c_contiguous else cupy.ascontiguousarray(bias)


def _check_workspace(workspace: Any, plan: Plan) -> int:
    """Its address."""
    if workspace.nbytes < plan.bytes or workspace.data.ptr % 16 or not workspace.flags.c_contiguous:
        raise OperandError(f"workspace: {workspace.nbytes} bytes must be at least {plan.bytes}, contiguous and 16-byte aligned")
    return int(workspace.data.ptr)
