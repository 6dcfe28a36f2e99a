"""The dtype table agrees with NumPy, ml_dtypes and safetensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from slidesparse_nb.core.dtypes import CODE_OF, EXPONENT8, FLOAT4, INT8, NUMPY_OF, PACKED, SAFETENSORS_BITS, DType


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


@pytest.mark.parametrize("dtype", [*PACKED, FLOAT4, EXPONENT8], ids=str)
def test_facts(dtype: DType) -> None:
    assert str(dtype) == dtype.numpy.name
    assert dtype.raw.kind == "u"
    assert dtype.raw.itemsize == -(-dtype.bits // 8)
    assert NUMPY_OF[dtype.safetensors] == dtype.stored
    if dtype is not INT8:
        assert dtype.largest == float(ml_dtypes.finfo(dtype.numpy).max)


def test_safetensors_codes() -> None:
    for code, dtype in NUMPY_OF.items():
        assert SAFETENSORS_BITS[code] == dtype.itemsize * 8
        assert CODE_OF[dtype] == code
