"""The NVIDIA driver and its GPUs, by ctypes: what this machine has, and what it lacks, told without CuPy."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import SlideSparseError, UnsupportedError

NO_GPU = {34: "the NVIDIA driver here is a stub that cannot run anything", 100: "the NVIDIA driver finds no GPU"}
"""What cuInit returns where there is no GPU: CUDA_ERROR_STUB_LIBRARY, CUDA_ERROR_NO_DEVICE."""


class AbsentError(UnsupportedError):
    """This machine lacks a driver, a GPU or an optional package; nothing that it has is broken."""


class Gpu(NamedTuple):
    """One GPU: its name, compute capability and bytes of memory."""

    name: str
    capability: tuple[int, int]
    memory: int


def library() -> ctypes.CDLL:
    """The driver's library, not initialized; AbsentError if there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise AbsentError("this machine has no NVIDIA driver (libcuda.so.1)") from None


def version() -> tuple[int, int]:
    """The newest CUDA that the driver supports, (13, 0); AbsentError if there is no driver."""
    number = ctypes.c_int()
    library().cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def release() -> str:
    """The driver's release, such as 580.65.06; where the system does not tell it, the newest CUDA that it supports."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[0] if found else "of CUDA {}.{}".format(*version())


def gpus() -> list[Gpu]:
    """Every GPU that the driver finds, at least one.

    Raises:
        AbsentError: there is no driver, or no GPU.
        UnsupportedError: the driver does not start.
    """
    driver, count = library(), ctypes.c_int()
    if code := driver.cuInit(0):
        if code in NO_GPU:
            raise AbsentError(NO_GPU[code])
        raise UnsupportedError(f"the NVIDIA driver does not start (cuInit: error {code}; see whether nvidia-smi does)")
    driver.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        raise AbsentError(NO_GPU[100])
    return [_gpu(driver, number) for number in range(count.value)]


def _gpu(driver: ctypes.CDLL, number: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), memory.value)


# ---- what to say where the GPU cannot be used ------------------------------------------------------------------------


def extra() -> str:
    """What to install for the driver of this machine."""
    return f"pip install 'slidesparse_nb[cuda{13 if version()[0] >= 13 else 12}]'"


def one_line(error: object) -> str:
    """The text of another library's error, or of its cause, which CuPy names in twenty lines, on one line of bounded length."""
    text = " ".join(str(getattr(error, "__cause__", None) or error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def unusable(what: str, error: Exception, instead: str = "NumPy arrays need none") -> SlideSparseError:
    """The error to raise where `what` needs a GPU: what this machine lacks, and a way out.

    Where there is no GPU, no package is advised: none would help.

    Args:
        error: CuPy's, or an import's.
        instead: what works without a GPU.
    """
    try:
        gpus()
    except UnsupportedError as reason:
        return type(reason)(f"{what}: needs an NVIDIA GPU, but {reason}; {instead}")
    if isinstance(error, ModuleNotFoundError):
        package = "CuPy" if error.name == "cupy" else "Numba CUDA" if error.name == "numba_cuda" else str(error.name)
        return AbsentError(f"{what}: needs {package}, which is not installed; {extra()}")
    if isinstance(error, ImportError):
        return UnsupportedError(f"{what}: needs a package that cannot be imported ({one_line(error)}); {extra()}")
    return UnsupportedError(f"{what}: CuPy cannot use the GPU ({one_line(error)}); `slidesparse doctor` tells more")
