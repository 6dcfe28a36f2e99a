"""The arithmetic of (2N-2):2N."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_nb import OperandError, Pattern
from slidesparse_nb.core.pattern import known_patterns

halves = st.integers(2, 20)  # N


@pytest.mark.parametrize("value", ["6:8", " 6 : 8 ", (6, 8), [6, 8], Pattern(6, 8)])
def test_of(value: object) -> None:
    assert Pattern.of(value) == Pattern(6, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["", "6", "6:8:2", "a:b", "-6:8", "6:-8", None, 6, (6,), (6, 8, 2), "9999999999:8"], "must be non-zeros:total"),
        ([(6.0, 8.0), ("6", "8"), (True, 8), (None, 8)], "must be two integers"),
        (["0:2", "4:8", "1:4", "3:5", "8:8", "8:6", "0:0", "5:7"], r"not of the form \(2N-2\):2N(?!.*counts zeros)"),
        (["2:8"], r"2:8 .*counts zeros calls 2:8 \(2 zeros in 8\) is 6:8 here"),
    ],
)
def test_of_refuses(values: list[object], message: str) -> None:
    for value in values:
        with pytest.raises(OperandError, match=message):
            Pattern.of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16])
def test_integers_of_numpy(kind: type) -> None:
    for pattern in (Pattern(kind(6), kind(8)), Pattern.of((kind(6), kind(8)))):
        assert pattern == Pattern(6, 8)
        assert type(pattern.nnz) is type(pattern.group) is int
        assert pattern.expanded_k(100_000) == 150_000


@pytest.mark.parametrize("group", [4098, 10**12, 10**30, 10**5000, -(10**12)], ids=int.bit_length)
def test_absurd_groups(group: int) -> None:
    """An error message, at once, and of a bearable length."""
    with pytest.raises(OperandError, match=r"^pattern: .* is too large; a group may have 4096 columns at most$") as caught:
        Pattern(group - 2, group)
    assert len(str(caught.value)) < 200
    assert Pattern(4094, 4096).windows == 2047


def test_long_values_are_cut() -> None:
    with pytest.raises(OperandError, match="must be non-zeros:total") as caught:
        Pattern.of("\x1b" + "9" * 100_000)
    with pytest.raises(OperandError, match=r"^pattern: <an integer of 16610 bits> must be"):
        Pattern.of(10**5000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 250
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "windows", "expansion", "speedup", "unit", "bits"),
    [
        ("2:4", 1, Fraction(1), Fraction(2), 8, (5, 9)),
        ("4:6", 2, Fraction(4, 3), Fraction(3, 2), 6, (20 / 3, 12)),
        ("6:8", 3, Fraction(3, 2), Fraction(4, 3), 16, (7.5, 13.5)),
        ("8:10", 4, Fraction(8, 5), Fraction(5, 4), 10, (8, 14.4)),
        ("14:16", 7, Fraction(7, 4), Fraction(8, 7), 32, (8.75, 15.75)),
    ],
)
def test_published_numbers(
    text: str, windows: int, expansion: Fraction, speedup: Fraction, unit: int, bits: tuple[float, float]
) -> None:
    """`bits`: a weight of 8 and of 16 bits."""
    pattern = Pattern.of(text)
    assert (pattern.windows, pattern.expansion, pattern.speedup, pattern.slice_unit) == (windows, expansion, speedup, unit)
    assert (pattern.bits_per_weight(8), pattern.bits_per_weight(16)) == pytest.approx(bits)
    assert str(pattern) == text
    assert pattern.described == f"{text} (2 zeros in {pattern.group})"


@given(halves, st.integers(0, 1000))
def test_slice_unit_is_the_smallest_cut_on_whole_bytes(n: int, k: int) -> None:
    pattern = Pattern(2 * n - 2, 2 * n)
    unit = pattern.slice_unit
    whole = [g for g in (1, 2) if g * pattern.windows % 2 == 0]  # two windows share a byte of indices
    assert unit == pattern.group * whole[0]
    assert pattern.padded_k(k) % unit == 0
    assert 0 <= pattern.padded_k(k) - k < unit
    assert pattern.expanded_k(k) == pattern.expansion * pattern.padded_k(k)
    assert pattern.expanded_k(k) % 8 == 0


@given(halves, st.integers(0, 200))
def test_lift_index(n: int, k: int) -> None:
    pattern = Pattern(2 * n - 2, 2 * n)
    expected = [
        group * pattern.group + 2 * window + place
        for group in range(pattern.padded_k(k) // pattern.group)
        for window in range(pattern.windows)
        for place in range(4)
    ]
    assert pattern.lift_index(k).tolist() == expected
    assert pattern.lift_index(k).dtype == np.intp


def test_order_and_known_patterns() -> None:
    assert [str(p) for p in known_patterns()] == ["2:4", "4:6", "6:8", "8:10", "10:12", "12:14", "14:16"]
    assert sorted(known_patterns(), reverse=True)[0] == Pattern(14, 16)
    assert len({Pattern.of("6:8"), Pattern(6, 8)}) == 1


def test_pairs() -> None:
    pairs = Pattern(6, 8, unit=2)
    assert Pattern.of("6:8 pairs") == Pattern.of(" 6:8  pairs ") == pairs != Pattern(6, 8)
    assert (str(pairs), pairs.described) == ("6:8 pairs", "6:8 pairs (2 zero pairs in 8)")
    assert (pairs.columns, pairs.windows, pairs.slice_unit) == (16, 3, 32)
    assert (pairs.padded_k(33), pairs.expanded_k(33), pairs.expansion) == (64, 96, Fraction(3, 2))
    assert pairs.lift_index(32)[:16].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11]
    assert str(pairs.violated(0, 1, 1)).startswith("w: row 0, group 1 (columns 16 to 31) has more than 6 non-zero pairs")
    for unit in (0, 3, True, "2", None, 2.0):
        with pytest.raises(OperandError, match=r"^pattern: unit .* must be 1, or 2 for pairs of columns$"):
            Pattern(6, 8, unit)  # type: ignore[arg-type]


def test_violated_names_the_place() -> None:
    error = Pattern(6, 8).violated(3, 2, 5, "they are dense")
    assert (error.row, error.group, error.count) == (3, 2, 5)
    assert "row 3, group 2 (columns 16 to 23)" in str(error)
    assert str(error).endswith("; they are dense")
