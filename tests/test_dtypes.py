"""The dtype table agrees with NumPy, ml_dtypes and safetensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from slidesparse_nb import OperandError
from slidesparse_nb.core.dtypes import CODE_OF, FLOAT8, INT8, NUMPY_OF, PACKED, SAFETENSORS_BITS, DType, packed_dtype


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_masks_tell_zero_and_infinite_apart_from_the_rest(dtype: DType) -> None:
    raw = np.arange(2**dtype.bits, dtype=dtype.raw)
    values = raw.view(dtype.numpy).astype(np.float32)
    masked = raw & dtype.raw.type(dtype.nonzero_mask)
    assert ((masked != 0) == (values != 0)).all()  # NaN != 0 too
    if dtype.inf_bits is None:
        assert np.isfinite(values).all()
    else:
        assert ((masked >= dtype.inf_bits) == ~np.isfinite(values)).all()


def test_largest_quantized_values() -> None:
    assert INT8.qmax == np.iinfo(np.int8).max
    assert FLOAT8.qmax == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    assert [d.qmax is None for d in PACKED] == [False, False, True, True]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_names(dtype: DType) -> None:
    for name in (dtype, dtype.name, dtype.name.upper(), dtype.scheme, dtype.scheme.lower(), dtype.numpy, dtype.numpy.type):
        assert packed_dtype(name) is dtype
    assert str(dtype) == dtype.numpy.name == np.dtype(dtype.name).name
    assert NUMPY_OF[dtype.safetensors] == dtype.numpy
    assert dtype.raw.kind == "u"
    assert dtype.raw.itemsize * 8 == dtype.bits


@pytest.mark.parametrize(
    ("alias", "name"), [("fp8", "float8_e4m3fn"), ("float8", "float8_e4m3fn"), ("bf16", "bfloat16"), ("FP16", "float16")]
)
def test_aliases(alias: str, name: str) -> None:
    assert packed_dtype(alias).name == name


@pytest.mark.parametrize(
    "name",
    ["float32", "", "int4", None, 3, np.float64, "uint8", object(), 10**5000],
    ids=lambda v: f"{v:.9}" if isinstance(v, str) else type(v).__name__,
)
def test_other_types_are_refused(name: object) -> None:
    with pytest.raises(OperandError, match="not a packed type; it must be one of int8, float8_e4m3fn, bfloat16, float16"):
        packed_dtype(name)


def test_safetensors_codes() -> None:
    for code, dtype in NUMPY_OF.items():
        assert SAFETENSORS_BITS[code] == dtype.itemsize * 8
        assert CODE_OF[dtype] == code
