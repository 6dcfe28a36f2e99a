"""The table of schemes: every name finds its row, and what is missing is an error by name."""

from __future__ import annotations

import numpy as np
import pytest

from slidesparse_nb import OperandError, Pattern, Scheme
from slidesparse_nb.core.dtypes import FLOAT4, FLOAT8, INT8, PACKED, DType
from slidesparse_nb.core.scheme import SCHEMES


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_names(scheme: Scheme) -> None:
    for name in (scheme, scheme.name, scheme.name.lower(), str(scheme)):
        assert Scheme.of(name) is scheme
    assert scheme.dtype is scheme.weights.element
    aliases = {"fp8": "FP8_DYNAMIC", "float8": "FP8_DYNAMIC"}
    assert {alias: Scheme.of(alias).name for alias in aliases} == aliases


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_types_that_tell_their_scheme(dtype: DType) -> None:
    for name in (dtype, dtype.name, dtype.name.upper(), dtype.numpy, dtype.numpy.type):
        assert Scheme.of(name).dtype is dtype
    assert str(Scheme.of(dtype)) == dtype.name


@pytest.mark.parametrize(
    "name",
    ["float32", "", "int4", None, 3, np.float64, "uint8", [], object(), 10**5000],
    ids=lambda v: f"{v:.9}" if isinstance(v, str) else type(v).__name__,
)
def test_what_is_no_scheme_is_refused(name: object) -> None:
    names = "int8, float8_e4m3fn, bfloat16, float16, W4A8, NVFP4, MXFP4"
    with pytest.raises(OperandError, match=f"^dtype: .* is not a packed type; it must be one of {names}$"):
        Scheme.of(name)


def test_a_type_of_several_schemes() -> None:
    for name in (FLOAT4, FLOAT4.name, FLOAT4.numpy):
        with pytest.raises(OperandError, match=r"^dtype: 'float4_e2m1fn' is .* of W4A8, NVFP4 and MXFP4; name one of them$"):
            Scheme.of(name)


def test_limits() -> None:
    """What the largest magnitude of a row becomes."""
    limits = {name: (scheme.weights.limit, scheme.activations.limit) for name, scheme in SCHEMES.items()}
    assert limits == {
        "INT8_W8A8": (127, 127), "FP8_DYNAMIC": (448, 448), "BF16": (1, 1), "FP16": (1, 1),
        "W4A8": (6, 448), "NVFP4": (2688, 2688), "MXFP4": (6, 6),
    }  # fmt: skip
    assert Scheme.of("W4A8").activations.element is FLOAT8
    assert Scheme.of(INT8).accumulator == np.int32


def test_patterns_over_the_unit_of_a_scheme() -> None:
    assert Scheme.of("NVFP4").pattern("6:8") == Scheme.of("nvfp4").pattern("6:8 pairs") == Pattern(6, 8, unit=2)
    assert Scheme.of("W4A8").pattern((6, 8)) == Pattern(6, 8)
    with pytest.raises(OperandError, match=r"^pattern: 6:8 pairs must be over single columns, as W4A8 keeps them; pass '6:8'$"):
        Scheme.of("W4A8").pattern("6:8 pairs")


@pytest.mark.parametrize(
    ("text", "w4a8", "nvfp4", "mxfp4", "bits"),
    [
        ("2:4", 64, 32, 64, (2.75, 2.625)),
        ("4:6", 48, 24, 48, (11 / 3, 3.5)),
        ("6:8", 128, 64, 128, (4.125, 3.9375)),
        ("8:10", 40, 20, 40, (4.4, 4.2)),
        ("14:16", 256, 128, 256, (4.8125, 4.59375)),
    ],
)
def test_slice_units(text: str, w4a8: int, nvfp4: int, mxfp4: int, bits: tuple[float, float]) -> None:
    """The smallest cut of k after which values, metadata and block scales start anew; and bits a weight, all included."""
    for name, unit, stored in (("W4A8", w4a8, None), ("NVFP4", nvfp4, bits[0]), ("MXFP4", mxfp4, bits[1])):
        scheme = Scheme.of(name)
        pattern, block = scheme.pattern(text), scheme.weights.block
        assert block is not None
        cuts = [
            k
            for k in range(pattern.columns, 257, pattern.columns)
            if k * pattern.expansion % block.columns == 0 and k // pattern.columns * pattern.windows % 2 == 0
        ]
        assert scheme.slice_unit(pattern) == unit == cuts[0]
        if stored is not None:
            assert pattern.bits_per_weight(scheme.dtype.bits + 8 / (block.columns / 2)) == pytest.approx(stored)
