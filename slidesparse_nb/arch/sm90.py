"""The kernel on `wgmma.mma_async.sp`, the sparse tensor-core instruction of Hopper (sm_90a): candidates.

Data and pure functions. sm90_launch.py has tiles and launches, sm90_layout.py the layout of weights, sm90_cost.py the estimate
of time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..core.dtypes import DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.problem import GemmProblem
from ..core.scheme import Scheme
from . import sm90_cost
from .common import MOST_UNQUANTIZED, Tiled, refuses
from .operand import stages
from .sm90_launch import (
    ALWAYS_COMPACT,
    BEFORE_REST,
    COMPACT,
    DERIVED,
    EXPANDED,
    OWN_X_BYTES,
    OWN_X_TOKENS,
    PARAMETERS,
    RASTER_GROUP,
    REST,
    TILES,
    Config,
    Expansion,
    Tile,
    along_k,
    configured,
    own_x_bytes,
    residents,
)
from .sm90_layout import VALUE_BYTES, arrange, expand, has_compact_metadata, metadata_bytes, row_tiles

SMALL_TOKENS = 64
"""Largest small tile, in tokens."""
SMALL_M = 128
"""Largest m that tiles of `SMALL_TOKENS` serve; a smaller one takes all tokens. Others were never faster by more than 1 %."""
EVER_COMPACT = {8: 256, 16: 128}
"""Largest tile (tokens) that may read compact metadata where the weight has expanded metadata, too, by element width."""
NARROW_RASTER_GROUP, NARROW_TOKENS = 8, 2048
"""Rasterization group of tiles of 256 tokens, and the largest m that takes it (docs/notes/hopper-attempts.md)."""
MIXED_ROUNDS = 4
"""Most whole rounds of tiles before a rest in smaller tiles; after more rounds the shape of the rest makes no difference."""
PAIRS_BUSY = 0.7
"""Least share of pairs that have one of the rest. On an H200 this was as fast as other launches or faster where 50 and more of
66 had one, slower where 18 had."""
WIDE_BUSY = 0.8
"""Least share of the SMs with a block of a wide tile that quantizes x. On an H200 this was faster than other launches where 108
and 112 of 132 had one, slower where 96 and fewer had; with a quantization before, it is faster from half of them on."""
MOST_UNQUANTIZED_X = 20480
"""Largest m * k for which blocks quantize x themselves: each reads all of it."""
OWN_X_REST_SPLIT = 2
"""Largest cluster of a second launch whose blocks quantize x themselves: each reads all of x for a small part of k."""
OWN_X_SAVES_NS = 2600
"""By how much the estimate of a product whose blocks quantize x may exceed that of a product of an operand, in ns. Up to there
all 32 linears that were timed on H200s were faster, by 600 to 1700 ns; two beyond were not."""
OWN_X_STAGES = 7
"""Fewest stages of a ring where the block quantizes x itself: the ring holds the weights that arrive meanwhile."""
SMALLER = {
    tile: [other for other in TILES if other.tokens < tile.tokens and (other.n, other.pairs) == (tile.n, tile.pairs)]
    for tile in TILES
}
"""Tiles of as many outputs and fewer tokens."""


def is_candidate(tile: Tile, problem: GemmProblem, metadata: str) -> bool:
    """Whether the tile is a candidate for m tokens, and has a kernel that reads this metadata."""
    small = tile.tokens <= SMALL_TOKENS
    if problem.unquantized:  # a warpgroup for each token, at least, and whole warps
        whole = problem.m <= tile.warpgroups and 4 * tile.warpgroups % problem.m == 0
        return whole and _quantizes(tile, problem.dtype, problem.out, metadata == COMPACT)
    if small and (problem.m > (SMALL_M if tile.tokens == SMALL_TOKENS else tile.tokens) or metadata == DERIVED):
        return False
    return (metadata == COMPACT) in _reads_compact(tile, problem.pattern, problem.dtype)


def larger_than_needed(tile: Tile, split_k: int, problem: GemmProblem, metadata: str) -> bool:
    """Whether another tile of as many outputs, and fewer tokens, takes all tokens in as many tiles and can cut k the same way.

    It is the faster one: of 2054 linears none lost more than 2 % by this rule (docs/results/candidates-h200.json).
    """
    tiles = -(-problem.m // tile.tokens)
    return any(
        -(-problem.m // other.tokens) == tiles
        and split_k in (1, *other.splits)
        and is_candidate(other, problem, metadata)
        and (not other.consumers_load or of_row_tiles(problem, other, 1, 1, metadata).possible(along_k(problem)))
        for other in SMALLER[tile]
    )


def of_row_tiles(problem: GemmProblem, tile: Tile, split_k: int, resident: int, metadata: str, first: int = 0) -> Config:
    """The kernel of a tile, for all row tiles from `first` on."""
    own_x = 0
    if problem.unquantized:
        parts = 1 if tile.pairs else split_k  # of k; blocks of pairs have a whole tile first
        needed = own_x_bytes(problem.m, parts, problem.pattern, along_k(problem))
        own_x = next((size for size in OWN_X_BYTES if size >= needed), needed)
    config = configured(tile, split_k, problem.pattern, problem.dtype, problem.out, metadata == COMPACT, resident, own_x)
    group = NARROW_RASTER_GROUP if tile.tokens == 256 and problem.m <= NARROW_TOKENS else RASTER_GROUP
    return config.but(row_tiles=(first, -(-problem.n // 64)), raster_group=group, derived=metadata == DERIVED)


def at_once(config: Config, tiles: int, problem: GemmProblem) -> bool:
    """Whether `tiles` tiles, each with a block or a cluster of its own, all run at the same time."""
    launch = config.but(blocks=tiles * config.split_k)
    return possible(config, problem) and launch.fits(problem.device.sms * config.resident)


def _may_quantize(config: Config) -> bool:
    """Whether there is a kernel of such a tile whose blocks quantize x: not with one block an SM, except of many outputs."""
    alone = config.tile.warpgroups > 2
    sizes = OWN_X_BYTES if alone else OWN_X_BYTES[:-1]
    return config.own_x in sizes and config.stages >= OWN_X_STAGES and (config.resident == 2 or alone)


def rest_at_once(rest: Config, tiles: int, problem: GemmProblem) -> bool:
    """The same of a second launch."""
    return (not rest.own_x or rest.split_k <= OWN_X_REST_SPLIT) and at_once(rest, tiles, problem)


def possible(config: Config, problem: GemmProblem) -> bool:
    """Whether there is such a kernel, and k and outputs suffice for it."""
    return (not config.own_x or _may_quantize(config)) and config.possible(along_k(problem))


def candidates_of(tile: Tile, problem: GemmProblem, metadata: str, every: bool = True) -> Iterator[tuple[Config, ...]]:
    """Candidates of a tile that read this metadata, the launches of each, without an `Expansion`.

    All tiles at once by split-K; whole tiles; whole rounds of tiles, then the rest by split-K, or in smaller tiles; whole
    tiles, then the rest by pairs; tiles of many outputs.

    Args:
        every: also those whose first launch has a tile, or a tile cut along k, that is `larger_than_needed`.
    """
    m, sms = problem.m, problem.device.sms
    if not is_candidate(tile, problem, metadata):
        return
    splits = [split for split in (*tile.splits, 1) if every or not larger_than_needed(tile, split, problem, metadata)]
    if not splits or not of_row_tiles(problem, tile, 1, 1, metadata).possible(along_k(problem)):
        return
    if tile.pairs or tile.wide:
        yield from (_by_pairs if tile.pairs else _in_wide_tiles)(tile, problem, metadata)
        return
    for split, resident in itertools.product((split for split in splits if split > 1), residents(tile)):
        config = of_row_tiles(problem, tile, split, resident, metadata)
        if at_once(config, config.tiles(m), problem):
            yield (config.but(end=config.tiles(m), blocks=config.tiles(m) * split),)
    if 1 not in splits:
        return
    for resident in residents(tile):
        whole = of_row_tiles(problem, tile, 1, resident, metadata)
        if not possible(whole, problem):
            continue
        tiles = whole.tiles(m)
        full = tiles // sms * sms  # tiles of whole rounds
        if not problem.unquantized or tiles <= sms:
            yield (whole.but(end=tiles, blocks=min(tiles, sms)),)
        elif full > sms:  # such kernels are for two blocks an SM: alone one takes 4 % longer and more, except for one tile
            continue
        if not full or full == tiles:
            continue
        before = whole.but(end=full, blocks=sms, order=BEFORE_REST)
        for split in () if repeats_outputs(tile, problem) else tile.splits:
            rest = of_row_tiles(problem, tile, split, residents(tile)[-1], metadata).but(begin=full, end=tiles)
            if rest_at_once(rest, tiles - full, problem):
                yield before, rest.but(blocks=(tiles - full) * split, order=REST)
        yield from _with_smaller_rest(whole, full, problem, metadata)


def _by_pairs(tile: Tile, problem: GemmProblem, metadata: str) -> Iterator[tuple[Config, ...]]:
    """Whole tiles, then the rest by pairs of blocks, where one tile takes all tokens.

    Two tiles at least are shared: the last may repeat outputs of the one before, which must have added in the same order.
    """
    config, pairs = of_row_tiles(problem, tile, 2, 1, metadata), problem.device.sms // 2
    tiles = config.tiles(problem.m)
    if problem.m > tile.tokens or not 0 < 2 * pairs <= tiles or not possible(config, problem):
        return
    if max(2, PAIRS_BUSY * pairs) <= tiles % (2 * pairs) <= pairs:
        yield (config.but(end=tiles, blocks=2 * pairs),)


def _in_wide_tiles(tile: Tile, problem: GemmProblem, metadata: str) -> Iterator[tuple[Config, ...]]:
    """Whole tiles of many outputs, where one takes all tokens: one round of them, or of 256 outputs two.

    A second round of 320 takes longer than the estimate tells, and blocks that quantize x have one tile.
    """
    config, sms = of_row_tiles(problem, tile, 1, 1, metadata), problem.device.sms
    tiles, rounds = config.tiles(problem.m), 1 if problem.unquantized or tile.n > 256 else 2
    if problem.m > tile.tokens or tiles > rounds * sms or (problem.unquantized and tiles < WIDE_BUSY * sms):
        return
    if possible(config, problem):
        yield (config.but(end=tiles, blocks=min(tiles, sms)),)


def repeats_outputs(tile: Tile, problem: GemmProblem) -> bool:
    """Whether the last tile along n computes outputs of the one before again, so that both must add in the same order."""
    return tile.warpgroups == 3 and -(-problem.n // 64) % 3 != 0


def _with_smaller_rest(whole: Config, full: int, problem: GemmProblem, metadata: str) -> Iterator[tuple[Config, ...]]:
    """Two launches: columns of tiles that make whole rounds, `full` tiles at most; then the others in smaller tiles."""
    tile, sms, tiles_m = whole.tile, problem.device.sms, -(-problem.m // whole.tile.tokens)
    step = sms // math.gcd(sms, tiles_m)  # columns that make whole rounds
    columns = full // tiles_m // step * step
    boundary = columns * tile.warpgroups
    if not columns or full > MIXED_ROUNDS * sms or boundary % 2:  # the second launch starts on a pair of row tiles
        return
    blocks = min(sms, columns * tiles_m)
    before = whole.but(row_tiles=(0, boundary), end=columns * tiles_m, blocks=blocks, order=BEFORE_REST)
    for other in TILES:
        smaller = other.tokens < tile.tokens or (problem.m <= other.tokens == tile.tokens and other.n < tile.n)
        if smaller and not (other.pairs or other.wide) and is_candidate(other, problem, metadata):
            for split in (1, *other.splits):
                rest = of_row_tiles(problem, other, split, residents(other)[-1], metadata, boundary)
                if rest_at_once(rest, rest.tiles(problem.m), problem):
                    yield before, rest.but(end=rest.tiles(problem.m), blocks=rest.tiles(problem.m) * split, order=REST)


def _reads_compact(tile: Tile, pattern: Pattern, dtype: DType) -> tuple[bool, ...]:
    """Whether kernels of a tile read compact metadata: never, always or some. Weights of 16 bits may lack it."""
    if not has_compact_metadata(pattern) or not tile.decodes:
        return (False,)
    return (True,) if tile.tokens <= ALWAYS_COMPACT and dtype.bits == 8 else (True, False)


def _quantizes(tile: Tile, dtype: DType, out: str, compact: bool) -> bool:
    """Whether some kernels of a tile quantize x, which is of the type of y, themselves."""
    return compact and tile.tokens == OWN_X_TOKENS and dtype.bits == 8 and out != "float32"


class Hopper(Tiled):
    """See `arch.Arch`."""

    source, parameters = Config.source, PARAMETERS

    def serves(self, capability: tuple[int, int]) -> bool:
        return capability == (9, 0)

    def refuses(self, capability: tuple[int, int], scheme: Scheme) -> str:
        """`wgmma` multiplies operands of one type."""
        return refuses(scheme)

    def arrange(self, packed: PackedWeight, xp: Any, least_memory: bool = False) -> dict[str, Any]:
        """With both forms of the metadata, or the smaller alone."""
        made = arrange(packed, xp)
        if COMPACT in made and not least_memory:
            made[EXPANDED] = expand(made[COMPACT], packed.pattern, packed.dtype, xp)
        return made

    def buffer_bytes(self, pattern: Pattern, n: int, k: int, scheme: Scheme) -> tuple[dict[str, int], ...]:
        tiles, forms = row_tiles(n) * stages(pattern, k, scheme.dtype), ((EXPANDED,), (COMPACT,), (COMPACT, EXPANDED))
        of = {name: tiles * metadata_bytes(scheme.dtype, name == COMPACT) for name in (COMPACT, EXPANDED)}
        held = forms if has_compact_metadata(pattern) else forms[:1]
        return tuple({"values": tiles * VALUE_BYTES, **{name: of[name] for name in form}} for form in held)

    def kernels(self, pattern: Pattern, scheme: Scheme, out: str, capability: tuple[int, int]) -> Iterator[Config | Expansion]:
        """Of every tile, without and with split-K or by pairs, and those that quantize x; then the expansion, of patterns that
        have compact metadata."""
        for tile in TILES:
            for split in tile.splits if tile.pairs else (1, *tile.splits):
                for resident in residents(tile):
                    for compact in _reads_compact(tile, pattern, scheme.dtype):
                        yield configured(tile, split, pattern, scheme.dtype, out, compact, resident)
                        for own_x in OWN_X_BYTES if _quantizes(tile, scheme.dtype, out, compact) else ():
                            made = configured(tile, split, pattern, scheme.dtype, out, compact, resident, own_x)
                            if _may_quantize(made):
                                yield made
        if has_compact_metadata(pattern):
            yield Expansion(scheme.dtype, pattern.windows)

    def quantizes(self, problem: GemmProblem, buffers: Collection[str] | None = None) -> bool:
        if problem.m > MOST_UNQUANTIZED or problem.m * problem.k > MOST_UNQUANTIZED_X or problem.k % 8:
            return False
        unquantized = replace(problem, unquantized=True)
        least = min((self.cost(c, unquantized) for c in self.candidates(unquantized, buffers, every=False)), default=math.inf)
        return least <= OWN_X_SAVES_NS + min(self.cost(c, problem) for c in self.candidates(problem, buffers, every=False))

    def candidates(
        self, problem: GemmProblem, buffers: Collection[str] | None = None, every: bool = True, tiles: Sequence[Tile] = TILES
    ) -> Iterator[tuple[Config | Expansion, ...]]:
        """Candidates that read expanded metadata, and candidates that read compact metadata.

        If the weight has the compact form alone, an `Expansion` precedes the former. If it has both forms, the latter are only
        those of small tiles, and of tiles of up to `EVER_COMPACT` that take all tokens. Few tokens take no tile for many.

        Args:
            every: as of `candidates_of`.
            tiles: of the first launch that multiplies.
        """
        compact = has_compact_metadata(problem.pattern) and (buffers is None or COMPACT in buffers)
        both = compact and (buffers is None or EXPANDED in buffers)
        expansion = Expansion(problem.dtype, problem.pattern.windows)
        small = compact or problem.dtype.bits == 16 or not has_compact_metadata(problem.pattern)  # small tiles can read it
        most = 2 * max(8, 1 << (problem.m - 1).bit_length()) if small else math.inf
        for tile in tiles:
            if tile.tokens > most:
                continue
            pays = tile.tokens <= SMALL_TOKENS or problem.m <= tile.tokens <= EVER_COMPACT[problem.dtype.bits]
            forms = [COMPACT] if compact and (pays or not both) else []
            forms.append(EXPANDED if both or not compact else DERIVED)
            for metadata in forms:
                before = (expansion,) if metadata == DERIVED else ()
                for launches in candidates_of(tile, problem, metadata, every):
                    yield *before, *launches

    def again(
        self,
        candidate: tuple[Config | Expansion, ...],
        chosen: int,
        problem: GemmProblem,
        buffers: Collection[str] | None = None,
    ) -> tuple[Config | Expansion, ...] | None:
        """`candidate` itself, where m tokens make as many tiles as `chosen`."""
        tiles = [launch.tile for launch in candidate if isinstance(launch, Config)]
        if all(-(-problem.m // tile.tokens) == -(-chosen // tile.tokens) for tile in tiles):
            return candidate
        kernels = [launch.kernel for launch in candidate]
        alike = self.candidates(problem, buffers, tiles=tiles[:1])
        return next((other for other in alike if [launch.kernel for launch in other] == kernels), None)

    def cost(self, candidate: tuple[Config | Expansion, ...], problem: GemmProblem) -> float:
        """Nanoseconds."""
        products = [launch for launch in candidate if isinstance(launch, Config)]
        derived = sum(launch.derived_bytes(problem) for launch in candidate)
        return sm90_cost.nanoseconds(products, problem, along_k(problem)) + sm90_cost.expansion_nanoseconds(derived)


ARCH = Hopper()
