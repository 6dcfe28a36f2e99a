"""What an output checkpoint will look like, before a byte of it is written: items, shards, index, config and companions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, index_bytes, shard_name, shard_plan
from ..checkpoint.hf_folder import CONFIG, INDEX_SUFFIX
from ..checkpoint.safetensors import open_regular, tensor_bytes
from ..checkpoint.safetensors_writer import header_bytes, naming
from ..core.dtypes import NUMPY_OF
from ..core.file_kind import LOOKED_AT, POINTER, is_pointer
from ..core.reference import dequantize
from ..errors import FormatError, OperandError
from .module import Module
from .options import UNIT_BYTES

DEFAULT_SHARD = 5 * 10**9

Entry = tuple[str, str, tuple[int, ...]]
"""Name, safetensors code and shape of one output tensor."""

Piece = tuple[str, int, Any]
"""Tensor name, byte offset inside it, and the array whose bytes go there."""


@dataclass(frozen=True)
class Item:
    """Output tensors that belong together, and how to make any range of their rows.

    Attributes:
        name: what progress and errors call it.
        entries: the tensors.
        rows, row_bytes: how many rows there are to make, and source bytes in each.
        make: (first, last) -> the pieces of rows first..last-1, called from any thread.
        copied: whether it is a tensor that goes through as it is.
        key, together: items of one key (not None) can be made together, whole: `together(items)` gives the pieces of each. For
            many thousand small weights, since each alone takes a millisecond.
    """

    name: str
    entries: tuple[Entry, ...]
    rows: int
    row_bytes: int
    make: Callable[[int, int], Iterable[Piece]]
    copied: bool = False
    key: object = None
    together: Callable[[Sequence[Item]], list[Iterable[Piece]]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensors."""
        return sum(tensor_bytes(code, shape) for _, code, shape in self.entries)


@dataclass(frozen=True)
class Shard:
    """One output file."""

    name: str
    items: tuple[Item, ...]
    metadata: dict[str, str]

    @cached_property
    def entries(self) -> list[Entry]:
        return [entry for item in self.items for entry in item.entries]

    @cached_property
    def header(self) -> bytes:
        return header_bytes(self.entries, self.metadata)[0]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(item.nbytes for item in self.items)


@dataclass(frozen=True)
class SmallFile:
    """A file of the output beside its shards.

    Attributes:
        name: relative to the output's folder, "/" between folders.
        contents: its bytes, or the file of the source that it is a copy of.
    """

    name: str
    contents: bytes | Path

    def write(self, folder: Path) -> None:
        """Write it into `folder`.

        Raises:
            OSError: naming the file that could not be read or written.
        """
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("wb", buffering=0) as file:
            for part in self.parts():
                left = memoryview(part)
                while left:
                    left = left[os.write(file.fileno(), left) :]

    def parts(self) -> Iterator[bytes]:
        """Its bytes, in pieces."""
        if isinstance(self.contents, bytes):
            yield self.contents
            return
        with naming(self.contents), open(open_regular(self.contents), "rb") as file:
            while part := file.read(2**20):
                yield part

    def difference(self, folder: Path) -> str:
        """What is wrong with the file of that name in `folder`: a clause that names it, or ""."""
        made = "what these options make" if isinstance(self.contents, bytes) else "the source's"
        try:
            with open(open_regular(folder / self.name), "rb") as file:
                same = all(file.read(len(part)) == part for part in self.parts()) and not file.read(1)
        except FormatError:
            return f"{self.name} is missing or cannot be read"
        return "" if same else f"{self.name} is not {made}"


@dataclass(frozen=True)
class Layout:
    """A whole output: shards, then the small files that make it valid, in the order they are written."""

    shards: list[Shard]
    files: list[SmallFile]

    @property
    def names(self) -> set[str]:
        """What the output's folder holds at its top."""
        return {shard.name for shard in self.shards} | {file.name.split("/")[0] for file in self.files}

    def fingerprint(self, facts: dict[str, Any]) -> str:
        """One hash of everything that decides the output's bytes: the headers, and `facts` about source and options."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for shard in self.shards:
            digest.update(os.fsencode(shard.name) + shard.header)
        return digest.hexdigest()

    def differing_shard(self, out: Path, single: bool) -> str:
        """Which shard `out` lacks or holds with another header or size: a clause that names it, or ""."""
        for shard in self.shards:
            if not _same_header(shard, path := out if single else out / shard.name):
                return f"{path.name} {'holds other tensors' if path.exists() else 'is missing'}"
        return ""


def dense_entries(module: Module) -> tuple[Entry, ...]:
    """The tensors of a module in dense format: the weight under its own name and, for 8 bits, one scale a row.

    compressed-tensors has no layout for the quantized experts of a layer in one tensor, so they are dequantized.
    """
    if module.stacked is not None:
        return ((module.weight, module.stacked.code, module.stacked.dense_shape(module.shape)),)
    weight = (module.weight, module.scheme.dtype.safetensors, module.shape)
    return (weight,) if not module.scheme.scaled else (weight, (f"{module.name}.weight_scale", "F32", (module.n, 1)))


def dense_item(module: Module, row_bytes: int, rows: Callable[[Module, int, int], tuple[Any, Any]]) -> Item:
    """A module in dense format; experts are made one by one.

    Args:
        row_bytes: source bytes in a row.
        rows: (matrix, first, last) -> stored values and scales (None of 16-bit types) of these rows of one matrix.
    """
    stacked = module.stacked

    def make(first: int, last: int) -> Iterator[Piece]:
        q, scale = rows(module, first, last)
        yield module.weight, first * q.shape[1] * q.itemsize, q
        if scale is not None:
            yield f"{module.name}.weight_scale", first * 4, scale

    def make_experts(first: int, last: int) -> Iterator[Piece]:
        assert stacked is not None
        for matrix in module.matrices()[first:last]:
            dense = np.empty(matrix.shape, NUMPY_OF[stacked.code])
            for a, b in row_ranges(matrix.n, row_bytes, UNIT_BYTES):
                q, scale = rows(matrix, a, b)
                dense[a:b] = q if scale is None else dequantize(q, scale)
            yield module.weight, matrix.expert * dense.nbytes, dense.T if stacked.transposed else dense

    if stacked is None:
        return Item(module.name, dense_entries(module), module.n, row_bytes, make)
    return Item(module.name, dense_entries(module), module.count, module.n * row_bytes, make_experts)


def dequantized_notes(modules: Collection[Module], model_types: Collection[str]) -> list[str]:
    """Which tensors of experts the dense format holds dequantized, and who will not load them."""
    experts = [m.stacked for m in modules if m.stacked is not None and m.scheme.scaled]
    if not experts:
        return []
    notes = [
        f"{len(experts)} tensors of experts are written dequantized, in {experts[0].dtype}: compressed-tensors has no layout"
        " for quantized experts in one tensor"
    ]
    if "llama4_text" in model_types and len(experts) < len(modules):
        notes.append(
            "transformers looks for one tensor an expert in a quantized Llama 4 and will not load these; write it with --scheme"
            " BF16, or pack its experts only"
        )
    return notes


def row_ranges(rows: int, row_bytes: int, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of about `unit_bytes`, at least one row each; a weight without rows is one empty range."""
    step = max(1, unit_bytes // max(1, row_bytes))
    for first in range(0, max(1, rows), step):
        yield first, min(first + step, rows)


def output_layout(
    items: list[Item],
    source: Checkpoint,
    *,
    metadata: dict[str, str],
    config: dict[str, Any] | None,
    max_shard_size: int | None,
    single: str | None,
) -> Layout:
    """Put items into shards, and say which small files go along.

    Args:
        items: in order; an item is never split over two shards.
        source: whose companions (tokenizer and the like) are copied, if the output is a folder.
        config: the new config.json, None if there is none.
        single: name of the one output file; None for a folder.

    Raises:
        OperandError: a size for the one output file. FormatError: a companion is a pointer of Git LFS.
    """
    if single is not None:
        if max_shard_size is not None:
            raise OperandError(f"max_shard_size: {single} is one file and is not split; name a folder as the output")
        return Layout([Shard(single, tuple(items), metadata)], [])
    plan = shard_plan([(i, item.nbytes) for i, item in enumerate(items)], max_shard_size or DEFAULT_SHARD)
    names = [shard_name(i, len(plan), source.stem) for i in range(len(plan))]
    shards = [Shard(name, tuple(items[i] for i in held), metadata) for name, held in zip(names, plan, strict=True)]
    files: list[SmallFile] = []
    for relative in source.companions:
        assert source.root is not None
        files.append(SmallFile(str(relative), source.root / relative))
        if is_pointer(next(files[-1].parts(), b"")[:LOOKED_AT]):
            raise FormatError(f"{source.root / relative}: {POINTER}")
    if len(shards) > 1:
        homes = {entry[0]: shard.name for shard in shards for entry in shard.entries}
        total = sum(item.nbytes for item in items)
        files.append(SmallFile(f"{source.stem}{INDEX_SUFFIX}", index_bytes(homes, total)))
    if config is not None:
        files.append(SmallFile(CONFIG, (json.dumps(config, indent=2) + "\n").encode()))
    return Layout(shards, files)


def _same_header(shard: Shard, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header
