"""What `wgmma.mma_async.sp`, the sparse tensor-core instruction of Hopper (sm_90a), wants: images, tiles, cost. Data and NumPy.

The instruction multiplies 64 rows of 2:4 weights by up to 256 tokens, both read from shared memory. A pipeline stage is 128
slid bytes along k, two instructions. Both operands stand in global memory exactly as shared memory wants them, so the kernel
(cuda_src/sm90/gemm.cu) moves them by contiguous bulk copies and never touches an index:

    weights      [strips of 64 rows, stages, strip_bytes]: 64 rows x 64 kept bytes, swizzled in 64-byte rows, then index words
    activations  [stages, groups of 8 tokens, 8 x 128 bytes]: slid, swizzled in 128-byte rows; any run of groups is a tile

Swizzles: PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate", "Shared memory matrix layout". Index words:
those of mma.sp, for each warp's 16 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..dtypes import CUDA_CODES, PACKED, DType
from ..packed import PackedWeight
from ..pattern import Pattern

KERNEL = "sm90/gemm.cu"
SUFFIX = "a"
"""Of the architecture it is compiled for: wgmma is in sm_90a alone."""

PROGRAMMATIC = True
"""Whether the kernel executes `griddepcontrol.wait`, so that it may be launched before the grid before it is complete."""

STAGE = 128
"""Slid bytes of one token in a stage."""

SHARED_MEMORY = 232448
"""Bytes that a thread block may have. CUDA C++ Programming Guide, "Compute Capabilities"."""

MOST_STAGES = 24

FLOAT8_ERROR = 2.0**-10
"""Error of one float8 instruction (64 slid columns), relative to the sum of magnitudes: its accumulator keeps 13 bits of
fraction (docs/hopper.md), and each of its addends is cut off there."""


def supported_dtypes(capability: tuple[int, int]) -> tuple[DType, ...]:
    """The packed types that wgmma.sp takes: all."""
    return PACKED


def require_support(capability: tuple[int, int], dtype: DType) -> None:
    """Nothing to refuse."""


# ---- images ----------------------------------------------------------------------------------------------------------


def stages(pattern: Pattern, k: int, dtype: DType) -> int:
    """Stages that cover a row of k columns: an even number, since kernels for few tokens take two at a time."""
    return max(2, -(-pattern.slid_k(k) * dtype.bits // 8 // (2 * STAGE)) * 2)


def strip_bytes(dtype: DType) -> int:
    """Bytes of 64 rows and one stage: kept values, then one index word (16-bit types) or two (8-bit types) a thread."""
    return 4096 + (512 if dtype.bits == 16 else 1024)


def arrange(packed: PackedWeight, xp: Any = np) -> Any:
    """Packed weights as shared memory wants them: uint8 [ceil(n / 64), stages, strip_bytes].

    Rows and columns beyond the matrix hold zeros with the nibble (0, 1).

    Args:
        xp: numpy or cupy, whichever made packed.values.
    """
    n, strips, count = packed.n, -(-packed.n // 64), stages(packed.pattern, packed.k, packed.dtype)
    wide = packed.dtype.bits == 16
    values = xp.zeros((64 * strips, 64 * count), np.uint8)
    stored = packed.values.view(np.uint8)
    values[:n, : stored.shape[1]] = stored
    meta = xp.full((64 * strips, (16 if not wide else 8) * count), 0x44, np.uint8)
    meta[:n, : packed.meta.shape[1]] = packed.meta

    row, byte = np.arange(64)[:, None], np.arange(64)
    swizzled = xp.asarray(row * 64 + (byte ^ (row // 2 % 4 * 16))).ravel()
    image = xp.empty((strips, count, 4096), np.uint8)
    image[:, :, swizzled] = values.reshape(strips, 64, count, 64).transpose(0, 2, 1, 3).reshape(strips, count, 4096)

    # a row's nibbles of a stage: 8-bit, two instructions of 16 windows, 8 bytes each; 16-bit, two of 8 windows, 4 bytes each
    if not wide:  # thread (warp, g, q): row 16 warp + g + 8 (q & 1), half q >> 1 of the windows; word of instruction 0, then 1
        words = meta.reshape(strips, 4, 2, 8, count, 2, 2, 4)  # strip, warp, q & 1, g, stage, instruction, q >> 1, bytes
        words = words.transpose(0, 4, 1, 3, 6, 2, 5, 7)
    else:  # thread (warp, g, q): instruction q >> 1, half q & 1 of its windows; row g in the low half-word, g + 8 in the high
        words = meta.reshape(strips, 4, 2, 8, count, 2, 2, 2)  # strip, warp, row half, g, stage, instruction, q & 1, bytes
        words = words.transpose(0, 4, 1, 3, 5, 6, 2, 7)
    words = xp.ascontiguousarray(words).reshape(strips, count, strip_bytes(packed.dtype) - 4096)
    return xp.concatenate([image, words], axis=2)


def restore(arranged: Any, packed: PackedWeight) -> PackedWeight:
    """Inverse of arrange: the packed weight, whose pattern, shape, dtype and scale are taken from `packed`. NumPy."""
    strips, count = arranged.shape[:2]
    row, byte = np.arange(64)[:, None], np.arange(64)
    values = arranged[:, :, (row * 64 + (byte ^ (row // 2 % 4 * 16))).ravel()]
    values = values.reshape(strips, count, 64, 64).transpose(0, 2, 1, 3).reshape(64 * strips, 64 * count)
    words = arranged[:, :, 4096:]
    if packed.dtype.bits == 8:
        meta = words.reshape(strips, count, 4, 8, 2, 2, 2, 4).transpose(0, 2, 5, 3, 1, 6, 4, 7)
    else:
        meta = words.reshape(strips, count, 4, 8, 2, 2, 2, 2).transpose(0, 2, 6, 3, 1, 4, 5, 7)
    meta = meta.reshape(64 * strips, words.shape[2] * count // 64)
    n, size, ks = packed.n, packed.dtype.bits // 8, packed.ks
    kept = np.ascontiguousarray(values[:n, : ks // 2 * size]).view(packed.dtype.numpy)
    return PackedWeight(
        kept, np.ascontiguousarray(meta[:n, : ks // 8]), packed.scale, packed.pattern, packed.shape, packed.dtype
    )


def image(x: Any, pattern: Pattern, xp: Any = np) -> Any:
    """Activations [m, k] of a packed type, slid and laid out: uint8 [stages, ceil(m / 8), 8, 128].

    Byte b of a token's stage stands at b ^ (token % 8) * 16.
    """
    m, k = x.shape
    size = x.dtype.itemsize
    ks = pattern.slid_k(k)
    count = max(2, -(-ks * size // (2 * STAGE)) * 2)
    raw = x.view(f"u{size}")
    padded = xp.zeros((-(-m // 8) * 8, pattern.padded_k(k)), raw.dtype)
    padded[:m, :k] = raw
    slid = xp.zeros((padded.shape[0], count * STAGE // size), raw.dtype)
    slid[:, :ks] = padded[:, xp.asarray(pattern.lift_index(k))]
    slid = slid.view(np.uint8).reshape(-1, 8, count, 8, 16)  # group, token, stage, piece, byte
    token, piece = np.arange(8)[:, None], np.arange(8)
    slid = slid[:, xp.asarray(token), :, xp.asarray(piece ^ token)]  # [token, piece, group, stage, byte]
    return xp.ascontiguousarray(slid.transpose(3, 2, 0, 1, 4)).reshape(count, -1, 8, STAGE)


def image_rows(made: Any, m: int, k: int, pattern: Pattern, dtype: DType, xp: Any = np) -> Any:
    """Inverse of `image`: activations [m, k] as their bits (`dtype.raw`), from the first window that holds each."""
    count = made.shape[0]
    token, piece = np.arange(8)[:, None], np.arange(8)
    pieces = made.reshape(count, -1, 8, 8, 16)[:, :, xp.asarray(token), xp.asarray(piece ^ token)]
    slid = xp.ascontiguousarray(pieces.transpose(1, 2, 0, 3, 4)).reshape(-1, count * STAGE).view(dtype.raw)
    group, inside = np.divmod(np.arange(k), pattern.group)
    window = np.minimum(inside // 2, pattern.windows - 1)
    return slid[:m, xp.asarray((group * pattern.windows + window) * 4 + inside - 2 * window)]


def image_bytes(m: int, k: int, pattern: Pattern, dtype: DType) -> int:
    """Bytes of the image of x [m, k]."""
    return stages(pattern, k, dtype) * -(-m // 8) * 8 * STAGE


# ---- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A thread block computes `tokens` x `n` outputs: `warpgroups` consumers, each with `strips` strips of 64.

    Attributes:
        stage_ns, tile_ns: measured on an H200 at 6:8 (docs/hopper.md): time of a stage, and of a tile beside its stages.
        cut: thread blocks of a cluster that cut k into equal parts and add them up through each other's shared memory.
        resident: thread blocks that fit on a multiprocessor: with 2, those of the next kernel start beside these.
    """

    tokens: int
    warpgroups: int
    strips: int
    stage_ns: int
    tile_ns: int
    cut: int = 1
    resident: int = 1

    @property
    def n(self) -> int:
        """Outputs of a thread block."""
        return 64 * self.warpgroups * self.strips

    def __str__(self) -> str:
        cut = f", k cut in {self.cut}" if self.cut > 1 else ""
        return f"{self.tokens} tokens x {self.n} outputs, {self.warpgroups} warpgroups{cut}"


TILES = (
    Tile(256, 2, 1, 430, 1500),
    Tile(128, 2, 2, 470, 1600),
    Tile(192, 3, 1, 470, 1500),
    Tile(192, 2, 1, 340, 1300),
    Tile(128, 2, 1, 277, 1000),
    Tile(128, 2, 1, 277, 2000, cut=2),
    Tile(128, 2, 1, 277, 2000, cut=4),
    Tile(64, 2, 1, 230, 800),
    Tile(64, 2, 1, 230, 1500, cut=4),
    Tile(64, 1, 1, 160, 1500, cut=2, resident=2),
    Tile(32, 2, 1, 170, 700),
    Tile(32, 2, 1, 170, 1200, cut=4),
    Tile(32, 1, 1, 120, 1200, cut=2, resident=2),
    Tile(16, 2, 1, 150, 600),
    Tile(16, 2, 1, 150, 1000, cut=4, resident=2),
    Tile(16, 1, 1, 110, 1000, cut=2, resident=2),
    Tile(8, 2, 1, 140, 600),
    Tile(8, 2, 1, 140, 1000, cut=4, resident=2),
    Tile(8, 1, 1, 100, 1000, cut=2, resident=2),
)
LAUNCH_NS = 3500
READ_BYTES_A_NS = 4000
"""What the memory gives, measured."""
PART_BYTES_A_NS = 1500
"""What parts of split tiles cost: bytes written, or read again, in a nanosecond, by all processors together."""


@dataclass(frozen=True)
class Config:
    """One way to run the kernel.

    Attributes:
        dtype, out: type of weights and activations; name of the type of y.
        tile: and how many `stages` of it are under way.
        band: tiles of n that run together with all tiles of m.
        streamed, sharers: tiles, the last ones, that are cut along k; thread blocks that have equal ranges of them.
        blocks: thread blocks.
    """

    dtype: DType
    out: str
    tile: Tile
    stages: int
    band: int
    streamed: int = 0
    sharers: int = 0
    blocks: int = 0

    def __str__(self) -> str:
        shared = f", {self.streamed} tiles cut along k for {self.sharers}" if self.streamed else ""
        return f"{self.tile}, {self.stages} stages, {self.blocks} blocks{shared}"

    @property
    def threads(self) -> int:
        """Consumers, and a producer: a warp, or a warpgroup if it must give registers away."""
        return 128 * self.tile.warpgroups + (128 if self.tile.strips * self.tile.tokens > 128 else 32)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: stages, rows on their way to y, barriers (smem.cuh)."""
        used = self.stages * stage_bytes(self.tile, self.dtype) + staging_bytes(self.tile, self.out) + 16 * self.stages
        return -(-used // 1024) * 1024

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.tile.tokens) * -(-n // self.tile.n)

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return self.blocks, 1, 1

    def part_bytes(self, m: int, n: int) -> int:
        """Workspace for the accumulators of tiles cut along k: a part a block."""
        return 4 * self.blocks * self.tile.tokens * self.tile.n if self.streamed else 0

    def counters(self, m: int, n: int) -> int:
        """Of tiles cut along k, zeros before and after a launch."""
        return self.streamed * self.tile.warpgroups

    def defines(self) -> dict[str, int | str]:
        """What stands above the #include of the kernel."""
        return {
            "DTYPE": CUDA_CODES[self.dtype.name],
            "OUT": CUDA_CODES[self.out],
            "TOKENS": self.tile.tokens,
            "WARPGROUPS": self.tile.warpgroups,
            "STRIPS": self.tile.strips,
            "STAGES": self.stages,
            "BAND": self.band,
            "CUT": self.tile.cut,
            "BLOCKS": self.tile.resident,
        }  # fmt: skip


def stage_bytes(tile: Tile, dtype: DType) -> int:
    """Shared memory of one stage."""
    used = tile.tokens * STAGE + tile.warpgroups * tile.strips * strip_bytes(dtype)
    return -(-used // 1024) * 1024


def staging_bytes(tile: Tile, out: str) -> int:
    """Shared memory of rows on their way to y: two chunks of tokens a warpgroup (epilogue.cuh)."""
    size = 4 if out == "float32" else 2
    chunk = min(tile.tokens, 16 if size == 4 else 32)
    return 2 * tile.warpgroups * chunk * 64 * size


def candidates(pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int]) -> Iterator[Config]:
    """Every tile, with as many stages as fit; one kernel serves all patterns."""
    for tile in TILES:
        room = (SHARED_MEMORY + 1024) // tile.resident - 1024 - staging_bytes(tile, out)
        size = stage_bytes(tile, dtype)
        count = room // size
        if room - count * size < 16 * count:  # their barriers
            count -= 1
        yield Config(dtype, out, tile, min(MOST_STAGES, count), 8 if tile.tokens == 256 else 16)


def options(config: Config, m: int, n: int, along_k: int, sms: int) -> Iterator[Config]:
    """The configuration with its tiles shared out in every way that may pay."""
    tile, tiles = config.tile, config.tiles(m, n)
    if tile.cut > 1:
        if along_k >= 2 * tile.cut:
            yield replace(config, blocks=tiles * tile.cut)
        return
    yield replace(config, blocks=min(tiles, sms))
    rest = tiles % sms
    if rest and sms // rest > 1:  # a last round of equal parts, side by side along k, so that they share what they read
        sharers = min(rest * (sms // rest), rest * (along_k // 2))
        yield replace(config, streamed=rest, sharers=sharers, blocks=min(sms, max(tiles - rest, sharers)))
    if rest and tile.tokens <= 64:  # perfectly even; activations stay in the cache
        streamed = rest + (sms if tiles > sms else 0)
        sharers = min(sms, streamed * along_k // 2)
        yield replace(config, streamed=streamed, sharers=sharers, blocks=min(sms, max(tiles - streamed, sharers)))


def cost(config: Config, m: int, n: int, along_k: int, sms: int) -> float:
    """Estimated nanoseconds: rounds of tiles, even shares of k and the traffic of their parts; or reading the weights.

    Args:
        along_k: stages that cover k.
    """
    tile, tiles = config.tile, config.tiles(m, n)
    read = tiles * along_k * tile.warpgroups * tile.strips * strip_bytes(config.dtype) / READ_BYTES_A_NS
    if tile.cut > 1:
        rounds = -(-config.blocks // (sms * tile.resident))
        compute = rounds * (along_k / tile.cut * tile.stage_ns * min(tile.resident, -(-config.blocks // sms)) + tile.tile_ns)
        return LAUNCH_NS + max(compute, read) + 0.1 * min(compute, read)
    compute = -(-(tiles - config.streamed) // config.blocks) * (along_k * tile.stage_ns + tile.tile_ns)
    if config.streamed:
        parts = 2 * 4 * config.sharers * tile.tokens * tile.n / PART_BYTES_A_NS
        compute += config.streamed * along_k / config.sharers * tile.stage_ns + tile.tile_ns + parts
    return LAUNCH_NS + max(compute, read) + 0.1 * min(compute, read)


@lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int], sms: int) -> Config:
    """The cheapest configuration for y [m, n] = x [m, k] @ w.T on a device of `sms` multiprocessors."""
    along_k = stages(pattern, k, dtype)
    every = (option for config in candidates(pattern, dtype, out, capability) for option in options(config, m, n, along_k, sms))
    return min(every, key=lambda config: cost(config, m, n, along_k, sms))
