"""Compiling the GPU kernels ahead, on any machine: every kernel and candidate, and what the compiler made of each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .. import env
from ..arch import Config, modelled, serving
from ..core.checks import float_dtype, whole_number
from ..core.dtypes import FLOATS, DType
from ..core.pattern import Pattern, known_patterns
from ..core.problem import Asked, Device, GemmProblem
from ..core.scheme import SCHEMES, Scheme
from ..errors import UnsupportedError
from .jit import cache, nvrtc

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
"""The compute capabilities that kernels are compiled for unless others are named."""

Job = tuple[str, Mapping[str, "int | str"], str]
"""Source under cuda_src, defines, architecture."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class KernelReport:
    """What became of one kernel.

    Attributes:
        registers, spills, stack: of a thread: registers; bytes stored and loaded for want of them; bytes of stack.
        shared: bytes of dynamic shared memory a thread block.
        sparse: sparse matrix instructions in the machine code; None where there is no disassembler, or the kernel does not
            multiply.
        serialized: the compiler lets every one of them wait for the one before.
    """

    arch: str
    pattern: str
    dtype: str
    config: str
    registers: int
    spills: int
    stack: int
    shared: int
    sparse: int | None
    serialized: bool = False

    @property
    def good(self) -> bool:
        """No spills, and sparse tensor cores at work, one instruction while another is under way."""
        return not self.spills and not self.stack and self.sparse != 0 and not self.serialized


def build_kernels(
    capabilities: Sequence[tuple[int, int]] = CAPABILITIES,
    patterns: Sequence[Pattern] | None = None,
    dtypes: Sequence[Scheme | DType | str] | None = None,
    out: str = "bfloat16",
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[KernelReport]:
    """Compile every kernel and candidate into the cache, without a GPU; those that are there already are not compiled again.

    Args:
        capabilities: compute capabilities, such as (9, 0); by default all that kernels are made for.
        patterns: by default 2:4 to 14:16.
        dtypes: of the weights, or schemes; by default all. One that an architecture does not multiply is left out there.
        out: name of the type of y.
        workers: kernels compiled at a time; by default as many as there are processors.
        progress: called with ("compiling", kernels done, kernels in all).

    Raises:
        OperandError: a type that is none of weights, or of y; or no number of workers.
        UnsupportedError: there is no compiler, or it does not know an architecture; or there is nothing to compile.
        KernelError: a kernel does not compile.
    """
    workers = workers if workers is None else whole_number("workers", workers, 1)
    asked = SCHEMES.values() if dtypes is None else dtypes
    schemes, out = list(dict.fromkeys(Scheme.of(d).kernel for d in asked)), FLOATS[float_dtype("out", out)]
    work = list(_jobs(capabilities, known_patterns() if patterns is None else patterns, schemes, out))
    if not work and schemes:
        there = " and ".join(map(cache.architecture, capabilities))
        raise UnsupportedError(f"dtypes: {', '.join(map(str, schemes))} weights have no kernel for {there}; name another")
    built = compile_all([job for job, _ in work], workers=workers, progress=progress)
    sparse = [sparse_instructions(b) if multiplies(job) else None for b, (job, _) in zip(built, work, strict=True)]
    return [
        KernelReport(*told[:4], b.registers, b.spills, b.stack, told[4], count, b.serialized)
        for b, count, (_, told) in zip(built, sparse, work, strict=True)
    ]


def _jobs(
    capabilities: Sequence[tuple[int, int]], patterns: Sequence[Pattern], schemes: Sequence[Scheme], out: str
) -> Iterator[tuple[Job, tuple[str, str, str, str, int]]]:
    """Every kernel and candidate: how it is built, and what the report says of it beforehand."""
    for capability in capabilities:
        for arch in serving(capability):  # its own kernel, and the portable one
            if env.portable() and not arch.portable:
                continue
            for pattern in patterns:
                for scheme in (scheme for scheme in schemes if not arch.refuses(capability, scheme)):
                    over = scheme.pattern(pattern)
                    for config in arch.kernels(over, scheme, out, capability):
                        target = cache.architecture(capability) + config.suffix
                        told = (target, str(over), str(scheme), str(config), config.shared_bytes)
                        yield (config.source, config.defines(), target), told


def build_products(products: Iterable[Asked], capability: tuple[int, int], sms: int) -> int:
    """Compile the kernels that these products will launch, on all of a machine's processors at once; return how many.

    Args:
        products: (m, n, k, pattern, dtype of the weights, name of the type of y) of each.
        capability: compute capability of the GPU, such as (9, 0).
        sms: its SMs.

    Raises:
        OperandError: a product that cannot be, or no number of SMs.
        UnsupportedError: there is no compiler, or it does not know the architecture.
        KernelError: a kernel does not compile.
    """
    configs = launches_of(products, capability, sms)
    return len(compile_all(kernels_of(configs, capability), cache.device_compiler()))


def launches_of(products: Iterable[Asked], capability: tuple[int, int], sms: int) -> list[Config]:
    """The launches that compute these products, of every one in turn; arguments and errors are those of `build_products`."""
    device = Device(capability, whole_number("sms", sms, 1))
    return [config for asked in products for config in modelled(GemmProblem.of(asked, device))]


def kernels_of(configs: Iterable[Config], capability: tuple[int, int]) -> list[Job]:
    """The kernels that these launches take on a GPU of this compute capability, each once."""
    target = cache.architecture(capability)
    jobs = [(config.source, config.defines(), target + config.suffix) for config in configs]
    return list({repr(job): job for job in jobs}.values())


def multiplies(job: Job) -> bool:
    """Whether the kernel multiplies, rather than prepares operands."""
    return Path(job[0]).stem == "gemm"


def compile_all(
    work: Sequence[Job],
    compiler: nvrtc.Nvrtc | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[cache.Built]:
    """Compile into the cache, several kernels at a time; those that are there already are not compiled again.

    Args:
        compiler: by default the one that is found.
        workers: threads, which NVRTC lets compile at the same time; by default as many as there are processors.
        progress: as for `build_kernels`.
    """
    compiler, tell, done = compiler or nvrtc.load(), progress or (lambda *_: None), list[cache.Built]()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for built in pool.map(lambda job: cache.build(job[0], job[1], job[2], compiler), work):
            done.append(built)
            tell("compiling", len(done), len(work))
    return done


def disassembler() -> str | None:
    """NVIDIA's nvdisasm: on the path, beside the Python packages, or in a toolkit."""
    folders = [p for root in sys.path if root for p in Path(root).glob("nvidia/*/bin")]
    folders += [Path(root) / "bin" for root in [*env.toolkits(), "/usr/local/cuda"]]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(map(str, folders)))


def matrix_instructions(built: cache.Built) -> list[str] | None:
    """Names of the matrix instructions in the machine code, in its order; None without a disassembler."""
    if (tool := disassembler()) is None:
        return None
    text = subprocess.run([tool, "-c", str(built.cubin)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\b[A-Z]*MMA\b[.\w]*", text)


def sparse_instructions(built: cache.Built) -> int | None:
    """How many of them are sparse (HMMA.SP, IGMMA.SP, QMMA.SF.SP, OMMA.SF.SP ...).

    UTCQMMA and its like, of tcgen05, are sparse by a bit of a descriptor, which their kernel asserts.
    """
    found = matrix_instructions(built)
    return None if found is None else sum(bool(re.match(r"[HIOQ]G?MMA(\.SF)?\.SP\b|UTC[HIQ]MMA\b", name)) for name in found)
