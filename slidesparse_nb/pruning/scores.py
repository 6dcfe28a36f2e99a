"""Rows pruned by scores while they are written: by magnitude, or by scores and masks of a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..checkpoint.safetensors import SafetensorsFile, checked_path
from ..convert.module import Module
from ..core import prune as pruning
from ..core.checks import real_numbers, require_finite
from ..core.pattern import Pattern
from ..core.prune import Pruning
from ..cpu import kernels
from ..errors import OperandError, PatternError, UnsupportedError, shown

Rows = Callable[[Module, int, int], Any]
"""(matrix, first, last) -> these rows of it, pruned, in the source's type."""


class Scored:
    """Rows of a checkpoint by magnitude."""

    def __init__(self, checkpoint: Checkpoint, pattern: Pattern) -> None:
        self.checkpoint, self.pattern = checkpoint, pattern

    def method(self, matrix: Module) -> Pruning:
        return pruning.bind("magnitude", matrix.shape)

    def rows(self, matrix: Module, first: int, last: int) -> Any:
        """Rows whose weights of lowest score are zero. Raises UnsupportedError for NaN and infinity."""
        w = self.dense(matrix, first, last)
        method = self.method(matrix).rows(slice(first, last))
        by_magnitude = method.kernel == "magnitude"
        kernels.prune(w, self.pattern, None if by_magnitude else method.scores(kernels.to_float32(w), first))
        return w

    def dense(self, matrix: Module, first: int, last: int) -> Any:
        """A copy of rows of the source."""
        w = np.array(matrix.dense_array(self.checkpoint)[first:last], order="C")
        try:
            require_finite(w, first)
        except OperandError as error:
            raise UnsupportedError(f"{matrix.label}: {error}") from None
        return w


class Given(Scored):
    """Rows by scores and masks of a file: a tensor of zeros and ones is a mask."""

    def __init__(
        self, checkpoint: Checkpoint, pattern: Pattern, path: str | os.PathLike[str], modules: Mapping[str, Module]
    ) -> None:
        """Read the file.

        Raises:
            OperandError: a module has no scores, or twice; scores are no module's, or of another shape, negative or not finite.
        """
        super().__init__(checkpoint, pattern)
        self.file = SafetensorsFile(checked_path(path, "scores"))
        homes = {name.removesuffix(".weight"): name for name in self.file.tensors}
        if twice := self.file.tensors.keys() - homes.values():
            name = min(twice).removesuffix(".weight")
            raise OperandError(f"scores: {shown(name)} is there with .weight and without; take one out")
        if missing := next((name for name in modules if name not in homes), None):
            raise OperandError(f"scores: have none for {shown(missing)}; add it, or leave it dense with --ignore")
        if stray := next((name for name in homes if name not in modules), None):
            raise OperandError(f"scores: {shown(stray)} is no module that is pruned; take it out")
        self.arrays = {name: real_numbers("scores", self.file.array(homes[name])) for name in modules}
        self.masks = {name for name, a in self.arrays.items() if ((a == 0) | (a == 1)).all()}
        for module in modules.values():
            for matrix in module.matrices():
                self.method(matrix)

    def method(self, matrix: Module) -> Pruning:
        given = self.arrays[matrix.name]
        try:
            return pruning.bind(given[matrix.expert] if matrix.whole is not None else given, matrix.shape)
        except (OperandError, IndexError) as error:
            raise OperandError(f"{matrix.label}: {error}") from None

    def rows(self, matrix: Module, first: int, last: int) -> Any:
        """Rows without what goes. Raises PatternError where a mask breaks the pattern."""
        if matrix.name not in self.masks:
            return super().rows(matrix, first, last)
        w, mask = self.dense(matrix, first, last), self.method(matrix).rows(slice(first, last)).statistics
        assert mask is not None
        w[mask == 0] = 0
        if len(broken := kernels.violations(w, self.pattern)):
            raise PatternError(
                f"{matrix.label}: its mask leaves more than {self.pattern.nnz} non-zeros in group {broken[0][1]} of row"
                f" {first + broken[0][0]}, but {self.pattern.described} allows {self.pattern.nnz}; give another pattern"
            )
        return w
