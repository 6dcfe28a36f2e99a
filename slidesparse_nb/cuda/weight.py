"""DeviceWeight: a packed weight arranged for one GPU, and the entry for adapters, which takes addresses."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import cupy

from .. import arch, env
from ..arch import Config
from ..arch.multiplied_as import as_multiplied
from ..core.packed import PackedWeight, part_arrays, part_dtypes, require_matrix
from ..core.pattern import Pattern
from ..core.problem import Device, GemmProblem
from ..core.scheme import Scheme
from ..errors import OperandError
from . import self_test, tuned_store
from .ahead_of_time import compile_all, kernels_of
from .arrays import as_cupy
from .driver import unusable
from .jit import cache as jit
from .plan import (
    Launch,
    Plan,
    Writer,
    counters,
    device_facts,
    fused_writer,
    norm_numbers,
    plan_of,
    rows_writer,
    writer,
)

MOST_BOUND = 1024
"""Numbers of tokens, and kinds of x, that a weight remembers: a server may see any number of them."""


@functools.cache
def shared_plans(
    pattern: Pattern, scheme: Scheme, shape: tuple[int, int], device: Device, buffers: tuple[str, ...], ordinal: int
) -> dict[tuple[int, str, bool, bool, int], Bound]:
    """What `DeviceWeight.bind` remembers for all weights of which these are the same."""
    return {}


@dataclass(frozen=True)
class Bound:
    """A plan, and its launches for weights with buffers of the same names."""

    plan: Plan
    launches: tuple[Launch, ...]


class DeviceWeight:
    """A packed weight on one GPU, arranged for its kernel; nothing of the packed tensors is held.

    Attributes:
        most_unquantized: most tokens that a kernel may quantize itself.

    Args:
        pattern, scheme, shape: of the packed weight; shape is (n, k). The attribute `scheme` is what it is multiplied as.
        buffers: name -> CuPy array: what the architecture's kernels load, and "scale", float32 [n]. They are held.
        ordinal: number of the GPU, which must be the current one.

    Raises:
        UnsupportedError: the GPU cannot multiply weights of this type.
    """

    most_unquantized = arch.MOST_UNQUANTIZED

    def __init__(
        self, pattern: Pattern, scheme: Scheme, shape: tuple[int, int], buffers: Mapping[str, Any], ordinal: int
    ) -> None:
        scheme = scheme.kernel
        self.pattern, self.scheme, self.shape, self.ordinal = pattern, scheme, shape, ordinal
        self.dtype, self.scaled = scheme.dtype, scheme.scaled
        self.device = self_test.device_for(ordinal, pattern, scheme)
        self.arch = arch.for_capability(self.device.capability, self.device.portable, scheme)
        arch.require_support(self.arch, self.device.capability, scheme)
        self.operand = self.arch.operand(pattern, shape[1], scheme)
        self.buffers = dict(buffers)
        self.plans: dict[tuple[int, str], Bound] = {}
        self.unquantized: dict[tuple[int, str], Bound] = {}
        self._few: dict[tuple[int, str], bool] = {}
        self.writers: dict[tuple[str, tuple[int, int], int], Writer | None] = {}
        self.fused: dict[tuple[str, int, str], Writer | None] = {}
        self.counters = counters(ordinal).of if "arrived" in self.arch.parameters else lambda stream: 0

    @property
    def n(self) -> int:
        return self.shape[0]

    @property
    def k(self) -> int:
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(int(buffer.nbytes) for buffer in self.buffers.values())

    def __repr__(self) -> str:
        return f"DeviceWeight({self.n} x {self.k}, {self.pattern.described}, {self.scheme}, on GPU {self.ordinal})"

    @classmethod
    def arrange(cls, packed: PackedWeight, ordinal: int, least_memory: bool = False) -> DeviceWeight:
        """Of a packed weight, wherever it is; `least_memory` as of `to_device`.

        Raises:
            OperandError: `packed` is a stack of matrices.
            UnsupportedError: as for DeviceWeight; or `as_multiplied` would round.
            FormatError: the tensors of `packed` do not fit its shape.
        """
        require_matrix(packed).check_shapes()
        with cupy.cuda.Device(ordinal):
            made = cls(packed.pattern, packed.scheme, (packed.n, packed.k), {}, ordinal)
            bits = {part: a.view(part_dtypes(part, packed.scheme)[-1]) for part, a in part_arrays(packed).items()}
            there = as_multiplied(replace(packed, **{part: cupy.asarray(a) for part, a in bits.items()}), cupy)
            made.buffers = made.arch.arrange(there, cupy, least_memory)
            if there.scale is not None:
                made.buffers["scale"] = there.scale.reshape(-1)
            cupy.cuda.get_current_stream().synchronize()  # other streams may use it from now on
        return made

    @functools.cached_property
    def addresses(self) -> dict[str, int]:
        """Addresses of the buffers, by name; 0 of the scale of 16-bit weights."""
        return {"scale": 0, **{name: int(buffer.data.ptr) for name, buffer in self.buffers.items()}}

    @functools.cached_property
    def _at(self) -> tuple[int, ...]:
        return (*self.addresses.values(),)

    def problem(self, m: int, out: str, unquantized: bool = False) -> GemmProblem:
        """The product with m tokens, into the type named `out`."""
        return GemmProblem(m, self.n, self.k, self.pattern, self.scheme, out, self.device, unquantized=unquantized)

    @functools.cached_property
    def _shared(self) -> dict[tuple[int, str, bool, bool, int], Bound]:
        return shared_plans(self.pattern, self.scheme, self.shape, self.device, tuple(self.buffers), self.ordinal)

    def bind(self, m: int, out: str, configs: tuple[Config, ...] | None = None, unquantized: bool = False) -> Bound:
        """The launches for m tokens into the type named `out`: tuned or the cheapest (self_test.py), or of these configs."""
        problem = self.problem(m, out, unquantized)
        if configs:
            return self._bind(problem, configs)
        key = m, out, unquantized, env.tuned(), tuned_store.version
        if (known := self._shared.get(key)) is None:
            if len(self._shared) >= MOST_BOUND:
                self._shared.clear()
            chosen = self_test.best(problem, tuple(self.buffers), self.ordinal)
            known = self._shared[key] = self._bind(problem, chosen)
        return known

    def _bind(self, problem: GemmProblem, configs: tuple[Config, ...]) -> Bound:
        plan = plan_of(problem, configs, self.ordinal)
        return Bound(plan, tuple(launch.bind((*self.addresses,)) for launch in plan.launches))

    def bound(self, m: int, out: str, unquantized: bool = False) -> Bound:
        """`bind`, remembered.

        Args:
            unquantized: the launches that quantize x themselves, where `quantizes` says that there are some.
        """
        plans = self.unquantized if unquantized else self.plans
        if (known := plans.get((m, out))) is None:
            if len(plans) >= MOST_BOUND:
                plans.clear()
            known = plans[m, out] = self.bind(m, out, unquantized=unquantized)
        return known

    def quantizes(self, m: int, out: str, source: str, strides: tuple[int, int], x: int) -> bool:
        """Whether the product's kernel quantizes such an x itself; arguments as of `linear`."""
        if m > self.most_unquantized or source != out or strides[1] != 2 or x % 16 or (m > 1 and strides[0] % 16):
            return False
        return self._quantizes(m, out)

    def _quantizes(self, m: int, out: str) -> bool:
        if (known := self._few.get((m, out))) is None:  # to hash a problem takes longer
            known = self._few[m, out] = arch.quantizes(self.problem(m, out), tuple(self.buffers))
        return known

    def compile_ahead(self, most: int, out: str) -> None:
        """Compile the kernels of products of up to `most` tokens, on all processors at once, or a server stalls for each.

        Few of them, of numbers of tokens that the model is not asked for (`arch.asked_for`), may still be compiled when
        they are needed.
        """
        every = dict.fromkeys([*map(arch.asked_for, range(1, most)), most])
        problems = [self.problem(m, out) for m in every]
        few = [m for m in range(1, self.most_unquantized + 1) if self._quantizes(m, out)]
        problems += [self.problem(m, out, unquantized=True) for m in few]
        chosen = (config for p in problems for config in self_test.best(p, tuple(self.buffers), self.ordinal))
        compile_all(kernels_of(dict.fromkeys(chosen), self.device.capability), jit.device_compiler())

    def writer(self, source: str, strides: tuple[int, int], x: int) -> Writer | None:
        """What writes the operand of an x at this address (`plan.writer`), remembered."""
        key = source, strides, x % 16
        try:
            return self.writers[key]
        except KeyError:
            if len(self.writers) >= MOST_BOUND:
                self.writers.clear()
            made = self.writers[key] = writer(self.ordinal, self.operand, self.k, self.dtype, *key)
            return made

    # ---- addresses in, nothing out

    def workspace_bytes(self, m: int, out: str) -> int:
        """Bytes of scratch memory that `linear` of m tokens needs, uninitialized; kernels are compiled on the way."""
        if not m or not self.n:
            return 0
        if m <= self.most_unquantized and self._quantizes(m, out):
            self.bound(m, out, unquantized=True)
        return self.bound(m, out).plan.bytes

    def linear(
        self,
        m: int,
        x: int,
        source: str,
        strides: tuple[int, int],
        y: int,
        pitch: int,
        out: str,
        workspace: int,
        stream: int,
        bias: int = 0,
        bias_type: int = 0,
    ) -> None:
        """y = x @ w.T + bias by addresses: one plan lookup, then the launches. Nothing is checked, allocated or awaited.

        The device must be the current one. Memory must stay as it is until the stream has passed the launches.

        Args:
            m: tokens, above 0.
            x: address of [m, k], of `source`: "bfloat16", "float16", "float32", or the weights' type for 16-bit weights.
            strides: of x, bytes from row to row and from column to column.
            y: address of [m, n] of the type named `out`, neighbouring columns side by side; not overlapping x.
            pitch: elements from one row of y to the next.
            workspace: address of `workspace_bytes(m, out)` of any memory, 16-byte aligned; of one stream at a time.
            stream: address of the CUDA stream.
            bias: address of [n], 0 for none; bias_type: its `CUDA_CODES`.
        """
        if self.quantizes(m, out, source, strides, x):
            self.multiply(self.bound(m, out, True), x, strides[0], 0, y, pitch, workspace, stream, bias, bias_type)
            return
        bound = self.plans.get((m, out)) or self.bound(m, out)
        write, plan = self.writer(source, strides, x), bound.plan
        if write is None:
            self.multiply(bound, x, strides[0], 0, y, pitch, workspace, stream, bias, bias_type)
        else:
            scale = workspace + plan.scale_at if self.scaled else 0
            write(m, stream, x, workspace, scale)
            self.multiply(bound, workspace, plan.operand.pitch, scale, y, pitch, workspace, stream, bias, bias_type)

    def quantize(self, m: int, x: int, source: str, strides: tuple[int, int], operand: int, scale: int, stream: int) -> None:
        """The operand alone: `operand.bytes(m)` bytes at `operand`, 16-byte aligned; float32 [m] at `scale` for 8-bit weights.

        The other arguments are those of `linear`. An x that needs no change is copied.
        """
        write = self.writer(source, strides, x)
        if write is None:
            write = rows_writer(self.ordinal, self.k, source, self.dtype, strides, self.operand.pitch, 0)
        write(m, stream, x, operand, scale)

    def rms_norm(
        self, m: int, x: int, source: str, pitch: int, residual: int, gamma: int, kept: int, epsilon: float,
        operand: int, scale: int, stream: int,
    ) -> bool:  # fmt: skip
        """The operand of `reference.rms_norm`; False where no kernel makes it, and nothing is launched.

        Args:
            x: address of [m, k] of `source`, "bfloat16" or "float16", rows of `pitch` bytes; every address 16-byte aligned.
            residual, kept: of [m, k] side by side, which is added, and of the sum; both 0 if nothing is.
            gamma: of [k] of the same type.
            operand, scale: as of `quantize`.
        """
        write = self._fused(source, pitch, "add_rms_norm" if residual else "rms_norm")
        if write is not None:
            write(m, stream, x, residual, gamma, kept, operand, scale, *norm_numbers(epsilon, self.k))
        return write is not None

    def gate_and_mul(self, kind: str, m: int, x: int, source: str, pitch: int, operand: int, scale: int, stream: int) -> bool:
        """The operand of `reference`'s "silu_and_mul" or "gelu_and_mul" of x [m, 2k]; arguments and result as of `rms_norm`."""
        write = self._fused(source, pitch, kind)
        if write is not None:
            write(m, stream, x, operand, scale)
        return write is not None

    def _fused(self, *key: Any) -> Writer | None:
        """What does `kind` to rows of `source` and `pitch`, remembered; None if no kernel does."""
        if key not in self.fused:
            self.fused[key] = fused_writer(self.ordinal, self.operand, self.k, self.dtype, *key)
        return self.fused[key]

    def multiply(
        self,
        bound: Bound,
        operand: int,
        operand_pitch: int,
        scale: int,
        y: int,
        pitch: int,
        workspace: int,
        stream: int,
        bias: int = 0,
        bias_type: int = 0,
    ) -> None:
        """The product alone, of an operand that a writer made: like `linear`, whose workspace it shares the end of.

        Args:
            bound: what `bound` returned; if its launches quantize x, operand and operand_pitch are those of x, and scale is 0.
        """
        plan, counted = bound.plan, self.counters(stream) if bound.plan.part_bytes else 0
        parts, derived = workspace + plan.parts_at, workspace + plan.derived_at
        given = (*self._at, operand, operand_pitch, scale, bias, bias_type, y, pitch, parts, counted, derived)
        for launch in bound.launches:
            launch(stream, given)


# ---- the arranged form of a packed weight ----------------------------------------------------------------------------

_arranged: WeakKeyDictionary[PackedWeight, dict[int, DeviceWeight]] = WeakKeyDictionary()
_lock = threading.Lock()


def to_device(packed: PackedWeight | DeviceWeight, ordinal: int | None = None, least_memory: bool = False) -> DeviceWeight:
    """The packed weight arranged on a device (by default the current one), made on the first call and remembered with it.

    Raises:
        OperandError: a DeviceWeight of another device.
        UnsupportedError: there is no such device, or it cannot multiply weights of this type.
        FormatError: the tensors of `packed` do not fit its shape.
    """
    if isinstance(packed, DeviceWeight):
        if ordinal not in (None, packed.ordinal):
            raise OperandError(f"packed: is arranged on GPU {packed.ordinal}, but x is on GPU {ordinal}; arrange it there")
        return packed
    try:
        ordinal = int(cupy.cuda.runtime.getDevice()) if ordinal is None else ordinal
        device_facts(ordinal)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise unusable(f"device {ordinal or 0}", error) from None
    there = _arranged.get(packed)
    if there is None:
        with _lock:
            there = _arranged.setdefault(packed, {})
    weight = there.get(ordinal)
    if weight is None:
        weight = there.setdefault(ordinal, DeviceWeight.arrange(packed, ordinal, least_memory))
    return weight


def device_weight(
    buffers: Mapping[str, Any], pattern: Pattern, scheme: Scheme, shape: tuple[int, int], device: int | None = None
) -> DeviceWeight:
    """`slidesparse_nb.device_weight`."""
    views = {name: as_cupy(f"buffers[{name!r}]", array) for name, array in buffers.items()}
    current = int(cupy.cuda.runtime.getDevice())
    if device not in (None, current):  # what is made here for a device, for all its weights, is made on the current one
        raise OperandError(f"device: {device} is not the current GPU, {current}; make it so first")
    for name, view in views.items():
        if not view.flags.c_contiguous or view.data.ptr % 16:
            raise OperandError(f"buffers[{name!r}]: must be contiguous and 16-byte aligned, as to_device made it")
    made, sizes = DeviceWeight(pattern, scheme, shape, views, current), {name: int(view.nbytes) for name, view in views.items()}
    scale = {"scale": 4 * made.n} if made.scaled else {}
    forms = [{**form, **scale} for form in made.arch.buffer_bytes(pattern, *shape, made.scheme)]
    if sizes not in forms:
        raise OperandError(
            f"buffers: bytes {sizes} must be {' or '.join(map(str, forms))} for {made}; pass all that to_device made of such a"
            " weight on such a GPU"
        )
    return made
