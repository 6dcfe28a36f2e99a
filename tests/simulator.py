"""Running a test file once more in Numba's CUDA simulator, which is chosen when Numba is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


class Allocations(dict[Any, Any]):
    """A block's shared arrays by the line that asks for them. The first thread to ask makes one; others wait until it is there.

    The simulator's own dict lets two threads find nothing at the same time, and each then has a shared array to itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asking = threading.Lock()

    def get(self, line: Any, default: Any = None) -> Any:
        self._asking.acquire()
        found = super().get(line, default)
        if found is not None:
            self._asking.release()
        return found  # None: the lock is kept until the same thread has set what it makes

    def __setitem__(self, line: Any, array: Any) -> None:
        super().__setitem__(line, array)
        self._asking.release()


if SIMULATED:
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    original = FakeCUDAShared.__init__

    def with_allocations(self: Any, dynshared_size: int) -> None:
        original(self, dynshared_size)
        self._allocations = Allocations()

    FakeCUDAShared.__init__ = with_allocations


def run_in_simulator(file: str) -> None:
    """pytest on `file`, in a process of its own; its tests must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
