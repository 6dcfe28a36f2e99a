"""Code that runs on a GPU or compiles for one. What needs CuPy is imported when a GPU is first used: by `module`, or `cupy`."""

from __future__ import annotations

import importlib
from typing import Any

from . import driver


def module(name: str, what: str) -> Any:
    """A module of this package that needs CuPy and Numba CUDA: "matmul", "pack" ...

    Args:
        what: the subject of the error: "matmul", "to_device" ...

    Raises:
        UnsupportedError: they cannot be imported; the message says what is missing, and what to install.
    """
    return importing(f"{__name__}.{name}", what)


def importing(name: str, what: str) -> Any:
    """The module of this full name, which needs CuPy and Numba CUDA: like `module`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise driver.unusable(what, error) from None


def cupy(what: str, instead: str) -> Any:
    """CuPy, where it finds a GPU.

    Args:
        what: the subject of the error.
        instead: what works without a GPU.

    Raises:
        UnsupportedError: there is no GPU, no CuPy, or CuPy does not find the GPU.
    """
    try:
        found: Any = importlib.import_module("cupy")
        if not found.cuda.runtime.getDeviceCount():
            raise LookupError("it finds none")
    except Exception as error:  # CuPy's, of a kind that depends on what is missing
        raise driver.unusable(what, error, instead) from None
    return found
