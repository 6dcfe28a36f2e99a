"""The kernels of cuda/quantize.py: a thread block takes one token, quantizes or rounds it, lifts it, writes rows or tiles.

`row_in_registers` holds a token in registers between its two looks at it, so that each byte of x is read once:

    16-byte loads --> largest magnitude (warp, then block) --> scale, inverse --> multiply, round, pack --> rows
                                                             lifted: --> shared memory --> gather --> 16-byte stores

`row_from_memory` reads x element by element, twice, the second time from cache: for rows that are not 16-byte aligned, whose
elements are not neighbours, or that are too long for registers. Both give the bits of `reference.quantize`: products and
sums are rounded one by one, never fused; the two divisions a token are correctly rounded.

The stages are in quantize_stages.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.scheme import Scheme
from ..jit.numba import SIMULATED, Kernel, cuda, device_function
from .numbers import LOW, row_scale
from .ptx import LANES, Float, Word, larger, launch_later_grid, wait_for_earlier_grids, warp_max
from .quantize_stages import ZERO, Variant, converter, lifter, loader, placer, storer, word_maker

WORD = np.dtype(np.uint32)
ALIGNMENT = None if SIMULATED else 16
SLOTS = 1024 // LANES
ALL = np.uint32(0xFFFFFFFF)


@device_function("u32", "u32")
def block_max(word: Word) -> Word:
    """The largest word of the block, to all its threads."""
    slots = cuda.shared.array(SLOTS, np.uint32)
    thread, lanes = np.uint32(cuda.threadIdx.x), np.uint32(LANES)
    warps = np.uint32(np.uint32(cuda.blockDim.x) // lanes)
    lane = np.uint32(thread % lanes)
    word = warp_max(word)
    if lane == ZERO:
        slots[np.uint32(thread // lanes)] = word
    cuda.syncthreads()
    word = slots[lane] if lane < warps else ZERO
    if SIMULATED:
        for i in range(warps):
            word = larger(word, slots[i])
    return warp_max(word)


def _scaler(variant: Variant) -> Any:
    """The inverse of a row's scale, which is written, from the largest magnitude that each thread has seen."""
    low: Any = LOW.get(variant.source)
    t = np.float32(Scheme.of(variant.stored).weights.limit)

    @device_function("f32", "u32", "f32*", "i64", "i64", "u32")
    def scale_row(peak: Word, scale: Any, row: int, m: int, thread: Word) -> Float:
        row_scaled, inverse = row_scale(low(block_max(peak)), t)
        if thread == ZERO and row < m:
            scale[row] = row_scaled
        return inverse

    return scale_row


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, compiled where it is first launched."""
    dependent = variant.architecture >= 90
    if variant.vectors:
        parameters = ("u32*", "u32*", "f32*", *["i64"] * 8)
        registers = 40 if variant.windows and variant.vectors <= 4 else 0  # 12 blocks of 128 threads an SM, not 10
        return Kernel(variant.name, row_in_registers(variant), *parameters, max_registers=registers, programmatic=dependent)
    parameters = (f"u{8 * variant.source_bytes}*", "u32*", "f32*", *["i64"] * 6)
    return Kernel(variant.name, row_from_memory(variant), *parameters, max_threads=256, programmatic=dependent)


def row_in_registers(variant: Variant) -> Any:
    """A block holds its row in registers: thread t the 16-byte vectors t, t + threads, t + 2 threads ..."""
    (load, _), finish = loader(variant), finisher(variant)
    held_words, dependent = 4 * variant.vectors, variant.architecture >= 90

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes
        out: Any,  # [m, pitch] units of `words` words; lifted [m, pitch] 16-byte chunks; tiles [stages, pitch]
        scale: Any,  # [m], if values are quantized
        m: Any,
        ld: int,
        filled: int,  # vectors of x that a row has
        total: int,  # vectors that are written, or, lifted, read by some window; those from `filled` on are zero
        pitch: int,
        chunks: int,  # of a lifted row
        step: int,  # chunks that the block makes at a time
        advance: int,  # words of a row from the first of one chunk to the first of the chunk `step` later, if steady
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        held = cuda.local.array(held_words, np.uint32)
        row, thread, threads = np.int64(cuda.blockIdx.x), np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        last = np.uint32(filled - 1)
        load(x, min(row, m - 1) * ld, last, thread, threads, held)  # tiles have rows past m: zeros
        finish(
            held, out, scale, row, m, thread, threads, last, np.uint32(total), pitch, np.uint32(chunks), np.uint32(step),
            np.uint64(advance),
        )  # fmt: skip

    return kernel


def finisher(variant: Variant) -> Any:
    """From a row of x's type in registers to what is written: its scale, and its values, lifted if they are."""
    (_, largest), convert, scale_row = loader(variant), converter(variant), _scaler(variant)
    store, lift = storer(variant), lifter(variant)
    vectors, words, quantizes, lifted = variant.vectors, variant.words, variant.quantizes, variant.windows > 0
    integers = ("i64", "i64", "u32", "u32", "u32", "u32", "i64", "u32", "u32", "u64")

    @device_function("void", "u32[]", "u32*", "f32*", *integers)
    def finish(
        held: Any, out: Any, scale: Any, row: int, m: int, thread: Word, threads: Word, last: Word, total: Word, pitch: int,
        chunks: Word, step: Word, advance: int,
    ) -> None:  # fmt: skip
        live, inverse = ALL if row < m else ZERO, np.float32(1)
        if quantizes:
            inverse = scale_row(largest(held), scale, row, m, thread)
            live = live if inverse > np.float32(0) else ZERO  # x 0 would keep signs, and NaN
        if lifted:
            line = cuda.shared.array(0, WORD, alignment=ALIGNMENT)
        for v in range(vectors):
            at = np.uint32(thread + np.uint32(v) * threads)
            if at < total:
                keep = live if at <= last else ZERO
                a, b, c, d = convert(held[4 * v], held[4 * v + 1], held[4 * v + 2], held[4 * v + 3], inverse)
                a, b, c, d = a & keep, b & keep, c & keep, d & keep
                if lifted:
                    store(line, np.uint64(at) * np.uint64(words), a, b, c, d)
                else:
                    store(out, row * pitch + np.int64(at), a, b, c, d)
        if lifted:
            cuda.syncthreads()
            lift(line, out, row, pitch, thread, chunks, step, advance)

    return finish


def row_from_memory(variant: Variant) -> Any:
    """A block reads its row twice, element by element; thread t writes the words t, t + threads ..."""
    make_word, scale_row, place = word_maker(variant), _scaler(variant), placer(variant)
    magnitude = np.uint32(0x7FFFFFFF if variant.source == "float32" else 0x7FFF)
    quantizes, per_word, dependent = variant.quantizes, 4 // variant.stored_bytes, variant.architecture >= 90
    windows, group, lifted = variant.windows, 2 * variant.windows + 2, variant.windows > 0

    def kernel(
        x: Any,  # [m, k] elements of strides ld, stride
        out: Any,  # [m, pitch] 16-byte chunks, or tiles [stages, pitch]
        scale: Any,  # [m], if values are quantized
        m: int,
        ld: int,
        stride: int,
        k: int,
        pitch: int,
        words: int,  # that are written of a row
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        row, thread, threads = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        columns = k if row < m else 0  # tiles have rows past m: zeros
        inverse = np.float32(1)
        if quantizes:
            peak = ZERO
            for column in range(thread, columns, threads):  # a range is unrolled: several loads in flight
                peak = larger(peak, x[row * ld + column * stride] & magnitude)
            inverse = scale_row(peak, scale, row, m, np.uint32(thread))
            columns = columns if inverse > np.float32(0) else 0
        for word in range(thread, words, threads):
            column = word * per_word
            if lifted:  # past the last group there are no columns: zeros
                window, inside = column // 4, column % 4
                column = window // windows * group + window % windows * 2 + inside
            at = 4 * place(np.uint32(word >> 2), row, pitch) + (word & 3)
            out[at] = make_word(x, row * ld + column * stride, stride, columns - column, inverse)

    return kernel
