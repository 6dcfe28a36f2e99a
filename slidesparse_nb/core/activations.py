"""QuantizedActivations: activations quantized once, to be multiplied by several packed weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OperandError
from . import reference
from .checks import check_activations, number
from .dtypes import FLOAT32, FLOATS, DType


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """Activations quantized once, or rounded for 16-bit weights, to be multiplied by several weights (q/k/v, gate/up).

    Attributes:
        values: [m, k] of `dtype`, or its bits, one row a token; leading dimensions of x are flattened into m.
        scale: [m, 1] float32, x ~= values * scale; None for 16-bit types.
        lead: the leading dimensions of x, whose product is m.
        dtype: a packed type.
        source: the dtype x had; what `matmul` returns unless told otherwise.

    On a GPU whose kernel loads tiles, `quantize` makes those instead; `values` are then recovered when they are asked for.
    """

    values: Any
    scale: Any
    lead: tuple[int, ...]
    dtype: DType
    source: np.dtype[Any]

    def __repr__(self) -> str:
        return f"QuantizedActivations({' x '.join(map(str, (*self.lead, self.k)))}, {self.dtype})"

    @property
    def m(self) -> int:
        return math.prod(self.lead)

    @property
    def k(self) -> int:
        return int(self.values.shape[1])

    @property
    def held(self) -> Any:
        """The array that is there already."""
        return self.values

    def check(self, packed: Any, values: Any, scale: Any) -> None:
        """Check that these can be multiplied by `packed`; nothing is looked at but types and shapes.

        Args:
            packed: a weight, which has a dtype and k.
            values: as the library that multiplies sees them; None if it takes tiles.
            scale: likewise.

        Raises:
            OperandError: they are of another type, or shapes do not agree.
        """
        dtype = packed.scheme.activations.element
        if self.dtype != dtype or packed.scheme.lift_first:
            raise OperandError(
                f"x: is quantized to {self.dtype}, but packed holds {packed.scheme}; quantize it with quantize(x, packed)"
            )
        m = self.m
        if values is not None and (values.ndim != 2 or values.shape[0] != m or values.dtype not in (dtype.numpy, dtype.raw)):
            raise OperandError(f"x.values: {values.dtype} {values.shape} must be {dtype} or its bits, [{m}, k]")
        if not packed.scheme.activations.row_scale:
            if scale is not None:
                raise OperandError(f"x.scale: {dtype} activations carry no scale; it must be None")
        elif getattr(scale, "shape", None) != (m, 1) or scale.dtype != FLOAT32 or not scale.flags.c_contiguous:
            raise OperandError(f"x.scale: must be a contiguous float32 array [{m}, 1], where x.values are")
        if self.k != packed.k:
            raise OperandError(f"x: k={self.k} must be {packed.k}, the k of packed (not padded: matmul does that)")


@dataclass(frozen=True, eq=False)
class Before:
    """What is done to x before it is quantized: `reference`'s function of that name.

    Attributes:
        kind: "rms_norm", "silu_and_mul" or "gelu_and_mul".
        gamma, epsilon, residual: operands of "rms_norm"; a residual, like x, is added to it first.
    """

    kind: str
    gamma: Any = None
    epsilon: float = 0.0
    residual: Any = None

    def check(self, x: Any, k: int | None) -> int:
        """The columns of the result; `k`: what they must be, None if they may be any. OperandError if operands do not fit."""
        if self.kind != "rms_norm":
            check_activations(x)
            if x.shape[-1] % 2 or k not in (None, x.shape[-1] // 2):
                wide = "2k" if k is None else f"{2 * k}, twice the k of packed"
                raise OperandError(f"x: shape {x.shape} must be [..., {wide}]: the gate, then what it multiplies")
            return int(x.shape[-1]) // 2
        check_activations(x, k)
        number("epsilon", self.epsilon, float(np.finfo(np.float32).max), "a number from 0 to the largest of float32")
        k = int(x.shape[-1])
        others = ("gamma", self.gamma, (k,)), ("residual", self.residual, x.shape)
        for name, array, shape in others:
            if array is None and name == "residual":
                continue
            found = getattr(array, "dtype", type(array).__name__), tuple(getattr(array, "shape", ()))
            if found != (x.dtype, tuple(shape)) or x.dtype not in FLOATS:
                raise OperandError(f"{name}: {found[0]} {found[1]} must be {x.dtype} {tuple(shape)}, as x is")
        return k

    def __call__(self, x: Any) -> tuple[Any, Any]:
        """x [m, k or 2k] -> [m, k], and the sum [m, k] of x and the residual, None without one."""
        if self.kind != "rms_norm":
            return getattr(reference, self.kind)(x), None
        residual = None if self.residual is None else self.residual.reshape(x.shape)
        y, kept = reference.rms_norm(x, self.gamma, self.epsilon, residual)
        return y, None if residual is None else kept
