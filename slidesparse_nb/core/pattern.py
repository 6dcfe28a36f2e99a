"""Pattern: the arithmetic of (2N-2):2N sparsity, here and nowhere else.

A row of weights is cut into groups of L = 2N columns, each with at most L-2 non-zeros. Group g is covered by N-1
overlapping windows of four columns, window j starting at column gL + 2j; each window holds at most two of the group's
non-zeros, so the windows side by side are a 2:4 sparse row, `expansion` times as long (SlideSparse, arXiv 2603.05232,
section 3). A pattern over pairs (unit = 2) is the same with an aligned pair of columns in the place of a column; a pair is
non-zero if one of the two is. k and all that is counted in columns stay columns.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..errors import OperandError, PatternError, shown

LARGEST_GROUP = 4096
"""Columns of a group, at most: far above any use, and an untrusted file cannot ask for a row of 10^30 columns."""


@dataclass(frozen=True, order=True)
class Pattern:
    """At most `nnz` non-zeros in every `group` consecutive columns; nnz = 2N-2 and group = 2N with 2 <= N <= 2048.

    Attributes:
        nnz, group: of columns or, with unit = 2, of pairs of columns: Pattern(6, 8, 2), written "6:8 pairs".
        unit: columns that are kept or dropped together, 1 or 2. A scheme has one (`Scheme.pattern`).

    Raises:
        OperandError: `nnz` and `group`, integers of any kind, are not of that form; or another unit.
    """

    nnz: int
    group: int
    unit: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.unit, bool) or not isinstance(self.unit, int | np.integer) or self.unit not in (1, 2):
            raise OperandError(f"pattern: unit {shown(self.unit)} must be 1, or 2 for pairs of columns")
        try:
            if isinstance(self.nnz, bool) or isinstance(self.group, bool):
                raise TypeError
            for name in ("nnz", "group", "unit"):  # plain integers: NumPy's would overflow
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        except TypeError:
            text = f"{shown(self.nnz)}:{shown(self.group)}"
            raise OperandError(f"pattern: {text} must be two integers, non-zeros:total, like 6:8") from None
        if not -LARGEST_GROUP <= min(self.nnz, self.group) <= max(self.nnz, self.group) <= LARGEST_GROUP:
            text = f"{shown(self.nnz)}:{shown(self.group)}"
            raise OperandError(f"pattern: {text} is too large; a group may have {LARGEST_GROUP} columns at most")
        if self.group >= 4 and self.group % 2 == 0 and self.nnz == self.group - 2:
            return
        text, hint = f"{self.nnz}:{self.group}", ""
        if self.nnz == 2 and self.group >= 6 and self.group % 2 == 0:
            hint = (
                f"; what a tool that counts zeros calls {text} (2 zeros in {self.group}) is {self.group - 2}:{self.group} here"
            )
        raise OperandError(f"pattern: {text} is not of the form (2N-2):2N with N >= 2 (2:4, 4:6, 6:8, 8:10 ...){hint}")

    @classmethod
    def of(cls, value: Pattern | str | tuple[int, int]) -> Pattern:
        """A Pattern from a Pattern, a string such as "6:8" or "6:8 pairs", or two integers such as (6, 8).

        Raises:
            OperandError: `value` does not name a (2N-2):2N pattern.
        """
        if isinstance(value, Pattern):
            return value
        if isinstance(value, str):
            match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})(\s+pairs)?\s*", value)
            if match:
                return cls(int(match[1]), int(match[2]), 2 if match[3] else 1)
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            return cls(*value)
        raise OperandError(f"pattern: {shown(value)} must be non-zeros:total, like '6:8' (2 zeros in 8)")

    def __str__(self) -> str:
        return f"{self.nnz}:{self.group}{' pairs' if self.unit == 2 else ''}"

    @property
    def described(self) -> str:
        """ "6:8 (2 zeros in 8)": how a person is told the pattern, since other tools count zeros."""
        return f"{self} (2 {'zeros' if self.unit == 1 else 'zero pairs'} in {self.group})"

    @property
    def columns(self) -> int:
        """Columns of a group: 8 for 6:8, 16 over pairs."""
        return self.group * self.unit

    @property
    def windows(self) -> int:
        """Windows per group, N-1."""
        return self.group // 2 - 1

    @property
    def expansion(self) -> Fraction:
        """Expanded k over k: 3/2 for 6:8."""
        return Fraction(4 * self.windows, self.group)

    @property
    def speedup(self) -> Fraction:
        """Ideal speed-up over dense, N/(N-1), since 2:4 hardware works twice as fast: 4/3 for 6:8."""
        return 2 / self.expansion

    @property
    def slice_unit(self) -> int:
        """Columns of k after which values and metadata start on a whole byte: 16 for 6:8. (`Scheme.slice_unit`: and scales.)"""
        return self.columns if self.windows % 2 == 0 else 2 * self.columns

    def padded_k(self, k: int) -> int:
        """k rounded up to the slice unit."""
        return -(-k // self.slice_unit) * self.slice_unit

    def expanded_k(self, k: int) -> int:
        """ks, the expanded k: length of a row of k columns after it is slid."""
        return self.padded_k(k) // self.columns * self.windows * 4 * self.unit

    def bits_per_weight(self, bits: float) -> float:
        """Packed size, values of `bits` bits and the 2-bit index of a unit, per logical weight (scales and padding apart)."""
        return self.nnz / self.group * (bits + 2 / self.unit)

    def violated(self, row: int, group: int, count: int, hint: str = "") -> PatternError:
        """The error to raise for weights w of which `count` groups break the pattern, the first at (row, group).

        Args:
            hint: what else is known of such weights: "" or one sentence.
        """
        first = group * self.columns
        kind = "non-zeros" if self.unit == 1 else "non-zero pairs"
        return PatternError(
            f"w: row {row}, group {group} (columns {first} to {first + self.columns - 1}) has more than {self.nnz} {kind},"
            f" and so have {count} groups in all, but pattern {self.described} allows {self.nnz};"
            f" prune the weights first, for instance with prune='magnitude'{'; ' + hint if hint else ''}",
            row=row,
            group=group,
            count=count,
        )

    def lift_index(self, k: int) -> NDArray[np.intp]:
        """The column of x that each lifted column reads: int [ks], where values >= k stand for a zero.

        `x_padded[:, lift_index(k)]` is lift; for 6:8 and k = 16: 0 1 2 3, 2 3 4 5, 4 5 6 7, 8 9 10 11, ...
        """
        groups = np.arange(self.padded_k(k) // self.columns)[:, None, None] * self.columns
        windows = np.arange(self.windows)[:, None] * 2 * self.unit
        return (groups + windows + np.arange(4 * self.unit)).ravel()


def known_patterns() -> list[Pattern]:
    """2:4, 4:6, 6:8 ... 14:16: those that files are searched for, and kernels compiled for."""
    return [Pattern(group - 2, group) for group in range(4, 17, 2)]
