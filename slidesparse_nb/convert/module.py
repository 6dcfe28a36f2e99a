"""A module X of a checkpoint that is packed or unpacked: one linear layer, or the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..checkpoint.safetensors import tensor_bytes
from ..checkpoint.stacked import Stacked
from ..core.packed import PackedWeight
from ..core.scheme import Scheme


@dataclass(frozen=True)
class Module:
    """One linear layer X, or the experts of a layer: its tensors in the checkpoint and the scheme it will be stored in.

    Attributes:
        name: X, where the weight is `X.weight`; of experts the tensor's name, without a `.weight` at its end.
        shape: (n, k), or (e, n, k).
        code: safetensors code of the source weight.
        scheme: that it is packed in.
        scale: name of the source's scale tensor, if the weight is already quantized.
        replaced: source tensors that packing replaces or makes meaningless.
        stacked: how the dense tensor holds the experts; None of one matrix.
        whole, expert: of one expert [n, k], the module of all, and its number.
    """

    name: str
    shape: tuple[int, ...]
    code: str
    scheme: Scheme
    scale: str | None
    replaced: tuple[str, ...]
    stacked: Stacked | None = None
    whole: Module | None = None
    expert: int = 0

    @property
    def n(self) -> int:
        return self.shape[-2]

    @property
    def k(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of all its matrices."""
        return prod(self.shape[:-1])

    @property
    def weight(self) -> str:
        """Name of its dense tensor."""
        return f"{self.name}.weight" if self.stacked is None else self.stacked.tensor

    @property
    def label(self) -> str:
        """What errors call its weight."""
        return f"{self.weight}{self.place}"

    @property
    def place(self) -> str:
        """ "[3]" of expert 3; "" of a whole module."""
        return "" if self.whole is None else f"[{self.expert}]"

    @property
    def count(self) -> int:
        """How many matrices it has."""
        return prod(self.shape[:-2])

    def matrices(self) -> list[Module]:
        """Its matrices [n, k]: itself, or every expert."""
        return [self._matrix(i) for i in range(self.count)]

    def _matrix(self, i: int) -> Module:
        return self if len(self.shape) == 2 else replace(self, shape=self.shape[-2:], whole=self, expert=i)

    def cut(self, first: int, last: int) -> Iterator[tuple[Module, int, int]]:
        """Rows first to last - 1 of all its matrices, as rows of single ones: (matrix, first, last)."""
        n = max(1, self.n)
        for i in range(first // n, max(first // n + 1, -(-last // n))):
            yield self._matrix(i), max(first - i * n, 0), min(last - i * n, n)

    def dense_array(self, checkpoint: Checkpoint) -> NDArray[Any]:
        """The dense weight [n, k] of one matrix, a view of a checkpoint that holds it."""
        array = checkpoint.array(self.weight)
        if self.stacked is None or self.whole is None:
            return array
        matrix: NDArray[Any] = self.stacked.matrices(array, self.whole.shape)[self.expert]
        return matrix

    def dense_rows(self, checkpoint: Checkpoint, first: int, last: int) -> NDArray[Any]:
        """Rows first to last - 1 of the dense weight of one matrix."""
        if self.stacked is None or self.whole is None:
            return checkpoint.rows(self.weight, first, last)
        return self.dense_array(checkpoint)[first:last]

    def packed_matrix(self, packed: PackedWeight) -> PackedWeight:
        """The one matrix of a packed weight of the whole module."""
        for i in np.unravel_index(self.expert, packed.lead) if packed.lead else ():
            packed = packed[int(i)]
        return packed

    def scales(self, checkpoint: Checkpoint, first: int, last: int) -> Any:
        """Scales of already quantized rows, one number or [rows, 1]; None for other weights."""
        if self.scale is None:
            return None
        scales = checkpoint.array(self.scale)
        return scales if scales.size == 1 else scales.reshape(-1, 1)[first:last]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the dense weight."""
        return tensor_bytes(self.code, (self.k,))

    @property
    def nbytes(self) -> int:
        """Bytes of the dense weight."""
        return self.rows * self.row_bytes

    @property
    def extent(self) -> tuple[int, int]:
        """Rows, and source bytes in each."""
        return self.rows, self.row_bytes

    def release(self, checkpoint: Checkpoint, first: int, last: int) -> None:
        """Let go of the memory behind rows of one matrix; of a transposed one, whose rows are everywhere, after the last."""
        if self.stacked is not None and self.stacked.transposed:
            if last < self.n:
                return
            first = 0
        start = self.expert * self.nbytes
        checkpoint.release(self.weight, start + first * self.row_bytes, start + last * self.row_bytes)
