"""What architectures have in common: what most launches need not say, and what kernels of one element type refuse."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..core.dtypes import FLOAT8, PACKED
from ..core.pattern import Pattern
from ..core.problem import GemmProblem
from ..core.scheme import Scheme
from .operand import STAGE, Operand, stages

SHARED_MEMORY = 232448
"""Most bytes of shared memory of a thread block, on Hopper and B200. CUDA C++ Programming Guide, "Compute Capabilities"."""

MOST_UNQUANTIZED = 2
"""Largest m for which kernels quantize x themselves."""

FLOAT8_ERROR = 2.0**-10
"""Error of one float8 instruction (64 expanded columns) relative to the sum of magnitudes. Hopper's accumulator has 13 bits of
fraction and cuts off what is below (docs/hopper.md); Blackwell's is taken for the same, since the manual tells nothing."""


class PlainLaunch:
    """A launch that needs nothing of the workspace and starts when the grid before it is complete; see `arch.Config`."""

    def early(self, problem: GemmProblem) -> bool:
        return False

    def arguments(self, problem: GemmProblem) -> dict[str, int]:
        return {}

    def shares(self) -> dict[str, object]:
        return {}

    def counters(self, problem: GemmProblem) -> int:
        return 0

    def part_bytes(self, problem: GemmProblem) -> int:
        return 0

    def derived_bytes(self, problem: GemmProblem) -> int:
        return 0


def refuses(scheme: Scheme) -> str:
    """Why an instruction that multiplies operands of one type does not multiply weights of this scheme; "" if it does."""
    if scheme.activations == scheme.weights and scheme.dtype in PACKED:
        return ""
    return f"packed: {scheme} weights have no kernel for this device; pack as int8 or bfloat16 for it"


class Tiled:
    """An architecture whose kernel loads activations in the swizzled tile layout; see `arch.Arch`."""

    portable = False

    def operand(self, pattern: Pattern, k: int, scheme: Scheme) -> Operand:
        return Operand(True, pattern, STAGE * stages(pattern, k, scheme.activations.element))

    def quantizes(self, problem: GemmProblem, buffers: Collection[str] | None = None) -> bool:
        return False

    def again(self, candidate: Any, chosen: int, problem: GemmProblem, buffers: Collection[str] | None = None) -> Any:
        return candidate

    def error(self, scheme: Scheme, ks: int) -> float:
        return -(-ks // 64) * FLOAT8_ERROR if scheme.dtype is FLOAT8 else 0.0
