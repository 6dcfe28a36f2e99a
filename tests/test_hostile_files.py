"""Files that lie: each refused by name, with nothing believed, nothing allocated, nothing followed, nothing hanging.

Files damaged at random, and another reader beside ours: fuzz.py.
"""

from __future__ import annotations

import gc
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from cases import packed_weight

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint, index_bytes, load, packed_arrays, read_packed, save, slidesparse_metadata
from slidesparse_nb.checkpoint.safetensors import SafetensorsFile
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8, DType
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.errors import FormatError, OperandError, UnsupportedError

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


def refused(read: Callable[[Path], Any], path: Path, *messages: str) -> None:
    """`read` refuses what is at `path`, by its name, in a sentence that a terminal may show."""
    with pytest.raises(FormatError) as caught:
        read(path)
    for message in (str(path), *messages):
        assert message in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()


def refuse(path: Path, data: bytes, *messages: str) -> None:
    path.write_bytes(data)
    for read in (SafetensorsFile, load):
        refused(read, path, *messages)


def with_header(header: str | bytes | dict[str, Any], data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---- the file ----------------------------------------------------------------------------------------------------


NO_HEADER = [
    (b"", "has 0 bytes"),
    (bytes(7), "has 7 bytes"),
    (bytes(8), "header starts with b''"),
    ((11).to_bytes(8, "little") + b"{}        ", "header length 11 reaches past the end of the file (18 bytes)"),
    ((100_000_001).to_bytes(8, "little") + b"{}", "header length 100000001 is above the limit"),
    (with_header(b'{"\xff": 1}'), "byte 2 is not UTF-8"),
    (with_header("{'a': 1}"), "is not JSON"),
    (with_header("{}}"), "is not JSON"),
    (with_header(" {}"), "must start with '{'"),
    (with_header('{"a":{"dtype":' + "[" * 200_000), "nested too deeply"),
    (with_header('{"a": -Infinity}'), "-Infinity is no JSON number"),
    (with_header('{"a": ' + "9" * 5000 + "}"), ""),
]
NO_MAP_OF_TENSORS = [
    ('{"a": {}, "a": {}}', "key 'a' stands twice"),
    ('{"a": {"x": [{"y":1,"y":2}]}}', "key 'y' stands twice"),
    ('{"__metadata__": {}, "__metadata__": {}}', "key '__metadata__' stands twice"),
    ('{"\\ud800": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "lone surrogate"),
    ('{"__metadata__": {"x":"\\udfff"}}', "lone surrogate"),
    ({"__metadata__": []}, "__metadata__ is [], must map strings to strings"),
    ({"__metadata__": {"x": 1}}, "must map strings to strings"),
]
ENTRIES = [
    ([], "must have exactly the keys"),
    ("x" * 10_000, "must have exactly the keys"),
    ({"dtype": "U8", "shape": [4]}, "is {'dtype': 'U8', 'shape': [4]}, must have exactly the keys"),
    ({**tensor(), "more": 1}, "must have exactly the keys"),
    *((tensor(dtype=code), f"dtype {code!r} is unknown") for code in ("U9", "u8", 8, ["U8"])),
    *((tensor(shape=shape), f"shape {shape!r} must be a list") for shape in (4, "4", [True, 4], [4.0], [[4]], [-2, -2])),
    (tensor(shape=[2**63]), "must be a list of integers from 0 to 2^63 - 1"),
    (tensor(shape=[2**32, 2**31]), "has 2^63 elements or more"),
    (tensor(shape=[2**62] * 100_000), "has 2^63 elements or more"),
    (tensor(shape=[2**62, 4, 0], offsets=[0, 0]), "has 2^63 elements or more"),
    (tensor(dtype="F64", shape=[2**61]), "takes 18446744073709551616 bytes, but data_offsets span 4"),
    (tensor(shape=[3]), "U8 [3] takes 3 bytes, but data_offsets span 4"),
    (tensor(dtype="F4", shape=[7]), "7 elements of F4 are no whole number of bytes"),
    *(
        (tensor(offsets=wrong), "two integers, 0 <= start <= stop")
        for wrong in ([4, 0], [-4, 0], [0], [0, 4, 8], [False, 4], None)
    ),
    (tensor(offsets=[2**62, 2**62 + 4]), "leaves a hole before it; it must start at 0"),
]
PLACES = [
    ({"a": tensor(), "b": tensor()}, "tensor 'b': starts at byte 0 of the data and overlaps the tensor before it; it must"),
    ({"a": tensor(), "b": tensor(offsets=[2, 6])}, "tensor 'b': starts at byte 2 of the data and overlaps"),
    ({"b": tensor(offsets=[5, 9]), "a": tensor()}, "tensor 'b': starts at byte 5 of the data and leaves a hole before it"),
    ({"a": tensor(), "b": tensor(shape=[0], offsets=[2, 2])}, "tensor 'b': starts at byte 2 of the data and overlaps"),
    ({"a": tensor(), "b": tensor(offsets=[4, 8]), "c": tensor(offsets=[8, 12])}, "is truncated: its header describes"),
    ({"a": tensor(shape=[2], offsets=[0, 2])}, "has bytes after its last tensor: its header describes"),
]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *NO_HEADER,
        *((with_header(header, b"abcd"), message) for header, message in NO_MAP_OF_TENSORS),
        *((with_header({"fc.weight": entry}, b"abcd"), f"tensor 'fc.weight': {message}") for entry, message in ENTRIES),
        *((with_header(header, b"abcdefgh"), message) for header, message in PLACES),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_headers_that_lie(tmp_path: Path, data: bytes, message: str) -> None:
    refuse(tmp_path / "f.safetensors", data, *message.split(": ", 1) if message.startswith("tensor 'fc") else (message,))


def test_truncation_anywhere(tmp_path: Path) -> None:
    for length in range(0, len(GOLDEN), 7):
        refuse(tmp_path / "f.safetensors", GOLDEN[:length])


@pytest.mark.parametrize("name", ["a\0b", "../../etc/passwd", "", "a" * 100_000, "\U0001f600", "\x1b[2J"])
def test_names_are_only_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(with_header({name: tensor()}, b"abcd"))
    assert load(path)[name].tobytes() == b"abcd"
    save(path, {name: np.ones(1)})
    assert list(load(path)) == [name]
    assert os.listdir(tmp_path) == ["f.safetensors"]
    refuse(path, with_header({name: tensor(offsets=[1, 5])}, b"abcd"))


def test_huge_headers_are_refused(tmp_path: Path) -> None:
    many = ",".join(f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(100_000))
    refuse(tmp_path / "f.safetensors", with_header("{" + many + ',"99999":1}'), "key '99999' stands twice")


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
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("fifo.safetensors", "loop.safetensors", "none.safetensors", "x" * 300):
        for read in (load, SafetensorsFile):
            with pytest.raises(FormatError):
                read(tmp_path / name)
    for path in (tmp_path / "folder.safetensors", "/dev/null", "/proc/self/status"):
        with pytest.raises(FormatError, match=r"not a regular file|/proc"):
            SafetensorsFile(path)


# ---- packed weights ----------------------------------------------------------------------------------------------


def write_packed(
    path: Path, changes: dict[str, Any], metadata: dict[str, str] | None = None, dtype: DType = INT8, module: str = "fc"
) -> None:
    """A packed file, some of whose tensors (fc.weight_*, or others by their whole names) are changed, or left out (None)."""
    parts = ("packed", "meta", "scale", "shape")
    named = {f"{module}.weight_{name}" if name in parts else name: value for name, value in changes.items()}
    arrays = packed_arrays(module, packed_weight(4, 30, dtype=dtype)) | named
    metadata = slidesparse_metadata(Pattern(6, 8), dtype) if metadata is None else metadata
    models.write(path, {name: array for name, array in arrays.items() if array is not None}, metadata)


def edited(array: Any, place: Any, value: Any) -> Any:
    array = array.copy()
    array[place] = value
    return array


P = packed_weight(4, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": edited(P.meta, (2, 1), 0x40)}, "'fc'.meta: byte 0x40 at row 2, column 1 holds a nibble out of order"),
        ({"scale": edited(P.scale, (0, 0), -1)}, "'fc'.scale: -1.0 at row 0 must be finite and not negative"),
        *(({part: None}, f"needs tensor 'fc.weight_{part}': missing") for part in ("packed", "meta", "scale", "shape")),
        ({"fc.weight": np.ones((4, 30))}, "'fc' has both weight and weight_packed"),
        ({"fc": np.ones(1)}, "'fc' is the name of both a tensor and a packed module"),
        ({"shape": np.array([-4, 30])}, "'fc.weight_shape': shape (-4, 30) must not be negative"),
        ({"shape": np.array([4, 2**16])}, "'fc.weight_packed': is I8 (4, 24), must be I8 (4, 49152)"),
        ({"shape": np.array([4, 2**20])}, "'fc.weight_shape': k=1048576 takes 786432 slots"),
        ({"shape": np.array([4, 2**62])}, "shape (4, 4611686018427387904) must be below 2^31 in both dimensions"),
        ({"shape": np.array([4, 33])}, "for a weight of shape (4, 33) at 6:8 in int8"),
        ({"shape": np.array([4, 30, 1])}, "'fc.weight_shape': is I64 (3,), must be I64 (2,)"),
        ({"shape": np.array([4, 30], np.int32)}, "is I32 (2,), must be I64 (2,)"),
        ({"meta": P.meta.view(np.int8)}, "'fc.weight_meta': is I8 (4, 6), must be U8 (4, 6)"),
        ({"meta": P.meta[:, :-1].copy()}, "'fc.weight_meta': is U8 (4, 5), must be U8 (4, 6)"),
        ({"scale": P.scale.astype(np.float64)}, "'fc.weight_scale': is F64 (4, 1), must be F32 (4, 1)"),
        ({"scale": P.scale.ravel()}, "'fc.weight_scale': is F32 (4,), must be F32 (4, 1)"),
        ({"packed": P.values.astype(np.int32)}, "'fc.weight_packed': is I32, must be I8"),
        ({"packed": P.values.astype(FLOAT8.numpy)}, "is F8_E4M3, must be I8 as metadata 'slidesparse' says"),
        ({"packed": P.values[:2].copy()}, "is I8 (2, 24), must be I8 (4, 24)"),
        ({"x.weight_meta": P.meta}, "'x.weight_meta' needs tensor 'x.weight_packed': missing"),
        ({"x.weight_packed": P.values}, "'x.weight_packed' needs tensor 'x.weight_meta': missing"),
        ({"scale": P.scale}, "'fc.weight_packed': has a weight_scale, but bfloat16 values carry none"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_packed_tensors_that_lie(tmp_path: Path, changes: Any, message: str) -> None:
    write_packed(tmp_path / "f.safetensors", changes, dtype=BFLOAT16 if "bfloat16" in message else INT8)
    refused(load, tmp_path / "f.safetensors", message)


HEADER = json.loads(slidesparse_metadata(Pattern(6, 8), INT8)["slidesparse"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "is [], must be a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"version": 1, "version": 1}', "key 'version' stands twice"),
        ({"version": None}, "version None is unknown"),
        ({"version": True}, "version True is unknown"),
        ({"version": 1.0}, "version 1.0 is unknown"),
        ({"order": "sm90"}, "must have exactly the keys"),
        ({"tool": 1}, "must have exactly the keys"),
        ({"pattern": "6:8"}, "pattern '6:8' must be like"),
        ({"pattern": {"nnz": 6}}, "must be like"),
        ({"pattern": {"nnz": 2, "group": 8}}, "2:8 is not of the form (2N-2):2N"),
        ({"pattern": {"nnz": 6.0, "group": 8}}, "must be two integers"),
        ({"pattern": {"nnz": 4096, "group": 4098}}, "is too large; a group may have 4096 columns"),
        ({"pattern": {"nnz": 8, "group": 10}}, "must be U8 (4, 6) for a weight of shape (4, 30) at 8:10"),
        ({"dtype": "fp8"}, "dtype 'fp8' must be one of"),
        ({"dtype": ["int8"]}, "dtype ['int8'] must be one of"),
        ({"dtype": "float16"}, "is I8, must be F16 as metadata"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_that_lies(tmp_path: Path, text: Any, message: str) -> None:
    path, changes = tmp_path / "f.safetensors", {}
    if "8:10" in message:  # a pattern under which the values happen to fit
        changes = {"packed": P.values[:, :1].repeat(24, axis=1), "meta": P.meta[:, :1].copy()}
    write_packed(path, changes, {"slidesparse": text if isinstance(text, str) else json.dumps(HEADER | text)})
    refused(load, path, message)


def test_metadata_that_is_missing_or_differs_between_files(tmp_path: Path) -> None:
    one, two = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    write_packed(one, {}, {"format": "pt"})
    refused(load, one, "module 'fc' is packed, but metadata 'slidesparse' is missing")
    write_packed(two, {}, module="other")
    names = {name: file.name for file in (one, two) for name in SafetensorsFile(file).tensors}
    (tmp_path / INDEX).write_bytes(index_bytes(names, 0))
    refused(load, tmp_path, f"{one}: tensor 'fc.weight_packed': metadata 'slidesparse' of its file is missing")
    write_packed(one, {}, slidesparse_metadata(Pattern(2, 4), INT8))
    refused(load, tmp_path, f"{two}: holds pattern 6:8, but model-1.safetensors 2:4; a checkpoint must have one pattern")


def test_headers_are_checked_before_contents_are_read(tmp_path: Path) -> None:
    write_packed(tmp_path / "f.safetensors", {"meta": edited(P.meta, (2, 1), 0x40)})
    with Checkpoint.open(tmp_path / "f.safetensors") as checkpoint:
        weight = read_packed(checkpoint)["fc"]
    with pytest.raises(FormatError, match=r"fc\.meta: byte 0x40"):
        weight.validate("fc")


# ---- indexes and folders -------------------------------------------------------------------------------------------


INDEX, BOTH = "model.safetensors.index.json", {"x": "a.safetensors", "y": "b.safetensors"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of two shards, a: x, and b: y."""
    root = tmp_path / "model"
    root.mkdir()
    save(root / "a.safetensors", {"x": np.ones(1)})
    save(root / "b.safetensors", {"y": np.ones(1)})
    (root / INDEX).write_text(json.dumps({"weight_map": BOTH}))
    assert list(load(root)) == ["x", "y"]
    save(tmp_path / "outside.safetensors", {"y": np.ones(1)})
    return root


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map is {}, must map"),
        ([["x", "a.safetensors"]], "must map tensor names to file names"),
        ({**BOTH, "y": None}, "tensor 'y' is in None, which must be the name of a .safetensors file"),
        ({**BOTH, "y": "../outside.safetensors"}, "tensor 'y' is in '../outside.safetensors', which must be"),
        ({**BOTH, "y": "sub/b.safetensors"}, "in the same folder"),
        ({**BOTH, "y": "pytorch_model.bin"}, "must be the name of a .safetensors file"),
        ({**BOTH, "y": ""}, "must be the name of a .safetensors file"),
        ({**BOTH, "y": "c.safetensors"}, "file 'c.safetensors' cannot be found: No such file"),
        ({**BOTH, "y": "c\0.safetensors"}, "file 'c\\x00.safetensors' cannot be found"),
        ({"x": "b.safetensors", "y": "a.safetensors"}, "tensor 'x' is not in 'b.safetensors', where the index says it is"),
        ({**BOTH, "\x1b": "b.safetensors"}, "tensor '\\x1b' is not in 'b.safetensors'"),
        (b"[]", "is [], must be a JSON object"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        (b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "key 'x' stands twice"),
        (1 << 33, "is larger than 100000000 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_indexes_that_lie(model: Path, index: Any, message: str) -> None:
    if isinstance(index, int):
        os.truncate(model / INDEX, index)
    else:
        (model / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps({"weight_map": index}).encode())
    refused(Checkpoint.open, model, message)
    refused(lambda model: Checkpoint.open(model / INDEX), model, message)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["y", "x"], "b.safetensors: tensor 'x' is in a.safetensors, too; it must be in one file only"),
        (["y", "hidden"], "tensor 'hidden' of b.safetensors is not in the index"),
        ([], "b.safetensors: header length 496 reaches past the end of the file"),
    ],
)
def test_shards_that_disagree_with_the_index(model: Path, names: list[str], message: str) -> None:
    save(model / "b.safetensors", {name: np.ones(1) for name in names})
    if not names:
        (model / "b.safetensors").write_bytes(GOLDEN[:100])
    refused(Checkpoint.open, model, message)
    refused(lambda model: Checkpoint.open(model / INDEX), model, message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(Path(*[".."] * len(path.parts), "outside.safetensors")), "outside of the folder"),
        (lambda path: path.symlink_to("/etc/passwd"), "leads to /etc/passwd, outside of the folder; copy the file into it"),
        (lambda path: path.symlink_to("nowhere"), "cannot be found: No such file"),
        (lambda path: path.symlink_to(path.name), "cannot be found: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("."), "is not a regular file|is a link to a folder"),
        (os.mkfifo, "is not a regular file"),
        (os.mkdir, "is not a regular file"),
    ],
)
@pytest.mark.parametrize("name", ["b.safetensors", "config.json", INDEX, "1_Pooling/config.json"])
def test_members_that_are_links_or_no_files(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Any, message: str
) -> None:
    """Weights, a config, an index, a companion; a link to another file of the folder is followed."""
    (model / "1_Pooling").mkdir()
    (model / "tokenizer.json").write_bytes(data := (model / name).read_bytes() if (model / name).exists() else b"{}")
    monkeypatch.chdir(model)
    Path(name).unlink(missing_ok=True)
    make(Path(name))
    if make is not os.mkdir or "/" not in name:  # folders go along
        with pytest.raises(FormatError, match=message) as caught, Checkpoint.open(model) as checkpoint:
            _ = checkpoint.companions
        assert str(model) in str(caught.value)
        assert name in str(caught.value)
    Path(name).rmdir() if make is os.mkdir else Path(name).unlink()
    Path(name).symlink_to(Path(*[".."] * (len(Path(name).parts) - 1), "tokenizer.json"))
    with Checkpoint.open(model) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y"]
        assert ("1_Pooling/config.json" in checkpoint.companions) == (name == "1_Pooling/config.json")
    assert Path(name).read_bytes() == data


def test_a_link_that_the_user_names_is_followed(model: Path) -> None:
    index = model / INDEX
    index.rename(model.parent / index.name)
    index.symlink_to(model.parent / index.name)
    assert list(load(index)) == ["x", "y"]


@pytest.mark.parametrize(
    ("repository", "target", "inside"),
    [
        ("models--a--a", "../../blobs/hash", True),
        ("models--a--a", "../../../models--b--b/blobs/hash", False),
        ("models--a--a", "../../other/hash", False),
        ("models--a--a", "../../hash", False),
        ("plain", "../../blobs/hash", False),  # snapshots, but of no models--ORG--NAME
    ],
)
def test_a_snapshot_links_to_its_own_blobs_alone(tmp_path: Path, repository: str, target: str, inside: bool) -> None:
    for place in ("models--b--b/blobs", f"{repository}/blobs", f"{repository}/other", repository):
        models.write(tmp_path / place / "hash", {"x": np.ones(1)})
    snapshot = tmp_path / repository / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(target)
    if inside:
        assert list(load(snapshot)) == ["x"]
    else:
        with pytest.raises(FormatError, match="outside of the folder"):
            load(snapshot)


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


# ---- files that are something else -----------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4976698672\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "is a pointer of Git LFS, not the file itself; run `git lfs install && git lfs pull`"),
        (b"\xef\xbb\xbf" + POINTER, "is a pointer of Git LFS"),
        (b"\n  <html lang='de'>" + "ä".encode() * 200, "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page ('<?xml"),
        (b'{"error": "Access to model is restricted"}', "is a JSON text"),
        (b"Entry not found", "is a text ('Entry not found'), no .safetensors file; download it again"),
        (b"PK\x03\x04\0\0\x08\x08" + bytes(99), "is a zip archive, as torch.save writes it, no .safetensors file; load it"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99), "is a pickle, as torch.save writes it"),
        (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF file"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + bytes(99), "is a gzip archive"),
        (bytes(4096), "is all zeros; download it again"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, data: bytes, message: str) -> None:
    refuse(tmp_path / "f.safetensors", data, message)
    if data[:1] == b"{":
        return
    for name in ("config.json", INDEX):
        models.folder(folder := tmp_path / name.split(".")[0])
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
    save(source, {"fc": P})
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
