"""CUDA C++ text -> cubin, by NVIDIA's run-time compiler; needs no GPU and no driver.

A binding of our own, because cupy.cuda.nvrtc.getCUBIN leaves out the last byte, and compiling ahead should not need CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path

from ... import env
from ...errors import UnsupportedError
from ..driver import AbsentError

OLDEST = (12, 5)
"""The first CUDA whose compiler knows `mma.sp::ordered_metadata`, the portable kernel's instruction."""


class CompileError(Exception):
    """The compiler's log."""


class Nvrtc:
    """One loaded NVRTC library.

    Attributes:
        version: (major, minor) of the compiler.
        path: of the library.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        for part in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else ():
            ctypes.CDLL(str(part))  # which some versions do not find beside themselves
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def _call(self, name: str, *args: object) -> int:
        return int(getattr(self._library, name)(*args))

    def _check(self, name: str, *args: object) -> None:
        if code := self._call(name, *args):
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"{name}: {self._library.nvrtcGetErrorString(code).decode()}")

    def architectures(self) -> list[int]:
        """Numbers of the architectures it compiles for: 80, 90, 120 ..."""
        count = ctypes.c_int()
        self._check("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", numbers)
        return list(numbers)

    def compile(self, source: str, name: str, options: list[str]) -> tuple[bytes, str]:
        """Source text, called `name` in messages -> cubin, log.

        Raises:
            CompileError: with the compiler's log.
        """
        program = ctypes.c_void_p()
        self._check("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            given = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
            failed = self._call("nvrtcCompileProgram", program, len(options), given)
            log = self._bytes("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if failed:
                raise CompileError(log)
            return self._bytes("nvrtcGetCUBIN", program), log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, getter: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"{getter}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getter, program, buffer)
        return buffer.raw


def candidates() -> list[str]:
    """Where NVRTC may be, the likeliest first: beside the Python packages, known to the loader, in the CUDA toolkit."""
    folders = [Path(p) / "nvidia" for p in sys.path if p]
    found = [str(p) for f in folders for p in sorted(f.glob("*/lib/libnvrtc.so.*"), reverse=True)]
    found += ["libnvrtc.so.13", "libnvrtc.so.12"]
    roots = [*env.toolkits(), "/usr/local/cuda"]
    found += [str(p) for root in roots for p in sorted(Path(root).glob("lib64/libnvrtc.so.*"), reverse=True)]
    return [p for p in found if re.search(r"libnvrtc\.so\.\d+$", p)]


@functools.cache
def load(major: int | None = None) -> Nvrtc:
    """The first NVRTC found, of CUDA `major` if there is one: a driver may not load what a later compiler made.

    Raises:
        UnsupportedError: there is none, or none of CUDA 12.5 or newer.
    """
    loaded: list[Nvrtc] = []
    older: Nvrtc | None = None
    for path in candidates():
        try:
            library = Nvrtc(path)
        except OSError:
            continue
        if library.version < OLDEST:
            older = older or library
        elif major is None or library.version[0] == major:
            return library
        else:
            loaded.append(library)
    if loaded:
        return loaded[0]
    package = f"nvidia-cuda-nvrtc{'-cu12' if major == 12 else ''}"
    if older:
        found, wanted = (f"CUDA {a}.{b}" for a, b in (older.version, OLDEST))
        raise UnsupportedError(
            f"nvrtc: {older.path} is of {found}, but the kernels need {wanted} or newer; pip install --upgrade {package}"
        )
    raise AbsentError(f"nvrtc: no libnvrtc.so was found, which compiles the kernels; pip install {package}")
