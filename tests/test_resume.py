"""Kill a conversion at any system call that changes something, continue it, and get the same bytes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest

import slidesparse_nb as ss
from slidesparse_nb.convert import write as streaming

CHANGES = ("pwrite", "write", "rename", "replace", "unlink", "mkdir", "ftruncate", "rmdir")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work finely, so that there is much to interrupt."""
    monkeypatch.setattr("slidesparse_nb.convert.run.UNIT_BYTES", 1024)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(call: int, torn: bool) -> None:
    """In this process: die at the call-th system call that changes something, before it or (a write) half way through it."""
    left = call

    def deadly(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                if torn and name in ("pwrite", "write"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])  # type: ignore[arg-type, call-overload]
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, wrapped)

    for name in CHANGES:
        deadly(name)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_anywhere_and_resume(tmp_path: Path, small_units: None, single: bool, overwrite: bool) -> None:
    parts = models.tensors(layers=1)
    if single:
        source, name = models.write(tmp_path / "in.safetensors", parts), "out.safetensors"
    else:
        source, name = models.folder(tmp_path / "in", parts), "out"
    shards = None if single else 20_000
    options = ss.Options(scheme="INT8_W8A8", max_shard_size=shards)
    out = tmp_path / name
    ss.pack_checkpoint(source, out, options)
    wanted = out.read_bytes() if single else contents(out)
    here = sorted(p.name for p in tmp_path.iterdir())
    rng = random.Random(f"{single}{overwrite}")
    kills = 0
    for trial in range(20):
        if overwrite:
            ss.pack_checkpoint(source, out, ss.Options(scheme="BF16", max_shard_size=shards), ss.Run(overwrite=True))
        elif single:
            out.unlink()
        else:
            shutil.rmtree(out)
        flags = {"resume": False, "overwrite": overwrite}
        for _ in range(rng.randint(1, 3)):  # killed once, or again while it resumes
            call, torn = rng.randint(1, 260), rng.random() < 0.5

            def work(call: int = call, torn: bool = torn, flags: dict[str, bool] = flags) -> None:
                kill_at(call, torn)
                ss.pack_checkpoint(source, out, options, ss.Run(max_workers=2, verify=False, **flags))

            killed = in_child(work)
            kills += killed == signal.SIGKILL
            if not killed:
                break
            flags = {"resume": True, "overwrite": overwrite}
            if not overwrite and out.exists():  # whole or absent
                assert (out.read_bytes() if single else contents(out)) == wanted
        if flags["resume"] or trial == 0:
            flags["resume"] = True
            ss.pack_checkpoint(source, out, options, ss.Run(**flags))
        assert (out.read_bytes() if single else contents(out)) == wanted
        assert sorted(p.name for p in tmp_path.iterdir()) == here
    assert kills > 10


def test_a_resumed_run_makes_again_only_what_is_missing(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models.folder(tmp_path / "in")
    options = ss.Options(scheme="INT8_W8A8")
    assert in_child(lambda: (kill_at(150, False), ss.pack_checkpoint(source, tmp_path / "out", options))) == signal.SIGKILL
    journal = (tmp_path / "out.journal").read_bytes().splitlines()
    finished = len(journal) - 1
    assert finished > 20
    made = []
    real = streaming._write
    monkeypatch.setattr(streaming, "_write", lambda *args: (made.append(args[2:]), real(*args))[1])
    ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(resume=True))
    first = len(made)
    shutil.rmtree(tmp_path / "out")
    made.clear()
    ss.pack_checkpoint(source, tmp_path / "out", options)
    assert first == len(made) - finished


def test_bytes_that_changed_since_they_were_noted_are_made_again(tmp_path: Path, small_units: None) -> None:
    source = models.folder(tmp_path / "in")
    options = ss.Options(scheme="INT8_W8A8")
    ss.pack_checkpoint(source, tmp_path / "whole", options)
    assert in_child(lambda: (kill_at(250, False), ss.pack_checkpoint(source, tmp_path / "out", options))) == signal.SIGKILL
    partial = tmp_path / "out.partial" / "model.safetensors"
    data = bytearray(partial.read_bytes())
    data[-3000:] = bytes(3000)  # a disk that lost its last writes
    data[9000] ^= 0xFF
    partial.write_bytes(data)
    ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resume_refuses_other_options_and_another_source(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    assert in_child(lambda: (kill_at(60, False), ss.pack_checkpoint(source, tmp_path / "out"))) == signal.SIGKILL
    with pytest.raises(ss.OperandError, match="other options or another source"):
        ss.pack_checkpoint(source, tmp_path / "out", ss.Options(scheme="INT8_W8A8"), ss.Run(resume=True))
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ss.OperandError, match="other options or another source"):
        ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(resume=True))
    ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(resume=True, overwrite=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_two_runs_do_not_write_the_same_output(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    seen = []

    def progress(phase: str, done: int, total: int) -> None:
        if not seen:
            seen.append(phase)
            for flags in ({"resume": True}, {"overwrite": True}, {}):
                with pytest.raises(ss.OperandError, match="another run is writing"):
                    ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(**flags))

    ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(progress=progress))
    assert seen == ["packing"]


def test_planted_links_beside_the_output_are_refused(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("out.partial", "out.journal"):
        (tmp_path / name).symlink_to(victim)
        with pytest.raises(ss.OperandError, match="stands in the way"):
            ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(overwrite=True))
        (tmp_path / name).unlink()
    assert not any(victim.iterdir())


def test_what_merely_has_our_names_is_not_touched(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years")
        for run in (ss.Run(), ss.Run(resume=True), ss.Run(overwrite=True)):
            with pytest.raises(ss.OperandError, match="stands in the way"):
                ss.pack_checkpoint(source, tmp_path / "out", None, run)
        assert (tmp_path / name / "thesis.txt").read_text() == "years"
        shutil.rmtree(tmp_path / name)
    for text in ("my diary\n", "my diary", "[]\n", '{"unit": 1}\n', "[" * 100_000):
        (tmp_path / "out.journal").write_text(text)
        for run in (ss.Run(), ss.Run(resume=True), ss.Run(overwrite=True)):
            with pytest.raises(ss.OperandError):
                ss.pack_checkpoint(source, tmp_path / "out", None, run)
        assert (tmp_path / "out.journal").read_text() == text
    (tmp_path / "out.journal").unlink()
    os.mkfifo(tmp_path / "out.partial")
    with pytest.raises(ss.OperandError, match="stands in the way"):
        ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(overwrite=True))


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")

    def appear(phase: str, done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("years")

    for run in (ss.Run(progress=appear), ss.Run(progress=appear, overwrite=True)):
        with pytest.raises(ss.OperandError, match=r"has appeared meanwhile|not a checkpoint that this tool wrote"):
            ss.pack_checkpoint(source, tmp_path / "out", None, run)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "years"
    file = models.write(tmp_path / "m.safetensors", models.tensors(layers=1))
    with pytest.raises(ss.OperandError, match="has appeared meanwhile"):
        ss.pack_checkpoint(
            file, tmp_path / "o.safetensors", None, ss.Run(progress=lambda *_: (tmp_path / "o.safetensors").write_text("x"))
        )
    assert (tmp_path / "o.safetensors").read_text() == "x"


def test_resume_does_not_disturb_a_run_at_work(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    ss.pack_checkpoint(source, tmp_path / "out")
    wanted = contents(tmp_path / "out")

    def meddle(phase: str, done: int, total: int) -> None:
        if phase == "packing":
            with pytest.raises(ss.OperandError, match="another run is writing"):
                ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(resume=True))

    ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(overwrite=True, progress=meddle))
    assert contents(tmp_path / "out") == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_resumed_output_holds_nothing_else(tmp_path: Path, small_units: None) -> None:
    source = models.folder(tmp_path / "in")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    assert in_child(lambda: (kill_at(100, False), ss.pack_checkpoint(source, tmp_path / "out"))) == signal.SIGKILL
    (tmp_path / "out.partial" / "junk").write_text("x")
    (tmp_path / "out.partial" / "tokenizer.json").symlink_to(victim)
    (tmp_path / "out.partial" / "1_Pooling").symlink_to(tmp_path)
    ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(resume=True))
    ss.pack_checkpoint(source, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert victim.read_text() == "precious"


def test_lines_of_a_journal_that_make_no_sense_are_passed_over(tmp_path: Path, small_units: None) -> None:
    source = models.folder(tmp_path / "in")
    assert in_child(lambda: (kill_at(100, False), ss.pack_checkpoint(source, tmp_path / "out"))) == signal.SIGKILL
    with (tmp_path / "out.journal").open("a") as file:
        file.write('[]\n5\nnull\n{"unit": "a"}\n{"unit": [], "spans": [], "crc": 0}\n{"unit": "a", "spans": [[1]], "crc": 0}\n')
        file.write(
            '{"unit": "model.safetensors/0/0-1", "spans": [], "crc": 0}\n{"unit": "b", "spans": [["x", 1, 2]], "crc": "0"}\n'
        )
    ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(resume=True))
    ss.pack_checkpoint(source, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("where", "name", "told"),
    [
        ("in", "tokenizer.json", "tokenizer.json is not the source's"),
        ("in", "config.json", "config.json is not what these options make"),
        ("in", "1_Pooling/config.json", "1_Pooling/config.json is not the source's"),
        ("in", "new.txt", "new.txt is missing"),
        ("out", "tokenizer.json", "tokenizer.json is not the source's"),
        ("out", "config.json", "config.json is not what these options make"),
        ("out", "model.safetensors.index.json", "model.safetensors.index.json"),
        ("out", "1_Pooling/more.txt", "1_Pooling/more.txt is not in the source"),
    ],
)
def test_a_complete_output_is_compared_file_by_file(tmp_path: Path, where: str, name: str, told: str) -> None:
    source = models.folder(tmp_path / "in")
    options = ss.Options(max_shard_size=20_000)
    ss.pack_checkpoint(source, tmp_path / "out", options)
    assert ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(resume=True)).already_complete
    path = tmp_path / where / name
    text = path.read_text() if path.exists() else ""
    path.write_text(text.replace("{", '{"_": 1, ', 1) if name.endswith("config.json") else f"{text} ")
    before = contents(tmp_path)
    with pytest.raises(ss.OperandError, match="--overwrite replaces it, or name another place") as caught:
        ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(resume=True))
    assert told in str(caught.value)
    assert contents(tmp_path) == before
    ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(overwrite=True))
    assert ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(resume=True)).verified


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_a_journal_cut_in_its_first_line_blocks_nothing(tmp_path: Path, small_units: None, flags: dict[str, bool]) -> None:
    source = models.folder(tmp_path / "in")
    ss.pack_checkpoint(source, tmp_path / "whole")
    journal = tmp_path / "out.journal"
    for cut in (0, 1, 5, 30, 60, -7):
        assert in_child(lambda: (kill_at(100, False), ss.pack_checkpoint(source, tmp_path / "out"))) == signal.SIGKILL
        line = journal.read_bytes().split(b"\n")[0]
        journal.write_bytes(line[:cut] if cut >= 0 else line[:9] + bytes(99))
        (tmp_path / "out.partial" / "thesis.txt").write_text("years")
        with pytest.raises(ss.OperandError, match="stands in the way"):
            ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(**flags))
        assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years"
        (tmp_path / "out.partial" / "thesis.txt").unlink()
        ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(**flags))
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert sorted(os.listdir(tmp_path)) == ["in", "out", "whole"]
        shutil.rmtree(tmp_path / "out")


def test_a_journal_that_is_removed_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.folder(tmp_path / "in")
    journal, real, opened = tmp_path / "out.journal", streaming.fcntl.flock, []

    def flock(file: object, how: int) -> None:
        opened.append(file)
        if len(opened) == 1:
            journal.unlink()  # the run that held it ends just now
        real(file, how)

    monkeypatch.setattr(streaming.fcntl, "flock", flock)
    ss.pack_checkpoint(source, tmp_path / "out")
    assert len(opened) == 2
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_full_disk_names_the_file_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.folder(tmp_path / "in")
    real, full = os.write, OSError(errno.ENOSPC, "No space left on device")

    def write(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("tokenizer.json"):
            raise full
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(OSError, match=r"No space left.*--resume continues.*out\.partial/tokenizer\.json"):
            ss.pack_checkpoint(source, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"No space left.*f\.safetensors"):
            ss.save(tmp_path / "f.safetensors", {"x": np.ones(1)})
    ss.pack_checkpoint(source, tmp_path / "out", None, ss.Run(resume=True))
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize("out", ["/proc/out", "/proc/self/mem/x"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, out: str) -> None:
    source = models.folder(tmp_path / "in")
    with pytest.raises(OSError, match=r"cannot be written \(.*\); name another place: '/proc/"):
        ss.pack_checkpoint(source, out, ss.Options())
