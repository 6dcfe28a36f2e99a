"""What of this machine the library can use: driver, devices, compilers, cache; and whether each part computes right."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import arch, cuda, env, ops, packing
from .checkpoint.packed_format import on_host
from .core import reference
from .core.dtypes import BFLOAT16, FLOAT8, FLOAT32, INT8, PACKED
from .core.packed import PackedWeight
from .core.pattern import Pattern
from .core.problem import Device
from .core.scheme import SCHEMES, Scheme
from .cuda import driver
from .cuda.jit import cache
from .errors import SlideSparseError, UnsupportedError

PATTERN = Pattern(6, 8)
M, N, K = 19, 40, 200
"""Shape of the products that are checked: small, and a multiple of nothing."""


OK, ABSENT, BROKEN = "ok", "absent", "broken"


@dataclass(frozen=True)
class Finding:
    """One part of the machine or of the library.

    Attributes:
        part: "driver", "CuPy", "matmul int8" ...
        state: "ok": it works; "absent": this machine lacks it, which is no fault; "broken": it is there and does not work.
        text: what was found; or what is absent or broken, and how to mend it.
    """

    part: str
    state: str
    text: str


def diagnose() -> Iterator[Finding]:
    """Look at one part after the other; a part that is absent or broken is a finding, never an exception.

    Yields:
        Findings on driver, GPUs, CuPy, Numba CUDA, NVRTC, cache and CPU; then what the GPU computes, if it can be used, and
        `self_tests`.
    """

    def finding(part: str, look: Callable[[], str]) -> Finding:
        try:
            return Finding(part, OK, look())
        except driver.AbsentError as error:
            return Finding(part, ABSENT, str(error))
        except (SlideSparseError, OSError) as error:
            return Finding(part, BROKEN, str(error))
        except Exception as error:
            return Finding(part, BROKEN, f"{type(error).__name__}: {driver.one_line(error)}")

    found = finding("driver", lambda: "supports CUDA {}.{}".format(*driver.version()))
    yield found
    gpus: list[driver.Gpu] = []

    def first_gpu() -> str:
        if found.state == ABSENT:
            raise driver.AbsentError("none without a driver; NumPy arrays need none")
        gpus.extend(driver.gpus())
        return _gpu(gpus[0])

    yield finding("GPU", first_gpu)
    for number, gpu in enumerate(gpus[1:], 1):
        yield finding(f"GPU {number}", functools.partial(_gpu, gpu))
    schemes = _multiplied(gpus[0].capability) if gpus else ()
    usable = gpus[0].capability if schemes else None
    needed = []
    for part, look in (("CuPy", _cupy), ("Numba CUDA", _numba), ("NVRTC", _nvrtc)):
        needed.append(finding(part, functools.partial(look, usable)))
        yield needed[-1]
    yield finding("cache", _cache)
    yield finding("CPU", _cpu)
    if usable is None:
        return
    if lacking := [each.part for each in needed if each.state != OK]:
        yield Finding("products", ABSENT, f"not computed on the GPU: that needs {' and '.join(lacking)}")
        return
    yield finding("activations", _activations)
    yield finding("weights", _weights)
    for scheme in schemes:
        yield finding(f"matmul {scheme}", functools.partial(_matmul, scheme))
    yield from self_tests()


# ---- what there is -----------------------------------------------------------------------------------------------


def _multiplied(capability: tuple[int, int]) -> tuple[Scheme, ...]:
    """The schemes that a GPU multiplies, by whatever kernel; none if it has no sparse tensor cores."""
    try:
        of_each = [arch.multiplied(own, capability) for own in arch.serving(capability)]
    except UnsupportedError:
        return ()
    return tuple(scheme for scheme in SCHEMES.values() if any(scheme.kernel in schemes for schemes in of_each))


def _gpu(gpu: driver.Gpu) -> str:
    text = f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if not (schemes := _multiplied(gpu.capability)):
        raise driver.AbsentError(f"{text}: has no sparse tensor cores, which came with 8.0; NumPy arrays need none")
    advice = arch.advice(Device(gpu.capability, 0, gpu.name))
    return f"{text}: {', '.join(map(str, schemes))}{advice and f'; {advice}'}"


Capability = tuple[int, int] | None
"""Of the GPU that can be used, if there is one."""


def _import(name: str, usable: Capability) -> Any:
    """An optional package; AbsentError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        way = driver.extra() if usable else "only a GPU needs it"
        raise driver.AbsentError(f"not installed; {way}") from None


def _cupy(usable: Capability) -> str:
    cupy = _import("cupy", usable)
    if usable and not cupy.cuda.runtime.getDeviceCount():
        raise LookupError("finds no GPU, though the driver does")
    number = cupy.cuda.runtime.runtimeGetVersion()
    return f"{cupy.__version__}, CUDA {number // 1000}.{number % 1000 // 10}"


def _numba(usable: Capability) -> str:
    numba_cuda = _import("numba_cuda", usable)
    kernels: Any = importlib.import_module("slidesparse_nb.cuda.kernels.unpack")
    major, minor = capability = usable or (8, 0)
    kernels.unpack_kernel(INT8, PATTERN.windows).build(capability)
    versions = f"{numba_cuda.__version__}, Numba {importlib.import_module('numba').__version__}, NumPy {np.__version__}"
    return f"{versions}; compiles for compute capability {major}.{minor}"


def _nvrtc(usable: Capability) -> str:
    try:
        found = cache.device_compiler()
    except driver.AbsentError:
        way = driver.extra() if usable else "only a GPU needs it, and `slidesparse build`"
        raise driver.AbsentError(f"not installed; {way}") from None
    return f"CUDA {found.version[0]}.{found.version[1]}, {found.path}"


def _cache() -> str:
    folder = env.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}); set SLIDESPARSE_CACHE_DIR to a folder that can") from None
    cubins = list(folder.glob("*/kernel.cubin"))
    return f"{folder}: {len(cubins)} kernels, {sum(c.stat().st_size for c in cubins) / 1e6:.1f} MB"


# ---- whether it is right -----------------------------------------------------------------------------------------


def _operands(scheme: Scheme) -> tuple[Any, Any, PackedWeight]:
    """x [M, K] float32 that bfloat16 holds, w [N, K] that obeys the pattern, and w packed by the reference."""
    rng, pattern = np.random.default_rng(0), scheme.pattern(PATTERN)
    x = rng.standard_normal((M, K)).astype(BFLOAT16.numpy).astype(np.float32)
    w = reference.prune(rng.standard_normal((N, K)).astype(np.float32), pattern)
    return x, w, reference.pack(w, pattern, scheme)


def _same(name: str, got: Any, wanted: Any) -> None:
    """Raise ArithmeticError unless two arrays, the first perhaps on a GPU, are equal bit for bit."""
    got = np.ascontiguousarray(on_host(got))
    if not np.array_equal(got.view(f"u{got.itemsize}"), wanted.view(f"u{wanted.itemsize}")):
        raise ArithmeticError(f"{name} differ from the reference")


ADDITIONS = 2 * K * 2.0**-24
"""Error of K additions in float32, in any order, of the sum of magnitudes."""


def _compare(y: Any, x: Any, packed: PackedWeight, error: float = ADDITIONS) -> str:
    """y against the reference: int8 exactly; others within `error` of the sum of magnitudes."""
    wanted = reference.matmul(x, packed)
    if packed.dtype is INT8:
        _same("products", y, wanted)
        return "equals the reference"
    mask = packed.dtype.nonzero_mask * (17 if packed.dtype.bits == 4 else 1)  # of both nibbles of a byte
    magnitudes = packed.values.view(packed.dtype.raw) & packed.dtype.raw.type(mask)
    size = reference.matmul(np.abs(x), replace(packed, values=magnitudes.view(packed.dtype.stored)))
    off = np.abs(y - wanted)
    if (off > error * size).any() or not np.isfinite(y).all():
        raise ArithmeticError(f"products differ from the reference by up to {off.max():.3g}")
    return f"equals the reference to {off.max():.1g}, by order of addition"


def _packs(scheme: Scheme, move: Callable[[Any], Any]) -> tuple[Any, PackedWeight, PackedWeight]:
    """x, and w packed where `move` puts it and by the reference, once they are known to be equal."""
    x, w, wanted = _operands(scheme)
    packed = packing.pack(w if scheme.blocks else move(w), PATTERN, scheme)  # with blocks on the CPU only
    _same(f"{scheme} values", packed.values, wanted.values)
    _same(f"{scheme} indices", packed.meta, wanted.meta)
    return x, packed, wanted


def _cpu() -> str:
    for scheme in SCHEMES.values():
        x, packed, wanted = _packs(scheme, lambda w: w)
        _compare(ops.matmul(x, packed), x, wanted)
    return "pack and matmul equal the reference"


def _activations() -> str:
    cupy: Any = importlib.import_module("cupy")
    x, _, _ = _operands(Scheme.of(INT8))
    for dtype in (INT8, FLOAT8):
        wanted, wanted_scale = reference.quantize(x, dtype)
        made = ops.quantize(cupy.asarray(x), PATTERN, dtype)
        _same(f"{dtype} values", made.values, wanted)
        _same(f"{dtype} scales", made.scale, wanted_scale)
    return "quantize equals the reference"


def _weights() -> str:
    cupy: Any = importlib.import_module("cupy")
    for dtype in PACKED:
        _packs(Scheme.of(dtype), cupy.asarray)
    return "pack equals the reference"


def _matmul(scheme: Scheme) -> str:
    cupy: Any = importlib.import_module("cupy")
    x, packed, wanted = _packs(scheme, cupy.asarray)
    y, kernel = ops.matmul(cupy.asarray(x), packed, out_dtype=FLOAT32).get(), scheme.kernel
    capability = divmod(int(cupy.cuda.Device().compute_capability), 10)
    return _compare(y, x, wanted, max(ADDITIONS, arch.for_capability(capability, scheme=kernel).error(kernel, packed.ks)))


def self_tests() -> Iterator[Finding]:
    """What the kernels computed that were tested on the current GPU, since we never ran them on one like it (docs/gpus.md).

    Yields:
        A finding for each that failed, whose text is for a report; then how many passed. Nothing where none was tested.

    Raises:
        UnsupportedError: there is no GPU, or no CuPy.
    """
    cupy = cuda.cupy("self_tests", "nothing is tested on the CPU")
    from .cuda import plan, self_test

    outcomes = self_test.outcomes(Device(*plan.device_facts(int(cupy.cuda.runtime.getDevice()))))
    for outcome in (outcome for outcome in outcomes if not outcome.passed):
        yield Finding("self-test", BROKEN, f"{outcome.text}; not used again with this driver; please report this line")
    if passed := sum(outcome.passed for outcome in outcomes):
        yield Finding("self-test", OK, f"{passed} kernels that we never ran on such a GPU equal NumPy on this one")
