"""Arrays of other libraries as CuPy arrays, and where arrays live; nothing is copied here."""

from __future__ import annotations

import contextlib
from typing import Any

import cupy
import numpy as np

from ..dtypes import BFLOAT16, FLOAT16, FLOAT32
from ..errors import OperandError

FLOATS = {FLOAT32: "float32", FLOAT16.numpy: "float16", BFLOAT16.numpy: "bfloat16"}
"""Types of x, bias and y -> the names that kernels are told."""


def as_cupy(name: str, value: Any) -> Any:
    """`value` seen as a CuPy array: itself, or through DLPack or __cuda_array_interface__.

    Raises:
        OperandError: it is no array on a GPU.
    """
    if type(value) is cupy.ndarray:
        return value
    if isinstance(value, np.ndarray):
        raise OperandError(f"{name}: is a NumPy array, but x is on a GPU; move it there: cupy.asarray({name})")
    with contextlib.suppress(Exception):  # DLPack first: it alone knows bfloat16
        return cupy.from_dlpack(value)
    if hasattr(value, "__cuda_array_interface__"):
        return cupy.asarray(value)
    raise OperandError(f"{name}: {type(value).__name__} is not an array on a GPU; pass a CuPy array, or one that speaks DLPack")


def as_stream(stream: Any) -> Any:
    """A CuPy stream from a CuPy stream, or from another library's that tells its address (`cuda_stream`, `ptr`, an int)."""
    if stream is None or isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream):
        return stream
    address = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if not isinstance(address, int):
        raise OperandError(f"stream: {type(stream).__name__} is not a CUDA stream; pass cupy.cuda.Stream or its address")
    return cupy.cuda.ExternalStream(address)


def float_name(name: str, array: Any) -> str:
    """ "float32", "float16" or "bfloat16"; OperandError for another type."""
    if (known := FLOATS.get(array.dtype)) is None:
        raise OperandError(f"{name}: {array.dtype} must be one of {', '.join(FLOATS.values())}; convert it first")
    return known
