"""Layers that read the same tensor (q/k/v, gate/up), pruned as one matrix: their rows do not depend on each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.pattern import Pattern
from ..core.scheme import Scheme
from ..errors import OperandError
from .groups import namespace
from .sparsegpt import DAMPING, sparsegpt
from .statistics import Moments
from .wanda import wanda


def prune_together(
    weights: Mapping[str, Any],
    moments: Moments,
    method: str,
    pattern: Pattern,
    *,
    scheme: Scheme | str | None = None,
    damping: float | None = None,
) -> dict[str, Any]:
    """Prune layers by what they read.

    Args:
        weights: layer -> [n, k] of NumPy or CuPy, at least one.
        moments: of their inputs, in arrays of the same library.
        method: "wanda" or "sparsegpt", to which `scheme` and `damping` (None: the usual) apply.

    Returns:
        layer -> float32 [n, k].

    Raises:
        OperandError: as `wanda` and `sparsegpt`, with the first layer's name.
    """
    xp = namespace(moments.squares)
    w, known = xp.concatenate(list(weights.values())), moments.norms if method == "wanda" else moments.hessian
    try:
        usual = DAMPING if damping is None else damping
        made = wanda(w, known, pattern) if method == "wanda" else sparsegpt(w, known, pattern, scheme, usual)
    except OperandError as error:
        raise OperandError(f"{next(iter(weights))}: {error}") from None
    ends = np.cumsum([len(each) for each in weights.values()])[:-1]
    return dict(zip(weights, xp.split(made, ends.tolist()), strict=True))
