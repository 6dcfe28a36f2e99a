"""The one dtype table: NumPy (through ml_dtypes) <-> safetensors <-> schemes.

NumPy has no bfloat16 and no FP8; `ml_dtypes` supplies them as ordinary NumPy dtypes. Code elsewhere never spells out
a safetensors code, a largest quantized value or a bit mask: it asks this table.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import OperandError, shown


@dataclass(frozen=True)
class DType:
    """A storage type of packed weights.

    Attributes:
        name: NumPy's name of the type, e.g. "float8_e4m3fn"; also how it is spelt in files and arguments.
        numpy: the NumPy dtype.
        safetensors: the code in a safetensors header, e.g. "F8_E4M3".
        scheme: the name that serving engines use for "weights and activations of this type".
        qmax: largest magnitude of a quantized value; None for 16-bit types, which carry no scale.
        nonzero_mask: bits that tell a non-zero value; everything but the sign of a float, so that -0.0 counts as zero.
        inf_bits: smallest pattern under `nonzero_mask` that is NaN or infinity; None where every pattern is a number.
    """

    name: str
    numpy: np.dtype[Any]
    safetensors: str
    scheme: str
    qmax: float | None
    nonzero_mask: int
    inf_bits: int | None

    @property
    def bits(self) -> int:
        return self.numpy.itemsize * 8

    @property
    def raw(self) -> np.dtype[Any]:
        """The unsigned integer of the same width: what `array.view(dtype.raw)` shows is the stored bits."""
        return np.dtype(f"u{self.numpy.itemsize}")

    def __str__(self) -> str:
        return self.name


INT8 = DType("int8", np.dtype(np.int8), "I8", "INT8_W8A8", 127.0, 0xFF, None)
FLOAT8 = DType("float8_e4m3fn", np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3", "FP8_DYNAMIC", 448.0, 0x7F, 0x7F)
BFLOAT16 = DType("bfloat16", np.dtype(ml_dtypes.bfloat16), "BF16", "BF16", None, 0x7FFF, 0x7F80)
FLOAT16 = DType("float16", np.dtype(np.float16), "F16", "FP16", None, 0x7FFF, 0x7C00)
FLOAT32 = np.dtype(np.float32)

PACKED = (INT8, FLOAT8, BFLOAT16, FLOAT16)
"""The types a packed weight may have."""

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


CUDA_CODES = {"int8": 0, "float8_e4m3fn": 1, "bfloat16": 2, "float16": 3, "float32": 4}
"""dtype name -> TYPE_* of cuda_src/common/types.cuh."""


def packed_dtype(name: object) -> DType:
    """The table row of a packed type, from its name ("int8", "fp8", "INT8_W8A8" ...), NumPy dtype or `DType`.

    Raises:
        OperandError: `name` is no packed type.
    """
    if isinstance(name, DType):
        return name
    text = name.lower() if isinstance(name, str) else ""
    text = {"fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "bf16": "bfloat16", "fp16": "float16"}.get(text, text)
    if not text:
        with contextlib.suppress(TypeError, ValueError):
            text = np.dtype(name).name  # type: ignore[call-overload]
    for row in PACKED:
        if text in (row.name, row.scheme.lower()):
            return row
    names = ", ".join(row.name for row in PACKED)
    raise OperandError(f"dtype: {shown(name)} is not a packed type; it must be one of {names}")
