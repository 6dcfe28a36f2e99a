"""Machines without CuPy or without a GPU, and what a command that times kernels says there: one sentence, exit code 5."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from click.testing import Result

LACKS = ("CuPy", "driver", "device")
"""What a machine may lack."""


def take_away(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one of a machine that lacks one of LACKS."""

    def count() -> int:
        if part == "driver":
            raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
        return 0

    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count)))
    monkeypatch.setitem(sys.modules, "cupy", None if part == "CuPy" else cupy)


def assert_refused(done: Result, command: str, part: str) -> None:
    """Assert that the command `command` said so, and nothing else."""
    reason = {
        "CuPy": "times GPU kernels and needs CuPy, which cannot be imported (",
        "driver": "needs an NVIDIA GPU, and none can be used (cudaErrorInsufficientDriver: ",
        "device": "needs an NVIDIA GPU, and none can be used (",
    }[part]
    assert done.exit_code == 5
    assert done.stderr.startswith(f"error: {command}: {reason}")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
