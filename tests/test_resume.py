"""Kill a conversion at any system call that changes something, continue it, and get the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
from faults import contents, failing, killed

import slidesparse_nb as ss
from slidesparse_nb.convert import staging, write

START_OVER = {"overwrite": True}


@pytest.fixture
def small_units(unit_bytes: Callable[[int], None]) -> None:
    """Cut the work finely, so that there is much to interrupt."""
    unit_bytes(1024)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.folder(tmp_path / "in", models.tensors(layers=1))


def pack(source: Path, options: ss.Options | None = None, **run: Any) -> ss.Report:
    """Pack into `out` beside the source."""
    return ss.pack_checkpoint(source, source.parent / "out", options, ss.Run(**run))


def refused(source: Path, why: str, options: ss.Options | None = None, **run: Any) -> None:
    """Packing is refused, and changes nothing."""
    before = contents(source.parent)
    with pytest.raises(ss.OperandError, match=why):
        pack(source, options, **run)
    assert contents(source.parent) == before


def interrupt(source: Path, at: int) -> None:
    assert killed(lambda: pack(source), at)


def finished(source: Path, **run: Any) -> None:
    """The run, and no other file is left beside its output, which is that of a run without trouble."""
    pack(source, **run)
    assert {path.name for path in source.parent.iterdir()} <= {"in", "out", "victim"}
    ss.pack_checkpoint(source, source.parent / "again")
    assert contents(source.parent / "out") == contents(source.parent / "again")
    shutil.rmtree(source.parent / "again")


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_anywhere_and_resume(tmp_path: Path, small_units: None, single: bool, overwrite: bool) -> None:
    parts = models.tensors(layers=1)
    if single:
        source, out = models.write(tmp_path / "in.safetensors", parts), tmp_path / "out.safetensors"
    else:
        source, out = models.folder(tmp_path / "in", parts), tmp_path / "out"
    shards = None if single else 20_000
    options = ss.Options(scheme="INT8_W8A8", max_shard_size=shards)
    ss.pack_checkpoint(source, out, options)
    wanted, here = contents(out), sorted(os.listdir(tmp_path))
    rng = random.Random(f"{single}{overwrite}")
    kills = 0
    for _ in range(20):
        if overwrite:
            ss.pack_checkpoint(source, out, ss.Options(scheme="BF16", max_shard_size=shards), ss.Run(overwrite=True))
        elif single:
            out.unlink()
        else:
            shutil.rmtree(out)
        resume = False
        for _ in range(rng.randint(1, 3)):  # killed once, or again while it resumes
            run = ss.Run(max_workers=2, verify=False, resume=resume, overwrite=overwrite)
            work = partial(ss.pack_checkpoint, source, out, options, run)
            if not killed(work, rng.randint(1, 260), torn=rng.random() < 0.5):
                break
            kills, resume = kills + 1, True
            if not overwrite and out.exists():  # whole or absent
                assert contents(out) == wanted
        ss.pack_checkpoint(source, out, options, ss.Run(resume=True, overwrite=overwrite))
        assert contents(out) == wanted
        assert sorted(os.listdir(tmp_path)) == here
    assert kills > 10


def test_what_was_moved_aside_comes_back(source: Path) -> None:
    """Killed between the two renames that replace an output."""
    pack(source)
    wanted, other = contents(source.with_name("out")), ss.Options(scheme="INT8_W8A8")
    assert killed(lambda: pack(source, other, overwrite=True), 2, names=["rename"])
    assert not source.with_name("out").exists()
    with pytest.raises(ss.OperandError, match="other options or another source"):
        pack(source, ss.Options(scheme="FP16"), resume=True)
    assert contents(source.with_name("out")) == wanted


def test_a_resumed_run_makes_again_only_what_is_missing(
    source: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source, 150)
    kept = len((source.parent / "out.journal").read_bytes().splitlines()) - 1
    assert kept > 20
    made: list[Any] = []
    real = write._write
    monkeypatch.setattr(write, "_write", lambda *args: (made.append(args), real(*args))[1])
    assert pack(source, resume=True).resumed
    first = len(made)
    shutil.rmtree(source.parent / "out")
    pack(source)
    assert first == len(made) - first - kept


def lose_writes(out: Path) -> None:
    """A disk that lost its last writes."""
    path = out.with_name("out.partial") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3000:], data[9000] = bytes(3000), data[9000] ^ 0xFF
    path.write_bytes(data)


def plant_files(out: Path) -> None:
    partial = out.with_name("out.partial")
    (partial / "junk").write_text("x")
    (partial / "tokenizer.json").symlink_to(out.with_name("victim"))
    (partial / "1_Pooling").symlink_to(out.parent)


def add_lines(out: Path) -> None:
    """Lines that make no sense."""
    units = [("a", None, None), ([], [], 0), ("a", [[1]], 0), ("model.safetensors/0/0-1", [], 0), ("b", [["x", 1, 2]], "0")]
    lines = ["[]", "5", "null", *(json.dumps(dict(zip(("unit", "spans", "crc"), unit, strict=True))) for unit in units)]
    with out.with_name("out.journal").open("a") as file:
        file.write("\n".join([*lines, '{"unit": "torn']))


@pytest.mark.parametrize("meddle", [lose_writes, plant_files, add_lines], ids=lambda f: f.__name__)
def test_what_the_journal_does_not_vouch_for_is_made_again(
    source: Path, small_units: None, meddle: Callable[[Path], None]
) -> None:
    (source.parent / "victim").write_text("precious")
    interrupt(source, 100)
    meddle(source.parent / "out")
    finished(source, resume=True)
    assert (source.parent / "victim").read_text() == "precious"


def test_resume_refuses_other_options_and_another_source(source: Path, small_units: None) -> None:
    interrupt(source, 100)
    refused(source, "unfinished run .* continue it with --resume, or start over with --overwrite")
    refused(source, "other options or another source", ss.Options(scheme="INT8_W8A8"), resume=True)
    models.folder(source, models.tensors(layers=1, seed=5))
    refused(source, "other options or another source", resume=True)
    finished(source, resume=True, overwrite=True)


@pytest.mark.parametrize("existing", [False, True])
def test_two_runs_do_not_write_the_same_output(source: Path, existing: bool) -> None:
    if existing:
        pack(source)
    seen = []

    def progress(phase: str, done: int, total: int) -> None:
        if not seen:
            seen.append(phase)
            for flags in ({"resume": True}, START_OVER, *([] if existing else [{}])):
                with pytest.raises(ss.OperandError, match="another run is writing"):
                    pack(source, **flags)

    finished(source, progress=progress, overwrite=existing)
    assert seen == ["packing"]


JOURNALS = ("my diary\n", "my diary", "[]\n", '{"unit": 1}\n', "[" * 100_000)


def test_what_merely_has_our_names_is_not_touched(source: Path) -> None:
    victim = source.parent / "victim"
    victim.mkdir()
    for name in ("out.partial", "out.replaced", "out.journal"):
        path = source.with_name(name)
        for make in (lambda p: p.mkdir(), lambda p: p.symlink_to(victim), os.mkfifo):
            make(path)
            if path.is_dir() and not path.is_symlink():
                (path / "thesis.txt").write_text("years")
            for flags in ({}, {"resume": True}, START_OVER):
                with pytest.raises(ss.OperandError, match="stands in the way"):
                    pack(source, **flags)
            if path.is_symlink() or path.is_fifo():
                path.unlink()
            else:
                assert (path / "thesis.txt").read_text() == "years"
                shutil.rmtree(path)
    assert not any(victim.iterdir())
    for text in JOURNALS:
        source.with_name("out.journal").write_text(text)
        for flags in ({}, {"resume": True}, START_OVER):
            refused(source, "stands in the way", **flags)


@pytest.mark.parametrize(
    ("path", "out", "overwrite"),
    [("", "out", False), ("", "out", True), ("model.safetensors", "o.safetensors", False)],
)
def test_an_output_that_appears_meanwhile_is_not_replaced(source: Path, path: str, out: str, overwrite: bool) -> None:
    target = source.with_name(out)
    thesis = target / "thesis.txt" if out == "out" else target

    def appear(phase: str, done: int, total: int) -> None:
        thesis.parent.mkdir(exist_ok=True)
        thesis.write_text("years")

    with pytest.raises(ss.OperandError, match=r"has appeared meanwhile|not a checkpoint that this tool wrote"):
        ss.pack_checkpoint(source / path, target, None, ss.Run(progress=appear, overwrite=overwrite))
    assert thesis.read_text() == "years"


@pytest.mark.parametrize(
    ("where", "name", "told"),
    [
        ("in", "tokenizer.json", "tokenizer.json is not the source's"),
        ("in", "config.json", "config.json is not what these options make"),
        ("in", "new.txt", "new.txt is missing"),
        ("out", "1_Pooling/config.json", "1_Pooling/config.json is not the source's"),
        ("out", "config.json", "config.json is not what these options make"),
        ("out", "model.safetensors.index.json", "model.safetensors.index.json"),
        ("out", "1_Pooling/more.txt", "1_Pooling/more.txt is not in the source"),
    ],
)
def test_a_complete_output_is_compared_file_by_file(source: Path, where: str, name: str, told: str) -> None:
    options = ss.Options(max_shard_size=20_000)
    pack(source, options)
    assert pack(source, options, resume=True).already_complete
    path = source.with_name(where) / name
    text = path.read_text() if path.exists() else ""
    path.write_text(text.replace("{", '{"_": 1, ', 1) if path.name == "config.json" else f"{text} ")
    refused(source, rf"{told}.*--overwrite replaces it, or name another place", options, resume=True)
    pack(source, options, overwrite=True)
    assert pack(source, options, resume=True).verified


@pytest.mark.parametrize("flags", [{"resume": True}, START_OVER])
def test_a_journal_cut_in_its_first_line_blocks_nothing(source: Path, small_units: None, flags: dict[str, bool]) -> None:
    journal, thesis = source.with_name("out.journal"), source.with_name("out.partial") / "thesis.txt"
    for cut in (0, 5, 60, -7):
        interrupt(source, 100)
        line = journal.read_bytes().split(b"\n")[0]
        journal.write_bytes(line[:cut] if cut >= 0 else line[:9] + bytes(99))
        thesis.write_text("years")
        refused(source, "stands in the way", **flags)
        thesis.unlink()
        finished(source, **flags)
        shutil.rmtree(source.with_name("out"))


def test_a_journal_that_is_removed_before_it_is_locked_is_made_anew(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = staging.fcntl.flock, []

    def flock(file: object, how: int) -> None:
        opened.append(file)
        if len(opened) == 1:
            source.with_name("out.journal").unlink()  # the run that held it ends just now
        real(file, how)

    with monkeypatch.context() as patched:
        patched.setattr(staging.fcntl, "flock", flock)
        pack(source)
    assert len(opened) == 2
    assert sorted(os.listdir(source.parent)) == ["in", "out"]


def test_a_full_disk_names_the_file_and_keeps_the_work(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("tokenizer.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(OSError, match=r"No space left.*--resume continues.*out\.partial/tokenizer\.json"):
            pack(source)
    assert not source.with_name("out").exists()
    assert pack(source, resume=True).resumed
    assert sorted(os.listdir(source.parent)) == ["in", "out"]


def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(source: Path) -> None:
    with failing(1, lasting=True), pytest.raises(OSError, match="No space left"):
        pack(source)
    finished(source, resume=True)


@pytest.mark.parametrize("out", ["/proc/out", "/proc/self/mem/x"])
def test_a_place_that_cannot_be_written_is_named(source: Path, out: str) -> None:
    with pytest.raises(OSError, match=r"cannot be written \(.*\); name another place: '/proc/"):
        ss.pack_checkpoint(source, out, ss.Options())
