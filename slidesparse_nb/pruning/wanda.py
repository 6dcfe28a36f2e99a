"""Wanda (Sun, Liu, Bair, Kolter: A simple and effective pruning approach for large language models, 2023).

The score of a weight is |w[i, j]| * norm[j], where norm[j] is the norm of column j of the layer's inputs. In every group of
every row the weights of lowest score go; the others keep their values. `pack(w, prune="wanda", statistics=norms)` does the
same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.pattern import Pattern
from ..errors import OperandError
from .groups import kept, matrix, namespace


def wanda(w: Any, norms: Any, pattern: Pattern | str) -> Any:
    """w with the weights of lowest |w| * norm set to zero in every group; of equal scores the leftmost stay.

    Args:
        w: [n, k] array of NumPy or CuPy, of any real type.
        norms: [k] >= 0, of the same library: norms of the columns of the inputs, or any multiple of them.
        pattern: (2N-2):2N; over pairs, the scores of a pair are added.

    Returns:
        float32 [n, k], new.

    Raises:
        OperandError: an operand of another shape or type, or with NaN or infinity; a norm below zero.
    """
    pattern, w = Pattern.of(pattern), matrix("w", w)
    xp = namespace(w)
    norms = matrix("norms", norms, w.shape[1:])
    if bool((norms < 0).any()):
        raise OperandError("norms: hold a negative number; a norm is zero or more")
    if len(norms):  # a power of two less, so that no product overflows
        norms = xp.ldexp(norms, -xp.frexp(norms.max())[1])
    score = xp.where(w == 0, np.float32(-1), xp.abs(w) * norms)
    return xp.where(kept(score, pattern), w, np.float32(0))
