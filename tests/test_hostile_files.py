"""Files that lie: each refused by name, with nothing believed, nothing allocated, nothing followed, nothing hanging."""

from __future__ import annotations

import gc
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint, index_bytes, load, packed_arrays, read_packed, save, slidesparse_metadata
from slidesparse_nb.checkpoint.safetensors import SafetensorsFile, SafetensorsWriter
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, CODE_OF, FLOAT8, INT8, DType
from slidesparse_nb.core.packed import PackedWeight
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.untrusted_json import parse_json
from slidesparse_nb.errors import FormatError, OperandError, UnsupportedError, shown

GOLDEN = (Path(__file__).parent / "golden" / "tiny.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def _no_leak(tmp_path: Path) -> Any:
    """Every case takes 2 GiB of new memory at most and leaves every descriptor closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def left() -> list[str]:
        found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return [path for path in found if path.startswith(str(tmp_path))]

    if left():
        gc.collect()  # tracebacks hold the maps that they saw
    assert not left()


def refuse(path: Path, data: bytes, *messages: str) -> None:
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    for message in (str(path), *messages):
        assert message in str(caught.value)
    assert len(str(caught.value)) < 1500
    with pytest.raises(FormatError):
        load(path)


def with_header(header: str | bytes | dict[str, Any], data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes"),
        (bytes(7), "has 7 bytes"),
        (bytes(8), "header starts with b''"),
        ((11).to_bytes(8, "little") + b"{}        ", "header length 11 reaches past the end of the file (18 bytes)"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "header length 100000001 is above the limit"),
        ((1 << 63).to_bytes(8, "little") + b"{}", f"header length {1 << 63} is above the limit"),
        (b"\xff" * 64, "is above the limit"),
        (with_header(b"\xff\xfe"), "header starts with"),
        (with_header(b'{"\xff": 1}'), "byte 2 is not UTF-8"),
        (with_header("{'a': 1}"), "is not JSON"),
        (with_header("{"), "is not JSON"),
        (with_header("{}}"), "is not JSON"),
        (with_header(" {}"), "must start with '{'"),
        (with_header("[]"), "must start with '{'"),
        (with_header("null"), "must start with '{'"),
        (with_header('\ufeff{"a":1}'), "must start with '{'"),
        (with_header("{}\0"), "is not JSON"),
        (with_header('{"a":' * 100_000), "nested too deeply"),
        (with_header('{"a":{"dtype":' + "[" * 200_000), "nested too deeply"),
        (with_header('{"a": NaN}'), "NaN is no JSON number"),
        (with_header('{"a": -Infinity}'), "-Infinity is no JSON number"),
        (with_header('{"a": ' + "9" * 5000 + "}"), ""),
        (with_header('{"a\n": 1}'), "is not JSON"),
        (with_header("{}", b"x"), "has bytes after its last tensor: its header describes 10 bytes, the file has 11"),
    ],
)
def test_bytes_that_are_no_header(tmp_path: Path, data: bytes, message: str) -> None:
    refuse(tmp_path / "f.safetensors", data, message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {}, "a": {}}', "key 'a' stands twice"),
        ('{"a": {"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "key 'dtype' stands twice"),
        ('{"__metadata__": {"x":"1","x":"2"}}', "key 'x' stands twice"),
        ('{"__metadata__": {}, "__metadata__": {}}', "key '__metadata__' stands twice"),
        ('{"a": {"x": [{"y":1,"y":2}]}}', "key 'y' stands twice"),
        ('{"\\ud800": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "lone surrogate"),
        ('{"__metadata__": {"x":"\\udfff"}}', "lone surrogate"),
        ({"__metadata__": []}, "__metadata__ is [], must map strings to strings"),
        ({"__metadata__": None}, "__metadata__ is None"),
        ({"__metadata__": {"x": 1}}, "must map strings to strings"),
        ({"__metadata__": {"x": None}}, "must map strings to strings"),
        ({"__metadata__": {"x": {"y": "z"}}}, "must map strings to strings"),
    ],
)
def test_headers_that_are_no_map_of_tensors(tmp_path: Path, header: Any, message: str) -> None:
    refuse(tmp_path / "f.safetensors", with_header(header, b"abcd"), message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "must have exactly the keys"),
        ([], "must have exactly the keys"),
        (3, "is 3, must have exactly the keys"),
        ("x" * 10_000, "must have exactly the keys"),
        ({"dtype": "U8", "shape": [4]}, "must have exactly the keys"),
        ({**tensor(), "more": 1}, "must have exactly the keys"),
        (tensor(dtype="U9"), "dtype 'U9' is unknown"),
        (tensor(dtype="u8"), "dtype 'u8' is unknown"),
        (tensor(dtype=""), "dtype '' is unknown"),
        (tensor(dtype=8), "dtype 8 is unknown"),
        (tensor(dtype=["U8"]), "dtype ['U8'] is unknown"),
        (tensor(dtype=None), "dtype None is unknown"),
        (tensor(shape=4), "shape 4 must be a list"),
        (tensor(shape="4"), "shape '4' must be a list"),
        (tensor(shape={"0": 4}), "must be a list"),
        (tensor(shape=[True, 4]), "shape [True, 4] must be a list of integers"),
        (tensor(shape=[4.0]), "shape [4.0] must be a list of integers"),
        (tensor(shape=["4"]), "shape ['4'] must be"),
        (tensor(shape=[[4]]), "shape [[4]] must be"),
        (tensor(shape=[None]), "shape [None] must be"),
        (tensor(shape=[-4]), "shape [-4] must be"),
        (tensor(shape=[-2, -2]), "shape [-2, -2] must be"),
        (tensor(shape=[2**63]), "must be a list of integers from 0 to 2^63 - 1"),
        (tensor(shape=[2**40, 2**40]), "has 2^63 elements or more"),
        (tensor(shape=[2**32, 2**32]), "has 2^63 elements or more"),
        (tensor(shape=[2**62] * 100_000), "has 2^63 elements or more"),
        (tensor(shape=[2**62, 4, 0], offsets=[0, 0]), "has 2^63 elements or more"),
        (tensor(dtype="F64", shape=[2**61]), "takes 18446744073709551616 bytes, but data_offsets span 4"),
        (tensor(shape=[]), "takes 1 bytes, but data_offsets span 4"),
        (tensor(shape=[3]), "U8 [3] takes 3 bytes, but data_offsets span 4"),
        (tensor(dtype="F32", shape=[2]), "takes 8 bytes, but data_offsets span 4"),
        (tensor(dtype="F4", shape=[7]), "7 elements of F4 are no whole number of bytes"),
        (tensor(offsets=[4, 0]), "data_offsets [4, 0] must be two integers, 0 <= start <= stop"),
        (tensor(offsets=[-4, 0]), "data_offsets [-4, 0] must be"),
        (tensor(offsets=[0]), "data_offsets [0] must be"),
        (tensor(offsets=[0, 4, 8]), "data_offsets [0, 4, 8] must be"),
        (tensor(offsets=[0.0, 4]), "must be two integers"),
        (tensor(offsets=[False, 4]), "must be two integers"),
        (tensor(offsets="04"), "must be two integers"),
        (tensor(offsets=None), "must be two integers"),
        (tensor(offsets=[0, 2**64]), "must be two integers"),
        (tensor(offsets=[2**62, 2**62 + 4]), "leaves a hole before it; it must start at 0"),
        (tensor(offsets=[1, 5]), "leaves a hole before it; it must start at 0"),
    ],
)
def test_entries_that_lie(tmp_path: Path, entry: Any, message: str) -> None:
    refuse(tmp_path / "f.safetensors", with_header({"fc.weight": entry}, b"abcd"), "tensor 'fc.weight'", message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": tensor(), "b": tensor()}, "tensor 'b': starts at byte 0 of the data and overlaps the tensor before it; it must"),
        ({"a": tensor(), "b": tensor(offsets=[2, 6])}, "tensor 'b': starts at byte 2 of the data and overlaps"),
        ({"b": tensor(offsets=[5, 9]), "a": tensor()}, "tensor 'b': starts at byte 5 of the data and leaves a hole before it"),
        ({"a": tensor(), "b": tensor(shape=[0], offsets=[2, 2])}, "tensor 'b': starts at byte 2 of the data and overlaps"),
        ({"a": tensor(), "b": tensor(offsets=[4, 8]), "c": tensor(offsets=[8, 12])}, "is truncated: its header describes"),
        ({"a": tensor(shape=[2], offsets=[0, 2])}, "has bytes after its last tensor"),
        ({}, "has bytes after its last tensor"),
    ],
)
def test_tensors_that_overlap_or_miss(tmp_path: Path, header: Any, message: str) -> None:
    refuse(tmp_path / "f.safetensors", with_header(header, b"abcdefgh"), message)


def test_truncation_anywhere(tmp_path: Path) -> None:
    for length in range(len(GOLDEN)):
        refuse(tmp_path / "f.safetensors", GOLDEN[:length])


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", "../../etc/passwd", "/etc/passwd", "", "a" * 100_000, "\U0001f600", "\x1b[2J"]
)
def test_names_are_only_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(with_header({name: tensor()}, b"abcd"))
    assert load(path)[name].tobytes() == b"abcd"
    save(path, {name: np.ones(1)})
    assert list(load(path)) == [name]
    assert os.listdir(tmp_path) == ["f.safetensors"]
    refuse(path, with_header({name: tensor(offsets=[1, 5])}, b"abcd"))
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).isprintable()  # no newline, no escape sequence to a terminal


def test_huge_headers_are_refused(tmp_path: Path) -> None:
    many = ",".join(f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(100_000))
    refuse(tmp_path / "f.safetensors", with_header("{" + many + "}"), "is truncated")
    twice = with_header("{" + many + ',"99999":1}')
    (tmp_path / "f.safetensors").write_bytes(twice)
    with pytest.raises(FormatError, match="key '99999' stands twice"):
        SafetensorsFile(tmp_path / "f.safetensors")


def test_a_sparse_file_of_a_tebibyte(tmp_path: Path) -> None:
    """Size alone costs nothing: only what is touched is read."""
    path = tmp_path / "f.safetensors"
    with open(path, "wb") as file:
        file.write(with_header({"a": tensor(shape=[2**40], offsets=[0, 2**40])}))
        file.truncate(file.tell() + 2**40)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    assert load(path)["a"][-1] == 0


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "broken.safetensors").symlink_to("nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("fifo.safetensors", "loop.safetensors", "broken.safetensors", "none.safetensors", "x" * 300):
        with pytest.raises(FormatError):
            load(tmp_path / name)
        with pytest.raises(FormatError):
            SafetensorsFile(tmp_path / name)
    with pytest.raises(FormatError, match="not a regular file"):
        SafetensorsFile(tmp_path / "folder.safetensors")
    with pytest.raises(FormatError, match="not a regular file"):
        SafetensorsFile("/dev/null")
    for proc in ("/proc/self/mem", "/proc/self/status"):
        with pytest.raises(FormatError):
            SafetensorsFile(proc)


# ---- packed weights ----------------------------------------------------------------------------------------------


def packed(dtype: DType = INT8) -> PackedWeight:
    w = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float32)
    return reference.pack(reference.prune(w, Pattern(6, 8)), Pattern(6, 8), dtype)


def write_packed(
    path: Path, changes: dict[str, Any], metadata: dict[str, str] | None = None, dtype: DType = INT8, module: str = "fc"
) -> None:
    """A packed file whose tensors are changed (an array) or left out (None)."""
    arrays = {k: v for k, v in (packed_arrays(module, packed(dtype)) | changes).items() if v is not None}
    metadata = slidesparse_metadata(Pattern(6, 8), dtype) if metadata is None else metadata
    with SafetensorsWriter(path, [(name, CODE_OF[a.dtype], a.shape) for name, a in arrays.items()], metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def refuse_packed(path: Path, *messages: str) -> None:
    with pytest.raises(FormatError) as caught:
        load(path)
    for message in (str(path), *messages):
        assert message in str(caught.value)


def edited(array: Any, place: Any, value: Any) -> Any:
    array = array.copy()
    array[place] = value
    return array


P = packed()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"fc.weight_meta": edited(P.meta, (2, 1), 0x40)},
            ["'fc'.meta: byte 0x40 at row 2, column 1 holds a nibble out of order"],
        ),
        ({"fc.weight_meta": edited(P.meta, (3, 0), 0x54)}, ["byte 0x54 at row 3, column 0"]),
        ({"fc.weight_meta": edited(P.meta, (0, 0), 0xFF)}, ["byte 0xff at row 0"]),
        ({"fc.weight_scale": edited(P.scale, (1, 0), np.nan)}, ["'fc'.scale: nan at row 1 must be finite"]),
        ({"fc.weight_scale": edited(P.scale, (1, 0), np.inf)}, ["'fc'.scale: inf at row 1 must be finite"]),
        ({"fc.weight_scale": edited(P.scale, (0, 0), -1)}, ["'fc'.scale: -1.0 at row 0 must be finite and not negative"]),
        ({"fc.weight_meta": None}, ["needs tensor 'fc.weight_meta': missing"]),
        ({"fc.weight_scale": None}, ["'fc.weight_packed'", "needs tensor 'fc.weight_scale': missing"]),
        ({"fc.weight_shape": None}, ["needs tensor 'fc.weight_shape': missing"]),
        ({"fc.weight_packed": None}, ["needs tensor 'fc.weight_packed': missing"]),
        ({"fc.weight": np.ones((4, 30))}, ["'fc' has both weight and weight_packed"]),
        ({"fc": np.ones(1)}, ["'fc' is the name of both a tensor and a packed module"]),
        ({"fc.weight_shape": np.array([-4, 30])}, ["'fc.weight_shape': shape (-4, 30) must not be negative"]),
        ({"fc.weight_shape": np.array([4, -(2**63)])}, ["must not be negative"]),
        ({"fc.weight_shape": np.array([4, 2**16])}, ["'fc.weight_packed': is I8 (4, 24), must be I8 (4, 49152)"]),
        ({"fc.weight_shape": np.array([2**31 - 1, 30])}, ["must be I8 (2147483647, 24)"]),
        ({"fc.weight_shape": np.array([4, 2**20])}, ["'fc.weight_shape': k=1048576 takes 786432 slots", "int32 sums"]),
        ({"fc.weight_shape": np.array([4, 2**62])}, ["shape (4, 4611686018427387904) must be below 2^31 in both dimensions"]),
        ({"fc.weight_shape": np.array([2**62, 30])}, ["shape (4611686018427387904, 30) must be below 2^31"]),
        ({"fc.weight_shape": np.array([4, 33])}, ["for a weight of shape (4, 33) at 6:8 in int8"]),
        ({"fc.weight_shape": np.array([5, 30])}, ["must be I8 (5, 24)"]),
        ({"fc.weight_shape": np.array([4, 30, 1])}, ["'fc.weight_shape': is I64 (3,), must be I64 (2,)"]),
        ({"fc.weight_shape": np.array([4, 30], np.int32)}, ["is I32 (2,), must be I64 (2,)"]),
        ({"fc.weight_shape": np.array([4.0, 30.0])}, ["is F64 (2,), must be I64 (2,)"]),
        ({"fc.weight_shape": np.array(4)}, ["is I64 (), must be I64 (2,)"]),
        ({"fc.weight_meta": P.meta.view(np.int8)}, ["'fc.weight_meta': is I8 (4, 6), must be U8 (4, 6)"]),
        ({"fc.weight_meta": P.meta[:, :-1].copy()}, ["'fc.weight_meta': is U8 (4, 5), must be U8 (4, 6)"]),
        ({"fc.weight_meta": P.meta.ravel()}, ["'fc.weight_meta': is U8 (24,), must be U8 (4, 6)"]),
        ({"fc.weight_scale": P.scale.astype(np.float64)}, ["'fc.weight_scale': is F64 (4, 1), must be F32 (4, 1)"]),
        ({"fc.weight_scale": P.scale.ravel()}, ["'fc.weight_scale': is F32 (4,), must be F32 (4, 1)"]),
        ({"fc.weight_packed": P.values.view(np.uint8)}, ["'fc.weight_packed': is U8, must be I8"]),
        ({"fc.weight_packed": P.values.astype(np.int32)}, ["'fc.weight_packed': is I32, must be I8"]),
        ({"fc.weight_packed": P.values.astype(FLOAT8.numpy)}, ["is F8_E4M3, must be I8 as metadata 'slidesparse' says"]),
        ({"fc.weight_packed": P.values[:2].copy()}, ["is I8 (2, 24), must be I8 (4, 24)"]),
        ({"x.weight_meta": P.meta}, ["'x.weight_meta' needs tensor 'x.weight_packed': missing"]),
        ({"x.weight_shape": np.array([1, 2])}, ["'x.weight_shape' needs tensor 'x.weight_packed': missing"]),
        ({"x.weight_packed": P.values}, ["'x.weight_packed' needs tensor 'x.weight_meta': missing"]),
    ],
)
def test_packed_tensors_that_lie(tmp_path: Path, changes: Any, messages: list[str]) -> None:
    write_packed(tmp_path / "f.safetensors", changes)
    refuse_packed(tmp_path / "f.safetensors", *messages)


def test_16_bit_values_carry_no_scale(tmp_path: Path) -> None:
    write_packed(tmp_path / "f.safetensors", {"fc.weight_scale": P.scale}, dtype=BFLOAT16)
    refuse_packed(tmp_path / "f.safetensors", "'fc.weight_packed': has a weight_scale, but bfloat16 values carry none")


HEADER = json.loads(slidesparse_metadata(Pattern(6, 8), INT8)["slidesparse"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "is [], must be a JSON object"),
        ("1", "is 1, must be a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"version": 1, "version": 1}', "key 'version' stands twice"),
        ("{}", "version None is unknown"),
        (json.dumps(HEADER | {"version": 3}), "version 3 is unknown; this program reads versions 1 and 2"),
        (json.dumps(HEADER | {"version": "1"}), "version '1' is unknown"),
        (json.dumps(HEADER | {"version": True}), "version True is unknown"),
        (json.dumps(HEADER | {"version": 1.0}), "version 1.0 is unknown"),
        (json.dumps({k: v for k, v in HEADER.items() if k != "dtype"}), "must have exactly the keys"),
        (json.dumps(HEADER | {"order": "sm90"}), "must have exactly the keys"),
        (json.dumps(HEADER | {"tool": 1}), "must have exactly the keys"),
        (json.dumps(HEADER | {"pattern": "6:8"}), "pattern '6:8' must be like"),
        (json.dumps(HEADER | {"pattern": [6, 8]}), "pattern [6, 8] must be like"),
        (json.dumps(HEADER | {"pattern": {"nnz": 6}}), "must be like"),
        (json.dumps(HEADER | {"pattern": {"nnz": 2, "group": 8}}), "2:8 is not of the form (2N-2):2N"),
        (json.dumps(HEADER | {"pattern": {"nnz": True, "group": 8}}), "must be two integers"),
        (json.dumps(HEADER | {"pattern": {"nnz": 6.0, "group": 8}}), "must be two integers"),
        (json.dumps(HEADER | {"pattern": {"nnz": -2, "group": 0}}), "is not of the form"),
        (json.dumps(HEADER | {"pattern": {"nnz": 10**30 - 2, "group": 10**30}}), "is too large; a group may have 4096 columns"),
        (json.dumps(HEADER | {"pattern": {"nnz": 8, "group": 10}}), "must be U8 (4, 6) for a weight of shape (4, 30) at 8:10"),
        (json.dumps(HEADER | {"dtype": "fp8"}), "dtype 'fp8' must be one of"),
        (json.dumps(HEADER | {"dtype": ["int8"]}), "dtype ['int8'] must be one of"),
        (json.dumps(HEADER | {"dtype": "float16"}), "is I8, must be F16 as metadata"),
    ],
)
def test_metadata_that_lies(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.safetensors"
    if "8:10" in message:  # a pattern under which the values happen to fit
        write_packed(path, {"fc.weight_packed": P.values[:, :1].repeat(24, axis=1), "fc.weight_meta": P.meta[:, :1].copy()},
                     {"slidesparse": text})  # fmt: skip
    else:
        write_packed(path, {}, {"slidesparse": text})
    refuse_packed(path, message)


def test_metadata_that_is_missing_or_differs_between_files(tmp_path: Path) -> None:
    one, two = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    write_packed(one, {}, {"format": "pt"})
    refuse_packed(one, "module 'fc' is packed, but metadata 'slidesparse' is missing")
    write_packed(two, {}, module="other")
    names = {name: file.name for file in (one, two) for name in SafetensorsFile(file).tensors}
    (tmp_path / "model.safetensors.index.json").write_bytes(index_bytes(names, 0))
    refuse_packed(tmp_path, f"{one}: tensor 'fc.weight_packed': metadata 'slidesparse' of its file is missing")
    write_packed(one, {}, slidesparse_metadata(Pattern(2, 4), INT8))
    refuse_packed(tmp_path, f"{two}: holds pattern 6:8, but model-1.safetensors 2:4; a checkpoint must have one pattern")


def test_headers_are_checked_before_contents_are_read(tmp_path: Path) -> None:
    write_packed(tmp_path / "f.safetensors", {"fc.weight_meta": edited(P.meta, (2, 1), 0x40)})
    with Checkpoint.open(tmp_path / "f.safetensors") as checkpoint:
        weight = read_packed(checkpoint)["fc"]
    with pytest.raises(FormatError, match=r"fc\.meta: byte 0x40"):
        weight.validate("fc")


# ---- indexes and folders -------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of two shards, a: x, and b: y."""
    root = tmp_path / "model"
    root.mkdir()
    save(root / "a.safetensors", {"x": np.ones(1)})
    save(root / "b.safetensors", {"y": np.ones(1)})
    set_index(root, {"x": "a.safetensors", "y": "b.safetensors"})
    assert list(load(root)) == ["x", "y"]
    save(tmp_path / "outside.safetensors", {"y": np.ones(1)})
    return root


def set_index(root: Path, weight_map: Any) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refuse_folder(root: Path, *messages: str) -> None:
    for path in (root, root / "model.safetensors.index.json"):
        with pytest.raises(FormatError) as caught:
            Checkpoint.open(path)
        for message in (str(root), *messages):
            assert message in str(caught.value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map is {}, must map"),
        (None, "weight_map is None, must map"),
        ([["x", "a.safetensors"]], "must map tensor names to file names"),
        ({"x": "a.safetensors", "y": 1}, "tensor 'y' is in 1, which must be the name of a .safetensors file"),
        ({"x": "a.safetensors", "y": None}, "tensor 'y' is in None"),
        ({"x": "a.safetensors", "y": "../outside.safetensors"}, "tensor 'y' is in '../outside.safetensors', which must be"),
        ({"x": "a.safetensors", "y": "/etc/passwd"}, "in the same folder"),
        ({"x": "a.safetensors", "y": "./b.safetensors"}, "in the same folder"),
        ({"x": "a.safetensors", "y": "sub/b.safetensors"}, "in the same folder"),
        ({"x": "a.safetensors", "y": "pytorch_model.bin"}, "must be the name of a .safetensors file"),
        ({"x": "a.safetensors", "y": ".."}, "must be the name of a .safetensors file"),
        ({"x": "a.safetensors", "y": ""}, "must be the name of a .safetensors file"),
        ({"x": "a.safetensors", "y": "c.safetensors"}, "file 'c.safetensors' cannot be found: No such file"),
        ({"x": "a.safetensors", "y": "c\0.safetensors"}, "file 'c\\x00.safetensors' cannot be found"),
        ({"x": "a.safetensors", "y": "c" * 300 + ".safetensors"}, "cannot be found: File name too long"),
        ({"x": "b.safetensors", "y": "a.safetensors"}, "tensor 'x' is not in 'b.safetensors', where the index says it is"),
        ({"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}, "tensor 'z' is not in 'b.safetensors'"),
    ],
)
def test_indexes_that_lie(model: Path, weight_map: Any, message: str) -> None:
    set_index(model, weight_map)
    refuse_folder(model, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", "is [], must be a JSON object"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        (b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "key 'x' stands twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "key 'weight_map' stands twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"weight_map": {"\\ud800": "a.safetensors"}}', "lone surrogate"),
    ],
)
def test_indexes_that_are_no_index(model: Path, text: bytes, message: str) -> None:
    (model / "model.safetensors.index.json").write_bytes(text)
    refuse_folder(model, message)


def test_an_index_of_gigabytes(model: Path) -> None:
    os.truncate(model / "model.safetensors.index.json", 1 << 33)
    refuse_folder(model, "is larger than 100000000 bytes")


def test_shards_that_disagree_with_the_index(model: Path) -> None:
    save(model / "b.safetensors", {"y": np.ones(1), "x": np.ones(1)})
    refuse_folder(model, "b.safetensors: tensor 'x' is in a.safetensors, too; it must be in one file only")
    save(model / "b.safetensors", {"y": np.ones(1), "hidden": np.ones(1)})
    refuse_folder(model, "tensor 'hidden' of b.safetensors is not in the index")
    (model / "b.safetensors").write_bytes(GOLDEN[:100])
    refuse_folder(model, "b.safetensors: header length 496 reaches past the end of the file")


@pytest.mark.parametrize("name", ["b.safetensors", "config.json"])
def test_links_out_of_a_folder(model: Path, name: str) -> None:
    path = model / name
    (model.parent / "secret").write_text("{}")
    (model / "2_Dense").mkdir()
    inside = model / "2_Dense" / "file"
    inside.write_bytes(path.read_bytes() if path.exists() else b"{}")

    def link(target: str | Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    link("../outside.safetensors")
    refuse_folder(model, f"file {name!r} leads to {model.parent / 'outside.safetensors'}, outside of the folder")
    link("/etc/passwd")
    refuse_folder(model, f"file {name!r} leads to /etc/passwd, outside of the folder")
    link("nowhere")
    refuse_folder(model, f"file {name!r} cannot be found: No such file")
    link(name)
    refuse_folder(model, f"file {name!r} cannot be found: Too many levels of symbolic links")
    link("2_Dense")
    refuse_folder(model, f"{name!r} is not a regular file")
    path.unlink()
    os.mkfifo(path)
    refuse_folder(model, f"{name!r} is not a regular file")
    path.unlink()
    path.mkdir()
    refuse_folder(model, f"{name!r} is not a regular file")
    path.rmdir()
    link("2_Dense/file")
    assert len(load(model)) == 2
    assert Checkpoint.open(model).config == ({} if name == "config.json" else None)


def test_index_and_weights_that_are_links_or_no_files(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    outside = model.parent / "model.safetensors.index.json"
    os.rename(index, outside)
    index.symlink_to(outside)
    with pytest.raises(FormatError, match=r"leads to .*, outside of the folder"):
        Checkpoint.open(model)
    assert list(load(index)) == ["x", "y"]  # the user named the link
    index.unlink()
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("model.safetensors", path)):
        make(model / "model.safetensors")
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            Checkpoint.open(model)
        (model / "model.safetensors").rmdir() if make is os.mkdir else (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(FormatError, match="outside of the folder"):
        Checkpoint.open(model)


def test_companions_that_are_links_or_no_files(model: Path) -> None:
    (model.parent / "secret").write_text("s")
    (model / "1_Pooling").mkdir()
    path = model / "1_Pooling" / "config.json"
    for target, message in [
        ("../../secret", "outside of the folder"),
        ("/etc/passwd", "outside of the folder"),
        ("nowhere", "cannot be found"),
        ("config.json", "Too many levels"),
        (".", "is a link to a folder"),
        (str(model.parent), "is a link to a folder"),
    ]:
        path.symlink_to(target)
        with Checkpoint.open(model) as checkpoint, pytest.raises(FormatError, match=message) as caught:
            _ = checkpoint.companions
        assert "1_Pooling/config.json" in str(caught.value)
        path.unlink()
    os.mkfifo(path)
    with (
        Checkpoint.open(model) as checkpoint,
        pytest.raises(FormatError, match=r"'1_Pooling/config\.json' is not a regular file"),
    ):
        _ = checkpoint.left_behind
    path.unlink()
    path.symlink_to("../a.safetensors")
    with Checkpoint.open(model) as checkpoint:
        assert checkpoint.companions == ["1_Pooling/config.json"]


def test_blobs_of_another_model(tmp_path: Path) -> None:
    """A snapshot may link to its own repository's blobs, and to nobody else's."""
    for name in ("models--a--a", "models--b--b"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        save(tmp_path / name / "blobs" / "hash.safetensors", {"x": np.ones(1)})
    snapshot = tmp_path / "models--a--a" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    link = snapshot / "model.safetensors"
    link.symlink_to("../../blobs/hash.safetensors")
    assert list(load(snapshot)) == ["x"]
    for target in ("../../../models--b--b/blobs/hash.safetensors", "../../other/hash.safetensors", "../../hash.safetensors"):
        (tmp_path / "models--a--a" / "other").mkdir(exist_ok=True)
        for place in ("other/hash.safetensors", "hash.safetensors"):
            save(tmp_path / "models--a--a" / place, {"x": np.ones(1)})
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(FormatError, match="outside of the folder"):
            load(snapshot)
    plain = tmp_path / "plain" / "snapshots" / "rev"  # snapshots, but of no models--ORG--NAME
    plain.mkdir(parents=True)
    (tmp_path / "plain" / "blobs").mkdir()
    save(tmp_path / "plain" / "blobs" / "hash.safetensors", {"x": np.ones(1)})
    (plain / "model.safetensors").symlink_to("../../blobs/hash.safetensors")
    with pytest.raises(FormatError, match="outside of the folder"):
        load(plain)


def test_folders_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with Checkpoint.open(model) as checkpoint:
        monkeypatch.setattr(os, "scandir", denied)
        with pytest.raises(FormatError, match="cannot be read: Permission denied"):
            _ = checkpoint.companions
    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(FormatError, match="cannot be read: Permission denied"):
        Checkpoint.open(model)


def test_a_file_that_fails_while_it_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        with pytest.raises(FormatError, match=r"a.safetensors: cannot be read: Input/output error"):
            SafetensorsFile(model / "a.safetensors")


# ---- anything at all ---------------------------------------------------------------------------------------------


def check_any(path: Path, data: bytes) -> None:
    """Whatever the bytes: a refusal, or tensors that are really there, as the other reader sees them."""
    path.write_bytes(data)
    try:
        with SafetensorsFile(path) as file:
            tensors = {name: (t.code, list(t.shape), file.raw(name).tobytes()) for name, t in file.tensors.items()}
    except FormatError:
        with pytest.raises(FormatError) as caught:
            load(path)
        assert str(path) in str(caught.value)
        return
    theirs = dict(safetensors.deserialize(data))  # we are the stricter reader: what we accept, the oracle accepts
    assert tensors == {name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in theirs.items()}
    try:
        loaded = load(path)
    except (FormatError, UnsupportedError):
        return
    for name, value in loaded.items():
        if isinstance(value, PackedWeight):
            assert value.validate() is value
        else:
            assert value.tobytes() == tensors[name][2]


@settings(max_examples=150)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, len(GOLDEN))),
    tail=st.binary(max_size=4),
)
@example(edits=[], cut=None, tail=b"")
def test_mutated_bytes(tmp_path_factory: pytest.TempPathFactory, edits: Any, cut: int | None, tail: bytes) -> None:
    data = bytearray(GOLDEN)
    for place, value in edits:
        data[place] = value
    check_any(tmp_path_factory.getbasetemp() / "mutated.safetensors", bytes(data[:cut]) + tail)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(0, 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=150)
@given(data=st.data())
def test_mutated_headers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    length = int.from_bytes(GOLDEN[:8], "little")
    header = json.loads(GOLDEN[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "slidesparse", "whole", "name", "gone", "index"]))
        if field == "gone":
            del header[name]
        elif field == "name":
            header[data.draw(st.text(max_size=5))] = header.pop(name)
        elif field == "whole" or not isinstance(header[name], dict):
            header[name] = data.draw(JSON_VALUES)
        elif field == "index":
            entry = header[name].get(data.draw(st.sampled_from(["shape", "data_offsets"])))
            if isinstance(entry, list) and entry:
                entry[data.draw(st.integers(0, len(entry) - 1))] = data.draw(st.integers(-1, 70) | JSON_VALUES)
        else:
            header[name][field] = data.draw(st.sampled_from(["I8", "U8", "F32", "F4", "I64", [0, 16]]) | JSON_VALUES)
        if not header:
            break
    check_any(tmp_path_factory.getbasetemp() / "mutated.safetensors", with_header(header, GOLDEN[8 + length :]))


@given(data=st.binary(max_size=200))
def test_noise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    check_any(tmp_path_factory.getbasetemp() / "noise.safetensors", data)
    check_any(tmp_path_factory.getbasetemp() / "noise.safetensors", with_header(data))


@given(value=JSON_VALUES)
def test_shown_and_parse_take_anything(value: Any) -> None:
    assert len(shown(value)) < 1200
    if not isinstance(value, dict):
        with pytest.raises(FormatError, match="here: "):
            parse_json(json.dumps(value).encode("utf-8", "replace"), "here")


def test_unknown_names_are_operand_errors(model: Path) -> None:
    with pytest.raises(OperandError, match=r"'\.\./x' is no packed module and no tensor"):
        load(model, names=["../x"])


# ---- files that are something else -----------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4976698672\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "is a pointer of Git LFS, not the file itself; run `git lfs install && git lfs pull`"),
        (b"\xef\xbb\xbf" + POINTER, "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html><title>403</title></html>", "is a web page ('<!DOCTYPE html>"),
        (b"\n  <html lang='de'>" + "ä".encode() * 200, "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        (b'{"error": "Access to model is restricted"}', "is a JSON text"),
        (b"Entry not found", "is a text ('Entry not found'), no .safetensors file; download it again"),
        (b"404", "is a text ('404')"),
        (
            b"PK\x03\x04\x00\x00\x08\x08" + bytes(99),
            "is a zip archive, as torch.save writes it, no .safetensors file; load it with",
        ),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99), "is a pickle, as torch.save writes it"),
        (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF file"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + bytes(99), "is a gzip archive"),
        (bytes(4096), "is all zeros; download it again"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, data: bytes, message: str) -> None:
    refuse(tmp_path / "f.safetensors", data, message)
    for name in ("config.json", "model.safetensors.index.json") if data[:1] not in b"{4" else ():
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        save(folder / "model-1.safetensors", {"x": np.ones(1)})
        (folder / name).write_bytes(data)
        with pytest.raises(FormatError) as caught:
            load(folder)
        assert name in str(caught.value)
        assert message.split("no .safe")[0].split(" of")[0] in str(caught.value) or b"\0" in data


def test_no_message_is_long_or_holds_what_a_terminal_obeys(tmp_path: Path) -> None:
    for text in ("x" * 100_000, "a b " * 50_000, "\x1b[2J\r\n\ud800\u202e" * 9):
        message = str(UnsupportedError(f"start {text} end"))
        assert message.isprintable()
        assert len(message) <= 1200
        assert message.startswith("start")
        assert message.endswith("end")


@pytest.mark.parametrize("path", ["a\0b.safetensors", "\ud800.safetensors", None, 5])
def test_paths_that_no_file_can_have(tmp_path: Path, path: Any) -> None:
    source = tmp_path / "m.safetensors"
    save(source, {"fc": packed()})
    for call in (
        lambda: load(path),
        lambda: save(path, {"x": np.ones(1)}),
        lambda: ss.pack_checkpoint(path, tmp_path / "o"),
        lambda: ss.unpack_checkpoint(path, tmp_path / "o"),
        lambda: ss.unpack_checkpoint(source, path or 5),
        lambda: ss.verify_checkpoint(path),
        lambda: ss.verify_checkpoint(source, path or 5),
        lambda: ss.inspect_checkpoint(path),
    ):
        with pytest.raises(OperandError, match=r"must be a path|no path can hold"):
            call()
    assert os.listdir(tmp_path) == ["m.safetensors"]
