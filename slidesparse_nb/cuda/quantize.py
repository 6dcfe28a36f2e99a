"""Activations on the GPU as GEMM kernels load them: quantized per token or rounded, lifted, in rows or tiles.

    x [m, k] --> values [m, pitch], scale [m, 1]                            rows, lifted if a kernel needs that
    x [m, k] --> tiles [stages, ceil(m / 8), 8, 128], scale [m, 1]          the swizzled layout of arch/operand.py
    x [m, k] --> blocks [m, blocks, 144], scale [m, 1]                      lifted, with the scales of blocks

Values are those of `reference.quantize`, float8 as its bits; columns past k, tokens past m are zero. x may have any strides:
whole 16-byte vectors of neighbouring elements are read once; other rows, and those of more than 8192 vectors, are read a second
time from cache. One launch, a thread block a token, or a cluster of blocks for each of few tokens behind a gate; the kernels
are in kernels/quantize.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from ..arch.common import SHARED_MEMORY
from ..arch.operand import SCALED_BLOCK, STAGE, stages
from ..core.dtypes import FLOAT8
from ..core.pattern import Pattern
from ..core.reference import norm_threads
from ..core.scheme import Block, Scheme
from ..errors import UnsupportedError
from .jit.numba import SIMULATED, Kernel, arrays
from .kernels.numbers import ROUND_TWO
from .kernels.quantize import FROM_MEMORY, kernel
from .kernels.quantize_stages import Variant

VECTORS = {1: 32, 2: 128, 4: 4096, 8: 8192}
"""16-byte vectors that a thread holds -> vectors of the longest row. Four keep enough loads in flight; more threads with fewer
vectors each wait longer at the barrier (H200, k = 3584: 1.02, 0.93, 0.78 of a copy's bandwidth with 4, 2, 1)."""

LONG_K, LONG_FROM = 16384, 257
"""On Hopper a thread holds eight vectors of rows with more than LONG_K columns, where there are LONG_FROM rows or more. The
linear (3584, 18944) on an H200 at m = 512: 58.0 us with eight, 60.1 with four; at 1024 109 and 112; at 256 37.1 and 36.7."""

SHORT = (1, 32), (2, 128), (3, 1728)
GATED = {
    "silu_and_mul": (*SHORT, (4, 2304), (5, 2560), (4, 4096), (8, 8192)),
    "gelu_and_mul": (*SHORT, (4, 4096), (8, 8192)),
}
"""The same of gates, whose threads have 56 registers, SiLU's 64 with five vectors: two blocks fit on an SM up to 2560 vectors.
On an H200 SiLU of (16384, 18944) takes 432 us with five, 602 with four; of one token 5.1 and 4.7. With five, GELU's loop is not
unrolled, and its arrays leave the registers (seen in PTX, not timed)."""

SPREAD_FROM, SPREAD_THREADS = 48, 256
"""Fewest blocks that are kept apart on Hopper, and threads of them that an SM may always take. Fitted to an H200
(docs/notes/operand-attempts.md)."""

APART = SHARED_MEMORY - 1024
"""Most dynamic shared memory that keeps blocks apart; the rest is for their sums."""

SHARED_BY = {4: 24, 2: 64}
"""Thread blocks of a cluster that share each row behind a gate -> largest number of rows for which they do. Fitted to SiLU of
8192 and 18944 columns on an H200 (docs/notes/operand-attempts.md)."""

SHARED_K = 4096
"""Fewest columns of a row that is shared."""

SHARED_THREADS = 1024
"""Largest number of threads of a block that shares a row."""


@functools.cache
def architecture(device: int) -> int:
    """The newest `Variant.architecture` that a device runs: 80, 89 or 90; in the simulator 90."""
    capability = 90 if SIMULATED else int(arrays.cuda.Device(device).compute_capability)
    return max(a for a in (80, 89, 90) if a <= max(capability, 80))


def native_float8(device: int) -> bool:
    """Whether the device converts to float8_e4m3fn itself."""
    return architecture(device) >= 89


@dataclass(frozen=True)
class Launch:
    """How rows of one length and strides are launched, however many they are.

    Attributes:
        threads: of a block.
        before, pitch, after: the kernel's integers after m; the pitch of tiles depends on m.
        shared: bytes of dynamic shared memory a block.
    """

    variant: Variant
    kernel: Kernel
    threads: int
    before: tuple[int, ...]
    pitch: int
    after: tuple[int, ...]
    shared: int

    def blocks(self, m: int) -> int:
        """One a row, or a cluster; tiles have whole groups of 8."""
        return (-(-m // 8) * 8 if self.variant.tiled else m) * self.variant.spread

    def shared_for(self, m: int, sms: int) -> int:
        """Dynamic shared memory for m rows on Hopper: so much that no SM takes more than its share of the blocks.

        They start while the product before them drains, and would else crowd on the few SMs that it leaves free.
        """
        blocks = self.blocks(m)
        share = max(-(-blocks // sms), -(-SPREAD_THREADS // self.threads))
        apart = (APART + 2048) // share - 2048  # each block takes one KiB more, and one for its sums
        return max(self.shared, apart // 16 * 16) if blocks >= SPREAD_FROM else self.shared

    def integers(self, m: int) -> tuple[int, ...]:
        """What the kernel gets besides its pointers, for m rows."""
        return (m, *self.before, -(-m // 8) * 64 if self.variant.tiled else self.pitch, *self.after)


@functools.lru_cache(maxsize=1024)
def plan(
    source: str,
    stored: str,
    k: int,
    strides: tuple[int, int],
    aligned: bool,
    architecture: int,
    pattern: Pattern | None = None,
    block: Block | None = None,
    *,
    width: int | None = None,
    kind: str = "",
    spread: int = 1,
    vectors: int = 0,
) -> Launch:
    """The launch for rows of k elements of these strides (bytes), from an address `aligned` to 16 bytes.

    Args:
        block: scales of what is quantized after it is lifted.
        width: bytes of the rows that are written, a multiple of 16, with block scales of SCALED_BLOCK; None for tiles.
        kind: what is done before, of `kernels.quantize.KINDS`; "" for nothing.
        spread: blocks of a cluster that share a row, which is then written in tiles; 1 for a norm.
        vectors: that a thread holds of a plain row; 0: as many as VECTORS says.

    Raises:
        UnsupportedError: rows that no kernel of that kind takes, or that `spread` blocks do not share.
    """
    windows = 0 if pattern is None else pattern.windows
    if stored != FLOAT8.name and 80 <= architecture < 90:
        architecture = 80  # one variant where it makes no difference
    variant = Variant(source, stored, 1, windows, width is None, architecture)
    size, words = variant.source_bytes, variant.words
    columns, neighbours = 16 // size, strides[1] == variant.source_bytes or k == 1
    whole = aligned and neighbours and k % columns == 0 and strides[0] % 16 == 0  # 16-byte vectors
    elements = strides[0] // size, strides[1] // size, k
    if block is not None:
        assert pattern is not None
        assert width is not None
        if kind:
            raise UnsupportedError(f"kind: {kind} to {stored} with block scales has no kernel; quantize what it makes")
        variant, runs = replace(variant, vectors=int(whole), block=block), width // SCALED_BLOCK * (256 // block.columns)
        threads, filled = min(FROM_MEMORY, max(32, -(-runs // 32) * 32)), -(-pattern.expanded_k(k) // block.columns)
        return Launch(variant, kernel(variant), threads, (*elements, filled), runs, (), 0)
    if width is None:
        assert pattern is not None
        width = STAGE * stages(pattern, k, Scheme.of(stored).dtype)
    chunks = width // 16
    total = -(-width // (4 * words))
    if windows:  # all that the last chunk is gathered from, and four words are read for it
        window = (chunks - 1) * (4 // variant.stored_bytes)
        first = (window + window // windows) // (2 // variant.stored_bytes)
        total = -(-(first + 4) // words)
    normed = norm_threads(k) if kind.endswith("rms_norm") else 0  # who adds what decides the sum
    if whole and k > 0 and total <= max(VECTORS.values()) and normed <= 1024:
        part, part_chunks = _part(variant, k, columns, spread) if spread > 1 else (0, 0)
        own = max(part, total - (spread - 1) * part)  # vectors of a block
        if spread > 1:
            vectors = -(-own // SHARED_THREADS)
        elif normed:
            vectors = -(-total // normed)
        else:
            vectors = vectors or next(v for v, n in GATED.get(kind, VECTORS.items()) if total <= n)
        threads = normed or -(-own // (32 * vectors)) * 32
        step = threads // variant.period * variant.period if variant.steady else threads
        advance = 2 * step * (windows + 1) // windows if variant.steady else 0
        pitch = width // (16 if windows else 4 * words)
        variant = replace(variant, vectors=vectors, spread=spread)
        before, shares = (strides[0] // 16, k // columns, total), () if normed else (part, part_chunks)
        shared = 4 * words * own + 16 * (spread > 1) if windows else 0
        if kind and (source not in ROUND_TWO or (variant.stored_bytes == 2 and not windows)):
            raise UnsupportedError(f"kind: {kind} of {source} to rows of {stored} has no kernel; quantize what it makes")
        made = kernel(variant, kind, threads) if normed else kernel(variant, kind)
        return Launch(variant, made, threads, before, pitch, (chunks, step, advance, *shares), shared)
    if kind or spread > 1:
        raise UnsupportedError(f"kind: {kind} of k={k}, strides {strides} has no kernel; quantize what it makes")
    variant = replace(variant, vectors=0)
    threads = min(FROM_MEMORY, max(32, -(-k // 128) * 32))
    return Launch(variant, kernel(variant), threads, elements, chunks, (4 * chunks,), 0)


def plans(*problem: Any, shared: bool = True, **named: Any) -> list[tuple[float, Launch]]:
    """What `plan` makes of the same arguments, as (largest number of rows, launch): for few rows first, for any number last.

    Args:
        shared: whether the blocks of a cluster may share a row, and long rows have other blocks where there are many.
    """
    made: list[tuple[float, Launch]] = [(math.inf, plan(*problem, **named))]
    if shared and not named.get("kind") and problem[2] > LONG_K and made[0][1].variant.vectors == 4:
        made = [(LONG_FROM - 1, made[0][1]), (math.inf, plan(*problem, **named, vectors=8))]
    if shared and named.get("kind") in GATED and problem[2] >= SHARED_K:
        for spread, most in reversed(SHARED_BY.items()):
            with contextlib.suppress(UnsupportedError):
                made.insert(0, (most, plan(*problem, **named, spread=spread)))
    return made


def _part(variant: Variant, k: int, columns: int, spread: int) -> tuple[int, int]:
    """Vectors of `columns` columns that each block of a cluster but the last takes, and the chunks that they give.

    Raises:
        UnsupportedError: the last would have none.
    """
    group, size = 2 * variant.windows + 2, 4 * variant.windows * variant.stored_bytes  # columns, and bytes that they give
    unit = math.lcm(columns, group * math.lcm(size, 16) // size) if size else k
    each = -(-k // (spread * unit)) * unit
    if each * (spread - 1) >= k or not variant.tiled or not variant.programmatic:
        raise UnsupportedError(f"spread: {spread} blocks do not share rows of {k} columns; take one")
    return each // columns, each // group * size // 16
