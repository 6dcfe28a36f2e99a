"""verify accepts what pack makes and nothing else: each way to be wrong is refused by name."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import SMALL, awkward, drop_two, schemes, weights

from slidesparse_nb import FormatError, OperandError, PackedWeight, Pattern, Scheme, VerificationError, pack, unpack, verify
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED, DType
from slidesparse_nb.core.packed import part_arrays
from slidesparse_nb.packing import verify_rows
from slidesparse_nb.packing.proof import lowest_two

P = Pattern(6, 8)


def test_rows_below_the_smallest_scale() -> None:
    w = np.full((3, 8), 2.0**-101, np.float32)
    w[1, 2] = 2.0**-100
    w[2] = 0
    for dtype in ("int8", "fp8"):
        packed = pack(w, P, dtype, prune="magnitude")
        verify(packed, w, prune="magnitude")
        assert packed.scale[:, 0].tolist()[::2] == [1, 1]
        lost = pack(np.zeros_like(w), P, dtype)  # row 1 had a weight to keep
        with pytest.raises(VerificationError, match=r"row 1, column 2 was lost"):
            verify(lost, w)


def test_threads_name_the_true_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", 64)
    w = drop_two(weights((40, 32)), P)
    packed = pack(w, P, "float16")
    other = w.copy()
    other[33, np.flatnonzero(w[33])[4]] += 1
    for workers in (1, 2):
        verify(packed, w, max_workers=workers)
        with pytest.raises(VerificationError, match="for row 33, column"):
            verify(packed, other, max_workers=workers)
    with pytest.raises(VerificationError, match="for row 1033, column"):
        verify_rows(packed.rows(20, 40), other[20:], first_row=1020)


# ---- what is wrong with the packed form --------------------------------------------------------------------------


def tampered(
    packed: PackedWeight, row: int, window: int, positions: tuple[int, int], values: tuple[float, float]
) -> PackedWeight:
    """`packed` with one window replaced."""
    new_values, meta = packed.values.copy(), packed.meta.copy()
    new_values[row, 2 * window : 2 * window + 2] = np.array(values, packed.dtype.numpy)
    shift = 4 * (window % 2)
    meta[row, window // 2] = meta[row, window // 2] & (0xF0 >> shift) | (positions[0] | positions[1] << 2) << shift
    return replace(packed, values=new_values, meta=meta)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize(
    ("window", "positions", "values", "named"),
    [
        (0, (0, 2), (1, 0), 0),  # a lone value at 0 stands at (0, 1)
        (0, (0, 3), (0, 0), 0),  # and so does an empty window
        (0, (1, 2), (0, 3), 0),  # a lone value at 2 stands at (0, 2)
        (1, (0, 1), (3, 0), 0),  # column 2 belongs to window 0, which has room
        (1, (1, 2), (3, 4), 0),  # column 3 too
        (4, (2, 3), (3, 4), 4),  # columns past k hold nothing
        (2, (0, 1), (-0.0, 0.0), 2),  # -0.0 in a slot; of int8 there is none
    ],
)
def test_not_canonical(dtype: DType, window: int, positions: tuple[int, int], values: tuple[float, float], named: int) -> None:
    empty = pack(np.zeros((2, 11), np.float32), P, dtype)
    bad = tampered(empty, 1, window, positions, values).validate()
    if bad.values.tobytes() == empty.values.tobytes() and np.array_equal(bad.meta, empty.meta):
        assert dtype is INT8
        return
    with pytest.raises(VerificationError, match=rf"window {named} of row 1 \(group {named // 3}\) is not canonical"):
        verify(bad)


def test_minus_zero_as_a_scale() -> None:
    packed = pack(np.ones((3, 2), np.int8), scale=[1, 0, 0])
    with pytest.raises(VerificationError, match=r"packed.scale: -0.0 at row 2, where pack writes 0.0"):
        verify(replace(packed, scale=np.array([[1], [0], [-0.0]], np.float32)))


@pytest.mark.parametrize("dtype", [FLOAT8, BFLOAT16, FLOAT16], ids=str)
def test_not_finite(dtype: DType) -> None:
    for value in (np.nan, -np.nan, *([] if dtype is FLOAT8 else [np.inf, -np.inf])):
        packed = tampered(pack(np.ones((2, 6), np.float32), P, dtype), 1, 1, (0, 1), (1.0, value))
        with pytest.raises(VerificationError, match="NaN or infinity at row 1, window 1"):
            verify(packed)


def test_structure_comes_first() -> None:
    packed = pack(np.ones((2, 6), np.float32), P, "int8")
    meta = packed.meta.copy()
    meta[1, 0] = 0
    with pytest.raises(FormatError, match="byte 0x00 at row 1, column 0"):
        verify(replace(packed, meta=meta))
    with pytest.raises(FormatError, match="byte 0x00 at row 101"):
        verify_rows(replace(packed, meta=meta), first_row=100)
    with pytest.raises(FormatError, match="scale: is missing"):
        verify(replace(packed, scale=None))


# ---- what is wrong with the values -------------------------------------------------------------------------------


@pytest.fixture
def w() -> np.ndarray:
    return drop_two(weights((5, 30), seed=3), P)


@schemes
def test_one_bit_anywhere(scheme: Scheme) -> None:
    """Of any part, in any byte: named by its part and row."""
    w, rng = awkward((3, 100)), np.random.default_rng(0)
    packed = pack(w, "6:8", scheme, prune="magnitude")
    for part, array in part_arrays(packed).items():
        row_bytes = array[0].nbytes
        for at in rng.permutation(array.nbytes)[:40]:
            changed = array.copy()
            changed.reshape(-1).view(np.uint8)[at] ^= 1 << rng.integers(8)
            with pytest.raises((VerificationError, FormatError), match=rf"^packed\b.* row {at // row_bytes}\b"):
                verify(replace(packed, **{part: changed}), w, prune="magnitude")


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_weight_lost_or_moved(dtype: DType, w: np.ndarray) -> None:
    q = unpack(pack(w, P, dtype))
    scale = pack(w, P, dtype).scale
    row, column = np.argwhere((q != 0) & (np.abs(w) < np.abs(w).max(axis=1, keepdims=True)))[5]
    lost = q.copy()
    lost[row, column] = 0
    with pytest.raises(VerificationError, match=f"at row {row}, column {column} was lost, but at pattern 6:8 prune='none'"):
        verify(reference.pack(lost, P, dtype, scale), w)
    with pytest.raises(VerificationError, match=f"at row {row}, column {column} was lost"):
        verify(reference.pack(lost, P, dtype, scale), w, prune="magnitude")
    with pytest.raises(VerificationError, match=f"at row {row}, column {column} was lost"):
        verify(reference.pack(lost, P, dtype, scale), w, prune="random", seed=None)
    moved = lost.copy()
    free = int(np.flatnonzero(w[row] == 0)[0])
    moved[row, free] = q[row, column]
    with pytest.raises(VerificationError, match=f"for row {row}, column {free} is not -?0"):
        verify(reference.pack(np.where(w == 0, moved, q), P, dtype, scale), w)


W = np.array([[9, 8, 7, 6, 5, 4, 3, 2]], np.float32)
TINY_SIXTH = np.array([[9, 8, 7, 6, 5, 1e-6, 3, 2]], np.float32)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize(
    ("w", "kept", "prune", "message"),
    [
        (W, [9, 8, 7, 6, 5, 0, 0, 2], "magnitude", "w = 4.0 at row 0, column 5 was lost, .* prune='magnitude' would not have"),
        (W, [9, 8, 7, 6, 5, 0, 0, 2], np.array([[9, 8, 7, 6, 5, 0, 0, 2]]), None),
        (W, [9, 8, 7, 6, 5, 0, 0, 2], np.arange(8.0)[None], "the scores would not have"),
        (W, [9, 8, 7, 6, 5, 0, 0, 2], "random", None),
        (W, [9, 8, 7, 6, 0, 0, 0, 2], "random", "was lost"),  # one more than the pattern demands
        (np.ones_like(W), [1, 1, 1, 1, 1, 1, 0, 0], "magnitude", None),  # ties go to the left
        (np.ones_like(W), [0, 0, 1, 1, 1, 1, 1, 1], "magnitude", "column 0 was lost"),
        (TINY_SIXTH, [9, 8, 7, 6, 5, 0, 3, 0], W - 2, "column 6 was kept, .* the scores|column 5 was lost"),
    ],
)
def test_pruning_of_the_wrong_weights(dtype: DType, w: np.ndarray, kept: list[float], prune: Any, message: str | None) -> None:
    """What quantizes to zero anyway, as the sixth of the last may, is no excuse for keeping another of its group."""
    packed = pack(np.array([kept], np.float32), P, dtype)
    with contextlib.nullcontext() if message is None else pytest.raises(VerificationError, match=message):
        verify(packed, w, prune=prune, seed=None if isinstance(prune, str) and prune == "random" else 0)


def test_random_pruning_with_another_seed() -> None:
    with pytest.raises(VerificationError, match=r"was (lost|kept)"):
        verify(pack(W, P, "float16", prune="random", seed=1), W, prune="random", seed=0)


def test_lowest_two_against_sorting() -> None:
    rng = np.random.default_rng(0)
    for pattern in SMALL:
        for k in (0, 1, pattern.group - 1, pattern.group, 3 * pattern.group - 1, 4 * pattern.group + 2):
            score = rng.integers(-1, 4, (6, k)).astype(np.float32)
            kept = reference.prune(np.ones((6, k)), pattern, score)
            assert (lowest_two(score, pattern) == (kept == 0)).all()


# ---- operands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": np.ones((5, 31), np.float32)}, VerificationError, r"shape \(5, 30\) is not \(5, 31\), that of w"),
        ({"w": np.ones((5, 30), np.float64)}, OperandError, "w: float64"),
        (
            {"w": np.ones((5, 30), ml_dtypes.float8_e4m3fn)},
            VerificationError,
            "int8 values cannot come from float8_e4m3fn weights",
        ),
        ({"w": np.full((5, 30), np.nan, np.float32)}, OperandError, "w: nan at row 0, column 0"),
        ({"w": np.ones((5, 30), np.int8)}, OperandError, "scale: is missing"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str, w: np.ndarray) -> None:
    packed = pack(w, P, "int8")
    with pytest.raises(error, match=message):
        verify(packed, **{"w": w, **change})


def test_arrays_of_another_machine(w: np.ndarray) -> None:
    class Elsewhere:
        def __init__(self, array: np.ndarray) -> None:
            self.shape, self.dtype = array.shape, array.dtype

    packed = pack(w, P)
    with pytest.raises(OperandError, match="arrays are Elsewhere; verify needs NumPy arrays"):
        verify(replace(packed, values=Elsewhere(packed.values), meta=Elsewhere(packed.meta)))


@pytest.mark.parametrize("value", [65520, 1e5, -3e38])
def test_a_source_that_overflows_is_refused_without_a_warning(value: float) -> None:
    w = np.ones((2, 16), np.float32)
    packed = pack(w, "6:8", "fp16", prune="magnitude")
    w[0, 7] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(VerificationError, match=r"row 0, column"):
            verify(packed, w, prune="magnitude")
