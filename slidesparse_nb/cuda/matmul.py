"""y = x @ w.T on the GPU, for CuPy's arrays and others that it can view: checks, memory and results; addresses go to weight.py.

    x [m, k] --quantize or round, lay out--> operand --product--> y [m, n]          one to four launches a call
    one or two tokens ----------quantize and product------------> y [m, n]          where a kernel does both (`Arch.quantizes`)

Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import cupy
import numpy as np

from ..arch import for_capability
from ..arch.operand import STAGE, Operand, from_tiles, stages
from ..core.activations import Before, QuantizedActivations
from ..core.checks import check_activations, check_bias, float_dtype, result_dtype, whole_number
from ..core.dtypes import CUDA_CODES, FLOATS, INT8, DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.scheme import Scheme
from ..errors import OperandError
from .arrays import as_cupy, as_stream, device_of, require_own_memory
from .plan import Plan, device_facts, fused_writer, norm_numbers, rows_writer, writer
from .weight import DeviceWeight, to_device


class TiledActivations(QuantizedActivations):
    """Quantized activations as a kernel loads them: lifted, in swizzled tiles (arch/operand.py).

    Attributes:
        tiles: uint8 [stages, ceil(m / 8), 8, 128] on a GPU.
        pattern: x was lifted by.
    """

    tiles: Any
    pattern: Pattern
    columns: int

    def __init__(
        self,
        tiles: Any,
        pattern: Pattern,
        k: int,
        scale: Any,
        lead: tuple[int, ...],
        dtype: DType,
        source: np.dtype[Any],
    ) -> None:
        self.__dict__.update(tiles=tiles, pattern=pattern, columns=k, scale=scale, lead=lead, dtype=dtype, source=source)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, laid out for {self.pattern.described})"

    @functools.cached_property
    def values(self) -> Any:
        """[m, k] int8, or the bits of another type: recovered from the tiles."""
        return self.rows()

    @property
    def k(self) -> int:
        return int(self.columns)

    @property
    def held(self) -> Any:
        return self.tiles

    def rows(self) -> Any:
        """`values`, made anew in the current stream."""
        with cupy.cuda.Device(self.tiles.data.device_id):
            rows = from_tiles(self.tiles, self.m, self.k, self.pattern, self.dtype, cupy)
            return rows.view(np.int8) if self.dtype is INT8 else rows


def workspace_bytes(m: int, packed: PackedWeight | DeviceWeight, out_dtype: Any) -> int:
    """Bytes of a workspace with which `matmul` of m tokens allocates nothing."""
    return to_device(packed).workspace_bytes(whole_number("m", m, 0), FLOATS[float_dtype("out_dtype", out_dtype)])


def matmul(
    x: Any,
    packed: PackedWeight | DeviceWeight,
    bias: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
    workspace: Any = None,
) -> Any:
    """x @ w.T + bias where x lives; arguments and errors as `slidesparse_nb.matmul` has them.

    Args:
        x: [..., k] array on a GPU, or QuantizedActivations of one.
        workspace: at least `workspace_bytes`, 16-byte aligned, of any content; used by one stream at a time. With it, and
            `out`, nothing is allocated, unless x or out has strides that need a copy, or x is quantized for another pattern.
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
    weight = to_device(packed, ordinal)
    n, k = weight.shape
    scale_x = None
    ready = False  # x is the operand
    if quantized:
        lead, source = given.lead, float_dtype("x.source", given.source)
        if isinstance(given, TiledActivations):
            ready = weight.operand.tiled and given.pattern == weight.pattern
            x = x if ready else given.rows()  # for this call, and in its stream: not kept
        scale_x = None if given.scale is None else as_cupy("x.scale", given.scale)
        given.check(weight, None if ready else x, scale_x)
        m, name = given.m, weight.dtype.name
    else:
        check_activations(x, k)
        lead, source, name = x.shape[:-1], x.dtype, FLOATS[x.dtype]
        if x.ndim != 2:
            x = x.reshape(math.prod(lead), k)
        m = x.shape[0]
    y, out_name = _result((*lead, n), source, out, out_dtype)
    bias = None if bias is None else as_cupy("bias", bias)
    workspace = None if workspace is None else as_cupy("workspace", workspace)
    if out is not None:
        require_own_memory(y, (("x", x), ("x.scale", scale_x), ("bias", bias), ("workspace", workspace)))
    bias_type, bias = (0, None) if bias is None else _bias(bias, n)
    if m == 0 or n == 0:
        return y if out is None else out
    unquantized = not quantized and weight.quantizes(m, out_name, name, x.strides, x.data.ptr)
    bound = weight.bound(m, out_name, True) if unquantized else weight.plans.get((m, out_name)) or weight.bound(m, out_name)
    plan = bound.plan
    if ready:
        _check_tiles(x, plan)
    write = None if ready or unquantized else weight.writer(name, x.strides, x.data.ptr)

    # scratch: the workspace, or memory of its own, which the pool takes back on this stream
    address = cupy.cuda.get_current_stream().ptr
    start = plan.parts_at if write is None else 0
    base = 0
    if workspace is not None:
        base = _check_workspace(workspace, plan)
    elif plan.bytes > start:
        memory = cupy.cuda.alloc(plan.bytes - start)
        base = memory.ptr - start
    operand, pitch, scale = x.data.ptr, x.strides[0], 0 if scale_x is None else scale_x.data.ptr
    if write is not None:
        operand, pitch, scale = base, plan.operand.pitch, scale or (base + plan.scale_at if weight.scaled else 0)
        write(m, address, x.data.ptr, operand, scale)
    rows_y = y if y.ndim == 2 and (y.strides[1] == y.itemsize or n == 1) else _rows(y, m, n)
    y_pitch, bias_at = rows_y.strides[0] // rows_y.itemsize, 0 if bias is None else bias.data.ptr
    weight.multiply(bound, operand, pitch, scale, rows_y.data.ptr, y_pitch, base, address, bias_at, bias_type)
    if rows_y is not y and rows_y.data.ptr != y.data.ptr:
        y[...] = rows_y.reshape(y.shape)
    return y if out is None else out


def quantize(
    x: Any,
    pattern: Pattern,
    dtype: DType,
    packed: PackedWeight | DeviceWeight | None = None,
    stream: Any = None,
    before: Before | None = None,
) -> tuple[QuantizedActivations, Any]:
    """x [..., k] on a GPU, or what is made of it before, quantized once for several products; `slidesparse_nb.quantize`.

    Args:
        packed: weights that it will be multiplied by, if they are known.

    Returns:
        That, and the sum of x and `before`'s residual, None without one.
    """
    ordinal = device_of(x)
    if ordinal != cupy.cuda.runtime.getDevice():
        with cupy.cuda.Device(ordinal):
            return quantize(x, pattern, dtype, packed, stream, before)
    if stream is not None:
        with as_stream(stream):
            return quantize(x, pattern, dtype, packed, None, before)
    x, known, kept = as_cupy("x", x), None if packed is None else packed.k, None
    if before is None:
        check_activations(x, known)
        k = x.shape[-1]
    else:
        before = _on(ordinal, before)
        k = before.check(x, known)
    if packed is not None:
        form = to_device(packed, ordinal).operand
    else:
        scheme = Scheme.of(dtype)
        form = for_capability(device_facts(ordinal)[0], scheme=scheme).operand(pattern, k, scheme)
    if not form.tiled:  # the values as they are: `matmul` lifts them for a kernel that does not
        form = Operand(False, None, k * dtype.bits // 8)
    lead, source = x.shape[:-1], x.dtype
    flat = x if x.ndim == 2 else x.reshape(math.prod(lead), x.shape[-1])
    m, scaled = len(flat), Scheme.of(dtype).scaled
    values = cupy.empty(*_shape(form, m, k, pattern, dtype))
    scale = cupy.empty((m, 1), np.float32) if scaled else None
    stream, to = cupy.cuda.get_current_stream().ptr, (values.data.ptr, 0 if scale is None else scale.data.ptr)
    written = False
    if before is not None:
        written, kept = _fused(flat, before, form, ordinal, k, dtype, stream, to)
        if not written:
            flat, kept = before(flat)
        kept = None if kept is None else kept.reshape(x.shape)
    if not written and m and (values.size or scaled):
        address, name = flat.data.ptr, FLOATS[source]
        write = writer(ordinal, form, k, dtype, name, flat.strides, address % 16)
        if write is None:  # x is such rows already, which the caller may change
            write = rows_writer(ordinal, k, name, dtype, flat.strides, form.pitch, 0)
        write(m, stream, address, *to)
    if form.tiled:
        return TiledActivations(values, pattern, k, scale, lead, dtype, source), kept
    return QuantizedActivations(values[:, :k], scale, lead, dtype, source), kept


def _shape(form: Operand, m: int, k: int, pattern: Pattern, dtype: DType) -> tuple[tuple[int, ...], Any]:
    """Shape and type of the array that holds the operand of m tokens."""
    if form.tiled:
        return (stages(pattern, k, dtype), -(-m // 8), 8, STAGE), np.uint8
    return (m, form.pitch * 8 // dtype.bits), np.int8 if dtype is INT8 else dtype.raw


def _on(ordinal: int, before: Before) -> Before:
    """With operands that are CuPy arrays on that GPU."""
    views = {name: as_cupy(name, a) for name in ("gamma", "residual") if (a := getattr(before, name)) is not None}
    for name, view in views.items():
        if view.data.device_id != ordinal:
            raise OperandError(f"{name}: is on GPU {view.data.device_id}, but x is on GPU {ordinal}; move it there")
    return replace(before, **views)


def _fused(
    x: Any, before: Before, form: Operand, ordinal: int, k: int, dtype: DType, stream: int, to: tuple[int, int]
) -> tuple[bool, Any]:
    """Whether one launch did all of it to x [m, k or 2k]; and the sum, if there is one. `to`: where values and scales go."""
    m, (pitch, step) = len(x), x.strides
    others = [a for a in (before.residual, before.gamma) if a is not None]
    whole = x.dtype.itemsize == 2 and m and step == 2 and x.data.ptr % 16 == pitch % 16 == 0
    if not whole or not all(a.flags.c_contiguous and a.data.ptr % 16 == 0 for a in others):
        return False, None
    kind = "add_rms_norm" if before.residual is not None else before.kind
    write = fused_writer(ordinal, form, k, dtype, FLOATS[x.dtype], pitch, kind)
    if write is None:
        return False, None
    kept, normed = None if before.residual is None else cupy.empty((m, k), x.dtype), before.kind == "rms_norm"
    given = (x, before.residual, before.gamma, kept) if normed else (x,)
    addresses = (0 if a is None else a.data.ptr for a in given)
    write(m, stream, *addresses, *to, *(norm_numbers(before.epsilon, k) if normed else ()))
    return True, kept


# ---- operands --------------------------------------------------------------------------------------------------------


def _check_tiles(tiles: Any, plan: Plan) -> None:
    if tiles.nbytes != plan.scale_at or tiles.dtype != np.uint8 or tiles.data.ptr % 16 or not tiles.flags.c_contiguous:
        rule = f"must be {plan.scale_at} contiguous, 16-byte aligned bytes; make x with quantize(x, packed)"
        raise OperandError(f"x.tiles: {tiles.dtype} {tiles.shape} {rule}")


def _result(shape: tuple[int, ...], source: np.dtype[Any], out: Any, out_dtype: Any) -> tuple[Any, str]:
    """`out` as a CuPy array, checked, or a new one; and the name of its type."""
    y = None if out is None else as_cupy("out", out)
    dtype = result_dtype(shape, source, y, out_dtype)
    return cupy.empty(shape, dtype) if y is None else y, FLOATS[dtype]


def _rows(y: Any, m: int, n: int) -> Any:
    """y as [m, n] with neighbouring columns, for the kernel to write; new memory where y's strides are not like that."""
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
