"""What `wgmma.mma_async.sp`, the sparse tensor-core instruction of Hopper (sm_90a), wants: images, tiles, cost. Data and NumPy.

The instruction multiplies 64 rows of 2:4 weights by up to 256 tokens, both read from shared memory. A pipeline stage is 128
slid bytes along k, two instructions. Both operands stand in global memory exactly as shared memory wants them, so the kernel
(cuda_src/sm90/gemm.cu) moves them by contiguous bulk copies and never touches an index:

    weights      [stages, strips of 64 rows, strip_bytes]: 64 rows x 64 kept bytes, swizzled in 64-byte rows, then index words
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

ROW, BYTE = np.arange(64)[:, None], np.arange(64)
KEPT_AT = (ROW * 64 + (BYTE ^ (ROW // 2 % 4 * 16))).ravel()
"""Where byte b of row r of a strip's kept values stands, for r * 64 + b."""

TOKEN, PIECE = np.arange(8)[:, None], np.arange(8)
PIECE_AT = PIECE ^ TOKEN
"""Where the 16-byte pieces of each of eight tokens stand in its stage, and which stand at each place: its own inverse."""


def stages(pattern: Pattern, k: int, dtype: DType) -> int:
    """Stages that cover a row of k columns: an even number, since kernels for few tokens take two at a time."""
    return _stages_of(pattern.slid_k(k) * dtype.bits // 8)


def _stages_of(slid_bytes: int) -> int:
    return max(2, -(-slid_bytes // (2 * STAGE)) * 2)


def strip_bytes(dtype: DType) -> int:
    """Bytes of 64 rows and one stage: kept values, then one index word (16-bit types) or two (8-bit types) a thread."""
    return 4096 + (512 if dtype.bits == 16 else 1024)


def arrange(packed: PackedWeight, xp: Any = np) -> Any:
    """Packed weights as shared memory wants them: uint8 [stages, ceil(n / 64), strip_bytes].

    Rows and columns beyond the matrix hold zeros with the nibble (0, 1). Thread blocks that work side by side on neighbouring
    strips read neighbouring memory.

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

    image = xp.empty((strips, count, 4096), np.uint8)
    image[:, :, xp.asarray(KEPT_AT)] = values.reshape(strips, 64, count, 64).transpose(0, 2, 1, 3).reshape(strips, count, 4096)

    # a row's nibbles of a stage: 8-bit, two instructions of 16 windows, 8 bytes each; 16-bit, two of 8 windows, 4 bytes each
    if not wide:  # thread (warp, g, q): row 16 warp + g + 8 (q & 1), half q >> 1 of the windows; word of instruction 0, then 1
        words = meta.reshape(strips, 4, 2, 8, count, 2, 2, 4)  # strip, warp, q & 1, g, stage, instruction, q >> 1, bytes
        words = words.transpose(0, 4, 1, 3, 6, 2, 5, 7)
    else:  # thread (warp, g, q): instruction q >> 1, half q & 1 of its windows; row g in the low half-word, g + 8 in the high
        words = meta.reshape(strips, 4, 2, 8, count, 2, 2, 2)  # strip, warp, row half, g, stage, instruction, q & 1, bytes
        words = words.transpose(0, 4, 1, 3, 5, 6, 2, 7)
    words = xp.ascontiguousarray(words).reshape(strips, count, strip_bytes(packed.dtype) - 4096)
    return xp.ascontiguousarray(xp.concatenate([image, words], axis=2).transpose(1, 0, 2))


def restore(arranged: Any, packed: PackedWeight) -> PackedWeight:
    """Inverse of arrange: the packed weight, whose pattern, shape, dtype and scale are taken from `packed`. NumPy."""
    arranged = arranged.transpose(1, 0, 2)
    strips, count = arranged.shape[:2]
    values = arranged[:, :, KEPT_AT]
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
    count = _stages_of(ks * size)
    raw = x.view(f"u{size}")
    padded = xp.zeros((-(-m // 8) * 8, pattern.padded_k(k)), raw.dtype)
    padded[:m, :k] = raw
    slid = xp.zeros((padded.shape[0], count * STAGE // size), raw.dtype)
    slid[:, :ks] = padded[:, xp.asarray(pattern.lift_index(k))]
    slid = slid.view(np.uint8).reshape(-1, 8, count, 8, 16)  # group, token, stage, piece, byte
    slid = slid[:, xp.asarray(TOKEN), :, xp.asarray(PIECE_AT)]  # [token, piece, group, stage, byte]
    return xp.ascontiguousarray(slid.transpose(3, 2, 0, 1, 4)).reshape(count, -1, 8, STAGE)


def image_rows(made: Any, m: int, k: int, pattern: Pattern, dtype: DType, xp: Any = np) -> Any:
    """Inverse of `image`: activations [m, k] as their bits (`dtype.raw`), from the first window that holds each."""
    count = made.shape[0]
    pieces = made.reshape(count, -1, 8, 8, 16)[:, :, xp.asarray(TOKEN), xp.asarray(PIECE_AT)]
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
    """A thread block computes `tokens` x `n` outputs: `warpgroups` consumers, each with a strip of 64.

    Attributes:
        stage_ns, tile_ns: fitted to measurements on an H200 at 6:8: time of a stage, and of a tile beside its stages.
        cuts: into how many equal parts k may be cut.
    """

    tokens: int
    warpgroups: int
    stage_ns: int
    tile_ns: int
    cuts: tuple[int, ...]

    @property
    def n(self) -> int:
        """Outputs of a thread block."""
        return 64 * self.warpgroups

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {self.n} outputs"


TILES = (
    Tile(256, 2, 420, 2150, (2, 3, 4)),
    Tile(192, 2, 340, 810, (2, 3)),
    Tile(160, 2, 250, 1530, (2,)),
    Tile(128, 2, 217, 1660, (2, 3, 4, 8)),
    Tile(96, 2, 183, 500, (2,)),
    Tile(64, 2, 150, 1570, (2, 3, 4, 8)),
    Tile(64, 1, 138, 10, (2,)),
    Tile(32, 2, 140, 1030, (2, 4, 8)),
    Tile(32, 1, 107, 120, (2,)),
    Tile(16, 2, 138, 1000, (2, 4, 8)),
    Tile(16, 1, 104, 110, (2,)),
    Tile(8, 2, 130, 1000, (2, 4, 8)),
    Tile(8, 1, 101, 100, (2,)),
)
LAUNCH_NS, REST_NS = 2000, 690
"""What a launch takes beside its work; what a second one adds."""
CUT_NS, CUT_NS_A_TOKEN = 1030, 13.2
"""What adding up in a cluster adds."""
CLUSTERS_FIT = 0.9
"""Of the multiprocessors, how many clusters of three and more blocks find free: a cluster keeps to one group of them."""
READ_BYTES_A_NS = 3900
"""What the memory gives, measured."""
ALONE, BEFORE_REST, REST = 0, 1, 2
"""Orders of a launch, as cuda_src/sm90/gemm.cu numbers them."""


@dataclass(frozen=True)
class Config:
    """One launch of the kernel.

    Attributes:
        dtype, out: type of weights and activations; name of the type of y.
        tile: and how many `stages` of it are under way.
        band: tiles of n that run together with all tiles of m.
        cut: thread blocks of a cluster that share a tile, each with an equal part of k.
        resident: thread blocks that fit on a multiprocessor: with 2, those of the next launch start beside these.
        begin, end: the tiles that it computes, of all.
        blocks: thread blocks.
        order: ALONE; or BEFORE_REST and REST, of two launches that share out the tiles.
    """

    dtype: DType
    out: str
    tile: Tile
    stages: int
    band: int
    cut: int = 1
    resident: int = 1
    begin: int = 0
    end: int = 0
    blocks: int = 0
    order: int = ALONE

    def __str__(self) -> str:
        cut = f", k cut in {self.cut}" if self.cut > 1 else ""
        return f"{self.tile}{cut}, {self.stages} stages, tiles {self.begin} to {self.end} on {self.blocks} blocks"

    @property
    def threads(self) -> int:
        """Consumers, and a producer: a warp, or a warpgroup if it must give registers away."""
        return 128 * self.tile.warpgroups + (128 if self.tile.tokens > 128 else 32)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: stages, rows on their way to y, barriers (smem.cuh)."""
        used = (
            self.stages * stage_bytes(self.tile, self.dtype) + staging_bytes(self.tile, self.out, self.cut) + 16 * self.stages
        )
        return -(-used // 1024) * 1024

    def tiles(self, m: int, n: int) -> int:
        """All tiles of y [m, n]."""
        return -(-m // self.tile.tokens) * -(-n // self.tile.n)

    def grid(self) -> tuple[int, int, int]:
        return self.blocks, 1, 1

    def defines(self) -> dict[str, int | str]:
        """What stands above the #include of the kernel."""
        return {
            "DTYPE": CUDA_CODES[self.dtype.name],
            "OUT": CUDA_CODES[self.out],
            "TOKENS": self.tile.tokens,
            "WARPGROUPS": self.tile.warpgroups,
            "STAGES": self.stages,
            "BAND": self.band,
            "CUT": self.cut,
            "BLOCKS": self.resident,
        }  # fmt: skip


def stage_bytes(tile: Tile, dtype: DType) -> int:
    """Shared memory of one stage."""
    return -(-(tile.tokens * STAGE + tile.warpgroups * strip_bytes(dtype)) // 1024) * 1024


def staging_bytes(tile: Tile, out: str, cut: int) -> int:
    """Shared memory of rows on their way to y: two chunks of tokens a warpgroup (epilogue.cuh)."""
    size = 4 if out == "float32" else 2
    portion = tile.tokens
    if cut > 1:  # blocks of a cluster share out the tokens, as many as a power of two allows
        portion //= min(1 << cut.bit_length() - 1, tile.tokens // 8)
        portion //= 2 if portion > 64 else 1
    chunk = 32 if portion % 32 == 0 and size == 2 else 16 if portion % 16 == 0 else 8
    return 2 * tile.warpgroups * chunk * 64 * size


def configured(tile: Tile, cut: int, dtype: DType, out: str) -> Config:
    """The kernel of a tile, with as many stages as fit."""
    resident = 2 if tile.warpgroups == 1 or (tile.tokens <= 32 and cut > 1) else 1
    room = (SHARED_MEMORY + 1024) // resident - 1024 - staging_bytes(tile, out, cut)  # each block takes one KiB more
    size = stage_bytes(tile, dtype)
    count = room // size
    if room - count * size < 16 * count:  # their barriers
        count -= 1
    return Config(dtype, out, tile, min(MOST_STAGES, count), 8 if tile.tokens == 256 else 16, cut, resident)


def candidates(pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int]) -> Iterator[Config]:
    """Every kernel: of every tile, with k whole and cut; one serves all patterns."""
    for tile in TILES:
        for cut in (1, *tile.cuts):
            yield configured(tile, cut, dtype, out)


# ---- choice ----------------------------------------------------------------------------------------------------------


def options(tile: Tile, m: int, n: int, along_k: int, dtype: DType, out: str, sms: int) -> Iterator[tuple[Config, ...]]:
    """The launches of a tile for y [m, n], in every way that may pay: whole tiles; k cut; a last, half-empty round with k cut.

    Args:
        along_k: stages that cover k.
    """
    whole = configured(tile, 1, dtype, out)
    tiles = whole.tiles(m, n)
    yield (replace(whole, end=tiles, blocks=min(tiles, sms)),)
    full = tiles // sms * sms
    rest = tiles - full
    for cut in tile.cuts:
        if along_k < 2 * cut or not rest:
            continue
        parted = configured(tile, cut, dtype, out)
        if rest * cut > sms * parted.resident * (CLUSTERS_FIT if cut > 2 else 1):
            continue
        if full:
            yield (
                replace(whole, end=full, blocks=sms, order=BEFORE_REST),
                replace(parted, begin=full, end=tiles, blocks=rest * cut, order=REST),
            )
        else:
            yield (replace(parted, end=tiles, blocks=tiles * cut),)


def cost(launches: tuple[Config, ...], along_k: int, sms: int) -> float:
    """Estimated nanoseconds: rounds of tiles, or reading the weights from memory where that takes longer.

    Args:
        along_k: stages that cover k.
    """
    compute = read = 0.0
    for config in launches:
        tile, together = config.tile, min(config.resident, -(-config.blocks // sms))  # blocks that share a multiprocessor
        rounds = -(-(config.end - config.begin) * config.cut // config.blocks)
        each = -(-along_k // config.cut) * tile.stage_ns * together + tile.tile_ns
        compute += rounds * each + REST_NS * (config.order == REST)
        if config.cut > 1:
            compute += CUT_NS + CUT_NS_A_TOKEN * tile.tokens
        read += (config.end - config.begin) * along_k * tile.warpgroups * strip_bytes(config.dtype) / READ_BYTES_A_NS
    return LAUNCH_NS + max(compute, read) + 0.076 * min(compute, read)


@lru_cache(maxsize=4096)
def choose(
    m: int, n: int, k: int, pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int], sms: int
) -> tuple[Config, ...]:
    """The cheapest launches, one or two, for y [m, n] = x [m, k] @ w.T on a device of `sms` multiprocessors."""
    along_k = stages(pattern, k, dtype)
    every = (launches for tile in TILES for launches in options(tile, m, n, along_k, dtype, out, sms))
    return min(every, key=lambda launches: cost(launches, along_k, sms))
