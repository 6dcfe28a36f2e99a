"""The kernel that unpacks weights, and what it reports: `reference`'s decompress and unslide in one pass."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.dtypes import DType
from ...core.scheme import Scheme
from ..jit.numba import Kernel, cuda
from .numbers import INFINITY
from .pack import MOST_THREADS, Int
from .ptx import as_word, atomic_min

BAD_INDEX, BAD_SCALE, TWICE = range(3)
"""Words of a report on unpacking: lowest row with an index nibble out of order; with a scale that is negative or not finite;
with a column that two windows store. `NOTHING`: none."""


@functools.cache
def unpack_kernel(stored: DType, windows: int) -> Kernel:
    """Every stored value back to its column: one block a row, one thread a slice unit at a time."""
    group, groups = 2 * windows + 2, 1 + windows % 2
    per_unit = groups * windows
    mask, scaled = np.uint32(stored.nonzero_mask), Scheme.of(stored).scaled

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
        bad_index = twice = False
        for unit in range(thread, units, threads):
            for g in range(groups):
                column = (unit * groups + g) * group
                c = d = np.uint32(0)  # what the window before stored in its last two columns
                for j in range(windows + 1):
                    a, b = c, d
                    c = d = np.uint32(0)
                    if j < windows:
                        at = (row * units + unit) * per_unit + g * windows + j
                        nibble = np.uint32(meta[at >> 1]) >> np.uint32(4 * (at & 1)) & np.uint32(15)
                        if nibble & np.uint32(3) >= nibble >> np.uint32(2):
                            bad_index = True
                        for slot in range(2):
                            element = np.uint32(values[2 * at + slot])
                            if element & mask != np.uint32(0):
                                place = nibble >> np.uint32(2 * slot) & np.uint32(3)
                                if place == np.uint32(0):
                                    twice = twice or a != np.uint32(0)
                                    a = element
                                elif place == np.uint32(1):
                                    twice = twice or b != np.uint32(0)
                                    b = element
                                elif place == np.uint32(2):
                                    c = element
                                else:
                                    d = element
                    if column < k:
                        out[row * k + column] = a
                    if column + 1 < k:
                        out[row * k + column + 1] = b
                    column += 2
        if bad_index:
            atomic_min(report, BAD_INDEX, row)
        if twice:
            atomic_min(report, TWICE, row)
        if scaled and thread == 0 and (as_word(scale[row]) & np.uint32(0x7FFFFFFF) >= INFINITY or scale[row] < np.float32(0)):
            atomic_min(report, BAD_SCALE, row)

    pointer = f"u{stored.bits}*"
    return Kernel(
        f"unpack_{stored}_{windows}", kernel, pointer, "u8*", "f32*", pointer, "u64*", "i64", "i64", max_threads=MOST_THREADS
    )
