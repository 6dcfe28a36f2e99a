"""PackedWeight: weights in packed form (docs/format.md), on any device; the shapes and types of its arrays."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import FormatError, OperandError, shown
from .dtypes import FLOAT32, DType
from .pattern import Pattern
from .scheme import Scheme

ORDERED_NIBBLES = tuple(i0 | i1 << 2 for i1 in range(4) for i0 in range(i1))
"""The six legal index nibbles, first index below the second: 0x4, 0x8, 0x9, 0xC, 0xD, 0xE."""

LARGEST_DIMENSION = 2**31 - 1
"""Rows or columns of a weight, at most."""

LARGEST_INT8_SLOTS = 2**17 - 1
"""Slots of a row of int8 values, at most: each adds up to 2^14 to a sum that is kept in int32."""

PARTS = {
    "weight_packed": "values", "weight_meta": "meta", "weight_scale": "scale", "weight_block_scale": "block_scale",
    "weight_shape": "shape",
}  # fmt: skip
"""Last part of a tensor's name in the packed format -> the attribute of PackedWeight that it holds."""

_LEGAL_BYTE = np.zeros(256, bool)
_LEGAL_BYTE[[low | high << 4 for low in ORDERED_NIBBLES for high in ORDERED_NIBBLES]] = True


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Weights w [*lead, n, k] of a (2N-2):2N pattern, as 2:4 windows: kept values and their 2-bit indices.

    Most weights have no leading dimensions; the experts of a layer have one, [e, n, k], and `packed[i]` is expert i.

    Attributes:
        values: [*lead, n, ks/2] of `dtype`, the two kept values of each window, windows in order; of 4-bit types uint8 [*lead,
            n, ks/4], two values a byte, low nibble first.
        meta: [*lead, n, ks/8] uint8, one nibble a window (i0 | i1 << 2, i0 < i1), low nibble first; over pairs ks/16.
        scale: [*lead, n, 1] float32, w ~= values * scale; None for 16-bit values.
        pattern: the Pattern, over the scheme's unit.
        shape: logical (*lead, n, k), before k is padded to the slice unit.
        scheme: how values and scales are stored; made of whatever `Scheme.of` takes.
        block_scale: [*lead, n, ceil(ks / columns)] of the scheme's type, one a block of its expanded columns: w ~= values *
            block_scale * scale; None where the scheme has no blocks.

    Arrays are NumPy or CuPy, all of one kind; on a device that has no FP8 or bfloat16 arrays, `values` holds the raw bits
    (`dtype.raw`). Two packed weights of the same matrix are equal byte for byte: the form is canonical.
    """

    values: Any
    meta: Any
    scale: Any
    pattern: Pattern
    shape: tuple[int, ...]
    scheme: Scheme
    block_scale: Any = None

    def __post_init__(self) -> None:
        with contextlib.suppress(TypeError):  # what is no shape, check_shapes refuses
            object.__setattr__(self, "shape", tuple(map(operator.index, self.shape)))
        with contextlib.suppress(OperandError):  # so with what is no scheme
            object.__setattr__(self, "scheme", Scheme.of(self.scheme))

    @property
    def dtype(self) -> DType:
        """Element type of `values`."""
        return self.scheme.dtype

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions: () for one matrix, (e,) for e experts."""
        return self.shape[:-2]

    @property
    def n(self) -> int:
        return self.shape[-2]

    @property
    def k(self) -> int:
        return self.shape[-1]

    @property
    def ks(self) -> int:
        """Expanded k."""
        return self.pattern.expanded_k(self.k)

    @property
    def slice_unit(self) -> int:
        """Columns at whose multiples `columns` may cut."""
        return self.scheme.slice_unit(self.pattern)

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and scales."""
        return sum(int(a.nbytes) for a in (self.values, self.meta, self.scale, self.block_scale) if a is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over logical weights, padding and scales included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def __repr__(self) -> str:
        try:
            self.check_shapes()
        except FormatError as error:
            return f"PackedWeight(invalid: {error})"
        size = f"{self.bits_per_weight:.2f} bits a weight"
        return f"PackedWeight({' x '.join(map(str, self.shape))}, {self.pattern.described}, {self.scheme}, {size})"

    # ---- named tensors

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Any],
        pattern: Pattern | str | tuple[int, int],
        scheme: object = None,
        *,
        name: str = "",
    ) -> PackedWeight:
        """The packed weight of a module from its tensors of the packed format (docs/format.md); nothing is copied.

        Args:
            tensors: by name, NumPy or CuPy: weight_packed [*lead, n, ks/2] of `dtype` or its bits; weight_meta [*lead, n,
                ks/8] uint8; weight_scale [*lead, n, 1] float32, not for 16-bit types; weight_block_scale, for schemes with
                blocks; weight_shape, the integers *lead, n and k. Others are not read.
            pattern: "6:8", (6, 8) or a Pattern: a file's metadata tell it.
            scheme: by name or dtype; by default that of weight_packed's type. Needed if those are raw bits or 4-bit values.
            name: the module's, before the dot in the tensors' names; "" if they are bare, as in a module's own state.

        Raises:
            OperandError: `pattern` or `scheme` is none, or `tensors` is no mapping.
            FormatError: a tensor is missing, or `validate` refuses it.
        """
        if not isinstance(tensors, Mapping):
            raise OperandError(f"tensors: {type(tensors).__name__} must be a dictionary, such as packed.tensors()")
        given = {part: tensors.get(_full(name, tensor)) for tensor, part in PARTS.items()}
        for tensor, part in PARTS.items():
            if given[part] is None and part not in ("scale", "block_scale"):
                raise FormatError(f"tensors: {shown(_full(name, tensor))} is missing; a packed weight needs it")
        found = Scheme.of(getattr(given["values"], "dtype", None) if scheme is None else scheme, "scheme")
        shape = getattr(given.pop("shape"), "tolist", lambda: tensors[_full(name, "weight_shape")])()
        return cls(**given, pattern=found.pattern(pattern), shape=shape, scheme=found).validate(name or "packed")

    def tensors(self, name: str = "") -> dict[str, Any]:
        """The tensors of the packed format, as `from_tensors` takes them: these arrays themselves, and the shape on the host.

        Args:
            name: of the module; "" for bare names.

        Raises:
            FormatError: a tensor has the wrong dtype or shape.
        """
        self.check_shapes(name or "packed")
        held = {tensor: getattr(self, part) for tensor, part in PARTS.items()} | {
            "weight_shape": np.array(self.shape, np.int64)
        }
        return {_full(name, tensor): array for tensor, array in held.items() if array is not None}

    # ---- parts, for tensor parallelism and fused layers

    def rows(self, a: int, b: int) -> PackedWeight:
        """Outputs a to b-1 (column parallelism, one of q/k/v): shape (*lead, b - a, k); views.

        Raises:
            OperandError: not 0 <= a <= b <= n.
            FormatError: a tensor has the wrong dtype or shape.
        """
        a, b = self._range("rows", a, b, -2, 1)
        return self._cut(lambda part: part[..., a:b, :], (*self.lead, b - a, self.k))

    def columns(self, a: int, b: int) -> PackedWeight:
        """Inputs a to b-1 (row parallelism): shape (*lead, n, b - a); views.

        The parts' products with x[..., a:b] add up to the product of the whole. Scales stay those of whole rows, so 8-bit
        parts are not what `pack` makes of w[:, a:b]. If x is quantized part by part, each part has scales of its own.

        Args:
            a, b: multiples of `slice_unit`, or k.

        Raises:
            OperandError: another cut, or not 0 <= a <= b <= k.
            FormatError: a tensor has the wrong dtype or shape.
        """
        a, b = self._range("columns", a, b, -1, self.slice_unit)
        start, stop = (part_shapes(self.pattern, (self.n, at), self.scheme) for at in (a, b))
        along_k = {part: array for part, array in part_arrays(self).items() if part != "scale"}
        cut = {part: array[..., start[part][1] : stop[part][1]] for part, array in along_k.items()}
        return replace(self, **cut, shape=(*self.lead, self.n, b - a))

    def __getitem__(self, i: int) -> PackedWeight:
        """The weight at i of the first leading dimension (expert i), from the end if i < 0: views.

        Raises:
            OperandError: there are no leading dimensions, or i is no integer within the first.
            FormatError: a tensor has the wrong dtype or shape.
        """
        self.check_shapes()
        if not self.lead:
            raise OperandError(f"packed: is one matrix {self.shape}, not a stack; cut it with rows(a, b) or columns(a, b)")
        try:
            at = operator.index(i)
        except TypeError:
            raise OperandError(f"packed: index {shown(i)} must be an integer") from None
        if not -self.lead[0] <= at < self.lead[0]:
            raise OperandError(f"packed: index {shown(i)} must be below {self.lead[0]}, the first dimension of {self.shape}")
        return self._cut(lambda part: part[at], self.shape[1:])

    def __iter__(self) -> Iterator[PackedWeight]:
        """The weights of the first leading dimension, in order."""
        return (self[i] for i in range(self.lead[0] if self.lead else 1))

    def matrices(self) -> list[PackedWeight]:
        """Its matrices of shape (n, k), in order: itself if it is one, or every expert; views."""
        return [matrix for weight in self for matrix in weight.matrices()] if self.lead else [self]

    def _cut(self, cut: Callable[[Any], Any], shape: tuple[int, ...]) -> PackedWeight:
        """The weight of `shape` that has `cut` of every array."""
        return replace(self, **{part: cut(array) for part, array in part_arrays(self).items()}, shape=shape)

    def _range(self, of: str, a: int, b: int, axis: int, unit: int) -> tuple[int, int]:
        """a and b as integers, or OperandError unless the axis may be cut there."""
        self.check_shapes()
        size, letter = self.shape[axis], "nk"[axis]
        try:
            first, last = operator.index(a), operator.index(b)
        except TypeError:
            raise OperandError(f"{of}: {shown(a)} to {shown(b)} must be two integers") from None
        if not 0 <= first <= last <= size:
            raise OperandError(f"{of}: {shown(a)} to {shown(b)} must be a range within 0 to {size}, the {letter} of the weight")
        for at in (first, last):
            if at % unit and at != size:
                below = at // unit * unit
                raise OperandError(
                    f"{of}: {first} to {last} must be cut at multiples of {unit}, the slice unit of {self.pattern.described},"
                    f" or at {letter} = {size}; nearest to {at} are {below} and {min(below + unit, size)}"
                )
        return first, last

    @classmethod
    def concat(cls, weights: Iterable[PackedWeight]) -> PackedWeight:
        """Weights of the same x as one, outputs below outputs (fused q/k/v, gate/up); the inverse of `rows`. Copies.

        Args:
            weights: shapes (*lead, n_i, k) of one lead, k, pattern and dtype, in one place: all on the host, or all on one GPU.

        Returns:
            Shape (*lead, sum of n_i, k), where the weights are; raw bits if one of them holds raw bits.

        Raises:
            OperandError: there is none, one is no PackedWeight, they differ, or they are too large together.
            FormatError: a tensor has the wrong dtype or shape.
        """
        listed = cls._alike(weights, ("lead", "k"))
        shape = (*listed[0].lead, sum(weight.n for weight in listed), listed[0].k)
        return cls._joined(listed, shape, lambda parts: np.concatenate(parts, axis=-2))

    @classmethod
    def stack(cls, weights: Iterable[PackedWeight]) -> PackedWeight:
        """Weights as one with a leading dimension more (the experts of a layer): `stack(weights)[i]` is weights[i]. Copies.

        Args:
            weights: e of one shape, pattern and dtype, in one place: all on the host, or all on one GPU.

        Returns:
            Shape (e, *shape), where the weights are; raw bits if one of them holds raw bits.

        Raises:
            As `concat`.
        """
        listed = cls._alike(weights, ("shape",))
        return cls._joined(listed, (len(listed), *listed[0].shape), np.stack)

    @classmethod
    def _alike(cls, weights: Iterable[PackedWeight], facts: tuple[str, ...]) -> list[PackedWeight]:
        """The weights as a list, or OperandError unless they can be joined: these facts, pattern, dtype and place agree."""
        listed = list(weights) if isinstance(weights, Iterable) and not isinstance(weights, PackedWeight) else []
        if not listed:
            raise OperandError(f"weights: {shown(weights)} must be a list of PackedWeights, at least one")
        first = require_packed(listed[0], "weights[0]")
        for i, weight in enumerate(listed):
            require_packed(weight, f"weights[{i}]").check_shapes(f"weights[{i}]")
            for fact in (*facts, "pattern", "scheme", "_place"):
                if (found := getattr(weight, fact)) != (wanted := getattr(first, fact)):
                    raise OperandError(f"weights[{i}].{fact.strip('_')}: {found} must be {wanted}, as of weights[0]")
        return listed

    @classmethod
    def _joined(cls, weights: list[PackedWeight], shape: tuple[int, ...], join: Callable[[list[Any]], Any]) -> PackedWeight:
        """Weights that are `_alike` as one of `shape`; `join` makes one array of those of each part."""
        first = weights[0]
        if problem := size_problem(first.pattern, shape, first.scheme):
            raise OperandError(f"weights: together {problem}")

        def joined(part: str) -> Any:
            arrays = [getattr(w, part) for w in weights]
            raw = np.dtype(f"u{arrays[0].dtype.itemsize}")  # CuPy joins no bfloat16
            whole = join([array.view(raw) for array in arrays])  # NumPy hands CuPy's arrays to CuPy
            return whole.view(arrays[0].dtype if len({array.dtype for array in arrays}) == 1 else raw)

        with contextlib.nullcontext() if isinstance(first.values, np.ndarray) else first.values.device:
            return replace(first, **{part: joined(part) for part in part_arrays(first)}, shape=shape)

    @property
    def _place(self) -> str:
        """The memory that holds the arrays."""
        return "host" if isinstance(self.values, np.ndarray) else str(getattr(self.values, "device", type(self.values)))

    # ---- checks

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
        """The part of `validate` that looks at no element: FormatError if a tensor has the wrong dtype or shape.

        Or if pattern, shape and dtype are none, or together too large (`size_problem`).
        """
        if not isinstance(self.pattern, Pattern) or not isinstance(self.scheme, Scheme):
            for part, kind in (("pattern", Pattern), ("scheme", Scheme)):
                if not isinstance(value := getattr(self, part), kind):
                    raise FormatError(f"{name}.{part}: {shown(value)} must be a {kind.__name__}; pack or load makes it so")
        if self.pattern.unit != self.scheme.unit:
            raise FormatError(f"{name}.pattern: {self.pattern} must have unit {self.scheme.unit}, as {self.scheme} has")
        if not isinstance(self.shape, tuple) or len(self.shape) < 2 or not all(isinstance(v, int) for v in self.shape):
            raise FormatError(f"{name}.shape: {shown(self.shape)} must be two integers (n, k), or more, (*lead, n, k)")
        if problem := size_problem(self.pattern, self.shape, self.scheme):
            raise FormatError(f"{name}: {problem}")
        wanted = part_shapes(self.pattern, self.shape, self.scheme)
        for part, why in (("scale", "carry no scale"), ("block_scale", "have no block scales")):
            if part not in wanted and getattr(self, part) is not None:
                raise FormatError(f"{name}.{part}: {self.scheme} values {why}; remove it")
        for part, shape in wanted.items():
            array, dtypes = getattr(self, part), part_dtypes(part, self.scheme)
            if array is None:
                raise FormatError(f"{name}.{part}: is missing; {self.scheme} weights need it")
            if not hasattr(array, "shape") or not hasattr(array, "dtype"):
                raise FormatError(f"{name}.{part}: is {type(array).__name__}, must be an array, {dtypes[0]} {shape}")
            if isinstance(array, np.ma.MaskedArray):
                raise FormatError(f"{name}.{part}: is a masked array, must be a plain one")
            if tuple(array.shape) != shape or array.dtype not in dtypes:
                raise FormatError(
                    f"{name}.{part}: is {array.dtype} {tuple(array.shape)}, must be {dtypes[0]} {shape}"
                    f" for a weight of shape {self.shape} at {self.pattern}"
                )

    def _check_contents(self, name: str, first_row: int) -> None:
        if not (legal := _LEGAL_BYTE[self.meta]).all():
            *lead, row, column = at = tuple(map(int, np.argwhere(~legal)[0]))
            raise FormatError(
                f"{name}.meta: byte 0x{int(self.meta[at]):02x} at {_expert(lead)}row {first_row + row}, column {column} holds a"
                " nibble out of order; every nibble must be i0 | i1 << 2 with i0 < i1"
            )
        if self.scale is not None and not (good := np.isfinite(self.scale) & (self.scale >= 0)).all():
            *lead, row, _ = at = tuple(map(int, np.argwhere(~good)[0]))
            raise FormatError(
                f"{name}.scale: {float(self.scale[at])} at {_expert(lead)}row {first_row + row} must be finite and not negative"
            )
        if (block := self.scheme.weights.block) is not None:
            scales = self.block_scale.view(block.scale.numpy).astype(np.float32)
            if not (good := (scales >= block.smallest) & (scales <= block.largest)).all():
                *lead, row, column = at = tuple(map(int, np.argwhere(~good)[0]))
                raise FormatError(
                    f"{name}.block_scale: {scales[at]} at {_expert(lead)}row {first_row + row}, block {column} must be"
                    f" {block.smallest:g} to {block.largest:g}"
                )


def _expert(lead: Iterable[int]) -> str:
    """The beginning of a place in a weight with leading dimensions."""
    return "".join(f"expert {i}, " for i in lead)


def part_shapes(pattern: Pattern, shape: tuple[int, ...], scheme: Scheme | DType) -> dict[str, tuple[int, ...]]:
    """The arrays of a packed weight of a logical shape (*lead, n, k), and their shapes."""
    scheme = Scheme.of(scheme)
    rows, ks = shape[:-1], pattern.expanded_k(shape[-1])
    shapes = {"values": (*rows, ks // 2 * min(scheme.dtype.bits, 8) // 8), "meta": (*rows, ks // (8 * pattern.unit))}
    if scheme.scaled:
        shapes["scale"] = (*rows, 1)
    if block := scheme.weights.block:
        shapes["block_scale"] = (*rows, -(-ks // block.columns))
    return shapes


def part_arrays(packed: PackedWeight) -> dict[str, Any]:
    """The arrays of `part_shapes`, by name."""
    return {part: getattr(packed, part) for part in part_shapes(packed.pattern, packed.shape, packed.scheme)}


def part_dtypes(part: str, scheme: Scheme) -> tuple[np.dtype[Any], ...]:
    """The dtypes that such an array may have, the usual one first; or raw bits."""
    if part == "values":
        return scheme.dtype.stored, scheme.dtype.raw
    if part == "block_scale" and scheme.weights.block:
        return scheme.weights.block.scale.numpy, scheme.weights.block.scale.raw
    return (FLOAT32 if part == "scale" else np.dtype(np.uint8),)


def size_problem(pattern: Pattern, shape: tuple[int, ...], scheme: Scheme | DType) -> str:
    """What forbids weights of this shape: one sentence without its subject and full stop; "" if nothing does."""
    k = shape[-1]
    if min(shape) < 0:
        return f"shape {shape} must not be negative"
    if max(math.prod(shape[:-1]), k) > LARGEST_DIMENSION:
        return f"shape {shape} must be below 2^31 in both dimensions" + ", the rows of all experts together" * (len(shape) > 2)
    if Scheme.of(scheme).accumulator == np.int32 and (slots := pattern.expanded_k(k) // 2) > LARGEST_INT8_SLOTS:
        return (
            f"k={k} takes {slots} slots at pattern {pattern}, and {scheme} products of more than {LARGEST_INT8_SLOTS} could"
            " overflow their int32 sums; store the weights in another type, or split k"
        )
    return ""


def _full(name: str, tensor: str) -> str:
    """A tensor's name in a module."""
    return f"{name}.{tensor}" if name else tensor


def require_packed(packed: object, name: str = "packed") -> PackedWeight:
    """`packed`, or OperandError unless it is a PackedWeight."""
    if not isinstance(packed, PackedWeight):
        raise OperandError(f"{name}: {type(packed).__name__} must be a PackedWeight; pack(w) or load(path) makes one")
    return packed


def require_matrix(packed: object) -> PackedWeight:
    """`packed`, or OperandError unless it is a PackedWeight without leading dimensions."""
    weight = require_packed(packed)
    require_matrix_shape(weight.shape)
    return weight


def require_matrix_shape(shape: object) -> None:
    """OperandError if it is the shape of a weight with leading dimensions; what is no shape passes (`check_shapes` sees it)."""
    if isinstance(shape, tuple | list) and len(shape) > 2:
        raise OperandError(f"packed: shape {shown(tuple(shape))} is a stack of matrices; take one of them, packed[i]")
