"""SparseGPT (Frantar, Alistarh: Massive language models can be accurately pruned in one-shot, 2023).

    w [n, k]   weights      X [tokens, k]   inputs of the layer      H = X^T X + damping   [k, k]      U^T U = H^-1, U upper

Columns are fixed from left to right. Before the first column of a group is fixed, the weights of that group that cost least,
(w / U[j, j])^2, are chosen to go. Fixing column j leaves an error e = (w[:, j] - fixed) / U[j, j] in every row, and the columns
right of it make up for it: w[:, j+1:] -= e U[j, j+1:]. Groups are those of the pattern from the first column to the last; the
original starts them anew every 128 columns, where 4:6 and 8:10 break.

Updates are made lazily: the columns are halved again and again down to one group, and after the left half is fixed one matrix
product updates the right half. The arithmetic is float32, and float64 for U; its order is fixed. When all columns are fixed,
`refine` improves the mask and the weights that stay, which the original does not do.

With a scheme, weights are rounded as they are fixed, so that later columns make up for that error, too. `pack` scales a row by
its largest stored weight, which is known only in the end. So the columns are gone over twice. The first time nothing is
rounded; it gives the mask, the weights, and each row's largest one, a, rounded to 8 significant bits. The
second time those weights are rounded under the same mask: the step of a row is a / t (t = 127 for INT8, 448 for FP8), and the
row's largest weight becomes a or -a, to the last bit of float32. Hence `pack` finds the scale a / t and the same integers
again, and in float32 the very same values; even where the weights are stored in bfloat16 in between: its rounding moves a value
by less than half a step, and makes the largest a. (In float16 the same holds unless a is below 2^-14.)

The result is proportional to w. So every row is divided by a power of two first, and no square leaves float32's range.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.checks import number
from ..core.pattern import Pattern
from ..core.reference import TINY
from ..core.scheme import Scheme
from ..errors import OperandError, UnsupportedError
from .groups import kept, matrix, namespace
from .refine import refine

DAMPING = 0.1
"""Share of H's diagonal that is added to it. The paper adds a share of the mean, which a few large inputs decide: in one layer
of SmolLM2-135M it is 550 times the median, so that 0.01 of it hides what the other inputs say."""

LARGER = "raise the damping, or prune by wanda, which changes no weight"
"""The way out where a weight that makes up for others becomes too large."""

_FLOATS = {"float8_e4m3fn": (4, -9), "bfloat16": (8, -133), "float16": (11, -24)}
"""Type -> bits of its significand, and the exponent of its smallest number."""

MOST_DAMPING = 1e6
"""From here on H is its diagonal, and nothing makes up for anything."""


def checked_damping(damping: Any) -> float:
    """The damping as a float. Raises OperandError unless it is one."""
    return number("damping", damping, MOST_DAMPING, f"a share of the diagonal, 0 to {MOST_DAMPING:g}, such as {DAMPING}")


def checked_scheme(scheme: Any) -> Scheme:
    """The scheme that is meant.

    Raises:
        OperandError: there is no such scheme. UnsupportedError: it has scales along k.
    """
    found = Scheme.of(scheme, "scheme")
    if found.blocks:
        over = " at a pattern over pairs, such as '6:8 pairs'" if found.unit > 1 else ""
        raise UnsupportedError(
            f"scheme: {found} has scales along k, which SparseGPT cannot foresee; prune without a scheme{over}, and pack as"
            f" {found}"
        )
    return found


@dataclass(frozen=True)
class InverseFactor:
    """The inverse of a damped Hessian as a factor, for every layer that reads the same inputs.

    Attributes:
        upper: U, float32 [k, k], upper triangular: U^T U = H^-1.
        damped: H, float32 [k, k], divided by the mean of its diagonal.
        dead: bool [k], columns that are zero in all inputs; their weights become zero, as in the paper's code.
    """

    upper: Any
    damped: Any
    dead: Any


def inverse_factor(hessian: Any, damping: float = DAMPING) -> InverseFactor:
    """Damp a Hessian and factor its inverse.

    Args:
        hessian: [k, k] array of NumPy or CuPy: X^T X of the inputs, or any multiple of it.
        damping: share of the diagonal that is added to it, column by column.

    Raises:
        OperandError: another shape or type, NaN, infinity, or a negative diagonal; or a matrix that is not positive definite
            with this damping.
    """
    xp = namespace(hessian)
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise OperandError(f"hessian: shape {hessian.shape} must be [k, k], X^T X of the inputs")
    damping = checked_damping(damping)
    h = matrix("hessian", hessian, hessian.shape).astype(np.float64)
    diagonal = xp.diagonal(h).copy()
    if bool((diagonal < 0).any()):
        raise OperandError("hessian: has a negative number on its diagonal, where X^T X has sums of squares")
    dead = diagonal == 0
    mean = float(diagonal.sum()) / max(1, int((~dead).sum())) or 1.0
    h = xp.where(dead[:, None] | dead, 0, h)
    index = xp.arange(len(h))
    h[index, index] = xp.where(dead, mean, diagonal * (1 + damping))
    strict = contextlib.nullcontext() if xp is np else importlib.import_module("cupyx").errstate(linalg="raise")
    try:  # H = R R^T with R upper: the Cholesky factor of H in reverse order, in reverse order
        with strict:
            r = xp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
            upper = xp.triu(xp.linalg.inv(r)).astype(np.float32)
    except np.linalg.LinAlgError:
        upper = xp.full(h.shape, np.nan, np.float32)
    if not bool((xp.diagonal(upper) > 0).all()):
        raise OperandError(f"hessian: is not positive definite with damping {damping:g}; raise it, or calibrate on more")
    return InverseFactor(xp.ascontiguousarray(upper), (h / mean).astype(np.float32), dead)


@np.errstate(over="ignore", invalid="ignore")
def sparsegpt(
    w: Any,
    hessian: Any,
    pattern: Pattern | str,
    scheme: Scheme | str | None = None,
    damping: float = DAMPING,
    *,
    keep: Any = None,
    refined: bool = True,
) -> Any:
    """Weights that obey the pattern and multiply the inputs of `hessian` almost like w.

    Args:
        w: [n, k] array of NumPy or CuPy, of any real type.
        hessian: [k, k] of the same library, X^T X of the inputs or any multiple of it; or an `InverseFactor`, to which
            `damping` does not apply.
        pattern: (2N-2):2N; over pairs, the costs of a pair are added.
        scheme: INT8_W8A8, FP8_DYNAMIC, BF16 or FP16: round weights to it as they are fixed; None rounds nothing.
        keep: bool [n, k], a mask that obeys the pattern, made elsewhere; by default it is chosen.
        refined: improve mask and weights in the end (see `refine`); the paper's method does not.

    Returns:
        float32 [n, k], new: with a scheme, the values times the scales that `pack` will store (see above).

    Raises:
        OperandError: an operand of another shape or type, or with NaN or infinity; a damping that is too small; weights that
            overflow float32.
        UnsupportedError: a scheme with scales along k.
    """
    scheme = None if scheme is None else checked_scheme(scheme)
    pattern, w = Pattern.of(pattern), matrix("w", w)
    factor = hessian if isinstance(hessian, InverseFactor) else inverse_factor(hessian, damping)
    if factor.dead.shape != w.shape[1:]:
        raise OperandError(f"hessian: is of {len(factor.dead)} columns, w of {w.shape[1]}; give that of this layer's inputs")
    if keep is not None and (keep.shape != w.shape or keep.dtype != bool):
        raise OperandError(f"keep: {keep.dtype} {keep.shape} must be bool {w.shape}, as w")
    if not w.size:
        return w
    xp = namespace(w)
    transposed = xp.ascontiguousarray(xp.where(factor.dead, np.float32(0), w).T)  # a column's weights lie side by side
    exponent = xp.frexp(xp.abs(transposed).max(axis=0))[1] - 1
    transposed = xp.ldexp(transposed, -exponent)
    mask = None if keep is None else xp.array(keep.T, order="C")
    columns, mask = _Sweep(factor.upper, pattern).run(transposed.copy(), mask)
    if refined:
        columns, mask = refine(columns, transposed, factor.damped, mask, pattern if keep is None else None)
    columns = xp.ldexp(columns, exponent)
    if scheme is not None:
        columns, _ = _Sweep(factor.upper, pattern, _rounding(columns, scheme)).run(columns, mask)
    if not bool(xp.isfinite(columns).all()):
        raise OperandError(f"w: a weight that makes up for others overflows float32; {LARGER}")
    return xp.ascontiguousarray(columns.T)


Rounding = Callable[[Any, int], Any]
"""(weights [n] of column j, j) -> the values that are stored for them."""


@dataclass
class _Sweep:
    """One pass over the columns of w, which are the rows of `columns`."""

    upper: Any
    pattern: Pattern
    rounding: Rounding | None = None

    def run(self, columns: Any, keep: Any = None) -> tuple[Any, Any]:
        """Fix all columns in place; returns them, and the mask [k, n]."""
        xp, self.columns = namespace(columns), columns
        self.chooses = keep is None
        self.keep = xp.ones(columns.shape, bool) if keep is None else keep
        self.errors = xp.zeros_like(columns)
        self.halve(0, -(-len(columns) // self.pattern.columns))
        return self.columns, self.keep

    def halve(self, first: int, last: int) -> None:
        """Fix groups first to last - 1."""
        if last - first <= 1:
            if last > first:
                self.group(slice(first * self.pattern.columns, min(last * self.pattern.columns, len(self.columns))))
            return
        middle = (first + last) // 2
        self.halve(first, middle)
        size = self.pattern.columns
        left, right = slice(first * size, middle * size), slice(middle * size, min(last * size, len(self.columns)))
        self.columns[right] -= self.upper[left, right].T @ self.errors[left]
        self.halve(middle, last)

    def group(self, group: slice) -> None:
        """Choose what goes, and fix column after column."""
        xp, columns, keep = namespace(self.columns), self.columns[group], self.keep[group]
        upper, errors = self.upper[group, group], self.errors[group]
        if self.chooses:
            cost = xp.where(columns == 0, np.float32(-1), (columns / xp.diagonal(upper)[:, None]) ** 2)
            keep[...] = kept(cost.T, self.pattern).T
        for j in range(len(columns)):
            fixed = xp.where(keep[j], columns[j], np.float32(0))
            if self.rounding is not None:
                fixed = self.rounding(fixed, group.start + j)
            errors[j] = (columns[j] - fixed) / upper[j, j]
            columns[j] = fixed
            columns[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]


def _rounding(columns: Any, scheme: Scheme) -> Rounding:
    """How a scheme rounds a column, where `columns` [k, n] are about the weights that will be stored."""
    xp, element = namespace(columns), scheme.dtype
    if not scheme.scaled or not len(columns):
        return lambda fixed, j: to_grid(fixed, element.name, np.inf)  # what overflows is refused where it is stored
    largest, t = xp.abs(columns).max(axis=0), np.float32(element.largest)
    pinned = xp.abs(columns).argmax(axis=0)
    sign = xp.sign(xp.take_along_axis(columns, pinned[None], axis=0)[0])
    live = largest >= TINY
    a = xp.where(live, to_grid(largest, "bfloat16", np.inf), np.float32(1))

    def rounding(fixed: Any, j: int) -> Any:
        q = xp.where(pinned == j, sign * t, to_grid(fixed * (t / a), element.name, float(t)))
        return xp.where(live, q * (a / t), np.float32(0))

    return rounding


def to_grid(x: Any, name: str, largest: float) -> Any:
    """float32 numbers rounded to nearest even in the type of that name, and clipped: float32, the shape of x."""
    xp = namespace(x)
    if name == "int8":
        return xp.clip(xp.rint(x), -largest, largest)
    digits, smallest = _FLOATS[name]
    exponent = xp.maximum(xp.frexp(x)[1] - digits, smallest)  # of a unit in the last place
    return xp.clip(xp.ldexp(xp.rint(xp.ldexp(x, -exponent)), exponent), -largest, largest)
