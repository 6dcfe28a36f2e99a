"""matmul(x, packed) and quantize(x, packed): check the operands, then run where x lives; to_device(packed) for a GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from . import cuda
from .arch import for_capability
from .core.activations import Before, QuantizedActivations
from .core.checks import (
    check_activations,
    check_bias,
    float_dtype,
    on_gpu,
    overlapping,
    require_unmasked,
    result_dtype,
    share_memory,
    whole_number,
)
from .core.packed import PackedWeight, require_matrix, require_matrix_shape, require_packed
from .core.pattern import Pattern
from .core.scheme import Scheme
from .cpu import kernels
from .cpu import matmul as cpu_matmul
from .errors import OperandError, UnsupportedError, shown

if TYPE_CHECKING:
    from .cuda.weight import DeviceWeight

Array = NDArray[Any]


def matmul(
    x: Any,
    packed: PackedWeight | DeviceWeight,
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
        packed: weights of shape (n, k): NumPy arrays for a NumPy x. On a GPU they are arranged for its kernel on first use, and
            stay so as long as `packed` lives; or what `to_device` returned.
        bias: [n] of any float type, or None.
        out: [..., n] array to write and return; it may overlap neither x nor bias nor workspace.
        out_dtype: float32, float16 or bfloat16; by default that of `out`, or else that of x.
        stream: on a GPU, the stream to work on: CuPy's, PyTorch's, or any that tells its address; by default the current one,
            of PyTorch for its tensors, else of CuPy. x, out and the others are used in its order. None for NumPy.
        workspace: on a GPU, `workspace_bytes(...)` bytes of scratch memory, 16-byte aligned: with it and `out`, nothing is
            allocated, so that the call can be captured in a CUDA graph. It serves one stream at a time.

    Returns:
        y: [..., n]; `out` itself, or an array of NumPy, of PyTorch for its tensors, or of CuPy for any other on a GPU.

    Raises:
        OperandError: an operand of the wrong type, shape or dtype.
        FormatError: the tensors of `packed` do not fit its shape.
        UnsupportedError: x is on a GPU, and CuPy is missing, or the GPU does not multiply such weights.
    """
    _require_weight(packed)
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
        return _matmul_numpy(x, require_packed(packed), bias, out, out_dtype, stream)
    if _on_gpu(given):
        if _is_tensor(x):
            out, stream = _in_pytorch(x, packed.n, out, out_dtype, stream)
        return _gemm("matmul").matmul(x, packed, bias, out, out_dtype, stream, workspace)
    raise _no_array("x", x)


def to_device(packed: PackedWeight, device: int | None = None, *, least_memory: bool = False) -> DeviceWeight:
    """The weight arranged for a GPU's kernel, ahead of its first product; `matmul` and `quantize` take it in place of `packed`.

    It holds nothing of `packed`, whose tensors may be freed: `packed` remembers it, not the other way round. Its `buffers` are
    CuPy arrays by name; `device_weight` takes copies in the caller's memory. Adapters call its `linear`, which takes addresses.

    Args:
        device: number of the GPU; by default the current one.
        least_memory: decided by the first call. On Hopper metadata keep their smaller form alone: at 6:8 8-bit weights take
            0.84 of their dense bytes, not 1.03, and products of 257 to some thousand tokens take 3 to 16 % longer.

    Raises:
        OperandError: `packed` is a stack of matrices.
        UnsupportedError: there is no GPU, no CuPy, or no such device; or it has no sparse tensor cores for this type; or the
            block scales of a row of W4A8 weights span more than 15 powers of two, which FP8 kernels cannot hold exactly.
        FormatError: the tensors do not fit the shape.
    """
    require_matrix(packed).check_shapes()
    arranged: DeviceWeight = cuda.module("weight", "to_device").to_device(packed, device, least_memory)
    return arranged


def device_weight(
    buffers: Mapping[str, Any], pattern: Any, scheme: Any, shape: tuple[int, int], device: int | None = None
) -> DeviceWeight:
    """A weight of buffers that `to_device` made, or of copies of them in the caller's memory, which is held.

    Args:
        buffers: all of `DeviceWeight.buffers`, as CuPy arrays or others on that GPU.
        pattern, scheme, shape: of the packed weight.
        device: number of the GPU, which must be the current one; by default it.

    Raises:
        OperandError: an argument of the wrong type, a shape of a stack, a device that is not current, or a buffer that CuPy
            cannot view, or that is not of the size that this weight has there.
        UnsupportedError: as for `to_device`.
    """
    require_matrix_shape(shape)
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise OperandError(f"shape: {shown(shape)} must be (n, k), that of the packed weight")
    n, k = (whole_number("shape", size, 0) for size in shape)
    made: DeviceWeight = cuda.module("weight", "device_weight").device_weight(
        buffers, Scheme.of(scheme).pattern(pattern), Scheme.of(scheme), (n, k), device
    )
    return made


def operand_bytes(m: int, k: int, pattern: Any, scheme: Any, capability: tuple[int, int] | None) -> tuple[int, bool]:
    """Bytes of x [m, k] as `DeviceWeight.quantize` writes it on a GPU of this compute capability, and whether it has scales.

    Args:
        m: an integer, symbolic while a graph is traced.
        capability: None: on the CPU, rows of quantized values.
    """
    found = Scheme.of(scheme).kernel
    if capability is None:
        return m * k * found.dtype.bits // 8, found.scaled
    return for_capability(capability, scheme=found).operand(found.pattern(pattern), k, found).bytes(m), found.scaled


def workspace_bytes(m: int, packed: PackedWeight | DeviceWeight, out_dtype: Any) -> int:
    """Bytes of a workspace for `matmul` of m tokens into `out_dtype` on the current GPU; the kernel is compiled on the way.

    Raises:
        OperandError: m or out_dtype that cannot be.
        UnsupportedError: there is no GPU, no CuPy, or a GPU that does not multiply such weights.
    """
    _require_weight(packed)
    return int(_gemm("workspace_bytes").workspace_bytes(m, packed, out_dtype))


def quantize(
    x: Any,
    packed: PackedWeight | DeviceWeight | Pattern | str | tuple[int, int],
    dtype: Any = None,
    *,
    stream: Any = None,
) -> QuantizedActivations:
    """Quantize activations once, for several products with weights of one pattern and type (q/k/v, gate/up).

    On a GPU of compute capability 9.0, 10.0 or 10.3 they are laid out as its kernel wants them in the same pass, so that
    `matmul` is one launch for weights of the same pattern; for weights of another pattern it lays them out again.

    Args:
        x: [..., k] float32, float16 or bfloat16.
        packed: weights that x will be multiplied by, or their pattern; then `dtype` is needed too.
        dtype: of the weights; by default that of `packed`. For 16-bit weights x is rounded to their type.
        stream: as for `matmul`.

    Returns:
        Values [m, k]; for 8-bit types scales [m, 1], one a token. A token that holds NaN or infinity has scale NaN and zeros.

    Raises:
        OperandError: an operand of the wrong type or shape.
        FormatError: the tensors of `packed` do not fit its shape.
        UnsupportedError: as for `matmul`.
    """
    return _operand(x, packed, dtype, stream)[0]


def rms_norm(
    x: Any,
    gamma: Any,
    epsilon: float,
    packed: PackedWeight | DeviceWeight | Pattern | str | tuple[int, int],
    dtype: Any = None,
    *,
    residual: Any = None,
    stream: Any = None,
) -> QuantizedActivations | tuple[QuantizedActivations, Any]:
    """`quantize` of RMSNorm(x + residual) * gamma, with the numbers of `reference.rms_norm`.

    On a GPU it is one launch for bfloat16 and float16, where rows are whole 16-byte vectors (k a multiple of 8); else several.

    Args:
        x: [..., k] float32, float16 or bfloat16.
        gamma: [k] of x's type.
        epsilon: added to the mean of squares.
        packed, dtype, stream: as for `quantize`.
        residual: array like x.

    Returns:
        As `quantize`; with a residual, a pair: that, and x + residual, rounded to x's type.

    Raises:
        As `quantize`.
    """
    quantized, kept = _operand(x, packed, dtype, stream, Before("rms_norm", gamma, epsilon, residual))
    return quantized if residual is None else (quantized, kept)


def silu_and_mul(
    x: Any, packed: PackedWeight | DeviceWeight | Pattern | str | tuple[int, int], dtype: Any = None, *, stream: Any = None
) -> QuantizedActivations:
    """`quantize` of silu(gate) * up, x [..., 2k] being gate beside up; as `rms_norm`, with the numbers of `reference`."""
    return _operand(x, packed, dtype, stream, Before("silu_and_mul"))[0]


def gelu_and_mul(
    x: Any, packed: PackedWeight | DeviceWeight | Pattern | str | tuple[int, int], dtype: Any = None, *, stream: Any = None
) -> QuantizedActivations:
    """`silu_and_mul` with GELU in its tanh form."""
    return _operand(x, packed, dtype, stream, Before("gelu_and_mul"))[0]


def _operand(x: Any, packed: Any, dtype: Any, stream: Any, before: Before | None = None) -> tuple[QuantizedActivations, Any]:
    """x, or what is made of it before, quantized; and what is kept of that, the sum with a residual."""
    require_unmasked("x", x)
    weights = packed if _is_weight(packed) else None
    if weights is not None:
        _require_weight(weights)
        pattern, scheme = weights.pattern, weights.scheme
        if not isinstance(scheme, Scheme):
            require_packed(weights).check_shapes()  # which says so
        if dtype is not None and Scheme.of(dtype) != scheme:
            raise OperandError(f"dtype: {Scheme.of(dtype)} is not {scheme}, the type of packed; leave it out")
    else:
        if packed is None:
            raise OperandError("packed: is missing; pass the weights that x will be multiplied by, or their pattern and type")
        if dtype is None:
            raise OperandError("dtype: is missing; with a pattern instead of packed weights, pass their type, such as 'int8'")
        scheme = Scheme.of(dtype)
        pattern = scheme.pattern(packed)
    if scheme.lift_first:
        raise UnsupportedError(
            f"dtype: {scheme} activations are quantized in the product, after they are lifted; give it x itself"
        )
    if isinstance(x, np.ndarray):
        if weights is not None:
            require_packed(weights).check_shapes()
        _require_no_stream(stream)
        k, kept = None if weights is None else weights.k, None
        if before is None:
            check_activations(x, k)
        else:
            _require_numpy(gamma=before.gamma, residual=before.residual)
            before.check(x, k)
        lead, flat = _flat(x)
        if before is not None:
            flat, kept = before(flat)
            kept = None if kept is None else kept.reshape(x.shape)
        values, scale = _quantized(flat, scheme)
        stored = scheme.activations.element
        return QuantizedActivations(flat.copy() if values is flat else values, scale, lead, stored, x.dtype), kept
    if _on_gpu(x):
        if stream is None and _is_tensor(x):
            stream = sys.modules["torch"].cuda.current_stream(x.device)
        quantized, kept = _gemm("quantize").quantize(x, pattern, scheme.kernel.dtype, weights, stream, before)
        if kept is not None and _is_tensor(x):
            kept = sys.modules["torch"].from_dlpack(kept)
        return quantized, kept
    raise _no_array("x", x)


def _is_weight(packed: object) -> TypeGuard[PackedWeight | DeviceWeight]:
    """Whether it is a PackedWeight, or a DeviceWeight, whose module needs CuPy."""
    return isinstance(packed, PackedWeight) or (
        type(packed).__name__ == "DeviceWeight" and type(packed).__module__.startswith(__package__)
    )


def _require_weight(packed: object) -> None:
    if isinstance(packed, PackedWeight) or not _is_weight(packed):
        require_matrix(packed)


def _on_gpu(a: Any) -> bool:
    """`on_gpu`, which asks CuPy's arrays themselves where they are, and that takes a microsecond."""
    return type(a).__module__ == "cupy" or on_gpu(a)


def _is_tensor(x: object) -> bool:
    return "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor)


def _in_pytorch(x: Any, n: int, out: Any, out_dtype: Any, stream: Any) -> tuple[Any, Any]:
    """`out` and `stream` of a tensor x: by default a new tensor, and PyTorch's current stream."""
    torch = sys.modules["torch"]
    stream = torch.cuda.current_stream(x.device) if stream is None else stream
    if out is None:
        dtype = x.dtype if out_dtype is None else getattr(torch, float_dtype("out_dtype", out_dtype).name)
        address = cuda.module("arrays", "matmul").ForeignStream(stream).address
        with torch.cuda.stream(torch.cuda.ExternalStream(address, x.device)):  # whose memory it is
            out = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    return out, stream


def _gemm(what: str) -> Any:
    return cuda.module("matmul", what)


# ---- NumPy -------------------------------------------------------------------------------------------------------


def _matmul_numpy(
    x: Array | QuantizedActivations, packed: PackedWeight, bias: Any, out: Any, out_dtype: Any, stream: Any
) -> Array:
    _require_no_stream(stream)
    packed.check_shapes()
    _require_numpy(**{"packed.values": packed.values, "bias": bias, "out": out})
    if isinstance(x, QuantizedActivations):
        if not isinstance(x.scale, np.ndarray | None):
            raise OperandError(f"x.scale: {type(x.scale).__name__} must be a NumPy array, as x.values is")
        x.check(packed, x.values, x.scale)
        given, scale_x = x.values, x.scale
        lead, source = x.lead, float_dtype("x.source", x.source)
        values = x.values.view(packed.scheme.activations.element.numpy)
    else:
        check_activations(x, packed.k)
        given, scale_x, source = x, None, x.dtype
        lead, values = _flat(x)
    if bias is not None:
        check_bias(bias, packed.n)
    result = _result((*lead, packed.n), source, out, out_dtype)
    if out is not None:
        for name, array in (("x", given), ("x.scale", scale_x), ("bias", bias)):
            if array is not None and share_memory(out, array):
                raise overlapping(name)
    if scale_x is None and not packed.scheme.lift_first:
        values, scale_x = _quantized(values, packed.scheme)
    flat_result = result.reshape(values.shape[0], packed.n) if result.flags.c_contiguous else None
    y = np.empty((values.shape[0], packed.n), result.dtype) if flat_result is None else flat_result
    with np.errstate(over="ignore"):
        bias32 = None if bias is None else bias.astype(np.float32)
    cpu_matmul.matmul(values, scale_x, packed, bias32, y)
    if flat_result is None:
        result[...] = y.reshape(result.shape)
    return result


def _require_numpy(**operands: Any) -> None:
    for name, array in operands.items():
        if array is not None and not isinstance(array, np.ndarray):
            raise OperandError(f"{name}: {type(array).__name__} must be a NumPy array, as x is")
        require_unmasked(name, array)


def _require_no_stream(stream: object) -> None:
    if stream is not None:
        raise OperandError(f"stream: {stream!r} must be None for NumPy arrays, which have no streams")


def _no_array(name: str, value: object) -> OperandError:
    return OperandError(
        f"{name}: {type(value).__name__} is not an array; pass a NumPy array, or one on a GPU: [..., k], float32, float16"
        " or bfloat16"
    )


def _flat(x: Array) -> tuple[tuple[int, ...], Array]:
    """Leading dimensions, and x as [m, k]."""
    lead = x.shape[:-1]
    return lead, np.asarray(x).reshape(math.prod(lead), x.shape[-1])


def _quantized(x: Array, scheme: Scheme) -> tuple[Array, Array | None]:
    """x [m, k] as the scheme stores activations: quantized, with its scales [m, 1]; or rounded, x itself if it is so."""
    dtype = scheme.activations.element
    if scheme.activations.row_scale:
        return kernels.quantize(kernels.to_float32(x), dtype)
    return x if x.dtype == dtype.numpy else kernels.round16(kernels.to_float32(x), dtype), None


def _result(shape: tuple[int, ...], source: np.dtype[Any], out: Array | None, out_dtype: Any) -> Array:
    """`out`, checked, or a new array."""
    dtype = result_dtype(shape, source, out, out_dtype)
    if out is None:
        return np.empty(shape, dtype)
    if not out.flags.writeable:
        raise OperandError("out: is read-only; pass a writable array")
    return out
