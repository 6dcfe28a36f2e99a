"""What of this machine the library can use: driver, devices, compilers, cache; and whether each part computes right."""

from __future__ import annotations

import ctypes
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import arch, env, ops, packing, reference
from .dtypes import BFLOAT16, FLOAT8, FLOAT32, INT8, PACKED, DType
from .errors import SlideSparseError, UnsupportedError
from .packed import PackedWeight
from .pattern import Pattern

PATTERN = Pattern(6, 8)
M, N, K = 19, 40, 200
"""Shape of the products that are checked: small, and a multiple of nothing."""


@dataclass(frozen=True)
class Finding:
    """One part of the machine or of the library.

    Attributes:
        part: "driver", "CuPy", "matmul int8" ...
        ok: it is there, and works.
        text: what was found, or what is wrong and how to mend it.
    """

    part: str
    ok: bool
    text: str


def diagnose() -> Iterator[Finding]:
    """Look at one part after the other; a part that is missing or wrong is a finding, never an exception."""
    capability: tuple[int, int] | None = None

    def finding(part: str, look: Callable[[], str]) -> Finding:
        try:
            return Finding(part, True, look())
        except (SlideSparseError, ImportError, OSError) as error:
            return Finding(part, False, str(error))
        except Exception as error:
            return Finding(part, False, f"{type(error).__name__}: {error}")

    yield finding("driver", _driver)
    try:
        found = _devices()
    except (UnsupportedError, OSError):
        found = []
    for number, (name, capability_, memory) in enumerate(found):
        capability = capability or capability_
        yield finding(f"device {number}", lambda n=name, c=capability_, b=memory: _device(n, c, b))  # type: ignore[misc]
    if not found:
        yield Finding("device", False, "none; NumPy arrays are computed on the CPU")
    yield finding("CuPy", _cupy)
    yield finding("Numba", lambda: _numba(capability or (8, 0)))
    yield finding("NVRTC", _nvrtc)
    yield finding("cache", _cache)
    yield finding("CPU", _cpu)
    checks: list[tuple[str, Callable[[], str]]] = [("activations", _activations), ("weights", _weights)]
    dtypes = (
        PACKED if capability is None or capability < (8, 0) else arch.for_capability(capability).supported_dtypes(capability)
    )
    checks += [(f"matmul {dtype}", lambda dtype=dtype: _matmul(dtype)) for dtype in dtypes]  # type: ignore[misc]
    for part, check in checks:
        yield finding(part, check) if found else Finding(part, False, "not checked: there is no device")


# ---- what there is -----------------------------------------------------------------------------------------------


def _library() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnsupportedError("no NVIDIA driver (libcuda.so.1) was found; install one, or use NumPy arrays") from None
    if code := driver.cuInit(0):
        raise UnsupportedError(f"the NVIDIA driver does not start (cuInit: error {code}); see whether nvidia-smi does")
    return driver


def _driver() -> str:
    version = ctypes.c_int()
    _library().cuDriverGetVersion(ctypes.byref(version))
    return f"supports CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _devices() -> list[tuple[str, tuple[int, int], int]]:
    """Name, compute capability and bytes of memory of every device."""
    driver, count = _library(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for number in range(count.value):
        device, text, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetName(text, len(text), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append((text.value.decode(), (major.value, minor.value), memory.value))
    return found


def _device(name: str, capability: tuple[int, int], memory: int) -> str:
    dtypes = arch.for_capability(capability).supported_dtypes(capability)
    return (
        f"{name}, {memory / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}: {', '.join(map(str, dtypes))}"
    )


def _import(name: str, way: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}; {way}") from None


def _cupy() -> str:
    cupy = _import("cupy", "install slidesparse_nb[cuda13] or slidesparse_nb[cuda12]")
    version = cupy.cuda.runtime.runtimeGetVersion()
    return f"{cupy.__version__}, CUDA {version // 1000}.{version % 1000 // 10}"


def _numba(capability: tuple[int, int]) -> str:
    numba = importlib.import_module("numba")
    numba_cuda = _import("numba_cuda", "install slidesparse_nb[cuda13] or slidesparse_nb[cuda12]")
    kernels: Any = importlib.import_module("slidesparse_nb.device.unpack_kernels")
    built = kernels.unpack_kernel(INT8, PATTERN.windows).build(capability)
    return f"{numba.__version__}, numba-cuda {numba_cuda.__version__}, NumPy {np.__version__}; compiled {built.folder.name}"


def _nvrtc() -> str:
    from .device import jit, nvrtc

    try:
        found = jit.device_compiler()
    except ImportError:  # without CuPy kernels are only compiled ahead
        found = nvrtc.load()
    return f"CUDA {found.version[0]}.{found.version[1]}, {found.path}"


def _cache() -> str:
    folder = env.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}); set SLIDESPARSE_CACHE_DIR to a folder that can") from None
    cubins = list(Path(folder).glob("*/kernel.cubin"))
    return f"{folder}: {len(cubins)} kernels, {sum(c.stat().st_size for c in cubins) / 1e6:.1f} MB"


# ---- whether it is right -----------------------------------------------------------------------------------------


def _operands(dtype: DType) -> tuple[Any, Any, PackedWeight]:
    """x [M, K] float32 that bfloat16 holds, w [N, K] that obeys the pattern, and w packed by the reference."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((M, K)).astype(BFLOAT16.numpy).astype(np.float32)
    w = reference.prune(rng.standard_normal((N, K)).astype(np.float32), PATTERN)
    return x, w, reference.pack(w, PATTERN, dtype)


def _same(name: str, got: Any, wanted: Any) -> None:
    if not np.array_equal(got.view(f"u{got.itemsize}"), wanted.view(f"u{wanted.itemsize}")):
        raise ArithmeticError(f"{name} differ from the reference")


def _compare(y: Any, x: Any, packed: PackedWeight, error: float = 2 * K * 2.0**-24) -> str:
    """y against the reference: int8 exactly; others within `error` of the sum of magnitudes, by default the rounding of K
    additions in float32, in any order."""
    wanted = reference.matmul(x, packed)
    if packed.dtype is INT8:
        _same("products", np.ascontiguousarray(y), wanted)
        return "equals the reference"
    size = reference.matmul(
        np.abs(x), PackedWeight(_magnitude(packed), packed.meta, packed.scale, PATTERN, (N, K), packed.dtype)
    )
    if (np.abs(y - wanted) > error * size).any() or not np.isfinite(y).all():
        raise ArithmeticError(f"products differ from the reference by up to {np.abs(y - wanted).max():.3g}")
    return f"equals the reference to {np.abs(y - wanted).max():.1g}, by order of addition"


def _magnitude(packed: PackedWeight) -> Any:
    return (packed.values.view(packed.dtype.raw) & packed.dtype.raw.type(packed.dtype.nonzero_mask)).view(packed.dtype.numpy)


def _cpu() -> str:
    for dtype in PACKED:
        x, w, wanted = _operands(dtype)
        packed = packing.pack(w, PATTERN, dtype)
        _same(f"{dtype} values", packed.values, wanted.values)
        _same(f"{dtype} indices", packed.meta, wanted.meta)
        _compare(ops.matmul(x, packed), x, wanted)
    return "pack and matmul equal the reference"


def _activations() -> str:
    cupy: Any = importlib.import_module("cupy")
    from .device import activations

    x, _, _ = _operands(INT8)
    for dtype in (INT8, FLOAT8):
        wanted, wanted_scale = reference.quantize(x, dtype)
        values, scale = activations.quantize(cupy.asarray(x), dtype)
        _same(f"{dtype} values", np.ascontiguousarray(values.get()[:, :K]), wanted)
        _same(f"{dtype} scales", scale.get(), wanted_scale)
    return "quantize equals the reference"


def _weights() -> str:
    cupy: Any = importlib.import_module("cupy")
    from .device import weights

    for dtype in PACKED:
        _, w, wanted = _operands(dtype)
        packed = weights.pack(cupy.asarray(w), PATTERN, dtype)
        _same(f"{dtype} values", packed.values.get(), wanted.values)
        _same(f"{dtype} indices", packed.meta.get(), wanted.meta)
    return "pack equals the reference"


def _matmul(dtype: DType) -> str:
    cupy: Any = importlib.import_module("cupy")
    from .device import weights

    x, w, wanted = _operands(dtype)
    packed = weights.pack(cupy.asarray(w), PATTERN, dtype)
    y = ops.matmul(cupy.asarray(x), packed, out_dtype=FLOAT32).get()
    capability = divmod(int(cupy.cuda.Device().compute_capability), 10)
    if dtype is FLOAT8 and arch.for_capability(capability) is arch.sm90:  # an accumulator of fewer bits
        return _compare(y, x, wanted, -(-packed.ks // 64) * arch.sm90.FLOAT8_ERROR)
    return _compare(y, x, wanted)
