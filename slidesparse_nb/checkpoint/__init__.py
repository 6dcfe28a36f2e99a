"""Checkpoints: named tensors in a file, a folder or shards, and packed weights among them (docs/format.md)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.checks import require_unmasked
from ..core.dtypes import CODE_OF
from ..core.packed import PARTS, PackedWeight, size_problem
from ..core.untrusted_json import uncollected
from ..errors import FormatError, OperandError, UnsupportedError, shown
from .gguf_file import GgufFile
from .hf_folder import CONFIG, INDEX_SUFFIX, OTHER_WEIGHTS, choose_weights, companions, member, path_kind, read_index, read_json
from .hf_folder import index_bytes as index_bytes
from .hf_folder import shard_name as shard_name
from .hf_folder import shard_plan as shard_plan
from .packed_format import PackedHeader, module_names, on_host, unreadable, version_of
from .packed_format import packed_arrays as packed_arrays
from .packed_format import packed_entries as packed_entries
from .packed_format import packed_names as packed_names
from .packed_format import parse_metadata as parse_metadata
from .packed_format import slidesparse_metadata as slidesparse_metadata
from .safetensors import SafetensorsFile, TensorFile, TensorInfo, checked_path, file_state
from .safetensors_writer import write_whole
from .stacked import MOST_DIMENSIONS, Stacked, stack_problem


class Checkpoint:
    """The tensors of a model, memory-mapped, wherever they lie; a context manager.

    Attributes:
        root: the folder, or None for a single file.
        is_single_file: whether the path named one .safetensors file, and no folder, index or GGUF file.
        files: the files, by name.
        tensors: name -> (TensorInfo, file), file by file, in the order of their bytes.
        config: config.json of the folder, parsed, or made of a GGUF file's metadata; None where there is none.
        notes: what a user should know of the source.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, files: Sequence[TensorFile], root: Path | None = None, index: str | None = None) -> None:
        """Join open files. Raises FormatError where two hold a tensor of the same name."""
        self.files, self.root, self.is_single_file = list(files), root, root is None
        self._index = index
        self._states = {file.path: file.state for file in files}
        if root is not None:
            self._states |= {root / name: file_state(root / name) for name in (CONFIG, index) if name}
        self.tensors: dict[str, tuple[TensorInfo, TensorFile]] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    other = self.tensors[name][1].path.name
                    raise FormatError(
                        f"{file.path}: tensor {shown(name)} is in {other}, too; it must be in one file only:"
                        " download both again, or load the model where it was made and save it anew"
                    )
                self.tensors[name] = info, file
        has_config = root is not None and os.path.lexists(root / CONFIG)
        self.config = read_json(member(root, CONFIG), strict=False) if root is not None and has_config else None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a .safetensors file, a Hugging Face folder, a *.safetensors.index.json file, or a .gguf file (see `gguf_file`).

        Raises:
            OperandError: `path` is none.
            FormatError: something in it breaks a rule; the message names file, tensor, value and rule.
            UnsupportedError: the weights are in another format.
        """
        path = checked_path(path, "path")
        if path_kind(path) == stat.S_IFDIR:
            root, name = path, choose_weights(path)
            first = member(root, name)
        elif path.name.endswith(".json"):
            root, name, first = path.parent, path.name, path  # a link that the user names is followed
        elif path.name.lower().endswith(".gguf"):
            return cls.of_gguf(GgufFile(path))
        elif path.name.lower().endswith(OTHER_WEIGHTS):
            raise UnsupportedError(f"{path}: is no .safetensors file; convert it first")
        else:
            return cls([SafetensorsFile(path)])
        if not name.endswith(".json"):
            return cls([SafetensorsFile(first)], root)
        weight_map = read_index(first)
        held = {file: tensor for tensor, file in weight_map.items()}
        for file, tensor in held.items():
            try:
                member(root, file)
            except FormatError as error:
                if os.path.lexists(root / file):
                    raise
                raise FormatError(f"{error}; {name} says that it holds tensor {shown(tensor)}: download it, too") from None
        checkpoint = cls([SafetensorsFile(root / file) for file in sorted(held)], root, name)
        homes = {tensor: file.path.name for tensor, (_, file) in checkpoint.tensors.items()}
        for tensor in (*weight_map, *homes):
            if weight_map.get(tensor) != homes.get(tensor):
                told = weight_map.get(tensor)
                what = (
                    f"is not in {shown(told)}, where the index says it is"
                    if told
                    else f"of {homes[tensor]} is not in the index"
                )
                raise FormatError(
                    f"{first}: tensor {shown(tensor)} {what}; download both again, or load the model where it was made and save"
                    " it anew"
                )
        return checkpoint

    @classmethod
    def of_gguf(cls, file: GgufFile) -> Checkpoint:
        """The checkpoint that a GGUF file was made of."""
        checkpoint = cls([file])
        checkpoint.config, checkpoint.notes, checkpoint.is_single_file = file.config, file.notes, False
        return checkpoint

    def read_as(self, files: Sequence[TensorFile], config: dict[str, Any], notes: tuple[str, ...]) -> Checkpoint:
        """The same checkpoint by other readers of its files, which take them over, with what its config.json then is."""
        checkpoint = Checkpoint(files, self.root, self._index)
        checkpoint.config, checkpoint.notes = config, (*self.notes, *notes)
        return checkpoint

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the maps; arrays that are still in use keep theirs."""
        for file in self.files:
            file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: info.shape for name, (info, _) in self.tensors.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__` of the first file."""
        return self.files[0].metadata

    @cached_property
    def _other_files(self) -> tuple[list[str], dict[str, str]]:
        if self.root is None:
            return [], {}
        found = companions(self.root, {file.path.name for file in self.files} | {self._index or ""}, self.tensors)
        self._states |= {self.root / name: file_state(self.root / name) for name in found[0]}
        return found

    def changed(self) -> Path | None:
        """A file of the checkpoint that was written to or replaced since it was opened (a companion: since it was listed)."""
        return next((path for path, state in self._states.items() if file_state(path) != state), None)

    @property
    def companions(self) -> list[str]:
        """Files of the folder to copy along, relative and "/"-separated: tokenizer, 1_Pooling/config.json, README.

        Raises:
            FormatError: one is a link that leads out of the folder, or no regular file.
        """
        return self._other_files[0]

    @property
    def left_behind(self) -> dict[str, str]:
        """Files and folders that are not to be copied, with the reason: other copies of the weights, a trainer's state."""
        return self._other_files[1]

    @property
    def stem(self) -> str:
        """How loaders look up the weights: "model", or for some folders "consolidated", "diffusion_pytorch_model"."""
        if self.root is None:
            return "model"
        if self._index is not None and self._index.endswith(INDEX_SUFFIX):
            return self._index.removesuffix(INDEX_SUFFIX)
        return self.files[0].path.name.removesuffix(".safetensors")

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor.

        Raises:
            OperandError: no tensor has that name.
        """
        if name not in self.tensors:
            raise OperandError(f"name: {shown(name)} is no tensor of {self.root or self.files[0].path}")
        return self.tensors[name][1]

    def array(self, name: str) -> NDArray[Any]:
        """See `TensorFile.array`."""
        return self.file_of(name).array(name)

    def rows(self, name: str, first: int, last: int) -> NDArray[Any]:
        """See `TensorFile.rows`."""
        return self.file_of(name).rows(name, first, last)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """See `TensorFile.raw`."""
        return self.file_of(name).raw(name, start, stop)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """See `TensorFile.release`."""
        self.file_of(name).release(name, start, stop)


# ---- packed weights ----------------------------------------------------------------------------------------------


def read_packed(checkpoint: Checkpoint) -> dict[str, PackedWeight]:
    """The packed weights of a checkpoint, by module, in the order of their values.

    Headers and shapes are checked, contents not even read: the arrays are views of the map, and `validate()` reads them.

    Raises:
        FormatError: an unknown version, files of different patterns, tensors that cannot stand side by side (`module_names`),
            or types and shapes that disagree.
    """
    headers = {file.path: parse_metadata(file.metadata, file.path) for file in checkpoint.files}
    patterns = {header.pattern: path for path, header in headers.items() if header}
    if len(patterns) > 1:
        (first, path), (second, other), *_ = patterns.items()
        raise FormatError(f"{other}: holds pattern {second}, but {path.name} {first}; a checkpoint must have one pattern")
    where = checkpoint.root or checkpoint.files[0].path
    codes = {name: info.code for name, (info, _) in checkpoint.tensors.items()}
    with uncollected():
        return {
            name: _packed_module(checkpoint, name, headers[checkpoint.file_of(f"{name}.weight_packed").path])
            for name in module_names(codes, bool(patterns), where)
        }


def _packed_module(checkpoint: Checkpoint, module: str, header: PackedHeader | None) -> PackedWeight:
    """One module's tensors, their header entries checked against its shape."""
    info, file = checkpoint.tensors[f"{module}.weight_packed"]
    where = f"{file.path}: tensor {shown(info.name)}"
    if header is None:
        raise FormatError(f"{where}: metadata 'slidesparse' of its file is missing, while other files have it")
    block_scale = checkpoint.tensors.get(f"{module}.weight_block_scale")
    scheme = header.scheme_of(info.code, block_scale[0].code if block_scale else "")
    if scheme is None:
        known = ", ".join(dict.fromkeys(s.dtype.safetensors for s in header.schemes))
        raise FormatError(f"{where}: is {info.code}, must be {known} as metadata 'slidesparse' says")
    shape_info, shape_file = checkpoint.tensors[f"{module}.weight_shape"]
    place = f"{shape_file.path}: tensor {shown(shape_info.name)}"
    lengths = range(3, MOST_DIMENSIONS + 1) if module in header.stacked else (2,)
    if shape_info.code != "I64" or len(shape_info.shape) != 1 or shape_info.shape[0] not in lengths:
        rule = " or ".join(f"({length},)" for length in lengths)
        why = "is" if module in header.stacked else "is not"
        raise FormatError(
            f"{place}: is {shape_info.code} {shown(shape_info.shape)}, must be I64 {rule}: metadata 'slidesparse' says that"
            f" the module {why} stacked"
        )
    packed_shape = tuple(shape_file.array(shape_info.name).tolist())
    problem = stack_problem(packed_shape) if module in header.stacked else ""
    if problem := problem or size_problem(header.pattern, packed_shape, scheme):
        raise FormatError(f"{place}: {problem}")
    entries = packed_entries(module, header.pattern, scheme, packed_shape)
    for name, code, shape in entries:
        if name not in checkpoint.tensors:
            raise FormatError(f"{where}: needs tensor {shown(name)}: missing")
        found, holder = checkpoint.tensors[name]
        if (found.code, found.shape) != (code, shape):
            raise FormatError(
                f"{holder.path}: tensor {shown(name)}: is {found.code} {shown(found.shape)}, must be {code} {shape}"
                f" for a weight of shape {packed_shape} at {header.pattern} in {scheme}"
            )
    parts: dict[str, Any] = {PARTS[name.rpartition(".")[2]]: checkpoint.array(name) for name, _, _ in entries}
    parts |= {"scale": parts.get("scale"), "shape": packed_shape}
    return PackedWeight(**parts, pattern=header.pattern, scheme=scheme)


def read_stacked(checkpoint: Checkpoint) -> dict[str, Stacked]:
    """The dense tensors of the packed weights that have leading dimensions, by module."""
    return {
        module: entry
        for file in checkpoint.files
        if (header := parse_metadata(file.metadata, file.path))
        for module, entry in header.stacked.items()
        if f"{module}.weight_packed" in file.tensors
    }


# ---- all at once -------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, PackedWeight | NDArray[Any]]:
    """Read a checkpoint: a file, a Hugging Face folder, or an index file.

    Nothing is copied: arrays are read-only views of memory-mapped files, which they keep open.

    Args:
        names: which modules (for packed weights) and tensors; all of them by default. What is not chosen is not read.

    Returns:
        module name -> PackedWeight [*lead, n, k], and tensor name -> array for every tensor that is no part of one.

    Raises:
        FormatError: a file is not what it says it is.
        OperandError: a name is not there.
        UnsupportedError: a tensor is of a type that NumPy lacks, or the weights are in another format.
    """
    checkpoint = Checkpoint.open(path)
    modules = read_packed(checkpoint)
    parts = {tensor for name, packed in modules.items() for tensor in packed_names(name, packed)}
    available = [*modules, *(name for name in checkpoint.tensors if name not in parts)]
    chosen = available if names is None else list(names)
    if unknown := set(chosen) - set(available):
        raise OperandError(f"names: {shown(min(unknown))} is no packed module and no tensor of {path}")
    return {
        name: modules[name].validate(f"{path}: {shown(name)}") if name in modules else checkpoint.array(name) for name in chosen
    }


def save(path: str | os.PathLike[str], tensors: Mapping[str, PackedWeight | NDArray[Any]]) -> None:
    """Write packed weights (under their modules' names) and other tensors into one .safetensors file; `load` is the inverse.

    The file is written beside `path` and renamed, so that nobody sees half of one, and arrays loaded from an earlier file at
    `path` stay as they are. A weight X with leading dimensions is of a dense tensor X.weight [*lead, n, k]: what another
    checkpoint said of its dense form, `load` has not kept.

    Raises:
        OperandError: a path that does not end in .safetensors, a type that the format lacks, two patterns in one file, a
            stack that is empty or has more than eight dimensions, or names that would clash: whatever is saved, `load` reads
            back.
        FormatError: a packed weight is inconsistent.
    """
    path = checked_path(path, "path")
    if not isinstance(tensors, Mapping):
        raise OperandError(f"tensors: {type(tensors).__name__} must be a dictionary, such as {{'fc': packed}}")
    if path.suffix != ".safetensors" or path.is_dir():
        raise OperandError(f"path: {shown(str(path))} must be a file ending in .safetensors")
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    arrays: dict[str, NDArray[Any]] = {}
    packed = {name: value for name, value in tensors.items() if isinstance(value, PackedWeight)}
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise OperandError(f"tensors: name {shown(name)} must be a string")
        if isinstance(value, PackedWeight):
            if value.lead and (problem := stack_problem(value.shape)):
                raise OperandError(f"{shown(name)}: {problem}")
            parts = packed_arrays(name, value.validate(shown(name)))
            entries += packed_entries(name, value.pattern, value.scheme, value.shape)
        else:
            parts = {name: _plain_array(name, value)}
            entries.append((name, CODE_OF[parts[name].dtype], parts[name].shape))
        arrays |= parts
    patterns = sorted({value.pattern for value in packed.values()})
    if len(patterns) > 1:
        raise OperandError(f"tensors: hold patterns {', '.join(map(str, patterns))}; a file has one, so save them separately")
    if why := unreadable({name: code for name, code, _ in entries}, packed.keys(), "tensors"):
        raise OperandError(f"{why}; rename it")
    schemes = {value.scheme for value in packed.values()}
    metadata = {"format": "pt"}
    if packed:
        version = max(map(version_of, schemes))
        stacked = {name: Stacked.plain(name, value.scheme) for name, value in packed.items() if value.lead}
        scheme = schemes.pop() if len(schemes) == 1 else None
        metadata = slidesparse_metadata(patterns[0], scheme, version=version, stacked=stacked)
    write_whole(path, entries, arrays, metadata)


def _plain_array(name: str, value: Any) -> NDArray[Any]:
    """A tensor that is no packed weight, of a type that a file can hold."""
    require_unmasked(shown(name), value)
    try:
        array = on_host(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise OperandError(f"{shown(name)}: {type(value).__name__} cannot be made an array ({error})") from None
    if array.dtype not in CODE_OF:
        raise OperandError(f"{shown(name)}: {array.dtype} is no type of the safetensors format")
    return array
