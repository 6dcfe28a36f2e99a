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

from .. import env
from ..arch import Config, as_multiplied, for_capability, sm90
from ..dtypes import CUDA_CODES, FLOATS, DType
from ..packed import PackedWeight
from . import activations, jit
from .driver import unusable
from .launch import Launcher
from .tuned import Product

COUNTERS = 4096
"""Tiles whose k may be split, at most; so many counters stand at the start of a workspace."""

MOST_PLANS = 1024
"""Shapes that a weight, and kinds of x that a shape, remembers: a server may see any number of them."""

PROGRAMMATIC_TOKENS = 512
"""Up to so many tokens a product may start while the kernel before it ends. Blocks that take the place of a quantization's, as
these leave, are spread over the processors at random; those that share activations are then apart, L2 serves them one by
one, and the product takes up to half as long again (docs/hopper.md)."""

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
        pattern, k: as the kernel sees them: of the slid weight, if the pattern is lifted in memory.
        arranged: what the kernels load: uint8, see arch/sm80_layout.py; or `sm90.Arranged`.
        scale: float32 [n], or None.
    """

    def __init__(self, packed: PackedWeight, ordinal: int) -> None:
        self.capability, self.sms, self.gpu = device_facts(ordinal)
        self.ordinal = ordinal
        self.family = for_capability(self.capability)
        self.family.require_support(self.capability, packed.dtype)
        packed.check_shapes()
        self.packed = packed
        self.pattern, self.k = as_multiplied(self.family, packed.pattern, packed.k)
        self.lifted = self.pattern != packed.pattern
        with cupy.cuda.Device(ordinal):
            values, meta = (cupy.asarray(a) for a in (packed.values.view(packed.dtype.raw), packed.meta))
            there = PackedWeight(values, meta, None, self.pattern, (packed.n, self.k), packed.dtype)
            self.arranged = self.family.arrange(there, cupy)
            self.scale = None if packed.scale is None else cupy.asarray(packed.scale).reshape(-1)
            cupy.cuda.get_current_stream().synchronize()  # other streams may use it from now on
        self.plans: dict[tuple[int, str], Plan] = {}
        self._words: Any = None

    @property
    def operand(self) -> int:
        """Address of what every kernel of the family loads first."""
        data = self.arranged.values if self.family is sm90 else self.arranged
        return int(data.data.ptr)

    def index(self, codes: bool) -> int:
        """Address of the codes, or of the index words, which are made of the codes when they are first wanted. sm_90."""
        if codes == self.arranged.codes:
            return int(self.arranged.index.data.ptr)
        if self._words is None:
            self._words = sm90.expand(self.arranged.index, self.pattern, self.packed.dtype, cupy)
            cupy.cuda.get_current_stream().synchronize()  # other streams may use it from now on
        return int(self._words.data.ptr)

    def product(self, m: int, out: str) -> Product:
        """What a plan for m tokens and the type named `out` computes."""
        where = (self.family, self.capability, self.sms, self.gpu)
        return Product(m, self.packed.n, self.k, self.pattern, self.packed.dtype, out, *where)

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
        image: the kernel's operand is an image (`sm90.image`), not rows.
        row_pitch, x_bytes: of rows: bytes from one to the next where they are made here, and those that hold k columns.
        operand_at, scale_at, parts_at, bytes: offsets into the workspace, which starts with the counters.
        feeds: by type, strides and alignment of x: what makes the operand; None if x is one as it stands.
    """

    def __init__(self, weight: DeviceWeight, m: int, out: str, configs: tuple[Config, ...] | None = None) -> None:
        packed = weight.packed
        size, family = packed.dtype.bits // 8, weight.family
        self.configs = configs or weight.product(m, out).best()
        if family is sm90 and not weight.arranged.codes:
            self.configs = tuple(c.with_words() if isinstance(c, sm90.Config) else c for c in self.configs)
        self.m, self.weight, self.out = m, weight, out
        self.image = family is sm90
        self.x_bytes = weight.k * size
        self.row_pitch = -(-self.x_bytes // 16) * 16
        self.quantizes = packed.dtype.qmax is not None
        self.part_bytes = 0
        operand_bytes = m * self.row_pitch
        if self.image:
            operand_bytes = sm90.image_bytes(m, weight.k, weight.pattern, packed.dtype)
        self.launches = tuple(self._matrix_launch(config) for config in self.configs)
        self.operand_at = 4 * COUNTERS
        self.scale_at = self.operand_at + operand_bytes
        self.parts_at = self.scale_at + -(-4 * m // 16) * 16
        self.bytes = self.parts_at + -(-self.part_bytes // 16) * 16
        self.feeds: dict[tuple[Any, ...], Feed | None] = {}

    def _matrix_launch(self, config: Config) -> MatrixLaunch:
        weight, m, n = self.weight, self.m, self.weight.packed.n
        pattern, dtype = weight.packed.pattern, weight.packed.dtype
        fixed = {"scale_w": 0 if weight.scale is None else weight.scale.data.ptr, "m": m, "n": n, "x_bytes": self.x_bytes}
        if isinstance(config, sm90.Config):
            if not config.possible(sm90.stages(weight.pattern, weight.k, dtype)):
                raise AssertionError(config)
            grid, programmatic = config.grid(), m <= PROGRAMMATIC_TOKENS or config.order == sm90.REST
            fixed |= {"values": weight.operand, "index": weight.index(config.windows > 0)}
            fixed |= {"first_strip": config.strips[0], "last_strip": config.strips[1], "begin": config.begin, "end": config.end}
            fixed |= {"order": config.order, "band": config.band, "stages": sm90.stages(weight.pattern, weight.k, dtype)}
        else:
            if config.counters(m, n) > COUNTERS:
                raise AssertionError(config)
            grid, programmatic = config.grid(m, n), False
            fixed |= {"weights": weight.operand, "blocks": config.layout.blocks(weight.k)}
            self.part_bytes = config.part_bytes(m, n)
        arch = jit.architecture(weight.capability) + weight.family.SUFFIX
        defines = tuple(config.defines().items())
        parameters = weight.family.PARAMETERS
        types = tuple(parameters.values())
        run, built = _matrix_kernel(weight.ordinal, weight.family.KERNEL, defines, arch, config.shared_bytes, types)
        if env.debug():
            print(
                f"slidesparse_nb: y[{m}, {n}] = x[{m}, {weight.k}] @ w.T, {pattern.described} {dtype} -> {self.out}\n"
                f"  config  {config}\n  source  {built.folder / 'kernel.cu'}\n"
                f"  launch  grid {grid} x {config.threads} threads, {config.shared_bytes} bytes shared,"
                f" {built.registers} registers",
                file=sys.stderr,
            )
        block = config.threads, 1, 1
        return MatrixLaunch(run, grid, block, config.shared_bytes, programmatic, fixed, itemgetter(*parameters))

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
        weight, k = self.weight, x.shape[1]
        dtype, pattern = weight.packed.dtype, weight.packed.pattern
        held_as = dtype.name if quantized else FLOATS[x.dtype]
        generation, aligned = activations.generation(weight.ordinal), activations.aligned(x)
        if self.image:
            return self._numba_feed(activations.plan(held_as, dtype.name, k, x.strides, aligned, generation, pattern))
        if self.quantizes and not quantized:
            lift = pattern if weight.lifted else None
            width = self.row_pitch
            return self._numba_feed(activations.plan(held_as, dtype.name, k, x.strides, aligned, generation, lift, width=width))
        if not weight.lifted and held_as == dtype.name and aligned and _loadable(x, self.x_bytes):
            return None
        return rows_feed(weight.ordinal, x, held_as, dtype, self.row_pitch, pattern.group if weight.lifted else 0)

    def _numba_feed(self, launch: activations.Launch) -> Feed:
        kernel, grid, block, shared = launch.kernel, (launch.blocks(self.m), 1, 1), (launch.threads, 1, 1), launch.shared
        run, programmatic, integers = kernel.on(self.weight.ordinal, shared), kernel.programmatic, launch.integers(self.m)

        def feed(stream: int, x: int, operand: int, scale: int) -> None:
            run(grid, block, shared, stream, programmatic, x, operand, scale, *integers)

        return feed


@functools.cache
def _matrix_kernel(
    ordinal: int, source: str, defines: tuple[tuple[str, int | str], ...], arch: str, shared: int, parameters: tuple[str, ...]
) -> tuple[Launcher, jit.Built]:
    """A matrix kernel on the current device, `ordinal`, with so many bytes of dynamic shared memory.

    Remembered: to find one in the cache folder takes most of a millisecond, and every shape of every weight asks for it.
    """
    built = jit.build(source, dict(defines), arch, jit.device_compiler())
    raw = jit.load(built, "gemm")
    if shared > 48 << 10:
        raw.max_dynamic_shared_size_bytes = shared
    return Launcher(raw.kernel, parameters), built


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
    arch = jit.architecture(device_facts(ordinal)[0])
    built = jit.build(ROWS_KERNEL, defines, arch, jit.device_compiler())
    return Launcher(jit.load(built, "rows").kernel, ROWS_PARAMETERS.values())
