"""slidesparse doctor, and what needs a GPU, on machines that lack things: one clear line each, never a traceback."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import slidesparse
from lacking import LACKS, REASONS, Driver, take_away

import slidesparse_nb as ss
from slidesparse_nb import doctor
from slidesparse_nb.cuda import driver

pytestmark = pytest.mark.usefixtures("cache")


def states() -> dict[str, tuple[str, str]]:
    return {finding.part: (finding.state, finding.text) for finding in ss.diagnose()}


@pytest.mark.parametrize("part", LACKS)
def test_what_is_absent_is_no_failure(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_away(part, monkeypatch)
    done = slidesparse("doctor")
    assert done.exit_code == 0, done.output
    lines = {line[7:27].strip(): line for line in done.stdout.splitlines()[:-1]}
    assert done.stdout.splitlines()[-1] == "nothing is broken; NumPy arrays are computed on the CPU, and no GPU is used"
    assert "pack and matmul equal the reference" in lines["CPU"]
    for present in ("cache", "CPU", *LACKS[: LACKS.index(part)]):
        assert lines[present].startswith("ok")
    for lacking in LACKS[LACKS.index(part) :]:
        assert lines[lacking].startswith("absent")
    assert REASONS[part] in lines[part]
    assert ("pip install" in lines["CuPy"]) == (part == "CuPy")
    if part == "CuPy":
        assert lines["GPU"].endswith("H100, 80 GiB, compute capability 9.0: int8, float8_e4m3fn, bfloat16, float16, W4A8")
        assert "not computed on the GPU: that needs CuPy and Numba CUDA" in lines["products"]


def test_what_is_broken_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "library", lambda: Driver(1, error=999))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14", cuda=None))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path / "file"))
    right = doctor.ops.matmul
    monkeypatch.setattr(doctor.ops, "matmul", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    done = slidesparse("doctor", "--json")
    assert done.exit_code == 1
    found = {finding["part"]: (finding["state"], finding["text"]) for finding in json.loads(done.stdout)}
    assert found["driver"] == ("ok", "supports CUDA 12.4")
    assert found["GPU"][0] == "broken"
    assert "does not start (cuInit: error 999" in found["GPU"][1]
    assert found["CuPy"] == ("broken", "AttributeError: 'NoneType' object has no attribute 'runtime'")
    assert found["cache"][0] == "broken"
    assert "set SLIDESPARSE_CACHE_DIR to a folder that can" in found["cache"][1]
    assert found["CPU"] == ("broken", "ArithmeticError: products differ from the reference")


def test_a_gpu_without_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "gpus", lambda: [driver.Gpu("Tesla T4", (7, 5), 16 << 30)])
    take_away("CuPy", monkeypatch)
    found = states()
    assert found["GPU"][0] == "absent"
    assert "Tesla T4, 16 GiB, compute capability 7.5: has no sparse tensor cores" in found["GPU"][1]
    assert found["CuPy"] == ("absent", "not installed; only a GPU needs it")


def test_a_card_on_which_int8_is_faster_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "gpus", lambda: [driver.Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 << 30)])
    take_away("CuPy", monkeypatch)
    state, text = states()["GPU"]
    assert state == "ok"
    assert text.endswith("W4A8; prefer int8 there: NVIDIA states 2 times the rate of float8_e4m3fn (not measured by us)")


def test_a_compiler_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    numba_kernel: Any = importlib.import_module("slidesparse_nb.cuda.jit.numba")
    numba_kernel._versions.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvjitlink", None)
    state, text = states()["Numba CUDA"]
    assert state == "broken"
    assert text.startswith("Numba CUDA: a library of its compiler cannot be loaded (")
    assert text.endswith("install slidesparse_nb[cuda13] or slidesparse_nb[cuda12]")


class Elsewhere:
    """An array on a GPU."""

    dtype, shape, ndim = np.dtype(np.float32), (3, 32), 2

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


PACKED = ss.pack(np.zeros((8, 32), np.float32), "6:8", "int8")
NEEDS_A_GPU: dict[str, Callable[[], Any]] = {
    "to_device": lambda: ss.to_device(PACKED),
    "workspace_bytes": lambda: ss.workspace_bytes(3, PACKED, "float32"),
    "matmul": lambda: ss.matmul(Elsewhere(), PACKED),
    "quantize": lambda: ss.quantize(Elsewhere(), PACKED),
    "pack": lambda: ss.pack(Elsewhere()),
    "tune": lambda: ss.tune_products([(3, 8, 32, "6:8", "int8", "float32")]),
    "self_tests": lambda: list(ss.self_tests()),
}


@pytest.mark.parametrize("part", LACKS)
@pytest.mark.parametrize("name", NEEDS_A_GPU)
def test_functions_that_need_a_gpu_say_what_is_missing(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU no package is advised: it would not help."""
    for module in [module for module in sys.modules if module.startswith("slidesparse_nb.cuda.")]:
        if module.rpartition(".")[2] not in ("driver", "jit", "nvrtc", "tuned"):
            monkeypatch.delitem(sys.modules, module)
    take_away(part, monkeypatch)
    with pytest.raises(ss.UnsupportedError, match=f"^{name}: needs ") as raised:
        NEEDS_A_GPU[name]()
    assert REASONS[part] in str(raised.value)
    assert ("pip install" in str(raised.value)) == (part == "CuPy")


def test_kernels_are_compiled_ahead_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    take_away("driver", monkeypatch)
    assert ss.build_products([(3, 8, 32, "6:8", "int8", "float32")], (8, 0), 108) == 1
