"""A packed weight as named tensors, and the metadata that says so: the packed format (docs/format.md), versions 1 and 2."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..core.dtypes import PACKED, DType
from ..core.packed import PARTS, PackedWeight, part_arrays, part_dtypes, part_shapes
from ..core.pattern import Pattern
from ..core.scheme import SCHEMES, Scheme
from ..core.untrusted_json import parse_json
from ..errors import FormatError, OperandError, shown
from .stacked import Stacked, parse_stacked, stacked_json

VERSIONS = (1, 2)
"""Of the packed format. A file is of version 2 only where block scales, a pattern over pairs or leading dimensions need it."""

TOOL = f"slidesparse_nb {__version__}"


def version_of(scheme: Scheme | DType | None, stacked: Mapping[str, Stacked] | None = None) -> int:
    """The version that a file with such weights has at least; `stacked`: those with leading dimensions."""
    return 2 if stacked or (scheme is not None and Scheme.of(scheme).blocks) else 1


# ---- a file's metadata -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedHeader:
    """What `__metadata__` says of the packed weights in a file.

    Attributes:
        pattern: of all of them.
        scheme: of all of them, or None where they differ.
        tool: the program that wrote them, and its version.
        version: of the format.
        stacked: module -> dense tensor, of those with leading dimensions; maybe of other files, too.
    """

    pattern: Pattern
    scheme: Scheme | None
    tool: str
    version: int = 1
    stacked: Mapping[str, Stacked] = field(default_factory=dict)

    @property
    def schemes(self) -> list[Scheme]:
        """Those that weights in such a file may have."""
        fitting = [s for s in SCHEMES.values() if s.unit == self.pattern.unit and version_of(s) <= self.version]
        return [self.scheme] if self.scheme else fitting

    def scheme_of(self, values: str, block_scale: str) -> Scheme | None:
        """The scheme whose values have this safetensors code; of several, the one whose block scales have the other."""
        found = [s for s in self.schemes if s.dtype.safetensors == values]
        scaled = (s for s in found if s.weights.block and s.weights.block.scale.safetensors == block_scale)
        return next(scaled, found[0] if found else None)


def pattern_facts(pattern: Pattern) -> dict[str, int]:
    """A pattern in JSON."""
    facts = {"nnz": pattern.nnz, "group": pattern.group}
    return facts if pattern.unit == 1 else {**facts, "unit": pattern.unit}


def slidesparse_metadata(
    pattern: Pattern,
    scheme: Scheme | DType | None,
    version: int | None = None,
    stacked: Mapping[str, Stacked] | None = None,
) -> dict[str, str]:
    """`__metadata__` of a file with packed weights; `scheme` is None where they are of several."""
    scheme = None if scheme is None else Scheme.of(scheme)
    version = max(version or 1, version_of(scheme, stacked))
    stored = {"dtype": scheme.dtype.name if scheme else None} if version == 1 else {"scheme": scheme.name if scheme else None}
    held = {"stacked": stacked_json(stacked)} if stacked else {}
    header = {"version": version, "pattern": pattern_facts(pattern), **stored, "tool": TOOL, **held}
    return {"format": "pt", "slidesparse": json.dumps(header, separators=(",", ":"))}


def parse_metadata(metadata: Mapping[str, str], where: object = "__metadata__") -> PackedHeader | None:
    """Inverse of `slidesparse_metadata`; None where a file holds no packed weights.

    Raises:
        FormatError: the version is unknown, or a field is missing, unknown or wrong.
    """
    if "slidesparse" not in metadata:
        return None
    where = f"{where}: metadata 'slidesparse'"
    header = parse_json(metadata["slidesparse"].encode("utf-8"), where)
    version = header.get("version")
    if type(version) is not int or version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise FormatError(f"{where}: version {shown(version)} is unknown; this program reads versions {known}, update it")
    key = "dtype" if version == 1 else "scheme"
    optional = {"stacked"} if version > 1 else set()
    if header.keys() - optional != {"version", "pattern", key, "tool"} or not isinstance(header["tool"], str):
        also = ", and maybe stacked" if optional else ""
        raise FormatError(f"{where}: is {shown(header)}, must have exactly the keys version, pattern, {key} and tool{also}")
    stacked = parse_stacked(header.get("stacked", {}), where)
    pattern, named = header["pattern"], header[key]
    if not isinstance(pattern, dict) or pattern.keys() - ({"unit"} if version > 1 else set()) != {"nnz", "group"}:
        raise FormatError(f'{where}: pattern {shown(pattern)} must be like {{"nnz": 6, "group": 8}}')
    names = {dtype.name: Scheme.of(dtype) for dtype in PACKED} if version == 1 else SCHEMES
    if named is not None and (not isinstance(named, str) or named not in names):
        raise FormatError(f"{where}: {key} {shown(named)} must be one of {', '.join(names)}, or null for several")
    try:
        found = PackedHeader(Pattern(**pattern), names[named] if named else None, header["tool"], version, stacked)
    except OperandError as error:
        raise FormatError(f"{where}: {error}") from error
    if found.scheme and found.scheme.unit != found.pattern.unit:
        raise FormatError(f"{where}: pattern {found.pattern} must have unit {found.scheme.unit}, as {found.scheme} has")
    return found


# ---- named tensors ----------------------------------------------------------------------------------------------------


def packed_entries(
    module: str, pattern: Pattern, scheme: Scheme | DType, shape: tuple[int, ...]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, code, shape) of the tensors of a packed module whose weight is [*lead, n, k] = `shape`."""
    scheme = Scheme.of(scheme)
    codes = {"values": scheme.dtype.safetensors, "meta": "U8", "scale": "F32"}
    if (block := scheme.weights.block) is not None:
        codes["block_scale"] = block.scale.safetensors
    shapes: dict[str, tuple[int, ...]] = {**part_shapes(pattern, shape, scheme), "shape": (len(shape),)}
    return [
        (f"{module}.{tensor}", {**codes, "shape": "I64"}[part], shapes[part])
        for tensor, part in PARTS.items()
        if part in shapes
    ]


def packed_names(module: str, packed: PackedWeight) -> list[str]:
    """Names of the tensors of a packed module."""
    return [name for name, _, _ in packed_entries(module, packed.pattern, packed.scheme, packed.shape)]


def packed_arrays(module: str, packed: PackedWeight) -> dict[str, NDArray[Any]]:
    """The tensors of `packed_entries`, on the host."""
    there: dict[str, Any] = {
        part: on_host(array).view(part_dtypes(part, packed.scheme)[0]) for part, array in part_arrays(packed).items()
    }
    return {f"{module}.{tensor}": array for tensor, array in replace(packed, **there).tensors().items()}


def on_host(array: Any) -> NDArray[Any]:
    """An array of NumPy, or the copy of one of CuPy."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def module_names(tensors: Mapping[str, str], marked: bool, where: object) -> list[str]:
    """The packed modules among tensors: X of every X.weight_packed, if a file is `marked` as having some.

    Readers, and writers through `unreadable`, decide here which tensors may be in one checkpoint.
    Other formats use these names, too: compressed-tensors' pack-quantized holds 32-bit words under X.weight_packed.

    Args:
        tensors: name -> safetensors code.

    Raises:
        FormatError: X.weight_meta or X.weight_shape is missing, or without the others; X.weight, or a tensor X, beside
            X.weight_packed; X.weight_scale beside 16-bit values; or packed weights are there and no file is marked.
    """
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    if not marked:
        for module in modules:
            if f"{module}.weight_meta" in tensors:
                raise FormatError(f"{where}: module {shown(module)} is packed, but metadata 'slidesparse' is missing")
        return []
    for module in modules:
        unscaled = {s.dtype.safetensors: s for s in SCHEMES.values() if not s.scaled}.get(tensors[f"{module}.weight_packed"])
        if f"{module}.weight" in tensors:
            raise FormatError(f"{where}: module {shown(module)} has both weight and weight_packed; it must have one of them")
        if module in tensors:
            raise FormatError(f"{where}: {shown(module)} is the name of both a tensor and a packed module")
        if unscaled is not None and f"{module}.weight_scale" in tensors:
            tensor = shown(f"{module}.weight_packed")
            raise FormatError(f"{where}: tensor {tensor}: has a weight_scale, but {unscaled} values carry none")
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in ("weight_packed", "weight_meta", "weight_shape"):
            for needed in ("weight_packed", "weight_meta", "weight_shape"):
                if f"{module}.{needed}" not in tensors:
                    raise FormatError(f"{where}: tensor {shown(name)} needs tensor {shown(f'{module}.{needed}')}: missing")
    return modules


def unreadable(tensors: Mapping[str, str], packed: Collection[str], where: object) -> str:
    """Why a checkpoint of these tensors would not be read back as one with just these `packed` modules; "" if it would."""
    try:
        stray = set(module_names(tensors, bool(packed), where)) - set(packed)
    except FormatError as error:
        return str(error)
    return f"{where}: {shown(f'{min(stray)}.weight_packed')} would be read as part of a packed weight" if stray else ""
