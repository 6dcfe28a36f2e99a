"""The kernels of cuda/quantize.py: a thread block takes one token, quantizes or rounds it, lifts it, writes rows or tiles.

    x --------------------------------------------------------------------------------------\
    x, residual --> sum --> mean square --> times 1 / root, rounded; times gamma, rounded ---+--> quantized, lifted, stored
    gate, up    --> SiLU or GELU, rounded; times up, rounded -------------------------------/

`row_in_registers` holds a token in registers between its two looks at it, so that each byte of x is read once:

    16-byte loads --> largest magnitude (warp, then block) --> scale, inverse --> multiply, round, pack --> rows
                                                             lifted: --> shared memory --> gather --> 16-byte stores

`row_from_memory` reads x element by element, twice, the second time from cache: for rows that are not 16-byte aligned, whose
elements are not neighbours, or that are too long for registers. `row_in_blocks`, of pairs, reads every row twice. `rms_norm`
and `gate_and_mul` hold a token in registers, too.
All give the bits of the reference: products and sums are rounded one by one, never fused; divisions and roots are correctly
rounded.

The stages are in quantize_stages.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.dtypes import FLOAT4
from ...core.scheme import Block, Scheme, Storage
from ..jit.numba import SIMULATED, Kernel, cuda, device_function
from .numbers import HIGH, LOW, ROUND_TWO, gate_two, gelu, row_scale, silu, to_float4
from .ptx import (
    LANES,
    Float,
    Word,
    add,
    as_float,
    as_word,
    divide,
    larger,
    launch_later_grid,
    multiply,
    square_root,
    store4,
    store4_in_bytes,
    wait_for_earlier_grids,
    warp_max,
    warp_sum,
)
from .quantize_blocks import block_scaler, quad_loader
from .quantize_stages import ZERO, Variant, converter, lifter, loader, placer, storer, word_maker

WORD = np.dtype(np.uint32)
ALIGNMENT = None if SIMULATED else 16
SLOTS = 1024 // LANES
ALL, MAGNITUDE = np.uint32(0xFFFFFFFF), np.uint32(0x7FFFFFFF)
WARP = np.uint32(32)
ONE, NOTHING = np.float32(1), np.float32(0)

GATES = {"silu_and_mul": silu, "gelu_and_mul": gelu}
KINDS = "rms_norm", "add_rms_norm", *GATES
"""What a kernel may do to a row before it quantizes it."""

FROM_MEMORY = 256
"""Threads of a block that reads its row twice, at most."""


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


if SIMULATED:

    def block_sum(part: Float) -> Float:
        """`reference.sum_of_squares`'s sum over the threads of a block, to all of them."""
        slots = cuda.shared.array(1024, np.float32)
        slots[cuda.threadIdx.x] = part
        cuda.syncthreads()
        sums = [slots[i] for i in range(cuda.blockDim.x)]
        cuda.syncthreads()
        warps = [_halved(sums[i : i + 32]) for i in range(0, len(sums), 32)]
        return _halved(warps + [NOTHING] * (32 - len(warps)))

    def _halved(sums: list[Float]) -> Float:
        while (half := len(sums) // 2) > 0:
            sums = [np.float32(a) + np.float32(b) for a, b in zip(sums[:half], sums[half:], strict=True)]
        return sums[0]
else:

    @device_function("f32", "f32")
    def block_sum(part: Float) -> Float:
        """`reference.sum_of_squares`'s sum over the threads of a block, to all of them."""
        slots = cuda.shared.array(32, np.float32)
        thread = np.uint32(cuda.threadIdx.x)
        lane, warps = np.uint32(thread % WARP), np.uint32(np.uint32(cuda.blockDim.x) // WARP)
        part = warp_sum(part)
        if lane == ZERO:
            slots[np.uint32(thread // WARP)] = part
        cuda.syncthreads()
        return warp_sum(slots[lane] if lane < warps else NOTHING)


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
def kernel(variant: Variant, kind: str = "", threads: int = 1024) -> Kernel:
    """The kernel of a variant, compiled where it is first launched.

    Args:
        kind: what of KINDS it does to a 16-bit x first.
        threads: most of a block of a norm, which holds more in registers.
    """
    dependent = variant.architecture >= 90
    if kind in GATES:
        made = gate_and_mul(variant, GATES[kind])
        return Kernel(f"{kind}_{variant.name}", made, "u32*", "u32*", "f32*", *["i64"] * 8, programmatic=dependent)
    if kind:
        parameters = (*["u32*"] * 5, "f32*", *["i64"] * 10)
        name, made = f"{kind}{threads}_{variant.name}", rms_norm(variant, kind == "add_rms_norm")
        return Kernel(name, made, *parameters, max_threads=threads, programmatic=dependent)
    if variant.block is not None:
        parameters = ("u32*" if variant.vectors else f"u{8 * variant.source_bytes}*", "u8*", "f32*", *["i64"] * 6)
        return Kernel(
            variant.name, row_in_blocks(variant, variant.block), *parameters, max_threads=FROM_MEMORY, programmatic=dependent
        )
    if variant.vectors:
        parameters = ("u32*", "u32*", "f32*", *["i64"] * 8)
        registers = 40 if variant.windows and variant.vectors <= 4 else 0  # 12 blocks of 128 threads an SM, not 10
        return Kernel(variant.name, row_in_registers(variant), *parameters, max_registers=registers, programmatic=dependent)
    parameters = (f"u{8 * variant.source_bytes}*", "u32*", "f32*", *["i64"] * 6)
    return Kernel(variant.name, row_from_memory(variant), *parameters, max_threads=FROM_MEMORY, programmatic=dependent)


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


def _halves(variant: Variant) -> tuple[Any, Any, Any]:
    """Device functions: the float in each half of a word, and from two floats to a word."""
    return LOW[variant.source], HIGH[variant.source], ROUND_TWO[variant.source]


def rms_norm(variant: Variant, adds: bool) -> Any:
    """RMSNorm of x, or of x + residual."""
    (load, _), finish = loader(variant), finisher(variant)
    low, high, two = _halves(variant)
    vectors, words, numbers = variant.vectors, 4 * variant.vectors, 8 * variant.vectors
    dependent = variant.architecture >= 90

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
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
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
        finish(
            held, out, scale, row, m, thread, threads, last, np.uint32(total), pitch, np.uint32(chunks), np.uint32(step),
            np.uint64(advance),
        )  # fmt: skip

    return kernel


def gate_and_mul(variant: Variant, inner: Any) -> Any:
    """The gate over `inner` of the first half of a row, times the second."""
    (load, _), finish = loader(variant), finisher(variant)
    low, high, two = _halves(variant)
    gated, words, dependent = gate_two(variant.source, inner), 4 * variant.vectors, variant.architecture >= 90

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes: `filled` of the gate, `filled` that it multiplies
        out: Any,  # this and all else as of `row_in_registers`
        scale: Any,
        m: Any,
        ld: int,
        filled: int,
        total: int,
        pitch: int,
        chunks: int,
        step: int,
        advance: int,
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        held = cuda.local.array(words, np.uint32)
        up = cuda.local.array(words, np.uint32)
        row, thread, threads = np.int64(cuda.blockIdx.x), np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        last, start = np.uint32(filled - 1), min(row, m - 1) * ld
        load(x, start, last, thread, threads, held)
        load(x, start + filled, last, thread, threads, up)
        for w in range(words):
            act = gated(held[w])
            held[w] = two(multiply(low(act), low(up[w])), multiply(high(act), high(up[w])))
        finish(
            held, out, scale, row, m, thread, threads, last, np.uint32(total), pitch, np.uint32(chunks), np.uint32(step),
            np.uint64(advance),
        )  # fmt: skip

    return kernel


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


def row_in_blocks(variant: Variant, block: Block) -> Any:
    """A block reads its row twice, four columns at a time; thread t writes the runs t, t + threads ... that share a scale.

    A product with the inverse may round to just above the limit, which the scale of its run and `to_float4` clip.
    """
    load, windows, dependent = quad_loader(variant), variant.windows, variant.architecture >= 90
    (block_scale, inverse_scale), limit = block_scaler(block), np.float32(Storage(FLOAT4, block=block).limit)
    lifted = block.columns
    per_block, words_of = 256 // lifted, lifted // 8  # a word is a window

    def kernel(
        x: Any,  # [m, k] elements of strides ld, stride; whole words in vectors
        out: Any,  # [m, blocks, 144] bytes: 128 of values, the scales, zeros
        scale: Any,  # [m]
        m: int,
        ld: int,
        stride: int,
        k: int,
        filled: int,  # runs of a row
        runs: int,  # and with those that fill the last block, which are zeros and have scale 0
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        row, thread, threads = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        held = cuda.local.array(lifted, np.float32)
        words = cuda.local.array(words_of, np.uint32)
        peak = ZERO
        for column in range(4 * thread, k, 4 * threads):
            for y in load(x, row * ld + column * stride, stride, k - column):
                peak = larger(peak, as_word(y) & MAGNITUDE)
        of_row, inverse = row_scale(as_float(block_max(peak)), limit)
        if thread == 0:
            scale[row] = of_row
        columns = k if inverse > NOTHING else 0
        for run in range(thread, runs, threads):
            peak = ZERO
            for i in range(0, lifted, 4):
                window = run * words_of + (i >> 3)
                group = window // windows
                column = group * (4 * windows + 4) + (window - group * windows) * 4 + (i & 4)
                a, b, c, d = NOTHING, NOTHING, NOTHING, NOTHING
                if column < columns:
                    a, b, c, d = load(x, row * ld + column * stride, stride, columns - column)
                held[i], held[i + 1] = multiply(a, inverse), multiply(b, inverse)
                held[i + 2], held[i + 3] = multiply(c, inverse), multiply(d, inverse)
            for i in range(lifted):
                peak = larger(peak, as_word(held[i]) & MAGNITUDE)
            code = block_scale(as_float(peak)) if run < filled else ZERO
            by = inverse_scale(code) if run < filled else NOTHING
            for w in range(words_of):
                word = ZERO
                for i in range(8):
                    word |= np.uint32(to_float4(multiply(held[8 * w + i], by)) << np.uint32(4 * i))
                words[w] = word
            at, place = (row * runs + run) // per_block, run % per_block
            for w in range(0, words_of, 4):
                chunk = 9 * at + (place * words_of + w) // 4
                store4_in_bytes(out, chunk, words[w], words[w + 1], words[w + 2], words[w + 3])
            out[144 * at + 128 + place] = code
            for i in range(per_block, 16, per_block):
                out[144 * at + 128 + i + place] = ZERO

    return kernel
