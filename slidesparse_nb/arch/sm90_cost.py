"""Estimated time of linears by launches of Hopper's kernel at 6:8.

Fitted to 40,000 timings of 2095 linears on H200s, of 1 to 4096 tokens (docs/results/candidates-h200.json has the fastest of
each), so that what it chooses takes little longer than the fastest.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from ..core.problem import GemmProblem
from .sm90_launch import ALWAYS_COMPACT, Config, Tile
from .sm90_layout import VALUE_BYTES, metadata_bytes

LAUNCH_NS = 1503
"""Time of a linear beside the tiles of its product, in ns: mostly its quantization, which one by the blocks does not have."""
SPLIT_K_NS, SPLIT_K_NS_PER_BLOCK = 691, 202
"""Time that split-K adds, and for each block of a cluster, in ns."""
SECOND_NS, SECOND_LARGE_NS = 1664, 2737
"""Time that a second launch takes to start after the first, in ns, unless it runs beside it: after tiles of up to 64 tokens,
and after larger ones."""
BESIDE = {1: 1.0, 2: 0.75}
"""Second launches that run beside the first: blocks of a cluster -> most blocks, as a share of the SMs."""
LOAD_NS, LOAD_LARGE_NS = 1382, 1234
"""Time from the request of a stage until it is in shared memory, in ns, in tiles of up to 64 tokens and in larger ones: a ring
of s stages delivers one in an s-th of it."""
MEMORY_BYTES_PER_NS = 5000
"""Rate at which memory delivers weights; fitted together with OVERLAP, and higher than any that was measured."""
L2_BYTES_PER_NS = 8280
"""Rate at which L2 delivers weights, which tiles of other tokens read again; fitted in the same way."""
OVERLAP = 0.41
"""Share of the shorter of computing and reading, or of two launches side by side, that adds to the longer."""
EXPANSION_NS = 1583
"""Time of an expansion beside its bytes, and of what the launch after it cannot prefetch, in ns; fitted to an H200."""
EXPANDED_PER_NS = 4100
"""Rate at which expanded metadata are written, bytes per ns."""
DECODE_NS = {8: (16, 15, 2, 13), 16: (9, 16, 2, 9)}
"""Time that decoding compact metadata adds to a stage, in ns a warpgroup, by the width of an element and the size of the tile
(`_size`), fitted to an H200. Alone it takes 36 ns, which reading the weights hides in part (docs/hopper.md). If a tile of 8-bit
types of up to ALWAYS_COMPACT tokens takes all tokens, its `stage_ns` contains it."""
SECOND_BLOCK = (0.0, 0.46, 1.0, 1.0)
"""Share of a stage that a second block on the SM adds to it, by the size of the tile: small instructions wait for results, and
leave the SM to another block meanwhile."""
LONG_M = 8192
"""Smallest m at which the board's power limit decides."""
POWER_PENALTY = 1.08
"""Factor on a stage, from LONG_M on, of tiles other than the largest (256 x 192), which copy more for each operation."""


def expansion_nanoseconds(derived: int) -> float:
    """Writing `derived` bytes of expanded metadata; 0 bytes take no launch."""
    return EXPANSION_NS + derived / EXPANDED_PER_NS if derived else 0.0


def _size(tile: Tile) -> int:
    """Of a tile: its place among those of up to `ALWAYS_COMPACT`, 64, 128 and more tokens."""
    return bisect.bisect_left((ALWAYS_COMPACT, 64, 128), tile.tokens)


def decoding(config: Config, problem: GemmProblem) -> float:
    """Of a stage, in ns a warpgroup."""
    bits, size = problem.dtype.bits, _size(config.tile)
    if not config.compact or (bits == 8 and size == 0 and problem.m <= config.tile.tokens):
        return 0
    return DECODE_NS[bits][size]


def beside(first: Config, second: Config, sms: int) -> bool:
    """Whether the blocks of two launches share the SMs; more blocks, or larger clusters, wait for those of the first."""
    return first.resident == second.resident == 2 and second.blocks <= BESIDE.get(second.split_k, 0.0) * sms


def nanoseconds(launches: Sequence[Config], problem: GemmProblem, stages: int) -> float:
    """Rounds of tiles, or reading the weights from memory or L2 where that takes longer; `stages` cover k."""
    computing, memory, cache, sms = [], 0.0, 0.0, problem.device.sms
    for config in launches:
        tile, together = config.tile, min(config.resident, max(1.0, config.blocks / sms))  # blocks an SM
        tiles = config.end - config.begin
        rounds = -(-tiles * config.split_k // config.blocks)
        stage = tile.stage_ns + decoding(config, problem) * tile.warpgroups
        load = LOAD_NS if tile.tokens <= 64 else LOAD_LARGE_NS
        stage = max(stage * (1 + SECOND_BLOCK[_size(tile)] * (together - 1)), load / config.stages)
        if problem.m >= LONG_M and (tile.tokens, tile.warpgroups) != (256, 3):
            stage *= POWER_PENALTY
        fixed = float((tiles // config.blocks + 1 if tile.pairs else rounds) * tile.tile_ns)
        if config.split_k > 1:
            fixed += SPLIT_K_NS + SPLIT_K_NS_PER_BLOCK * config.split_k
        computing.append(rounds * -(-stages // config.split_k) * stage + fixed)
        weights = tiles * stages * tile.warpgroups * (VALUE_BYTES + metadata_bytes(config.dtype, config.compact))
        memory += weights / -(-problem.m // tile.tokens) / MEMORY_BYTES_PER_NS
        cache += weights / L2_BYTES_PER_NS
    reading = max(memory, cache)
    if len(launches) == 1:
        return LAUNCH_NS + longer(computing[0], reading)
    if beside(launches[0], launches[1], sms):
        return LAUNCH_NS + longer(longer(*computing), reading)
    second = SECOND_NS if launches[0].tile.tokens <= 64 else SECOND_LARGE_NS
    return LAUNCH_NS + second + longer(sum(computing), reading)


def longer(a: float, b: float) -> float:
    """Time of two things at once: the longer, and what does not overlap."""
    return max(a, b) + OVERLAP * min(a, b)
