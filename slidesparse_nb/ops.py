"""matmul(x, packed) and quantize(x, packed): check the operands, then run where x lives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cpu, cpu_matmul
from .dtypes import BFLOAT16, FLOAT16, FLOAT32, DType, packed_dtype
from .errors import OperandError
from .operands import on_gpu, require_unmasked
from .packed import PackedWeight, QuantizedActivations, require_packed
from .pattern import Pattern
from .strict_json import shown

Array = NDArray[Any]

ACTIVATIONS = (FLOAT32, FLOAT16.numpy, BFLOAT16.numpy)
"""The types of x, and of the result."""


def matmul(
    x: Any,
    packed: PackedWeight,
    *,
    bias: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
    workspace: Any = None,
) -> Any:
    """y = x @ w.T + bias with packed weights w; the numbers are those of `reference.matmul`.

    8-bit weights: every token (row of x) is quantized to their type first, products accumulate in int32 or float32, and
    y = (acc * scale_x) * scale_w + bias in float32. 16-bit weights: x is rounded to their type, products accumulate in float32.
    y is rounded to its type last. int8 results are bit-equal everywhere; others to the order of accumulation.

    Args:
        x: [..., k] float32, float16 or bfloat16, any number of leading dimensions, none too; or `QuantizedActivations`.
        packed: weights of shape (n, k), on the machine of x: NumPy arrays for a NumPy x.
        bias: [n] of any float type, or None.
        out: [..., n] array to write and return; it may not overlap x.
        out_dtype: float32, float16 or bfloat16; by default that of `out`, or else that of x.
        stream: on a GPU, the CuPy stream to work on, by default the current one; None for NumPy.
        workspace: on a GPU, `cupy.zeros(workspace_bytes(...), "uint8")`: with it and `out`, nothing is allocated, so that the
            call can be captured in a CUDA graph. It serves one stream at a time.

    Returns:
        y: [..., n].

    Raises:
        OperandError: an operand of the wrong type, shape or dtype.
        FormatError: the tensors of `packed` do not fit its shape.
    """
    require_packed(packed)
    if isinstance(x, QuantizedActivations):
        given = x.held
        if not isinstance(x.lead, tuple) or not all(isinstance(v, int) and v >= 0 for v in x.lead):
            raise OperandError(f"x.lead: {shown(x.lead)} must be a tuple of dimensions; make x with quantize(x, packed)")
    else:
        given = x
        require_unmasked("x", x)
    if isinstance(given, np.ndarray):
        if workspace is not None:
            raise OperandError(f"workspace: {type(workspace).__name__} must be None for NumPy arrays")
        return _matmul_numpy(x, packed, bias, out, out_dtype, stream)
    if _on_gpu(given):
        if not packed.arranged:
            packed.check_shapes()
        return _gemm().matmul(x, packed, bias, out, out_dtype, stream, workspace)
    raise _no_array("x", x)


def workspace_bytes(m: int, packed: PackedWeight, out_dtype: Any) -> int:
    """Bytes of a workspace for `matmul` of m tokens into `out_dtype` on the current GPU; the kernel is compiled on the way."""
    require_packed(packed)
    return int(_gemm().workspace_bytes(m, packed, out_dtype))


def quantize(x: Any, packed: PackedWeight | Pattern | str | tuple[int, int], dtype: Any = None) -> QuantizedActivations:
    """Quantize activations once, for several products with weights of one pattern and type (q/k/v, gate/up).

    On a GPU of compute capability 9.0 they are laid out as its kernel wants them in the same pass, so that `matmul` is one
    launch for weights of the same pattern; for weights of another pattern it lays them out again.

    Args:
        x: [..., k] float32, float16 or bfloat16.
        packed: weights that x will be multiplied by, or their pattern; then `dtype` is needed too.
        dtype: of the weights; by default that of `packed`. For 16-bit weights x is rounded to their type.

    Returns:
        Values [m, k]; for 8-bit types scales [m, 1], one a token. A token that holds NaN or infinity has scale NaN and zeros.

    Raises:
        OperandError: an operand of the wrong type or shape.
        FormatError: the tensors of `packed` do not fit its shape.
    """
    require_unmasked("x", x)
    if isinstance(packed, PackedWeight):
        if not packed.arranged:  # a GPU's weights were checked when they were arranged
            packed.check_shapes()
        pattern, wanted = packed.pattern, packed.dtype
        if dtype is not None and packed_dtype(dtype) != wanted:
            raise OperandError(f"dtype: {packed_dtype(dtype)} is not {wanted}, the type of packed; leave it out")
    else:
        pattern = Pattern.of(packed)
        if dtype is None:
            raise OperandError("dtype: is missing; with a pattern instead of packed weights, pass their type, such as 'int8'")
        wanted = packed_dtype(dtype)
    weights = packed if isinstance(packed, PackedWeight) else None
    if isinstance(x, np.ndarray):
        lead, flat = _flat(_activations(x))
        if weights is not None:
            _same_k(flat.shape[1], weights)
        if wanted.qmax is not None:
            values, scale = cpu.quantize(cpu.to_float32(flat), wanted)
            return QuantizedActivations(values, scale, lead, wanted, x.dtype)
        values = flat.copy() if flat.dtype == wanted.numpy else cpu.round16(cpu.to_float32(flat), wanted)
        return QuantizedActivations(values, None, lead, wanted, x.dtype)
    if _on_gpu(x):
        quantized: QuantizedActivations = _gemm().quantize(x, pattern, wanted, weights)
        return quantized
    raise _no_array("x", x)


def _on_gpu(a: Any) -> bool:
    """`on_gpu`, which asks CuPy's arrays themselves where they are, and that takes a microsecond."""
    return type(a).__module__ == "cupy" or on_gpu(a)


def _gemm() -> Any:
    from .device import gemm  # CuPy is imported when a GPU is first used, and not before

    return gemm


# ---- NumPy -------------------------------------------------------------------------------------------------------


def _matmul_numpy(
    x: Array | QuantizedActivations, packed: PackedWeight, bias: Any, out: Any, out_dtype: Any, stream: Any
) -> Array:
    if stream is not None:
        raise OperandError(f"stream: {stream!r} must be None for NumPy arrays, which have no streams")
    packed.check_shapes()
    for name, array in (("packed.values", packed.values), ("bias", bias), ("out", out)):
        if array is not None and not isinstance(array, np.ndarray):
            raise OperandError(f"{name}: {type(array).__name__} must be a NumPy array, as x is")
        require_unmasked(name, array)
    if isinstance(x, QuantizedActivations):
        if not isinstance(x.scale, np.ndarray | None):
            raise OperandError(f"x.scale: {type(x.scale).__name__} must be a NumPy array, as x.values is")
        x.check(packed.dtype, x.values, x.scale)
        values, scale_x = x.values.view(packed.dtype.numpy), x.scale
        lead, source = x.lead, _dtype("x.source", x.source)
    else:
        lead, flat = _flat(_activations(x))
        values, scale_x, source = flat, None, x.dtype
    _same_k(values.shape[1], packed)
    bias32 = _bias(bias, packed.n)
    shape = (*lead, packed.n)
    result = _result(shape, source, out, out_dtype)
    if out is not None and _overlap(out, x.values if isinstance(x, QuantizedActivations) else x):
        raise OperandError("out: shares memory with x; pass an array of its own")
    if scale_x is None:
        if packed.dtype.qmax is not None:
            values, scale_x = cpu.quantize(cpu.to_float32(values), packed.dtype)
        elif values.dtype != packed.dtype.numpy:
            values = cpu.round16(cpu.to_float32(values), packed.dtype)
    flat_result = result.reshape(values.shape[0], packed.n) if result.flags.c_contiguous else None
    y = np.empty((values.shape[0], packed.n), result.dtype) if flat_result is None else flat_result
    cpu_matmul.matmul(values, scale_x, packed, bias32, y)
    if flat_result is None:
        result[...] = y.reshape(shape)
    return result


def _no_array(name: str, value: object) -> OperandError:
    return OperandError(
        f"{name}: {type(value).__name__} is not an array; pass a NumPy array, or one on a GPU: [..., k], float32, float16"
        " or bfloat16"
    )


def _activations(x: Array) -> Array:
    if x.dtype not in ACTIVATIONS:
        way = "; convert it first: x.astype(np.float32)" if x.dtype.kind in "fiu" else ""
        raise OperandError(f"x: {x.dtype} must be one of {', '.join(t.name for t in ACTIVATIONS)}{way}")
    if x.ndim == 0:
        raise OperandError("x: has no dimensions; it must be [..., k]")
    return np.asarray(x)


def _flat(x: Array) -> tuple[tuple[int, ...], Array]:
    """Leading dimensions, and x as [m, k]."""
    lead = x.shape[:-1]
    return lead, x.reshape(math.prod(lead), x.shape[-1])


def _same_k(k: int, packed: PackedWeight) -> None:
    if k != packed.k:
        raise OperandError(f"x: k={k} must be {packed.k}, the k of packed (not padded: matmul does that)")


def _bias(bias: Array | None, n: int) -> Array | None:
    if bias is None:
        return None
    if bias.shape != (n,) or bias.dtype not in (*ACTIVATIONS, np.dtype(np.float64)):
        raise OperandError(f"bias: {bias.dtype} {bias.shape} must be a float type, of shape ({n},)")
    with np.errstate(over="ignore"):
        return bias.astype(np.float32)


def _result(shape: tuple[int, ...], source: np.dtype[Any], out: Array | None, out_dtype: Any) -> Array:
    """`out`, checked, or a new array."""
    dtype = source if out is None else out.dtype
    if out_dtype is not None:
        dtype = _dtype("out_dtype", out_dtype)
    if dtype not in ACTIVATIONS:
        raise OperandError(f"out_dtype: {dtype} must be one of {', '.join(t.name for t in ACTIVATIONS)}")
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype:
        raise OperandError(f"out: {out.dtype} {out.shape} must be {dtype} {shape}")
    if not out.flags.writeable:
        raise OperandError("out: is read-only; pass a writable array")
    return out


def _dtype(name: str, value: Any) -> np.dtype[Any]:
    try:
        return value.numpy if isinstance(value, DType) else np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses text with commas itself
        raise OperandError(f"{name}: {shown(value)} is not a dtype; pass float32, float16 or bfloat16") from None


def _overlap(a: Array, b: Array) -> bool:
    """Whether a and b share an element; True too where that is too hard to tell."""
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
