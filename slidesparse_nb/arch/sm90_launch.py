"""Hopper's launches: tiles, what a launch is made of, and its shared memory. Data and pure functions.

Candidates are chosen in sm90.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from ..core.dtypes import CUDA_CODES, DType
from ..core.pattern import Pattern
from ..core.problem import GemmProblem
from .common import SHARED_MEMORY, PlainLaunch
from .operand import STAGE, stages
from .sm90_layout import VALUE_BYTES, has_compact_metadata, metadata_bytes, row_tiles

PARAMETERS = {
    "x": "address", "values": "address", "scale_x": "address", "scale_w": "address", "bias": "address",
    "bias_type": "integer", "y": "address", "y_pitch": "integer", "m": "integer", "n": "integer", "metadata": "address",
    "stages": "integer", "first_row_tile": "integer", "last_row_tile": "integer", "begin": "integer", "end": "integer",
    "order": "integer", "raster_group": "integer", "x_pitch": "integer", "k": "integer",
}  # fmt: skip
"""Parameters of the kernel, in its order."""

EXPAND_PARAMETERS = {"compact": "address", "expanded": "address", "n": "integer"}
"""Parameters of the kernel that derives expanded metadata from compact."""

SUFFIX = "a"
"""Only sm_90a has wgmma."""

MOST_STAGES = 24
"""Most stages of a ring."""

MOST_OWN_PARTS = 32768
"""Largest partial sums of a cluster, in bytes a block, that have a buffer of their own; larger ones replace stages."""

OWN_X_TOKENS = 8
"""Tokens of the tiles whose blocks may quantize x themselves."""

OWN_X_BYTES = 8192, 20480, 36864
"""Sizes, in bytes, of the shared memory for x and its operand where a block quantizes x itself; the smallest that suffices. The
last is for blocks that have an SM each, pairs and wide tiles: with two on an SM it left too few stages, and a launch for the
quantization was faster (H200)."""

PDL_TOKENS = 512
"""Largest m for which every first launch uses PDL. Above it only those whose blocks have one whole tile each do: others take
up to 1.2x as long (docs/hopper.md)."""

COMPACT, DERIVED, EXPANDED = "compact", "derived", "expanded"
"""The metadata that a candidate reads: compact; expanded, derived from compact by its first launch; or kept expanded."""

CLUSTERS_FIT = {1: 1.0, 2: 1.0, 3: 0.9, 4: 0.9, 5: 0.9, 6: 0.82}
"""Blocks of a cluster, which share a GPC of 16 or 18 SMs -> share of the SMs that clusters find free."""

ALWAYS_COMPACT = 32
"""Largest tile, in tokens, whose kernels of 8-bit types all read compact metadata."""

ALONE, BEFORE_REST, REST = 0, 1, 2
"""Orders of a launch, as cuda_src/sm90/scheduler.cuh numbers them."""

RASTER_GROUP = 16
"""Tiles along n of a rasterization group, which runs together with all tiles along m."""

EXPAND_THREADS, EXPAND_ROW_TILES = 256, 8
"""Threads of a block that derives expanded metadata, and the row tiles of a stage that it takes."""


# ---- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """The outputs of a thread block: `tokens` x `n`, by `warpgroups` consumers with a row tile of 64 outputs each.

    Attributes:
        stage_ns, tile_ns: time of a stage, and of a tile beside its stages; fitted at 6:8 to linears on H200s (sm90_cost.py).
        splits: split-K candidates: thread blocks that share the k of a tile.
        pairs: blocks take whole tiles as long as every block has one, then each two share one of the rest. The tile is computed
            in no other way, and its times tell when it is the fastest rather than how long it takes.
    """

    tokens: int
    warpgroups: int
    stage_ns: int
    tile_ns: int
    splits: tuple[int, ...]
    pairs: bool = False

    @property
    def n(self) -> int:
        """Outputs of a thread block."""
        return 64 * self.warpgroups

    @property
    def wide(self) -> bool:
        """Whether it is of more outputs than other tiles, so that one round, or two, takes all of a large layer."""
        return self.warpgroups > 3

    @property
    def consumers_load(self) -> bool:
        """Whether accumulators leave no registers for a producer, so that consumers load their stages."""
        return self.warpgroups == 3 and self.tokens > 192

    @property
    def rebalances(self) -> bool:
        """Whether a producer, then a warpgroup, gives registers to consumers."""
        return not self.consumers_load and (self.tokens > 128 or (self.warpgroups == 3 and self.tokens > 64))

    @property
    def decodes(self) -> bool:
        """Whether it may read compact metadata. Consumers that load their stages have no registers for it."""
        return not self.consumers_load

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {self.n} outputs"


TILES = (
    Tile(256, 3, 434, 11460, ()),
    Tile(224, 3, 362, 9940, ()),
    Tile(208, 3, 359, 8180, ()),
    Tile(192, 3, 328, 7660, (2, 4)),
    Tile(176, 3, 309, 7120, (2,)),
    Tile(160, 3, 310, 6930, (2, 4)),
    Tile(144, 3, 259, 7420, (2,)),
    Tile(128, 3, 265, 5240, (2, 4)),
    Tile(96, 4, 260, 3540, ()),
    Tile(96, 3, 254, 3120, (2,)),
    Tile(256, 2, 307, 6390, (2, 4)),
    Tile(240, 2, 281, 6660, (2,)),
    Tile(224, 2, 255, 6810, (2, 4)),
    Tile(208, 2, 259, 5390, (2,)),
    Tile(192, 2, 232, 5590, (2, 3, 4)),
    Tile(176, 2, 234, 4550, (2,)),
    Tile(160, 2, 231, 4220, (2, 3, 4)),
    Tile(144, 2, 198, 4090, (2, 3)),
    Tile(128, 2, 198, 2830, (2, 3, 4)),
    Tile(128, 1, 190, 1270, (2,)),
    Tile(96, 2, 188, 2120, (2, 3, 4)),
    Tile(96, 1, 191, 840, (2,)),
    Tile(64, 3, 169, 3980, (4,)),
    Tile(64, 2, 115, 2730, (2, 3, 4)),
    Tile(64, 1, 193, 170, (2, 4, 5)),
    Tile(32, 4, 110, 3600, ()),
    Tile(32, 3, 98, 2280, (4,)),
    Tile(32, 2, 108, 1540, (2, 3, 4)),
    Tile(32, 1, 228, 0, (2, 3, 4, 6)),
    Tile(16, 5, 99, 3100, ()),
    Tile(16, 2, 98, 1730, (2, 4, 6)),
    Tile(16, 1, 140, 110, (2, 3, 4, 6)),
    Tile(8, 4, 177, 700, ()),
    Tile(8, 2, 92, 1540, (2, 3, 4, 5, 6)),
    Tile(8, 1, 136, 0, (2, 3, 4, 6)),
    Tile(192, 3, 394, 3240, (2,), pairs=True),
    Tile(176, 3, 380, 1860, (2,), pairs=True),
    Tile(160, 3, 367, 1200, (2,), pairs=True),
    Tile(144, 3, 269, 2120, (2,), pairs=True),
    Tile(128, 3, 150, 3310, (2,), pairs=True),
    Tile(96, 3, 104, 3770, (2,), pairs=True),
    Tile(64, 3, 82, 1500, (2,), pairs=True),
    Tile(32, 3, 62, 0, (2,), pairs=True),
    Tile(16, 3, 39, 0, (2,), pairs=True),
    Tile(8, 3, 34, 0, (2,), pairs=True),
)


# ---- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(PlainLaunch):
    """One launch of the kernel; without `blocks`, the kernel alone.

    Attributes:
        dtype, out: type of weights and activations; name of the type of y.
        tile: what a thread block, or a cluster, computes.
        stages: slots of the ring.
        windows: windows of a group, of a pattern whose metadata is read in compact form; 0: expanded metadata.
        derived: the expanded metadata is what an `Expansion` before it wrote.
        split_k: thread blocks of a cluster, which share the k of a tile in equal parts; of a tile of pairs the last one.
        resident: thread blocks that fit on an SM; with 2, those of the next launch start beside these.
        row_tiles: the first row tile of weights that this launch may compute, and the one after the last.
        begin, end: the tiles of these row tiles that it computes.
        blocks: thread blocks.
        order: ALONE; or BEFORE_REST and REST, of two launches that share the tiles.
        raster_group: tiles along n that run together with all tiles along m.
        own_x: shared memory for x that a block quantizes itself, in bytes, one of OWN_X_BYTES; 0: x is an operand.
    """

    dtype: DType
    out: str
    tile: Tile
    stages: int
    windows: int
    split_k: int = 1
    resident: int = 1
    row_tiles: tuple[int, int] = (0, 0)
    begin: int = 0
    end: int = 0
    blocks: int = 0
    order: int = ALONE
    raster_group: int = RASTER_GROUP
    derived: bool = False
    own_x: int = 0
    source, suffix, parameters = "sm90/gemm.cu", SUFFIX, PARAMETERS

    def __str__(self) -> str:
        split = ", rest by pairs" if self.tile.pairs else f", split-K {self.split_k}" if self.split_k > 1 else ""
        metadata = ", compact metadata" if self.compact else ""
        quantizes = ", x quantized by each block" if self.own_x else ""
        kernel = f"{self.tile}{split}, {self.stages} stages{metadata}{quantizes}, {self.resident} per SM"
        if not self.blocks:
            return kernel
        first, last = (64 * r for r in self.row_tiles)
        return f"{kernel}, tiles {self.begin} to {self.end} of outputs {first} to {last}, on {self.blocks} blocks"

    def but(self, **changes: Any) -> Config:
        """`dataclasses.replace` at a quarter of its time: a choice makes a hundred launches."""
        made: Config = object.__new__(Config)
        made.__dict__.update(self.__dict__, **changes)
        return made

    @property
    def compact(self) -> bool:
        """Whether the kernel reads compact metadata."""
        return self.windows > 0

    @property
    def threads(self) -> int:
        """Threads of a block: consumers, and a producer of a warp, or of a warpgroup if it gives registers away."""
        consumers = 128 * self.tile.warpgroups
        if self.tile.consumers_load:
            return consumers
        return consumers + (128 if self.tile.rebalances else 32)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage, without its barriers."""
        return stage_bytes(self.tile, self.dtype, self.compact, self.own_x == 0)

    @property
    def fixed_bytes(self) -> int:
        """Shared memory beside the stages and their barriers (cuda_src/sm90/smem.cuh)."""
        own_x = self.own_x + 8 + 8 * self.tile.tokens if self.own_x else 0
        table = 4 * math.comb(2 * self.windows + 2, 2) if self.compact else 0  # a word of nibbles for each mask
        return staging_bytes(self.tile, self.out, self.split_k) + own_x + table + parts_bytes(self.tile, self.split_k)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""
        return -(-(self.stages * (self.stage_bytes + 16) + self.fixed_bytes) // 1024) * 1024

    def tiles(self, m: int) -> int:
        """All tiles of m tokens and these row tiles."""
        return -(-m // self.tile.tokens) * -(-(self.row_tiles[1] - self.row_tiles[0]) // self.tile.warpgroups)

    def fits(self, most: int) -> bool:
        """Whether its blocks all run at once on SMs that hold `most` blocks."""
        return self.blocks <= most * CLUSTERS_FIT[self.split_k]

    @property
    def kernel(self) -> Config:
        """The kernel alone, and its place among the launches."""
        return self.but(row_tiles=(0, 0), begin=0, end=0, blocks=0, raster_group=0)

    def possible(self, along_k: int) -> bool:
        """Whether row tiles and stages suffice: two stages a block of a cluster; a whole ring where consumers load."""
        if self.row_tiles[1] - self.row_tiles[0] < self.tile.warpgroups > 2:  # weights are padded to pairs
            return False
        return along_k >= (self.stages if self.tile.consumers_load else 2 * self.split_k)

    @property
    def buffers(self) -> dict[str, str]:
        return {"values": "values", "metadata": COMPACT if self.compact else DERIVED if self.derived else EXPANDED}

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        return self.blocks, 1, 1

    def arguments(self, problem: GemmProblem) -> dict[str, int]:
        (first, last), count = self.row_tiles, along_k(problem)
        if not self.possible(count) or (self.own_x > 0) != problem.unquantized:
            raise AssertionError(self)
        tiles = {"first_row_tile": first, "last_row_tile": last, "begin": self.begin, "end": self.end}
        return {"stages": count, **tiles, "order": self.order, "raster_group": self.raster_group}

    def early(self, problem: GemmProblem) -> bool:
        """An early launch reads metadata before it waits, and so must not follow the launch that derives it."""
        one_tile = self.split_k == 1 and self.end - self.begin == self.blocks
        return self.order == REST or ((problem.m <= PDL_TOKENS or one_tile) and not self.derived)

    def shares(self) -> dict[str, object]:
        (first, last), launch = self.row_tiles, {"blocks": self.blocks, "order": self.order, "raster_group": self.raster_group}
        return {"row_tiles": f"{first}-{last}", "tiles": f"{self.begin}-{self.end}", **launch}

    def defines(self) -> dict[str, int | str]:
        """The #defines above the #include of the kernel."""
        return {
            "DTYPE": CUDA_CODES[self.dtype.name],
            "OUT": CUDA_CODES[self.out],
            "TOKENS": self.tile.tokens,
            "WARPGROUPS": self.tile.warpgroups,
            "STAGES": self.stages,
            "WINDOWS": self.windows,
            "SPLIT_K": self.split_k,
            **({"PAIRS": 1} if self.tile.pairs else {}),
            "BLOCKS_PER_SM": self.resident,
            **({"OWN_X_BYTES": self.own_x} if self.own_x else {}),
            "THREADS": self.threads,
            "SHARED_BYTES": self.shared_bytes,
        }  # fmt: skip

    def with_most_stages(self) -> Config:
        """The same launch with as many stages as fit into shared memory."""
        room = (SHARED_MEMORY + 1024) // self.resident - 1024 - self.fixed_bytes  # each block takes one KiB more
        fit = room // (self.stage_bytes + 16)
        return self.but(stages=min(MOST_STAGES, fit))


@dataclass(frozen=True)
class Expansion(PlainLaunch):
    """The launch that derives expanded metadata from compact, for the launches after it.

    Attributes:
        dtype: type of weights.
        windows: windows of a group.
    """

    dtype: DType
    windows: int
    source, suffix, parameters = "sm90/expand.cu", SUFFIX, EXPAND_PARAMETERS
    threads, shared_bytes = EXPAND_THREADS, 0

    def __str__(self) -> str:
        return "expansion of compact metadata"

    @property
    def kernel(self) -> Expansion:
        return self

    @property
    def buffers(self) -> dict[str, str]:
        return {"compact": COMPACT, "expanded": DERIVED}

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        return along_k(problem) * -(-row_tiles(problem.n) // EXPAND_ROW_TILES), 1, 1

    def early(self, problem: GemmProblem) -> bool:
        return True

    def derived_bytes(self, problem: GemmProblem) -> int:
        return along_k(problem) * row_tiles(problem.n) * metadata_bytes(self.dtype, False)

    def defines(self) -> dict[str, int | str]:
        """The #defines above the #include of the kernel."""
        code = CUDA_CODES[self.dtype.name]
        return {"DTYPE": code, "WINDOWS": self.windows, "THREADS": self.threads, "ROW_TILES": EXPAND_ROW_TILES}


def stage_bytes(tile: Tile, dtype: DType, compact: bool, with_x: bool = True) -> int:
    """Shared memory of one stage."""
    return -(-(tile.tokens * STAGE * with_x + tile.warpgroups * (VALUE_BYTES + metadata_bytes(dtype, compact))) // 1024) * 1024


def _reducer_tokens(tile: Tile, split_k: int) -> int:
    """Tokens that a block of a cluster adds up: the largest power of two of blocks that divides the groups of 8 shares them."""
    groups = tile.tokens // 8
    return tile.tokens // min(1 << split_k.bit_length() - 1, groups & -groups)


def staging_bytes(tile: Tile, out: str, split_k: int) -> int:
    """Shared memory of rows on their way to y: two chunks of tokens a warpgroup (cuda_src/sm90/epilogue.cuh)."""
    size = 4 if out == "float32" else 2
    tokens = tile.tokens
    if split_k > 1:
        tokens = _reducer_tokens(tile, split_k)
        tokens //= 2 if tokens > 64 and tokens % 16 == 0 else 1
    chunk = 32 if tokens % 32 == 0 and size == 2 else 16 if tokens % 16 == 0 else 8
    return 2 * tile.warpgroups * chunk * 64 * size


def parts_bytes(tile: Tile, split_k: int) -> int:
    """Shared memory of a cluster's barriers, and of a block's partial sums if they have a buffer of their own."""
    if split_k == 1:
        return 0
    parts = 4 * (split_k - 1) * _reducer_tokens(tile, split_k) * tile.n
    return 32 + (parts if parts <= MOST_OWN_PARTS else 0)


@functools.lru_cache(maxsize=4096)
def configured(
    tile: Tile, split_k: int, pattern: Pattern, dtype: DType, out: str, compact: bool, resident: int = 0, own_x: int = 0
) -> Config:
    """The kernel of a tile, with as many stages as fit; `resident` is the first of `residents` by default.

    Args:
        compact: read compact metadata, if the pattern has it.
    """
    windows = pattern.windows if compact and has_compact_metadata(pattern) else 0
    made = Config(dtype, out, tile, 0, windows, split_k, resident or residents(tile)[0], own_x=own_x)
    return made.with_most_stages()


def own_x_bytes(m: int, split_k: int, pattern: Pattern, along_k: int) -> int:
    """Shared memory, in bytes, that a block needs to quantize m tokens itself (cuda_src/sm90/own_x.cuh)."""
    part = 2 * -(-along_k // (2 * split_k))  # stages of a block: whole steps
    windows = 32 * part
    vectors = (windows + windows // pattern.windows + 1) // 4 + 2
    return m * (part * STAGE + vectors * 16) + 16 * OWN_X_TOKENS


def residents(tile: Tile) -> tuple[int, ...]:
    """Candidates for the thread blocks that share an SM; the last is that of second launches."""
    if tile.warpgroups == 1:
        return (2, 1) if tile.tokens >= 96 else (2,)
    return (1, 2) if tile.warpgroups == 2 and tile.tokens <= 32 else (1,)


def along_k(problem: GemmProblem) -> int:
    """Stages that cover k."""
    return stages(problem.pattern, problem.k, problem.dtype)
