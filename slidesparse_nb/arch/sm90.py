"""The kernel on `wgmma.mma_async.sp`, the sparse tensor-core instruction of Hopper (sm_90a): tiles, candidates, cost.

Data and pure functions; how weights are laid out is in sm90_layout.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.dtypes import BFLOAT16, CUDA_CODES, FLOAT8, FLOAT16, INT8, DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.problem import GemmProblem
from .operand import STAGE, Operand, stages
from .sm90_layout import VALUE_BYTES, arrange, coded, expand, index_bytes

PARAMETERS = {
    "x": "address", "values": "address", "scale_x": "address", "scale_w": "address", "bias": "address",
    "bias_type": "integer", "y": "address", "y_pitch": "integer", "m": "integer", "n": "integer", "index": "address",
    "stages": "integer", "first_strip": "integer", "last_strip": "integer", "begin": "integer", "end": "integer",
    "order": "integer", "band": "integer",
}  # fmt: skip
"""Of the kernel, in its order."""

SHARED_MEMORY = 232448
"""Bytes that a thread block may have. CUDA C++ Programming Guide, "Compute Capabilities"."""

MOST_STAGES = 24
PARTS_APART = 16384
"""Up to so many bytes of parts of a cluster have memory of their own."""

FLOAT8_ERROR = 2.0**-10
"""Error of one float8 instruction (64 slid columns), relative to the sum of magnitudes: its accumulator keeps 13 bits of
fraction (docs/hopper.md), and each of its addends is cut off there."""

EARLY_TOKENS = 512
"""Up to so many tokens a product may start while the kernel before it ends. Blocks that take the place of a quantization's, as
these leave, are spread over the processors at random; those that share activations are then apart, L2 serves them one by
one, and the product takes up to half as long again (docs/hopper.md)."""


# ---- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A thread block computes `tokens` x `n` outputs: `warpgroups` consumers, each with a strip of 64.

    Attributes:
        stage_ns, tile_ns: fitted to measurements on an H100 at 6:8: time of a stage, and of a tile beside its stages.
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

    @property
    def loads_itself(self) -> bool:
        """Whether accumulators leave no registers for a producer."""
        return self.warpgroups == 3 and self.tokens > 192

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {self.n} outputs"


TILES = (
    Tile(256, 3, 448, 6304, ()),
    Tile(224, 3, 417, 5042, ()),
    Tile(208, 3, 401, 3809, ()),
    Tile(192, 3, 377, 3266, ()),
    Tile(160, 3, 287, 3279, ()),
    Tile(128, 3, 264, 2872, ()),
    Tile(256, 2, 332, 4270, (2, 3, 4)),
    Tile(192, 2, 270, 2378, (2, 3)),
    Tile(160, 2, 247, 2200, (2,)),
    Tile(128, 2, 224, 1211, (2, 3, 4, 8)),
    Tile(128, 1, 172, 3609, (2,)),
    Tile(96, 2, 185, 1338, (2,)),
    Tile(96, 1, 180, 703, (2,)),
    Tile(64, 2, 162, 1291, (2, 3, 4, 8)),
    Tile(64, 1, 180, 0, (2,)),
    Tile(32, 2, 193, 1136, (2, 4, 8)),
    Tile(32, 1, 86, 1098, (2,)),
    Tile(16, 2, 138, 0, (2, 4, 8)),
    Tile(16, 1, 18, 1806, (2,)),
    Tile(8, 2, 147, 0, (2, 4, 8)),
    Tile(8, 1, 90, 0, (2,)),
)
LAUNCH_NS = 838
"""What a product takes beside its work."""
CUT_NS_A_BLOCK, CUT_NS_A_TOKEN = 136, 24.0
"""What adding up in a cluster adds."""
RING_NS = 750
"""How long a stage takes to come: a ring of s stages feeds one in so long / s at best."""
CLUSTERS_FIT = 0.9
"""Of the multiprocessors, how many clusters of three and more blocks find free: a cluster keeps to one group of them."""
READ_BYTES_A_NS = 3230
"""What the memory gives: fitted, too."""
AGAIN_BYTES_A_NS = 6810
"""What the L2 cache gives, of weights that tiles of other tokens read, too."""
OVERLAP = 0.29
"""Of the shorter of computing and reading, how much shows."""
SMALL_TOKENS, SMALL_M = 64, 128
"""Tiles of up to so many tokens are small: they read codes. Products of more than so many tokens take none of them: larger
ones were faster wherever both were measured."""
CODED_TOKENS = {8: 256, 16: 128}
"""Of a type's bits: tiles of up to so many tokens read codes, too, where one takes all tokens, and all waits for weights from
memory. Where several read the same weights, all but one from the L2 cache, decoding takes longer (docs/hopper.md)."""
LARGEST, LONG_TOKENS, CAPPED = TILES[0], 8192, 1.08
"""From so many tokens on, products take long enough for the board's power limit to decide, and other tiles than the largest,
which copy more for an operation, are slower by so much."""
BAND, NARROW_BAND, NARROW_TOKENS = 16, 8, 2048
"""Tiles of n that run together with all tiles of m; with tiles of 256 tokens fewer, up to so many tokens (docs/hopper.md)."""
MIXED_ROUNDS = 4
"""Whole rounds after which the shape of the rest's tiles matters no more."""
ALONE, BEFORE_REST, REST = 0, 1, 2
"""Orders of a launch, as cuda_src/sm90/gemm.cu numbers them."""


@dataclass(frozen=True)
class Config:
    """One launch of the kernel; or, where there are no `blocks`, the kernel alone.

    Attributes:
        dtype, out: type of weights and activations; name of the type of y.
        tile: and how many `stages` of it are under way.
        windows: of the pattern, whose masks are read as codes; 0: index words are read.
        cut: thread blocks of a cluster that share a tile, each with an equal part of k.
        resident: thread blocks that fit on a multiprocessor: with 2, those of the next launch start beside these.
        strips: the first strip of weights that this launch may compute, and the one after the last.
        begin, end: the tiles of these strips that it computes.
        blocks: thread blocks.
        order: ALONE; or BEFORE_REST and REST, of two launches that share out the tiles.
        band: tiles of n that run together with all tiles of m.
    """

    dtype: DType
    out: str
    tile: Tile
    stages: int
    windows: int
    cut: int = 1
    resident: int = 1
    strips: tuple[int, int] = (0, 0)
    begin: int = 0
    end: int = 0
    blocks: int = 0
    order: int = ALONE
    band: int = BAND

    def __str__(self) -> str:
        cut = f", k cut in {self.cut}" if self.cut > 1 else ""
        codes = " with codes" if self.windows else ""
        kernel = f"{self.tile}{cut}, {self.stages} stages{codes}, {self.resident} on a multiprocessor"
        if not self.blocks:
            return kernel
        first, last = (64 * s for s in self.strips)
        return f"{kernel}, tiles {self.begin} to {self.end} of outputs {first} to {last}, on {self.blocks} blocks"

    @property
    def threads(self) -> int:
        """Consumers, and a producer: a warp, or a warpgroup if it must give registers away; or none."""
        consumers = 128 * self.tile.warpgroups
        if self.tile.loads_itself:
            return consumers
        return consumers + (128 if self.tile.tokens > 128 or self.tile.warpgroups == 3 else 32)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: stages, rows on their way to y, barriers, nibbles of codes, parts of a cluster (gemm.cu)."""
        used = self.stages * (stage_bytes(self.tile, self.dtype, self.windows > 0) + 16)
        used += staging_bytes(self.tile, self.out, self.cut) + table_bytes(self.windows) + parts_bytes(self.tile, self.cut)
        return -(-used // 1024) * 1024

    def tiles(self, m: int) -> int:
        """All tiles of m tokens and the strips."""
        return -(-m // self.tile.tokens) * -(-(self.strips[1] - self.strips[0]) // self.tile.warpgroups)

    def possible(self, along_k: int) -> bool:
        """Whether there are strips enough, and stages: two a block of a cluster; what loads itself fills its ring at once."""
        if self.tile.warpgroups == 3 and self.strips[1] - self.strips[0] < 3:  # strips are padded to pairs
            return False
        return along_k >= (self.stages if self.tile.loads_itself else 2 * self.cut)

    @property
    def buffers(self) -> dict[str, str]:
        return {"values": "values", "index": "codes" if self.windows else "words"}

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        return self.blocks, 1, 1

    def arguments(self, problem: GemmProblem) -> dict[str, int]:
        (first, last), count = self.strips, along_k(problem)
        if not self.possible(count):
            raise AssertionError(self)
        tiles = {"first_strip": first, "last_strip": last, "begin": self.begin, "end": self.end}
        return {"stages": count, **tiles, "order": self.order, "band": self.band}

    def early(self, problem: GemmProblem) -> bool:
        return problem.m <= EARLY_TOKENS or self.order == REST

    def counters(self, problem: GemmProblem) -> int:
        return 0

    def part_bytes(self, problem: GemmProblem) -> int:
        return 0

    def shares(self) -> dict[str, object]:
        (first, last), tiles = self.strips, f"{self.begin}-{self.end}"
        return {"strips": f"{first}-{last}", "tiles": tiles, "band": self.band, "blocks": self.blocks, "order": self.order}

    def defines(self) -> dict[str, int | str]:
        """What stands above the #include of the kernel."""
        return {
            "DTYPE": CUDA_CODES[self.dtype.name],
            "OUT": CUDA_CODES[self.out],
            "TOKENS": self.tile.tokens,
            "WARPGROUPS": self.tile.warpgroups,
            "STAGES": self.stages,
            "WINDOWS": self.windows,
            "CUT": self.cut,
            "BLOCKS": self.resident,
            "THREADS": self.threads,
            "SHARED_BYTES": self.shared_bytes,
        }  # fmt: skip

    def with_words(self) -> Config:
        """The same launch, for weights that have no codes."""
        if not self.windows:
            return self
        plain = replace(self, windows=0)
        return replace(plain, stages=min(MOST_STAGES, _stages_that_fit(plain)))


def stage_bytes(tile: Tile, dtype: DType, codes: bool) -> int:
    """Shared memory of one stage."""
    return -(-(tile.tokens * STAGE + tile.warpgroups * (VALUE_BYTES + index_bytes(dtype, codes))) // 1024) * 1024


def _share(tile: Tile, cut: int) -> int:
    """Tokens that a block of a cluster adds up: as many blocks share them out as a power of two allows."""
    return tile.tokens // min(1 << cut.bit_length() - 1, tile.tokens // 8)


def staging_bytes(tile: Tile, out: str, cut: int) -> int:
    """Shared memory of rows on their way to y: two chunks of tokens a warpgroup (epilogue.cuh)."""
    size = 4 if out == "float32" else 2
    portion = tile.tokens
    if cut > 1:
        portion = _share(tile, cut)
        portion //= 2 if portion > 64 else 1
    chunk = 32 if portion % 32 == 0 and size == 2 else 16 if portion % 16 == 0 else 8
    return 2 * tile.warpgroups * chunk * 64 * size


def table_bytes(windows: int) -> int:
    """Shared memory of the nibbles of every code: a word each."""
    return 2 * (2 * windows + 2) * (2 * windows + 1) if windows else 0


def parts_bytes(tile: Tile, cut: int) -> int:
    """Shared memory of a cluster's barriers, and of the parts that a block adds up, unless they take the place of stages."""
    if cut == 1:
        return 0
    parts = 4 * cut * _share(tile, cut) * tile.n
    return 32 + (parts if parts <= PARTS_APART else 0)


def _stages_that_fit(config: Config) -> int:
    room = (SHARED_MEMORY + 1024) // config.resident - 1024  # each block takes one KiB more
    room -= staging_bytes(config.tile, config.out, config.cut) + table_bytes(config.windows)
    room -= parts_bytes(config.tile, config.cut)
    return room // (stage_bytes(config.tile, config.dtype, config.windows > 0) + 16)


def configured(tile: Tile, cut: int, pattern: Pattern, dtype: DType, out: str, codes: bool, resident: int = 0) -> Config:
    """The kernel of a tile, with as many stages as fit; `resident` is the first of `residents` by default.

    Args:
        codes: read codes, if masks of this pattern have them.
    """
    windows = pattern.windows if codes and coded(pattern) else 0
    config = Config(dtype, out, tile, 0, windows, cut, resident or residents(tile, cut)[0])
    return replace(config, stages=min(MOST_STAGES, _stages_that_fit(config)))


def residents(tile: Tile, cut: int) -> tuple[int, ...]:
    """How many thread blocks a multiprocessor may be shared by."""
    if tile.warpgroups == 1 or (tile.tokens <= 32 and cut > 1):
        return (2,)
    return (1, 2) if tile.tokens <= 32 else (1,)


def _forms(tile: Tile, pattern: Pattern, dtype: DType) -> tuple[bool, ...]:
    """Whether a tile reads codes: sometimes, always or never."""
    if not coded(pattern) or not decodes(tile, dtype):
        return (False,)
    return (True,) if tile.tokens <= SMALL_TOKENS else (True, False)


def decodes(tile: Tile, dtype: DType) -> bool:
    """Whether a tile ever reads codes. With three warpgroups none does: of 256 tokens it would spill, and where one tile takes
    all tokens two warpgroups are as fast."""
    return tile.tokens <= CODED_TOKENS[dtype.bits] and tile.warpgroups < 3


# ---- the choice ------------------------------------------------------------------------------------------------------


def along_k(problem: GemmProblem) -> int:
    """Stages that cover k."""
    return stages(problem.pattern, problem.k, problem.dtype)


def takes(problem: GemmProblem, tile: Tile) -> bool:
    """Whether so many tokens may be computed by this tile."""
    return problem.m <= SMALL_M or tile.tokens > SMALL_TOKENS


def reads_codes(problem: GemmProblem, tile: Tile) -> bool:
    """Whether this tile reads codes."""
    return decodes(tile, problem.dtype) and (tile.tokens <= SMALL_TOKENS or problem.m <= tile.tokens)


def of_strips(problem: GemmProblem, tile: Tile, cut: int, resident: int, first: int = 0) -> Config:
    """The kernel of a tile, for all strips from `first` on."""
    config = configured(tile, cut, problem.pattern, problem.dtype, problem.out, reads_codes(problem, tile), resident)
    band = NARROW_BAND if tile.tokens == 256 and problem.m <= NARROW_TOKENS else BAND
    return replace(config, strips=(first, -(-problem.n // 64)), band=band)


def at_once(config: Config, tiles: int, problem: GemmProblem) -> bool:
    """Whether so many tiles, each with a block or a cluster of its own, are all at work together."""
    fit = CLUSTERS_FIT if config.cut > 2 else 1
    return config.possible(along_k(problem)) and tiles * config.cut <= problem.device.sms * config.resident * fit


def candidates_of(tile: Tile, problem: GemmProblem) -> Iterator[tuple[Config, ...]]:
    """The launches of a tile, in every way that may pay.

    Whole tiles; k cut; whole rounds of tiles, and the rest with k cut, or in tiles of fewer tokens.
    """
    m, sms = problem.m, problem.device.sms
    if not takes(problem, tile) or not of_strips(problem, tile, 1, 1).possible(along_k(problem)):
        return
    for cut in tile.cuts:
        for resident in residents(tile, cut):
            parted = of_strips(problem, tile, cut, resident)
            if at_once(parted, parted.tiles(m), problem):
                yield (replace(parted, end=parted.tiles(m), blocks=parted.tiles(m) * cut),)
    for resident in residents(tile, 1):
        whole = of_strips(problem, tile, 1, resident)
        tiles = whole.tiles(m)
        yield (replace(whole, end=tiles, blocks=min(tiles, sms)),)
        full = tiles // sms * sms
        if not full or full == tiles:
            continue
        before = replace(whole, end=full, blocks=sms, order=BEFORE_REST)
        for cut in tile.cuts:
            parted = replace(of_strips(problem, tile, cut, residents(tile, cut)[-1]), begin=full, end=tiles)
            if at_once(parted, tiles - full, problem):
                yield before, replace(parted, blocks=(tiles - full) * cut, order=REST)
        tiles_m = -(-m // tile.tokens)
        step = sms // math.gcd(sms, tiles_m)  # so many columns of tiles make whole rounds
        columns = full // tiles_m // step * step
        if not columns or full > MIXED_ROUNDS * sms:
            continue
        split = columns * tile.warpgroups
        if split % 2:  # the others start on a pair of strips
            continue
        before = replace(whole, strips=(0, split), end=columns * tiles_m, blocks=min(sms, columns * tiles_m), order=BEFORE_REST)
        for other in TILES:
            if other.tokens < tile.tokens and takes(problem, other):
                for cut in (1, *other.cuts):
                    rest = of_strips(problem, other, cut, residents(other, cut)[-1], split)
                    if at_once(rest, rest.tiles(m), problem):
                        yield before, replace(rest, end=rest.tiles(m), blocks=rest.tiles(m) * cut, order=REST)


class Hopper:
    """See `arch.Arch`."""

    source, suffix, parameters, portable = "sm90/gemm.cu", "a", PARAMETERS, False  # wgmma is in sm_90a alone

    def serves(self, capability: tuple[int, int]) -> bool:
        return capability == (9, 0)

    def refuses(self, capability: tuple[int, int], dtype: DType) -> str:
        if dtype in (INT8, FLOAT8, BFLOAT16, FLOAT16):
            return ""
        return f"packed: {dtype} weights have no kernel for this device; pack as int8 or bfloat16 for it"

    def operand(self, pattern: Pattern, k: int, dtype: DType) -> Operand:
        return Operand(True, pattern, STAGE * stages(pattern, k, dtype))

    def arrange(self, packed: PackedWeight, xp: Any) -> dict[str, Any]:
        return arrange(packed, xp)

    def derived(self, buffers: Collection[str]) -> tuple[str, ...]:
        return ("words",) if "codes" in buffers else ()

    def derive(self, buffer: str, buffers: Mapping[str, Any], pattern: Pattern, dtype: DType, xp: Any) -> Any:
        """Words, of codes."""
        if buffer != "words":
            raise KeyError(buffer)
        return expand(buffers["codes"], pattern, dtype, xp)

    def fitted(self, config: Config, buffers: Mapping[str, Any]) -> Config:
        return config if "codes" in buffers else config.with_words()

    def kernels(self, pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int]) -> Iterator[Config]:
        """Of every tile, with k whole and cut."""
        for tile in TILES:
            for cut in (1, *tile.cuts):
                for resident in residents(tile, cut):
                    for codes in _forms(tile, pattern, dtype):
                        yield configured(tile, cut, pattern, dtype, out, codes, resident)

    def candidates(self, problem: GemmProblem) -> Iterator[tuple[Config, ...]]:
        return (candidate for tile in TILES for candidate in candidates_of(tile, problem))

    def cost(self, candidate: tuple[Config, ...], problem: GemmProblem) -> float:
        """Nanoseconds: rounds of tiles, or reading the weights from memory where that takes longer."""
        compute, read, count = 0.0, 0.0, along_k(problem)
        for config in candidate:
            tile, together = config.tile, min(config.resident, max(1.0, config.blocks / problem.device.sms))  # blocks an SM
            rounds = -(-(config.end - config.begin) * config.cut // config.blocks)
            stage = max(tile.stage_ns * together, RING_NS / config.stages)
            if problem.m >= LONG_TOKENS and tile != LARGEST:
                stage *= CAPPED
            each = -(-count // config.cut) * stage + tile.tile_ns
            compute += rounds * each
            if config.cut > 1:
                compute += CUT_NS_A_BLOCK * config.cut + CUT_NS_A_TOKEN * tile.tokens
            strip = VALUE_BYTES + index_bytes(config.dtype, config.windows > 0)
            weights = (config.end - config.begin) * count * tile.warpgroups * strip
            once = 1 / -(-problem.m // tile.tokens)
            read += weights * (once / READ_BYTES_A_NS + (1 - once) / AGAIN_BYTES_A_NS)
        return LAUNCH_NS + max(compute, read) + OVERLAP * min(compute, read)

    def error(self, dtype: DType, ks: int) -> float:
        return -(-ks // 64) * FLOAT8_ERROR if dtype is FLOAT8 else 0.0


ARCH = Hopper()
