"""PyTorch's operators over packed weights, torch.ops.slidesparse.

    linear = quantize, then product;  rms_norm_linear, silu_and_mul_linear, gelu_and_mul_linear: what comes before, too

Results, scratch memory and arranged weights are PyTorch's memory, in PyTorch's current stream. Weights are operands of the
operators, never addresses or counters in a graph, so that compiled graphs may be cached on disk and shared by layers.

`Library.define` and `impl` cost a call about half of what `torch.library.custom_op` does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import slidesparse_nb as ss

from .tensors import NUMPY, WEIGHTS, as_numpy, device_weight, from_numpy, numpy_type, packed_of

FLOATS = {torch.float32: ("float32", 4, 4), torch.float16: ("float16", 2, 3), torch.bfloat16: ("bfloat16", 2, 2)}
"""Types of activations, results and biases -> name, bytes, code of the kernels."""


# ---- operators -------------------------------------------------------------------------------------------------------
#
# weight: what `arrange` made; on the CPU the tensors of `PACKED` that the scheme has, but weight_shape. facts: pattern and
# scheme, "6:8 int8".

LIBRARY = torch.library.Library("slidesparse", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIBRARY.define("linear(Tensor x, Tensor[] weight, Tensor? bias, int n, int k, str facts) -> Tensor", tags=_TAGS)
LIBRARY.define("quantize(Tensor x, Tensor[] weight, int n, int k, str facts) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    "rms_norm_linear(Tensor x, Tensor? residual, Tensor gamma, float epsilon, Tensor[] weight, Tensor? bias, int n, int k,"
    " str facts) -> (Tensor, Tensor)",
    tags=_TAGS,
)
GATES = {
    "silu_and_mul": torch.nn.functional.silu,
    "gelu_and_mul": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}
for _kind in GATES:
    LIBRARY.define(f"{_kind}_linear(Tensor x, Tensor[] weight, Tensor? bias, int n, int k, str facts) -> Tensor", tags=_TAGS)
LIBRARY.define(
    "product(Tensor operand, Tensor scale, Tensor[] weight, Tensor? bias, ScalarType out, int n, int k, str facts) -> Tensor",
    tags=_TAGS,
)
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_take: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)
_give: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", None)
"""Scratch memory of PyTorch's allocator: what torch.cuda.caching_allocator_alloc calls, at a tenth of a tensor's cost."""


def _known(weight: Sequence[Tensor], n: int, k: int, facts: str) -> Any:
    """The DeviceWeight, on the device of x, which is made the current one by the caller."""
    found = WEIGHTS.get((weight[0].data_ptr(), n, k, facts))
    if found is None:
        _require_no_capture("x: this weight was not multiplied by anything")
        found = device_weight(weight, n, k, facts)
    return found


def _require_no_capture(what: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise ss.OperandError(
            f"{what} before the capture of a CUDA graph, which may not compile kernels; run each number of tokens once first"
        )


def _bound(there: Any, m: int, out: str) -> Any:
    """The plan for m tokens; compiled kernels and addresses are found before a CUDA graph is captured, not while."""
    if (bound := there.plans.get((m, out))) is None:
        _require_no_capture(f"x: {m} tokens were not multiplied by this weight")
        bound = there.bound(m, out)
    return bound


def _check(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, n: int, k: int) -> int:
    """m; OperandError unless x and bias are operands, where the weight is."""
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] != k:
        raise ss.OperandError(f"x: {x.dtype} {tuple(x.shape)} must be float32, float16 or bfloat16, of shape [..., {k}]")
    require_no_grad(x)
    _check_places(x, weight, bias, n)
    return x.numel() // k if k else x.shape[:-1].numel()


def require_no_grad(x: Tensor) -> None:
    """OperandError where a gradient would be lost; graphs of torch.compile ask before they are traced, not in the operator."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ss.OperandError("x: requires grad, but packed linears are for inference only; call under torch.no_grad()")


def _check_places(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, n: int) -> None:
    """OperandError unless the weight is where x is, and the bias fits."""
    _require_place(x, weight)
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,) or bias.device != x.device):
        raise ss.OperandError(
            f"bias: {bias.dtype} {tuple(bias.shape)} on {bias.device} must be float32, float16 or bfloat16, [{n}], on"
            f" {x.device}"
        )


def _require_place(x: Tensor, weight: Sequence[Tensor]) -> None:
    """OperandError unless they are on one device; fake operators ask, too, which a weight on the meta device calls."""
    if weight[0].device != x.device:
        raise ss.OperandError(f"x: is on {x.device}, the weight on {weight[0].device}; move one of them")


def _rows(x: Tensor, m: int, k: int, size: int) -> tuple[Tensor, tuple[int, int]]:
    """x as [m, k], and its strides in bytes."""
    if x.dim() != 2:
        x = x.reshape(m, k)
    rows, columns = x.stride()
    return x, ((k if m == 1 else rows) * size, columns * size)


def _few(there: Any, x: Tensor, strides: tuple[int, int], bias: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The product, of this shape, of few tokens x [m, k] that its kernel quantizes; None where it does not."""
    m, (name, _, _), at = len(x), FLOATS[x.dtype], x.data_ptr()
    if not there.quantizes(m, name, name, strides, at):
        return None
    if (m, name) not in there.unquantized:
        _require_no_capture(f"x: {m} tokens were not multiplied by this weight")
    y, (bias_at, code) = x.new_empty(shape), (0, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype][2])
    stream = _stream(x.get_device())
    there.multiply(there.bound(m, name, True), at, strides[0], 0, y.data_ptr(), there.n, 0, stream, bias_at, code)
    return y


def _linear_cuda(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, n: int, k: int, facts: str) -> Tensor:
    m, shape = _check(x, weight, bias, n, k), (*x.shape[:-1], n)
    if not m or not n:
        return x.new_empty(shape)
    there = _known(weight, n, k, facts)
    name, size, _ = FLOATS[x.dtype]
    x, strides = _rows(x, m, k, size)
    if (few := _few(there, x, strides, bias, shape)) is not None:
        return few
    y, at, stream = x.new_empty(shape), x.data_ptr(), _stream(x.get_device())
    if (name, strides, at % 16) not in there.writers:
        _require_no_capture(f"x: tokens with strides {x.stride()} were not multiplied by this weight")
    bias_at, code = (0, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype][2])
    scratch = _take(_bound(there, m, name).plan.bytes, stream)
    try:
        there.linear(m, at, name, strides, y.data_ptr(), n, name, scratch, stream, bias_at, code)
    finally:
        _give(scratch)
    return y


def _linear_cpu(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, n: int, k: int, facts: str) -> Tensor:
    _check(x, weight, bias, n, k)
    packed = packed_of(weight, n, k, facts)
    return from_numpy(ss.matmul(as_numpy(x), packed, bias=None if bias is None else as_numpy(bias)))


def _linear_fake(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, n: int, k: int, facts: str) -> Tensor:
    _require_place(x, weight)
    return x.new_empty((*x.shape[:-1], n))


def _quantize_cuda(x: Tensor, weight: Sequence[Tensor], n: int, k: int, facts: str) -> tuple[Tensor, Tensor]:
    m = _check(x, weight, None, n, k)
    there = _known(weight, n, k, facts)
    operand, scale = x.new_empty(there.operand.bytes(m), dtype=torch.uint8), _scale(x, m, there.scaled)
    name, size, _ = FLOATS[x.dtype]
    if m:
        rows, strides = _rows(x, m, k, size)
        there.quantize(m, rows.data_ptr(), name, strides, operand.data_ptr(), scale.data_ptr(), _stream(x.get_device()))
    return operand, scale


def _quantize_cpu(x: Tensor, weight: Sequence[Tensor], n: int, k: int, facts: str) -> tuple[Tensor, Tensor]:
    _check(x, weight, None, n, k)
    q = ss.quantize(as_numpy(x), packed_of(weight, n, k, facts))
    values = torch.from_numpy(q.values.view(np.uint8).reshape(-1))
    return values, _scale(x, len(q.values), False) if q.scale is None else torch.from_numpy(q.scale[:, 0].copy())


def _quantize_fake(x: Tensor, weight: Sequence[Tensor], n: int, k: int, facts: str) -> tuple[Tensor, Tensor]:
    m = math.prod(x.shape[:-1])  # Size.numel would fix a symbolic number of tokens
    _require_place(x, weight)
    pattern, dtype = facts.rsplit(" ", 1)
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    size, scaled = ss.operand_bytes(m, k, pattern, dtype, capability)
    return x.new_empty(size, dtype=torch.uint8), _scale(x, m, scaled)


def _rms_norm(x: Tensor, residual: Tensor | None, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and that sum, rounded to x's type (empty without a residual); as vLLM defines them."""
    h = x.float() if residual is None else x.float() + residual.float()
    kept = x.new_empty(0) if residual is None else h.to(x.dtype)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)
    return (h.to(gamma.dtype) * gamma).to(x.dtype), kept


def _gate_and_mul(kind: str, x: Tensor) -> Tensor:
    """SiLU or GELU of the first half of x's columns, times the second."""
    gate, up = x.chunk(2, -1)
    made: Tensor = GATES[kind](gate) * up
    return made


def _rms_norm_linear_cuda(
    x: Tensor, residual: Tensor | None, gamma: Tensor, epsilon: float, weight: Sequence[Tensor], bias: Tensor | None, n: int,
    k: int, facts: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _fits(x, k) and _goes_with(gamma, x, (k,)) and (residual is None or _goes_with(residual, x, x.shape)):
        there = _known(weight, n, k, facts)
        kept = x.new_empty(0) if residual is None else torch.empty_like(residual)
        added, sums = (0, 0) if residual is None else (residual.data_ptr(), kept.data_ptr())
        kind, given = "add_rms_norm" if added else "rms_norm", (added, gamma.data_ptr(), sums, epsilon)
        if (y := _fused(there, kind, there.rms_norm, x, given, weight, bias)) is not None:
            return y, kept
    return _rms_norm_linear(x, residual, gamma, epsilon, weight, bias, n, k, facts)


def _gate_and_mul_linear_cuda(
    kind: str, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, n: int, k: int, facts: str
) -> Tensor:
    if _fits(x, 2 * k):
        there = _known(weight, n, k, facts)
        if (y := _fused(there, kind, functools.partial(there.gate_and_mul, kind), x, (), weight, bias)) is not None:
            return y
    return _gate_and_mul_linear(kind, x, weight, bias, n, k, facts)


def _fits(x: Tensor, columns: int) -> bool:
    """Whether a kernel may take it: whole 16-byte vectors of a 16-bit type, some tokens."""
    shape, strides = x.shape, x.stride()
    return (
        len(shape) == 2 and shape[1] == columns and shape[0] > 0 and x.element_size() == 2
        and strides[1] == 1 and strides[0] % 8 == 0 and x.data_ptr() % 16 == 0
    )  # fmt: skip


def _goes_with(a: Tensor, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether a kernel may read it beside x."""
    return a.shape == shape and a.dtype is x.dtype and a.is_contiguous() and a.data_ptr() % 16 == 0


def _fused(
    there: Any, kind: str, write: Callable[..., bool], x: Tensor, given: tuple[Any, ...], weight: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The product of what `write`, the DeviceWeight's, makes of x; None, and nothing is launched, where no kernel does that.

    Args:
        kind: of `there.fused`; given: arguments of `write` between the rows of x and where it writes.
    """
    _check_places(x, weight, bias, there.n)
    m, (name, _, _), pitch, stream = x.shape[0], FLOATS[x.dtype], x.stride(0) * 2, _stream(x.get_device())
    if (name, pitch, kind) not in there.fused:
        _require_no_capture(f"x: rows of {pitch} bytes were not given to {kind} of this weight")
    bound, y = _bound(there, m, name), x.new_empty((m, there.n))
    bias_at, code = (0, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype][2])
    scratch = _take(bound.plan.bytes, stream)
    try:
        scale = scratch + bound.plan.scale_at if there.scaled else 0
        if not write(m, x.data_ptr(), name, pitch, *given, scratch, scale, stream):
            return None
        there.multiply(bound, scratch, bound.plan.operand.pitch, scale, y.data_ptr(), there.n, scratch, stream, bias_at, code)
    finally:
        _give(scratch)
    return y


def _scale(x: Tensor, m: int, scaled: bool) -> Tensor:
    """Memory for a scale of each of m tokens; without scales it tells m alone."""
    return x.new_empty((m,) if scaled else (m, 0), dtype=torch.float32)


def _rms_norm_linear(
    x: Tensor, residual: Tensor | None, gamma: Tensor, epsilon: float, weight: Sequence[Tensor], bias: Tensor | None, n: int,
    k: int, facts: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, kept = _rms_norm(x, residual, gamma, epsilon)
    return torch.ops.slidesparse.linear(y, weight, bias, n, k, facts), kept


def _rms_norm_linear_fake(
    x: Tensor, residual: Tensor | None, gamma: Tensor, epsilon: float, weight: Sequence[Tensor], bias: Tensor | None, n: int,
    k: int, facts: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _linear_fake(x, weight, bias, n, k, facts), x.new_empty(0) if residual is None else torch.empty_like(x)


def _gate_and_mul_linear(
    kind: str, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, n: int, k: int, facts: str
) -> Tensor:
    y: Tensor = torch.ops.slidesparse.linear(_gate_and_mul(kind, x), weight, bias, n, k, facts)
    return y


def _check_out(out: torch.dtype) -> None:
    if out not in FLOATS:
        raise ss.OperandError(f"out: {out} must be float32, float16 or bfloat16")


def _product_cuda(
    operand: Tensor,
    scale: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    out: torch.dtype,
    n: int,
    k: int,
    facts: str,
) -> Tensor:
    _check_out(out)
    m, (name, _, _) = len(scale), FLOATS[out]
    _check_places(operand, weight, bias, n)
    y = operand.new_empty((m, n), dtype=out)
    if m and n:
        there = _known(weight, n, k, facts)
        bound = _bound(there, m, name)
        if operand.nbytes != bound.plan.scale_at or operand.data_ptr() % 16:
            raise ss.OperandError(f"operand: {operand.nbytes} bytes must be {bound.plan.scale_at}; make it with quantize(x)")
        bias_at, code = (0, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype][2])
        stream, needed = _stream(operand.get_device()), bound.plan.bytes - bound.plan.parts_at
        scratch = _take(needed, stream) if needed else bound.plan.parts_at
        try:
            there.multiply(
                bound, operand.data_ptr(), bound.plan.operand.pitch, scale.data_ptr(), y.data_ptr(), n,
                scratch - bound.plan.parts_at, stream, bias_at, code,
            )  # fmt: skip
        finally:
            if needed:
                _give(scratch)
    return y


def _product_cpu(
    operand: Tensor,
    scale: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    out: torch.dtype,
    n: int,
    k: int,
    facts: str,
) -> Tensor:
    _check_out(out)
    _check_places(operand, weight, bias, n)
    packed = packed_of(weight, n, k, facts)
    m = len(scale)
    stored = packed.scheme.activations.element
    values = as_numpy(operand).view(stored.numpy).reshape(m, k)
    scales = as_numpy(scale).reshape(m, 1) if packed.scheme.scaled else None
    source = np.dtype(numpy_type("bfloat16") if out == torch.bfloat16 else NUMPY[out])
    q = ss.QuantizedActivations(values, scales, (m,), stored, source)
    return from_numpy(ss.matmul(q, packed, bias=None if bias is None else as_numpy(bias)))


def _product_fake(
    operand: Tensor,
    scale: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    out: torch.dtype,
    n: int,
    k: int,
    facts: str,
) -> Tensor:
    _require_place(operand, weight)
    return operand.new_empty((scale.shape[0], n), dtype=out)


def _there(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator on the device of its first operand: nearly always the current one, and to ask costs less than to set."""

    def called(x: Tensor, *others: Any) -> Any:
        if (device := x.get_device()) == _device():
            return operator(x, *others)
        with torch.cuda.device(device):
            return operator(x, *others)

    return called


def _implement(name: str, cuda: Callable[..., Any], cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.impl(name, _there(cuda), "CUDA")
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY._register_fake(name, fake)


_implement("linear", _linear_cuda, _linear_cpu, _linear_fake)
_implement("quantize", _quantize_cuda, _quantize_cpu, _quantize_fake)
_implement("product", _product_cuda, _product_cpu, _product_fake)
_implement("rms_norm_linear", _rms_norm_linear_cuda, _rms_norm_linear, _rms_norm_linear_fake)
for _kind in GATES:
    _cuda, _cpu = (functools.partial(gate, _kind) for gate in (_gate_and_mul_linear_cuda, _gate_and_mul_linear))
    _implement(f"{_kind}_linear", _cuda, _cpu, _linear_fake)
