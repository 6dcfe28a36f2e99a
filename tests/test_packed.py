"""PackedWeight.validate refuses what no packer writes, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slidesparse_nb import FormatError, OperandError, PackedWeight, QuantizedActivations, matmul, pack, reference
from slidesparse_nb.dtypes import BFLOAT16, INT8
from slidesparse_nb.packed import ORDERED_NIBBLES
from slidesparse_nb.pattern import Pattern


@pytest.fixture
def packed() -> PackedWeight:
    w = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    return pack(w, "6:8", "int8", prune="magnitude")


def test_facts(packed: PackedWeight) -> None:
    assert (packed.n, packed.k, packed.ks) == (3, 20, 48)
    assert packed.values.shape == (3, 24)
    assert packed.meta.shape == (3, 6)
    assert packed.nbytes == 3 * (24 + 6 + 4)
    assert packed.bits_per_weight == pytest.approx(8 * 34 / 20)
    assert repr(packed) == "PackedWeight(3 x 20, 6:8 (2 zeros in 8), int8, 13.60 bits a weight)"
    assert packed.validate() is packed
    assert replace(packed, values=packed.values.view(np.uint8)).validate().nbytes == packed.nbytes  # raw bits


def test_ordered_nibbles() -> None:
    assert sorted(ORDERED_NIBBLES) == sorted(n for n in range(16) if (n & 3) < n >> 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 40)}, r"values: is int8 \(3, 24\), must be int8 \(3, 36\) for a weight of shape \(3, 40\) at 6:8"),
        ({"shape": (-3, 20)}, r"shape \(-3, 20\) must not be negative"),
        ({"shape": (2**31, 20)}, r"shape \(2147483648, 20\) must be below 2\^31 in both dimensions"),
        ({"shape": (0, 2**40)}, r"shape \(0, 1099511627776\) must be below 2\^31"),
        ({"shape": (3.0, 20.0)}, r"shape: \(3.0, 20.0\) must be two integers \(n, k\)"),
        ({"shape": (3,)}, r"shape: \(3,\) must be two integers"),
        ({"shape": None}, "shape: None must be two integers"),
        ({"shape": "3x"}, "shape: '3x' must be two integers"),
        ({"pattern": "6:8"}, "pattern: '6:8' must be a Pattern; pack or load makes it so"),
        ({"dtype": "int8"}, "dtype: 'int8' must be a DType"),
        ({"values": [[0] * 24] * 3}, r"values: is list, must be an array, int8 \(3, 24\)"),
        ({"values": np.ma.zeros((3, 24), np.int8)}, "values: is a masked array, must be a plain one"),
        ({"meta": "0x44"}, r"meta: is str, must be an array, uint8 \(3, 6\)"),
        ({"scale": [[1.0]] * 3}, r"scale: is list, must be an array, float32 \(3, 1\)"),
        ({"dtype": BFLOAT16}, "scale: bfloat16 values carry no scale"),
        ({"dtype": BFLOAT16, "scale": None}, "values: is int8"),
        ({"scale": None}, "scale: is missing; int8 weights need it"),
        ({"values": None}, "values: is missing"),
        ({"meta": np.full((3, 6), 0x44, np.int8)}, "meta: is int8"),
        ({"meta": np.full((3, 5), 0x44, np.uint8)}, r"meta: is uint8 \(3, 5\), must be uint8 \(3, 6\)"),
        ({"scale": np.ones((3, 1))}, "scale: is float64"),
        ({"scale": np.ones(3, np.float32)}, r"scale: is float32 \(3,\)"),
        ({"scale": np.array([[1], [-1], [1]], np.float32)}, "scale: -1.0 at row 11 must be finite and not negative"),
        ({"scale": np.array([[1], [1], [np.inf]], np.float32)}, "scale: inf at row 12"),
        ({"scale": np.array([[np.nan], [1], [1]], np.float32)}, "scale: nan at row 10"),
    ],
)
def test_validate_refuses(packed: PackedWeight, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=rf"^X\.?.*{message}"):
        replace(packed, **change).validate("X", first_row=10)
    assert repr(replace(packed, **change)).startswith("PackedWeight(")


def test_repr_of_what_is_none(packed: PackedWeight) -> None:
    bad = replace(packed, dtype="int8")  # type: ignore[arg-type]
    assert repr(bad) == "PackedWeight(invalid: packed.dtype: 'int8' must be a DType; pack or load makes it so)"


@pytest.mark.parametrize("byte", [b for b in range(256) if (b & 15) not in ORDERED_NIBBLES or b >> 4 not in ORDERED_NIBBLES])
def test_nibble_out_of_order(packed: PackedWeight, byte: int) -> None:
    meta = packed.meta.copy()
    meta[1, 4] = byte
    with pytest.raises(FormatError, match=f"meta: byte 0x{byte:02x} at row 1, column 4"):
        replace(packed, meta=meta).validate()


def test_shapes_of_numpy_integers(packed: PackedWeight) -> None:
    same = replace(packed, shape=np.array([3, 20], np.int8))  # type: ignore[arg-type]
    assert same.validate().shape == (3, 20)
    assert [type(v) for v in same.shape] == [int, int]


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(6, 8)], ids=str)
def test_int8_sums_that_could_overflow(pattern: Pattern) -> None:
    """128 * 128 * slots must stay below 2^31."""
    longest = max(k for k in range(262_000, 262_200) if pattern.slid_k(k) < 2**18) if pattern.group == 4 else 174_752
    assert pattern.slid_k(longest) < 2**18 <= pattern.slid_k(longest + pattern.slice_unit)
    for k, fits in ((longest, True), (longest + pattern.slice_unit, False)):
        ks = pattern.slid_k(k)
        packed = PackedWeight(
            np.zeros((1, ks // 2), np.int8), np.full((1, ks // 8), 0x44, np.uint8), np.ones((1, 1), np.float32),
            pattern, (1, k), INT8,
        )  # fmt: skip
        x = np.ones((1, k), np.float32)
        if fits:
            assert matmul(x, packed.validate()).tolist() == [[0]]
            continue
        message = rf"k={k} takes {ks // 2} slots at pattern {pattern}, .* store the weights in another type, or split k$"
        for refused in (packed.validate, packed.to_device, lambda p=packed, v=x: matmul(v, p)):
            with pytest.raises(FormatError, match=f"^packed: {message}"):
                refused()
        with pytest.raises(FormatError, match=f"^packed: {message}"):
            reference.matmul(x, packed)
        for w, scale in ((np.zeros((1, k), np.int8), 1), (np.zeros((1, k), np.float32), None)):
            with pytest.raises(OperandError, match=f"^w: {message}"):
                pack(w, pattern, "int8", scale=scale)
        assert pack(np.zeros((1, k), np.float32), pattern, "fp8").validate().k == k


def test_empty_weights() -> None:
    for shape in ((0, 20), (3, 0), (0, 0)):
        empty = reference.pack(np.zeros(shape, np.float32), Pattern(6, 8), INT8)
        assert empty.validate().bits_per_weight >= 0


def test_quantized_activations() -> None:
    x = QuantizedActivations(np.zeros((6, 5), np.int8), np.ones((6, 1), np.float32), (2, 3), INT8, np.dtype(np.float32))
    assert x.k == 5
