"""slidesparse bench --engine: the parent and what it shows, on a stand-in for the engine's process; parts of that process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_device
import pytest
from bench_device import call

from tools.benchmark import cases, processes, serve, served, show
from tools.benchmark.engines import LOADS, STEPS, Load, Task
from tools.benchmark.results import Cell, load


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_device.stand_in(monkeypatch)
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, str(Path(__file__).with_name("bench_engine.py"))))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def run(path: Path, *args: object) -> tuple[Any, dict[tuple[Any, ...], Cell]]:
    done = call("--engine", "vllm", "--json", path, *args)
    assert done.exit_code == 0, (done.output, done.exception)
    return done, load(path).cells


def test_whole_models(tmp_path: Path) -> None:
    path, plot = tmp_path / "a.json", tmp_path / "a.png"
    done, found = run(path, "--plot", plot)
    assert len(found) == (3 + 2) * len(LOADS)
    cell = found["ours", "decode", "qwen2.5-7b", "64 x 128", "int8", "6:8", 64, "vllm"]
    assert (cell.us, cell.gpu_us, cell.spread, cell.bytes, cell.blank) == (2000, 1000, 0.24, 3 << 30, None)
    assert found["ours", "prefill", "qwen2.5-7b", "8 x 2048", "int8", "6:8", 16384, "vllm"].gpu_us is None
    results = load(path)
    assert results.complete
    assert results.machine["vllm"] == "1.2.3"
    ms, busy, tokens, fp8, fp8_busy, *_, memory = served.tables(results)
    assert ms[0].startswith("qwen2.5-7b in vLLM: milliseconds of a prefill")
    assert (ms[1][1], ms[1][-1]) == ("prefill 8 x 2048", "decode 256 x 128")
    assert ms[2][:2] == [["vLLM FP8", *["4.50"] * 7], ["FP8 6:8", *["3.00"] * 7]]
    assert (busy[2][2], tokens[2][2][1]) == (["INT8 6:8", "", *["1.00"] * 6], f"{8 * 2048 / 2e-3:.0f}")
    assert fp8[2] == [["FP8 6:8", *["1.50"] * 7], ["INT8 6:8", *["2.25"] * 7], ["BF16 6:8", *["0.75"] * 7]]
    assert (memory[1][:2], memory[2]) == (["vLLM FP8", "FP8 6:8"], [["3.00"] * 5])
    assert fp8_busy[2][1] == ["INT8 6:8", "", *["4.50"] * 6]
    assert "qwen2.5-7b in vLLM, INT8 6:8: prefill 8 x 2048 2.00 ms" in done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert call("--from", path).stdout == done.stdout
    for old, new in (('"ours"', '"dense"'), ('"load": "vllm"', '"load": "tgi"'), ('"bytes": ', '"bytes": [], "b": ')):
        (tmp_path / "b.json").write_text(path.read_text().replace(old, new))
        assert call("--from", tmp_path / "b.json").exit_code == 5
    text = show.section(results)
    assert "**qwen2.5-7b in vLLM: times as fast as vLLM FP8**:" in text
    assert "| FP8 6:8 | 1.50 |" in text
    assert f"]({show.PUBLISHED[1]})" in text


def test_what_fails_is_a_blank_and_costs_no_other(tmp_path: Path) -> None:
    done, found = run(tmp_path / "a.json", "--model", "llama3.2-1b,llama3.2-3b", "--dtype", "bf16")
    killed = [cell for cell in found.values() if cell.suite == "llama3.2-1b" and cell.type == "bf16"]
    assert [cell.us is None for cell in killed] == [False] * 3 + [True] * 4 + [False] * 3 + [True] * 4
    assert {cell.blank for cell in killed if not cell.us} == {"its process ended with -9: last words"}
    full = found["ours", "prefill", "llama3.2-3b", "8 x 2048", "bf16", "6:8", 16384, "vllm"]
    assert (full.us, full.blank) == (None, "OutOfMemoryError: of 1 GB")
    assert found["ours", "decode", "llama3.2-3b", "8 x 128", "bf16", "6:8", 8, "vllm"].us == 6000
    assert "1 blank of ours (this library): OutOfMemoryError: of 1 GB" in done.stdout
    assert load(tmp_path / "a.json").complete
    _, found = run(tmp_path / "b.json", "--engine", "transformers", "--dtype", "bf16")
    blanks = {cell.type: cell.blank for cell in found.values() if cell.provider != "ours"}
    assert blanks["bf16"] is None
    assert "need more packages" in str(blanks["fp8"])


def test_the_budget_ends_a_process_and_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of simulated time is spent once the process has written half a line."""
    now = 0.0

    class Process(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            nonlocal now
            if timeout is not None and "int8" in self.args[-3]:
                while "half" not in Path(self.args[-1]).read_text():
                    time.sleep(0.01)
                now = 5.0
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.setattr(processes, "time", SimpleNamespace(perf_counter=lambda: now))
    done, found = run(tmp_path / "a.json", "--model", "llama3.2-1b", "--dtype", "int8", "--budget", "4", "--rounds", "2")
    ours = [cell for cell in found.values() if cell.provider == "ours"]
    assert [cell.us for cell in ours] == [2000] * 5 + [None] * 2
    spent = "not measured: the budget of 4 s was spent"
    assert {cell.blank for cell in found.values() if not cell.us} == {spent}
    assert [cell.us for cell in found.values() if cell.type == "bf16"] == [None] * len(LOADS)
    assert not load(tmp_path / "a.json").complete
    assert "not everything was measured" in done.stdout


def test_rounds_are_measured_in_turn(tmp_path: Path) -> None:
    done, found = run(tmp_path / "a.json", "--dtype", "int8", "--rounds", "2")
    lines = [line.partition("] ")[2].partition(": ")[0] for line in done.stderr.splitlines()]
    assert lines == [f"qwen2.5-7b in vLLM, {of}, round {i}" for i in (1, 2) for of in ("vLLM FP8", "INT8 6:8", "vLLM BF16")]
    assert found["ours", "decode", "qwen2.5-7b", "1 x 128", "int8", "6:8", 1, "vllm"].us == 1500  # of 0.9 1.0 1.2 1.8 2.0 2.4


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("--engine", "tgi"), 2, "'tgi' is not one of vllm, transformers"),
        (("--engine", "vllm", "-m", "16"), 2, "--engine measures whole models"),
        (("--engine", "vllm", "--model", "bitnet-2b"), 2, "'bitnet-2b' is not measured in an engine"),
        (("--engine", "vllm", "--dtype", "fp16"), 2, "'fp16' is not measured in an engine"),
        (("--rounds", "2"), 2, "--rounds goes with --engine"),
    ],
)
def test_refusals(args: tuple[str, ...], code: int, text: str) -> None:
    done = call(*args)
    assert (done.exit_code, text in " ".join(done.stderr.replace("│", " ").split())) == (code, True), done.stderr


def test_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = call("--engine", "transformers")
    assert done.exit_code == 5
    assert done.stderr == "error: --engine: transformers is not installed; pip install 'slidesparse_nb[transformers]'\n"


# ---- the engine's process --------------------------------------------------------------------------------------------


def test_time_of_a_step_is_without_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def generate(outputs: int) -> None:
        nonlocal now
        now += 0.100 + 0.002 * (outputs - 1)

    monkeypatch.setattr(serve.time, "perf_counter", lambda: now)
    assert serve.timed(generate, Load("prefill", 8, 2048)) == pytest.approx([100.0] * serve.PREFILLS)
    assert serve.timed(generate, Load("decode", 8, 128)) == pytest.approx([2.0] * serve.DECODES)
    assert STEPS > 1


def test_overlapping_kernels_count_once() -> None:
    assert serve.covered([(5, 9), (0, 4), (3, 6), (20, 21), (7, 8)]) == 10
    assert serve.covered([]) == 0


def test_the_models_configuration(tmp_path: Path) -> None:
    serve.write_config(Task("vllm", "llama3.2-1b", "ours", "int8", "6:8"), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"], config["tie_word_embeddings"]) == (2048, 8, True)
    assert config["quantization_config"]["quant_method"] == "slidesparse"
    serve.write_config(Task("vllm", "qwen2.5-14b", "vllm", "fp8", None), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architectures"], config["vocab_size"]) == (["Qwen2ForCausalLM"], 152064)
    assert "quantization_config" not in config
    assert set(cases.MODELS) == set(cases.GEOMETRIES)


def test_an_engine_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError):
        serve.main(json.dumps(Task("vllm", "qwen2.5-7b", "vllm", "fp8", None)), str(tmp_path / "m"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out").read_text())["failed"].startswith("ModuleNotFoundError: ")
