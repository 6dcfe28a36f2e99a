"""What is made once and looked up later: a weight arranged on a device, and for each shape a Plan of its product.

A plan holds the configuration, the kernel and the parts of a workspace; what depends on x's type and strides too is in one of
its feeds, which launch the kernel that makes the operand.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import cupy

from .. import arch, env
from ..arch import Config
from ..core.dtypes import CUDA_CODES, FLOATS, DType
from ..core.packed import PackedWeight
from ..core.problem import Device, GemmProblem
from . import quantize, tuned_store
from .driver import unusable
from .jit import cache as jit
from .launch import Launcher

COUNTERS = 4096
"""Tiles whose k may be split, at most; so many counters stand at the start of a workspace."""

MOST_PLANS = 1024
"""Shapes that a weight, and kinds of x that a shape, remembers: a server may see any number of them."""

ROWS_KERNEL, ROWS_THREADS = "common/rows.cu", 256
ROWS_PARAMETERS = {
    "x": "address", "row_step": "integer", "step": "integer", "k": "integer", "out": "address", "columns": "integer",
}  # fmt: skip
"""Of the kernel, in its order."""

Feed = Callable[[int, int, int, int], None]
"""Launches what makes the matrix kernel's operand: (stream, x, operand, scale), addresses all."""


@functools.cache
def device_facts(ordinal: int) -> tuple[tuple[int, int], int, str]:
    """Compute capability, multiprocessors and name."""
    properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    name = properties["name"]
    capability = properties["major"], properties["minor"]
    return capability, properties["multiProcessorCount"], name.decode(errors="replace") if isinstance(name, bytes) else name


class DeviceWeight:
    """A packed weight on one device, arranged for its kernel.

    Attributes:
        packed: what it was made of.
        arch: whose kernel multiplies it.
        operand: the layout of x.
        buffers: what the kernel loads, by name.
        scale: float32 [n], or None.
    """

    def __init__(self, packed: PackedWeight, ordinal: int) -> None:
        self.ordinal, self.device = ordinal, Device(*device_facts(ordinal))
        self.arch = arch.for_capability(self.device.capability, self.device.portable)
        arch.require_support(self.arch, self.device.capability, packed.dtype)
        packed.check_shapes()
        self.packed = packed
        self.operand = self.arch.operand(packed.pattern, packed.k, packed.dtype)
        with cupy.cuda.Device(ordinal):
            values, meta = (cupy.asarray(a) for a in (packed.values.view(packed.dtype.raw), packed.meta))
            there = PackedWeight(values, meta, None, packed.pattern, packed.shape, packed.scheme)
            self.buffers = self.arch.arrange(there, cupy)
            self.scale = None if packed.scale is None else cupy.asarray(packed.scale).reshape(-1)
            cupy.cuda.get_current_stream().synchronize()  # other streams may use it from now on
        self.plans: dict[tuple[int, str], Plan] = {}

    def address(self, buffer: str) -> int:
        """Of a buffer, which is made now if it was left out until a launch loads it."""
        if buffer not in self.buffers:
            made = self.arch.derive(buffer, self.buffers, self.packed, cupy)
            cupy.cuda.get_current_stream().synchronize()  # other streams may use it from now on
            self.buffers.setdefault(buffer, made)  # of two threads, both load the first's
        return int(self.buffers[buffer].data.ptr)

    def problem(self, m: int, out: str) -> GemmProblem:
        """What a plan for m tokens and the type named `out` computes."""
        packed = self.packed
        return GemmProblem(m, packed.n, packed.k, packed.pattern, packed.scheme, out, self.device)

    def plan(self, m: int, out: str) -> Plan:
        """How to multiply m tokens into the type named `out`, on the current device, which is this weight's."""
        if (known := self.plans.get((m, out))) is None:
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            known = self.plans[m, out] = Plan(self, m, out)
        return known


@dataclass(frozen=True)
class MatrixLaunch:
    """One launch of a matrix kernel.

    Attributes:
        fixed: arguments that a plan knows, by parameter; a call gives the others.
        ordered: of arguments by parameter, those of the kernel, in its order.
    """

    run: Launcher
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    programmatic: bool
    fixed: Mapping[str, int]
    ordered: Callable[[Mapping[str, int]], tuple[int, ...]]


class Plan:
    """One shape of one weight: the launches (tuned or the cheapest, unless given), their kernels, the parts of a workspace.

    Attributes:
        configs, launches: how the product is computed.
        row_pitch: bytes from one row of x to the next, where they are made here.
        operand_at, scale_at, parts_at, bytes: offsets into the workspace, which starts with the counters.
        feeds: by type, strides and alignment of x: what makes the operand; None if x is one as it stands.
    """

    def __init__(self, weight: DeviceWeight, m: int, out: str, configs: tuple[Config, ...] | None = None) -> None:
        self.m, self.weight, self.problem = m, weight, weight.problem(m, out)
        chosen = configs or tuned_store.best(self.problem)
        self.configs = tuple(weight.arch.fitted(config, weight.buffers) for config in chosen)
        self.row_pitch = weight.operand.pitch
        self.quantizes = weight.packed.scheme.activations.row_scale
        self.part_bytes = max(config.part_bytes(self.problem) for config in self.configs)
        self.launches = tuple(self._matrix_launch(config) for config in self.configs)
        self.operand_at = 4 * COUNTERS
        self.scale_at = self.operand_at + weight.operand.bytes(m)
        self.parts_at = self.scale_at + -(-4 * m // 16) * 16
        self.bytes = self.parts_at + -(-self.part_bytes // 16) * 16
        self.feeds: dict[tuple[Any, ...], Feed | None] = {}

    def _matrix_launch(self, config: Config) -> MatrixLaunch:
        weight, problem = self.weight, self.problem
        if config.counters(problem) > COUNTERS:
            raise AssertionError(config)
        fixed = {"m": problem.m, "n": problem.n, "x_bytes": weight.operand.row_bytes, **config.arguments(problem)}
        fixed |= {parameter: weight.address(buffer) for parameter, buffer in config.buffers.items()}
        fixed["scale_w"] = 0 if weight.scale is None else weight.scale.data.ptr
        own, defines, grid = weight.arch, tuple(config.defines().items()), config.grid(problem)
        target, types = jit.architecture(weight.device.capability) + own.suffix, tuple(own.parameters.values())
        run, built = _matrix_kernel(weight.ordinal, own.source, defines, target, config.shared_bytes, types)
        if env.debug():
            print(
                f"slidesparse_nb: {problem}\n  config  {config}\n  source  {built.folder / 'kernel.cu'}\n"
                f"  launch  grid {grid} x {config.threads} threads, {config.shared_bytes} bytes shared,"
                f" {built.registers} registers",
                file=sys.stderr,
            )
        early, block, ordered = config.early(problem), (config.threads, 1, 1), itemgetter(*own.parameters)
        return MatrixLaunch(run, grid, block, config.shared_bytes, early, fixed, ordered)

    def feed(self, x: Any, quantized: bool) -> Feed | None:
        """What makes the operand of x [m, k], or None; made once for each type, strides and alignment.

        Args:
            quantized: x holds values of the weights' type, or its bits, whatever its dtype.
        """
        key = (quantized or x.dtype, x.strides, x.data.ptr % 16)
        try:
            return self.feeds[key]
        except KeyError:
            if len(self.feeds) >= MOST_PLANS:
                self.feeds.clear()
            feed = self.feeds[key] = self._new_feed(x, quantized)
            return feed

    def _new_feed(self, x: Any, quantized: bool) -> Feed | None:
        weight, k, form = self.weight, x.shape[1], self.weight.operand
        dtype, lift = weight.packed.dtype, form.lift
        held_as = dtype.name if quantized else FLOATS[x.dtype]
        aligned = quantize.aligned(x)
        if form.tiled or (self.quantizes and not quantized):
            width, generation = None if form.tiled else form.pitch, quantize.generation(weight.ordinal)
            return self._numba_feed(quantize.plan(held_as, dtype.name, k, x.strides, aligned, generation, lift, width=width))
        if lift is None and held_as == dtype.name and aligned and _loadable(x, form.row_bytes):
            return None
        return rows_feed(weight.ordinal, x, held_as, dtype, form.pitch, lift.group if lift else 0)

    def _numba_feed(self, launch: quantize.Launch) -> Feed:
        kernel, grid, block, shared = launch.kernel, (launch.blocks(self.m), 1, 1), (launch.threads, 1, 1), launch.shared
        run, programmatic, integers = kernel.on(self.weight.ordinal, shared), kernel.programmatic, launch.integers(self.m)

        def feed(stream: int, x: int, operand: int, scale: int) -> None:
            run(grid, block, shared, stream, programmatic, x, operand, scale, *integers)

        return feed


@functools.cache
def _matrix_kernel(
    ordinal: int, source: str, defines: tuple[tuple[str, int | str], ...], target: str, shared: int, types: tuple[str, ...]
) -> tuple[Launcher, jit.Built]:
    """A matrix kernel on the current device, `ordinal`, with so many bytes of dynamic shared memory.

    Remembered: to find one in the cache folder takes most of a millisecond, and every shape of every weight asks for it.
    """
    built = jit.build(source, dict(defines), target, jit.device_compiler())
    raw = jit.load(built, "gemm")
    if shared > 48 << 10:
        raw.max_dynamic_shared_size_bytes = shared
    return Launcher(raw.kernel, types), built


def to_device(packed: PackedWeight, ordinal: int | None = None) -> DeviceWeight:
    """The packed weight arranged on a device (by default the current one), made on the first call and remembered.

    Raises:
        UnsupportedError: there is no such device, or it cannot multiply weights of this type.
        FormatError: the tensors of `packed` do not fit its shape.
    """
    try:
        ordinal = int(cupy.cuda.runtime.getDevice()) if ordinal is None else ordinal
        device_facts(ordinal)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise unusable(f"device {ordinal or 0}", error) from None
    weight: DeviceWeight | None = packed.arranged.get(ordinal)
    if weight is None:
        weight = packed.arranged.setdefault(ordinal, DeviceWeight(packed, ordinal))
    return weight


# ---- rows of x -------------------------------------------------------------------------------------------------------


def _loadable(x: Any, row_bytes: int) -> bool:
    """Whether the kernel can load x [m, k] as it stands: whole pieces of 16 bytes, 16-byte aligned, side by side."""
    return bool(x.data.ptr % 16 == 0 and row_bytes % 16 == 0 and x.strides[0] % 16 == 0 and x.strides[1] == x.itemsize)


def rows_feed(ordinal: int, x: Any, held_as: str, dtype: DType, pitch: int, lift: int) -> Feed:
    """Copies x [m, k] to rows of `pitch` bytes, 16-byte aligned, of the weights' type, lifted by groups of `lift` columns."""
    m, k = x.shape
    columns = pitch * 8 // dtype.bits
    run, ordered = _rows_kernel(ordinal, held_as, dtype.name, lift), itemgetter(*ROWS_PARAMETERS)
    grid = m, max(1, min(64, -(-columns // ROWS_THREADS))), 1
    row_step, step = (stride // x.itemsize for stride in x.strides)
    fixed = {"row_step": row_step, "step": step, "k": k, "columns": columns}

    def feed(stream: int, x: int, operand: int, scale: int) -> None:
        run(grid, (ROWS_THREADS, 1, 1), 0, stream, False, *ordered({"x": x, "out": operand, **fixed}))

    return feed


@functools.cache
def _rows_kernel(ordinal: int, held_as: str, stored: str, lift: int) -> Launcher:
    defines = {"FROM": CUDA_CODES[held_as], "TO": CUDA_CODES[stored], "LIFT": lift, "THREADS": ROWS_THREADS}
    target = jit.architecture(device_facts(ordinal)[0])
    built = jit.build(ROWS_KERNEL, defines, target, jit.device_compiler())
    return Launcher(jit.load(built, "rows").kernel, ROWS_PARAMETERS.values())
