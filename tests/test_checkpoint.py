"""Checkpoints: files, folders, shards, the hub's cache; packed weights through save and load; the golden file."""

from __future__ import annotations

import itertools
import json
import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from cases import packed_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from slidesparse_nb import pack
from slidesparse_nb.checkpoint import (
    Checkpoint,
    index_bytes,
    load,
    packed_arrays,
    packed_entries,
    packed_format,
    packed_names,
    parse_metadata,
    read_packed,
    save,
    shard_name,
    shard_plan,
    slidesparse_metadata,
)
from slidesparse_nb.checkpoint.safetensors import SafetensorsFile
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8, NUMPY_OF, PACKED
from slidesparse_nb.core.packed import PackedWeight
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.core.scheme import SCHEMES, Scheme
from slidesparse_nb.errors import FormatError, OperandError, UnsupportedError

GOLDEN = Path(__file__).parent / "golden" / "tiny.safetensors"


def facts(value: Any) -> Any:
    """All of an array or a packed weight, to be compared."""
    if isinstance(value, PackedWeight):
        parts = (value.values, value.meta, value.scale, value.block_scale)
        return value.pattern, value.shape, value.scheme, *map(facts, parts)
    return None if value is None else (value.dtype, value.shape, value.tobytes())


def same_all(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return {name: facts(value) for name, value in a.items()} == {name: facts(value) for name, value in b.items()}


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def shards(root: Path, *files: dict[str, Any]) -> dict[str, str]:
    """Write each dict as a shard, and the index."""
    weight_map = {}
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        save(root / name, tensors)
        weight_map |= dict.fromkeys(SafetensorsFile(root / name).tensors, name)
    (root / "model.safetensors.index.json").write_bytes(index_bytes(weight_map, 0))
    return weight_map


# ---- save and load -----------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(data=st.data())
def test_round_trip_of_anything(tmp_path_factory: Any, data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from(known_patterns()))
    unit = data.draw(st.sampled_from([1, 1, 2]))
    schemes = [scheme for scheme in SCHEMES.values() if scheme.unit == unit]
    tensors: dict[str, Any] = {}
    for name in data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), unique=True, max_size=5)):
        if data.draw(st.booleans()):
            n, k = data.draw(st.tuples(st.integers(0, 4), st.sampled_from([0, 1, pattern.group, pattern.slice_unit, 37, 130])))
            w = np.random.default_rng(n + k).standard_normal((n, k)).astype(np.float32)
            tensors[f"packed/{name}"] = pack(
                w, (pattern.nnz, pattern.group), data.draw(st.sampled_from(schemes)), prune="random"
            )
        else:
            dtype = NUMPY_OF[data.draw(st.sampled_from(sorted(NUMPY_OF)))]
            shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
            tensors[f"array/{name}"] = (np.arange(np.prod(shape)) % 2).astype(dtype).reshape(shape)
    path = tmp_path_factory.mktemp("any") / "f.safetensors"
    save(path, tensors)
    once = path.read_bytes()
    loaded = load(path)
    save(path, loaded)  # over the very file that is mapped
    assert path.read_bytes() == once
    assert same_all(loaded, tensors)
    assert os.listdir(path.parent) == [path.name]


def test_loading_copies_nothing_and_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save(path, {"fc": packed_weight(4, 40), "bias": np.ones(3)})
    loaded = load(path)
    os.unlink(path)
    packed = loaded["fc"]
    for array in (packed.values, packed.meta, packed.scale, loaded["bias"]):
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base.base, memoryview)
        assert isinstance(base.base.obj, mmap.mmap)
        assert not array.flags.writeable
    assert facts(packed) == facts(packed_weight(4, 40))


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    tensors = {"a": packed_weight(2, 8), "b": packed_weight(2, 8), "a.bias": np.ones(2), "c": np.ones(1)}
    save(path, tensors)
    assert same_all(load(path, names=["c", "b"]), {name: tensors[name] for name in ("b", "c")})
    assert load(path, names=[]) == {}
    for wrong in ("d", "a.weight_meta"):
        with pytest.raises(OperandError, match=f"'{wrong}' is no packed module and no tensor"):
            load(path, names=["a", wrong])


def test_arrays_of_a_device_are_copied_to_the_host(tmp_path: Path) -> None:
    class DeviceArray:
        """What save uses of a CuPy array."""

        def __init__(self, array: Any) -> None:
            self.array, self.dtype, self.shape, self.nbytes = array, array.dtype, array.shape, array.nbytes

        def get(self) -> Any:
            return self.array

    packed = packed_weight(3, 16, dtype=FLOAT8)
    parts = (packed.values.view(np.uint8), packed.meta, packed.scale)  # raw bits: CuPy has no FP8
    on_device = PackedWeight(*(DeviceArray(part) for part in parts), packed.pattern, packed.shape, packed.dtype)
    tensors: dict[str, Any] = {"fc": on_device, "bias": DeviceArray(np.ones(3))}
    save(tmp_path / "f.safetensors", tensors)
    assert same_all(load(tmp_path / "f.safetensors"), {"fc": packed, "bias": np.ones(3)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": packed_weight(1, 8), "b": packed_weight(1, 8, "2:4")}, "hold patterns 2:4, 6:8; a file has one"),
        ({"a": packed_weight(1, 8), "a.weight": np.ones(1)}, "'a' has both weight and weight_packed"),
        ({"a": packed_weight(1, 8), "a.weight_meta": np.ones(1)}, "'a.weight_meta': must name one tensor, once"),
        ({"a": packed_weight(1, 8), "b.weight_meta": np.ones(1)}, "'b.weight_meta' needs tensor 'b.weight_packed'"),
        ({"a.weight_packed": np.ones(1), "a.weight_meta": np.ones(1)}, "'a' is packed, but metadata 'slidesparse' is missing"),
        ({"a": np.array(["text"])}, "'a': <U4 is no type of the safetensors format"),
        ({"a": np.ones(1, ">f4")}, "'a': >f4 is no type"),
        ({1: np.ones(1)}, "tensors: name 1 must be a string"),
        ([("a", np.ones(1))], "tensors: list must be a dictionary"),
        ({"a": [1, [2]]}, "'a': list cannot be made an array"),
        ({"a": None}, "'a': object is no type"),
        ({"a": np.ma.ones(2)}, "'a': is a masked array, and the mask would be lost"),
        (
            {"fc": packed_weight(1, 8, dtype=BFLOAT16), "fc.weight_scale": np.ones((1, 1), np.float32)},
            "'fc.weight_packed': has a weight_scale, but bfloat16 values carry none; rename it",
        ),
        (
            {"a": packed_weight(1, 8), "a.weight_packed": packed_weight(1, 8)},
            "'a.weight_packed' is the name of both a tensor and a packed module",
        ),
        (
            {"a": packed_weight(1, 8), **packed_arrays("b", packed_weight(1, 8))},
            "'b.weight_packed' would be read as part of a packed weight; rename it",
        ),
    ],
)
def test_save_refuses(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(OperandError, match=message):
        save(tmp_path / "f.safetensors", tensors)
    assert os.listdir(tmp_path) == []


@given(data=st.data())
def test_what_save_accepts_load_reads_back(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Names that differ only in the endings that the format gives a meaning."""
    endings = ["", ".weight", ".weight_packed", ".weight_meta", ".weight_scale", ".weight_shape"]
    name = st.tuples(st.sampled_from(["X", "", "X.weight_packed", "X.weight"]), st.sampled_from(endings)).map("".join)
    packed = st.sampled_from([INT8, BFLOAT16]).map(lambda dtype: packed_weight(1, 8, dtype=dtype))
    parts = list(packed_arrays("", packed_weight(1, 8)).values())
    value = packed | st.sampled_from([np.ones(2, np.float32), *parts])
    tensors = data.draw(st.dictionaries(name, value, max_size=4))
    path = tmp_path_factory.mktemp("names") / "f.safetensors"
    try:
        save(path, tensors)
    except OperandError:
        assert os.listdir(path.parent) == []
    else:
        assert same_all(load(path), tensors)


def test_save_refuses_bad_paths_and_weights(tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").mkdir()
    for path in (tmp_path / "f.bin", tmp_path, tmp_path / "d.safetensors"):
        with pytest.raises(OperandError, match=r"must be a file ending in .safetensors"):
            save(path, {})
    packed = packed_weight(2, 16)
    with pytest.raises(FormatError, match=r"'\\x1b\[31m'.scale: .* must be finite and not negative"):
        save(tmp_path / "f.safetensors", {"\x1b[31m": replace(packed, scale=-packed.scale)})
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "f.safetensors", {})
    assert os.listdir(tmp_path) == ["d.safetensors"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "f.safetensors"
    save(path, {"a": np.ones(3)})
    old = path.read_bytes()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left.*f\.safetensors'$"):
        save(path, {"a": np.zeros(3)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


# ---- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"fc": packed_weight(2, 16), "x": np.ones(2)})
    write(tmp_path / "config.json", '{"hidden_size": 16, "limit": Infinity}')  # as Python writes it, and models have it
    (tmp_path / "2_Dense").mkdir()
    save(tmp_path / "2_Dense" / "model.safetensors", {"z": np.ones(1)})
    copied = ["README.md", "tokenizer.json", "1_Pooling/config.json", "2_Dense/config.json", "3_Dense/pytorch_model.bin"]
    copied += ["spk_dict.pt", "campplus.onnx"]
    reasons = {
        "the weights in another format": "pytorch_model.bin flax_model.msgpack tf_model.h5 2_Dense/pytorch_model.bin A.GGUF"
        " pytorch_model.bin.index.json model.onnx.data",
        "the model once more, not packed": "onnx/ original/ checkpoint-500/",
        "the state of a training run": "training_args.bin optimizer.pt",
        "the index of another copy of the weights": "other.safetensors.index.json",
        "another copy of the weights, not packed": "consolidated.safetensors ema.safetensors",
    }
    left = {name: why for why, names in reasons.items() for name in names.split()}
    hidden = [".gitattributes", ".cache/x", ".git/config", "1_Pooling/.hidden"]
    for name in [*copied, *left, *hidden]:
        write(tmp_path / (f"{name}x" if name.endswith("/") else name))
    save(tmp_path / "mtp.safetensors", {"mtp": np.ones(1)})
    save(tmp_path / "ema.safetensors", {"x": np.ones(2)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.root == tmp_path
        assert not checkpoint.is_single_file
        assert [file.path for file in checkpoint.files] == [tmp_path / "model.safetensors"]
        assert checkpoint.config == {"hidden_size": 16, "limit": float("inf")}
        assert sorted(checkpoint.companions) == sorted([*copied, "2_Dense/model.safetensors", "mtp.safetensors"])
        assert checkpoint.left_behind == left
        assert checkpoint.stem == "model"
        assert checkpoint.metadata["format"] == "pt"
        assert checkpoint.array("x").tolist() == [1, 1]
        assert checkpoint.raw("x").nbytes == 16
        checkpoint.release("x")
        assert checkpoint.file_of("x") is checkpoint.files[0]
        with pytest.raises(OperandError, match="'y' is no tensor of"):
            checkpoint.array("y")
        assert list(read_packed(checkpoint)) == ["fc"]
    assert same_all(load(str(tmp_path)), load(tmp_path / "model.safetensors"))


def test_a_file_alone(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"x": np.ones(2)})
    write(tmp_path / "config.json", "{}")
    with Checkpoint.open(tmp_path / "model.safetensors") as found:
        assert (found.is_single_file, found.root, found.config, found.companions, found.left_behind) == (
            True,
            None,
            None,
            [],
            {},
        )


def test_shards(tmp_path: Path) -> None:
    one, two = {"b": packed_weight(2, 16), "b.bias": np.ones(2)}, {"a": packed_weight(2, 8, dtype=FLOAT8)}
    shards(tmp_path, one, two)
    write(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert same_all(load(path), one | two)
        with Checkpoint.open(path) as found:
            assert [file.path.name for file in found.files] == [shard_name(0, 2), shard_name(1, 2)]
            assert (found.companions, found.left_behind, found.config) == (["tokenizer.json"], {}, None)
            assert (found.root, found.is_single_file) == (tmp_path, False)
            assert next(iter(found.tensors)).startswith("b")


def test_which_weights_a_folder_means(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no .safetensors file"):
        Checkpoint.open(tmp_path)
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"holds weights only as pytorch_model.bin; convert"):
        Checkpoint.open(tmp_path)
    with pytest.raises(UnsupportedError, match=r"pytorch_model.bin: is no .safetensors file"):
        Checkpoint.open(tmp_path / "pytorch_model.bin")
    save(tmp_path / "unet.safetensors", {"u": np.ones(1)})
    assert list(load(tmp_path)) == ["u"]
    save(tmp_path / "vae.safetensors", {"v": np.ones(1)})
    with pytest.raises(FormatError, match=r"holds unet.safetensors, vae.safetensors and no model.safetensors.index.json; name"):
        Checkpoint.open(tmp_path)
    (tmp_path / "vae.safetensors.index.json").write_bytes(index_bytes({"v": "vae.safetensors"}, 8))
    assert list(load(tmp_path)) == ["v"]
    save(tmp_path / "model.safetensors", {"m": np.ones(1)})
    assert list(load(tmp_path)) == ["m"]
    (tmp_path / "model.safetensors.index.json").write_bytes(index_bytes({"m": "model.safetensors"}, 8))
    assert list(load(tmp_path)) == ["m"]
    (tmp_path / "model.safetensors.index.json").write_bytes(index_bytes({"u": "unet.safetensors"}, 8))
    with pytest.raises(FormatError, match=r"holds both model.safetensors and model.safetensors.index.json of other files"):
        Checkpoint.open(tmp_path)
    assert list(load(tmp_path / "model.safetensors.index.json")) == ["u"]


def test_the_hub_cache(tmp_path: Path) -> None:
    """Files of a snapshot are links to blobs, of a folder in it, too; the snapshot may be reached by a link."""
    repo, real, one = tmp_path / "models--org--name", tmp_path / "real", {"fc": packed_weight(2, 16)}
    snapshot = repo / "snapshots" / "0123abc"
    for folder in (repo / "blobs", snapshot / "1_Pooling", real):
        folder.mkdir(parents=True)
    shards(real, one)
    write(real / "config.json", '{"a": 1}')
    write(real / "1_Pooling" / "config.json", "{}")
    for i, path in enumerate(sorted(path for path in real.rglob("*") if path.is_file())):
        name = path.relative_to(real)
        path.rename(repo / "blobs" / f"hash{i}")
        (snapshot / name).symlink_to(Path(*[".."] * (1 + len(name.parts)), "blobs", f"hash{i}"))
    (tmp_path / "latest").symlink_to(snapshot)
    for path in (snapshot, snapshot / "model.safetensors.index.json", tmp_path / "latest"):
        with Checkpoint.open(path) as checkpoint:
            assert (checkpoint.config, checkpoint.companions) == ({"a": 1}, ["1_Pooling/config.json"])
        assert same_all(load(path), one)
    assert same_all(load(snapshot / shard_name(0, 1).replace("model", "model-00001-of-00001")), one)


# ---- shards, index, metadata -------------------------------------------------------------------------------------


def test_shard_plan() -> None:
    items = [("a", 4), ("b", 4), ("c", 3), ("d", 20), ("e", 1), ("f", 0)]
    assert shard_plan(items, 8) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert shard_plan(items, None) == [["a", "b", "c", "d", "e", "f"]]
    assert shard_plan([], 5) == [[]]


@given(sizes=st.lists(st.integers(0, 30)), limit=st.integers(1, 50))
def test_shard_plan_keeps_order_and_limit(sizes: list[int], limit: int) -> None:
    plan = shard_plan(list(enumerate(sizes)), limit)
    assert [key for shard in plan for key in shard] == list(range(len(sizes)))
    assert all(len(shard) == 1 or sum(sizes[key] for key in shard) <= limit for shard in plan if shard)
    for shard, after in itertools.pairwise(plan):
        assert sum(sizes[key] for key in [*shard, after[0]]) > limit


def test_shard_names_and_index() -> None:
    assert shard_name(0, 1) == "model.safetensors"
    assert [shard_name(i, 2) for i in range(2)] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert shard_name(11, 12, "x") == "x-00012-of-00012.safetensors"
    index = b'{\n  "metadata": {\n    "total_size": 5\n  },\n  "weight_map": {\n    "a": "f",\n    "b\xc3\xa9": "e"\n  }\n}\n'
    assert index_bytes({"bé": "e", "a": "f"}, 5) == index


def test_metadata() -> None:
    metadata = slidesparse_metadata(Pattern(6, 8), INT8)
    header = {"version": 1, "pattern": {"nnz": 6, "group": 8}, "dtype": "int8", "tool": packed_format.TOOL}
    assert (metadata["format"], json.loads(metadata["slidesparse"])) == ("pt", header)
    for pattern in known_patterns():
        for dtype in (*PACKED, None):
            found = parse_metadata(slidesparse_metadata(pattern, dtype))
            assert found == packed_format.PackedHeader(pattern, dtype and Scheme.of(dtype), packed_format.TOOL)
    assert parse_metadata({"format": "pt"}) is None


def test_entries_and_arrays_agree() -> None:
    for dtype in PACKED:
        packed = packed_weight(3, 50, "8:10", dtype)
        entries = packed_entries("m", packed.pattern, dtype, packed.shape)
        arrays = packed_arrays("m", packed)
        assert [name for name, _, _ in entries] == list(arrays) == packed_names("m", packed)
        assert [(NUMPY_OF[code], shape) for _, code, shape in entries] == [(a.dtype, a.shape) for a in arrays.values()]
        assert ("m.weight_scale" in arrays) == Scheme.of(dtype).scaled


def test_other_tools_weight_packed_is_an_ordinary_tensor(tmp_path: Path) -> None:
    """compressed-tensors' pack-quantized format uses two of our names."""
    tensors = {
        "fc.weight_packed": np.ones((2, 2), np.int32),
        "fc.weight_shape": np.array([2, 16]),
    }
    save(tmp_path / "f.safetensors", tensors)
    with Checkpoint.open(tmp_path / "f.safetensors") as checkpoint:
        assert read_packed(checkpoint) == {}
    assert same_all(load(tmp_path / "f.safetensors"), tensors)


# ---- the golden file ---------------------------------------------------------------------------------------------

GOLDEN_W = [[127, -2, 0, 4, 5, 0, 7, 8, -9, 0], [0, 0, 6, 0, 0, 0, 0, -254, 0, 10]]
GOLDEN_HEADER = (
    r'{"__metadata__":{"format":"pt","slidesparse":"{\"version\":1,\"pattern\":{\"nnz\":6,\"group\":8},'
    r'\"dtype\":\"int8\",\"tool\":\"slidesparse_nb 0.1.0\"}"},'
    '"fc.weight_shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    '"fc.bias":{"dtype":"F32","shape":[2],"data_offsets":[16,24]},'
    '"fc.weight_scale":{"dtype":"F32","shape":[2,1],"data_offsets":[24,32]},'
    '"fc.weight_meta":{"dtype":"U8","shape":[2,3],"data_offsets":[32,38]},'
    '"fc.weight_packed":{"dtype":"I8","shape":[2,12],"data_offsets":[38,62]}}  '
)
GOLDEN_DATA = """
    02 00 00 00 00 00 00 00  0a 00 00 00 00 00 00 00
    00 00 c0 3f  00 00 00 c0
    00 00 80 3f  00 00 00 40
    94 4e 44  48 4c 44
    7f fe 04 05 07 08 f7 00 00 00 00 00
    00 03 00 00 00 81 00 05 00 00 00 00
"""  # shape (2, 10); bias 1.5, -2; scales 1, 2; nibbles 4 9 E 4 4 4 and 8 4 C 4 4 4; values: docs/format.md has it byte by byte


def golden_bytes() -> bytes:
    header = GOLDEN_HEADER.encode()
    assert len(header) % 8 == 0
    return len(header).to_bytes(8, "little") + header + bytes.fromhex(GOLDEN_DATA)


def test_golden_file_is_what_is_written_here() -> None:
    assert GOLDEN.read_bytes() == golden_bytes()


def test_golden_file_reads_as_its_weights() -> None:
    loaded = load(GOLDEN)
    packed = loaded["fc"]
    assert loaded.keys() == {"fc", "fc.bias"}
    assert (packed.pattern, packed.dtype, packed.shape) == (Pattern(6, 8), INT8, (2, 10))
    assert (reference.unpack(packed) * packed.scale).tolist() == GOLDEN_W
    assert loaded["fc.bias"].tolist() == [1.5, -2]
    assert dict(safetensors.deserialize(golden_bytes()))["fc.weight_shape"]["shape"] == [2]


def test_golden_weights_write_the_golden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_format, "TOOL", "slidesparse_nb 0.1.0")
    packed = reference.pack(np.array(GOLDEN_W, np.float32), Pattern(6, 8), INT8)
    save(tmp_path / "f.safetensors", {"fc.bias": np.array([1.5, -2], np.float32), "fc": packed})
    assert (tmp_path / "f.safetensors").read_bytes() == golden_bytes()


def test_golden_file_is_explained() -> None:
    """docs/format.md shows these very bytes."""
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    for line in GOLDEN_DATA.strip().splitlines():
        assert line.strip() in text
    assert GOLDEN_HEADER.strip() in text.replace("\n", "")
