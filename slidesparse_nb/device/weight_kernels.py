"""The kernels that pack and unpack weights: one thread a group, an element or a slice unit, and what they report.

Weights are packed once, so these are plain; each is the twin of the function of `reference` that it is named after.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..dtypes import PACKED, DType
from .elements import INFINITY, LOW
from .numba_kernel import SIMULATED, Kernel, cuda
from .ptx import as_word, atomic_add, atomic_min, to_bfloat16, to_float16

THREADS = 8 if SIMULATED else 128
NOTHING = 2**64 - 1

NOT_FINITE, OVERFLOW, STORED_NOT_FINITE, BAD_SCALE, FIRST, COUNT = range(6)
"""Words of a report: lowest row * k + column of a NaN or infinity in w; of an infinity that rounding made; of either in what
is stored; lowest row whose scale is negative or not finite; lowest row * groups + group that breaks the pattern; how many
groups do. `NOTHING`: none."""

NUMBERS = {"float32": INFINITY} | {d.name: np.uint32(d.inf_bits or 2**32 - 1) for d in PACKED}
"""Magnitude bits of each type below which everything is a number."""


def _pointer(itemsize: int) -> str:
    return f"u{8 * itemsize}*"


@functools.cache
def prune_kernel(source: str, group: int, scored: bool) -> Kernel:
    """Zero the two lowest scores of every group: one thread a group."""
    bits = {"float32": 32, "int8": 8, "float8_e4m3fn": 8}.get(source, 16)
    signed = source == "int8"
    magnitude = np.uint32(0xFF if signed else (1 << (bits - 1)) - 1)
    infinite = NUMBERS[source]
    highest = np.int64(2**63 - 1)

    def kernel(
        w: Any,  # [n, k] of strides ld, step
        score: Any,  # [n, k] float32 bits, read if `scored`
        pruned: Any,  # [n, k]
        report: Any,
        ld: int,
        step: int,
        k: int,
    ) -> None:
        row = np.int64(cuda.blockIdx.x)
        start = (np.int64(cuda.blockIdx.y) * THREADS + cuda.threadIdx.x) * group
        size = min(np.int64(group), k - start)
        # the score above, the place from the right below: unique keys, and of equal scores the rightmost is lowest
        lowest = second = highest
        for j in range(size):
            element = np.uint32(w[row * ld + (start + j) * step]) & magnitude
            if element >= infinite:
                atomic_min(report, NOT_FINITE, row * k + start + j)
            if signed and element > np.uint32(128):
                element = np.uint32(256) - element
            ranked = np.int64(element)
            if scored:
                ranked = np.int64(score[row * k + start + j]) if element != np.uint32(0) else np.int64(-1)
            key = ranked * np.int64(2**32) + (size - 1 - j)
            second = min(second, max(lowest, key))
            lowest = min(lowest, key)
        first_out = second_out = np.int64(-1)
        if size > group - 2:
            first_out = size - 1 - (lowest & np.int64(0xFFFFFFFF))
        if size == group:
            second_out = size - 1 - (second & np.int64(0xFFFFFFFF))
        for j in range(size):
            out = j in (first_out, second_out)
            pruned[row * k + start + j] = np.uint32(0) if out else np.uint32(w[row * ld + (start + j) * step])

    name = f"prune_{source}_{group}{'_scored' if scored else ''}"
    pointer = _pointer(bits // 8)
    return Kernel(name, kernel, pointer, "u32*", pointer, "u64*", "i64", "i64", "i64", max_threads=THREADS)


@functools.cache
def round_kernel(source: str, stored: str) -> Kernel:
    """Round every element to a 16-bit type: one thread an element."""
    low, infinite = LOW[source], NUMBERS[source]
    magnitude = np.uint32(0x7FFFFFFF if source == "float32" else 0x7FFF)
    rounded = to_bfloat16 if stored == "bfloat16" else to_float16
    overflowed = NUMBERS[stored]

    def kernel(
        w: Any,  # [n, k] of strides ld, step
        q: Any,  # [n, k]
        report: Any,
        ld: int,
        step: int,
        k: int,
    ) -> None:
        row = np.int64(cuda.blockIdx.x)
        column = np.int64(cuda.blockIdx.y) * THREADS + cuda.threadIdx.x
        if column < k:
            element = np.uint32(w[row * ld + column * step])
            bits = np.uint32(rounded(low(element)))
            if element & magnitude >= infinite:
                atomic_min(report, NOT_FINITE, row * k + column)
            elif bits & np.uint32(0x7FFF) >= overflowed:
                atomic_min(report, OVERFLOW, row * k + column)
            q[row * k + column] = bits

    source_pointer = "u32*" if source == "float32" else "u16*"
    return Kernel(f"round_{source}_{stored}", kernel, source_pointer, "u16*", "u64*", "i64", "i64", "i64", max_threads=THREADS)


@functools.cache
def slide_compress_kernel(stored: DType, windows: int) -> Kernel:
    """Slide and compress: one thread a slice unit, that is one or two groups, a whole number of index bytes."""
    group, groups = 2 * windows + 2, 1 + windows % 2
    mask = np.uint32(stored.nonzero_mask)
    infinite = NUMBERS[stored.name]
    per_unit = groups * windows

    def kernel(
        q: Any,  # [n, k] stored bits, of strides ld, step
        values: Any,  # [n, ks/2]
        meta: Any,  # [n, ks/8]
        report: Any,
        ld: int,
        step: int,
        k: int,
        units: int,
    ) -> None:
        row = np.int64(cuda.blockIdx.x)
        unit = np.int64(cuda.blockIdx.y) * THREADS + cuda.threadIdx.x
        if unit < units:
            at = (row * units + unit) * per_unit  # this thread's next window, of all
            byte = np.uint32(0)
            for g in range(groups):
                start = (unit * groups + g) * group
                held = cuda.local.array(4, np.uint32)  # the columns of a window, those taken already as zeros
                for i in range(4):
                    held[i] = np.uint32(0)
                for j in range(windows + 1):
                    # two columns enter; a window takes its first two non-zeros; its last two columns go on to the next
                    for i in range(2):
                        held[i] = held[2 + i]
                        held[2 + i] = np.uint32(0)
                        column = start + 2 * j + i
                        if column < k:
                            element = np.uint32(q[row * ld + column * step])
                            if element & mask >= infinite:
                                atomic_min(report, STORED_NOT_FINITE, row * k + column)
                            held[2 + i] = element if element & mask != np.uint32(0) else np.uint32(0)
                    if j > 0:
                        i0 = i1 = np.uint32(4)
                        for i in range(4):
                            if held[i] != np.uint32(0):
                                if i0 == np.uint32(4):
                                    i0 = np.uint32(i)
                                elif i1 == np.uint32(4):
                                    i1 = np.uint32(i)
                        if i1 == np.uint32(4):  # fewer than two: positions (0, p), and (0, 1) for p = 0 or none
                            i1 = i0 if np.uint32(0) < i0 < np.uint32(4) else np.uint32(1)
                            i0 = np.uint32(0)
                        values[2 * at] = held[i0]
                        values[2 * at + 1] = held[i1]
                        held[i0] = held[i1] = np.uint32(0)
                        byte |= (i0 | i1 << np.uint32(2)) << np.uint32(4 * (at & 1))
                        if at & 1:
                            meta[at >> 1] = byte
                            byte = np.uint32(0)
                        at += 1
                if held[2] | held[3] != np.uint32(0):
                    atomic_min(report, FIRST, row * (units * groups) + unit * groups + g)
                    atomic_add(report, COUNT, 1)

    pointer = _pointer(stored.bits // 8)
    name = f"slide_compress_{stored}_{windows}"
    return Kernel(name, kernel, pointer, pointer, "u8*", "u64*", "i64", "i64", "i64", "i64", max_threads=THREADS)


@functools.cache
def check_scales_kernel() -> Kernel:
    """Report scales that are negative or not finite: one thread a row."""

    def kernel(
        scale: Any,  # [n]
        report: Any,
        n: int,
    ) -> None:
        row = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if row < n and (as_word(scale[row]) & np.uint32(0x7FFFFFFF) >= INFINITY or scale[row] < np.float32(0)):
            atomic_min(report, BAD_SCALE, row)

    return Kernel("check_scales", kernel, "f32*", "u64*", "i64", max_threads=THREADS)


@functools.cache
def unpack_kernel(bits: int, mask: int, windows: int) -> Kernel:
    """Every stored value back to its column: one thread a slice unit."""
    group, groups = 2 * windows + 2, 1 + windows % 2
    per_unit = groups * windows

    def kernel(
        values: Any,  # [n, ks/2]
        meta: Any,  # [n, ks/8]
        out: Any,  # [n, k]
        k: int,
        units: int,
    ) -> None:
        row = np.int64(cuda.blockIdx.x)
        unit = np.int64(cuda.blockIdx.y) * THREADS + cuda.threadIdx.x
        if unit < units:
            first, last = unit * groups * group, min(k, (unit + 1) * groups * group)
            for column in range(first, last):
                out[row * k + column] = 0
            for window in range(per_unit):
                at = (row * units + unit) * per_unit + window
                nibble = np.uint32(meta[at >> 1]) >> np.uint32(4 * (at & 1))
                for slot in range(2):
                    element = np.uint32(values[2 * at + slot])
                    column = first + window // windows * group + 2 * (window % windows)
                    column += np.int64(nibble >> np.uint32(2 * slot) & np.uint32(3))
                    if element & np.uint32(mask) != np.uint32(0) and column < k:
                        out[row * k + column] = element

    pointer = f"u{bits}*"
    return Kernel(f"unpack_{bits}_{mask:x}_{windows}", kernel, pointer, "u8*", pointer, "i64", "i64", max_threads=THREADS)
