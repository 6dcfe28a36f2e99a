"""Who owns what in the `mma.sp` kernel: how weights are arranged, and which bytes of x a lane reads. Data and NumPy.

The instruction multiplies 16 rows of 2:4 weights by 8 tokens. Every lane of a warp gives it 16 bytes of kept values, one
word of index nibbles, and four 32-bit words of lifted activations. The kernel (cuda_src/sm80/gemm.cu) reads activations
*unslid* and lifts them in registers; this file is its reference and says who owns what:

    unit     two neighbouring columns of x. A group of L = 2N columns is N units, and window j covers units j and j+1.
    owner    who forms a window. 8-bit: one lane (a window is one 32-bit register), four owners. 16-bit: a pair of lanes (a
             window is two registers), two owners; the even lane takes the even unit of the window, the odd lane the odd one.
    word     one 32-bit register of unslid x: 8-bit, units 2i and 2i+1 of its owner; 16-bit, unit 2i (even lane), 2i+1 (odd).
    window   at unit u of its owner. u even: word u/2 as it is. u odd: joined from words u/2 and u/2 + 1, by a byte permute
             (8-bit) or by taking one of the two (16-bit; its units are then swapped, and so are the indices).
    block    a k-block: the columns that one row of x gives to one pipeline stage: 16 * words bytes, `steps` instructions.

Because k may be summed in any order, blocks give every owner a contiguous run of columns, and the weights are arranged to
match. Fragment and index layouts: PTX ISA, "Warp-level matrix multiply-accumulate with sparse matrix A", m16n8k64 (8-bit)
and m16n8k32 (16-bit).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..errors import UnsupportedError

LARGEST_GROUP = 16
"""Wider groups are lifted in memory first and then multiplied as 2:4: their blocks would not fit in shared memory."""

ROW_TILES = 16
"""Row tiles, of 16 outputs, in the largest tile: arranged weights are padded to it, so that no tile reaches past them."""


def row_tiles(n: int) -> int:
    """Row tiles of arranged weights with n outputs."""
    return -(-n // (16 * ROW_TILES)) * ROW_TILES


Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How one pattern and width pass through the kernel.

    Attributes:
        pattern, bits: of the weights; bits is 8 or 16.
        words: 32-bit words of unslid x that a lane holds of one row and block.
        run: units that an owner holds side by side before the next owner's begin.
        load: bytes of one shared-memory load.
        stride: bytes from one row of x to the next in shared memory.
        scales: block scales of a row in a block, of pairs of 4-bit values (sm80_fp4.py); 0: none.
    """

    pattern: Pattern
    bits: int
    words: int
    run: int
    load: int
    stride: int
    scales: int = 0

    @property
    def owners(self) -> int:
        return 4 if self.bits == 8 else 2

    @property
    def units(self) -> int:
        """Units of one owner, row and block."""
        return 2 * self.words

    @property
    def mirrored(self) -> bool:
        """Whether the second pair of lanes reads each run backwards, so that the two pairs read different banks (16-bit)."""
        return self.bits == 16 and self.run % 4 == 0

    @property
    def steps(self) -> int:
        """Instructions along k in a block; each takes four windows of every owner."""
        return self.units // (self.pattern.group // 2) * self.pattern.windows // 4

    @property
    def row_bytes(self) -> int:
        """Bytes of x in a row of a block."""
        return 16 * self.words

    @property
    def columns(self) -> int:
        """Columns of x (logical k) in a block."""
        return self.row_bytes * 8 // self.bits

    @property
    def windows(self) -> int:
        """Windows in a row of a block."""
        return self.columns // self.pattern.group * self.pattern.windows

    @property
    def meta_words(self) -> int:
        """Index words a lane holds of a row tile and block; a word serves one 8-bit or two 16-bit instructions."""
        return self.steps if self.bits == 8 else -(-self.steps // 2)

    @property
    def block_bytes(self) -> int:
        """Bytes of arranged weights for 16 rows and one block: 512 of values an instruction, the index words, the scales."""
        return 512 * self.steps + 128 * self.meta_words + 16 * self.scales

    def blocks(self, k: int) -> int:
        """Blocks that cover k columns."""
        return -(-k // self.columns)


@cache
def layout(pattern: Pattern, bits: int) -> Layout:
    """The layout of a pattern: the widest shared-memory load without bank conflicts, then the least padding.

    Raises:
        UnsupportedError: groups wider than `LARGEST_GROUP`.
    """
    if pattern.group > LARGEST_GROUP:
        raise UnsupportedError(
            f"pattern: {pattern.described} has groups wider than {LARGEST_GROUP} columns, too wide to lift in registers"
        )
    words = 1
    while 4 * words % pattern.group or 4 * words // pattern.group * pattern.windows % 4:
        words += 1  # whole groups, and windows for whole instructions
    words *= -(-6 // words)  # at least six words, so that the work between two barriers is worth one
    group = pattern.group // 2
    if bits == 16:
        runs, loads = [group if group % 2 == 0 else 2 * group], [4]
    else:
        runs, loads = [run for run in (2 * words, 16) if 2 * words % run == 0 and run % group == 0], [16, 8, 4]
    candidates = [
        Layout(pattern, bits, words, run, load, 16 * (words + pad))
        for run in runs
        for load in loads
        if 2 * run % load == 0
        for pad in range(8)
    ]
    return min(candidates, key=lambda c: (bank_conflicts(c), -c.load, c.stride))


def word_offsets(layout: Layout) -> Array:
    """Where in a row of a block lane q finds its words: int [4, words], bytes."""
    q, i = np.arange(4)[:, None], np.arange(layout.words)
    if layout.bits == 8:
        return 2 * _place(layout, q, 2 * i)
    pair, odd, half = q >> 1, q & 1, layout.run // 2
    backwards = i // half * half + half - 1 - i % half
    return 4 * _place(layout, pair, 2 * np.where((pair == 1) & layout.mirrored, backwards, i) + odd)


def _place(layout: Layout, owner: Any, unit: Any) -> Array:
    """The unit of the row that is an owner's unit: runs of the owners alternate."""
    return np.asarray((unit // layout.run * layout.owners + owner) * layout.run + unit % layout.run)


def bank_conflicts(layout: Layout) -> int:
    """Shared-memory passes beyond the fewest, over all loads of x by a warp for eight tokens of a block.

    Banks are 4 bytes wide, 32 of them; a load of 4, 8 or 16 bytes a lane is served 32, 16 or 8 lanes at a time.
    """
    offsets = word_offsets(layout)[:, :: layout.load // 4]  # [4, loads]
    lane = np.arange(32)
    address = (lane >> 2)[:, None] * layout.stride + offsets[lane & 3]  # [32, loads]
    extra = 0
    for load in range(address.shape[1]):
        for phase in address[:, load].reshape(-1, 128 // layout.load):
            touched = np.unique(phase[:, None] // 4 + np.arange(layout.load // 4))
            extra += int(np.bincount(touched % 32).max()) - 1
    return extra


def window_order(layout: Layout) -> tuple[Array, Array]:
    """Which window of a block each instruction takes at each place along its own k.

    Returns:
        window: int [steps, 16 or 8], counted within a row of the block; swapped: bool, the same shape, where the two units
        of a window change places (16-bit windows at odd units).
    """
    units = layout.pattern.group // 2
    unit, owner = slot_units(layout)[:, None], np.arange(layout.owners)
    backwards = unit // layout.run * layout.run + layout.run - 2 - unit % layout.run
    place = _place(layout, owner, np.where((owner == 1) & layout.mirrored, backwards, unit))
    window = place // units * layout.pattern.windows + place % units
    swapped = (unit % 2 == 1) & (layout.bits == 16) & (owner >= 0)
    return window.reshape(layout.steps, -1), swapped.reshape(layout.steps, -1)


def slot_units(layout: Layout) -> Array:
    """Where the window starts that an owner gives as register slot % 4 of instruction slot // 4: int [4 * steps], units.

    Windows at even units come first: they are words as loaded, in the registers where they were loaded, so that only the
    joined ones cost an instruction.
    """
    natural = np.arange(4 * layout.steps)
    unit = natural // layout.pattern.windows * (layout.pattern.group // 2) + natural % layout.pattern.windows
    return unit[np.lexsort((natural, unit % 2))]


# ---- arranged weights ----------------------------------------------------------------------------------------------

_NIBBLE = np.arange(16)
_TURNED = np.stack([_NIBBLE & 3, _NIBBLE >> 2]) ^ 2  # both positions with the units of the window swapped
SWAPPED_NIBBLE = (_TURNED.min(0) | _TURNED.max(0) << 2).astype(np.uint8)
"""A nibble after the two units of its window changed places."""
SWAPPED_VALUES = _TURNED[0] > _TURNED[1]
"""Whether the two kept values then change places too, to keep the indices in order."""


def arrange(packed: PackedWeight, xp: Any = np, lay: Layout | None = None) -> Any:
    """Packed weights in the order in which lanes load them: uint8 [blocks, row tiles, block_bytes].

    A k-block of a row tile of 16 rows is contiguous, neighbouring row tiles side by side. In each, for every instruction, 32
    lanes x 16 bytes (register r holds row g + 8 (r & 1), the half r >> 1 of the instruction's k; lane = 4 g + q); then the
    index words, 32 lanes x 4 bytes each.
    Rows and columns beyond the matrix hold zeros with the nibble (0, 1); row tiles go up to a multiple of `ROW_TILES`.

    Args:
        xp: numpy or cupy, whichever made packed.values.
        lay: another layout than that of its pattern; scales are not in the result.
    """
    lay = lay or layout(packed.pattern, packed.dtype.bits)
    n, tiles, blocks, have = packed.n, row_tiles(packed.n), lay.blocks(packed.k), packed.ks // 4
    values = xp.zeros((16 * tiles, blocks * lay.windows, 2), packed.dtype.raw)
    nibble = xp.full((16 * tiles, blocks * lay.windows), 4, np.uint8)
    values[:n, :have] = packed.values.view(packed.dtype.raw).reshape(n, have, 2)
    nibble[:n, :have] = xp.stack([packed.meta & 15, packed.meta >> 4], axis=2).reshape(n, have)

    order, swapped = (xp.asarray(a) for a in window_order(lay))
    values = values.reshape(16 * tiles, blocks, lay.windows, 2)[:, :, order]  # [rows, blocks, steps, places, 2]
    nibble = nibble.reshape(16 * tiles, blocks, lay.windows)[:, :, order]
    flip = (swapped & xp.asarray(SWAPPED_VALUES)[nibble])[..., None]
    values = xp.where(flip, values[..., ::-1], values)
    nibble = xp.where(swapped, xp.asarray(SWAPPED_NIBBLE)[nibble], nibble)

    # row = 8 h + g; value of an instruction: half of k, lane q, byte or half-word; register = 2 * half + h
    fragments = values.reshape(tiles, 2, 8, blocks, lay.steps, 2, 4, 32 // lay.bits).transpose(3, 0, 4, 2, 6, 5, 1, 7)
    fragments = xp.ascontiguousarray(fragments).view(np.uint8).reshape(blocks, tiles, 512 * lay.steps)
    return xp.concatenate([fragments, _meta_words(nibble, lay, xp)], axis=2)


def _meta_words(nibble: Any, lay: Layout, xp: Any) -> Any:
    """Nibbles [rows, blocks, steps, places] -> uint8 [blocks, row tiles, meta_words * 128]."""
    rows, blocks = nibble.shape[:2]
    if lay.bits == 8:  # lane q: row half q & 1, half q >> 1 of the places
        split = nibble.reshape(rows // 16, 2, 8, blocks, lay.steps, 2, 8).transpose(3, 0, 4, 2, 5, 1, 6)
    else:  # lane q: instruction q >> 1 of two, half q & 1 of the places; row g in the low half-word, g + 8 in the high one
        even = xp.zeros((rows, blocks, 2 * lay.meta_words, 8), np.uint8)
        even[:, :, : lay.steps] = nibble
        split = even.reshape(rows // 16, 2, 8, blocks, lay.meta_words, 2, 2, 4).transpose(3, 0, 4, 2, 5, 6, 1, 7)
    split = xp.ascontiguousarray(split).reshape(blocks, rows // 16, 128 * lay.meta_words, 2)
    return split[..., 0] | split[..., 1] << 4
