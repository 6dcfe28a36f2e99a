"""Single files, against the safetensors package: what we write it reads, what it writes we read, byte for byte."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_nb.checkpoint import safetensors_writer
from slidesparse_nb.checkpoint.safetensors import SafetensorsFile, tensor_bytes
from slidesparse_nb.checkpoint.safetensors_writer import SafetensorsWriter, header_bytes
from slidesparse_nb.core.dtypes import NUMPY_OF, SAFETENSORS_BITS
from slidesparse_nb.errors import FormatError, OperandError, UnsupportedError

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    entries = []
    for name in draw(st.lists(NAMES, unique=True, max_size=8)):
        code, shape = draw(st.sampled_from(sorted(SAFETENSORS_BITS))), draw(SHAPES)
        entries.append((name, code, shape if SAFETENSORS_BITS[code] >= 8 else (*shape, 8)))
    return entries


def random_array(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    dtype = NUMPY_OF[code]
    raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, (*shape, dtype.itemsize), np.uint8)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


# ---- the oracle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", NUMPY_OF)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (4, 3, 1)])
def test_we_read_what_the_oracle_writes(tmp_path: Path, code: str, shape: tuple[int, ...]) -> None:
    array = random_array(code, shape)
    safetensors.numpy.save_file({"a": array, "b": np.arange(3)}, tmp_path / "f", metadata={"key": "é"})
    with SafetensorsFile(tmp_path / "f") as file:
        assert file.metadata == {"key": "é"}
        assert (file.tensors["a"].code, file.tensors["a"].shape, file.tensors["a"].nbytes) == (code, shape, array.nbytes)
        read = file.array("a")
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, shape, array.tobytes())
        assert file.raw("a").tobytes() == array.tobytes()
        assert list(file.array("b")) == [0, 1, 2]


@given(entries=entry_lists(), metadata=st.dictionaries(NAMES, NAMES, max_size=3), seed=st.integers(0, 99))
def test_the_oracle_reads_what_we_write(tmp_path_factory: Any, entries: Any, metadata: dict[str, str], seed: int) -> None:
    path = tmp_path_factory.mktemp("oracle") / "f"
    rng = np.random.default_rng(seed)
    data = {name: rng.integers(0, 2, tensor_bytes(code, shape), np.uint8) for name, code, shape in entries}
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, array in data.items():
            writer.write(name, array)
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: (f["dtype"], tuple(f["shape"]), bytes(f["data"])) for name, f in found.items()} == {
        name: (code, shape, data[name].tobytes()) for name, code, shape in entries
    }
    with safetensors.safe_open(path, framework="np") as oracle:
        assert (oracle.metadata() or {}) == metadata
        assert set(oracle.keys()) == data.keys()
    with SafetensorsFile(path) as file:
        assert file.metadata == metadata
        assert {name: (t.code, t.shape) for name, t in file.tensors.items()} == {n: (c, s) for n, c, s in entries}
        assert all(file.raw(name).tobytes() == array.tobytes() for name, array in data.items())


# ---- layout ------------------------------------------------------------------------------------------------------


@given(entries=entry_lists(), random=st.randoms())
def test_layout_is_deterministic_aligned_and_without_holes(entries: Any, random: Any) -> None:
    header, placed = header_bytes(entries, {"b": "1", "a": "2"})
    random.shuffle(entries)
    assert header_bytes(iter(entries), {"a": "2", "b": "1"}) == (header, placed)
    assert len(header) % 8 == 0
    end = len(header)
    for tensor in placed.values():
        assert tensor.start == end
        assert tensor.start % max(1, SAFETENSORS_BITS[tensor.code] // 8) == 0
        end = tensor.stop


def test_layout_by_hand() -> None:
    header, placed = header_bytes([("b", "I8", (3,)), ("a", "I8", ()), ("z", "F32", (2, 1))], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"z":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"a":{"dtype":"I8","shape":[],"data_offsets":[8,9]},"b":{"dtype":"I8","shape":[3],"data_offsets":[9,12]}}'
    )
    text += b" " * (-len(text) % 8)
    assert header == len(text).to_bytes(8, "little") + text
    start = len(header)
    assert [(t.name, t.start - start, t.stop - start) for t in placed.values()] == [("z", 0, 8), ("a", 8, 9), ("b", 9, 12)]


@pytest.mark.parametrize(
    ("entries", "metadata", "message"),
    [
        ([("a", "I8", (1,)), ("a", "I8", (2,))], {}, "'a': must name one tensor, once"),
        ([("__metadata__", "I8", (1,))], {"x": "y"}, "'__metadata__': must name"),
        ([("__metadata__", "I8", (1,))], {}, "'__metadata__': must name"),
        ([("a", "F7", (1,))], {}, "'a': 'F7'"),
        ([("a", "I8", (-1,))], {}, r"'a': 'I8' \(-1,\)"),
        ([("a", "I8", (2**40, 2**40))], {}, "2\\^63"),
        ([("a", "F4", (3,))], {}, "no whole number of bytes"),
        ([("\ud800", "I8", (1,))], {}, "lone surrogate"),
        ([], {"a": "\ud800"}, "lone surrogate"),
    ],
)
def test_layouts_that_cannot_be(entries: Any, metadata: Any, message: str) -> None:
    with pytest.raises(OperandError, match=message):
        header_bytes(entries, metadata)


def test_headers_that_no_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert safetensors_writer.LARGEST_HEADER == 100_000_000
    monkeypatch.setattr(safetensors_writer, "LARGEST_HEADER", 1000)
    assert len(header_bytes([("a" * 900, "I8", (1,))], {})[0]) <= 1008
    with pytest.raises(OperandError, match="the header would take 1056 bytes, above the limit of 1000"):
        header_bytes([("a" * 1000, "I8", (1,))], {})


# ---- read --------------------------------------------------------------------------------------------------------


def test_arrays_are_views_that_outlive_the_file(tmp_path: Path) -> None:
    path = models.write(tmp_path / "f", {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype="u1")})
    file = SafetensorsFile(path)
    a = file.array("a")
    assert np.shares_memory(a, file.raw("a"))
    assert not a.flags.writeable
    assert not file.raw("b").flags.writeable
    file.close()
    file.close()
    os.unlink(path)
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(OperandError, match="is closed"):
        file.array("a")
    with pytest.raises(OperandError, match="'c' is no tensor of"):
        file.raw("c")
    assert "2 tensors" in repr(file)


def test_unaligned_tensors(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float64)
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F64","shape":[4],"data_offsets":[1,33]}}'
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" + values.tobytes())
    with SafetensorsFile(tmp_path / "f") as file:
        b = file.array("b")
        assert b.flags.aligned
        assert not b.flags.writeable
        assert b.tolist() == [0, 1, 2, 3]
        assert file.raw("b").tobytes() == values.tobytes()


def test_types_and_shapes_that_numpy_lacks(tmp_path: Path) -> None:
    lacks = {"four": ("F4", (6,), "type for F4"), "deep": ("I8", (1,) * 70, "shape"), "wide": ("I8", (0, 2**62, 2), "shape")}
    with SafetensorsWriter(tmp_path / "f", [(name, code, shape) for name, (code, shape, _) in lacks.items()], {}) as writer:
        writer.write("four", b"abc")
    with SafetensorsFile(tmp_path / "f") as file:
        assert file.raw("four").tobytes() == b"abc"
        for name, (_, _, what) in lacks.items():
            with pytest.raises(UnsupportedError, match=f"'{name}': NumPy has no {what}"):
                file.array(name)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_release_gives_memory_back(tmp_path: Path) -> None:
    size = 64 << 20
    with SafetensorsWriter(tmp_path / "f", [("a", "U8", (size,)), ("b", "U8", (10,))], {}) as writer:
        writer.write("b", bytes(range(10)))
        writer.write("a", b"\7", size - 1)
    with SafetensorsFile(tmp_path / "f") as file:
        before = resident()
        raw = file.raw("a")
        for release, left in (((), 0), ((size // 2,), 0.5), ((0, size // 4), 0.75)):
            assert int(raw.max()) == 7  # and it comes back
            assert resident() - before > size * 0.9
            file.release("a", *release)
            assert abs((resident() - before) / size - left) < 0.1
        file.release("b", 0, 5)
        file.release("b", 20)
        assert file.raw("b").tolist() == list(range(10))


# ---- write -------------------------------------------------------------------------------------------------------


def test_pieces_in_any_order_from_many_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {f"t{i}": rng.integers(0, 256, 1000, np.uint8) for i in range(8)}
    pieces = [(name, start) for name in data for start in range(0, 1000, 90)]
    rng.shuffle(pieces)
    with SafetensorsWriter(tmp_path / "f", [(n, "U8", (1000,)) for n in data], {}) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: writer.write(p[0], data[p[0]][int(p[1]) : int(p[1]) + 90], int(p[1])), pieces))
        assert all(writer.read(name, 0, 1000) == array.tobytes() for name, array in data.items())
    with SafetensorsFile(tmp_path / "f") as file:
        assert all(np.array_equal(file.array(name), array) for name, array in data.items())


def test_short_writes_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, pread, calls = os.pwrite, os.pread, []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append(0) or pwrite(fd, bytes(data[:3]), at))
    monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 3) if at > 8 else count, at))
    with SafetensorsWriter(tmp_path / "f", [("a", "F32", (9,))], {}) as writer:
        writer.write("a", np.arange(9, dtype=np.float32))
        assert writer.read("a", 0, 36) == np.arange(9, dtype=np.float32).tobytes()
    assert len(calls) > 12
    assert SafetensorsFile(tmp_path / "f").array("a").tolist() == list(range(9))
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        SafetensorsWriter(tmp_path / "g", [("a", "F32", (9,))], {})


def test_what_write_takes(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.int16).reshape(2, 3)
    entries = [("t", "I16", (3, 2)), ("m", "U8", (4,)), ("e", "F32", (0,)), ("s", "BF16", ()), ("c", "F8_E4M3", (2,))]
    with SafetensorsWriter(tmp_path / "f", entries, {}) as writer:
        writer.write("t", matrix.T)  # not contiguous
        writer.write("m", memoryview(np.array([1, 2], np.uint16)))
        writer.write("e", np.zeros(0, np.float32))
        writer.write("e", b"")
        writer.write("s", np.array(1.5, NUMPY_OF["BF16"]))
        writer.write("c", bytearray(b"\x38"), 1)
        assert writer.read("m", 2, 99) == b"\2\0"
        assert writer.read("m", 5, 1) == writer.read("m", -1, 1) == writer.read("x", 0, 1) == b""
        for offset, data in [(-1, b"a"), (0, bytes(5)), (4, b"a"), (2, np.zeros(3, np.uint8))]:
            with pytest.raises(OperandError, match="not inside tensor 'm' of 4 bytes"):
                writer.write("m", data, offset)
        with pytest.raises(OperandError, match="'x' is no tensor"):
            writer.write("x", b"")
    writer.close()
    with SafetensorsFile(tmp_path / "f") as file:
        assert np.array_equal(file.array("t"), matrix.T)
        assert file.raw("m").tolist() == [1, 0, 2, 0]
        assert file.array("s") == 1.5
        assert file.array("c").astype(float).tolist() == [0, 1]


def test_resume(tmp_path: Path) -> None:
    path, entries = tmp_path / "f", [("a", "U8", (4,)), ("b", "U8", (4,))]
    with SafetensorsWriter(path, entries, {"k": "v"}) as writer:
        writer.write("a", b"aaaa")
    with SafetensorsWriter(path, entries, {"k": "v"}, resume=True) as writer:
        assert writer.read("a", 0, 4) == b"aaaa"
        writer.write("b", b"bbbb")
    whole = path.read_bytes()
    assert whole.endswith(b"aaaabbbb")
    for other, metadata in [(entries[:1], {"k": "v"}), (entries, {"k": "w"}), ([("a", "I8", (4,)), entries[1]], {"k": "v"})]:
        with pytest.raises(FormatError, match="cannot be resumed"):
            SafetensorsWriter(path, other, metadata, resume=True)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="cannot be resumed"):
        SafetensorsWriter(path, entries, {"k": "v"}, resume=True)
    with pytest.raises(FileNotFoundError):
        SafetensorsWriter(tmp_path / "none", entries, {}, resume=True)
    with SafetensorsWriter(path, entries[:1], {}):
        pass
    assert SafetensorsFile(path).raw("a").tolist() == [0, 0, 0, 0]  # begun anew: nothing of the old file is left


def test_writer_refuses_links_and_fifos_and_closes_after_errors(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="symbolic links"):
        SafetensorsWriter(tmp_path / "link", [], {})
    with pytest.raises(FormatError, match="not a regular file"):
        SafetensorsWriter(tmp_path / "fifo", [], {})
    assert (tmp_path / "target").read_bytes() == b"precious"
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "f", [("a", "U8", (1,))], {}) as writer:
        raise KeyError
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.write("a", b"a")
