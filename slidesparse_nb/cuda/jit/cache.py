"""A .cu file and a few #defines -> a kernel: compiled once for each architecture, cached on disk, loaded by CuPy.

    defines above an #include --NVRTC--> <cache>/<name>-<hash>/kernel.cu, kernel.cubin, build.log --CuPy--> launch

The hash covers the text, everything it includes, the options and the compiler's version. A folder is written under another
name and renamed when it is complete, so that two processes may compile at once; a cubin that is not what was written (a full
disk, a crash) is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import env
from ...errors import SlideSparseError, UnsupportedError
from . import nvrtc

OPTIONS = ("-std=c++17", "-default-device", "-lineinfo", "-Xptxas=-v")
"""What every kernel is compiled with, besides -arch and the include folder. -v puts registers and spills into the log."""


class KernelError(SlideSparseError):
    """A kernel does not compile; the message holds the compiler's first error and the paths of the source and of the log."""


@dataclass(frozen=True)
class Built:
    """A compiled kernel.

    Attributes:
        folder: holds kernel.cu (the generated text), kernel.cubin and build.log (the compiler's).
        log: text of build.log.
    """

    folder: Path
    log: str

    @property
    def cubin(self) -> Path:
        return self.folder / "kernel.cubin"

    def _number(self, pattern: str) -> int:
        found = re.search(pattern, self.log)
        return int(found[1]) if found else 0

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._number(r"Used (\d+) registers")

    @property
    def spills(self) -> int:
        """Bytes a thread stores to and loads from memory for want of registers, counted in the code."""
        return self._number(r"(\d+) bytes spill stores") + self._number(r"(\d+) bytes spill loads")

    @property
    def stack(self) -> int:
        """Bytes of stack a thread."""
        return self._number(r"(\d+) bytes stack frame")

    @property
    def serialized(self) -> bool:
        """Whether the compiler makes every wgmma instruction wait for the one before (its message C7510 to C7519)."""
        return "wgmma.mma_async instructions are serialized" in self.log


@functools.cache
def source_folder() -> Path:
    """cuda_src: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if folder.is_dir():
            return folder
    raise UnsupportedError(f"cuda_src: is neither in {package} nor beside it; install slidesparse_nb again")


def digest(*texts: str) -> str:
    """SHA-256 of texts, as hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def architecture(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


def generated(source: str, defines: Mapping[str, int | str]) -> str:
    """The text that is compiled: named #defines above an #include of `source`, a path under cuda_src."""
    return "".join(f"#define {name} {value}\n" for name, value in defines.items()) + f'#include "{source}"\n'


def build(source: str, defines: Mapping[str, int | str], arch: str, compiler: nvrtc.Nvrtc | None = None) -> Built:
    """The kernel of a .cu file under cuda_src, from the cache or compiled into it now; needs no GPU.

    Raises:
        KernelError: it does not compile.
        UnsupportedError: there is no compiler, or it does not know the architecture; or the sources have changed meanwhile.
    """
    compiler = compiler or nvrtc.load()
    number = int(re.sub(r"\D", "", arch))
    if number not in compiler.architectures():
        raise UnsupportedError(
            f"nvrtc: {compiler.path} (CUDA {compiler.version[0]}.{compiler.version[1]}) does not compile for {arch};"
            " install a newer one"
        )
    text = generated(source, defines)
    options = [f"-arch={arch}", *OPTIONS]
    texts = _included(source)
    key = digest(text, *texts.values(), *options, repr(compiler.version))[:24]
    name = f"{Path(source).with_suffix('').as_posix().replace('/', '-')}-{arch}-{key}"
    folder = env.cache_dir() / name

    def make() -> tuple[bytes, str, Mapping[str, str]]:
        if _read(source) != texts:  # the compiler would read what the key does not say, for launches that know the old kernel
            raise UnsupportedError(f"{source}: has changed since this process first read it; start the process again")
        try:
            cubin, log = compiler.compile(text, str(folder / "kernel.cu"), [*options, f"-I{source_folder()}"])
        except nvrtc.CompileError as error:
            failed = folder.with_name(f"{name}.failed.cu")
            failed.write_text(text)
            said = failed.with_suffix(".log")
            said.write_text(f"{error}\n")
            lines = str(error).splitlines() or [""]
            first = next((line for line in lines if re.search(r"\b(error|fatal)( #[\w-]+)?\s*:", line)), lines[0]).strip()
            raise KernelError(
                f"{source}: does not compile for {arch}: {first}; its text is in {failed}, more in {said}"
            ) from None
        return cubin, log, {"kernel.cu": text}

    return cached(name, make)


def _read(source: str) -> Mapping[str, str]:
    """A file under cuda_src and everything it includes, by path."""
    texts: dict[str, str] = {}
    left = [source]
    while left:
        if (name := left.pop()) not in texts:
            texts[name] = (source_folder() / name).read_text()
            left += re.findall(r'^\s*#include "([^"]+)"', texts[name], re.MULTILINE)
    return dict(sorted(texts.items()))


@functools.cache
def _included(source: str) -> Mapping[str, str]:
    """The same, as it was when this process first asked: a server looks up many kernels of one source."""
    return _read(source)


@functools.cache
def source_hash(source: str) -> str:
    """Of a file under cuda_src and everything it includes."""
    return digest(*_included(source).values())[:12]


def _complete(folder: Path) -> Built | None:
    """The kernel that an earlier build wrote, if its files are complete."""
    try:
        whole = hashlib.sha256((folder / "kernel.cubin").read_bytes()).hexdigest() == (folder / "sha256").read_text()
        return Built(folder, (folder / "build.log").read_text()) if whole else None
    except OSError:
        return None


def _unwritable(folder: Path, error: OSError) -> UnsupportedError:
    return UnsupportedError(f"cache: {folder} cannot be written ({error}); set SLIDESPARSE_CACHE_DIR to a folder that can")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Any:
    """A folder to fill, which then becomes `folder`; an incomplete one is replaced."""
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(dir=root, prefix=".building-"))
    except OSError as error:
        raise _unwritable(root, error) from None
    try:
        filling = holder / "new"
        filling.mkdir()
        yield filling
        if folder.exists() and _complete(folder) is None:
            with contextlib.suppress(OSError):  # another process makes room at the same moment
                folder.rename(holder / "torn")
        with contextlib.suppress(OSError):  # another process was first, with the same files
            filling.rename(folder)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def cached(name: str, make: Callable[[], tuple[bytes, str, Mapping[str, str]]]) -> Built:
    """The folder `name` of the cache, filled now if it is missing or incomplete.

    Args:
        make: gives the cubin, the compiler's log, and texts to keep beside them by file name.
    """
    folder = env.cache_dir() / name
    if found := _complete(folder):
        return found
    with _new_folder(folder) as new:
        cubin, log, texts = make()
        for file, text in {**texts, "build.log": log, "sha256": hashlib.sha256(cubin).hexdigest()}.items():
            (new / file).write_text(text)
        (new / "kernel.cubin").write_bytes(cubin)
    return Built(folder, log)


def replace_text(place: Path, text: str) -> None:
    """Write a file of the cache beside its place and rename it: a reader sees the old text or the new.

    Raises:
        UnsupportedError: the folder cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        number, beside = tempfile.mkstemp(dir=place.parent, prefix=".writing-")
        try:
            with os.fdopen(number, "w") as stream:
                stream.write(text)
            os.replace(beside, place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    except OSError as error:
        raise _unwritable(place.parent, error) from None


# ---- with a GPU ----------------------------------------------------------------------------------------------------


def device_compiler() -> nvrtc.Nvrtc:
    """The compiler of the CUDA version that CuPy runs on; without CuPy kernels are only compiled ahead, by any compiler."""
    try:
        import cupy
    except ImportError:
        return nvrtc.load()
    return nvrtc.load(cupy.cuda.runtime.runtimeGetVersion() // 1000)


def load(built: Built, name: str) -> Any:
    """The function `name` of a cubin as a cupy.RawKernel, which loads itself on every device where it is launched."""
    import cupy

    return cupy.RawModule(path=str(built.cubin)).get_function(name)
