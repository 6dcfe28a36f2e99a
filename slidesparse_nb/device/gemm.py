"""y = x @ w.T on the GPU: the weights arranged once, a configuration chosen once a shape, then two launches a call.

    x [m, k] --quantize (8-bit weights), or copy if its rows are not 16-byte aligned--> rows --gemm--> y [m, n]
    x [m, k] --quantize (8-bit weights)--> rows --slide, swizzle--> image --gemm--> y [m, n]                     on sm_90

Everything that depends on the shape alone is in a Plan and made on the first call; a later call looks it up, finds memory for
what lies between the kernels, and launches. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import cupy
import numpy as np

from .. import env
from ..arch import for_capability, sm80, sm90
from ..dtypes import CUDA_CODES, DType
from ..errors import OperandError
from ..packed import PackedWeight, QuantizedActivations
from ..pattern import Pattern
from . import activations, jit
from .arrays import FLOATS, as_cupy, as_stream, float_name
from .launch import Launcher

COUNTERS = 4096
"""Tiles whose k may be split, at most; so many counters stand at the start of a workspace."""

ROWS_KERNEL = "common/rows.cu"

Config = sm80.Config | sm90.Config


@functools.cache
def _device_facts(ordinal: int) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors."""
    properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    return (properties["major"], properties["minor"]), properties["multiProcessorCount"]


@functools.cache
def _counters(ordinal: int, stream: int) -> Any:
    """Counters for the split tiles of launches on one stream, which follow each other: zeros, and left so."""
    return cupy.zeros(COUNTERS, np.uint32)


class DeviceWeight:
    """A packed weight on one device, arranged for its kernel.

    Attributes:
        packed: what it was made of.
        pattern, k: as the kernel sees them: of the slid weight, if the pattern is lifted in memory.
        arranged: uint8, see arch/sm80_layout.py.
        scale: float32 [n], or None.
    """

    def __init__(self, packed: PackedWeight, ordinal: int) -> None:
        self.capability, self.sms = _device_facts(ordinal)
        self.ordinal = ordinal
        self.family = for_capability(self.capability)
        self.family.require_support(self.capability, packed.dtype)
        packed.check_shapes()
        self.packed = packed
        self.lifted = self.family is sm80 and packed.pattern.group > sm80.LARGEST_GROUP
        self.pattern, self.k = (Pattern(2, 4), packed.ks) if self.lifted else (packed.pattern, packed.k)
        with cupy.cuda.Device(ordinal):
            values, meta = (cupy.asarray(a) for a in (packed.values.view(packed.dtype.raw), packed.meta))
            there = PackedWeight(values, meta, None, self.pattern, (packed.n, self.k), packed.dtype)
            self.arranged = self.family.arrange(there, cupy)
            self.scale = None if packed.scale is None else cupy.asarray(packed.scale).reshape(-1)
            cupy.cuda.get_current_stream().synchronize()  # other streams may use it from now on
        self.plans: dict[tuple[int, str], Plan] = {}

    def plan(self, m: int, out: str) -> Plan:
        """How to multiply m tokens into the type named `out`, on the current device, which is this weight's."""
        if (known := self.plans.get((m, out))) is None:
            known = self.plans[m, out] = Plan(self, m, out)
        return known


class Plan:
    """One shape of one weight: the configuration (the cheapest, unless one is given), its kernel, the parts of a workspace.

    Attributes:
        rows_bytes, row_pitch: of the quantized or copied x.
        scale_at, parts_at, image_at, bytes: offsets into the workspace, which starts with the counters.
        along_k: what the kernel is told of k.
    """

    def __init__(self, weight: DeviceWeight, m: int, out: str, config: Config | None = None) -> None:
        packed, n = weight.packed, weight.packed.n
        size, family = packed.dtype.bits // 8, weight.family
        if config is None:
            config = family.choose(m, n, weight.k, weight.pattern, packed.dtype, out, weight.capability, weight.sms)
        assert config is not None
        if config.counters(m, n) > COUNTERS:
            raise AssertionError(config)
        arch = jit.architecture(weight.capability) + family.SUFFIX
        built = jit.build(family.KERNEL, config.defines(), arch, jit.device_compiler())
        raw = jit.load(built, "gemm")
        if config.shared_bytes > 48 << 10:
            raw.max_dynamic_shared_size_bytes = config.shared_bytes
        self.config = config
        self.launch = Launcher(raw.kernel, 15 if family is sm80 else 14)
        self.programmatic = family is sm90 and sm90.PROGRAMMATIC
        self.grid, self.block = config.grid(m, n), (config.threads, 1, 1)
        self.shared = config.shared_bytes
        self.row_pitch = -(-weight.k * size // 16) * 16
        self.scale_at = 4 * COUNTERS + m * self.row_pitch
        self.parts_at = self.scale_at + -(-4 * m // 16) * 16
        self.part_bytes = config.part_bytes(m, n)
        self.image_at = self.parts_at + -(-self.part_bytes // 16) * 16
        self.image_bytes = 0
        if isinstance(config, sm90.Config):
            self.image_bytes = sm90.image_bytes(m, weight.k, weight.pattern, packed.dtype)
            self.along_k: tuple[int, ...] = (sm90.stages(weight.pattern, weight.k, packed.dtype), config.streamed)
        else:
            self.along_k = (config.layout.blocks(weight.k),)
        self.bytes = self.image_at + self.image_bytes
        self.quantizes = packed.dtype.qmax is not None
        self.x_bytes = weight.k * size
        if env.debug():
            print(
                f"slidesparse_nb: y[{m}, {n}] = x[{m}, {weight.k}] @ w.T, {packed.pattern.described} {packed.dtype} -> {out}\n"
                f"  config  {config}\n  source  {built.folder / 'kernel.cu'}\n"
                f"  launch  grid {self.grid} x {config.threads} threads, {self.shared} bytes shared,"
                f" {built.registers} registers",
                file=sys.stderr,
            )


def to_device(packed: PackedWeight, ordinal: int | None = None) -> DeviceWeight:
    """The packed weight arranged on a device (by default the current one), made on the first call and remembered.

    Raises:
        UnsupportedError: the device cannot multiply weights of this type.
        FormatError: the tensors of `packed` do not fit its shape.
    """
    if ordinal is None:
        ordinal = cupy.cuda.runtime.getDevice()
    weight: DeviceWeight | None = packed.arranged.get(ordinal)
    if weight is None:
        weight = packed.arranged.setdefault(ordinal, DeviceWeight(packed, ordinal))
    return weight


def workspace_bytes(m: int, packed: PackedWeight, out_dtype: Any) -> int:
    """Bytes of a workspace with which `matmul` of m tokens allocates nothing. Make it with cupy.zeros."""
    return to_device(packed).plan(m, FLOATS[np.dtype(out_dtype)]).bytes


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
            time. With it, and `out`, nothing is allocated, unless x or out has strides that need a copy.
    """
    given = x
    x = as_cupy("x", x.values if isinstance(x, QuantizedActivations) else x)
    ordinal = x.data.device_id
    if ordinal != cupy.cuda.runtime.getDevice():
        with cupy.cuda.Device(ordinal):
            return matmul(given, packed, bias, out, out_dtype, stream, workspace)
    if stream is not None:
        with as_stream(stream):
            return matmul(given, packed, bias, out, out_dtype, None, workspace)

    weight = packed.arranged.get(ordinal) or to_device(packed, ordinal)
    n, k = packed.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise OperandError(f"x: shape {x.shape} must be [..., {k}], the k of packed (not padded: matmul does that)")
    if isinstance(given, QuantizedActivations):
        lead, source, scale_x = given.lead, given.source, as_cupy("x.scale", given.scale)
        held_as = _check_quantized(given, x, scale_x, packed.dtype)
    else:
        lead, source, scale_x = x.shape[:-1], x.dtype, None
        held_as = FLOATS.get(source) or float_name("x", x)
        if x.ndim != 2:
            x = x.reshape(math.prod(lead), k)
    m = x.shape[0]
    y, name = _result((*lead, n), source, out, out_dtype)
    if out is not None:
        _no_overlap(y, x)
    bias_type, bias = _bias(bias, n)
    if m == 0 or n == 0:
        return y if out is None else out
    plan = weight.plans.get((m, name)) or weight.plan(m, name)
    rows_y = _rows(y, m, n)

    # what stands between the kernels: in the workspace, or in memory of its own
    if workspace is not None:
        workspace = _check_workspace(workspace, plan)
        parts, counters = workspace.data.ptr + plan.parts_at, workspace.data.ptr
    elif plan.part_bytes:
        held = cupy.empty(plan.part_bytes, np.uint8)
        parts, counters = held.data.ptr, _counters(ordinal, cupy.cuda.get_current_stream().ptr).data.ptr
    else:
        parts = counters = 0

    ready = plan.quantizes and scale_x is None
    if plan.image_bytes:
        x, made = _image(x, weight, plan, workspace, scale_x is not None)
        scale_x = made if scale_x is None else scale_x
        operand: tuple[int, ...] = (x.data.ptr,)
    else:
        if ready:
            x, scale_x = _quantized(x, weight, plan, workspace)
            held_as = packed.dtype.name
        if not ready and (weight.lifted or held_as != packed.dtype.name or not _loadable(x, plan.x_bytes)):
            x = _copied(x, held_as, weight, plan, workspace)
        operand = (x.data.ptr, x.strides[0], plan.x_bytes)
    plan.launch(
        plan.grid,
        plan.block,
        plan.shared,
        cupy.cuda.get_current_stream().ptr,
        plan.programmatic,
        *operand,
        weight.arranged.data.ptr,
        0 if scale_x is None else scale_x.data.ptr,
        0 if weight.scale is None else weight.scale.data.ptr,
        0 if bias is None else bias.data.ptr,
        bias_type,
        rows_y.data.ptr,
        rows_y.strides[0] // rows_y.itemsize,
        m,
        n,
        *plan.along_k,
        parts,
        counters,
    )
    if rows_y.data.ptr != y.data.ptr:
        y[...] = rows_y.reshape(y.shape)
    return y if out is None else out


def quantize(x: Any, dtype: DType, k: int | None = None) -> QuantizedActivations:
    """x [..., k] on a GPU, quantized once for several products; `slidesparse_nb.quantize`.

    Args:
        k: what its last dimension must be, if that is known.
    """
    x = as_cupy("x", x)
    float_name("x", x)
    if x.ndim == 0 or (k is not None and x.shape[-1] != k):
        raise OperandError(f"x: shape {x.shape} must be [..., {'k' if k is None else k}]")
    lead, source = x.shape[:-1], x.dtype
    with cupy.cuda.Device(x.data.device_id):
        values, scale = activations.quantize(x.reshape(math.prod(lead), x.shape[-1]), dtype)
    return QuantizedActivations(values[:, : x.shape[-1]], scale, lead, dtype, source)


# ---- operands --------------------------------------------------------------------------------------------------------


def _check_quantized(x: QuantizedActivations, values: Any, scale: Any, dtype: DType) -> str:
    """The name of the type, which is that of the weights."""
    if x.dtype != dtype:
        raise OperandError(f"x: is quantized to {x.dtype}, but packed holds {dtype}; quantize it with quantize(x, packed)")
    m = math.prod(x.lead)
    if values.ndim != 2 or values.shape[0] != m or values.dtype not in (dtype.numpy, dtype.raw):
        raise OperandError(f"x.values: {values.dtype} {values.shape} must be {dtype} or its bits, [{m}, k]")
    if scale.shape != (m, 1) or scale.dtype != np.float32 or not scale.flags.c_contiguous:
        raise OperandError(f"x.scale: {scale.dtype} {scale.shape} must be a contiguous float32 array ({m}, 1)")
    return dtype.name


def _result(shape: tuple[int, ...], source: Any, out: Any, out_dtype: Any) -> tuple[Any, str]:
    """`out` as a CuPy array, or a new one; and the name of its type."""
    if out is None:
        dtype = source if out_dtype is None else getattr(out_dtype, "numpy", None) or np.dtype(out_dtype)
        if dtype not in FLOATS:
            raise OperandError(f"out_dtype: {dtype} must be one of {', '.join(FLOATS.values())}")
        return cupy.empty(shape, dtype), FLOATS[dtype]
    y = as_cupy("out", out)
    name = float_name("out", y)
    if y.shape != shape or (out_dtype is not None and (getattr(out_dtype, "numpy", None) or np.dtype(out_dtype)) != y.dtype):
        raise OperandError(f"out: {y.dtype} {y.shape} must be {out_dtype or y.dtype} {shape}")
    return y, name


def _no_overlap(y: Any, x: Any) -> None:
    """Raise OperandError if y and x, both without gaps, share memory."""
    apart = x.data.ptr + x.nbytes <= y.data.ptr or y.data.ptr + y.nbytes <= x.data.ptr
    if not apart and y.flags.c_contiguous and x.flags.c_contiguous:
        raise OperandError("out: shares memory with x; pass an array of its own")


def _rows(y: Any, m: int, n: int) -> Any:
    """y as [m, n] with neighbouring columns, for the kernel to write; new memory where y's strides are not like that."""
    if y.ndim == 2 and (y.strides[1] == y.itemsize or n == 1):
        return y
    return y.reshape(m, n) if y.flags.c_contiguous else cupy.empty((m, n), y.dtype)


def _bias(bias: Any, n: int) -> tuple[int, Any]:
    """The code of its type, and the bias as the kernel reads it; 0 and None without one."""
    if bias is None:
        return 0, None
    bias = as_cupy("bias", bias)
    if bias.dtype == np.float64:
        bias = bias.astype(np.float32)
    if bias.shape != (n,) or bias.dtype not in FLOATS:
        raise OperandError(f"bias: {bias.dtype} {bias.shape} must be a float type, of shape ({n},)")
    return CUDA_CODES[FLOATS[bias.dtype]], bias if bias.flags.c_contiguous else cupy.ascontiguousarray(bias)


def _check_workspace(workspace: Any, plan: Plan) -> Any:
    workspace = as_cupy("workspace", workspace)
    if workspace.nbytes < plan.bytes or workspace.data.ptr % 16 or not workspace.flags.c_contiguous:
        raise OperandError(f"workspace: {workspace.nbytes} bytes must be at least {plan.bytes}, contiguous and 16-byte aligned")
    return workspace.view(np.uint8).reshape(-1)


# ---- rows of x -------------------------------------------------------------------------------------------------------


def _quantized(x: Any, weight: DeviceWeight, plan: Plan, workspace: Any) -> tuple[Any, Any]:
    """Values [m, row_pitch] and scales [m, 1] of float x."""
    values = scale = None
    m = x.shape[0]
    if workspace is not None:
        values = workspace[4 * COUNTERS : plan.scale_at].reshape(m, plan.row_pitch)
        scale = workspace[plan.scale_at : plan.scale_at + 4 * m].view(np.float32).reshape(m, 1)
    pattern = weight.packed.pattern if weight.lifted else None
    return activations.quantize(x, weight.packed.dtype, pattern=pattern, out=values, scale=scale)


def _loadable(x: Any, row_bytes: int) -> bool:
    """Whether the kernel can load x [m, k] as it stands: whole pieces of 16 bytes, 16-byte aligned, side by side."""
    return bool(x.data.ptr % 16 == 0 and row_bytes % 16 == 0 and x.strides[0] % 16 == 0 and x.strides[1] == x.itemsize)


def _copied(x: Any, held_as: str, weight: DeviceWeight, plan: Plan, workspace: Any) -> Any:
    """Rows of the weights' type that the kernel can load: 16-byte aligned, lifted if need be."""
    m, k = x.shape
    dtype = weight.packed.dtype
    if workspace is not None:
        rows = workspace[4 * COUNTERS : plan.scale_at].reshape(m, plan.row_pitch)
    else:
        rows = cupy.empty((m, plan.row_pitch), np.uint8)
    pitch = plan.row_pitch * 8 // dtype.bits
    kernel = _rows_kernel(weight.ordinal, held_as, dtype.name, weight.packed.pattern.group if weight.lifted else 0)
    steps = (stride // x.itemsize for stride in x.strides)
    grid, stream = (m, min(64, -(-pitch // 256)), 1), cupy.cuda.get_current_stream().ptr
    kernel(grid, (256, 1, 1), 0, stream, False, x.data.ptr, *steps, k, rows.data.ptr, pitch)
    return rows


@functools.cache
def _rows_kernel(ordinal: int, held_as: str, stored: str, lift: int) -> Any:
    defines = {"FROM": CUDA_CODES[held_as], "TO": CUDA_CODES[stored], "LIFT": lift}
    arch = jit.architecture(_device_facts(ordinal)[0])
    return Launcher(jit.load(jit.build(ROWS_KERNEL, defines, arch, jit.device_compiler()), "rows").kernel, 6)


def _image(x: Any, weight: DeviceWeight, plan: Plan, workspace: Any, quantized: bool) -> tuple[Any, Any]:
    """x [m, k], float or `quantized`, laid out for sm_90 (`sm90.image`); and scales [m, 1], if they are made here."""
    out = scale = None
    m = x.shape[0]
    if workspace is not None:
        out = workspace[plan.image_at : plan.bytes].reshape(plan.along_k[0], -1, 8, sm90.STAGE)
        if plan.quantizes and not quantized:
            scale = workspace[plan.scale_at : plan.scale_at + 4 * m].view(np.float32).reshape(m, 1)
    dtype = weight.packed.dtype
    return activations.image(x, dtype, weight.pattern, source=dtype if quantized else None, out=out, scale=scale)
