"""The specification against its words: every mask of a group, hand-made bytes, plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from cases import FLOATS, LARGE, SHAPES, SMALL, chosen_by_hand, drop_two, every_mask, sparse_rows, stored, weights
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_nb import OperandError, Pattern, PatternError, Scheme
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED, DType

# ---- slide, lift, compress ---------------------------------------------------------------------------------------


def check_slide(w: np.ndarray, pattern: Pattern) -> None:
    """Everything that must hold of slide, lift, compress and their inverses, for int8 w [n, k]."""
    n, k = w.shape
    slid = reference.slide(w, pattern)
    assert slid.shape == (n, pattern.expanded_k(k))
    windows = slid.reshape(n, slid.shape[1] // 4, 4)
    assert (np.count_nonzero(windows, axis=2) <= 2).all()
    assert (reference.unslide(slid, pattern, k) == w).all()
    padded, columns = reference.pad(w, pattern), pattern.lift_index(k).reshape(-1, 4)
    for row in range(0, n, max(1, n // 200)):  # greedy, window by window
        for window, mine in enumerate(chosen_by_hand(padded[row].tolist(), pattern)):
            took = windows[row, window]
            assert columns[window][took != 0].tolist() == mine
            assert took[took != 0].tolist() == [padded[row, c] for c in mine]

    x = np.random.default_rng(k).integers(-9, 10, (3, k))
    assert (reference.lift(x, pattern) @ slid.astype(np.int64).T == x @ w.astype(np.int64).T).all()
    assert (reference.unlift(reference.lift(x, pattern), pattern, k) == x).all()

    values, meta = reference.compress(slid)
    assert values.shape == (n, slid.shape[1] // 2)
    assert meta.shape == (n, slid.shape[1] // 8)
    assert (reference.decompress(values, meta) == slid).all()
    index = reference.window_index(meta)
    assert (index[:, :, 0] < index[:, :, 1]).all()


@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_every_mask_of_a_group(pattern: Pattern) -> None:
    check_slide(every_mask(pattern), pattern)


@given(sparse_rows(SMALL + LARGE))
def test_slide_of_any_rows(case: tuple[np.ndarray, Pattern]) -> None:
    check_slide(*case)


@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_one_value_too_many(pattern: Pattern) -> None:
    w = np.zeros((3, 3 * pattern.group), np.int8)
    w[1, 2 * pattern.group : 2 * pattern.group + pattern.nnz + 1] = 1
    w[2, : pattern.group] = 1
    assert reference.violations(w, pattern).tolist() == [[1, 2], [2, 0]]
    with pytest.raises(PatternError, match=f"row 1, group 2 .* has more than {pattern.nnz} non-zeros") as caught:
        reference.slide(w, pattern)
    assert (caught.value.row, caught.value.group, caught.value.count) == (1, 2, 2)


def test_a_tail_may_be_full() -> None:
    w = np.ones((1, 14), np.int8)
    w[0, :2] = 0
    assert not reference.violations(w, Pattern(6, 8)).size  # six columns of the second group are all there is
    check_slide(w, Pattern(6, 8))
    assert reference.violations(np.ones((1, 15), np.int8), Pattern(6, 8)).tolist() == [[0, 0], [0, 1]]


def test_nibbles_by_hand() -> None:
    windows = {
        (0, 0, 0, 0): (0, 1, 0, 0),
        (7, 0, 0, 0): (0, 1, 7, 0),
        (0, 7, 0, 0): (0, 1, 0, 7),
        (0, 0, 7, 0): (0, 2, 0, 7),
        (0, 0, 0, 7): (0, 3, 0, 7),
        (0, 5, 0, 7): (1, 3, 5, 7),
        (5, 7, 0, 0): (0, 1, 5, 7),
        (0, 0, 5, 7): (2, 3, 5, 7),
    }
    ws = np.array([*windows], np.int8).reshape(1, -1)
    values, meta = reference.compress(ws)
    index = reference.window_index(meta)[0]
    got = [(*index[i].tolist(), *values[0, 2 * i : 2 * i + 2].tolist()) for i in range(len(windows))]
    assert got == [*windows.values()]
    assert meta[0, 0] == 0b0100_0100  # the low nibble is the first window
    assert meta[0, 1] == (0 | 1 << 2) | (0 | 2 << 2) << 4
    with pytest.raises(PatternError, match="row 0, window 1 has more than two"):
        reference.compress(np.array([[1, 1, 0, 0, 1, 1, 1, 0]], np.int8))


def test_golden_bytes() -> None:
    """One row of 6:8, 12 columns: two groups, the second half padding."""
    w = np.array([[0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8]], np.float32)
    packed = reference.pack(w, Pattern(6, 8), INT8)
    # absmax 8, so q = round(w * 15.875): 0 16 32 48 64(63.5, ties to even) 0 79 95 111 0 0 127
    # windows     (0 1 2 3) (2 3 4 5) (4 5 6 7) | (8 9 10 11)  (10 11 - -) (- - - -)
    # take         1 2       3 4       6 7       |  8 11         none        none
    assert packed.values.tolist() == [[16, 32, 48, 64, 79, 95, 111, 127, 0, 0, 0, 0]]
    nibbles = [1 | 2 << 2, 1 | 2 << 2, 2 | 3 << 2, 0 | 3 << 2, 0 | 1 << 2, 0 | 1 << 2]
    assert packed.meta.tobytes() == bytes(a | b << 4 for a, b in zip(nibbles[0::2], nibbles[1::2], strict=True))
    assert packed.meta.tobytes().hex() == "99ce44"
    assert packed.scale.tolist() == [[np.float32(8) / np.float32(127)]]


# ---- prune -------------------------------------------------------------------------------------------------------


@given(st.sampled_from(SMALL), st.integers(0, 2**32 - 1), st.integers(0, 40), st.booleans())
def test_prune_keeps_the_best_of_every_group(pattern: Pattern, seed: int, k: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(-3, 4, (2, k)).astype(np.float32) if ties else rng.standard_normal((2, k)).astype(np.float32)
    score = rng.integers(0, 5, (2, k)) if ties else None
    pruned = reference.prune(w, pattern, score)
    for row in range(2):
        for start in range(0, k, pattern.group):
            columns = range(start, min(k, start + pattern.group))
            by_score = sorted(columns, key=lambda c: (-(abs(w[row, c]) if score is None else score[row, c]), c))
            kept = {*by_score[: pattern.nnz]}
            assert [pruned[row, c] for c in columns] == [w[row, c] if c in kept else 0 for c in columns]
    assert not reference.violations(pruned, pattern).size


def test_prune_of_int8_compares_magnitudes() -> None:
    w = np.array([[-128, 127, 126, -1]], np.int8)
    assert reference.prune(w, Pattern(2, 4)).tolist() == [[-128, 127, 0, 0]]


# ---- quantize ----------------------------------------------------------------------------------------------------


def nearest_even(value: Fraction) -> int:
    return round(value)  # Python rounds ties to even


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=12))
def test_int8_in_exact_arithmetic(row: list[float]) -> None:
    q, scale = reference.quantize(np.array([row], np.float32), INT8)
    absmax = max(map(abs, row))
    if absmax < 2.0**-100:
        assert not q.any()
        assert scale[0, 0] == 1
        return
    inv = np.float32(127) / np.float32(absmax)
    assert scale[0, 0] == np.float32(absmax) / np.float32(127)
    products = [Fraction(float(np.float32(v) * inv)) for v in row]
    assert q[0].tolist() == [min(127, max(-127, nearest_even(p))) for p in products]
    assert np.abs(q.astype(int)).max() == 127


def test_float8_is_the_nearest_of_its_values() -> None:
    values = np.sort(np.arange(256, dtype=np.uint8).view(FLOAT8.numpy).astype(np.float64))
    values = values[np.isfinite(values)]
    x = np.concatenate([[448], np.random.default_rng(0).uniform(-448, 448, 4000), np.linspace(-0.02, 0.02, 999)])
    x32 = x.astype(np.float32)[None]
    q, scale = reference.quantize(x32, FLOAT8)
    assert scale[0, 0] == 1  # absmax 448: nothing is scaled
    distance = np.abs(values[None, :] - x32[0].astype(np.float64)[:, None]).min(axis=1)
    assert (np.abs(q[0].astype(np.float64) - x32[0]) == distance).all()


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_quantize_of_rows_that_are_special(dtype: DType) -> None:
    tiny = np.float32(2.0**-100)
    below = np.nextafter(tiny, np.float32(0))
    largest = np.finfo(np.float32).max
    x = np.array(
        [
            [0, -0.0, 0],
            [below, -below, 0],
            [tiny, -tiny / 2, 0],
            [np.nan, 1, 2],
            [1, -np.inf, 2],
            [largest, -largest, 1],
            [1e-40, 1, -1],
        ],
        np.float32,
    )
    q, scale = reference.quantize(x, dtype)
    t = np.float32(dtype.largest)
    expected = np.array([1, 1, tiny / t, np.nan, np.nan, largest / t, 1 / t], np.float32)
    np.testing.assert_array_equal(scale[:, 0], expected)
    assert q.astype(np.float32).tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [t, -64 if dtype is INT8 else -t / 2, 0],
        [0, 0, 0],
        [0, 0, 0],
        [t, -t, 0],
        [0, t, -t],
    ]
    assert np.isfinite(q.astype(np.float32)).all()


def test_quantize_of_nothing() -> None:
    for shape in ((0, 4), (3, 0), (0, 0)):
        q, scale = reference.quantize(np.zeros(shape, np.float32), INT8)
        assert q.shape == shape
        assert scale.tolist() == [[1]] * shape[0]


# ---- pack and matmul ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("pattern", SMALL + LARGE[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(dtype: DType, pattern: Pattern, shape: tuple[int, int]) -> None:
    q = stored(shape, pattern, dtype)
    scale = None if not Scheme.of(dtype).scaled else np.ones((shape[0], 1), np.float32)
    packed = reference.pack(q, pattern, dtype, scale).validate()
    back = reference.unpack(packed)
    assert back.dtype == dtype.numpy
    plus_zero = np.where(reference.is_nonzero(q), q, np.zeros((), q.dtype))  # -0.0 is zero
    assert back.tobytes() == plus_zero.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_pack_refuses_what_is_not_finite(dtype: DType, value: float) -> None:
    w = np.zeros((3, 8), np.float32)
    w[1, 5] = value
    with pytest.raises(OperandError, match=f"w: {value} at row 1, column 5"):
        reference.pack(w, Pattern(6, 8), dtype)


@pytest.mark.parametrize(("dtype", "value"), [(FLOAT16, 65520), (BFLOAT16, 3.4e38)], ids=str)
def test_pack_refuses_overflow(dtype: DType, value: float) -> None:
    with pytest.raises(OperandError, match=f"at row 0, column 0; weights must be finite as stored \\({dtype}\\)"):
        reference.pack(np.full((1, 1), value, np.float32), Pattern(6, 8), dtype)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(6, 8), Pattern(8, 10)], ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_int8_matmul_in_whole_numbers(pattern: Pattern, source: np.dtype) -> None:
    w, x, bias = drop_two(weights((6, 93)), pattern), weights((4, 93), source, seed=1), weights((1, 6), seed=2)[0]
    packed = reference.pack(w, pattern, INT8)
    qx, scale_x = reference.quantize(x, INT8)
    exact = qx.astype(np.int64) @ reference.unpack(packed).astype(np.int64).T
    y = reference.matmul(x, packed, bias)
    assert y.tobytes() == (exact.astype(np.float32) * scale_x * packed.scale[:, 0] + bias).tobytes()
    assert np.abs(y - (x.astype(np.float32) @ w.T + bias)).max() < 0.4  # and it is the product that was meant


@pytest.mark.parametrize("dtype", [FLOAT8, BFLOAT16, FLOAT16], ids=str)
def test_float_matmul(dtype: DType) -> None:
    w, x = drop_two(weights((6, 93)), Pattern(6, 8)), weights((4, 93), seed=1)
    packed = reference.pack(w, Pattern(6, 8), dtype)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    y = reference.matmul(x, packed, out_dtype=ml_dtypes.bfloat16)
    assert y.dtype == ml_dtypes.bfloat16
    assert np.abs(y.astype(np.float64) - exact).max() < (1.2 if dtype is FLOAT8 else 0.15)


def test_infinity_meets_unused_slots() -> None:
    """x = infinity at column 1 reaches the empty window of row 0 (0 * infinity) but not row 1, whose slots stand elsewhere."""
    w = np.array([[0, 0, 0, 0], [3, 0, 4, 0], [0, 2, 0, 0]], np.float32)
    packed = reference.pack(w, Pattern(2, 4), FLOAT16)
    y = reference.matmul(np.array([[1, math.inf, 1, 1]], np.float32), packed)
    np.testing.assert_array_equal(y, [[np.nan, 7, np.inf]])


def test_norms_and_gates_are_their_formulas() -> None:
    rng = np.random.default_rng(0)
    x, residual, gamma = (rng.standard_normal(shape).astype(np.float32) * 9 for shape in ((3, 500), (3, 500), (500,)))
    y, kept = reference.rms_norm(x, gamma, 1e-3, residual)
    s = x.astype(np.float64) + residual
    np.testing.assert_allclose(y, s / np.sqrt((s * s).mean(1, keepdims=True) + 1e-3) * gamma, rtol=1e-5)
    np.testing.assert_allclose(kept, s, rtol=1e-6, atol=1e-6)
    gates = np.concatenate([np.linspace(-30, 30, 999), [-1e38, 1e38, -100, 0]]).astype(np.float32)
    g, both = gates.astype(np.float64), np.concatenate([gates, np.full_like(gates, 0.5)])[None]
    with np.errstate(over="ignore"):
        silu, gelu = g / (1 + np.exp(-g)), g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    np.testing.assert_allclose(reference.silu_and_mul(both)[0], silu / 2, rtol=1e-6, atol=1e-35)
    np.testing.assert_allclose(reference.gelu_and_mul(both)[0], gelu / 2, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_product_without_columns_is_the_bias(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where einsum makes something of nothing, as NumPy's makes NaN where memory behind an empty array holds it."""
    einsum = np.einsum

    def careless(subscripts: str, *operands: np.ndarray) -> np.ndarray:
        result = einsum(subscripts, *operands)
        return result if operands[0].size else np.full_like(result, 77)

    monkeypatch.setattr(np, "einsum", careless)
    packed = reference.pack(np.zeros((3, 0), np.float32), Pattern(6, 8), dtype)
    bias = np.array([1, 0, -2], np.float32)
    for m in (0, 1, 5):
        x = np.zeros((m, 0), np.float32)
        np.testing.assert_array_equal(reference.matmul(x, packed), np.zeros((m, 3)))
        np.testing.assert_array_equal(reference.matmul(x, packed, bias), np.broadcast_to(bias, (m, 3)))


def test_tokens_that_are_not_finite_stay_so_when_quantized() -> None:
    packed = reference.pack(np.eye(4, dtype=np.float32), Pattern(2, 4), INT8)
    y = reference.matmul(np.array([[1, np.nan, 0, 0], [1, 0, 0, 0], [np.inf, 0, 0, 0]], np.float32), packed)
    assert np.isnan(y).all(axis=1).tolist() == [True, False, True]


def test_dequantize() -> None:
    q = np.array([[2, -3]], np.int8)
    assert reference.dequantize(q, np.array([[0.5]], np.float32)).tolist() == [[1, -1.5]]
    assert reference.dequantize(q, None).tolist() == [[2, -3]]
