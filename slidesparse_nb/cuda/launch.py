"""Launching a kernel, in a few microseconds of the caller's time, and with programmatic dependent launch.

    arguments, addresses and integers --struct--> memory of a slot, beside the configuration --cuLaunchKernelEx--> stream

A launch may be programmatic: its blocks then start while the grid before it in the stream still runs, as soon as all blocks
of that one have executed `griddepcontrol.launch_dependents` or are done. Such a kernel must execute `griddepcontrol.wait` in
every block before it reads, or writes, anything that an earlier grid may touch: it waits until all of them are complete and
their writes visible. Source: CUDA Driver API, "Execution Control"; CUDA C++ Programming Guide, "Programmatic Dependent Launch".
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
from collections.abc import Callable, Collection
from typing import Any

from ..errors import SlideSparseError, UnsupportedError
from . import driver

MOST_PARAMETERS = 32
TYPES = {"address": "Q", "integer": "q"}
"""What a kernel's parameter may be -> how it is packed, in eight bytes."""

# struct CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes, how many
CONFIG = "=7I4xQQI4x"
CONFIG_BYTES = struct.calcsize(CONFIG)
ATTRIBUTES_AT = CONFIG_BYTES + 8 * MOST_PARAMETERS
# struct CUlaunchAttribute, of the one attribute used: its id, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, and 1;
# the value is a union of 64 bytes
ATTRIBUTE = "=i4xi60x"
POINTERS_AT = ATTRIBUTES_AT + struct.calcsize(ATTRIBUTE)

INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT: this thread has none yet."""


class LaunchError(SlideSparseError):
    """The driver refuses a launch, or reports the failure of earlier work; the message holds its text."""


class _Slot:
    """Memory for one launch under way: configuration, arguments, the attribute, pointers to the arguments."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(POINTERS_AT + 8 * MOST_PARAMETERS)
        start = ctypes.addressof(self.memory)
        self.config = ctypes.c_void_p(start)
        self.attributes = start + ATTRIBUTES_AT
        self.pointers = ctypes.c_void_p(start + POINTERS_AT)
        struct.pack_into(ATTRIBUTE, self.memory, ATTRIBUTES_AT, 6, 1)
        addresses = [start + CONFIG_BYTES + 8 * i for i in range(MOST_PARAMETERS)]
        struct.pack_into(f"={MOST_PARAMETERS}Q", self.memory, POINTERS_AT, *addresses)


_free: list[_Slot] = []
"""Slots that nobody uses. A call takes one and puts it back, so that threads, and finalizers that launch, never share one."""


class Launcher:
    """A kernel of one device.

    Args:
        function: a CuPy function (`RawKernel.kernel`), or anything that has the address of a CUfunction in `ptr`; it is kept.
        parameters: the types of the kernel's, of TYPES.
    """

    def __init__(self, function: Any, parameters: Collection[str]) -> None:
        if len(parameters) > MOST_PARAMETERS:
            raise AssertionError(f"{len(parameters)} parameters")
        self.function = function
        self._address = ctypes.c_void_p(function.ptr)
        self._pack = struct.Struct(CONFIG + "".join(TYPES[of] for of in parameters)).pack_into
        self._launch: Callable[..., int] = _driver().cuLaunchKernelEx

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        programmatic: bool,
        *arguments: int,
    ) -> None:
        """Launch on the current device.

        Args:
            shared: bytes of dynamic shared memory a block.
            stream: its address.
            programmatic: start before the grid before is complete; only for kernels that execute `griddepcontrol.wait`.

        Raises:
            LaunchError: the driver refuses.
        """
        try:
            slot = _free.pop()
        except IndexError:
            slot = _Slot()
        attributes = slot.attributes if programmatic else 0
        self._pack(slot.memory, 0, *grid, *block, shared, stream, attributes, programmatic, *arguments)
        status = self._launch(slot.config, self._address, slot.pointers, None)
        if status == INVALID_CONTEXT:
            importlib.import_module("cupy").cuda.runtime.free(0)  # gives this thread the context of the current device
            status = self._launch(slot.config, self._address, slot.pointers, None)
        _free.append(slot)
        if status:
            raise LaunchError(f"launch: {grid} blocks of {block} threads, {shared} bytes shared: {explain(status)}")


@functools.cache
def _driver() -> ctypes.CDLL:
    """The driver's library; UnsupportedError if there is none, or one older than CUDA 11.8."""
    library = driver.library()
    if not hasattr(library, "cuLaunchKernelEx"):
        raise UnsupportedError("driver: libcuda.so.1 has no cuLaunchKernelEx; install a driver of CUDA 12 or later")
    return library


def explain(status: int) -> str:
    """The driver's name of a status, and its sentence."""
    texts = []
    for function in (_driver().cuGetErrorName, _driver().cuGetErrorString):
        text = ctypes.c_char_p()
        function(ctypes.c_int(status), ctypes.byref(text))
        texts.append((text.value or b"unknown").decode(errors="replace"))
    return f"{texts[0]} ({status}), {texts[1]}"
