"""The commands as a user runs them: output, exit codes, nothing left behind after an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
from commands import slidesparse

from tools.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.folder(tmp_path / "in")


def test_pack_show_verify_unpack(source: Path, tmp_path: Path) -> None:
    packed = slidesparse(
        "pack", source, "-o", tmp_path / "out", "--scheme", "int8_w8a8", "-v", "--report", tmp_path / "report.json"
    )
    assert packed.exit_code == 0, packed.output
    assert "14 modules" in packed.stdout
    assert "6:8 (2 zeros in 8)" in packed.stdout
    assert "million weights a second" in packed.stdout
    assert "verified" in packed.stdout
    assert "model.layers.1.mlp.down_proj" in packed.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["modules"]) == 14
    assert report["verified"] is True
    shown = slidesparse("show", tmp_path / "out")
    assert shown.stdout.count("packed 6:8") == 14
    assert "14 packed modules" in shown.stdout
    assert "14 modules" in slidesparse("show", tmp_path / "out", "--verify").stdout
    proof = slidesparse("show", tmp_path / "out", "--verify", source)
    assert proof.exit_code == 0
    assert "every stored weight is its source's" in proof.stdout
    assert slidesparse("show", tmp_path / "out", "--unpack", tmp_path / "dense").exit_code == 0
    assert "6:8" in slidesparse("show", tmp_path / "dense").stdout
    assert json.loads(slidesparse("show", tmp_path / "out", "--json", "-q").stdout)["modules"][0]["packed"] == "6:8"


def test_zeros_and_group_name_the_same_pattern(source: Path, tmp_path: Path) -> None:
    for out, more in (("a", ()), ("b", ("--zeros", 2, "--group", 8))):
        result = slidesparse("pack", source, "-o", tmp_path / out, "-q", *more)
        assert (result.exit_code, result.output) == (0, "")  # quiet
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_json_is_all_that_stands_on_stdout(source: Path, tmp_path: Path) -> None:
    plan = slidesparse("pack", source, "-o", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(plan.stdout)["dry_run"] is True
    assert not (tmp_path / "out").exists()
    assert "dry run" in slidesparse("pack", source, "--dry-run").stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--pattern", "2:8"), 2, "is 6:8 here"),
        (("--zeros", "2"), 2, "go together"),
        (("--zeros", "2", "--group", "8", "--pattern", "6:8"), 2, "not both"),
        (("--scheme", "INT4"), 2, "INT4"),
        (("--targets", "q_proj"), 2, "matches no"),
        (("--max-memory", "lots"), 2, "not a size"),
        (("--max-memory", "1MB"), 2, "too few"),
        (("--pattern", "2:4"), 3, "break 2:4 (2 zeros in 4)"),
    ],
)
def test_usage_and_pattern_errors(source: Path, tmp_path: Path, args: tuple[str, ...], code: int, says: str) -> None:
    result = slidesparse("pack", source, "-o", tmp_path / "out", *args)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_other_exit_codes(source: Path, tmp_path: Path) -> None:
    assert slidesparse("pack", tmp_path / "absent").exit_code == 2
    (tmp_path / "torn.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-7])
    assert slidesparse("pack", tmp_path / "torn.safetensors").exit_code == 5
    models.folder(tmp_path / "gptq", config={"quantization_config": {"quant_method": "gptq"}})
    assert slidesparse("pack", tmp_path / "gptq").exit_code == 5
    assert slidesparse("pack", source, "-o", tmp_path / "out", "-q").exit_code == 0
    assert slidesparse("pack", source, "-o", tmp_path / "out", "-q").exit_code == 2
    assert slidesparse("pack", source, "-o", tmp_path / "out", "-q", "--resume").exit_code == 0
    models.folder(tmp_path / "other", models.tensors(seed=1))
    assert slidesparse("show", tmp_path / "out", "--verify", tmp_path / "other").exit_code == 4
    assert slidesparse("show", tmp_path / "out", "--verify", tmp_path / "absent").exit_code == 2
    result = slidesparse("pack", source, "-o", "/proc/none/out")
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_every_command_says_what_it_does() -> None:
    for name in COMMANDS:
        result = slidesparse(name, "--help")
        assert result.exit_code == 0, result.output
        assert "Usage" in result.stdout
        assert slidesparse(name, "-h").stdout == result.stdout
    assert slidesparse("-h").exit_code == 0


def test_dry_run_fails_as_the_run_would(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", models.tensors(prune=None))
    result = slidesparse("pack", source, "--dry-run")
    assert result.exit_code == 3
    assert "dry run: a run would fail, and write nothing" in result.stdout
    assert "14 of 14 modules would be refused" in result.stderr


def test_interrupted_work_says_how_to_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("slidesparse_nb.convert.run.write_layout", stop)
        result = slidesparse("pack", source, "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "--resume continues" in result.stderr
    assert slidesparse("pack", source, "-o", tmp_path / "out", "--resume").exit_code == 0


def test_a_reader_that_has_seen_enough_is_no_error(source: Path) -> None:
    line = f"{sys.executable} {ROOT}/tools/pack.py {source} --dry-run -v | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert "rror" not in done.stderr


def test_report_and_flags_are_checked_before_the_work(source: Path, tmp_path: Path) -> None:
    """A report never lands on something else."""
    weights, notes = source / "model.safetensors", tmp_path / "notes.txt"
    before = weights.read_bytes()
    notes.write_text("mine")
    for place in (tmp_path / "none" / "r.json", weights, notes):
        assert slidesparse("pack", source, "-o", tmp_path / "out", "--report", place, "--overwrite").exit_code == 2
    assert not (tmp_path / "out").exists()
    assert (weights.read_bytes(), notes.read_text()) == (before, "mine")
    assert slidesparse("show", source, "--overwrite").exit_code == 2


def test_names_are_printed_as_they_are_but_for_control_characters(tmp_path: Path) -> None:
    names = ("blocks[0].fc[red]x.weight", "z\x1b]0;owned\x07.weight")
    file = models.write(tmp_path / "m.safetensors", {name: np.zeros((8, 16), np.float32) for name in names})
    shown = slidesparse("pack", file, "--dry-run").stdout
    assert "blocks[0].fc[red]x" in shown
    assert "\x1b" not in shown
    assert "z\\x1b]0;owned" in shown


def test_eval_without_pytorch(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "slidesparse_nb.integrations.perplexity", raising=False)
    (tmp_path / "text").write_text("a text")
    result = slidesparse("eval", source, "--text", tmp_path / "text")
    assert result.exit_code == 5
    assert "pip install 'slidesparse_nb[transformers]'" in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_scripts_run_from_any_folder_of_a_checkout(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py", "-h"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {name}.py")
    assert "Exit codes" in done.stdout


def test_memory_stays_below_the_limit_and_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """600 MB of weights in 12 tensors through a process limited to 512 MiB plus the largest tensor."""
    w = np.zeros((5000, 5000), models.BF16)
    w[:, ::4] = 1
    models.write(tmp_path / "big.safetensors", {f"layers.{i}.weight": w for i in range(12)})
    program = (
        "import re, sys, slidesparse_nb as ss\n"
        "ss.pack_checkpoint(sys.argv[1], None, ss.Options(scheme='INT8_W8A8'), ss.Run(max_memory=2**29))\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "big.safetensors"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**29 + w.nbytes
