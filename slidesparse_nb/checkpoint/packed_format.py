"""A packed weight as named tensors, and the metadata that says so: the packed format (docs/format.md)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..core.dtypes import PACKED, DType, packed_dtype
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.untrusted_json import parse_json
from ..errors import FormatError, OperandError, shown
from .stacked import Stacked, parse_stacked, stacked_json

VERSION = 1
"""Of the packed format, where a file holds nothing that version 1 lacks."""

VERSION_STACKED = 2
"""With weights that have leading dimensions."""

TOOL = f"slidesparse_nb {__version__}"

OF_CODE = {dtype.safetensors: dtype for dtype in PACKED}
"""Safetensors code -> packed type."""

# ---- a file's metadata -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedHeader:
    """What `__metadata__` says of the packed weights in a file.

    Attributes:
        pattern: of all of them.
        dtype: of all of them, or None where they differ.
        tool: the program that wrote them, and its version.
        stacked: module -> dense tensor, of those with leading dimensions; maybe of other files, too.
    """

    pattern: Pattern
    dtype: DType | None
    tool: str
    stacked: Mapping[str, Stacked] = field(default_factory=dict)


def slidesparse_metadata(
    pattern: Pattern, dtype: DType | None, tool: str | None = None, stacked: Mapping[str, Stacked] | None = None
) -> dict[str, str]:
    """`__metadata__` of a file with packed weights; `dtype` is None where they are of several types."""
    header = {
        "version": VERSION_STACKED if stacked else VERSION,
        "pattern": {"nnz": pattern.nnz, "group": pattern.group},
        "dtype": dtype.name if dtype else None,
        "tool": TOOL if tool is None else tool,
        **({"stacked": stacked_json(stacked)} if stacked else {}),
    }
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
    if type(version) is not int or version not in (VERSION, VERSION_STACKED):
        known = f"versions {VERSION} and {VERSION_STACKED}"
        raise FormatError(f"{where}: version {shown(version)} is unknown; this program reads {known}, update it")
    keys = ["version", "pattern", "dtype", "tool"] + ["stacked"] * (version == VERSION_STACKED)
    if header.keys() != {*keys} or not isinstance(header["tool"], str):
        raise FormatError(f"{where}: is {shown(header)}, must have exactly the keys {', '.join(keys[:-1])} and {keys[-1]}")
    stacked = parse_stacked(header.get("stacked", {}), where)
    pattern, dtype = header["pattern"], header["dtype"]
    if not isinstance(pattern, dict) or pattern.keys() != {"nnz", "group"}:
        raise FormatError(f'{where}: pattern {shown(pattern)} must be like {{"nnz": 6, "group": 8}}')
    names = [row.name for row in PACKED]
    if dtype is not None and dtype not in names:
        raise FormatError(f"{where}: dtype {shown(dtype)} must be one of {', '.join(names)}, or null for several")
    try:
        return PackedHeader(Pattern(**pattern), packed_dtype(dtype) if dtype is not None else None, header["tool"], stacked)
    except OperandError as error:
        raise FormatError(f"{where}: {error}") from error


# ---- named tensors ----------------------------------------------------------------------------------------------------


def packed_entries(
    module: str, pattern: Pattern, dtype: DType, shape: tuple[int, ...]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, code, shape) of the tensors of a packed module whose weight is [*lead, n, k] = `shape`."""
    *rows, k = shape
    ks = pattern.slid_k(k)
    entries: list[tuple[str, str, tuple[int, ...]]] = [
        (f"{module}.weight_packed", dtype.safetensors, (*rows, ks // 2)),
        (f"{module}.weight_meta", "U8", (*rows, ks // 8)),
    ]
    if dtype.qmax is not None:
        entries.append((f"{module}.weight_scale", "F32", (*rows, 1)))
    return [*entries, (f"{module}.weight_shape", "I64", (len(shape),))]


def packed_names(module: str, packed: PackedWeight) -> list[str]:
    """Names of the tensors of a packed module."""
    return [name for name, _, _ in packed_entries(module, packed.pattern, packed.dtype, packed.shape)]


def packed_arrays(module: str, packed: PackedWeight) -> dict[str, NDArray[Any]]:
    """The tensors of `packed_entries`, on the host."""
    there = replace(packed, values=on_host(packed.values).view(packed.dtype.numpy))
    return {f"{module}.{part}": on_host(array) for part, array in there.tensors().items()}


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
        dtype = OF_CODE.get(tensors[f"{module}.weight_packed"])
        if f"{module}.weight" in tensors:
            raise FormatError(f"{where}: module {shown(module)} has both weight and weight_packed; it must have one of them")
        if module in tensors:
            raise FormatError(f"{where}: {shown(module)} is the name of both a tensor and a packed module")
        if dtype is not None and dtype.qmax is None and f"{module}.weight_scale" in tensors:
            tensor = shown(f"{module}.weight_packed")
            raise FormatError(f"{where}: tensor {tensor}: has a weight_scale, but {dtype} values carry none")
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
