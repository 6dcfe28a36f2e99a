"""The kernels of cuda/quantize.py: a thread block, or a cluster of them, takes one token, quantizes or rounds it, lifts it, and
writes rows or tiles.

    x --------------------------------------------------------------------------------------\
    x, residual --> sum --> mean square --> times 1 / root, rounded; times gamma, rounded ---+--> quantized, lifted, stored
    gate, up    --> SiLU or GELU, rounded; times up, rounded -------------------------------/

`row_in_registers` holds a token in registers between its two looks at it, so that each byte of x is read once:

    16-byte loads --> largest magnitude (warp, then block) --> scale, inverse --> multiply, round, pack --> rows
                                                             lifted: --> shared memory --> gather --> 16-byte stores

`row_from_memory` reads x element by element, twice, the second time from cache: for rows that are not 16-byte aligned, whose
elements are not neighbours, or that are too long for registers. `row_in_blocks`, of pairs, is in quantize_blocks.py.
All give the bits of the reference: products and sums are rounded one by one, never fused; divisions and roots are correctly
rounded.

The stages are in quantize_stages.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.scheme import Scheme
from ..jit.numba import SIMULATED, Kernel, cuda, device_function
from .numbers import HIGH, LOW, ROUND_TWO, gate_two, gelu, row_scale, silu
from .ptx import Float, Word, add, as_float, cluster_max, divide, larger, multiply, square_root, store4
from .quantize_blocks import row_in_blocks
from .quantize_stages import ZERO, Variant, converter, lifter, loader, placer, starter, storer, word_maker
from .reductions import NOTHING, block_max, block_sum

WORD = np.dtype(np.uint32)
ALIGNMENT = None if SIMULATED else 16
ALL, ONE = np.uint32(0xFFFFFFFF), np.float32(1)

GATES = {"silu_and_mul": silu, "gelu_and_mul": gelu}
KINDS = "rms_norm", "add_rms_norm", *GATES
"""What a kernel may do to a row before it quantizes it."""

FROM_MEMORY = 256
"""Threads of a block that reads its row twice, at most."""


def _scaler(variant: Variant) -> Any:
    """The inverse of a row's scale, which is written, from the largest magnitude that each thread has seen."""
    low: Any = LOW.get(variant.source)
    t, shares = np.float32(Scheme.of(variant.stored).weights.limit), variant.spread > 1
    largest_of_blocks: Any = cluster_max(variant.spread) if shares else None

    @device_function("f32", "u32", "f32*", "i64", "i64", "u32")
    def scale_row(peak: Word, scale: Any, row: int, m: int, thread: Word) -> Float:
        peak = block_max(peak)
        if shares:
            peak = largest_of_blocks(peak)
        row_scaled, inverse = row_scale(low(peak), t)
        if thread == ZERO and row < m:
            scale[row] = row_scaled
        return inverse

    return scale_row


@functools.cache
def kernel(variant: Variant, kind: str = "", threads: int = 1024) -> Kernel:
    """The kernel of a variant, compiled where it is first launched.

    Args:
        kind: what of KINDS it does to a 16-bit x first.
        threads: most of a block of a norm, which holds more in registers.
    """
    pdl, name, on_rows = variant.programmatic, variant.name, ("u32*", "u32*", "f32*", *["i64"] * 10)
    if kind in GATES:
        made = row_in_registers(variant, GATES[kind])
        return Kernel(f"{kind}_{name}", made, *on_rows, cluster=variant.spread, programmatic=pdl)
    if kind:
        made, arrays = rms_norm(variant, kind == "add_rms_norm"), (*["u32*"] * 5, "f32*")
        return Kernel(f"{kind}{threads}_{name}", made, *arrays, *["i64"] * 10, max_threads=threads, programmatic=pdl)
    if variant.vectors and variant.block is None:
        registers = 40 if variant.windows and variant.vectors <= 4 else 0  # 12 blocks of 128 threads an SM, not 10
        made = row_in_registers(variant)
        return Kernel(name, made, *on_rows, max_registers=registers, cluster=variant.spread, programmatic=pdl)
    x = "u32*" if variant.vectors else f"u{8 * variant.source_bytes}*"
    made, out = (row_from_memory(variant), "u32*") if variant.block is None else (row_in_blocks(variant, variant.block), "u8*")
    return Kernel(name, made, x, out, "f32*", *["i64"] * 6, max_threads=FROM_MEMORY, programmatic=pdl)


def row_in_registers(variant: Variant, inner: Any = None) -> Any:
    """A block, or a cluster of blocks, holds a row in registers. Of its block's part, thread t holds the 16-byte vectors t,
    t + threads, t + 2 threads ...

    Args:
        inner: what the gate is taken of; x is then the gate of the first half of its row, times the second half.
    """
    (load, _), finish, begin = loader(variant), finisher(variant), starter(variant)
    words, gates, spread = 4 * variant.vectors, inner is not None, variant.spread
    low, high, two = _halves(variant)
    gated: Any = gate_two(variant.source, inner) if gates else None

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes; with a gate `filled` of it, and `filled` that it multiplies
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
        part: int,  # with a cluster: vectors of x that a block takes; the last block takes the rest
        part_chunks: int,  # with a cluster: chunks that a block makes of them
    ) -> None:
        begin()
        held = cuda.local.array(words, np.uint32)
        row: Any = np.int64(cuda.blockIdx.x)
        thread, threads = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        here, end, count, before, origin = filled, total, chunks, 0, 0  # of this block; vectors and chunks of those before
        if spread > 1:
            rank = row % spread
            row, before, origin = row // spread, rank * part, rank * part_chunks
            here, end, count = filled - before, total - before, chunks - origin
            if rank < spread - 1:
                here, end, count = part, part, part_chunks
        last, start = np.uint32(here - 1), min(row, m - 1) * ld + before  # tiles have rows past m: zeros
        load(x, start, last, thread, threads, held)
        if gates:
            up = cuda.local.array(words, np.uint32)
            load(x, start + filled, last, thread, threads, up)
            for w in range(words):
                act = gated(held[w])
                held[w] = two(multiply(low(act), low(up[w])), multiply(high(act), high(up[w])))
        ends, makes, by = np.uint32(end), np.uint32(count), np.uint32(step)
        finish(held, out, scale, row, m, thread, threads, last, ends, pitch, makes, by, np.uint64(advance), np.uint32(origin))

    return kernel


def finisher(variant: Variant) -> Any:
    """From a row of x's type in registers to what is written: its scale, and its values, lifted if they are."""
    (_, largest), convert, scale_row = loader(variant), converter(variant), _scaler(variant)
    store, lift = storer(variant), lifter(variant)
    vectors, words, quantizes, lifted = variant.vectors, variant.words, variant.quantizes, variant.windows > 0
    integers = ("i64", "i64", "u32", "u32", "u32", "u32", "i64", "u32", "u32", "u64", "u32")

    @device_function("void", "u32[]", "u32*", "f32*", *integers)
    def finish(
        held: Any, out: Any, scale: Any, row: int, m: int, thread: Word, threads: Word, last: Word, total: Word, pitch: int,
        chunks: Word, step: Word, advance: int, origin: Word,
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
            lift(line, out, row, pitch, thread, chunks, step, advance, origin)

    return finish


def _halves(variant: Variant) -> tuple[Any, Any, Any]:
    """Device functions: the float in each half of a word, and from two 16-bit floats to a word."""
    return LOW.get(variant.source), HIGH.get(variant.source), ROUND_TWO.get(variant.source)


def rms_norm(variant: Variant, adds: bool) -> Any:
    """RMSNorm of x, or of x + residual."""
    (load, _), finish, begin = loader(variant), finisher(variant), starter(variant)
    low, high, two = _halves(variant)
    vectors, words, numbers = variant.vectors, 4 * variant.vectors, 8 * variant.vectors

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes
        residual: Any,  # [m, filled] vectors, and so is kept, which gets the sum
        gamma: Any,  # [filled] vectors
        kept: Any,
        out: Any,  # this and all else as of `row_in_registers`
        scale: Any,
        epsilon: int,  # bits of a float32, as is the number of columns
        columns: int,
        m: Any,
        ld: int,
        filled: int,
        total: int,
        pitch: int,
        chunks: int,
        step: int,
        advance: int,
    ) -> None:
        begin()
        held = cuda.local.array(words, np.uint32)
        more = cuda.local.array(words, np.uint32)
        factor = cuda.local.array(words, np.uint32)
        s = cuda.local.array(numbers, np.float32)
        row, thread, threads = np.int64(cuda.blockIdx.x), np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        last, read = np.uint32(filled - 1), min(row, m - 1)
        load(x, read * ld, last, thread, threads, held)
        if adds:
            load(residual, read * filled, last, thread, threads, more)
        load(gamma, np.int64(0), last, thread, threads, factor)
        squares = NOTHING
        for v in range(vectors):
            at = np.uint32(thread + np.uint32(v) * threads)
            for w in range(4 * v, 4 * v + 4):
                a, b = low(held[w]), high(held[w])
                if adds:
                    a, b = add(a, low(more[w])), add(b, high(more[w]))
                    more[w] = two(a, b)
                s[2 * w], s[2 * w + 1] = a, b
                if at <= last:
                    squares = add(add(squares, multiply(a, a)), multiply(b, b))
            if adds and at <= last and row < m:
                w = 4 * v
                store4(kept, row * filled + np.int64(at), more[w], more[w + 1], more[w + 2], more[w + 3])
        mean = divide(block_sum(squares), as_float(np.uint32(columns)))
        inverse = divide(ONE, square_root(add(mean, as_float(np.uint32(epsilon)))))
        for w in range(words):
            normed = two(multiply(s[2 * w], inverse), multiply(s[2 * w + 1], inverse))
            held[w] = two(multiply(low(normed), low(factor[w])), multiply(high(normed), high(factor[w])))
        end, count, by = np.uint32(total), np.uint32(chunks), np.uint32(step)
        finish(held, out, scale, row, m, thread, threads, last, end, pitch, count, by, np.uint64(advance), ZERO)

    return kernel


def row_from_memory(variant: Variant) -> Any:
    """A block reads its row twice, element by element; thread t writes the words t, t + threads ..."""
    make_word, scale_row, place, begin = word_maker(variant), _scaler(variant), placer(variant), starter(variant)
    magnitude = np.uint32(0x7FFFFFFF if variant.source == "float32" else 0x7FFF)
    quantizes, per_word = variant.quantizes, 4 // variant.stored_bytes
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
        begin()
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
