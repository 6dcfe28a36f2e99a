"""Scheme: how the weights and the activations of a product are stored and scaled, as rows of one table.

    scheme       weights        their scales              activations            their scales                sums
    INT8_W8A8    int8           float32 a row             int8, then lifted      float32 a token             int32
    FP8_DYNAMIC  float8_e4m3fn  float32 a row             e4m3, then lifted      float32 a token             float32
    BF16         bfloat16       none                      bfloat16, then lifted  none                        float32
    FP16         float16        none                      float16, then lifted   none                        float32
    W4A8         float4_e2m1fn  e8m0 a block and float32  e4m3, then lifted      float32 a token             float32
    NVFP4        pairs of e2m1  e4m3 a block and float32  lifted, then e2m1      e4m3 a block and float32    float32
    MXFP4        pairs of e2m1  e8m0 a block and float32  lifted, then e2m1      e8m0 a block and float32    float32

Code elsewhere asks a scheme's properties, never its name: what the table lacks is an error.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import OperandError, shown
from .dtypes import BFLOAT16, EXPONENT8, FLOAT4, FLOAT8, FLOAT16, FLOAT32, INT8, DType
from .pattern import Pattern


@dataclass(frozen=True)
class Block:
    """Scales of runs of the expanded k, each within the scale of its row.

    Attributes:
        columns: of the expanded k that share a scale. Each holds one lifted activation, every second one a stored weight.
        scale: type of the scales.
        largest, smallest: scale of the block that holds the absmax of its row; and of a block of zeros.
        up: scales are rounded up to a power of two, so that no value is clipped; otherwise to nearest even.
    """

    columns: int
    scale: DType
    largest: float
    smallest: float
    up: bool


@dataclass(frozen=True)
class Storage:
    """How one operand's numbers are stored.

    Attributes:
        element: type of the values.
        row_scale: every row (output, token) has a float32 scale.
        block: further scales along k; None if there are none.
    """

    element: DType
    row_scale: bool = True
    block: Block | None = None

    @property
    def limit(self) -> float:
        """t of the format page: what the largest magnitude of a row becomes when the row is divided by its scale."""
        if not self.row_scale:
            return 1.0
        return self.element.largest * (self.block.largest if self.block else 1.0)


@dataclass(frozen=True)
class Scheme:
    """How the weights and the activations of a product are stored and scaled; a row of `SCHEMES`.

    Attributes:
        name: as compressed-tensors names its presets.
        weights, activations: their storage.
        lift_first: activations are lifted and then quantized, as scales along k demand; otherwise quantized and then lifted.
        accumulator: dtype of the sums of products.
        unit: elements that share one metadata position: 1, or 2 where the hardware keeps pairs.
        multiplied_as: a scheme of the same activations whose kernels multiply it on GPUs, converted exactly; None: its own.
    """

    name: str
    weights: Storage
    activations: Storage
    lift_first: bool = False
    accumulator: np.dtype[Any] = FLOAT32
    unit: int = 1
    multiplied_as: Scheme | None = None

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        """The name that files and messages use: that of the weights' type, where it tells the scheme."""
        return self.name if self.blocks else self.dtype.name

    @property
    def dtype(self) -> DType:
        """Element type of the weights."""
        return self.weights.element

    @property
    def scaled(self) -> bool:
        """Values are quantized: weights and activations have a float32 scale a row."""
        return self.weights.row_scale

    @property
    def blocks(self) -> bool:
        """Weights have scales along k, within those of the rows."""
        return self.weights.block is not None

    @property
    def kernel(self) -> Scheme:
        """The scheme whose kernels multiply it on a GPU, for which arch/multiplied_as.py converts the weights."""
        return self.multiplied_as or self

    @classmethod
    def of(cls, value: object, operand: str = "dtype") -> Scheme:
        """The scheme of a name ("int8", "fp8", "INT8_W8A8", "nvfp4" ...), a `DType` or NumPy dtype of weights, or a `Scheme`.

        Args:
            operand: what errors call it.

        Raises:
            OperandError: `value` is none, or a type that several schemes store.
        """
        if isinstance(value, Scheme):
            return value
        key: Any = value
        if isinstance(value, str):
            key = value.lower()
        elif not isinstance(value, DType):
            with contextlib.suppress(TypeError, ValueError):
                key = None if value is None else np.dtype(value).name  # type: ignore[call-overload]
        with contextlib.suppress(TypeError):  # what cannot be hashed names nothing
            if len(found := _BY_KEY.get(key, [])) == 1:
                return found[0]
            if found:
                *first, last = (scheme.name for scheme in found)
                told = f"{', '.join(first)} and {last}"
                raise OperandError(f"{operand}: {shown(str(value))} is the type of {told}; name one of them")
        names = ", ".join(map(str, SCHEMES.values()))
        told = shown(str(value) if isinstance(value, DType) else value)
        raise OperandError(f"{operand}: {told} is not a packed type; it must be one of {names}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Those of every scheme."""
        return tuple(SCHEMES)

    def pattern(self, value: Pattern | str | tuple[int, int]) -> Pattern:
        """The pattern that `value` names, over the scheme's unit: with NVFP4 "6:8" and "6:8 pairs" are the same.

        Raises:
            OperandError: `value` is no pattern, or one over pairs where the scheme keeps single columns.
        """
        pattern = Pattern.of(value)
        if pattern.unit > self.unit:
            one = f"{pattern.nnz}:{pattern.group}"
            raise OperandError(f"pattern: {pattern} must be over single columns, as {self} keeps them; pass '{one}'")
        return replace(pattern, unit=self.unit)

    def slice_unit(self, pattern: Pattern) -> int:
        """Columns of k after which values, metadata and block scales all start anew, so that k may be cut there."""
        unit = pattern.slice_unit
        if self.weights.block is None:
            return unit
        ks = pattern.expanded_k(unit)
        return unit * (math.lcm(ks, self.weights.block.columns) // ks)


_E4M3 = Storage(FLOAT4, True, Block(32, FLOAT8, 448.0, 2.0**-9, up=False))
_E8M0 = Storage(FLOAT4, True, Block(64, EXPONENT8, 1.0, 2.0**-126, up=True))  # the smallest normal float32

_FP8 = Scheme("FP8_DYNAMIC", Storage(FLOAT8), Storage(FLOAT8))

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("INT8_W8A8", Storage(INT8), Storage(INT8), accumulator=np.dtype(np.int32)),
        _FP8,
        Scheme("BF16", Storage(BFLOAT16, False), Storage(BFLOAT16, False)),
        Scheme("FP16", Storage(FLOAT16, False), Storage(FLOAT16, False)),
        Scheme("W4A8", _E8M0, Storage(FLOAT8), multiplied_as=_FP8),
        Scheme("NVFP4", _E4M3, _E4M3, lift_first=True, unit=2),
        Scheme("MXFP4", _E8M0, _E8M0, lift_first=True, unit=2),
    )
}
"""Every scheme, by name."""

_BY_KEY: dict[object, list[Scheme]] = {}
for _scheme in SCHEMES.values():
    for _key in (_scheme.name.lower(), _scheme.dtype, _scheme.dtype.name):
        _BY_KEY.setdefault(_key, []).append(_scheme)
_BY_KEY["fp8"] = _BY_KEY["float8"] = [SCHEMES["FP8_DYNAMIC"]]
