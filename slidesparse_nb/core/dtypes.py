"""The one dtype table: NumPy (through ml_dtypes) <-> safetensors.

NumPy has no bfloat16, FP8 or FP4; `ml_dtypes` supplies them as ordinary NumPy dtypes. Code elsewhere never spells out
a safetensors code, a largest value or a bit mask: it asks this table. Which types are scaled, and how, `scheme` tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """A storage type of weights, activations or block scales.

    Attributes:
        name: NumPy's name of the type, e.g. "float8_e4m3fn"; also how it is spelt in files and arguments.
        numpy: the NumPy dtype of one element.
        safetensors: the code in a safetensors header, e.g. "F8_E4M3"; of a 4-bit type U8, two elements a byte, low first.
        largest: the largest magnitude that quantization writes; for 16-bit types the largest finite one.
        nonzero_mask: bits that tell a non-zero value; everything but the sign of a float, so that -0.0 counts as zero.
        inf_bits: smallest pattern under `nonzero_mask` that is NaN or infinity; None where every pattern is a number.
        bits: of one element.
    """

    name: str
    numpy: np.dtype[Any]
    safetensors: str
    largest: float
    nonzero_mask: int
    inf_bits: int | None
    bits: int

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def raw(self) -> np.dtype[Any]:
        """The unsigned integer of the same width: what `array.view(dtype.raw)` shows is the stored bits."""
        return np.dtype(f"u{self.numpy.itemsize}")

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of an array of packed values: `numpy`, or uint8 where a byte holds two elements."""
        return self.raw if self.bits < 8 else self.numpy

    def __str__(self) -> str:
        return self.name


INT8 = DType("int8", np.dtype(np.int8), "I8", 127.0, 0xFF, None, 8)
FLOAT8 = DType("float8_e4m3fn", np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3", 448.0, 0x7F, 0x7F, 8)
BFLOAT16 = DType("bfloat16", np.dtype(ml_dtypes.bfloat16), "BF16", 2.0**128 - 2.0**120, 0x7FFF, 0x7F80, 16)
FLOAT16 = DType("float16", np.dtype(np.float16), "F16", 65504.0, 0x7FFF, 0x7C00, 16)
FLOAT4 = DType("float4_e2m1fn", np.dtype(ml_dtypes.float4_e2m1fn), "U8", 6.0, 0x7, None, 4)
EXPONENT8 = DType("float8_e8m0fnu", np.dtype(ml_dtypes.float8_e8m0fnu), "F8_E8M0", 2.0**127, 0xFF, 0xFF, 8)
FLOAT32 = np.dtype(np.float32)

PACKED = (INT8, FLOAT8, BFLOAT16, FLOAT16)
"""The types of packed values that are stored one a column: those of version 1 of the format."""

FLOATS = {FLOAT32: "float32", FLOAT16.numpy: "float16", BFLOAT16.numpy: "bfloat16"}
"""The types of activations and results -> their names."""

SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element, for every code the safetensors format knows; enough to copy a tensor of any of them."""

_NUMPY_OF = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
    "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "C64": np.complex64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
NUMPY_OF = {code: np.dtype(t) for code, t in _NUMPY_OF.items()}
"""safetensors code -> NumPy dtype, for the codes that have one."""

CODE_OF = {t: code for code, t in NUMPY_OF.items()}
"""NumPy dtype -> safetensors code."""


CUDA_CODES = {"int8": 0, "float8_e4m3fn": 1, "bfloat16": 2, "float16": 3, "float32": 4, "float4_e2m1fn": 5}
"""dtype name -> TYPE_* of cuda_src/common/types.cuh."""
