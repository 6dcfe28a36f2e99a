"""The portable kernel, cuda_src/sm80/gemm.cu: what it can do, its tiles, and which one a problem takes. Data and NumPy.

Sparse warp-level instructions (`mma.sp`) run on every GPU since compute capability 8.0. Layouts: sm80_layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..dtypes import BFLOAT16, CUDA_CODES, FLOAT8, FLOAT16, INT8, DType
from ..errors import UnsupportedError
from ..pattern import Pattern
from .sm80_layout import LARGEST_GROUP, Layout, arrange, layout, restore

__all__ = [
    "KERNEL",
    "LARGEST_GROUP",
    "Config",
    "Layout",
    "Tile",
    "arrange",
    "candidates",
    "choose",
    "layout",
    "options",
    "restore",
]

KERNEL = "sm80/gemm.cu"
PARAMETERS = {
    "x": "address", "x_pitch": "integer", "x_bytes": "integer", "weights": "address", "scale_x": "address",
    "scale_w": "address", "bias": "address", "bias_type": "integer", "y": "address", "y_pitch": "integer",
    "m": "integer", "n": "integer", "blocks": "integer", "parts": "address", "arrived": "address",
}  # fmt: skip
"""Of the kernel, in its order."""

SUFFIX = ""
"""Of the architecture it is compiled for: none, plain sm_80 to sm_120."""

OUT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def supported_dtypes(capability: tuple[int, int]) -> tuple[DType, ...]:
    """The packed types that `mma.sp` takes at a compute capability."""
    return (INT8, BFLOAT16, FLOAT16) if capability < (8, 9) else (INT8, FLOAT8, BFLOAT16, FLOAT16)


def require_support(capability: tuple[int, int], dtype: DType) -> None:
    """Raise UnsupportedError where `mma.sp` does not take `dtype`."""
    if dtype not in supported_dtypes(capability):
        raise UnsupportedError(
            f"packed: {dtype} weights need compute capability 8.9 or later, this device has {capability[0]}.{capability[1]};"
            " pack as int8 or bfloat16 for it"
        )


def emulated(capability: tuple[int, int], dtype: DType) -> bool:
    """Whether the compiler builds this `mma.sp` from other instructions: right, but slow and hungry for registers."""
    return dtype is FLOAT8 and 9 <= capability[0] < 12


# ---- tiles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A thread block computes m tokens x n outputs, by warps_m x warps_n warps; per_sm blocks should share a processor."""

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
class Processor:
    """What the choice needs to know of a GPU's multiprocessors.

    Attributes:
        shared, block_shared: bytes of shared memory, of all blocks together and of one.
        mma_clocks: clocks of one sparse instruction, per multiprocessor (its four parts working).
    """

    shared: int
    block_shared: int
    mma_clocks: int


def processor(capability: tuple[int, int]) -> Processor:
    """CUDA C++ Programming Guide, "Compute Capabilities"; unknown ones count as the smallest."""
    if capability in ((8, 0), (8, 7)):
        return Processor(164 << 10, 163 << 10, 2)
    if 9 <= capability[0] < 12:
        return Processor(228 << 10, 227 << 10, 2)
    return Processor(100 << 10, 99 << 10, 4)


def stage_bytes(layout: Layout, tile: Tile) -> int:
    """Shared memory of one stage: a block of arranged weights and one of x."""
    return tile.n // 16 * layout.block_bytes + tile.m * layout.stride


def stages(layout: Layout, tile: Tile, sm: Processor) -> int:
    """As many stages as leave room for tile.per_sm blocks; if that is not three, as many as one block may have."""
    each = stage_bytes(layout, tile)
    shared = ((sm.shared // tile.per_sm - 1024) // each, sm.block_shared // each)
    return min(MOST_STAGES, shared[0] if shared[0] >= 3 else shared[1])


@dataclass(frozen=True)
class Config:
    """One way to run the kernel.

    Attributes:
        dtype, out: type of weights and activations; name of the type of y.
        stages: blocks of k under way.
        splits: thread blocks that share the k of a tile.
    """

    dtype: DType
    out: str
    layout: Layout
    tile: Tile
    stages: int
    splits: int

    def __str__(self) -> str:
        shared = f", k split {self.splits} ways" if self.splits > 1 else ""
        return f"{self.tile}, {self.stages} stages of {self.layout.columns} columns{shared}"

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

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return self.tiles(m, n), self.splits, 1

    def counters(self, m: int, n: int) -> int:
        """Tiles that are split: so many counters, zeros before and after a launch."""
        return self.tiles(m, n) if self.splits > 1 else 0

    def part_bytes(self, m: int, n: int) -> int:
        """Workspace for the accumulators of split tiles, and after it a counter a tile, which start as zeros."""
        return self.splits * self.tiles(m, n) * self.tile.m * self.tile.n * 4 if self.splits > 1 else 0

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
        }  # fmt: skip


# ---- the choice ----------------------------------------------------------------------------------------------------


def candidates(pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int]) -> Iterator[Config]:
    """Every configuration that fits the device, k not split."""
    require_support(capability, dtype)
    sm, lay = processor(capability), layout(pattern, dtype.bits)
    for tile in EMULATED_TILES if emulated(capability, dtype) else TILES:
        if pattern.group > 8 and (tile.accumulators > 64 or (emulated(capability, dtype) and tile.m > 16)):
            continue  # the words of a row and of the weights would not fit in registers beside the sums
        if (count := stages(lay, tile, sm)) >= 2:
            yield Config(dtype, out, lay, tile, count, 1)


def cost(config: Config, m: int, n: int, k: int, capability: tuple[int, int], sms: int) -> float:
    """Estimated clocks of a product: a model for comparing configurations, fitted on an H200 (docs/kernels.md).

    A multiprocessor is kept busy by its tensor cores, by the port of its shared memory (128 bytes a clock), by what the L2
    cache delivers to it or the memory to the L2 cache, or it waits: for its only warps, or for copies. The longest counts.
    """
    lay, tile, sm = config.layout, config.tile, processor(capability)
    strips, groups = tile.n // tile.warps_n // 16, tile.m // tile.warps_m // 8
    fragments = min(12 if strips * groups > 16 else 20, lay.steps * strips)
    registers = min(255, tile.accumulators + 5 * fragments + 2 * lay.words + 40)
    fit = (tile.per_sm, sm.shared // (config.shared_bytes + 1024), 65536 // (config.threads * registers))
    resident = max(1, min(fit))

    mma = sm.mma_clocks * (20 if emulated(capability, config.dtype) else 1)
    stage = stage_bytes(lay, tile)
    tensor = lay.steps * (tile.n // 16) * (tile.m // 8) * mma
    port = 0.9 * (tile.warps * (strips * (4 * lay.steps + lay.meta_words) + groups * lay.words) + stage / 128)
    cache = stage / 57
    memory = tile.n // 16 * lay.block_bytes / min(8, -(-m // tile.m)) / 30  # tiles above each other share weights
    busy = max(tensor, port, cache, memory)
    alone = max(lay.steps * max(strips * groups * 5.8 * mma, 35) + 85, 1570 / (config.stages - 1))

    blocks = -(-lay.blocks(k) // config.splits)
    fixed = 2240 + tile.n * tile.m * OUT_BYTES[config.out] / 37
    if config.splits > 1:
        fixed += 3230 + tile.n * tile.m
    total, left = 0.0, -(-config.tiles(m, n) * config.splits // sms)  # thread blocks of the busiest multiprocessor
    while left > 0:
        together = min(left, resident)
        rounds = left // together if together == resident else 1
        each = (
            max(together * busy, alone) if together > 1 else max(1.15 * busy, alone)
        )  # nobody works while one meets a barrier
        total += rounds * (blocks * each + together * fixed)
        left -= rounds * together
    return total


def options(
    m: int, n: int, k: int, pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int], sms: int
) -> Iterator[Config]:
    """Every launch that may pay for y [m, n] = x [m, k] @ w.T on a device of `sms` multiprocessors: k whole, and split.

    A split leaves each part two blocks of k, and is left out where one part fewer gives every multiprocessor two blocks.
    """
    for config in candidates(pattern, dtype, out, capability):
        for splits in range(1, min(MOST_SPLITS, max(1, config.layout.blocks(k) // 2)) + 1):
            if splits == 1 or config.tiles(m, n) * (splits - 1) < 2 * sms:
                yield replace(config, splits=splits)


@lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int], sms: int) -> Config:
    """The cheapest of `options`."""
    every = options(m, n, k, pattern, dtype, out, capability, sms)
    return min(every, key=lambda config: cost(config, m, n, k, capability, sms))
