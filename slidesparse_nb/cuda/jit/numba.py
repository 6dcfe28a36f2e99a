"""From a Python function to a kernel that CuPy launches: Numba compiles it ahead, for the device's own architecture.

    Python function --Numba, NVVM--> PTX --nvJitLink--> cubin (cached on disk) --CuPy--> launch

Numba's own launch path costs tens of microseconds a call, CuPy's a few; so Numba only compiles here, and needs no GPU for it.
A kernel's parameters are plain pointers and 64-bit integers: nothing of Numba's array structure crosses the boundary.

With NUMBA_ENABLE_CUDASIM=1 the same functions run in Numba's simulator, over NumPy arrays and with every index checked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...errors import UnsupportedError
from ..driver import one_line
from ..launch import Launcher
from . import cache

if not hasattr(np, "row_stack"):  # numba-cuda 0.30 names it when it is imported; NumPy 2.5 has it no more
    np.row_stack = np.vstack  # type: ignore[attr-defined]

# Whole modules of type Any: what these packages make at run time, a type checker does not see.
numba: Any = importlib.import_module("numba")
cuda: Any = importlib.import_module("numba.cuda")

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
"""True where Numba's CUDA simulator replaces the device, and NumPy arrays CuPy's."""

if not SIMULATED:
    importlib.import_module("numba_cuda")  # without it numba.cuda is Numba's own, which knows other names

arrays: Any = None
with contextlib.suppress(ImportError):  # without CuPy kernels can still be compiled ahead
    arrays = importlib.import_module("numpy" if SIMULATED else "cupy")

if not SIMULATED:
    ir: Any = importlib.import_module("llvmlite.ir")
    types: Any = importlib.import_module("numba.cuda.types")
    extending: Any = importlib.import_module("numba.cuda.extending")

F = TypeVar("F", bound=Callable[..., Any])
Type = str | tuple[Any, ...]


def current_device() -> int:
    """The number of the current device."""
    return 0 if SIMULATED else int(arrays.cuda.runtime.getDevice())


def _numba_type(name: Type) -> Any:
    """Numba's type of "u32", "f32", "i64"; "u32*": a pointer; "u32[]": a local or shared array; "void": nothing; or a tuple."""
    if isinstance(name, tuple):
        return types.Tuple([_numba_type(part) for part in name])
    if name == "void":
        return types.void
    kind = {"u": "uint", "i": "int", "f": "float"}[name[0]]
    base = getattr(types, kind + name[1:].rstrip("*[]"))
    return types.CPointer(base) if name.endswith("*") else types.Array(base, 1, "C") if name.endswith("[]") else base


def _inside_kernels(result: Type, operands: tuple[Type, ...], emit: Callable[..., Any]) -> Callable[[F], F]:
    """Decorates a function that the simulator runs as it is; in a kernel its operands are cast, and `emit` writes its code.

    Args:
        result, operands: types as `_numba_type` reads them.
        emit: (context, builder, signature, values, function) -> the LLVM value.
    """

    def wrap(function: F) -> F:
        if SIMULATED:
            return function
        signature = _numba_type(result)(*[_numba_type(operand) for operand in operands])

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return emit(context, builder, signature, values, function)

        def typing(context: Any, *given: Any) -> Any:
            return signature, code

        parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        parameters += inspect.signature(function).parameters.values()
        typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typing.__name__, typing.__doc__ = function.__name__, function.__doc__
        made: F = extending.intrinsic(typing)
        return made

    return wrap


def device_function(result: Type, *operands: Type) -> Callable[[F], F]:
    """A Python function that kernels may call, of fixed types: `@device_function("u32", "u32", "f32")`.

    `cuda.jit(device=True)` would ask the driver for the present device; this compiles on a machine that has none.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any, function: Any) -> Any:
        return context.compile_internal(builder, function, signature, values)

    return _inside_kernels(result, operands, emit)


def instruction(text: str, constraints: str, result: str, *operands: str, effect: bool = False) -> Callable[[F], F]:
    """A function that is one PTX statement; what it decorates is its reference in Python, which the simulator runs.

    Args:
        text: PTX, with $0 for the result and $1, $2 ... for the operands.
        constraints: LLVM's, "=r,r,r": r a 32-bit register, f a float, l a 64-bit register.
        effect: it has side effects, or all lanes of a warp must execute it together; it is never dropped nor moved.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any, function: Any) -> Any:
        kinds = [context.get_value_type(t) for t in signature.args]
        returned_kind = ir.VoidType() if result == "void" else context.get_value_type(signature.return_type)
        code = ir.InlineAsm(ir.FunctionType(returned_kind, kinds), text, constraints, side_effect=effect)
        returned = builder.call(code, values, attrs=("convergent",) if effect else ())
        return context.get_dummy_value() if result == "void" else returned

    return _inside_kernels(result, operands, emit)


def load_vector(pointer: str, index: str, count: int) -> Callable[[F], F]:
    """A function (pointer, i) -> `count` 32-bit words from words count*i on, in one load; pointer + i must be aligned to it."""

    def emit(context: Any, builder: Any, signature: Any, values: Any, function: Any) -> Any:
        i32 = ir.IntType(32)
        address = builder.bitcast(values[0], ir.VectorType(i32, count).as_pointer())
        vector = builder.load(builder.gep(address, [values[1]]))
        vector.align = 4 * count
        words = [builder.extract_element(vector, i32(i)) for i in range(count)]
        return context.make_tuple(builder, signature.return_type, words)

    return _inside_kernels(("u32",) * count, (pointer, index), emit)


def store_vector(pointer: str, index: str, count: int) -> Callable[[F], F]:
    """A function (pointer, i, word ...) that stores `count` 32-bit words at word count*i, in one store."""

    def emit(context: Any, builder: Any, signature: Any, values: Any, function: Any) -> Any:
        i32 = ir.IntType(32)
        kind = ir.VectorType(i32, count)
        address = builder.gep(builder.bitcast(values[0], kind.as_pointer()), [values[1]])
        vector = ir.Constant(kind, ir.Undefined)
        for i, word in enumerate(values[2:]):
            vector = builder.insert_element(vector, word, i32(i))
        builder.store(vector, address).align = 4 * count
        return context.get_dummy_value()

    return _inside_kernels("void", (pointer, index, *("u32",) * count), emit)


class Memory:
    """A pointer in the simulator: the memory of a NumPy array, seen as `dtype`, every index checked."""

    def __init__(self, array: Any, dtype: np.dtype[Any]) -> None:
        last = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) if array.size else -array.itemsize
        raw = np.lib.stride_tricks.as_strided(
            array.view(f"u{array.itemsize}"), (last // array.itemsize + 1,), (array.itemsize,)
        )
        octets = raw.view(np.uint8)
        self.items = octets[: octets.size // dtype.itemsize * dtype.itemsize].view(dtype)

    def _checked(self, index: Any) -> int:
        if not 0 <= index < self.items.size:
            raise IndexError(f"kernel index {index} is outside memory of {self.items.size} elements")
        return int(index)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self._checked(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.items[self._checked(index)] = value


class Kernel:
    """One compiled function, on every device where it is launched.

    Args:
        name: tells specializations apart, in the cache and in profilers: letters, digits and underscores.
        function: the kernel; its free variables are compile-time constants, which `name` must tell.
        parameters: for each argument "i64", or "u8*", "u16*", "u32*", "u64*", "f32*" for an array.
        max_threads: most threads a block is launched with.
        max_registers: most registers of a thread, so that more blocks fit on an SM; 0: as many as max_threads allow.
        cluster: blocks of a cluster, neighbours in the grid.
        programmatic: it executes `griddepcontrol.wait` first, and is launched with PDL.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        *parameters: str,
        max_threads: int = 1024,
        max_registers: int = 0,
        cluster: int = 1,
        programmatic: bool = False,
    ) -> None:
        self.name, self.function, self.parameters = name, function, parameters
        self.max_threads, self.max_registers = max_threads, max_registers
        self.cluster, self.programmatic = cluster, programmatic
        self._loaded: dict[int, Launcher] = {}
        self._shared: dict[int, int] = {}

    def __call__(self, grid: tuple[int, ...], threads: int, *args: Any, shared: int = 0) -> None:
        """Launch on the current device and stream: `grid` blocks of `threads`, `shared` bytes of dynamic shared memory.

        Args:
            args: integers, and CuPy arrays, of which the kernel gets the address.
        """
        if SIMULATED:
            self._simulate(grid, threads, args, shared)
            return
        launcher = self.on(arrays.cuda.runtime.getDevice(), shared)
        address = arrays.cuda.get_current_stream().ptr
        plain = [a if isinstance(a, int) else a.data.ptr for a in args]
        launcher((*grid, 1, 1)[:3], (threads, 1, 1), shared, address, self.programmatic, *plain)  # type: ignore[arg-type]

    def on(self, device: int, shared: int = 0) -> Launcher:
        """The kernel on a device, which is current, ready for launches with `shared` bytes of dynamic shared memory."""
        known = self._loaded.get(device)
        if known is not None and shared <= self._shared[device]:
            return known
        capability = int(arrays.cuda.Device(device).compute_capability)
        raw = cache.load(self.build(divmod(capability, 10)), self.name)
        allowed = max(40 << 10, shared, self._shared.get(device, 0))
        if allowed > 40 << 10:  # 48 KiB without asking, less at most 8 of static shared memory
            raw.max_dynamic_shared_size_bytes = allowed
        loaded = Launcher(raw.kernel, ["address" if p.endswith("*") else "integer" for p in self.parameters])
        self._loaded[device], self._shared[device] = loaded, allowed
        return loaded

    def build(self, capability: tuple[int, int]) -> cache.Built:
        """The kernel for an architecture, from the cache folder or compiled into it now; needs no GPU."""
        compiled_for = repr((self.parameters, self.max_threads, self.max_registers, self.cluster, capability))
        key = cache.digest(self.name, compiled_for, *_versions(), *_sources(self.function))[:24]

        def make() -> tuple[bytes, str, dict[str, str]]:
            ptx = self.ptx(capability)
            return *assemble(ptx, capability), {"kernel.ptx": ptx}

        return cache.cached(f"{self.name}-{cache.architecture(capability)}-{key}", make)

    def ptx(self, capability: tuple[int, int]) -> str:
        """The kernel in PTX, entry point `name`; needs no GPU."""
        signature = types.void(*[_numba_type(p) for p in self.parameters])
        text: str
        text, _ = cuda.compile(
            self.function, signature, device=False, abi="numba", cc=capability, launch_bounds=self.max_threads
        )
        limits = [f".maxnreg {self.max_registers}"] if self.max_registers else []
        limits += [f".explicitcluster\n.reqnctapercluster {self.cluster}, 1, 1"] if self.cluster > 1 else []
        text = re.sub(r"^(\.maxntid .*)$", "\n".join([r"\1", *limits]), text, flags=re.MULTILINE)
        mangled = re.search(r"\.visible \.entry (\w+)\(", text)
        assert mangled, text[:2000]
        return text.replace(mangled[1], self.name)

    def _simulate(self, grid: tuple[int, ...], threads: int, args: tuple[Any, ...], shared: int) -> None:
        kinds = {"u8*": np.uint8, "u16*": np.uint16, "u32*": np.uint32, "u64*": np.uint64, "f32*": np.float32}
        seen = [
            int(a) if isinstance(a, int | np.integer) else Memory(a, np.dtype(kinds[p]))
            for a, p in zip(args, self.parameters, strict=True)
        ]
        cuda.jit(self.function)[grid, threads, 0, shared](*seen)


def assemble(ptx: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """PTX -> cubin and the assembler's log, by nvJitLink, which is as new as Numba's compiler; the driver may be older."""
    nvjitlink = importlib.import_module("cuda.bindings.nvjitlink")
    code = ptx.encode()
    options = [f"-arch={cache.architecture(capability)}", "-O3", "-verbose"]
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, code, len(code), "kernel.ptx")
        nvjitlink.complete(linker)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, cubin)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
    finally:
        nvjitlink.destroy(linker)
    return bytes(cubin), log.rstrip(b"\0").decode(errors="replace")


@functools.cache
def _source(path: Path) -> str:
    return path.read_text()


def _sources(function: Callable[..., None]) -> list[str]:
    """The text that decides what is compiled: this file, and all beside the kernel's own."""
    own = Path(sys.modules[function.__module__].__file__ or "")
    return [_source(path) for path in (Path(__file__), *sorted(own.parent.glob("*.py")))]


@functools.cache
def _versions() -> list[str]:
    """The compilers: Numba, its CUDA part, LLVM's binding, NVVM and the assembler; UnsupportedError if one cannot be loaded."""
    try:
        nvvm = importlib.import_module("numba.cuda.cudadrv.nvvm").NVVM()
        nvjitlink = importlib.import_module("cuda.bindings.nvjitlink")
        packages = [importlib.import_module(name).__version__ for name in ("numba", "numba_cuda", "llvmlite")]
        return [*packages, repr((nvvm.get_version(), nvvm.get_ir_version(), nvjitlink.version()))]
    except Exception as error:  # of a kind that depends on what is missing
        raise UnsupportedError(
            f"Numba CUDA: a library of its compiler cannot be loaded ({one_line(error)}); install slidesparse_nb[cuda13] or"
            " slidesparse_nb[cuda12]"
        ) from None
