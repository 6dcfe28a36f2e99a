"""Machines that lack a driver, a GPU or CuPy, and what a command that times kernels says there: one sentence, exit code 5."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result

from slidesparse_nb.cuda import driver

LACKS = ("driver", "GPU", "CuPy")
"""What a machine may lack, with what comes before it."""

REASONS = {
    "driver": "this machine has no NVIDIA driver (libcuda.so.1)",
    "GPU": "the NVIDIA driver finds no GPU",
    "CuPy": "pip install 'slidesparse_nb[cuda12]'",
}


class Driver:
    """libcuda of CUDA 12.4, with `count` GPUs of compute capability 9.0."""

    def __init__(self, count: int, error: int = 0) -> None:
        self.count, self.error = count, error

    def cuInit(self, _: int) -> int:
        return self.error

    def __getattr__(self, name: str) -> object:
        values = {"cuDriverGetVersion": 12040, "cuDeviceGetCount": self.count, "cuDeviceTotalMem_v2": 80 << 30}

        def function(pointer: Any, *rest: int) -> int:
            attributes = {75: 9, 76: 0}
            if name == "cuDeviceGetName":
                pointer.value = b"NVIDIA H100"
            else:
                pointer._obj.value = attributes[rest[0]] if name == "cuDeviceGetAttribute" else values.get(name, 0)
            return 0

        return function


def take_away(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one of a machine that lacks one of LACKS, and all after it."""
    if part != "driver":
        monkeypatch.setattr(driver, "library", lambda: Driver(int(part == "CuPy")))
    else:

        def absent(_: str) -> None:
            raise OSError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr(driver, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": absent}))
    for name in ("cupy", "numba_cuda"):
        monkeypatch.setitem(sys.modules, name, None)


def assert_refused(done: Result, command: str, part: str) -> None:
    """Assert that the command `command` said so, and nothing else."""
    assert done.exit_code == 5, done.output
    assert done.stderr.startswith(f"error: {command}: needs ")
    assert REASONS[part] in done.stderr
    assert ("pip install" in done.stderr) == (part == "CuPy")  # no package helps where there is no GPU
    assert done.stderr.count("\n") == 1
    assert not done.stdout
