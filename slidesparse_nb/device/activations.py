"""Per-token quantization of activations on the GPU, lifted in the same pass where a kernel wants that. Twin of `reference`.

    x [m, k] --> values [m, pitch], scale [m, 1]                one thread block a token

`quantize_rows` holds a token in registers between its two looks at it, so that each byte of x is read once:

    16-byte loads --> largest magnitude (warp, then block) --> scale, inverse --> multiply, round, pack --> store
                                                               lifted: --> shared memory --> gather windows --> store

`quantize_any` reads x element by element, twice, the second time from cache: for rows that are not 16-byte aligned, whose
elements are not neighbours, or that are too long for registers. Both give the bits of `reference.quantize`: products and
sums are rounded one by one, never fused; the two divisions a token are correctly rounded.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, INT8, DType
from ..errors import OperandError
from ..pattern import Pattern
from .elements import HIGH, LOW, row_scale, to_float8x4_early, to_int8x4
from .numba_kernel import SIMULATED, Kernel, arrays, cuda, device_function
from .ptx import (
    LANES,
    Float,
    Word,
    larger,
    launch_later_grid,
    load4,
    low_halves,
    multiply,
    store2,
    store4,
    to_float8x4,
    wait_for_earlier_grids,
    warp_max,
)

SOURCES = {BFLOAT16.numpy: "bfloat16", FLOAT16.numpy: "float16", FLOAT32: "float32"}
"""Types of x that can be quantized."""

PITCH = 16
"""Bytes that a row of values is padded to by default, with zeros."""

WORD, HALF = np.dtype(np.uint32), np.dtype(np.uint16)
SLOTS = 1024 // LANES
VECTORS = {1: 32, 2: 128, 4: 4096, 8: 8192}
"""16-byte vectors that a thread holds, for rows of up to so many. Four keep enough loads in flight; more threads with fewer
vectors each wait longer at the barrier (H200, k = 3584: 1.02, 0.93, 0.78 of a copy's bandwidth with 4, 2, 1)."""


@device_function("u32", "u32")
def block_max(word: Word) -> Word:
    """The largest word of the block, to all its threads."""
    slots = cuda.shared.array(SLOTS, np.uint32)
    thread, warps = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x // LANES)
    word = warp_max(word)
    if thread % LANES == 0:
        slots[thread // LANES] = word
    cuda.syncthreads()
    word = slots[thread % LANES] if thread % LANES < warps else np.uint32(0)
    if SIMULATED:
        for i in range(warps):
            word = larger(word, slots[i])
    return warp_max(word)


# ---- kernels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        source: "bfloat16", "float16" or "float32".
        stored: "int8" or "float8_e4m3fn".
        vectors: 16-byte loads a thread makes, of rows of up to 1024 times as many; 0: element by element, any row.
        windows: of the pattern, if values are lifted; else 0.
        native: the architecture converts to float8 itself (sm_89 and later).
        dependent: it is launched before the grid before it is complete, and waits for that (sm_90 and later).
    """

    source: str
    stored: str
    vectors: int
    windows: int
    native: bool
    dependent: bool = False

    @property
    def name(self) -> str:
        parts = ["quantize", f"rows{self.vectors}" if self.vectors else "any", self.source, self.stored]
        parts += [f"lift{self.windows}"] * (self.windows > 0) + ["early"] * (not self.native) + ["dependent"] * self.dependent
        return "_".join(parts)

    @property
    def columns(self) -> int:
        """Elements of x in 16 bytes."""
        return 4 if self.source == "float32" else 8


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, compiled where it is first launched."""
    integers = ("i64",) * 5
    if variant.vectors:
        parameters, function, threads = ("u32*", "u32*", "f32*", *integers), quantize_rows(variant), 1024
    else:
        element = "u32*" if variant.source == "float32" else "u16*"
        parameters, function, threads = (element, "u32*", "f32*", *integers), quantize_any(variant), 256
    return Kernel(variant.name, function, *parameters, max_threads=threads, programmatic=variant.dependent)


def _conversions(variant: Variant) -> tuple[Any, Any, Any, Any]:
    """t, and the functions from a word to its elements and from four floats to a word of stored values."""
    if variant.stored == "int8":
        return np.float32(INT8.qmax), LOW[variant.source], HIGH[variant.source], to_int8x4
    return (
        np.float32(FLOAT8.qmax),
        LOW[variant.source],
        HIGH[variant.source],
        to_float8x4 if variant.native else to_float8x4_early,
    )


def quantize_rows(variant: Variant) -> Any:
    """A block holds its row in registers: thread t the 16-byte vectors t, t + threads, t + 2 threads ..."""
    t, low, high, to_stored = _conversions(variant)
    dependent = variant.dependent
    vectors, windows = variant.vectors, variant.windows
    words, group = 4 * variant.vectors, variant.windows + 1  # of a group, how many pairs of columns
    wide, lifted = variant.source == "float32", variant.windows > 0
    magnitude = np.uint32(0x7FFFFFFF if wide else 0x7FFF)
    high_magnitude = np.uint32(0 if wide else 0x7FFF0000)
    second_half = low if wide else high

    @device_function("u32", "u32", "u32", "u32", "u32", "f32")
    def scaled(a: Word, b: Word, c: Word, d: Word, inverse: Float) -> Word:
        """Four stored values, of whole words, or of the low and high halves of two words given twice."""
        return to_stored(
            multiply(low(a), inverse),
            multiply(second_half(b), inverse),
            multiply(low(c), inverse),
            multiply(second_half(d), inverse),
        )

    def kernel(
        x: Any,  # [m, ld] vectors of 16 bytes
        values: Any,  # [m, pitch] units: one word (float32 x), two (16-bit x) or four (lifted)
        scale: Any,  # [m]
        ld: int,
        filled: int,  # vectors of x that a row has
        total: int,  # vectors that are written, or, lifted, read by some window; those from `filled` on are zero
        pitch: int,
        slid: int,  # windows of a lifted row
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        held = cuda.local.array(words, np.uint32)
        row, thread, threads = np.int64(cuda.blockIdx.x), np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        x_row, out_row, last = row * ld, row * pitch, np.uint32(filled - 1)
        peak = high_peak = np.uint32(0)
        for v in range(vectors):  # past the end, the last vector again: no branch, and the same largest magnitude
            at = np.uint32(thread + np.uint32(v) * threads)
            a, b, c, d = load4(x, x_row + np.int64(min(at, last)))
            held[4 * v], held[4 * v + 1], held[4 * v + 2], held[4 * v + 3] = a, b, c, d
        for w in range(words):
            peak = larger(peak, held[w] & magnitude)
            high_peak = larger(high_peak, held[w] & high_magnitude)
        peak = block_max(larger(peak, high_peak >> np.uint32(16)))
        row_scaled, inverse = row_scale(low(peak), t)
        if thread == 0:
            scale[row] = row_scaled
        live = np.uint32(0xFFFFFFFF) if inverse > np.float32(0) else np.uint32(0)  # x 0 would keep signs, and NaN
        if lifted:
            row_words = cuda.shared.array(0, WORD)
            row_halves = cuda.shared.array(0, HALF)  # the same memory
        for v in range(vectors):
            at = np.uint32(thread + np.uint32(v) * threads)
            if at < np.uint32(total):
                keep = live if at <= last else np.uint32(0)
                a, b, c, d = held[4 * v] & keep, held[4 * v + 1] & keep, held[4 * v + 2] & keep, held[4 * v + 3] & keep
                if wide:
                    first = scaled(a, b, c, d, inverse)
                    if lifted:
                        row_words[at] = first
                    else:
                        values[out_row + np.int64(at)] = first
                else:
                    first, second = scaled(a, a, b, b, inverse), scaled(c, c, d, d, inverse)
                    if lifted:
                        row_words[np.uint32(2) * at], row_words[np.uint32(2) * at + np.uint32(1)] = first, second
                    else:
                        store2(values, out_row + np.int64(at), first, second)
        if lifted:
            cuda.syncthreads()
            for unit in range(thread, np.uint32(pitch), threads):
                out = cuda.local.array(4, np.uint32)
                for i in range(4):
                    window = np.uint32(np.uint32(4) * unit + np.uint32(i))
                    out[i] = np.uint32(0)
                    if window < np.uint32(slid):
                        half = window // np.uint32(windows) * np.uint32(group) + window % np.uint32(
                            windows
                        )  # starts at an even column
                        out[i] = low_halves(row_halves[half], row_halves[half + np.uint32(1)])
                store4(values, out_row + np.int64(unit), out[0], out[1], out[2], out[3])

    return kernel


def quantize_any(variant: Variant) -> Any:
    """A block reads its row twice, element by element; thread t writes the words t, t + threads ..."""
    t, low, _, to_stored = _conversions(variant)
    dependent = variant.dependent
    windows, group, lifted = variant.windows, 2 * variant.windows + 2, variant.windows > 0
    magnitude = np.uint32(0x7FFFFFFF if variant.source == "float32" else 0x7FFF)

    def kernel(
        x: Any,  # [m, k] elements of strides ld, step
        values: Any,  # [m, pitch] words
        scale: Any,  # [m]
        ld: int,
        step: int,
        k: int,
        pitch: int,
        slid: int,  # windows of a lifted row
    ) -> None:
        if dependent:
            wait_for_earlier_grids()
            launch_later_grid()
        row, thread, threads = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
        peak = np.uint32(0)
        for column in range(thread, k, threads):
            peak = larger(peak, x[row * ld + column * step] & magnitude)
        row_scaled, inverse = row_scale(low(block_max(peak)), t)
        if thread == 0:
            scale[row] = row_scaled
        for word in range(thread, pitch, threads):
            column = 4 * word
            if lifted:
                column = word // windows * group + 2 * (word % windows) if word < slid else k
            q = cuda.local.array(4, np.float32)
            for i in range(4):
                q[i] = np.float32(0)
                if column + i < k and inverse > np.float32(0):
                    q[i] = multiply(low(x[row * ld + (column + i) * step]), inverse)
            values[row * pitch + word] = to_stored(q[0], q[1], q[2], q[3])

    return kernel


# ---- launch ------------------------------------------------------------------------------------------------------


@functools.cache
def _capability(device: int) -> int:
    """90 for 9.0; the simulator stands for the newest."""
    return 120 if SIMULATED else int(arrays.cuda.Device(device).compute_capability)


def native_float8(device: int) -> bool:
    """Whether the device converts to float8_e4m3fn itself: sm_89 and later."""
    return _capability(device) >= 89


def dependent_launch(device: int) -> bool:
    """Whether a grid may start before the one before it is complete: sm_90 and later."""
    return _capability(device) >= 90


def row_pitch(k: int, pattern: Pattern | None = None, pitch: int = PITCH) -> int:
    """Bytes of a row of quantized values: k, or ks if they are lifted by `pattern`, rounded up to `pitch`."""
    columns = k if pattern is None else pattern.slid_k(k)
    return -(-columns // pitch) * pitch


def quantize(
    x: Any,
    dtype: DType,
    *,
    pattern: Pattern | None = None,
    pitch: int = PITCH,
    source: np.dtype[Any] | None = None,
    out: Any = None,
    scale: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Quantize every row of x on its device; `reference.quantize`, and `reference.lift` if `pattern` is given.

    With `out` and `scale` it allocates nothing; it never waits for the device.

    Args:
        x: [m, k] CuPy array of bfloat16, float16 or float32, any strides. Whole 16-byte vectors of neighbouring elements are
            read once; other rows, and those of more than 8192 vectors, are read a second time from cache.
        dtype: int8 or float8_e4m3fn.
        pattern: lift the values by it.
        pitch: bytes that a row of values is padded to, a multiple of 16.
        source: type of x's elements, if x holds their raw bits (uint16 for bfloat16).
        out: [m, row_pitch(k, pattern, pitch)] contiguous, 16-byte aligned, one byte an element.
        scale: [m, 1] float32, contiguous.
        stream: CuPy stream to launch on; by default the current one.

    Returns:
        values: [m, row_pitch(k, pattern, pitch)], int8, or uint8 that holds float8 bits; columns past k or ks are zero.
        scale: [m, 1] float32, x ~= values * scale; NaN for a row that holds NaN or infinity, whose values are zeros.

    Raises:
        OperandError: x, out or scale has the wrong type or shape.
    """
    name = SOURCES.get(x.dtype if source is None else source)
    if name is None or (source is not None and x.dtype.itemsize != source.itemsize):
        raise OperandError(f"x: {x.dtype} cannot be quantized; it must be bfloat16, float16 or float32")
    if x.ndim != 2:
        raise OperandError(f"x: shape {x.shape} must be [m, k]; reshape it to two dimensions")
    if dtype.qmax is None:
        raise OperandError(f"dtype: {dtype} is not quantized to; it must be int8 or float8_e4m3fn")
    if pitch <= 0 or pitch % PITCH:
        raise OperandError(f"pitch: {pitch} bytes must be a positive multiple of {PITCH}")
    m, k = x.shape
    width = row_pitch(k, pattern, pitch)
    if out is not None:
        _check("out", out, (m, width), 1)
    if scale is not None:
        _check("scale", scale, (m, 1), 4)
    if out is None or scale is None:
        with contextlib.nullcontext() if stream is None else stream:
            out = arrays.empty((m, width), np.int8 if dtype is INT8 else np.uint8) if out is None else out
            scale = arrays.empty((m, 1), np.float32) if scale is None else scale
    if m == 0:
        return out, scale
    device = _device()
    launch = plan(
        name, dtype.name, k, x.strides, _address(x) % 16 == 0, width, pattern, native_float8(device), dependent_launch(device)
    )
    launch.kernel((m,), launch.threads, x, out, scale, *launch.integers, shared=launch.shared, stream=stream)
    return out, scale


def _device() -> int:
    return 0 if SIMULATED else int(arrays.cuda.runtime.getDevice())


def _address(x: Any) -> int:
    return int(x.ctypes.data if SIMULATED else x.data.ptr)


def _check(name: str, array: Any, shape: tuple[int, int], itemsize: int) -> None:
    if array.shape != shape or array.dtype.itemsize != itemsize or not array.flags.c_contiguous:
        raise OperandError(
            f"{name}: {array.dtype} {tuple(array.shape)} must be a contiguous {shape} array of {itemsize}-byte elements"
        )


@dataclass(frozen=True)
class Launch:
    """How one problem is launched: which kernel, threads a block, the kernel's integers, bytes of shared memory."""

    variant: Variant
    kernel: Kernel
    threads: int
    integers: tuple[int, ...]
    shared: int


@functools.lru_cache(maxsize=1024)
def plan(
    source: str,
    stored: str,
    k: int,
    strides: tuple[int, int],
    aligned: bool,
    width: int,
    pattern: Pattern | None,
    native: bool,
    dependent: bool = False,
    vectors: int | None = None,
) -> Launch:
    """The launch for rows of k elements of these strides (bytes), from an address `aligned` to 16 bytes, to rows of `width`.

    `vectors`, of those a thread holds, overrides the choice made here.
    """
    size = 4 if source == "float32" else 2
    columns = 16 // size
    windows = 0 if pattern is None else pattern.windows
    slid = 0 if pattern is None else pattern.slid_k(k) // 4
    native = native or stored == "int8"  # one variant where it makes no difference
    read = width if pattern is None else pattern.padded_k(k)
    total = -(-read // columns)
    neighbours = strides[1] == size or k == 1
    if aligned and neighbours and k % columns == 0 and strides[0] % 16 == 0 and 0 < total <= max(VECTORS.values()):
        if vectors is None:
            vectors = next(v for v, most in VECTORS.items() if total <= most)
        threads = -(-total // (32 * vectors)) * 32
        unit = 16 if windows else columns
        shared = total * columns if windows else 0
        integers = (strides[0] // 16, k // columns, total, width // unit, slid)
        variant = Variant(source, stored, vectors, windows, native, dependent)
        return Launch(variant, kernel(variant), threads, integers, shared)
    threads = min(256, max(32, -(-k // 128) * 32))
    integers = (strides[0] // size, strides[1] // size, k, width // 4, slid)
    variant = Variant(source, stored, 0, windows, native, dependent)
    return Launch(variant, kernel(variant), threads, integers, 0)
