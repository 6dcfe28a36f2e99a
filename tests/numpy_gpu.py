"""A GPU for tests of host code: CuPy is played by NumPy, and launches by the references of their kernels."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from device_cases import blocked

from slidesparse_nb.arch import sm90, sm90_layout
from slidesparse_nb.arch.multiplied_as import as_multiplied
from slidesparse_nb.arch.operand import SCALED_BLOCK, from_tiles, stages, to_tiles
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, CUDA_CODES, FLOAT4, FLOAT16, DType
from slidesparse_nb.core.packed import PackedWeight
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.scheme import SCHEMES, Scheme

pytest.importorskip("numba_cuda", reason="the kernels are Numba CUDA's: pip install 'slidesparse_nb[cuda13]'")

P = Pattern(6, 8)
PAIRED = [scheme for scheme in SCHEMES.values() if scheme.unit == 2]
BF16, F16, F32 = BFLOAT16.numpy, FLOAT16.numpy, np.dtype(np.float32)
NAMED = {code: name for name, code in CUDA_CODES.items()}
FLOATS = {"float32": F32, "float16": F16, "bfloat16": BF16}


# ---- CuPy, played by NumPy -------------------------------------------------------------------------------------------


class Array(np.ndarray):
    """What cupy.ndarray is to the code under test."""

    __module__ = "cupy"

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data, device_id=0)

    def get(self) -> Any:
        return self.view(np.ndarray)


def array(a: Any, dtype: Any = None) -> Any:
    """A copy on "the GPU", 16-byte aligned."""
    a = np.asarray(a, dtype)
    out = empty(a.shape, a.dtype)
    out[...] = a
    return out


def empty(shape: Any, dtype: Any = np.float32) -> Any:
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(size + 512, 0xA5, np.uint8)
    start = -memory.ctypes.data % 512
    return memory[start : start + size].view(dtype).reshape(shape).view(Array)


def at(address: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Any:
    """Memory at an address."""
    dtype = np.dtype(dtype)
    if not np.prod(shape):
        return np.zeros(shape, dtype)
    strides = strides or np.empty(shape, np.void(dtype.itemsize).dtype).strides
    low = sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
    raw = np.frombuffer((ctypes.c_char * (high - low)).from_address(address + low), np.uint8)
    return np.ndarray(shape, dtype, raw, -low, strides)


class Tensor:
    """Another library's array on the GPU, to be viewed through DLPack."""

    def __init__(self, a: Any) -> None:
        self.array = a

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: Any) -> None:
        raise AssertionError


class OfNumPy(type):
    """isinstance(a, NotOnGpu): a NumPy array, and none that plays CuPy's."""

    def __instancecheck__(cls, a: object) -> bool:
        return isinstance(a, np.ndarray) and not isinstance(a, Array)


class NotOnGpu(metaclass=OfNumPy):
    pass


class NumPy:
    """NumPy as ops.py sees it here."""

    ndarray = NotOnGpu

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class Gpu:
    """Launches, memory that was taken, and the streams in which other libraries' arrays were viewed."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.launched: list[str] = []
        self.allocated = 0
        self.streams = [7]
        self.weights: list[tuple[Any, PackedWeight]] = []
        self.viewed: list[int] = []
        self.spoil: Callable[[Any, Any], Any] = lambda config, y: y  # what a wrong kernel makes of y

    def allocate(self, size: int) -> Any:
        self.allocated += 1
        memory = empty(size, np.uint8)
        return SimpleNamespace(ptr=memory.ctypes.data, memory=memory)

    def module(self) -> Any:
        cupy: Any = ModuleType("cupy")

        class Stream:
            def __init__(self, ptr: int) -> None:
                self.ptr = ptr

            @classmethod
            def from_external(cls, stream: Any) -> Stream:
                return cls(stream.__cuda_stream__()[1])

            def __enter__(self) -> None:
                gpu.streams.append(self.ptr)

            def __exit__(self, *_: object) -> None:
                gpu.streams.pop()

            def synchronize(self) -> None:
                pass

        gpu = self

        def counted(shape: Any, dtype: Any = np.float32) -> Any:
            gpu.allocated += 1
            return empty(shape, dtype)

        def zeros(shape: Any, dtype: Any = np.float32) -> Any:
            out = counted(shape, dtype)
            out.view(np.uint8)[...] = 0
            return out

        cupy.ndarray, cupy.empty, cupy.zeros = Array, counted, zeros
        cupy.asarray = lambda a, dtype=None: a if isinstance(a, Array) else array(a, dtype)

        def numpys(name: str) -> Any:
            """A function of NumPy's whose results are "on the GPU"."""

            def function(*arguments: Any, **options: Any) -> Any:
                result = getattr(np, name)(*arguments, **options)
                return array(result) if isinstance(result, np.ndarray) else result

            return function

        for name in ("ascontiguousarray", "full", "concatenate", "stack", "where", "arange", "ldexp"):
            setattr(cupy, name, numpys(name))
        cupy.from_dlpack = lambda a: gpu.viewed.append(gpu.streams[-1]) or a.array
        runtime = SimpleNamespace(
            CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {}),
            getDevice=lambda: 0,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda _: {
                "major": gpu.capability[0],
                "minor": gpu.capability[1],
                "multiProcessorCount": 132,
                "name": b"NumPy in CuPy's place",
            },
        )
        cupy.cuda = SimpleNamespace(
            runtime=runtime,
            driver=SimpleNamespace(CUDADriverError=type("CUDADriverError", (RuntimeError,), {})),
            Stream=Stream,
            ExternalStream=Stream,
            get_current_stream=lambda: Stream(gpu.streams[-1]),
            alloc=gpu.allocate,
        )
        cupy.cuda.Device = type(
            "Device",
            (contextlib.nullcontext,),
            {
                "compute_capability": "{}{}".format(*gpu.capability),
                "__init__": lambda self, _=0: contextlib.nullcontext.__init__(self),
            },
        )
        return cupy


class Activations:
    """The kernel of a variant of cuda/kernels/quantize.py."""

    def __init__(self, gpu: Gpu, kernel: Any, most_shared: int) -> None:
        from slidesparse_nb.cuda.kernels.quantize import GATES, KINDS

        self.gpu, self.kernel, self.gates, self.most_shared = gpu, kernel, GATES, most_shared
        self.kind = next((kind for kind in KINDS if kernel.name.startswith(kind)), "")
        name = re.sub(rf"^{self.kind}[0-9]*_", "", kernel.name)
        self.any = name.split("_")[1] == "any"
        rest = name.split("_", 2)[2]
        names = [*FLOATS, "int8", "float8_e4m3fn", FLOAT4.name]
        self.source = next(n for n in names if rest.startswith(n))
        rest = rest[len(self.source) + 1 :]
        stored = next(n for n in names if rest.startswith(n))
        form = rest[len(stored) + 1 :]
        self.scheme = next((s for s in PAIRED if s.activations.block.scale.name in form), None) or Scheme.of(stored)
        self.stored, self.tiled = self.scheme.dtype, "tiles" in form
        self.spread = int((re.findall(r"_by(\d+)_", name) or [1])[0])
        self.windows = int(form.split("_lift")[1].split("_")[0]) if self.scheme.blocks else 0

    def __call__(self, grid: Any, block: Any, shared: int, stream: int, programmatic: bool, *arguments: int) -> None:
        assert programmatic
        assert shared <= self.most_shared
        assert stream == self.gpu.streams[-1]
        x, *arguments = arguments
        normed = "norm" in self.kind
        (residual, gamma, kept), arguments = (arguments[:3], arguments[3:]) if normed else ((0, 0, 0), arguments)
        out, scale, *arguments = arguments
        (epsilon, columns), arguments = (arguments[:2], arguments[2:]) if normed else ((0, 0), arguments)
        m, ld, *rest = arguments
        assert grid == (((m + 7) // 8 * 8 if self.tiled else m) * self.spread, 1, 1)
        held = FLOATS.get(self.source, self.stored.numpy)
        if self.scheme.blocks:
            stride, k, filled, runs = rest
            values = at(x, (m, k), held, (ld * held.itemsize, stride * held.itemsize))
            pattern = Pattern(2 * self.windows, 2 * self.windows + 2, 2)
            columns = self.scheme.activations.block.columns
            assert columns * filled >= pattern.expanded_k(k)
            rows, made = blocked(values, pattern, self.scheme)
            at(scale, (m, 1), F32)[...] = made
            at(out, (m, runs * columns // 256 * SCALED_BLOCK), np.uint8)[...] = rows
            self.gpu.launched.append(f"blocks {self.source} {self.scheme}")
            return
        if self.any:
            stride, k, pitch, _ = rest
            strides, row_bytes = (ld * held.itemsize, stride * held.itemsize), 16 * pitch
        else:
            filled, _, pitch, *_ = rest
            k, strides = filled * 16 // held.itemsize, (16 * ld, held.itemsize)
            row_bytes = pitch * 16 * self.stored.bits // 8 // held.itemsize
        values = at(x, (m, 2 * k if self.kind in self.gates else k), held, strides)
        made = None
        if self.kind in self.gates:
            values = getattr(reference, self.kind)(values)
        elif self.kind:
            assert np.array(columns, np.uint32).view(F32) == k
            added = at(residual, (m, k), held) if residual else None
            values, total = reference.rms_norm(values, at(gamma, (k,), held), np.array(epsilon, np.uint32).view(F32), added)
            if kept:
                at(kept, (m, k), held)[...] = total
        with np.errstate(invalid="ignore", over="ignore"):
            if self.source != self.stored.name:
                if not Scheme.of(self.stored).scaled:
                    values = values.astype(self.stored.numpy)
                else:
                    values, made = reference.quantize(values, self.stored)
        if made is not None:
            at(scale, (m, 1), F32)[...] = made
        if self.tiled:
            picture = to_tiles(values, P)
            assert pitch == 64 * ((m + 7) // 8)
            at(out, picture.shape, np.uint8)[...] = picture
        else:
            rows = at(out, (m, row_bytes), np.uint8)
            rows[...] = 0
            rows[:, :k] = values.view(np.uint8)
        by = f" by {self.spread}" if self.spread > 1 else ""
        self.gpu.launched.append(f"{self.kind or ('tiles' if self.tiled else 'rows')} {self.source} {self.stored}{by}")


def named(parameters: Any, arguments: tuple[int, ...]) -> Any:
    """A kernel's arguments by the names of its parameters."""
    return SimpleNamespace(**dict(zip(parameters, arguments, strict=True)))


class Rows:
    """common/rows.cu."""

    def __init__(self, gpu: Gpu, parameters: Any, held_as: str, stored: str) -> None:
        self.gpu, self.parameters, self.stored = gpu, parameters, Scheme.of(stored).dtype
        self.held = FLOATS.get(held_as, self.stored.numpy)

    def __call__(self, grid: Any, block: Any, shared: int, stream: int, programmatic: bool, *arguments: int) -> None:
        assert not programmatic
        assert min(grid) > 0
        it = named(self.parameters, arguments)
        size = self.held.itemsize
        rows = at(it.out, (grid[0], it.columns), self.stored.numpy)
        rows[...] = 0
        strides = it.row_step * size, it.step * size
        rows[:, : it.k] = at(it.x, (grid[0], it.k), self.held, strides).astype(self.stored.numpy)
        self.gpu.launched.append(f"copy {self.held} {self.stored}")


class Expand:
    """sm90/expand.cu."""

    def __init__(self, gpu: Gpu, plan: Any, config: Any) -> None:
        self.gpu, self.problem, self.config = gpu, plan.problem, config

    def __call__(self, grid: Any, block: Any, shared: int, stream: int, programmatic: bool, *arguments: int) -> None:
        assert stream == self.gpu.streams[-1]
        it, problem = named(self.config.parameters, arguments), self.problem
        assert it.n == problem.n
        assert it.expanded % 16 == 0
        shape = stages(problem.pattern, problem.k, problem.dtype), sm90_layout.row_tiles(problem.n)
        compact = at(it.compact, (*shape, sm90_layout.metadata_bytes(problem.dtype, True)), np.uint8)
        expanded = sm90_layout.expand(compact, problem.pattern, problem.dtype)
        at(it.expanded, expanded.shape, np.uint8)[...] = expanded
        self.gpu.launched.append("expand")


class Gemm:
    """The kernel of any architecture: x back to values, then the exact product."""

    def __init__(self, gpu: Gpu, plan: Any, config: Any) -> None:
        self.gpu, self.plan, self.config = gpu, plan, config

    def __call__(self, grid: Any, block: Any, shared: int, stream: int, programmatic: bool, *arguments: int) -> None:
        assert stream == self.gpu.streams[-1]
        plan, problem = self.plan, self.plan.problem
        it = named(self.config.parameters, arguments)
        dtype, m, n, k = problem.dtype, problem.m, problem.n, problem.k
        assert (it.m, it.n) == (m, n)
        there, weight = next(pair for pair in self.gpu.weights if self.loads(it, pair[0]))
        assert (weight.shape, weight.dtype, weight.pattern) == ((n, k), dtype, problem.pattern)
        for parameter, value in self.config.arguments(problem).items():
            assert getattr(it, parameter) == value
        if "derived" in self.config.buffers.values():
            expanded = sm90_layout.expand(np.asarray(there.buffers["compact"]), problem.pattern, dtype)
            np.testing.assert_array_equal(at(it.metadata, expanded.shape, np.uint8), expanded)
            assert not programmatic or self.config.order == sm90.REST, "metadata are read before the launch before is complete"
        if block := there.operand.block:
            rows = at(it.x, (m, it.x_bytes // SCALED_BLOCK, SCALED_BLOCK), np.uint8, (it.x_pitch, SCALED_BLOCK, 1))
            q = reference.unpack_nibbles(rows[..., :128].reshape(m, -1))
            codes = rows[..., 128 : 128 + 256 // block.columns].reshape(m, -1).view(block.scale.numpy)
            xs = reference.times_blocks(q, codes, block.columns)[:, : problem.pattern.expanded_k(k)].astype(np.float64)
        elif problem.unquantized:
            assert it.k == k
            assert it.x % 16 == it.x_pitch % 16 == it.scale_x == 0
            source = FLOATS[problem.out]
            q, scale = reference.quantize(at(it.x, (m, k), source, (it.x_pitch, source.itemsize)), dtype)
        elif there.operand.tiled:
            made = at(it.x, (there.operand.row_bytes // 128, (m + 7) // 8, 8, 128), np.uint8)
            q = from_tiles(made, m, k, P, dtype).view(dtype.numpy)
        else:
            assert it.x_bytes == k * dtype.bits // 8
            assert it.x % 16 == it.x_pitch % 16 == 0
            q = at(it.x, (m, k), dtype.numpy, (it.x_pitch, dtype.bits // 8))
        if not block:
            xs = reference.lift(q.astype(np.float64), weight.pattern)
        if plan.part_bytes:
            at(it.parts, (plan.part_bytes,), np.uint8)[...] = 0x77
            assert not at(it.arrived, (self.config.counters(problem),), np.uint32).any()
        with np.errstate(invalid="ignore", over="ignore"):
            slid = reference.decompress(reference.stored_values(weight), weight.meta, weight.pattern.unit).astype(np.float64)
            value = (xs @ slid.T).astype(np.float32)
            if weight.scheme.scaled:
                value = value * (scale if problem.unquantized else at(it.scale_x, (m, 1), F32)) * at(it.scale_w, (n,), F32)
            if it.bias:
                value = value + at(it.bias, (n,), FLOATS[NAMED[it.bias_type]]).astype(np.float32)
            out = FLOATS[problem.out]
            y = at(it.y, (m, n), out, (it.y_pitch * out.itemsize, out.itemsize))
            y[...] = self.gpu.spoil(self.config, value.astype(out))
        self.gpu.launched.append("gemm")

    def loads(self, it: Any, there: Any) -> bool:
        """Whether a launch loads the buffers of this weight."""
        buffers = {**self.config.buffers, "scale_w": "scale"}
        held = [name for name, buffer in buffers.items() if buffer in there.buffers]
        return len(held) > 0 and all(getattr(it, name) == there.addresses[buffers[name]] for name in held)


def kernel_folder(source: str, defines: Any) -> Path:
    return Path(sys.prefix) / f"{source.replace('/', '-')}-{hash(tuple(defines.items())):x}"


@pytest.fixture(params=["own", "portable"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with numpy_for_cupy(monkeypatch, request.param == "portable") as made:
        yield made


@contextlib.contextmanager
def numpy_for_cupy(monkeypatch: pytest.MonkeyPatch, portable: bool, capability: tuple[int, int] = (9, 0)) -> Iterator[Any]:
    """The device modules, imported afresh over a CuPy of NumPy arrays."""
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", str(int(portable)))
    made = Gpu(capability)
    cupy = made.module()
    names = [name for name in sys.modules if name.startswith("slidesparse_nb.cuda")]
    kept = {name: sys.modules.pop(name) for name in names}
    parent = importlib.import_module("slidesparse_nb")
    before = parent.__dict__.get("cuda")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    try:
        gemm: Any = importlib.import_module("slidesparse_nb.cuda.matmul")
        plans: Any = importlib.import_module("slidesparse_nb.cuda.plan")
        kernels: Any = importlib.import_module("slidesparse_nb.cuda.jit.numba")
        tests: Any = importlib.import_module("slidesparse_nb.cuda.self_test")
        raw = SimpleNamespace(kernel=SimpleNamespace(ptr=1), max_dynamic_shared_size_bytes=0)
        plans.jit = SimpleNamespace(
            architecture=plans.jit.architecture,
            build=lambda source, defines, *_: SimpleNamespace(folder=kernel_folder(source, defines), registers=1),
            load=lambda *_: raw,
            device_compiler=lambda: None,
        )
        plans.Launcher = lambda function, parameters: None
        plans._rows_kernel = lambda ordinal, held_as, stored, lift: Rows(made, plans.ROWS_PARAMETERS, held_as, stored)
        kernels.Kernel.on = lambda kernel, device, shared=0: Activations(made, kernel, max(40 << 10, shared))
        new_plan = plans.Plan.__init__

        def init(plan: Any, *arguments: Any) -> None:
            new_plan(plan, *arguments)
            plan.launches = tuple(
                dataclasses.replace(launch, run=(Expand if "expand" in config.source else Gemm)(made, plan, config))
                for launch, config in zip(plan.launches, plan.configs, strict=True)
            )

        plans.Plan.__init__ = init
        weights: Any = importlib.import_module("slidesparse_nb.cuda.weight")
        arrange = weights.DeviceWeight.arrange

        def noted(packed: PackedWeight, ordinal: int, least_memory: bool = False) -> Any:
            made.weights.append((arrange(packed, ordinal, least_memory), as_multiplied(packed, np)))
            return made.weights[-1][0]

        weights.DeviceWeight.arrange = noted
        arranged = tests.arranged

        def noted_for_test(problem: Any, packed: PackedWeight) -> Any:
            buffers = arranged(problem, packed)
            addresses = {"scale": 0, **{name: buffer.data.ptr for name, buffer in buffers.items()}}
            operand = tests.arch.of(problem).operand(problem.pattern, problem.k, problem.scheme)
            made.weights.append((SimpleNamespace(buffers=buffers, addresses=addresses, operand=operand), packed))
            return buffers

        tests.arranged, tests.driver.release = noted_for_test, lambda: "1.2.3"
        made.self_test = tests
        monkeypatch.setattr(ops(), "np", NumPy())
        made.gemm = gemm
        made.own = not portable
        yield made
    finally:
        for name in [name for name in sys.modules if name.startswith("slidesparse_nb.cuda")]:
            del sys.modules[name]
        sys.modules.update(kept)
        if before is not None:
            parent.__dict__["cuda"] = before


# ---- operands, and what is wanted of them ------------------------------------------------------------------------------


def weight(n: int, k: int, dtype: DType, pattern: Pattern = P, seed: int = 0) -> PackedWeight:
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return reference.pack(reference.prune(w, pattern), pattern, dtype)


def wanted(x: Any, packed: PackedWeight, bias: Any = None, out: Any = None) -> Any:
    with np.errstate(all="ignore"):
        return reference.matmul(np.asarray(x), packed, bias, x.dtype if out is None else out)


def close(y: Any, expected: Any) -> None:
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(expected, np.float32), rtol=2.0**-6, atol=2.0**-6, equal_nan=True
    )


def forget_plans() -> None:
    """What a new process does not know, of the products of weights of one shape."""
    importlib.import_module("slidesparse_nb.cuda.weight").shared_plans.cache_clear()


def ops() -> Any:
    return importlib.import_module("slidesparse_nb.ops")
