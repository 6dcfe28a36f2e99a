"""Estimated time of launches of Hopper's kernel at 6:8. It was fitted to 3000 timings of products on several H100s, of 1 to
16384 tokens; tiles and what two launches share then to linears on H200s, where a quantization precedes each product, of 2 to
4096 tokens (docs/results/candidates-h200.json)."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.problem import GemmProblem
from .sm90_launch import ALWAYS_COMPACT, Config
from .sm90_layout import VALUE_BYTES, metadata_bytes

LAUNCH_NS = 838
"""Time of a product beside its tiles, in ns."""
SPLIT_K_NS_PER_BLOCK = 239
"""Time that split-K adds for each block of a cluster, in ns."""
SPLIT_K_NS_PER_TOKEN, SPLIT_K_TOKENS = 17.2, 48
"""Time that split-K adds for each token of a tile, in ns, and the tokens up to which it does."""
SECOND_NS, SECOND_LARGE_NS = 300, 5760
"""Time that a second launch takes to start after the first, in ns, unless it runs beside it: after tiles of up to 64 tokens,
and after larger ones."""
BESIDE = {1: 1.0, 2: 0.75}
"""Second launches that run beside the first: blocks of a cluster -> most blocks, as a share of the SMs."""
LOAD_NS = 1100
"""Time from the request of a stage until it is in shared memory, in ns: a ring of s stages delivers one in LOAD_NS / s."""
MEMORY_BYTES_PER_NS = 3230
"""Rate at which memory delivers weights."""
L2_BYTES_PER_NS = 5200
"""Rate at which L2 delivers weights, which tiles of other tokens read again."""
OVERLAP = 0.29
"""Share of the shorter of computing and reading, or of two launches side by side, that adds to the longer."""
EXPANSION_NS = 2430
"""Time of an expansion beside its bytes, and of what the launch after it cannot prefetch, in ns; fitted to an H200."""
EXPANDED_PER_NS = 4100
"""Rate at which expanded metadata are written, bytes per ns."""
DECODE_NS, DECODE_LARGE_NS = 10, 15
"""Time that decoding compact metadata adds to a stage, in ns a warpgroup, fitted to an H200: in tiles of up to 64 tokens, and
in larger ones. Alone it takes 36 ns, which reading the weights hides in part (docs/hopper.md). If a tile of up to
ALWAYS_COMPACT tokens takes all tokens, its `stage_ns` contains it."""
DECODE_WIDE_NS = 30
"""The same of 16-bit types in tiles of up to ALWAYS_COMPACT tokens, which may read expanded metadata, too."""
LONG_M = 8192
"""Smallest m at which the board's power limit decides."""
POWER_PENALTY = 1.08
"""Factor on a stage, from LONG_M on, of tiles other than the largest (256 x 192), which copy more for each operation."""


def expansion_nanoseconds(derived: int) -> float:
    """Writing `derived` bytes of expanded metadata; 0 bytes take no launch."""
    return EXPANSION_NS + derived / EXPANDED_PER_NS if derived else 0.0


def decoding(config: Config, problem: GemmProblem) -> float:
    """Of a stage, in ns a warpgroup."""
    small = config.tile.tokens <= ALWAYS_COMPACT
    if not config.compact or (small and problem.dtype.bits == 8 and problem.m <= config.tile.tokens):
        return 0
    if small and problem.dtype.bits == 16:
        return DECODE_WIDE_NS
    return DECODE_NS if config.tile.tokens <= 64 else DECODE_LARGE_NS


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
        stage = max((tile.stage_ns + decoding(config, problem) * tile.warpgroups) * together, LOAD_NS / config.stages)
        if problem.m >= LONG_M and (tile.tokens, tile.warpgroups) != (256, 3):
            stage *= POWER_PENALTY
        fixed = float((tiles // config.blocks + 1 if tile.pairs else rounds) * tile.tile_ns)
        if config.split_k > 1:
            fixed += SPLIT_K_NS_PER_BLOCK * config.split_k + SPLIT_K_NS_PER_TOKEN * min(tile.tokens, SPLIT_K_TOKENS)
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
