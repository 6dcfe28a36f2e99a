"""The kernel that unpacks weights, and what it reports: `reference`'s decompress and unslide in one pass."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.dtypes import DType
from ...core.scheme import Scheme
from ..jit.numba import Kernel, cuda, device_function
from .numbers import INFINITY
from .pack import MOST_THREADS
from .pack_stages import Int
from .ptx import Word, as_word, atomic_min

BAD_INDEX, BAD_SCALE, TWICE = range(3)
"""Words of a report on unpacking: lowest row with an index nibble out of order; with a scale that is negative or not finite;
with a column that two windows store. `NOTHING`: none."""


def _decompressor(stored: DType) -> Any:
    """decompress(values, meta, window, a, b) -> the window's four columns, if its first two hold a and b, and its faults.

    Faults are bits: 1 << BAD_INDEX, 1 << TWICE.
    """
    mask = np.uint32(stored.nonzero_mask)

    @device_function(("u32",) * 5, f"u{stored.bits}*", "u8*", "i64", "u32", "u32")
    def decompress(values: Any, meta: Any, window: int, a: Word, b: Word) -> tuple[Word, ...]:
        c = d = faults = np.uint32(0)
        nibble = np.uint32(meta[window >> 1]) >> np.uint32(4 * (window & 1)) & np.uint32(15)
        if nibble & np.uint32(3) >= nibble >> np.uint32(2):
            faults = np.uint32(1 << BAD_INDEX)
        for slot in range(2):
            element = np.uint32(values[2 * window + slot])
            place = nibble >> np.uint32(2 * slot) & np.uint32(3)
            if element & mask == np.uint32(0):
                continue
            if (a if place == np.uint32(0) else b) != np.uint32(0) and place < np.uint32(2):
                faults |= np.uint32(1 << TWICE)
            a = element if place == np.uint32(0) else a
            b = element if place == np.uint32(1) else b
            c = element if place == np.uint32(2) else c
            d = element if place == np.uint32(3) else d
        return a, b, c, d, faults

    return decompress


@functools.cache
def unpack_kernel(stored: DType, windows: int) -> Kernel:
    """Every stored value back to its column: one block a row, one thread a slice unit at a time."""
    group, groups = 2 * windows + 2, 1 + windows % 2
    decompress, scaled = _decompressor(stored), Scheme.of(stored).scaled

    def kernel(
        values: Any,  # [n, ks/2]
        meta: Any,  # [n, ks/8]
        scale: Any,  # [n], read if the type has scales
        out: Any,  # [n, k]
        report: Any,
        k: int,
        units: int,
    ) -> None:
        row, thread, threads = Int(cuda.blockIdx.x), Int(cuda.threadIdx.x), Int(cuda.blockDim.x)
        faults = np.uint32(0)
        unit = thread
        while unit < units:
            for g in range(groups):
                window = ((row * units + unit) * groups + g) * windows
                column = (unit * groups + g) * group
                a = b = c = d = found = np.uint32(0)  # a, b: what the window before stored in its last two columns
                for j in range(windows + 1):
                    if j < windows:
                        a, b, c, d, found = decompress(values, meta, window + j, a, b)
                        faults |= found
                    if column < k:
                        out[row * k + column] = a
                    if column + 1 < k:
                        out[row * k + column + 1] = b
                    a, b = c, d
                    column += 2
            unit += threads
        if faults & np.uint32(1 << BAD_INDEX):
            atomic_min(report, BAD_INDEX, row)
        if faults & np.uint32(1 << TWICE):
            atomic_min(report, TWICE, row)
        if scaled and thread == 0 and (as_word(scale[row]) & np.uint32(0x7FFFFFFF) >= INFINITY or scale[row] < np.float32(0)):
            atomic_min(report, BAD_SCALE, row)

    pointer = f"u{stored.bits}*"
    return Kernel(
        f"unpack_{stored}_{windows}", kernel, pointer, "u8*", "f32*", pointer, "u64*", "i64", "i64", max_threads=MOST_THREADS
    )
