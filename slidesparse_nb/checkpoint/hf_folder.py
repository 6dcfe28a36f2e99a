"""A model's folder as Hugging Face lays it out: which files are its weights, which go along, how far links may lead.

    config.json                        the architecture
    model.safetensors                  all weights, or
    model.safetensors.index.json       {"weight_map": {tensor: shard}} and its shards model-00001-of-00002.safetensors ...
    tokenizer.json, 1_Pooling/ ...     companions: whatever else the model needs; copies of the weights are none

A folder is untrusted. A link in it is followed only to a place inside it, or, in a hub cache
(models--ORG--NAME/snapshots/REVISION), to the cache's own `blobs` beside the snapshots, where the files are stored.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..core.untrusted_json import parse_json
from ..errors import FormatError, UnsupportedError, shown
from .safetensors import SafetensorsFile, open_regular

CONFIG = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".onnx.data", ".gguf", ".ggml", ".ot", ".tflite",
    ".npz", ".nemo", ".zip", ".tar.gz", ".engine", ".pt2", ".pte", ".torchscript",
)  # fmt: skip
"""How files of weights in other formats end."""

COPIES = re.compile(
    r"(pytorch_model|model|weights|tf_model|flax_model|rust_model|openvino_model|consolidated|ggml-model|diffusion_pytorch_model|"
    r"(encoder|decoder|decoder_with_past)_model)[^/]*",
    re.IGNORECASE,
)
"""Names under which tools store a whole model; a file of weights with another name is a part of the model."""
ALWAYS_COPIES = (".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".tflite")
"""Formats that hold a whole model, whatever the file's name."""
TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)\.(bin|pt|pth|pkl|safetensors)|"
    r"(zero_pp_rank|bf16_zero|mp_rank|extra_state_world|optim_world|model_world)_.*\.pt|.*optim_(states|rng)\.pt|.*\.distcp"
)
"""A trainer's own state, which no model needs."""
UNPACKED_FOLDERS = re.compile(
    r"original|metal|onnx|openvino|coreml|gguf|flax|tf|tflite|runs|\w+\.ml(package|modelc)|"
    r"(checkpoint|global_step|epoch|step|iter)[-_]?(\d+|best|last|final)|(optimizer|pytorch_model_fsdp)_\d+"
)
"""Subfolders that hold the whole model once more, in another format or from another step of its training."""
PART = re.compile(r"(?P<stem>.*?)[-_.]?(?P<i>\d+)[-_.]?of[-_.]?(?P<n>\d+)(?P<rest>.*)\.safetensors")
"""The name of one of several shards."""
RANK = re.compile(r"rank[-_]?\d+[-_.]")
"""In the name of a file that holds what one process had of a model."""
PIPELINE = "model_index.json"
INDEX_FILE = re.compile(r"\.safetensors\.index(\.\w+)?\.json|openvino_model.*\.xml")
"""What belongs to another copy of the weights."""
UNFINISHED = re.compile(r".*\.safetensors\.(incomplete|part|partial|aria2|crdownload|download|tmp)|.*\.safetensors~")

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
        FormatError: there is none, or more than one, or only some of the shards are there.
        UnsupportedError: the weights are there, but in another format.
    """
    names = sorted(name for name in _listed(root) if not name.startswith("."))
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(".safetensors")]
    if unfinished := [name for name in names if UNFINISHED.fullmatch(name)]:
        raise FormatError(f"{root}: {shown(unfinished[0])} is a download that did not finish; finish it, or remove the file")
    if PIPELINE in names:
        raise UnsupportedError(
            f"{root}: {PIPELINE} says that this is a pipeline of several models; pack its folders (transformer/, unet/) one by"
            " one"
        )
    choice = _chosen(root, names, indexes, files)
    if RANK.search(choice):
        raise FormatError(
            f"{root}: {shown(choice)} is one rank's part of a model; save the model whole, or name the file itself"
        )
    used = set(read_index(member(root, choice)).values()) if choice in indexes else {choice}
    _refuse_incomplete(root, choice, used, files)
    return choice


def _chosen(root: Path, names: list[str], indexes: list[str], files: list[str]) -> str:
    """The index, or the file, that a loader would take."""
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
        way = "name that file" if other[0].lower().endswith(".gguf") else "convert them to .safetensors first"
        raise UnsupportedError(f"{root}: holds weights only as {other[0]}; {way}")
    raise FormatError(f"{root}: holds no .safetensors file")


def _refuse_incomplete(root: Path, choice: str, used: set[str], files: list[str]) -> None:
    """Refuse shards i of n without the others, in what is used, and shards in the folder that the index does not name.

    Raises:
        FormatError: the model is not whole; names what is missing.
    """
    parts = {name: part for name in sorted({*used, *files}) if (part := PART.fullmatch(name))}
    for name, part in parts.items():
        if name not in used:
            continue
        n, width = int(part["n"]), len(part["i"])
        start, end = name[: part.start("i")], name[part.end("i") :]
        first = 0 if f"{start}{0:0{width}d}{end}" in used else 1
        wanted = [f"{start}{i:0{width}d}{end}" for i in range(first, min(n, 10_000) + first)]
        if missing := [other for other in wanted if other not in used]:
            there = sum(other in files for other in missing)
            raise FormatError(
                f"{root}: {shown(name)} is one of {n} shards, and {choice if choice != name else 'the folder'} lacks"
                f" {', '.join(map(shown, missing[:3]))}{' ...' * (len(missing) > 3)}; finish the download"
                + (f" (of the index: {there} of these are in the folder)" if there else "")
                + f", or name {shown(name)} itself to take it alone"
            )
    stems = {part["stem"] for name, part in parts.items() if name in used}
    spare = [name for name, part in parts.items() if name not in used and part["stem"] in stems]
    if choice.endswith(INDEX_SUFFIX) and spare:
        raise FormatError(
            f"{root}: {shown(spare[0])} is in the folder, but {choice} does not name it; download the index again, or remove it"
        )


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


def companions(root: Path, weights: set[str], tensors: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The other files of a folder: those to copy along, and those that are not copied with the reason; "/"-separated.

    Hidden files and folders, config.json and `weights` are in neither. What stays behind is a copy of the model: in another
    format, by its name, in a subfolder for copies, or with the same tensors; or a trainer's state.

    Args:
        weights: names of the model's own files. tensors: names of the model's tensors.

    Raises:
        FormatError: a file to copy is no regular file, or a link that leads out of the folder.
    """

    def refuse(error: OSError) -> NoReturn:
        raise FormatError(f"{root}: folder {shown(error.filename)} cannot be read: {error.strerror}") from error

    along: list[str] = []
    behind: dict[str, str] = {}
    parts = _folders_of_the_model(root)
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        place = Path(folder).relative_to(root)
        found, subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")), []
        for name in found:
            path = (place / name).as_posix()
            if os.path.islink(os.path.join(folder, name)):
                raise FormatError(f"{root}: {shown(path)} is a link to a folder; put the folder itself there")
            if UNPACKED_FOLDERS.fullmatch(name.lower()) and path not in parts:
                behind[f"{path}/"] = "the model once more, not packed"
            else:
                subfolders.append(name)
        for file in sorted(name for name in files if not name.startswith(".")):
            path = (place / file).as_posix()
            if path == CONFIG or path in weights:
                continue
            if (why := _why_behind(root, path, files, tensors, part=place.as_posix() in parts)) is not None:
                behind[path] = why
            else:
                member(root, path)
                along.append(path)
    return along, behind


def _folders_of_the_model(root: Path) -> set[str]:
    """Subfolders that the model's own list names as parts: of a sentence encoder (modules.json) or a pipeline of diffusers."""
    found: set[str] = set()
    for name in ("modules.json", PIPELINE):
        try:
            listed = json.loads((root / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(listed, list):
            found |= {str(entry["path"]) for entry in listed if isinstance(entry, dict) and entry.get("path")}
        elif isinstance(listed, dict):
            found |= {str(key) for key in listed if not str(key).startswith("_")}
    return found


def _why_behind(root: Path, path: str, siblings: list[str], tensors: Collection[str], *, part: bool) -> str | None:
    """Why a file is not copied; None if it is. `part`: its folder is one that the model's own list names."""
    file = path.rpartition("/")[2]
    name, top = file.lower().removesuffix(".index.json"), path == file
    if TRAINING.fullmatch(name):
        return "the state of a training run"
    if top and INDEX_FILE.search(file.lower()):
        return "the index of another copy of the weights"
    if name.endswith(".safetensors"):
        copied = (top or not part) and bool((top and COPIES.fullmatch(name)) or _same_tensors(root, path, tensors))
        return "another copy of the weights, not packed" if copied else None
    stands_in = top or any(other.endswith(".safetensors") for other in siblings)
    whole = name.endswith(OTHER_WEIGHTS) and stands_in and COPIES.fullmatch(name)
    return "the weights in another format" if whole or name.endswith(ALWAYS_COPIES) else None


def _same_tensors(root: Path, path: str, tensors: Collection[str]) -> bool:
    """Whether a file of tensors is a copy of the model: most of its tensors have names of the model's."""
    try:
        with SafetensorsFile(member(root, path)) as file:
            return 2 * sum(name in tensors for name in file.tensors) > len(file.tensors)
    except FormatError:
        return False  # an index, or no such file after all: it goes along as it is


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read: {error.strerror}") from error


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
