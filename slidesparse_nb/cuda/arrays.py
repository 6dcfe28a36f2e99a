"""Arrays of other libraries as CuPy arrays, and where arrays live; nothing is copied here."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from ..core.checks import overlapping, share_memory
from ..errors import OperandError
from .driver import one_line


def as_cupy(name: str, value: Any) -> Any:
    """`value` seen as a CuPy array: itself, or through DLPack or __cuda_array_interface__.

    Raises:
        OperandError: it is no array on a GPU.
    """
    if type(value) is cupy.ndarray:
        return value
    if isinstance(value, np.ndarray):
        raise OperandError(f"{name}: is a NumPy array, but x is on a GPU; move it there: cupy.asarray({name})")
    reasons = []
    for view, protocol in ((cupy.from_dlpack, "__dlpack__"), (cupy.asarray, "__cuda_array_interface__")):
        try:  # DLPack first: it alone knows bfloat16
            if hasattr(value, protocol):
                return view(value)
        except Exception as error:  # the other library's, of any kind: PyTorch refuses a tensor that requires grad
            reasons.append(one_line(error))
    why = f" ({reasons[0]})" if reasons else ""
    raise OperandError(
        f"{name}: {type(value).__name__} is not an array on a GPU that CuPy can view{why}; pass a CuPy array, or one that"
        " speaks DLPack"
    )


def device_of(value: Any) -> int:
    """The number of the device that an array is on, and the current one's of what is no array.

    The array is not viewed: DLPack makes CuPy's current stream wait for the other library's, by an event which breaks the
    capture of a CUDA graph unless the two are the same. So the right stream is entered first.
    """
    if type(value) is cupy.ndarray:
        return int(value.data.device_id)
    if (device := getattr(value, "__dlpack_device__", None)) is not None:
        return int(device()[1])
    address = getattr(value, "__cuda_array_interface__", {"data": (0, True)})["data"][0]
    return int(cupy.cuda.runtime.pointerGetAttributes(address).device if address else cupy.cuda.runtime.getDevice())


class ForeignStream:
    """Another library's stream, told as the CUDA stream protocol has it.

    Args:
        stream: an object with that protocol, or with `cuda_stream` or `ptr`; or the address. It is held.
    """

    def __init__(self, stream: Any) -> None:
        self.held = stream
        protocol = getattr(stream, "__cuda_stream__", None)
        self.address = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream)) if protocol is None else protocol()[1]
        if not isinstance(self.address, int):
            raise OperandError(f"stream: {type(stream).__name__} is not a CUDA stream; pass cupy.cuda.Stream or its address")

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


def as_stream(stream: Any) -> Any:
    """A CuPy stream from a CuPy stream, or from another library's; on the current device."""
    if isinstance(stream, cupy.cuda.Stream):
        return stream
    foreign = ForeignStream(stream)
    if hasattr(cupy.cuda.Stream, "from_external"):  # of CuPy 14, which deprecates the other
        return cupy.cuda.Stream.from_external(foreign)
    return cupy.cuda.ExternalStream(foreign.address)


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
