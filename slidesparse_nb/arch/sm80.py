"""The portable kernel, cuda_src/sm80/gemm.cu: what it can do, its tiles, candidates and their cost. Data and NumPy.

Sparse warp-level instructions (`mma.sp`) run on every GPU since compute capability 8.0. Layouts: sm80_layout.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.dtypes import CUDA_CODES, FLOAT4, FLOAT8, INT8, DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.problem import Device, GemmProblem
from ..core.scheme import Scheme
from . import sm80_fp4
from .common import PlainLaunch, refuses
from .operand import Operand
from .sm80_layout import LARGEST_GROUP, Layout, arrange, layout, row_tiles

PARAMETERS = {
    "x": "address", "x_pitch": "integer", "x_bytes": "integer", "weights": "address", "scale_x": "address",
    "scale_w": "address", "bias": "address", "bias_type": "integer", "y": "address", "y_pitch": "integer",
    "m": "integer", "n": "integer", "blocks": "integer", "parts": "address", "arrived": "address",
}  # fmt: skip
"""Of the kernel, in its order."""

OUT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def seen(pattern: Pattern, k: int) -> tuple[Pattern, int]:
    """Pattern and k as the kernel sees them: of the slid weight, if groups are too wide for its lift or over pairs."""
    if pattern.unit == 2:
        return sm80_fp4.PAIRS, sm80_fp4.bytes_of(pattern, k)
    return (Pattern(2, 4), pattern.expanded_k(k)) if pattern.group > LARGEST_GROUP else (pattern, k)


def layout_of(pattern: Pattern, scheme: Scheme) -> Layout:
    """The layout of weights whose pattern is `seen`."""
    return sm80_fp4.layout(scheme.weights.block) if scheme.weights.block else layout(pattern, scheme.dtype.bits)


def emulated(capability: tuple[int, int], dtype: DType) -> bool:
    """Whether the compiler builds this `mma.sp` from other instructions: right, but slow and hungry for registers."""
    return dtype is FLOAT8 and 9 <= capability[0] < 12


BLOCK_SCALED = ((12, 0), (12, 1))
"""Compute capabilities whose `mma.sp` has forms with block scales: of float8, here all 1, and of pairs of e2m1."""

HALVED = ((8, 6), (8, 9), (12, 0))
"""Compute capabilities whose GeForce GPUs multiply floats of 16 and 8 bits at half rate into float32, but for BLOCK_SCALED."""


def halved(capability: tuple[int, int], name: str) -> bool:
    """Whether this GPU is one of these; professional ones of the same capability are not (docs/kernels.md).

    Args:
        name: as the driver spells it; a GPU without a name is taken for a GeForce.
    """
    return capability in HALVED and (not name or "GeForce" in name)


# ---- tiles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A thread block computes m tokens x n outputs, by warps_m x warps_n warps; per_sm blocks should share an SM."""

    n: int
    m: int
    warps_n: int
    warps_m: int
    per_sm: int

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_m

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums."""
        return self.n * self.m // (32 * self.warps)

    def __str__(self) -> str:
        return f"{self.m} tokens x {self.n} outputs, {self.warps_m} x {self.warps_n} warps"


TILES = (
    Tile(n=128, m=256, warps_n=2, warps_m=4, per_sm=1),
    Tile(n=256, m=128, warps_n=4, warps_m=2, per_sm=1),
    Tile(n=128, m=128, warps_n=2, warps_m=2, per_sm=2),
    Tile(n=128, m=128, warps_n=2, warps_m=4, per_sm=1),
    Tile(n=128, m=64, warps_n=2, warps_m=2, per_sm=3),
    Tile(n=128, m=64, warps_n=4, warps_m=1, per_sm=3),
    Tile(n=64, m=64, warps_n=2, warps_m=2, per_sm=4),
    Tile(n=128, m=32, warps_n=4, warps_m=1, per_sm=3),
    Tile(n=64, m=32, warps_n=2, warps_m=2, per_sm=4),
    Tile(n=128, m=16, warps_n=4, warps_m=1, per_sm=4),
    Tile(n=64, m=16, warps_n=4, warps_m=1, per_sm=4),
    Tile(n=64, m=8, warps_n=4, warps_m=1, per_sm=5),
)
EMULATED_TILES = (
    Tile(n=64, m=32, warps_n=4, warps_m=2, per_sm=1),
    Tile(n=64, m=16, warps_n=4, warps_m=2, per_sm=1),
    Tile(n=64, m=8, warps_n=4, warps_m=1, per_sm=2),
)
MOST_STAGES = 6
MOST_SPLITS = 16


@dataclass(frozen=True)
class Sm:
    """What the choice needs to know of a GPU's SMs.

    Attributes:
        shared, block_shared: bytes of shared memory, of all blocks together and of one.
        mma_clocks: clocks of one sparse instruction at full rate, per SM (its four parts working).
    """

    shared: int
    block_shared: int
    mma_clocks: int


def sm_of(capability: tuple[int, int]) -> Sm:
    """CUDA C++ Programming Guide, "Compute Capabilities"; unknown ones count as the smallest."""
    if capability in ((8, 0), (8, 7)):
        return Sm(164 << 10, 163 << 10, 2)
    if 9 <= capability[0] < 12:
        return Sm(228 << 10, 227 << 10, 2)
    return Sm(100 << 10, 99 << 10, 4)


def stage_bytes(layout: Layout, tile: Tile) -> int:
    """Shared memory of one stage: a block of arranged weights and one of x."""
    return tile.n // 16 * layout.block_bytes + tile.m * layout.stride


def stages(layout: Layout, tile: Tile, sm: Sm) -> int:
    """As many stages as leave room for tile.per_sm blocks; if that is not three, as many as one block may have."""
    each = stage_bytes(layout, tile)
    shared = ((sm.shared // tile.per_sm - 1024) // each, sm.block_shared // each)
    return min(MOST_STAGES, shared[0] if shared[0] >= 3 else shared[1])


@dataclass(frozen=True)
class Config(PlainLaunch):
    """One launch of the kernel.

    Attributes:
        dtype, out: type of weights and activations; name of the type of y.
        stages: k-blocks that are loaded ahead.
        splits: thread blocks that share the k of a tile.
        block_scaled: the instruction is one with block scales.
    """

    dtype: DType
    out: str
    layout: Layout
    tile: Tile
    stages: int
    splits: int
    block_scaled: bool = False
    source, parameters = "sm80/gemm.cu", PARAMETERS

    def __str__(self) -> str:
        shared = f", split-K {self.splits}" if self.splits > 1 else ""
        scaled = ", block-scaled MMA" if self.block_scaled else ""
        columns = f"{self.layout.columns} {'pairs' if self.dtype is FLOAT4 else 'columns'}"
        return f"{self.tile}, {self.stages} stages of {columns}{shared}{scaled}"

    @property
    def suffix(self) -> str:
        return "a" if self.block_scaled else ""

    @property
    def threads(self) -> int:
        return 32 * self.tile.warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the stages, or the rows that y passes through afterwards (smem.cuh)."""
        staging = self.tile.warps * 8 * (self.tile.n // self.tile.warps_n + 4) * 4
        return max(self.stages * stage_bytes(self.layout, self.tile), staging)

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.tile.m) * -(-n // self.tile.n)

    @property
    def buffers(self) -> dict[str, str]:
        return {"weights": "weights"}

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        return self.tiles(problem.m, problem.n), self.splits, 1

    def arguments(self, problem: GemmProblem) -> dict[str, int]:
        return {"blocks": self.blocks(problem)}

    def blocks(self, problem: GemmProblem) -> int:
        """Blocks that cover k."""
        return self.layout.blocks(seen(problem.pattern, problem.k)[1])

    def counters(self, problem: GemmProblem) -> int:
        """Tiles that are split."""
        return self.tiles(problem.m, problem.n) if self.splits > 1 else 0

    def part_bytes(self, problem: GemmProblem) -> int:
        """Of the accumulators of split tiles."""
        return self.splits * self.counters(problem) * self.tile.m * self.tile.n * 4

    def shares(self) -> dict[str, object]:
        return {"splits": self.splits}

    def defines(self) -> dict[str, int | str]:
        """What stands above the #include of the kernel."""
        lay, tile = self.layout, self.tile
        return {
            "DTYPE": CUDA_CODES[self.dtype.name],
            "OUT": CUDA_CODES[self.out],
            "GROUP": lay.pattern.group,
            "WORDS": lay.words,
            "RUN": lay.run,
            "LOAD": lay.load,
            "STRIDE": lay.stride,
            "TILE_N": tile.n,
            "TILE_M": tile.m,
            "WARPS_N": tile.warps_n,
            "WARPS_M": tile.warps_m,
            "STAGES": self.stages,
            "THREADS": self.threads,
            "SHARED_BYTES": self.shared_bytes,
            **({"SCALES": lay.scales} if lay.scales else {}),
            **({"BLOCK_SCALED": 1} if self.block_scaled else {}),
        }  # fmt: skip

    def mma_clocks(self, device: Device) -> int:
        """Clocks of one sparse instruction, per SM."""
        full = sm_of(device.capability).mma_clocks
        if emulated(device.capability, self.dtype):
            return 20 * full
        slow = self.dtype is not INT8 and not self.block_scaled and halved(device.capability, device.name)
        return 2 * full if slow else full


# ---- the architecture ------------------------------------------------------------------------------------------------


class Portable:
    """See `arch.Arch`."""

    source, parameters, portable = Config.source, PARAMETERS, True

    def serves(self, capability: tuple[int, int]) -> bool:
        return capability >= (8, 0)

    def refuses(self, capability: tuple[int, int], scheme: Scheme) -> str:
        """`mma.sp` multiplies operands of one type, float8 since 8.9, pairs of e2m1 where it has forms with block scales."""
        pairs = scheme.unit == 2 and scheme.activations == scheme.weights
        if not pairs and (why := refuses(scheme)):
            return why
        if capability in BLOCK_SCALED if pairs else scheme.dtype is not FLOAT8 or capability >= (8, 9):
            return ""
        return (
            f"packed: {scheme} weights need compute capability {'12.0 or 12.1' if pairs else '8.9 or later'}, this device has"
            f" {capability[0]}.{capability[1]}; pack as int8 or bfloat16 for it"
        )

    def operand(self, pattern: Pattern, k: int, scheme: Scheme) -> Operand:
        if block := scheme.activations.block:
            return sm80_fp4.operand(pattern, k, block)
        loaded, k = seen(pattern, k)
        return Operand(False, pattern if loaded != pattern else None, k * scheme.activations.element.bits // 8)

    def arrange(self, packed: PackedWeight, xp: Any = np, least_memory: bool = False) -> dict[str, Any]:
        if packed.pattern.unit == 2:
            return {"weights": sm80_fp4.arrange(packed, xp)}
        pattern, k = seen(packed.pattern, packed.k)
        return {"weights": arrange(replace(packed, pattern=pattern, shape=(packed.n, k)), xp)}

    def buffer_bytes(self, pattern: Pattern, n: int, k: int, scheme: Scheme) -> tuple[dict[str, int], ...]:
        pattern, k = seen(pattern, k)
        lay = layout_of(pattern, scheme)
        return ({"weights": lay.blocks(k) * row_tiles(n) * lay.block_bytes},)

    def kernels(self, pattern: Pattern, scheme: Scheme, out: str, capability: tuple[int, int]) -> Iterator[Config]:
        """Of every tile that fits the device, k not split; the block-scaled form of float8 first where there is one."""
        sm, dtype, lay = sm_of(capability), scheme.dtype, layout_of(pattern, scheme)
        forms = {FLOAT8: (True, False), FLOAT4: (True,)}.get(dtype, (False,)) if capability in BLOCK_SCALED else (False,)
        for tile in EMULATED_TILES if emulated(capability, dtype) else TILES:
            if lay.pattern.group > 8 and (tile.accumulators > 64 or (emulated(capability, dtype) and tile.m > 16)):
                continue  # the words of a row and of the weights would not fit in registers beside the sums
            if (count := stages(lay, tile, sm)) >= 2:
                yield from (Config(dtype, out, lay, tile, count, 1, block_scaled) for block_scaled in forms)

    def candidates(
        self, problem: GemmProblem, buffers: Collection[str] | None = None, every: bool = True
    ) -> Iterator[tuple[Config, ...]]:
        """k whole, and split.

        Split-K leaves each part two k-blocks, and is left out where one part fewer gives every SM two blocks.
        """
        device, pattern = problem.device, seen(problem.pattern, problem.k)[0]
        for config in self.kernels(pattern, problem.scheme, problem.out, device.capability):
            tiles = config.tiles(problem.m, problem.n)
            for splits in range(1, min(MOST_SPLITS, max(1, config.blocks(problem) // 2)) + 1):
                if splits == 1 or tiles * (splits - 1) < 2 * device.sms:
                    yield (replace(config, splits=splits),)

    def quantizes(self, problem: GemmProblem, buffers: Collection[str] | None = None) -> bool:
        return False

    def again(
        self, candidate: tuple[Config, ...], chosen: int, problem: GemmProblem, buffers: Collection[str] | None = None
    ) -> tuple[Config, ...]:
        return candidate

    def cost(self, candidate: tuple[Config, ...], problem: GemmProblem) -> float:
        """Clocks: a model for comparing configurations, fitted on an H200 (docs/kernels.md).

        An SM is kept busy by its tensor cores, by the port of its shared memory (128 bytes a clock), by what L2
        delivers to it or memory to L2, or it waits: for its only warps, or for copies. The longest counts.
        """
        (config,), m, device = candidate, problem.m, problem.device
        lay, tile, sm = config.layout, config.tile, sm_of(device.capability)
        row_tiles, groups = tile.n // tile.warps_n // 16, tile.m // tile.warps_m // 8
        fragments = min(12 if row_tiles * groups > 16 else 20, lay.steps * row_tiles)
        registers = min(255, tile.accumulators + 5 * fragments + 2 * lay.words + 40)
        fit = (tile.per_sm, sm.shared // (config.shared_bytes + 1024), 65536 // (config.threads * registers))
        resident = max(1, min(fit))

        mma = config.mma_clocks(device)
        stage = stage_bytes(lay, tile)
        tensor = lay.steps * (tile.n // 16) * (tile.m // 8) * mma
        port = 0.9 * (tile.warps * (row_tiles * (4 * lay.steps + lay.meta_words) + groups * lay.words) + stage / 128)
        cache = stage / 57
        memory = tile.n // 16 * lay.block_bytes / min(8, -(-m // tile.m)) / 30  # tiles above each other share weights
        busy = max(tensor, port, cache, memory)
        alone = max(lay.steps * max(row_tiles * groups * 5.8 * mma, 35) + 85, 1570 / (config.stages - 1))

        blocks = -(-config.blocks(problem) // config.splits)
        fixed = 2240 + tile.n * tile.m * OUT_BYTES[config.out] / 37
        if config.splits > 1:
            fixed += 3230 + tile.n * tile.m
        total, left = 0.0, -(-config.tiles(m, problem.n) * config.splits // device.sms)  # blocks of the busiest SM
        while left > 0:
            together = min(left, resident)
            rounds = left // together if together == resident else 1
            each = (
                max(together * busy, alone) if together > 1 else max(1.15 * busy, alone)
            )  # nobody works while one meets a barrier
            total += rounds * (blocks * each + together * fixed)
            left -= rounds * together
        return total

    def error(self, scheme: Scheme, ks: int) -> float:
        return 0.0


ARCH = Portable()


def advice(device: Device) -> str:
    """What to know before choosing an 8-bit scheme for this device: why int8 is faster there than float8; "" if it is not."""
    if ARCH.refuses(device.capability, Scheme.of(FLOAT8)):
        return ""
    if emulated(device.capability, FLOAT8):
        return f"prefer {INT8} there: the compiler emulates the instruction for {FLOAT8}, which is slow"
    clocks = {
        dtype: min(c.mma_clocks(device) for c in ARCH.kernels(Pattern(6, 8), Scheme.of(dtype), "bfloat16", device.capability))
        for dtype in (INT8, FLOAT8)
    }
    if (times := clocks[FLOAT8] // clocks[INT8]) == 1:
        return ""
    return f"prefer {INT8} there: NVIDIA states {times} times the rate of {FLOAT8} (not measured by us)"
