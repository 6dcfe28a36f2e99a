"""The layouts in which kernels load activations: rows, or the swizzled tile layout.

Rows are x unchanged, 16-byte aligned; for a kernel that cannot lift the pattern they are lifted. The swizzled tile layout is
that of shared memory, [stages, groups of 8 tokens, 8 x 128 bytes]: a stage is 128 bytes of expanded k, and any run of groups is
a tile, which one bulk copy moves. The 16-byte chunks of a 128-byte row are swizzled (PTX ISA, "Asynchronous warpgroup level
matrix multiply-accumulate", "Shared memory matrix layout"); those of an 8-bit type are in the order `HALVES` before, which puts
the windows of an instruction side by side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import DType
from ..core.pattern import Pattern
from ..core.scheme import Block


@dataclass(frozen=True)
class Operand:
    """The layout of x [m, k] that a kernel loads.

    Attributes:
        tiled: the swizzled tile layout; else rows.
        lift: the pattern by which x is lifted in memory; None: the kernel lifts it.
        row_bytes: bytes of a token.
        block: x is quantized after it is lifted, with such scales, to rows of blocks (`scaled_rows`).
    """

    tiled: bool
    lift: Pattern | None
    row_bytes: int
    block: Block | None = None

    @property
    def pitch(self) -> int:
        """Bytes from one token to the next, in buffers of our own."""
        return -(-self.row_bytes // 16) * 16

    def bytes(self, m: int) -> int:
        """Bytes of m tokens; the swizzled tile layout has whole groups of 8."""
        return (-(-m // 8) * 8 if self.tiled else m) * self.pitch


SCALED_BLOCK = 144
"""Bytes of a block of lifted pairs with block scales: 128 of values, 256 columns; a byte for every scale; zeros."""


def scaled_rows(values: Any, block_scale: Any, block: Block) -> NDArray[np.uint8]:
    """Lifted, quantized x as a kernel loads it: uint8 [m, blocks * SCALED_BLOCK].

    Args:
        values: uint8 [m, ks / 2], two e2m1 a byte.
        block_scale: uint8 [m, ceil(ks / block.columns)], their bits.
    """
    m, blocks = len(values), -(-values.shape[1] // 128)
    made = np.zeros((m, blocks, SCALED_BLOCK), np.uint8)
    for part, at, each in ((values, 0, 128), (block_scale, 128, 256 // block.columns)):
        padded = np.pad(part, ((0, 0), (0, blocks * each - part.shape[1])))
        made[:, :, at : at + each] = padded.reshape(m, blocks, each)
    return made.reshape(m, blocks * SCALED_BLOCK)


# ---- the swizzled tile layout ----------------------------------------------------------------------------------------

STAGE = 128
"""Bytes of expanded k of one token in a stage."""

HALVES = np.array([0, 1, 4, 5, 2, 3, 6, 7])
"""Positions of the 16-byte chunks of a stage of an 8-bit type: both instructions' windows 0-15, then 16-31. Its own inverse."""

TOKEN, CHUNK = np.arange(8)[:, None], np.arange(8)


def chunk_at(size: int) -> Any:
    """Positions of the 16-byte chunks of eight tokens in a stage, elements of `size` bytes: int [token, chunk]."""
    return (HALVES if size == 1 else CHUNK) ^ TOKEN


def chunk_from(size: int) -> Any:
    """Which chunk is stored at each position: the inverse of `chunk_at`."""
    place = CHUNK ^ TOKEN
    return HALVES[place] if size == 1 else place


@functools.lru_cache(maxsize=1024)
def stages(pattern: Pattern, k: int, dtype: DType) -> int:
    """Stages that cover a row of k columns: an even number, since kernels for few tokens take two at a time."""
    return _stages_of(pattern.expanded_k(k) * dtype.bits // 8)


def _stages_of(slid_bytes: int) -> int:
    return max(2, -(-slid_bytes // (2 * STAGE)) * 2)


def to_tiles(x: Any, pattern: Pattern) -> Any:
    """Activations [m, k] of a packed type, lifted, in the swizzled tile layout: uint8 [stages, ceil(m / 8), 8, 128].

    Chunk p of 16 bytes of a token's stage is stored at `chunk_at`, which swizzles.
    """
    m, k = x.shape
    size = x.dtype.itemsize
    ks = pattern.expanded_k(k)
    count = _stages_of(ks * size)
    raw = x.view(f"u{size}")
    padded = np.zeros((-(-m // 8) * 8, pattern.padded_k(k)), raw.dtype)
    padded[:m, :k] = raw
    slid = np.zeros((padded.shape[0], count * STAGE // size), raw.dtype)
    slid[:, :ks] = padded[:, pattern.lift_index(k)]
    slid = slid.view(np.uint8).reshape(-1, 8, count, 8, 16)  # group, token, stage, chunk, byte
    slid = slid[:, TOKEN, :, chunk_from(size)]  # [token, position, group, stage, byte]
    return np.ascontiguousarray(slid.transpose(3, 2, 0, 1, 4)).reshape(count, -1, 8, STAGE)


def from_tiles(made: Any, m: int, k: int, pattern: Pattern, dtype: DType, xp: Any = np) -> Any:
    """Inverse of `to_tiles`: activations [m, k] as their bits (`dtype.raw`), from the first window that holds each.

    Args:
        xp: numpy or cupy, whichever made the tiles.
    """
    count = made.shape[0]
    chunks = made.reshape(count, -1, 8, 8, 16)[:, :, xp.asarray(TOKEN), xp.asarray(chunk_at(dtype.bits // 8))]
    slid = xp.ascontiguousarray(chunks.transpose(1, 2, 0, 3, 4)).reshape(-1, count * STAGE).view(dtype.raw)
    group, inside = np.divmod(np.arange(k), pattern.group)
    window = np.minimum(inside // 2, pattern.windows - 1)
    return slid[:m, xp.asarray((group * pattern.windows + window) * 4 + inside - 2 * window)]
