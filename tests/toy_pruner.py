"""A method of pruning that the package does not have, as someone would add it: this file, and a row in `pruning.PRUNERS`."""

from __future__ import annotations

from typing import Any

import numpy as np


class Toy:
    """|w| times a norm of its column, and a little chance."""

    kernel, seeded, statistics = "scores", True, "column"

    def scores(self, w: Any, seed: int, first_row: int, statistics: Any) -> Any:
        return np.abs(w) * statistics + (seed % 7 + first_row + np.arange(len(w)))[:, None] * np.arange(w.shape[1]) % 5 / 9
