"""PackedWeight: one weight matrix in packed form (docs/format.md), on any device; and the activations that meet it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .dtypes import FLOAT32, DType
from .errors import FormatError
from .pattern import Pattern

ORDERED_NIBBLES = tuple(i0 | i1 << 2 for i1 in range(4) for i0 in range(i1))
"""The six legal index nibbles, first index below the second: 0x4, 0x8, 0x9, 0xC, 0xD, 0xE."""

_LEGAL_BYTE = np.zeros(256, bool)
_LEGAL_BYTE[[low | high << 4 for low in ORDERED_NIBBLES for high in ORDERED_NIBBLES]] = True


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Weights w [n, k] of a (2N-2):2N pattern, as 2:4 windows: kept values and their 2-bit indices.

    Attributes:
        values: [n, ks/2] of `dtype`, the two kept values of each window, windows in order.
        meta: [n, ks/8] uint8, one nibble a window (i0 | i1 << 2, i0 < i1), low nibble first.
        scale: [n, 1] float32, w ~= values * scale; None for 16-bit values.
        pattern: the Pattern.
        shape: logical (n, k), before k is padded to the slice unit.
        dtype: storage type of `values`.
        arranged: per device, what its kernels load; made on first use, and by `to_device`.

    Arrays are NumPy or CuPy, all of one kind; on a device that has no FP8 or bfloat16 arrays, `values` holds the raw bits
    (`dtype.raw`). Two packed weights of the same matrix are equal byte for byte: the form is canonical.
    """

    values: Any
    meta: Any
    scale: Any
    pattern: Pattern
    shape: tuple[int, int]
    dtype: DType
    arranged: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def n(self) -> int:
        return self.shape[0]

    @property
    def k(self) -> int:
        return self.shape[1]

    @property
    def ks(self) -> int:
        """Slid k."""
        return self.pattern.slid_k(self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and scales."""
        return sum(int(a.nbytes) for a in (self.values, self.meta, self.scale) if a is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over logical weights, padding and scales included."""
        return 8 * self.nbytes / max(1, self.n * self.k)

    def __repr__(self) -> str:
        size = f"{self.bits_per_weight:.2f} bits a weight"
        return f"PackedWeight({self.n} x {self.k}, {self.pattern.described}, {self.dtype}, {size})"

    def to_device(self, device: int | None = None) -> PackedWeight:
        """Arrange the weight for a GPU ahead of its first product; return self.

        Args:
            device: number of the GPU; by default the current one.

        Raises:
            UnsupportedError: the device has no sparse tensor cores, or none for this type.
        """
        importlib.import_module(f"{__package__}.device.gemm").to_device(self, device)  # looked up when called: it stands above
        return self

    def validate(self, name: str = "packed", *, first_row: int = 0) -> PackedWeight:
        """Check dtypes, shapes and index order; return self. (`verify` proves the values.)

        Args:
            name: what error messages call this weight.
            first_row: what they count rows from, if this is a block of rows.

        Raises:
            FormatError: a tensor has the wrong dtype or shape, a nibble is out of order, or a scale is negative or not finite.
        """
        self.check_shapes(name)
        if isinstance(self.meta, np.ndarray):  # on a device this would wait for it; files are checked before they go there
            self._check_contents(name, first_row)
        return self

    def check_shapes(self, name: str = "packed") -> None:
        """The part of `validate` that looks at no element: FormatError if a tensor has the wrong dtype or shape."""
        n, k = self.shape
        if n < 0 or k < 0:
            raise FormatError(f"{name}: shape ({n}, {k}) must not be negative")
        wanted: list[tuple[str, Any, tuple[int, int], tuple[np.dtype[Any], ...]]] = [
            ("values", self.values, (n, self.ks // 2), (self.dtype.numpy, self.dtype.raw)),
            ("meta", self.meta, (n, self.ks // 8), (np.dtype(np.uint8),)),
        ]
        if self.dtype.qmax is not None:
            wanted.append(("scale", self.scale, (n, 1), (FLOAT32,)))
        elif self.scale is not None:
            raise FormatError(f"{name}.scale: {self.dtype} values carry no scale; remove it")
        for part, array, shape, dtypes in wanted:
            if array is None:
                raise FormatError(f"{name}.{part}: is missing; {self.dtype} weights need it")
            if tuple(array.shape) != shape or array.dtype not in dtypes:
                raise FormatError(
                    f"{name}.{part}: is {array.dtype} {tuple(array.shape)}, must be {dtypes[0]} {shape}"
                    f" for a weight of shape ({n}, {k}) at {self.pattern}"
                )

    def _check_contents(self, name: str, first_row: int) -> None:
        if not (legal := _LEGAL_BYTE[self.meta]).all():
            row, column = map(int, np.argwhere(~legal)[0])
            raise FormatError(
                f"{name}.meta: byte 0x{int(self.meta[row, column]):02x} at row {first_row + row}, column {column} holds a"
                " nibble out of order; every nibble must be i0 | i1 << 2 with i0 < i1"
            )
        if self.scale is not None and not (good := np.isfinite(self.scale) & (self.scale >= 0)).all():
            row = int(np.flatnonzero(~good[:, 0])[0])
            raise FormatError(
                f"{name}.scale: {float(self.scale[row, 0])} at row {first_row + row} must be finite and not negative"
            )


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """Activations quantized once, to be multiplied by several packed weights (q/k/v, gate/up).

    Attributes:
        values: [m, k] of `dtype`, one row a token; leading dimensions of x are flattened into m.
        scale: [m, 1] float32, x ~= values * scale.
        lead: the leading dimensions of x, whose product is m.
        dtype: int8 or float8_e4m3fn.
        source: the dtype x had; what `matmul` returns unless told otherwise.
    """

    values: Any
    scale: Any
    lead: tuple[int, ...]
    dtype: DType
    source: np.dtype[Any]

    @property
    def k(self) -> int:
        return int(self.values.shape[1])
