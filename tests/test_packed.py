"""PackedWeight: validate refuses what no packer writes, by name; named tensors, rows, columns and concat."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Array, same, schemes, sparse_rows, weights
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_nb import (
    FormatError,
    OperandError,
    PackedWeight,
    QuantizedActivations,
    Scheme,
    load,
    matmul,
    pack,
    quantize,
    save,
    to_device,
    unpack,
    verify,
)
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT32, INT8, PACKED, DType
from slidesparse_nb.core.packed import ORDERED_NIBBLES
from slidesparse_nb.core.pattern import Pattern, known_patterns


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
        ({"scheme": "int4"}, "scheme: 'int4' must be a Scheme; pack or load makes it so"),
        ({"pattern": Pattern(6, 8, 2)}, "pattern: 6:8 pairs must have unit 1, as int8 has"),
        ({"values": [[0] * 24] * 3}, r"values: is list, must be an array, int8 \(3, 24\)"),
        ({"values": np.ma.zeros((3, 24), np.int8)}, "values: is a masked array, must be a plain one"),
        ({"meta": "0x44"}, r"meta: is str, must be an array, uint8 \(3, 6\)"),
        ({"scale": [[1.0]] * 3}, r"scale: is list, must be an array, float32 \(3, 1\)"),
        ({"scheme": BFLOAT16}, "scale: bfloat16 values carry no scale"),
        ({"scheme": BFLOAT16, "scale": None}, "values: is int8"),
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
    bad = replace(packed, scheme="int4")  # type: ignore[arg-type]
    assert repr(bad) == "PackedWeight(invalid: packed.scheme: 'int4' must be a Scheme; pack or load makes it so)"


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
    longest = max(k for k in range(262_000, 262_200) if pattern.expanded_k(k) < 2**18) if pattern.group == 4 else 174_752
    assert pattern.expanded_k(longest) < 2**18 <= pattern.expanded_k(longest + pattern.slice_unit)
    for k, fits in ((longest, True), (longest + pattern.slice_unit, False)):
        ks = pattern.expanded_k(k)
        packed = PackedWeight(
            np.zeros((1, ks // 2), np.int8), np.full((1, ks // 8), 0x44, np.uint8), np.ones((1, 1), np.float32),
            pattern, (1, k), INT8,
        )  # fmt: skip
        x = np.ones((1, k), np.float32)
        if fits:
            assert matmul(x, packed.validate()).tolist() == [[0]]
            continue
        message = rf"k={k} takes {ks // 2} slots at pattern {pattern}, .* store the weights in another type, or split k$"
        for refused in (packed.validate, lambda p=packed: to_device(p), lambda p=packed, v=x: matmul(v, p)):
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


# ---- named tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "model.layers.0.q_proj"])
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_named_tensors(dtype: DType, name: str, tmp_path: Path) -> None:
    """`tensors` and `from_tensors` are inverse, copy nothing, and name what a file names."""
    packed = pack(weights((3, 20)), "6:8", dtype, prune="magnitude")
    tensors = packed.tensors(name)
    again = PackedWeight.from_tensors({"bias": None, **tensors}, "6:8", name=name)
    same(again, packed)
    assert all(getattr(again, part) is getattr(packed, part) for part in ("values", "meta", "scale"))
    raw = replace(packed, values=packed.values.view(dtype.raw))
    same(PackedWeight.from_tensors(raw.tensors(), (6, 8), Scheme.of(dtype).name), raw)
    save(tmp_path / "f.safetensors", {"fc": packed})
    with (tmp_path / "f.safetensors").open("rb") as file:
        header = file.read(2000).decode("latin-1")
    assert all(f'"{tensor}"' in header for tensor in packed.tensors("fc"))


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        ({"weight_packed": None}, {}, FormatError, "tensors: 'weight_packed' is missing"),
        ({}, {"name": "fc"}, FormatError, "tensors: 'fc.weight_packed' is missing; a packed weight needs it"),
        ({"weight_shape": None}, {}, FormatError, "tensors: 'weight_shape' is missing"),
        ({"weight_shape": np.ones(2)}, {}, FormatError, r"packed.shape: \[1.0, 1.0\] must be two integers \(n, k\)"),
        ({"weight_shape": np.array([3, 40])}, {}, FormatError, r"packed.values: is int8 \(3, 24\), must be int8 \(3, 36\)"),
        ({"weight_scale": None}, {}, FormatError, "packed.scale: is missing; int8 weights need it"),
        ({"weight_meta": np.zeros((3, 6), np.uint8)}, {}, FormatError, "packed.meta: byte 0x00 at row 0, column 0"),
        ({}, {"pattern": "3:4"}, OperandError, "pattern: 3:4 is not of the form"),
        ({"weight_packed": np.zeros((3, 24), np.uint16)}, {}, OperandError, r"scheme: dtype\('uint16'\) is not a packed type"),
        (None, {}, OperandError, "tensors: list must be a dictionary"),
    ],
)
def test_from_tensors_refuses(
    packed: PackedWeight, change: dict[str, Any] | None, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors: Any = [] if change is None else packed.tensors() | change
    with pytest.raises(error, match=f"^{message}"):
        PackedWeight.from_tensors(tensors, **{"pattern": "6:8", **arguments})


# ---- parts -----------------------------------------------------------------------------------------------------------


def whole_numbers(x: Array, dtype: DType) -> QuantizedActivations:
    """x as it is: whole numbers, whose products every type adds up exactly."""
    scale = None if not Scheme.of(dtype).scaled else np.ones((len(x), 1), np.float32)
    return QuantizedActivations(x.astype(dtype.numpy), scale, (len(x),), dtype, FLOAT32)


def cuts(size: int, unit: int, seed: int) -> list[tuple[int, int]]:
    """Adjacent ranges, some of them empty, from 0 to size: cut at multiples of unit."""
    inner = np.random.default_rng(seed).integers(0, size // unit + 1, 3) * unit
    return list(pairwise([0, *sorted(inner.tolist()), size]))


@given(rows=sparse_rows(known_patterns()), dtype=st.sampled_from(PACKED), seed=st.integers(0, 99))
def test_parts(rows: tuple[Array, Pattern], dtype: DType, seed: int) -> None:
    """Parts are what the parts of w pack to; rows and concat are inverse; products of column parts add up to the whole."""
    w, pattern = rows[0].astype(dtype.numpy), rows[1]
    scale = None if not Scheme.of(dtype).scaled else np.random.default_rng(seed).integers(1, 5, (len(w), 1)).astype(np.float32)
    packed = pack(w, pattern, scale=scale)

    parts = []
    for a, b in cuts(packed.n, 1, seed):
        part = packed.rows(a, b)
        same(part, pack(w[a:b], pattern, scale=None if scale is None else scale[a:b]))
        parts.append(part)
    same(PackedWeight.concat(parts).validate(), packed)

    x = np.random.default_rng(seed).integers(-3, 4, (3, packed.k))
    total = np.zeros((3, packed.n), np.float32)
    for a, b in cuts(packed.k, pattern.slice_unit, seed):
        part = packed.columns(a, b)
        same(part, pack(w[:, a:b], pattern, scale=scale))
        verify(part, w[:, a:b], scale=scale)
        total += matmul(whole_numbers(x[:, a:b], dtype), part)
    np.testing.assert_array_equal(total, matmul(whole_numbers(x, dtype), packed))
    np.testing.assert_array_equal(total, x @ (w.astype(np.float64) * (1 if scale is None else scale)).T)


@schemes
@pytest.mark.parametrize("pattern", known_patterns(), ids=str)
def test_columns_of_quantized_weights(scheme: Scheme, pattern: Pattern) -> None:
    """Stored values and scales are those of the whole; so is the product, to the order of addition in float32."""
    w = weights((7, 9 * pattern.group + 3))
    packed = pack(w, pattern, scheme, prune="magnitude")
    unit, k = packed.slice_unit, packed.k
    total: Any = 0
    x = np.random.default_rng(1).standard_normal((4, k)).astype(np.float32)
    q = x if scheme.lift_first else quantize(x, packed)
    for a, b in pairwise([0, *(at for at in (unit, 2 * unit) if at < k), k]):
        part = packed.columns(a, b)
        verify(part)
        assert part.scale is packed.scale
        np.testing.assert_array_equal(unpack(part), unpack(packed)[:, a:b])
        if isinstance(q, QuantizedActivations):
            total = total + matmul(replace(q, values=np.ascontiguousarray(q.values[:, a:b])), part)
    if isinstance(q, QuantizedActivations):
        np.testing.assert_allclose(total, matmul(q, packed), rtol=1e-5, atol=1e-4)
    with pytest.raises(OperandError, match=rf"columns: 0 to {unit // 2} must be cut at multiples of {unit}, the slice unit"):
        packed.columns(0, unit // 2)


def test_parts_are_views(packed: PackedWeight) -> None:
    for part in (packed.rows(0, 3), packed.columns(16, 20), packed.rows(np.int64(1), np.int8(2))):  # type: ignore[arg-type]
        assert all(np.shares_memory(getattr(part, name), getattr(packed, name)) for name in ("values", "meta", "scale"))
    one = PackedWeight.concat(iter([packed]))
    assert not np.shares_memory(one.values, packed.values)


def raw(packed: PackedWeight) -> PackedWeight:
    """The same as arrays of bits."""
    blocks = {} if packed.block_scale is None else {"block_scale": packed.block_scale.view(np.uint8)}
    return replace(packed, values=packed.values.view(packed.dtype.raw), **blocks).validate()


@schemes
def test_cut_weights_are_saved(tmp_path: Path, scheme: Scheme) -> None:
    """Parts and what is made of parts; raw bits are written as what they are."""
    packed = pack(weights((6, 300)), "6:8", scheme, prune="magnitude")
    unit = packed.slice_unit
    parts = {"rows": packed.rows(2, 5), "columns": packed.columns(unit, 300), "both": packed.rows(1, 6).columns(0, unit)}
    parts["fused"] = PackedWeight.concat([parts["columns"], parts["columns"].rows(0, 1)])
    path, bits = tmp_path / "parts.safetensors", tmp_path / "bits.safetensors"
    save(path, parts)
    save(bits, {name: raw(part) for name, part in parts.items()})
    assert bits.read_bytes() == path.read_bytes()
    loaded = load(path)
    for name, part in parts.items():
        same(loaded[name], part)  # type: ignore[arg-type]
        same(PackedWeight.from_tensors(part.tensors("x"), "6:8", scheme, name="x"), part)
    same(PackedWeight.concat([packed, raw(packed)]).validate(), raw(PackedWeight.concat([packed, packed])))
    x = weights((2, 300), seed=1)
    np.testing.assert_array_equal(matmul(x, raw(packed)), matmul(x, packed))
    verify(raw(packed), weights((6, 300)), prune="magnitude")


class Elsewhere:
    """An array of a GPU, as far as its place is asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.shape, self.dtype, self.device = array.shape, array.dtype, "GPU 1"


PACKED_3 = pack(np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32), "6:8", "int8", prune="magnitude")
BAD = replace(PACKED_3, scale=None)
THERE = replace(PACKED_3, **{part: Elsewhere(getattr(PACKED_3, part)) for part in ("values", "meta", "scale")})
TALL = PackedWeight(*(np.zeros((2**30, 0), t) for t in ("f2", "u1")), None, Pattern(6, 8), (2**30, 0), PACKED[3])
ROW = np.zeros((1, 20), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PACKED_3.rows(2, 4), "rows: 2 to 4 must be a range within 0 to 3, the n of the weight"),
        (lambda: PACKED_3.rows(-1, 2), "rows: -1 to 2 must be a range within 0 to 3"),
        (lambda: PACKED_3.rows(2, 1), "rows: 2 to 1 must be a range"),
        (lambda: PACKED_3.rows(0, 1.5), "rows: 0 to 1.5 must be two integers"),  # type: ignore[arg-type]
        (lambda: PACKED_3.columns(0, 32), "columns: 0 to 32 must be a range within 0 to 20, the k of the weight"),
        (lambda: PACKED_3.columns(0, None), "columns: 0 to None must be two integers"),  # type: ignore[arg-type]
        (
            lambda: PACKED_3.columns(8, 20),
            r"columns: 8 to 20 must be cut at multiples of 16, the slice unit of 6:8 \(2 zeros in 8\), or at k = 20;"
            " nearest to 8 are 0 and 16$",
        ),
        (lambda: PACKED_3.columns(0, 18), "columns: 0 to 18 must be cut at .*; nearest to 18 are 16 and 20$"),
        *((call, "packed.scale: is missing") for call in (lambda: BAD.rows(0, 1), lambda: BAD.columns(0, 16), BAD.tensors)),
        *(
            (lambda weights=weights: PackedWeight.concat(weights), message)
            for weights, message in (
                ([], r"weights: \[\] must be a list of PackedWeights, at least one"),
                (PACKED_3, r"weights: PackedWeight\(3 x 20, .*\) must be a list"),
                ([PACKED_3, 3], r"weights\[1\]: int must be a PackedWeight"),
                ([PACKED_3, BAD], r"weights\[1\].scale: is missing"),
                ([PACKED_3, PACKED_3.columns(0, 16)], r"weights\[1\].k: 16 must be 20, as of weights\[0\]"),
                ([PACKED_3, pack(ROW, "4:6", "int8")], r"weights\[1\].pattern: 4:6 must be 6:8"),
                ([PACKED_3, pack(ROW, "6:8", "fp8")], r"weights\[1\].scheme: float8_e4m3fn must be int8"),
                ([PACKED_3, THERE], r"weights\[1\].place: GPU 1 must be host"),
                ([TALL, TALL], r"weights: together shape \(2147483648, 0\) must be below 2\^31"),
            )
        ),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_parts_that_cannot_be(call: Any, message: str) -> None:
    with pytest.raises(FormatError if "is missing" in message else OperandError, match=f"^{message}"):
        call()
