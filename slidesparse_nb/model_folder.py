"""A model's folder as Hugging Face lays it out: which files are its weights, which go along, how far links may lead.

    config.json                        the architecture
    model.safetensors                  all weights, or
    model.safetensors.index.json       {"weight_map": {tensor: shard}} and its shards model-00001-of-00002.safetensors ...
    tokenizer.json, 1_Pooling/ ...     companions: whatever else the model needs

A folder may come from a stranger. A link in it is followed only to a place inside it, or, in a hub cache
(models--ORG--NAME/snapshots/REVISION), to the cache's own `blobs` beside the snapshots, where the files lie in truth.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import FormatError, UnsupportedError, shown
from .safetensors_file import open_regular
from .strict_json import parse_json

CONFIG = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".ot", ".tflite",
)  # fmt: skip
"""How files of weights in other formats end."""

_LARGEST_JSON = 100_000_000  # bytes; an index of the largest known models takes a few MB
_Key = TypeVar("_Key")


# ---- one file of a folder ----------------------------------------------------------------------------------------


def path_kind(path: Path) -> int:
    """stat.S_IFMT of what `path`, itself perhaps a link, leads to.

    Raises:
        FormatError: it leads nowhere.
    """
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise FormatError(f"{shown(str(path))}: cannot be opened: {getattr(error, 'strerror', error)}") from error


def member(root: Path, name: str) -> Path:
    """The file `name` (relative to `root`, "/" between folders) of a folder, once its links are known to stay there.

    Raises:
        FormatError: it leaves the folder, is a broken link or a loop, or is no regular file.
    """
    path = root / name
    try:
        real_root, real = Path(os.path.realpath(root, strict=True)), Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise FormatError(f"{root}: file {shown(name)} cannot be found: {reason}") from error
    if not real.is_relative_to(real_root) and real.parent not in _blobs(real_root):
        raise FormatError(f"{root}: file {shown(name)} leads to {real}, outside of the folder; copy the file into it")
    if path_kind(real) != stat.S_IFREG:
        raise FormatError(f"{root}: {shown(name)} is not a regular file")
    return path


def _blobs(real_root: Path) -> list[Path]:
    """Where the files of a hub cache lie if the folder is a snapshot (or inside one): [.../models--ORG--NAME/blobs]."""
    return [
        folder.parent.parent / "blobs"
        for folder in (real_root, *real_root.parents)
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    ]


def read_json(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """The object in a JSON file; see `parse_json`.

    Raises:
        FormatError: it cannot be read, is larger than 100 MB, or holds no JSON object.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(_LARGEST_JSON + 1)
    if len(data) > _LARGEST_JSON:
        raise FormatError(f"{path}: is larger than {_LARGEST_JSON} bytes, which no index or config is")
    return parse_json(data, path, strict=strict)


# ---- which files are the weights, and which go along -----------------------------------------------------------------


def choose_weights(root: Path) -> str:
    """The name of the folder's index, or of its only file of weights.

    Raises:
        FormatError: there is none, or more than one.
        UnsupportedError: the weights are there, but in another format.
    """
    names = sorted(name for name in _listed(root) if not name.startswith("."))
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(".safetensors")]
    for choice in ("model" + INDEX_SUFFIX, "model.safetensors"):
        if choice in indexes + files:
            indexed = read_index(member(root, choice)).values() if choice in indexes else [choice]
            if "model.safetensors" in files and "model.safetensors" not in indexed:
                raise FormatError(f"{root}: holds both model.safetensors and {choice} of other files; name one of them")
            return choice
    for choices in (indexes, files):
        if len(choices) == 1:
            return choices[0]
        if choices:
            raise FormatError(f"{root}: holds {', '.join(choices[:4])} and no model{INDEX_SUFFIX}; name one of the files")
    if other := [name for name in names if name.lower().endswith(OTHER_WEIGHTS)]:
        raise UnsupportedError(f"{root}: holds weights only as {other[0]}; convert them to .safetensors first")
    raise FormatError(f"{root}: holds no .safetensors file")


def read_index(path: Path) -> dict[str, str]:
    """The map of an index file: tensor name -> file name in the same folder.

    Raises:
        FormatError: it is no index, or names a file outside of its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map is {shown(weight_map)}, must map tensor names to file names; download it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise FormatError(
                f"{path}: tensor {shown(tensor)} is in {shown(file)}, which must be the name of a .safetensors file"
                " in the same folder, without a path: correct the index, or download it again"
            )
    return weight_map


def companions(root: Path, weights: set[str]) -> tuple[list[str], list[str]]:
    """The other files of a folder: (those to copy along, weights of another format that stay behind), "/"-separated.

    Hidden files and folders, config.json and `weights` are in neither. In a folder's own subfolders .safetensors files, and a
    pytorch_model.bin that no model.safetensors stands in for, are parts of the model (a sentence encoder's 2_Dense) and go
    along.

    Raises:
        FormatError: a file to copy is no regular file, or a link that leads out of the folder.
    """

    def refuse(error: OSError) -> NoReturn:
        raise FormatError(f"{root}: folder {shown(error.filename)} cannot be read: {error.strerror}") from error

    along, behind = [], []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        place = Path(folder).relative_to(root)
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                raise FormatError(f"{root}: {shown(str(place / name))} is a link to a folder; put the folder itself there")
        for file in sorted(name for name in files if not name.startswith(".")):
            path = (place / file).as_posix()
            if path == CONFIG or path in weights:
                continue
            if _other_weights(file, files, top=folder == os.fspath(root)):
                behind.append(path)
            else:
                member(root, path)
                along.append(path)
    return along, behind


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read: {error.strerror}") from error


def _other_weights(file: str, siblings: list[str], *, top: bool) -> bool:
    name = file.lower().removesuffix(".index.json")
    if not top and (name.endswith(".safetensors") or (name == "pytorch_model.bin" and "model.safetensors" not in siblings)):
        return False
    return name.endswith((".safetensors", *OTHER_WEIGHTS))


# ---- shards ------------------------------------------------------------------------------------------------------


def shard_plan(items: Sequence[tuple[_Key, int]], max_shard_size: int | None) -> list[list[_Key]]:
    """Share out items (key, bytes) over shards: in order, a new shard where the next item would pass the limit.

    An item is never split; one above the limit has a shard of its own. No limit (None), or nothing to share out: one shard.
    """
    shards: list[list[_Key]] = [[]]
    filled = 0
    for key, nbytes in items:
        if shards[-1] and max_shard_size is not None and filled + nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += nbytes
    return shards


def shard_name(i: int, count: int, stem: str = "model") -> str:
    """The file name of shard i (from 0) of `count`: model.safetensors if alone, else model-00001-of-00002.safetensors."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"


def index_bytes(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The contents of an index file: where each tensor is, and the bytes of all tensors; names sorted."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")
