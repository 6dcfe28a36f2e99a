"""Operands, checked: weights to be packed and their scales; activations, bias and result of a product.

One clear sentence for each way to be wrong. What is said of products holds of NumPy's arrays and of a GPU's.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OperandError, UnsupportedError, shown
from .dtypes import BFLOAT16, CODE_OF, FLOAT8, FLOAT16, FLOAT32, FLOATS, INT8, PACKED, DType
from .packed import size_problem
from .pattern import Pattern
from .scheme import Scheme

Array = NDArray[Any]

DLPACK_CUDA = 2
"""The kind of a CUDA device in DLPack, kDLCUDA."""

SOURCES = (FLOAT32, FLOAT16.numpy, BFLOAT16.numpy, INT8.numpy, FLOAT8.numpy)
"""The types of dense weights that can be packed."""


def on_gpu(a: Any) -> bool:
    """Whether `a` is an array on a GPU, of whatever library."""
    if (device := getattr(a, "__dlpack_device__", None)) is not None:
        return int(device()[0]) == DLPACK_CUDA
    return hasattr(a, "__cuda_array_interface__")


def require_unmasked(name: str, a: object) -> None:
    """Raise OperandError for a masked array, whose mask would be dropped without a word."""
    if isinstance(a, np.ma.MaskedArray):
        raise OperandError(f"{name}: is a masked array, and the mask would be lost; pass {name}.filled(value)")


def real_numbers(name: str, a: object) -> Array:
    """`a` as a plain NumPy array of real numbers: any float, integer or bool type, ml_dtypes' floats too.

    Raises:
        OperandError: a masked array, ragged lists, complex numbers, text, dates, objects (and integers past 64 bits).
    """
    require_unmasked(name, a)
    try:
        array = np.asarray(a)
    except (TypeError, ValueError, OverflowError) as error:
        raise OperandError(f"{name}: {type(a).__name__} cannot be made an array ({error}); pass real numbers") from None
    if not is_real(array.dtype):
        raise OperandError(f"{name}: {array.dtype} must be real numbers")
    return array


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether a type holds real numbers: floats, ml_dtypes' too, integers and bool."""
    return dtype.kind in "biuf" or (dtype.kind != "c" and dtype in CODE_OF)


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as Python's integer. Raises OperandError unless it is one, of Python or NumPy, and `least` or more."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool | np.bool_) and (found := operator.index(value)) >= least:
            return found
    raise OperandError(f"{name}: {shown(value)} must be a whole number of at least {least}")


def number(name: str, value: Any, most: float, rule: str) -> float:
    """`value` as Python's float. Raises OperandError, with the rule, unless it is a number from 0 to `most`."""
    with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
        real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if real and 0 <= float(value) <= most:
            return float(value)
    raise OperandError(f"{name}: {shown(value)} must be {rule}")


# ---- weights -----------------------------------------------------------------------------------------------------


def unpackable(dtype: np.dtype[Any], way: str = "") -> OperandError:
    """The error to raise for weights of a type that cannot be packed.

    Args:
        way: for types of 8 bits, what to do instead; by default to convert them.
    """
    if not way or dtype.itemsize > 1:
        way = "convert it first: w.astype(np.float32)" if dtype.kind in "fiu" else ""
    known = ", ".join(t.name for t in SOURCES)
    return OperandError(f"w: {dtype} cannot be packed; it must be one of {known}{'; ' + way if way else ''}")


def require_size(pattern: Pattern, shape: tuple[int, int], scheme: Scheme | DType) -> None:
    """Raise OperandError for weights of a shape that no packed weight may have."""
    if problem := size_problem(pattern, shape, scheme):
        raise OperandError(f"w: {problem}")


def require_kernel(scheme: Scheme) -> None:
    """Raise UnsupportedError for a scheme that no GPU kernel packs or unpacks yet."""
    if scheme.blocks or scheme.weights != scheme.activations:  # kernels know one type, of both operands
        raise UnsupportedError(
            f"packed: {scheme} weights are packed and unpacked on the CPU only; use NumPy arrays, or int8, fp8 or bfloat16"
        )


def check_weights(w: object) -> Array:
    """w as a plain NumPy array, or OperandError unless it is a NumPy matrix of a type that can be packed."""
    if not isinstance(w, np.ndarray):
        raise OperandError(f"w: {type(w).__name__} is not an array; pass a NumPy array [n, k]")
    require_unmasked("w", w)
    if w.ndim != 2:
        raise OperandError(f"w: shape {w.shape} must be [n, k]; reshape it to two dimensions")
    if w.dtype not in SOURCES:
        raise unpackable(w.dtype)
    return np.asarray(w)


def stored_scheme(w: Array, dtype: object) -> Scheme:
    """The scheme that w is stored in, for the `dtype` asked for."""
    if dtype is None:
        return Scheme.of(BFLOAT16 if w.dtype == np.float32 else w.dtype)
    scheme = Scheme.of(dtype)
    if w.dtype.itemsize == 1 and w.dtype != scheme.dtype.numpy:
        raise OperandError(f"dtype: {w.dtype} weights are quantized already and keep their type, got {scheme}; leave dtype out")
    return scheme


def has_scales(itemsize: int, name: object, scale: object) -> bool:
    """Whether weights of a type (its bytes and name) come with scales: those of 8 bits must, others must not."""
    if itemsize > 1 and scale is not None:
        raise OperandError(f"scale: {name} weights are quantized here and take none; leave it out")
    if itemsize == 1 and scale is None:
        raise OperandError(f"scale: is missing; {name} weights are quantized already, pass their scales, one a row")
    return itemsize == 1


def row_scales(w: Array, scale: Array | float | None, first_row: int = 0) -> Array | None:
    """The scale of every row of 8-bit w: float32 [n, 1]; None for other types, which have none."""
    if not has_scales(w.dtype.itemsize, w.dtype, scale) or scale is None:
        return None
    return row_scale(scale, w.shape[0], first_row)


def row_scale(scale: Array | float, n: int, first_row: int = 0) -> Array:
    """Scales as they are stored: [n, 1], [n], or one number for all rows, of any real type -> float32 [n, 1].

    Raises:
        OperandError: another shape or type, or a scale that is negative, not finite in float32, or zero only there.
    """
    given = real_numbers("scale", scale)
    if given.shape not in ((n, 1), (n,), (), (1,), (1, 1)):
        raise OperandError(f"scale: shape {given.shape} must be [{n}, 1], [{n}], or one number for all rows")
    given = np.broadcast_to(given.reshape(-1, 1), (n, 1))
    with np.errstate(over="ignore", under="ignore"):
        scales = given.astype(np.float32) + np.float32(0)  # and -0.0 is 0
    zero = np.zeros((), given.dtype)
    if not (good := np.isfinite(scales) & (given >= zero) & ((scales != 0) | (given == zero))).all():
        row = int(np.flatnonzero(~good)[0])
        value = given[row, 0] if scales[row, 0] == 0 else scales[row, 0]
        raise OperandError(
            f"scale: {value} at row {first_row + row} must be finite and not negative"
            f"{', and not so small that float32 makes it zero' if scales[row, 0] == 0 else ''}"
        )
    return scales


_INFINITE = {row.numpy: (row.nonzero_mask, row.inf_bits) for row in PACKED} | {FLOAT32: (0x7FFFFFFF, 0x7F800000)}


def infinite(w: Array) -> Array | None:
    """Where w is NaN or infinity: bool, the shape of w; None if it is nowhere."""
    mask, infinity = _INFINITE[w.dtype]
    if infinity is None or not w.size:
        return None
    raw = np.dtype(f"u{w.dtype.itemsize}").type
    magnitude = w.view(raw) & raw(mask)
    return magnitude >= raw(infinity) if magnitude.max() >= infinity else None


def require_finite(w: Array, first_row: int = 0) -> None:
    """Raise OperandError at the first NaN or infinity of w, which holds rows first_row ... of the weights."""
    if (bad := infinite(w)) is not None:
        row, column = map(int, np.argwhere(bad)[0])
        raise OperandError(f"w: {w[row, column]} at row {first_row + row}, column {column}; weights must be finite ({w.dtype})")


def require_no_overflow(q: Array, w: Array, first_row: int = 0) -> Array:
    """q, or OperandError at the first weight that became infinite when it was rounded to the 16-bit type of q."""
    if (bad := infinite(q)) is not None:
        row, column = map(int, np.argwhere(bad)[0])
        raise OperandError(
            f"w: {w[row, column]} at row {first_row + row}, column {column} overflows {q.dtype}; store it in another type"
        )
    return q


# ---- products ----------------------------------------------------------------------------------------------------


def check_activations(x: Any, k: int | None = None) -> None:
    """Raise OperandError unless x is an array [..., k] of a type in `FLOATS`; with any k by default."""
    if x.dtype not in FLOATS:
        way = "; convert it first: x.astype(np.float32)" if x.dtype.kind in "fiu" else ""
        raise OperandError(f"x: {x.dtype} must be one of {', '.join(FLOATS.values())}{way}")
    if x.ndim == 0 or k not in (None, x.shape[-1]):
        rule = "[..., k]" if k is None else f"[..., {k}], the k of packed (not padded: matmul does that)"
        raise OperandError(f"x: shape {x.shape} must be {rule}")


def check_bias(bias: Any, n: int) -> None:
    """Raise OperandError unless `bias` is an array [n] of a type in `FLOATS`, or of float64."""
    if bias.shape != (n,) or (bias.dtype not in FLOATS and bias.dtype != np.float64):
        raise OperandError(f"bias: {bias.dtype} {bias.shape} must be a float type, of shape ({n},)")


def float_dtype(name: str, value: Any) -> np.dtype[Any]:
    """The type in `FLOATS` that `value` means: a NumPy dtype, what NumPy makes one of, or a `DType`.

    Raises:
        OperandError: it means another type, or none; `name` is what the message calls it.
    """
    try:  # of None, NumPy makes float64
        dtype = None if value is None else value.numpy if isinstance(value, DType) else np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses text with commas itself
        dtype = None
    if dtype not in FLOATS:
        raise OperandError(f"{name}: {shown(value) if dtype is None else dtype} must be one of {', '.join(FLOATS.values())}")
    return dtype


def result_dtype(shape: tuple[int, ...], source: np.dtype[Any], out: Any, out_dtype: Any) -> np.dtype[Any]:
    """The type of y: `out_dtype`, by default that of `out`, or else that of x.

    Args:
        shape: of y.
        source: the type of x.
        out: an array for y, which is checked; or None.

    Raises:
        OperandError: `out_dtype` or `out` is of no type that y may have, or `out` is not what y will be.
    """
    if out_dtype is not None:
        dtype = float_dtype("out_dtype", out_dtype)
    else:
        dtype = source if out is None else float_dtype("out", out.dtype)
    if out is not None and (out.shape != shape or out.dtype != dtype):
        raise OperandError(f"out: {out.dtype} {out.shape} must be {dtype} {shape}")
    return dtype


def share_memory(a: Array, b: Array) -> bool:
    """Whether a and b share an element; True too where that is too hard to tell. No element is looked at."""
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlapping(name: str) -> OperandError:
    """The error to raise where `out` shares memory with the operand `name`."""
    return OperandError(f"out: shares memory with {name}; pass an array of its own")
