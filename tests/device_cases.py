"""Operands and expectations that the tests of device kernels share, on the GPU and in the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import cases
import numpy as np

from slidesparse_nb.arch.operand import STAGE, scaled_rows, stages, to_tiles
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOATS, DType
from slidesparse_nb.core.packed import part_arrays
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.scheme import Block, Scheme

SOURCES = [BFLOAT16.numpy, FLOAT16.numpy, FLOAT32]


def bits(a: Any) -> Any:
    """The stored bits of an array."""
    return a.view(f"u{a.itemsize}")


def at_address(x: Any, offset: int = 0, pitch: int | None = None) -> Any:
    """x [m, k] copied to a 16-byte aligned address plus `offset`, its rows `pitch` bytes apart."""
    pitch = pitch or x.shape[1] * x.itemsize
    memory = np.full(x.shape[0] * pitch + 32, 0x7F, np.uint8)
    placed: Any = np.ndarray(x.shape, x.dtype, memory, -memory.ctypes.data % 16 + offset, (pitch, x.itemsize))
    placed[...] = x
    return placed


def awkward_rows(m: int, k: int, source: np.dtype[Any], seed: int = 0) -> Any:
    """[m, k] of `source`: rows of normal numbers, and among them every kind of row that rounding or scaling could get wrong."""
    rng = np.random.default_rng([seed, m, k])
    x = rng.standard_normal((m, k)).astype(np.float32)
    if not x.size:
        return x.astype(source)
    largest = 60000 if source == np.float16 else 3e38
    smallest = 6e-8 if source == np.float16 else 1e-40

    def set_row(row: int, values: Any) -> None:
        if row < m:
            x[row] = values

    set_row(1, rng.integers(-127, 128, k) + np.where(np.arange(k) % 3 == 0, 0.5, 0))  # ties, if absmax is 127
    if m > 1:
        x[1, -1] = 127
    set_row(2, np.where(np.arange(k) == k // 2, largest, x[0]))  # an outlier; the others vanish
    set_row(3, 0)
    set_row(4, -0.0)
    set_row(5, smallest)  # below the smallest normal number
    set_row(6, rng.standard_normal(k) * 2.0**-100 / 3)  # around the smallest scale
    set_row(7, np.where(np.arange(k) == k - 1, np.nan, x[0]))
    set_row(8, np.where(np.arange(k) == 0, -np.inf, x[0]))
    set_row(9, 448 * np.float32(2.0) ** -rng.integers(0, 20, k) * (1 + rng.integers(0, 32, k) / 16))  # float8's steps, halves
    set_row(10, -largest)
    set_row(11, np.nan)
    with np.errstate(over="ignore"):
        return x.astype(source)


def row_pitch(k: int, pattern: Pattern | None = None) -> int:
    """Bytes of a row of quantized values: k, or ks if they are lifted by `pattern`, padded to 16 bytes."""
    return -(-(k if pattern is None else pattern.expanded_k(k)) // 16) * 16


def write(
    x: Any,
    dtype: DType,
    out: Any,
    scale: Any,
    pattern: Pattern | None = None,
    width: int | None = None,
    source: str = "",
    block: Block | None = None,
) -> None:
    """Launch the kernel of cuda/quantize.py on x [m, k], with the arguments of its `plan`, into arrays that are there."""
    from slidesparse_nb.cuda import quantize
    from slidesparse_nb.cuda.jit.numba import current_device

    if len(x):
        aligned = (x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr) % 16 == 0
        architecture = quantize.architecture(current_device())
        name = source or FLOATS[x.dtype]
        launch = quantize.plan(name, dtype.name, x.shape[1], x.strides, aligned, architecture, pattern, block, width=width)
        launch_rows(launch, len(x), x, out, 0 if scale is None else scale)


def launch_rows(plan: Any, m: int, *arrays: Any) -> None:
    """Launch a plan of cuda/quantize.py for m rows, on the current device and stream."""
    plan.kernel((plan.blocks(m),), plan.threads, *arrays, *plan.integers(m), shared=plan.shared)


def plan_with(vectors: int, *arguments: Any, **named: Any) -> Any:
    """`quantize.plan` with this number of 16-byte vectors of x in a thread."""
    from slidesparse_nb.cuda import quantize

    with patch.dict(quantize.VECTORS, {vectors: 8192}, clear=True):
        return quantize.plan.__wrapped__(*arguments, **named)


def made_on_device(x: Any, dtype: DType, pattern: Pattern | None = None) -> tuple[Any, Any]:
    """New values [m, row_pitch(k)], or tiles of `pattern`, and scale [m, 1], None where nothing is quantized, made of x."""
    from slidesparse_nb.cuda.jit.numba import arrays

    m, k = x.shape
    shape = (m, row_pitch(k)) if pattern is None else (stages(pattern, k, dtype), -(-m // 8), 8, STAGE)
    out, scale = arrays.empty(shape, np.uint8), arrays.empty((m, 1), np.float32) if Scheme.of(dtype).scaled else None
    write(x, dtype, out, scale, pattern, row_pitch(k) if pattern is None else None)
    return out, scale


def quantized(x: Any, dtype: DType, pattern: Pattern | None, width: int) -> tuple[Any, Any]:
    """What a device must give: bytes [m, width] with zeros past the values, scale float32 [m, 1]."""
    with np.errstate(invalid="ignore"):
        q, scale = reference.quantize(x, dtype)
    if pattern is not None:
        q = reference.lift(q, pattern)
    values = np.zeros((x.shape[0], width), np.uint8)
    values[:, : q.shape[1]] = bits(q)
    return values, scale


def tiled(x: Any, dtype: DType, pattern: Pattern) -> tuple[Any, Any]:
    """What a device must give for kernels that load tiles: those, and scales, or None where nothing is quantized."""
    if x.dtype == dtype.numpy:
        return to_tiles(x, pattern), None
    with np.errstate(invalid="ignore", over="ignore"):
        if not Scheme.of(dtype).scaled:
            return to_tiles(x.astype(dtype.numpy), pattern), None
        q, scale = reference.quantize(x, dtype)
    return to_tiles(q, pattern), scale


def blocked(x: Any, pattern: Pattern, scheme: Scheme) -> tuple[Any, Any]:
    """What a device must give for a scheme over pairs: rows of blocks, and scale float32 [m, 1]."""
    assert scheme.activations.block is not None
    with np.errstate(invalid="ignore", over="ignore"):
        q, codes, scale = reference.quantize_blocks(reference.lift(x, pattern), scheme.activations)
    return scaled_rows(reference.pack_nibbles(q), codes.view(np.uint8), scheme.activations.block), scale


def same(values: Any, scale: Any, expected: tuple[Any, Any]) -> None:
    """Assert equality, bit for bit."""
    wrong = np.argwhere(bits(values) != expected[0])
    assert not wrong.size, f"{len(wrong)} values differ, the first at {wrong[0]}: {values[tuple(wrong[0])]}"
    np.testing.assert_array_equal(bits(scale), bits(expected[1]))


def same_weight(packed: Any, expected: Any) -> None:
    """Assert that two packed weights of NumPy arrays are one, byte for byte; of values, raw bits count as the type."""
    typed = {part: getattr(packed, part).view(array.dtype) for part, array in part_arrays(expected).items()}
    cases.same(replace(packed, **typed), expected)
