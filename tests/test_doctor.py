"""slidesparse doctor, on machines that lack things: one clear line each, never a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from slidesparse_nb import diagnosis
from slidesparse_nb.errors import UnsupportedError
from tools.cli import main


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No driver, no CuPy, a cache folder of its own."""

    def no_driver() -> None:
        raise UnsupportedError("no NVIDIA driver (libcuda.so.1) was found; install one, or use NumPy arrays")

    monkeypatch.setattr(diagnosis, "_library", no_driver)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path / "cache"))


def test_every_missing_part_has_its_line(bare: None) -> None:
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    lines = {line[5:25].strip(): line for line in done.stdout.splitlines()}
    assert lines["driver"].startswith("FAIL")
    assert "no NVIDIA driver" in lines["driver"]
    assert "computed on the CPU" in lines["device"]
    assert "install slidesparse_nb[cuda13]" in lines["CuPy"]
    assert lines["CPU"].startswith("ok")
    assert "equal the reference" in lines["CPU"]
    assert lines["cache"].startswith("ok")
    assert lines["matmul int8"].endswith("not checked: there is no device")
    assert "Traceback" not in done.output


def test_json(bare: None) -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    findings = {finding["part"]: finding for finding in json.loads(done.stdout)}
    assert findings["CPU"]["ok"]
    assert not findings["CuPy"]["ok"]
    assert done.exit_code == 1


def test_a_wrong_result_is_found(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = diagnosis.ops.matmul
    monkeypatch.setattr(diagnosis.ops, "matmul", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    finding = next(f for f in diagnosis.diagnose() if f.part == "CPU")
    assert (finding.ok, finding.text) == (False, "ArithmeticError: products differ from the reference")


def test_a_cache_that_cannot_be_written(bare: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path / "file"))
    finding = next(f for f in diagnosis.diagnose() if f.part == "cache")
    assert not finding.ok
    assert "set SLIDESPARSE_CACHE_DIR to a folder that can" in finding.text
