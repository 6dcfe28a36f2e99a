"""Arrays of other libraries as CuPy arrays, and where arrays live; nothing is copied here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from ..errors import OperandError
from ..operands import overlapping, share_memory


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


def require_own_memory(out: Any, others: Iterable[tuple[str, Any]]) -> None:
    """Raise OperandError if `out` shares an element with one of the named arrays, or None, on its device."""
    first, last = _span(out)
    for name, other in others:
        if other is not None:
            start, end = _span(other)
            if start < last and first < end and share_memory(_addresses(out), _addresses(other)):
                raise overlapping(name)


def _span(a: Any) -> tuple[int, int]:
    """Addresses of an array's first byte, and of the one after its last."""
    first = a.data.ptr
    if a.flags.c_contiguous:
        return first, first + a.nbytes
    steps = [(n - 1) * step for n, step in zip(a.shape, a.strides, strict=True)]
    return first + sum(step for step in steps if step < 0), first + sum(step for step in steps if step > 0) + a.itemsize


def _addresses(a: Any) -> Any:
    """A NumPy array that stands where `a` does, for NumPy to compare places: what is there is not the host's to read."""
    place = {"version": 3, "data": (a.data.ptr, True), "shape": a.shape, "strides": a.strides, "typestr": f"|V{a.itemsize}"}
    return np.asarray(SimpleNamespace(__array_interface__=place))
