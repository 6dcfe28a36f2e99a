"""Running a test file once more in Numba's CUDA simulator, which is chosen when Numba is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_simulator(file: str) -> None:
    """pytest on `file`, in a process of its own; its tests must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
