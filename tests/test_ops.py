"""matmul and quantize on NumPy arrays: the numbers of the reference, every shape, every refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import FLOATS, SHAPES, SMALL, schemes, stored_twice, weights
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_nb import (
    FormatError,
    OperandError,
    PackedWeight,
    Pattern,
    QuantizedActivations,
    Scheme,
    matmul,
    pack,
    quantize,
    workspace_bytes,
)
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import FLOAT8, INT8, PACKED, DType
from slidesparse_nb.core.scheme import SCHEMES
from slidesparse_nb.cpu import matmul as cpu_matmul

P = Pattern(6, 8)
BF16 = np.dtype(ml_dtypes.bfloat16)


def check(y: np.ndarray, x: np.ndarray, packed: PackedWeight, bias: Any = None, out_dtype: Any = None) -> None:
    """y is reference.matmul: int8 to the bit; others, as the reference itself, the exact product of what is stored to the error
    of additions in float32, with NaN and infinity where they belong.
    """
    out_dtype = np.dtype(x.dtype if out_dtype is None else out_dtype)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    with np.errstate(all="ignore"):
        wanted = reference.matmul(flat, packed, bias, out_dtype)
    assert y.shape == (*x.shape[:-1], packed.n)
    assert y.dtype == out_dtype
    if packed.dtype is INT8:
        assert y.tobytes() == wanted.tobytes()
        return
    got, wanted = (a.reshape(wanted.shape).astype(np.float32) for a in (y, wanted))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_array_equal(np.where(np.isinf(got), got, 0), np.where(np.isinf(wanted), wanted, 0))
    with np.errstate(all="ignore"):
        xs, scale_x = reference.lifted(flat, packed.pattern, packed.scheme)
        left = xs.astype(np.float64) * (1 if scale_x is None else scale_x)
    ws = reference.decompress(reference.stored_values(packed), packed.meta, packed.pattern.unit).astype(np.float64)
    left, right = np.where(np.isfinite(left), left, 0), (ws * (1 if packed.scale is None else packed.scale)).T
    added = np.zeros(packed.n) if bias is None else bias.astype(np.float64)
    exact, size = left @ right + added, np.abs(left) @ np.abs(right) + np.abs(added)
    error = (packed.k + 4) * 2.0**-23 * size + {4: 0, 2: 2.0**-8}[out_dtype.itemsize] * np.abs(exact) + 1e-7
    for a in (got, wanted):
        assert (np.abs(a - exact) <= error)[np.isfinite(wanted)].all()


@schemes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(bodies: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    for pattern in SMALL if bodies == "compiled" else SMALL[:2]:
        packed = pack(weights(shape), scheme.pattern((pattern.nnz, pattern.group)), scheme, prune="magnitude")
        for m, source in zip((0, 1, 5), FLOATS, strict=True):
            x = weights((m, shape[1]), source, seed=m)
            x[3:, :: 1 + m] = [[np.inf]]  # which meets unused slots
            check(matmul(x, packed), x, packed)


@given(
    st.sampled_from(SMALL),
    st.sampled_from(list(SCHEMES.values())),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 70)),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_any_case(
    pattern: Pattern, scheme: Scheme, source: np.dtype, out: np.dtype, size: tuple[int, int, int], seed: int, special: bool
) -> None:
    m, n, k = size
    packed = pack(weights((n, k), seed=seed), scheme.pattern((pattern.nnz, pattern.group)), scheme, prune="magnitude")
    x, bias = weights((m, k), source, seed + 1), weights((1, n), source, seed + 2)[0]
    if special and x.size:
        rng = np.random.default_rng(seed)
        x[rng.random(x.shape) < 0.03] = rng.choice([np.nan, np.inf, -np.inf])
    check(matmul(x, packed, bias=bias, out_dtype=out), x, packed, bias, out)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_leading_dimensions(dtype: DType) -> None:
    packed = pack(weights((6, 21)), P, dtype, prune="magnitude")
    for lead in ((), (4,), (2, 3), (2, 1, 3, 2), (0,), (3, 0, 2)):
        x = weights((math.prod(lead), 21)).reshape(*lead, 21)
        check(matmul(x, packed), x, packed)
        prepared = quantize(x, packed)
        assert prepared.lead == lead
        assert matmul(prepared, packed).tobytes() == matmul(x, packed).tobytes()


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("m", [1, 3, 70])
def test_tiles_and_threads(dtype: DType, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(weights((61, 130)), P, dtype, prune="magnitude")
    x, bias = weights((m, 130), seed=1), weights((1, 61), seed=2)[0]
    x[0, 7] = np.nan
    for tile, threaded, block in ((2**20, 2**20, 2**18), (1000, 2**20, 300), (3000, 1, 500), (1, 1, 1)):
        monkeypatch.setattr(cpu_matmul, "TILE", tile)
        monkeypatch.setattr(cpu_matmul, "TILE_ROWS", 1)
        monkeypatch.setattr(cpu_matmul, "THREADED", threaded)
        monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", block)
        check(matmul(x, packed, bias=bias), x, packed, bias)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_column_stored_in_two_windows_counts_twice(dtype: DType) -> None:
    packed = stored_twice(dtype)
    x = weights((3, 24), seed=4)
    x[1, 19], x[2] = 8, np.inf
    check(matmul(x, packed), x, packed)
    one = np.eye(1, 24, 19, np.float32)
    scale = 1 if packed.scale is None else packed.scale[2, 0]
    assert matmul(one, packed)[0, 2] == pytest.approx(8 * scale)


@pytest.mark.parametrize("pattern", ["2:4", "6:8", "510:512", "1022:1024", "4094:4096"])
def test_int8_sums_are_exact_whatever_the_windows_hold(pattern: str) -> None:
    """1024 columns, as many largest products over them as windows can store, one of them odd; then others that cancel them."""
    form = Pattern.of(pattern)
    k = 4096
    slots = form.expanded_k(k) // 2
    windows = form.lift_index(k).reshape(-1, 4)
    index = np.zeros((slots // 2, 2), np.intp)
    index[:, 1] = 1
    index[windows[:, 0] == 1022] = 2, 3  # the window that reaches in from the left
    columns = np.take_along_axis(windows, index, axis=1).ravel()
    inside = np.flatnonzero((columns >= 1024) & (columns < 2048))
    values, x = np.zeros((1, slots), np.int8), np.full((1, k), -128, np.int8)
    values[0, inside] = -128
    values[0, inside[0]] = x[0, columns[inside[0]]] = -127
    x[0, 2048:] = 127
    values[0, np.flatnonzero((columns >= 2048) & (columns < k))[: inside.size]] = -128
    nibble = (index[:, 0] | index[:, 1] << 2).astype(np.uint8)
    meta = (nibble[0::2] | nibble[1::2] << 4)[None]
    packed = PackedWeight(values, meta, np.ones((1, 1), np.float32), form, (1, k), INT8).validate()
    exact = int((np.pad(x[0].astype(np.int64), (0, form.padded_k(k) - k))[columns] * values[0]).sum())
    assert exact % 2 == 1
    assert abs(exact) < 2**20
    prepared = QuantizedActivations(x, np.ones((1, 1), np.float32), (1,), INT8, np.dtype(np.float32))
    assert matmul(prepared, packed)[0, 0] == exact


def test_int8_sums_are_exact_past_float32() -> None:
    """Largest products, all of one sign, in numbers that float32 cannot count."""
    for k in (1024, 1025, 4096, 9000):
        w = np.full((3, k), -128, np.int8)
        w[1] = 127
        w[2, ::2] = 127
        w[:, 1::4] = w[:, 3::4] = 0
        packed = pack(w, "2:4", scale=[1, 1, 1])
        x = np.ones((2, k), np.float32)
        x[1, ::3] = 0.9921
        y = matmul(x, packed, out_dtype=np.float32)
        check(y, x, packed)
        prepared = quantize(x, packed)
        exact = prepared.values.astype(np.int64) @ w.astype(np.int64).T
        assert (y == exact.astype(np.float32) * prepared.scale).all()
        lowest = QuantizedActivations(
            np.full((1, k), -128, np.int8), np.ones((1, 1), np.float32), (1,), INT8, np.dtype(np.float32)
        )
        assert (matmul(lowest, packed)[0] == (-128 * w.astype(np.int64).sum(axis=1)).astype(np.float32)).all()


def test_overflow_of_x_in_a_16_bit_type_is_infinity() -> None:
    packed = pack(np.array([[1, 0, 0, 0], [0, 0, 1, 0]], np.float32), "2:4", "float16")
    np.testing.assert_array_equal(matmul(np.array([[1e6, 1, 1, 1]], np.float32), packed), [[np.inf, np.nan]])


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_out(dtype: DType) -> None:
    packed = pack(weights((6, 21)), P, dtype, prune="magnitude")
    x = weights((2, 3, 21), seed=1)  # type: ignore[arg-type]
    wanted = matmul(x, packed)
    out = np.full((2, 3, 6), np.nan, np.float32)
    assert matmul(x, packed, out=out) is out
    assert out.tobytes() == wanted.tobytes()
    wide = np.full((3, 2, 12), np.nan, np.float32)
    view = wide.transpose(1, 0, 2)[:, :, ::2]
    assert matmul(x, packed, out=view, out_dtype="float32") is view
    assert (view == wanted).all()
    assert np.isnan(wide[:, :, 1::2]).all()
    half = np.empty((2, 3, 6), np.float16)
    assert (matmul(x, packed, out=half) == wanted.astype(np.float16)).all()
    both = np.zeros((2, 3, 27), np.float32)  # neighbours in one buffer do not overlap
    both[..., :21] = x
    matmul(both[..., :21], packed, out=both[..., 21:])
    assert (both[..., 21:] == wanted).all()


@pytest.mark.parametrize("kind", [*FLOATS, np.dtype(np.float64)], ids=str)
def test_bias(kind: np.dtype) -> None:
    packed = pack(weights((6, 21)), P, "int8", prune="magnitude")
    x, bias = weights((4, 21), np.float16), weights((1, 6), kind)[0]
    check(matmul(x, packed, bias=bias), x, packed, bias)
    check(matmul(x, packed, bias=np.repeat(bias, 2)[::2]), x, packed, bias)


def test_inputs_of_every_layout() -> None:
    packed = pack(weights((6, 21)), P, "bfloat16", prune="magnitude")
    x = weights((4, 21))
    wanted = matmul(x, packed)
    fixed = x.copy()
    fixed.flags.writeable = False
    for view in (np.asfortranarray(x), np.repeat(x, 2, 1)[:, ::2], x[::-1].copy()[::-1], fixed):
        np.testing.assert_array_equal(matmul(view, packed), wanted)
    raw = replace(packed, values=packed.values.view(np.uint16), meta=np.asfortranarray(packed.meta))
    np.testing.assert_array_equal(matmul(x, raw), wanted)
    raw.meta.flags.writeable = raw.values.flags.writeable = False
    np.testing.assert_array_equal(matmul(x, raw), wanted)
    assert (x == weights((4, 21))).all()


# ---- quantize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_quantize(dtype: DType, source: np.dtype) -> None:
    """For weights of 16 bits it rounds."""
    x = weights((2, 3, 21), source)  # type: ignore[arg-type]
    x[1, 1, 4], x[0, 0, 0] = np.nan, 65500
    packed = pack(weights((6, 21)), P, dtype, prune="magnitude")
    rows = x.reshape(6, 21)
    with np.errstate(over="ignore"):
        wanted, scale = reference.quantize(rows, dtype) if Scheme.of(dtype).scaled else (rows.astype(dtype.numpy), None)
    for prepared in (quantize(x, packed), quantize(x, "6:8", dtype), quantize(x, P, str(dtype)), quantize(x, packed, dtype)):
        np.testing.assert_array_equal(prepared.values.astype(np.float32), wanted.astype(np.float32))
        assert prepared.scale is scale is None or prepared.scale.tobytes() == scale.tobytes()
        assert not np.shares_memory(prepared.values, x)
        assert (prepared.lead, prepared.dtype, prepared.source, prepared.k) == ((2, 3), dtype, x.dtype, 21)
    y = matmul(prepared, packed)
    check(y, x, packed)
    assert y.tobytes() == matmul(x, packed).tobytes()
    assert matmul(prepared, packed, out_dtype=np.float32).dtype == np.float32
    assert repr(prepared) == f"QuantizedActivations(2 x 3 x 21, {dtype})"


# ---- refusals ----------------------------------------------------------------------------------------------------

X = np.ones((2, 21), np.float32)
PACKED_X = pack(weights((6, 21)), P, "int8", prune="magnitude")


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([[1.0] * 21], {}, "x: list is not an array; pass a NumPy array"),
        (
            X.astype(np.float64),
            {},
            r"x: float64 must be one of float32, float16, bfloat16; convert it first: x.astype\(np.float32\)",
        ),
        (X.astype(np.int8), {}, "x: int8 must be one of"),
        (X.astype(bool), {}, "x: bool must be one of float32, float16, bfloat16$"),
        (np.ones((), np.float32), {}, r"x: shape \(\) must be \[..., 21\], the k of packed"),
        (np.ones((2, 22), np.float32), {}, r"x: shape \(2, 22\) must be \[..., 21\], the k of packed \(not padded"),
        (np.ones(32, np.float32), {}, r"x: shape \(32,\) must be \[..., 21\]"),
        (X, {"bias": [0.0] * 6}, "bias: list must be a NumPy array, as x is"),
        (X, {"bias": np.zeros(5, np.float32)}, r"bias: float32 \(5,\) must be a float type, of shape \(6,\)"),
        (X, {"bias": np.zeros((1, 6), np.float32)}, r"bias: float32 \(1, 6\)"),
        (X, {"bias": np.zeros(6, np.int32)}, "bias: int32"),
        (X, {"out": [0]}, "out: list must be a NumPy array"),
        (X, {"out": np.zeros((2, 5), np.float32)}, r"out: float32 \(2, 5\) must be float32 \(2, 6\)"),
        (X, {"out": np.zeros((1, 2, 6), np.float32)}, r"out: float32 \(1, 2, 6\) must be"),
        (X, {"out": np.zeros((2, 6), np.float16), "out_dtype": "float32"}, r"out: float16 \(2, 6\) must be float32"),
        (X, {"out": np.zeros((2, 6), np.float64)}, "out: float64 must be one of"),
        (X, {"out": np.broadcast_to(np.float32(0), (2, 6))}, "out: is read-only"),
        (X, {"out_dtype": "int8"}, "out_dtype: int8 must be one of"),
        (X, {"out_dtype": "none"}, "out_dtype: 'none' must be one of float32, float16, bfloat16$"),
        (X, {"out_dtype": "f4,,"}, "out_dtype: 'f4,,' must be one of"),
        (np.ma.array(X), {}, "x: is a masked array, and the mask would be lost"),
        (X, {"bias": np.ma.zeros(6, np.float32)}, "bias: is a masked array"),
        (X, {"out": np.ma.zeros((2, 6), np.float32)}, "out: is a masked array"),
        (X, {"stream": 0}, "stream: 0 must be None for NumPy arrays"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_matmul_refuses(x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OperandError, match=f"^{message}"):
        matmul(x, PACKED_X, **options)


def test_weights_are_checked() -> None:
    with pytest.raises(OperandError, match="packed: ndarray must be a PackedWeight; pack"):
        matmul(X, X)  # type: ignore[arg-type]
    with pytest.raises(OperandError, match="packed: NoneType must be a PackedWeight"):
        workspace_bytes(1, None, "float32")  # type: ignore[arg-type]
    packed = pack(weights((6, 21)), P, "int8", prune="magnitude")
    with pytest.raises(FormatError, match="values: is int8"):
        matmul(X, replace(packed, shape=(7, 21)))

    for change in ({"scheme": "int4"}, {"pattern": "6:8"}, {"shape": (6.0, 21)}, {"values": [[0]]}, {"meta": [[0]]}):
        for call in (matmul, quantize):
            with pytest.raises(FormatError, match=r"^packed\.(scheme|pattern|shape|values|meta): .* must be"):
                call(X, replace(packed, **change))  # type: ignore[arg-type]

    class Elsewhere:
        shape, dtype = packed.values.shape, packed.values.dtype

    with pytest.raises(OperandError, match=r"packed.values: Elsewhere must be a NumPy array, as x is"):
        matmul(X, replace(packed, values=Elsewhere()))


def test_quantized_activations_are_checked() -> None:
    packed = pack(weights((6, 21)), P, "int8", prune="magnitude")
    x = quantize(X, packed)
    for change, message in (
        ({"dtype": FLOAT8}, "x: is quantized to float8_e4m3fn, but packed holds int8"),
        ({"lead": None}, "x.lead: None must be a tuple of dimensions; make x with quantize"),
        ({"lead": (-1, -2)}, r"x.lead: \(-1, -2\) must be"),
        ({"lead": (2.0,)}, r"x.lead: \(2.0,\) must be"),
        ({"source": "no such"}, "x.source: 'no such' must be one of float32, float16, bfloat16$"),
        ({"lead": [2]}, r"x.lead: \[2\] must be"),
        ({"lead": (3,)}, r"x.values: int8 \(2, 21\) must be int8 or its bits, \[3, k\]"),
        ({"values": x.values.astype(np.int16)}, "x.values: int16"),
        ({"values": x.values[0]}, r"x.values: int8 \(21,\)"),
        ({"values": x.values[:, :20]}, "x: k=20 must be 21"),
        ({"values": [[1]]}, "x: QuantizedActivations is not an array"),
        ({"scale": x.scale[:, 0]}, r"x.scale: must be a contiguous float32 array \[2, 1\], where x.values are"),
        ({"scale": x.scale.astype(np.float64)}, "x.scale: must be"),
        ({"scale": None}, "x.scale: must be"),
        ({"scale": [[1.0], [1.0]]}, "x.scale: list must be a NumPy array, as x.values is"),
    ):
        with pytest.raises(OperandError, match=f"^{message}"):
            matmul(replace(x, **change), packed)  # type: ignore[arg-type]
    wide = pack(weights((6, 21)), P, "bfloat16", prune="magnitude")
    with pytest.raises(OperandError, match=r"^x.scale: bfloat16 activations carry no scale; it must be None"):
        matmul(replace(quantize(X, wide), scale=x.scale), wide)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.ma.array(X), PACKED_X), "x: is a masked array"),
        ((X[:, :20], PACKED_X), r"x: shape \(2, 20\) must be \[..., 21\]"),
        ((X[0, 0], PACKED_X), "x: float32 is not an array"),
        ((np.ones((), np.float32), "6:8", "int8"), r"x: shape \(\) must be \[..., k\]$"),
        ((X, PACKED_X, "fp8"), "dtype: float8_e4m3fn is not int8, the type of packed; leave it out"),
        ((X, "6:8"), "dtype: is missing; with a pattern"),
        ((X, "5:8", "int8"), "pattern: 5:8"),
        ((X, X, "int8"), "pattern: "),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_quantize_refuses(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OperandError, match=f"^{message}"):
        quantize(*args)


def test_out_may_overlap_no_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.zeros(64, np.float32)
    out = memory[8:20].reshape(2, 6)
    x = replace(quantize(X, PACKED_X), scale=memory[:2].reshape(2, 1))
    assert matmul(x, PACKED_X, bias=memory[2:8], out=out) is out
    square = pack(weights((21, 21)), P, "bfloat16", prune="magnitude")
    both = weights((4, 21))
    for name, call in (
        ("x", lambda: matmul(both, square, out=both)),
        ("x", lambda: matmul(both, square, out=both[::-1])),
        ("bias", lambda: matmul(x, PACKED_X, out=out, bias=memory[3:9])),
        ("bias", lambda: matmul(x, PACKED_X, out=out, bias=memory[6:30:4])),
        ("bias", lambda: matmul(x, PACKED_X, out=out, bias=memory[8:20].view(np.float64))),
        ("x.scale", lambda: matmul(x, PACKED_X, out=memory[1:13].reshape(2, 6))),
        ("x.scale", lambda: matmul(x, PACKED_X, out=memory[1:61].reshape(2, 30)[:, ::5])),
    ):
        with pytest.raises(OperandError, match=f"^out: shares memory with {name}; pass an array of its own$"):
            call()

    def shares_memory(a: np.ndarray, b: np.ndarray, max_work: int) -> bool:
        raise np.exceptions.TooHardError(max_work)

    monkeypatch.setattr(np, "shares_memory", shares_memory)  # what is too hard to tell counts as overlap
    with pytest.raises(OperandError, match="out: shares memory with x"):
        matmul(both, square, out=np.zeros((4, 21), np.float32))
