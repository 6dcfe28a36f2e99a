"""The kernel that packs weights, and reports on them: `reference`'s prune, quantize, slide and compress in one pass.

    row of w --> (largest magnitude kept --> scale, inverse) --> prune --> quantize or round --> slide, compress --> row

A block takes a row, a thread one slice unit at a time: one or two groups, a whole number of index bytes. A row that is
quantized here is read twice, the second time from cache. Rows of whole aligned words are loaded by vectors, a span of groups at
a time into registers, and their values are stored through shared memory, in order. Other rows, and groups too long for
registers, are read and written element by element. The stages are in pack_stages.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.scheme import Scheme
from ..jit.numba import SIMULATED, Kernel, cuda, device_function
from .numbers import LOW, row_scale
from .pack_stages import (
    BAD_SCORE,
    COUNT,
    FIRST,
    NONE,
    NOT_FINITE,
    OVERFLOW,
    REPORT,
    Int,
    Variant,
    key_of_row,
    largest,
    loader,
    pruner,
    slider,
)
from .ptx import LANES, Word, atomic_add, atomic_min, larger, warp_max

MOST_THREADS = 8 if SIMULATED else 256
MOST_WARPS = MOST_THREADS // LANES


@device_function("u32", "u32", "i64", "i64")
def block_max(word: Word, thread: int, threads: int) -> Word:
    """The largest word of the block, to all its threads."""
    of_warps = cuda.shared.array(MOST_WARPS, np.uint32)
    word = warp_max(word)
    if thread % LANES == 0:
        of_warps[thread // LANES] = word
    cuda.syncthreads()
    for i in range(threads // LANES):
        word = larger(word, of_warps[i])
    return word


@functools.cache
def pack_kernel(variant: Variant) -> Kernel:
    """Prune, quantize or round, slide and compress: one block a row."""
    (load, _), prune, slide = loader(variant), pruner(variant), slider(variant)
    largest_in_row, largest_kept = largest(variant)
    low: Any = LOW.get(variant.source)
    windows, vector, group, groups, loaded = variant.windows, variant.vector, variant.group, variant.groups, variant.span
    held_words, unit_bytes = max(1, variant.held), groups * windows // 2
    unit_words = unit_bytes * variant.stored.bits // 8
    staged_words = MOST_THREADS * unit_words if vector else 1
    random, ranked, quantized = variant.prune == "random", variant.ranked, variant.quantized
    ones, t = variant.ones, np.float32(Scheme.of(variant.stored).weights.limit)

    def kernel(
        w: Any,  # [n, k] elements of strides ld, step; or [n, ld] vectors
        score: Any,  # [n, k] float32 bits, read if pruned by them
        scale: Any,  # [n], written if quantized
        values: Any,  # [n, ks/2], as words
        meta: Any,  # [n, ks/8]
        report: Any,
        ld: int,
        step: int,
        k: int,
        units: int,
        seed_low: int,
        seed_high: int,
    ) -> None:
        row, thread, threads = Int(cuda.blockIdx.x), Int(cuda.threadIdx.x), Int(cuda.blockDim.x)
        held, before = cuda.local.array(held_words, np.uint32), cuda.local.array(2, np.uint32)
        found, staged = cuda.local.array(REPORT, np.uint32), cuda.shared.array(staged_words, np.uint32)
        found[NOT_FINITE] = found[OVERFLOW] = found[BAD_SCORE] = found[FIRST] = NONE
        found[COUNT] = before[0] = before[1] = np.uint32(0)
        row_key = key_of_row(seed_low, seed_high, row) if random else np.uint64(0)
        inverse, live = np.float32(0), ones
        if quantized:
            peak = np.uint32(0)
            if not ranked:  # pruned by magnitude a row keeps its largest
                peak = largest_in_row(w, row * ld, step, k, thread, threads)
            unit = thread if ranked else units
            while unit < units:  # Numba's range of a step that is not constant divides
                for g in range(0, groups, loaded):
                    span = load(w, held, row * ld, unit, g, step, k)
                    for h in range(loaded):
                        dropped, second = prune(span, h * group, score, row * k, row_key, found)
                        peak = larger(peak, largest_kept(span, h * group, dropped, second))
                unit += threads
            row_scaled, inverse = row_scale(low(block_max(peak, thread, threads)), t)
            if thread == 0:
                scale[row] = row_scaled
            live = ones if inverse > np.float32(0) else np.uint32(0)  # x 0 would keep signs, and NaN
        chunk = Int(0)
        while chunk < units:
            unit = chunk + thread
            at_unit = row * units + unit
            for g in range(0, groups if unit < units else 0, loaded):
                span = load(w, held, row * ld, unit, g, step, k)
                for h in range(loaded):
                    dropped, second = prune(span, h * group, score, row * k, row_key, found)
                    out, at_out = (staged, thread) if vector else (values, at_unit)
                    to = meta, at_unit * unit_bytes, out, at_out * unit_words, before
                    slide(span, to, h, (g + h) * windows, dropped, second, inverse, live, found)
            if vector:  # a unit is a few words; together they leave in order
                cuda.syncthreads()
                i = thread
                while i < min(threads, units - chunk) * unit_words:
                    values[(row * units + chunk) * unit_words + i] = staged[i]
                    i += threads
                cuda.syncthreads()
            chunk += threads
        for word in range(FIRST):
            if found[word] != NONE:
                atomic_min(report, word, row * k + Int(found[word]))
        if found[COUNT] != np.uint32(0):
            atomic_min(report, FIRST, row * (units * groups) + Int(np.uint32(found[FIRST] // np.uint32(group))))
            atomic_add(report, COUNT, Int(found[COUNT]))

    arrays = (variant.pointer, "u32*", "f32*", "u32*", "u8*", "u64*")
    return Kernel(variant.name, kernel, *arrays, *("i64",) * 6, max_threads=MOST_THREADS)
