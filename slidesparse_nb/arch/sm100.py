"""The kernel on `tcgen05.mma.sp`, the sparse tensor-core instruction of Blackwell's data-center GPUs (sm_100a, sm_103a).

Data and pure functions; sm100_layout.py has layouts, descriptors and addresses. Nobody has run this kernel yet: its layouts are
checked against a NumPy model of the instructions (tests/test_arch_sm100.py), and `cost` is made of ceilings, not of timings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.dtypes import CUDA_CODES, INT8, DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.problem import GemmProblem
from ..core.scheme import Scheme
from . import sm100_layout as layout
from .common import SHARED_MEMORY, PlainLaunch, Tiled, refuses
from .operand import STAGE
from .sm100_layout import arrange

PARAMETERS = {
    "x": "address", "weights": "address", "scale_x": "address", "scale_w": "address", "bias": "address",
    "bias_type": "integer", "y": "address", "y_pitch": "integer", "m": "integer", "n": "integer", "k_tiles": "integer",
    "raster_group": "integer",
}  # fmt: skip
"""Parameters of the kernel, in its order."""

TOKENS = (256, 128, 64, 32)
"""Tokens of a tile, which has 256 outputs. An int8 instruction of a pair of thread blocks takes a multiple of 32."""

THREADS = 192
"""Of a block: a warp that loads, a warp that multiplies, four that write y."""

MOST_STAGES = 16
"""Most slots of the ring."""
RASTER_GROUP = 8
"""Tiles along n that run together with all tiles along m."""

WITHOUT_INT8 = (10, 3)
"""The GPU that has `tcgen05` but not its kind i8 (PTX ISA, "tcgen05.mma", target ISA notes)."""

MMA_TOKENS_PER_CLOCK = 2
"""Ceiling of the tensor cores of a pair: tokens of an instruction (256 outputs, 64 bytes of expanded k) a clock."""
L2_BYTES_PER_CLOCK = 57
"""Bytes that L2 delivers to an SM a clock; measured on Hopper."""
LOAD_CLOCKS = 1500
"""Clocks from the request of a k-tile until it is in shared memory; of Hopper."""
TILE_CLOCKS, CHUNK_CLOCKS = 3000, 500
"""Clocks of a tile beside its k-tiles: fixed, and for each 32 tokens that are written; estimated from the code."""


@dataclass(frozen=True)
class Config(PlainLaunch):
    """One launch of the kernel.

    Attributes:
        dtype, out: type of weights and activations; name of the type of y.
        tokens: of a tile, whose 256 outputs a pair of thread blocks shares.
    """

    dtype: DType
    out: str
    tokens: int
    source, suffix, parameters, threads = "sm100/gemm.cu", "a", PARAMETERS, THREADS  # only targets with "a" have tcgen05
    buffers = {"weights": "weights"}  # noqa: RUF012  a field otherwise

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {2 * layout.ROWS} outputs, {self.stages} stages"

    # ---- shared memory (cuda_src/sm100/smem.cuh): of each slot activations, values, metadata; then the barriers

    @property
    def values_at(self) -> int:
        """Where a slot's values start: after the activations of half of the tokens."""
        return layout.blocks(self.dtype) * self.tokens // 2 * STAGE

    @property
    def metadata_at(self) -> int:
        """Where a slot's metadata start."""
        return self.values_at + layout.blocks(self.dtype) * layout.VALUE_BYTES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a slot, which holds a k-tile."""
        return self.values_at + layout.weight_bytes(self.dtype)

    @property
    def stages(self) -> int:
        """Slots of the ring, as many as fit."""
        fit = (SHARED_MEMORY - 1024) // self.stage_bytes
        return min(MOST_STAGES, fit, layout.most_slots(self.tokens))

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + 1024

    # ---- the launch

    def tiles(self, problem: GemmProblem) -> int:
        return -(-problem.m // self.tokens) * -(-problem.n // (2 * layout.ROWS))

    def k_tiles(self, problem: GemmProblem) -> int:
        return layout.k_tiles(problem.pattern, problem.k, self.dtype)

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        """Pairs of thread blocks, at most one for every two SMs; a pair computes one tile after another."""
        return 2 * min(self.tiles(problem), max(1, problem.device.sms // 2)), 1, 1

    def arguments(self, problem: GemmProblem) -> dict[str, int]:
        return {"k_tiles": self.k_tiles(problem), "raster_group": RASTER_GROUP}

    def defines(self) -> dict[str, int | str]:
        """The #defines above the #include of the kernel: its type and tile; descriptors and addresses, which it asserts."""
        steps = ", ".join("{" + ", ".join(map(str, step)) + "}" for step in layout.steps(self.dtype, self.tokens))
        return {
            "DTYPE": CUDA_CODES[self.dtype.name],
            "OUT": CUDA_CODES[self.out],
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "VALUES_AT": self.values_at,
            "METADATA_AT": self.metadata_at,
            "STAGE_BYTES": self.stage_bytes,
            "ACTIVATIONS_DESCRIPTOR": f"{layout.ACTIVATIONS_DESCRIPTOR:#x}",
            "VALUES_DESCRIPTOR": f"{layout.VALUES_DESCRIPTOR:#x}",
            "METADATA_DESCRIPTOR": f"{layout.METADATA_DESCRIPTOR:#x}",
            "INSTRUCTION_DESCRIPTOR": f"{layout.instruction_descriptor(self.dtype, self.tokens):#x}",
            "STEPS": steps,
            "SECOND_COLUMN": layout.second_at(self.tokens),
            "METADATA_COLUMN": layout.metadata_column(self.tokens),
            "THREADS": self.threads,
            "SHARED_BYTES": self.shared_bytes,
        }  # fmt: skip


class Blackwell(Tiled):
    """See `arch.Arch`."""

    source, parameters = Config.source, PARAMETERS

    def serves(self, capability: tuple[int, int]) -> bool:
        return capability in ((10, 0), (10, 3))

    def refuses(self, capability: tuple[int, int], scheme: Scheme) -> str:
        """`tcgen05.mma.sp` multiplies operands of one type; 10.3 has no int8."""
        if scheme.dtype is INT8 and capability == WITHOUT_INT8:
            return f"packed: tcgen05 of compute capability 10.3 does not multiply {scheme}; pack as float8_e4m3fn for it"
        return refuses(scheme)

    def arrange(self, packed: PackedWeight, xp: Any = np, least_memory: bool = False) -> dict[str, Any]:
        return arrange(packed, xp)

    def buffer_bytes(self, pattern: Pattern, n: int, k: int, scheme: Scheme) -> tuple[dict[str, int], ...]:
        tiles = layout.k_tiles(pattern, k, scheme.dtype) * layout.row_tiles(n)
        return ({"weights": tiles * layout.weight_bytes(scheme.dtype)},)

    def kernels(self, pattern: Pattern, scheme: Scheme, out: str, capability: tuple[int, int]) -> Iterator[Config]:
        """Of every tile; they do not depend on the pattern."""
        for tokens in TOKENS:
            yield Config(scheme.dtype, out, tokens)

    def candidates(
        self, problem: GemmProblem, buffers: Collection[str] | None = None, every: bool = True
    ) -> Iterator[tuple[Config, ...]]:
        for config in self.kernels(problem.pattern, problem.scheme, problem.out, problem.device.capability):
            yield (config,)

    def cost(self, candidate: tuple[Config, ...], problem: GemmProblem) -> float:
        """Clocks, by ceilings of the tensor cores, L2 and latency; nothing here was measured on this GPU."""
        (config,) = candidate
        multiply = len(layout.steps(config.dtype, config.tokens)) * config.tokens / MMA_TOKENS_PER_CLOCK
        k_tile = max(multiply, config.stage_bytes / L2_BYTES_PER_CLOCK, LOAD_CLOCKS / config.stages)
        rounds = -(-config.tiles(problem) // max(1, problem.device.sms // 2))
        written = TILE_CLOCKS + config.tokens // layout.CHUNK * CHUNK_CLOCKS
        hidden = max(config.k_tiles(problem) * k_tile, written)  # y is written while the next tile is multiplied
        return rounds * hidden + min(config.k_tiles(problem) * k_tile, written)


ARCH = Blackwell()
