"""What a problem needs, made once and shared by all weights of that problem: launches, kernels, the parts of a workspace.

    x [m, k] --operand writer--> operand, scale_x --launches of a plan--> y [m, n]

Everything here is addresses, integers and streams; no array is seen.
"""

from __future__ import annotations

import functools
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import cupy

from .. import arch, env
from ..arch import Config
from ..arch.operand import Operand
from ..core.dtypes import CUDA_CODES, DType
from ..core.problem import GemmProblem
from ..core.scheme import Scheme
from ..errors import UnsupportedError
from . import quantize
from .jit import cache as jit
from .launch import Launcher

COUNTERS = 4096
"""Output tiles of a launch whose k may be split, at most."""

COUNTER_SETS = 64
"""Streams of a device for which counters are made at a time."""

GIVEN = ("x", "x_pitch", "scale_x", "bias", "bias_type", "y", "y_pitch", "parts", "arrived", "derived")
"""What a call gives to whatever kernel, by parameter or buffer, after the addresses of the weight's buffers."""

Launch = Callable[[int, tuple[int, ...]], None]
"""Launches a kernel of a plan for weights with buffers of the same names: (stream, their addresses, then what GIVEN names)."""

Writer = Callable[..., None]
"""Launches the kernel that writes an operand: (m, stream, x, operand, scale), addresses but m. For `quantize.KINDS` x is
followed by what else the kernel reads and keeps, and scale by more integers."""

ROWS_KERNEL, ROWS_THREADS = "common/rows.cu", 256
ROWS_PARAMETERS = {
    "x": "address", "row_step": "integer", "step": "integer", "k": "integer", "out": "address", "columns": "integer",
}  # fmt: skip
"""Of the kernel, in its order."""


@functools.cache
def device_facts(ordinal: int) -> tuple[tuple[int, int], int, str]:
    """Compute capability, SMs and name."""
    properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    name = properties["name"]
    capability = properties["major"], properties["minor"]
    return capability, properties["multiProcessorCount"], name.decode(errors="replace") if isinstance(name, bytes) else name


# ---- the product -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedLaunch:
    """One launch of a plan.

    Attributes:
        parameters: the kernel's, in its order.
        fixed: the arguments that the problem fixes, by parameter.
        buffers: the buffers that it takes, of the weight or "derived": parameter -> buffer.
    """

    run: Callable[..., None]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    programmatic: bool
    parameters: tuple[str, ...]
    fixed: Mapping[str, int]
    buffers: Mapping[str, str]

    def bind(self, names: tuple[str, ...]) -> Launch:
        """For weights with buffers of these names."""
        ordered = _places(self.parameters, tuple(self.buffers.items()), (*self.fixed, *names, *GIVEN))
        fixed = tuple(self.fixed.values())
        run, grid, block, shared, programmatic = self.run, self.grid, self.block, self.shared, self.programmatic

        def launch(stream: int, given: tuple[int, ...]) -> None:
            run(grid, block, shared, stream, programmatic, *ordered(fixed + given))

        return launch


@functools.cache
def _places(parameters: tuple[str, ...], buffers: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> Any:
    """What takes the arguments of a kernel, in its order, from values of these names."""
    held = dict(buffers)
    return itemgetter(*(names.index(held.get(name, name)) for name in parameters))


class Plan:
    """How a problem is computed on one device.

    Attributes:
        configs, launches: one after the other.
        scale_at, parts_at, derived_at, bytes: offsets into a workspace, which starts with the operand; and its size. A product
            of a finished operand needs what follows `parts_at` only.
        part_bytes: of partial sums; 0 where no k is split through memory, and no counters are needed.
        derived_bytes: of the buffer that the first launch derives from the weight's; 0 where none does.
    """

    def __init__(self, problem: GemmProblem, configs: tuple[Config, ...], ordinal: int) -> None:
        self.problem, self.configs, self.ordinal = problem, configs, ordinal
        self.part_bytes = max(config.part_bytes(problem) for config in configs)
        self.derived_bytes = max(config.derived_bytes(problem) for config in configs)
        self.operand = arch.of(problem).operand(problem.pattern, problem.k, problem.scheme)
        self.launches = tuple(self._launch(config) for config in configs)
        self.scale_at = self.operand.bytes(problem.m)
        self.parts_at = self.scale_at + _lines(4 * problem.m)
        self.derived_at = self.parts_at + _lines(self.part_bytes)
        self.bytes = self.derived_at + self.derived_bytes

    def _launch(self, config: Config) -> PlannedLaunch:
        problem = self.problem
        if config.counters(problem) > COUNTERS:
            raise AssertionError(config)
        fixed = {"m": problem.m, "n": problem.n, "k": problem.k, "x_bytes": self.operand.row_bytes, **config.arguments(problem)}
        grid, threads, shared = config.grid(problem), config.threads, config.shared_bytes
        defines, parameters = tuple(config.defines().items()), tuple(config.parameters)
        target = jit.architecture(problem.device.capability) + config.suffix
        run, built = _kernel(self.ordinal, config.source, defines, target, shared, tuple(config.parameters.values()))
        if env.debug():
            print(
                f"slidesparse_nb: {problem}\n  config  {config}\n  source  {built.folder / 'kernel.cu'}\n"
                f"  launch  grid {grid} x {threads} threads, {shared} bytes shared, {built.registers} registers",
                file=sys.stderr,
            )
        buffers = {**config.buffers, "scale_w": "scale"}
        return PlannedLaunch(run, grid, (threads, 1, 1), shared, config.early(problem), parameters, fixed, buffers)


def _lines(size: int) -> int:
    """Bytes of whole cache lines."""
    return -(-size // 128) * 128


plan_of = functools.lru_cache(maxsize=4096)(Plan)
"""The plan of a problem, its launches and a device: one for all weights."""


def compiled(config: Config, capability: tuple[int, int]) -> jit.Built:
    """The kernel of a launch, from the cache or compiled now."""
    return jit.build(config.source, config.defines(), jit.architecture(capability) + config.suffix, jit.device_compiler())


@functools.cache
def _kernel(
    ordinal: int, source: str, defines: tuple[tuple[str, int | str], ...], target: str, shared: int, types: tuple[str, ...]
) -> tuple[Launcher, jit.Built]:
    """A kernel, named as its source, on the current device, `ordinal`, with `shared` bytes of dynamic shared memory.

    Cached: to find one in the cache folder takes most of a millisecond.
    """
    built = jit.build(source, dict(defines), target, jit.device_compiler())
    raw = jit.load(built, Path(source).stem)
    if shared > 48 << 10:
        raw.max_dynamic_shared_size_bytes = shared
    return Launcher(raw.kernel, types), built


# ---- counters of split tiles -----------------------------------------------------------------------------------------


class Counters:
    """Zeros for the tiles of a device whose k is split; a launch leaves zeros. Launches of one stream share a set.

    Sets are made ahead, so that none is allocated while a CUDA graph is captured.
    """

    def __init__(self) -> None:
        self._sets: dict[int, int] = {}
        self._memory: list[Any] = []
        self._lock = threading.Lock()

    def reserve(self) -> None:
        """Make sets for `COUNTER_SETS` more streams of the current device."""
        self._memory.append(cupy.zeros(COUNTER_SETS * COUNTERS, "uint32"))
        cupy.cuda.get_current_stream().synchronize()  # other streams may use them from now on

    def of(self, stream: int) -> int:
        """The address of a stream's set."""
        if (known := self._sets.get(stream)) is None:
            with self._lock:  # or two threads would give their streams one set
                if (known := self._sets.get(stream)) is None:
                    number = len(self._sets)
                    if number == COUNTER_SETS * len(self._memory):
                        self.reserve()
                    start = self._memory[number // COUNTER_SETS].data.ptr
                    known = self._sets[stream] = start + 4 * COUNTERS * (number % COUNTER_SETS)
        return known


@functools.cache
def counters(ordinal: int) -> Counters:
    """Those of a device, which is the current one."""
    made = Counters()
    made.reserve()
    return made


# ---- the operand -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def writer(
    ordinal: int, form: Operand, k: int, dtype: DType, source: str, strides: tuple[int, int], offset: int
) -> Writer | None:
    """The launch that makes an operand of x [m, k] on the current device, `ordinal`, for any m; None if x is one as it stands.

    Args:
        source: name of x's type; that of the weights' where x is quantized already.
        strides: of x, in bytes.
        offset: of its address, modulo 16.
    """
    if form.tiled or form.block or (Scheme.of(dtype).scaled and source != dtype.name):
        return _quantizer(ordinal, form, k, dtype, source, strides, offset == 0)
    loadable = offset == 0 and form.row_bytes % 16 == strides[0] % 16 == 0 and strides[1] == dtype.bits // 8
    if form.lift is None and source == dtype.name and loadable:
        return None
    return rows_writer(ordinal, k, source, dtype, strides, form.pitch, form.lift.group if form.lift else 0)


@functools.lru_cache(maxsize=1024)
def fused_writer(ordinal: int, form: Operand, k: int, dtype: DType, source: str, pitch: int, kind: str) -> Writer | None:
    """The launch that does `kind` to rows of `pitch` bytes, 16-byte aligned, and makes an operand of it; None if none does."""
    try:
        return _quantizer(ordinal, form, k, dtype, source, (pitch, Scheme.of(source).dtype.bits // 8), True, kind)
    except UnsupportedError:
        return None


def _quantizer(
    ordinal: int, form: Operand, k: int, dtype: DType, source: str, strides: tuple[int, int], aligned: bool, kind: str = ""
) -> Writer:
    width, newest = None if form.tiled else form.pitch, quantize.architecture(ordinal)
    capability, sms, _ = device_facts(ordinal)
    tried = form.tiled and capability in {capability for _, capability in arch.RAN}  # elsewhere blocks stay as they are
    asked = source, dtype.name, k, strides, aligned, newest, form.lift, form.block
    found = quantize.plans(*asked, width=width, kind=kind, shared=tried)
    loaded = [(most, launch, launch.kernel.on(ordinal, quantize.APART if tried else launch.shared)) for most, launch in found]
    *few, (_, whole, run_whole) = loaded

    @functools.lru_cache(maxsize=1024)
    def launch_for(m: int) -> tuple[Launcher, tuple[Any, ...], tuple[int, ...]]:
        launch, run = next(((launch, run) for most, launch, run in few if m <= most), (whole, run_whole))
        shared = launch.shared_for(m, sms) if tried else launch.shared
        return run, ((launch.blocks(m), 1, 1), (launch.threads, 1, 1), shared), launch.integers(m)

    programmatic = whole.kernel.programmatic

    def write(m: int, stream: int, *arguments: int) -> None:
        run, shape, integers = launch_for(m)
        run(*shape, stream, programmatic, *arguments, *integers)

    return write


@functools.lru_cache(maxsize=1024)
def norm_numbers(epsilon: float, k: int) -> tuple[int, int]:
    """What a norm's writer takes: the bits of both as float32."""
    first, second = struct.unpack("II", struct.pack("ff", epsilon, k))
    return first, second


def rows_writer(ordinal: int, k: int, source: str, dtype: DType, strides: tuple[int, int], pitch: int, lift: int) -> Writer:
    """Copies x [m, k] to rows of `pitch` bytes, 16-byte aligned, of the weights' type, lifted by groups of `lift` columns."""
    columns, size = pitch * 8 // dtype.bits, _bytes(source)
    run, ordered = _rows_kernel(ordinal, source, dtype.name, lift), itemgetter(*ROWS_PARAMETERS)
    blocks = max(1, min(64, -(-columns // ROWS_THREADS)))
    fixed = {"row_step": strides[0] // size, "step": strides[1] // size, "k": k, "columns": columns}

    def write(m: int, stream: int, x: int, operand: int, scale: int) -> None:
        run((m, blocks, 1), (ROWS_THREADS, 1, 1), 0, stream, False, *ordered({"x": x, "out": operand, **fixed}))

    return write


def _bytes(name: str) -> int:
    return 4 if name == "float32" else Scheme.of(name).dtype.bits // 8


@functools.cache
def _rows_kernel(ordinal: int, held_as: str, stored: str, lift: int) -> Launcher:
    defines = {"FROM": CUDA_CODES[held_as], "TO": CUDA_CODES[stored], "LIFT": lift, "THREADS": ROWS_THREADS}
    target = jit.architecture(device_facts(ordinal)[0])
    built = jit.build(ROWS_KERNEL, defines, target, jit.device_compiler())
    return Launcher(jit.load(built, "rows").kernel, ROWS_PARAMETERS.values())
