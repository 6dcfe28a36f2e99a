"""QuantizedActivations: activations quantized once, to be multiplied by several packed weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OperandError
from .dtypes import FLOAT32, DType


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
