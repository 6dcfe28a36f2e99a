"""What each GPU architecture wants, as data and NumPy; nothing here touches a GPU.

An architecture is one file that has an `ARCH`, its layout, its folder of CUDA sources, and a row of `ARCHITECTURES`. All else
asks the protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from .. import env
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.problem import Device, GemmProblem
from ..core.scheme import SCHEMES, Scheme
from ..errors import UnsupportedError
from . import sm80, sm90, sm100
from .common import MOST_UNQUANTIZED as MOST_UNQUANTIZED
from .operand import Operand


class Config(Protocol):
    """One launch of a kernel; as a string, for a reader."""

    @property
    def source(self) -> str:
        """The file under cuda_src that defines the kernel, whose name is the file's."""

    @property
    def suffix(self) -> str:
        """Of the target that the kernel is compiled for: "a" in sm_90a, "" where it needs no features of one architecture."""

    @property
    def parameters(self) -> Mapping[str, str]:
        """Parameters of the kernel, in its order: name -> "address" or "integer"."""

    @property
    def threads(self) -> int:
        """Threads of a block."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of dynamic shared memory a block."""

    @property
    def buffers(self) -> Mapping[str, str]:
        """Which of the weight's buffers the kernel loads: parameter -> buffer, or "derived", which is in the workspace."""

    def defines(self) -> dict[str, int | str]:
        """The #defines above the #include of the kernel, THREADS among them."""

    def shares(self) -> Mapping[str, object]:
        """Beside the defines, what tells this launch from others of its kernel."""

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Blocks."""

    def arguments(self, problem: GemmProblem) -> dict[str, int]:
        """The integers that problem and launch fix, by parameter."""

    def early(self, problem: GemmProblem) -> bool:
        """Whether it is launched before the grid before it is complete, for which the kernel waits (PDL)."""

    def counters(self, problem: GemmProblem) -> int:
        """Counters in the workspace, zeros before and after a launch."""

    def part_bytes(self, problem: GemmProblem) -> int:
        """Bytes of the workspace for partial sums."""

    def derived_bytes(self, problem: GemmProblem) -> int:
        """Bytes of the workspace that it fills with a buffer derived from the weight's, for the launches after it."""


C = TypeVar("C", bound=Config)
Candidate = tuple[Config, ...]
"""The launches that compute a product."""


class Arch(Protocol[C]):
    """An architecture: its kernel, the layouts that it loads, and the launches that a problem takes."""

    @property
    def source(self) -> str:
        """The file under cuda_src that defines the kernel that multiplies, `gemm`."""

    @property
    def parameters(self) -> Mapping[str, str]:
        """Parameters of that kernel."""

    @property
    def portable(self) -> bool:
        """Whether it serves GPUs of other architectures, too."""

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether its kernel runs on a GPU of this compute capability."""

    def refuses(self, capability: tuple[int, int], scheme: Scheme) -> str:
        """Why weights of this scheme cannot be multiplied there, in a sentence; "" if they can."""

    def operand(self, pattern: Pattern, k: int, scheme: Scheme) -> Operand:
        """The layout of x [m, k]."""

    def arrange(self, packed: PackedWeight, xp: Any, least_memory: bool = False) -> dict[str, Any]:
        """Packed weights as the kernel loads them: buffers by name.

        Args:
            xp: numpy or cupy, whichever made packed.values.
            least_memory: leave out what can be made of the others for a launch, at a cost in time.
        """

    def buffer_bytes(self, pattern: Pattern, n: int, k: int, scheme: Scheme) -> tuple[dict[str, int], ...]:
        """What `arrange` may make of weights [n, k]: name of each buffer -> its bytes, in every form that they may have."""

    def kernels(self, pattern: Pattern, scheme: Scheme, out: str, capability: tuple[int, int]) -> Iterator[C]:
        """Every kernel, as a launch of it."""

    def quantizes(self, problem: GemmProblem, buffers: Collection[str] | None = None) -> bool:
        """Whether the kernel should quantize x [m, k] itself, if x is of the type of y, in rows of whole 16-byte vectors."""

    def candidates(
        self, problem: GemmProblem, buffers: Collection[str] | None = None, every: bool = True
    ) -> Iterator[tuple[C, ...]]:
        """The candidates, each the launches that compute the product.

        Args:
            buffers: names of the weight's; by default those of most weights of its pattern and type.
            every: also those that are known to be slower than another, whatever they are estimated to take.
        """

    def again(
        self, candidate: tuple[C, ...], chosen: int, problem: GemmProblem, buffers: Collection[str] | None = None
    ) -> tuple[C, ...] | None:
        """The candidate that launches the same kernels for the m of `problem`; None if there is none.

        Args:
            candidate: for `chosen` tokens, which are no fewer, and else the same problem and buffers.
        """

    def cost(self, candidate: tuple[C, ...], problem: GemmProblem) -> float:
        """Estimated time, of a unit that candidates of one problem share."""

    def error(self, scheme: Scheme, ks: int) -> float:
        """How far sums over ks expanded columns may be off, relative to those of magnitudes, beside additions in float32."""


ARCHITECTURES: tuple[Arch[Any], ...] = (sm100.ARCH, sm90.ARCH, sm80.ARCH)
"""Those made for one architecture first."""

RAN: frozenset[tuple[str, tuple[int, int]]] = frozenset({(sm90.ARCH.source, (9, 0)), (sm80.ARCH.source, (9, 0))})
"""Kernels, by source, and the compute capabilities on which we ran their tests. Anywhere else a kernel is tested on the device
before its first product (cuda/self_test.py)."""

STEPS = (512, 8), (2048, 32), (float("inf"), 128)
"""(most, step): for up to `most` tokens the model is asked for multiples of `step`."""

LEFT_ASIDE: set[tuple[tuple[int, int], Scheme]] = set()
"""Compute capabilities, and schemes whose kernel made for that architecture failed its test in this process: the portable
kernel multiplies them."""


def serving(capability: tuple[int, int]) -> tuple[Arch[Any], ...]:
    """Every architecture whose kernel runs on a GPU of this compute capability, the one to use first.

    Raises:
        UnsupportedError: the GPU has no sparse tensor cores.
    """
    if found := tuple(arch for arch in ARCHITECTURES if arch.serves(capability)):
        return found
    raise UnsupportedError(
        f"device: compute capability {capability[0]}.{capability[1]} has no sparse tensor cores; 8.0 (A100) or later is"
        " needed, or NumPy arrays, which are multiplied on the CPU"
    )


def for_capability(capability: tuple[int, int], portable: bool | None = None, scheme: Scheme | None = None) -> Arch[Any]:
    """The architecture whose kernel multiplies on a GPU of this compute capability, such as (9, 0).

    Args:
        portable: leave aside what is made for one architecture; by default what SLIDESPARSE_PORTABLE says, or whether that
            kernel failed its test for `scheme`.
        scheme: of the weights; a kernel that refuses them leaves them to the next one, the portable one last.

    Raises:
        UnsupportedError: the GPU has no sparse tensor cores.
    """
    portable = env.portable() or (capability, scheme) in LEFT_ASIDE if portable is None else portable
    left = [arch for arch in serving(capability) if arch.portable or not portable]
    return next((arch for arch in left if scheme is None or not arch.refuses(capability, scheme)), left[-1])


def of(problem: GemmProblem) -> Arch[Any]:
    """The architecture whose kernel multiplies it."""
    return for_capability(problem.device.capability, problem.device.portable, problem.scheme)


def ran(problem: GemmProblem) -> bool:
    """Whether we ran the kernel that multiplies it on GPUs of its device's compute capability."""
    return (of(problem).source, problem.device.capability) in RAN


def advice(device: Device) -> str:
    """What a user should know who chooses a scheme for this device, in a sentence without its end; "" if nothing."""
    return sm80.advice(device) if for_capability(device.capability, device.portable).portable else ""


def multiplied(arch: Arch[Any], capability: tuple[int, int]) -> tuple[Scheme, ...]:
    """The schemes that `arch` multiplies there."""
    return tuple(scheme for scheme in SCHEMES.values() if not arch.refuses(capability, scheme))


def require_support(arch: Arch[Any], capability: tuple[int, int], scheme: Scheme) -> None:
    """Raise UnsupportedError where `arch` cannot multiply weights of this scheme."""
    if why := arch.refuses(capability, scheme):
        raise UnsupportedError(why)


@lru_cache(maxsize=16384)
def choose(problem: GemmProblem, buffers: tuple[str, ...] | None = None) -> Candidate:
    """The cheapest candidate, the first of equals, for weights of these buffers (`Arch.candidates`).

    Raises:
        UnsupportedError: the device cannot multiply weights of this scheme, or more than one group.
    """
    if problem.groups != 1:
        raise UnsupportedError(f"problem: {problem}: no kernel multiplies groups; multiply them one by one")
    arch = of(problem)
    require_support(arch, problem.device.capability, problem.scheme)
    return min(arch.candidates(problem, buffers, every=False), key=lambda candidate: arch.cost(candidate, problem))


@lru_cache(maxsize=16384)
def quantizes(problem: GemmProblem, buffers: tuple[str, ...] | None = None) -> bool:
    """`Arch.quantizes`, remembered; False where kernels must pass their self-test first, which has no such problem."""
    return ran(problem) and of(problem).quantizes(problem, buffers)


def asked_for(m: int) -> int:
    """The m that the model is asked for in the place of m: it takes a millisecond, and a server sees any number of tokens."""
    step = next(step for most, step in STEPS if m <= most)
    return -(-m // step) * step


def modelled(problem: GemmProblem, buffers: tuple[str, ...] | None = None) -> Candidate:
    """The candidate with the kernels that the model chooses for `asked_for(m)` tokens.

    Where there is none, the model's choice for m rounded up to a multiple of eight tokens, which all tiles are. Few tokens that
    the kernel quantizes are not rounded up.
    """
    if problem.unquantized:
        return choose(problem, buffers)
    asked = asked_for(problem.m)
    chosen = choose(replace(problem, m=asked), buffers)
    rounded = replace(problem, m=-(-problem.m // 8) * 8)
    return _again(chosen, asked, rounded, buffers) or choose(rounded, buffers)


@lru_cache(maxsize=16384)
def _again(chosen: Candidate, asked: int, problem: GemmProblem, buffers: tuple[str, ...] | None) -> Candidate | None:
    return of(problem).again(chosen, asked, problem, buffers)
