"""slidesparse bench as a user runs it: without a GPU; and whole, on a stand-in for one whose times mean nothing."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_device
import numpy as np
import pytest
from bench_device import call
from lacking import LACKS, assert_refused, take_away

import slidesparse_nb as ss
from tools.benchmark import gpu, ours, run, selection
from tools.benchmark.results import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> bench_device.FakeGpu:
    return bench_device.stand_in(monkeypatch)


SMALL = ("--shape", "70,96", "--shape", "33,40", "-m", "1,40", "--pattern", "6:8,2:4")


# ---- machines that lack things ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", LACKS)
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    take_away(part, monkeypatch)
    assert_refused(call("--quick"), "bench", part)


def test_without_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "open_gpu", bench_device.FakeGpu)
    monkeypatch.setitem(sys.modules, "torch", None)
    done = call(*SMALL, "--dtype", "int8", "--peers", "dense,cusparselt", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "blank of dense" in done.stdout
    assert "PyTorch cannot be used (ModuleNotFoundError" in done.stdout
    results = load(tmp_path / "a.json")
    assert {cell.us is None for cell in results.cells.values() if cell.contender != "ours"} == {True}
    assert all(cell.us for cell in results.cells.values() if cell.contender == "ours")


# ---- the whole command -----------------------------------------------------------------------------------------------


def test_everything(device: bench_device.FakeGpu, tmp_path: Path) -> None:
    done = call(
        *SMALL, "--dtype", "fp8,int8,bf16,fp16", "--part", "gemm,linear,quantize,pack", "--peers", "dense,cusparselt,torch",
        "--sustained", "40", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "-v",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    results = load(tmp_path / "a.json")
    assert results.complete
    assert not results.wrong
    assert results.machine["after"]["sm_mhz"] == 345
    assert {cell.part for cell in results.cells.values()} == set(selection.PARTS)
    quantized = {c.type for c in results.cells.values() if c.part == "gemm" and c.contender == "ours" and c.us}
    assert quantized == set(selection.KINDS)
    assert all(cell.us for cell in results.cells.values()), "nothing is blank"
    sustained = [cell for cell in results.cells.values() if cell.load == "sustained" and cell.contender == "ours"]
    assert len(sustained) == 2 * 2 * 4
    assert all((cell.watts, cell.sm_mhz, cell.m, cell.layer) == (700.0, 1500.0, 40, "all") for cell in sustained)
    assert all(cell.mj == pytest.approx(700 * cell.us * 1e-3) for cell in sustained if cell.us)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "Imaginary GPU" in done.stdout
    assert "faster than" in done.stdout
    assert "70 x 96 gemm FP8 6:8 m=40 burst ours: 10.0 us, 1.30x dense" in done.stderr
    assert call("--from", tmp_path / "a.json", "-v").stdout == done.stdout


def test_a_wrong_kernel_has_no_time(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ss.matmul

    def wrong(x: Any, packed: Any, *, out: Any, workspace: Any) -> Any:
        right(x, packed, out=out)
        if packed.dtype.name == "float8_e4m3fn":
            out *= np.dtype("bfloat16").type(1.25)
        return out

    monkeypatch.setattr(ours.ss, "matmul", wrong)
    done = call(*SMALL, "--dtype", "fp8,int8", "--json", tmp_path / "a.json")
    assert done.exit_code == 4
    assert "error: 8 results are wrong and have no time, the first gemm fp8 6:8 shape m=1: wrong: " in done.stderr
    cells = [cell for cell in load(tmp_path / "a.json").cells.values() if cell.contender == "ours"]
    assert {(cell.type, cell.us is None, cell.wrong) for cell in cells} == {("fp8", True, True), ("int8", False, False)}


def test_a_graph_that_writes_nothing_has_no_time(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is right; the clock's launch does not run the calls, as if capture had lost them."""
    monkeypatch.setattr(device, "burst", lambda launch, meanwhile: [1.0] * 5)
    done = call("--shape", "64,64", "-m", "8", "--dtype", "int8", "--peers", "none")
    assert done.exit_code == 4
    assert "results were not written" in done.stderr


def test_a_failing_peer_is_a_named_blank(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = (selection.Linear("yes", 64, 64), selection.Linear("no", 32, 64))
    monkeypatch.setitem(selection.MODELS, "qwen2.5-7b", selection.Suite("qwen2.5-7b", layers))
    path = tmp_path / "a.json"
    done = call("--model", "qwen2.5-7b", "-m", "8", "--dtype", "int8", "--peers", "dense,cusparselt", "--json", path)
    assert done.exit_code == 0, done.output
    cells = {cell.layer: cell for cell in load(path).cells.values() if cell.contender == "cusparselt"}
    assert cells["yes"].us == 13
    assert cells["yes"].rows == 32
    assert cells["no"].us is None
    assert cells["no"].blank == "RuntimeError: CUSPARSE_STATUS_NOT_SUPPORTED when calling something"
    assert (
        "1 blank of cusparselt (cuSPARSELt): RuntimeError: CUSPARSE_STATUS_NOT_SUPPORTED when calling something" in done.stdout
    )
    assert load(path).us("cusparselt", "gemm", "qwen2.5-7b", "all", "int8", "6:8", 8, "burst") is None


def test_the_budget_ends_the_run_cleanly(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began = time.perf_counter()
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(time, "perf_counter", lambda: began + next(clock))
    done = call(*SMALL, "--dtype", "int8", "--budget", 60, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    results = load(tmp_path / "a.json")
    assert not results.complete
    blanks = [cell.blank for cell in results.cells.values() if cell.us is None]
    assert 0 < len(blanks) < len(results.cells)
    assert set(blanks) == {"not measured: the budget of 60 s was spent"}
    assert "not everything was measured" in done.stdout
    assert "  not measured" not in done.stdout  # no row for each, but a count
    assert "  not measured" in call("--from", tmp_path / "a.json", "-v").stdout


def test_searches_leave_time_for_sustained_load(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A product takes 4 s, a sustained one 2: cuSPARSELt's products, which come first, wait and are never begun."""
    began, elapsed = time.perf_counter(), 0.0

    def takes(seconds: float, name: str) -> None:
        def measure(*arguments: Any) -> Any:
            nonlocal elapsed
            elapsed += seconds
            return getattr(bench_device.FakeGpu, name)(device, *arguments)

        monkeypatch.setattr(device, name, measure)

    takes(4, "burst")
    takes(2, "sustained")
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: began + elapsed))
    done = call(
        "--shape", "64,64", "-m", "8,40", "--pattern", "6:8", "--dtype", "int8", "--peers", "dense,cusparselt",
        "--sustained", "40,8", "--budget", 25, "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    cells = list(load(tmp_path / "a.json").cells.values())
    sustained = [cell for cell in cells if cell.load == "sustained" and cell.contender != "cusparselt"]
    assert [cell.m for cell in sustained] == [40, 40, 8, 8]
    assert all(cell.us for cell in sustained)
    searched = [cell for cell in cells if cell.load == "burst" and cell.contender == "cusparselt"]
    assert [cell.m for cell in searched] == [8, 40]
    assert {cell.blank for cell in searched} == {"not measured: the budget of 25 s was spent"}
    assert cells.index(searched[-1]) > cells.index(sustained[-1])


def test_a_terminated_run_keeps_what_it_has(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def burst(launch: Any, meanwhile: Any) -> list[float]:
        if device.launches:
            signal.raise_signal(signal.SIGTERM)
        return bench_device.FakeGpu.burst(device, launch, meanwhile)

    monkeypatch.setattr(device, "burst", burst)
    before = signal.getsignal(signal.SIGTERM)
    done = call(*SMALL, "--dtype", "int8", "--peers", "none", "--json", tmp_path / "a.json")
    assert done.exit_code == 143
    assert [cell.us for cell in load(tmp_path / "a.json").cells.values()] == [10.0]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_lost_device_ends_the_run(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def burst(launch: Any, meanwhile: Any) -> list[float]:
        device.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(device, "burst", burst)
    done = call(*SMALL, "--dtype", "int8", "--peers", "none", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "the GPU stopped answering after" in done.stdout
    assert not load(tmp_path / "a.json").complete


def test_killed_results_are_whole(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def burst(launch: Any, meanwhile: Any) -> list[float]:
        if device.launches:
            raise KeyboardInterrupt
        return bench_device.FakeGpu.burst(device, launch, meanwhile)

    monkeypatch.setattr(device, "burst", burst)
    done = call(*SMALL, "--dtype", "int8", "--peers", "none", "--json", tmp_path / "a.json")
    assert done.exit_code == 130
    assert [cell.us for cell in load(tmp_path / "a.json").cells.values()] == [10.0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_many_m_are_a_curve(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured coarsely first, both contenders at each; a row an m in the table; a picture of times; cliffs by name."""
    capture = device.capture

    def slow_at_17(calls: Any, slower: float = 1.0) -> Any:
        tokens = next((call.keywords["out"].shape[0] for call in calls if getattr(call, "keywords", None)), 0)
        return capture(calls, slower * (1.5 if tokens == 17 else 1.0))

    monkeypatch.setattr(device, "capture", slow_at_17)
    args = ("--shape", "40,64", "-m", "1-24,30-40:5", "--dtype", "int8,bf16")
    done = call(*args, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    results = load(tmp_path / "a.json")
    tokens = [*range(1, 25), 30, 35, 40]
    assert results.selection["m"] == tokens
    measured = [cell.m for cell in results.cells.values() if cell.type == "int8" and cell.contender == "ours"]
    assert measured[:5] == [1, 40, 14, 7, 20]
    assert sorted(m for m in measured if m is not None) == tokens
    cells = list(results.cells.values())
    assert [cell.m for cell in cells[::2]] == [cell.m for cell in cells[1::2]], "dense and ours in turn"
    lines = done.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("gemm, burst: 40 x 64; 24 of 27 m, -v shows all"))
    assert [word.strip() for word in lines[head + 1].split("  ") if word][:2] == ["m", "INT8 6:8 us"]
    assert len(lines[head + 2 : lines.index("", head)]) == 24
    for label in ("INT8", "BF16"):
        sentence = (
            f"{label} 6:8 product, 40 x 64, in bursts: over 1.1 times as long as with more tokens: at m = 17 (1.50x m = 40)."
        )
        assert sentence in lines
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    every = call("--from", tmp_path / "a.json", "-v").stdout.splitlines()
    head = every.index("gemm, burst: 40 x 64")
    assert [int(line.split()[0]) for line in every[head + 2 : every.index("", head)]] == tokens


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--model", "gpt-5"), "'gpt-5' is not one of llama3.2-1b"),
        (("-m", "16,x"), "'x' must be a number of tokens"),
        (("-m", "0"), "'0' must be a number of tokens"),
        (("-m", ","), "names nothing"),
        (("--pattern", "2:8"), "is 6:8 here"),
        (("--dtype", "fp4"), "'fp4' is not one of fp8, int8, bf16, fp16"),
        (("--part", "all"), "'all' is not one of gemm, linear, quantize, pack"),
        (("--peers", "cublas"), "'cublas' is not one of dense, cusparselt, torch, none"),
        (("--peers", "none,dense"), "none goes with no other"),
        (("--shape", "64"), "must be outputs and inputs"),
        (("--shape", "0,64"), "must be outputs and inputs"),
        (("--quick", "--full"), "not both"),
        (("-m", "16", "--sustained", "32"), "m=32 is not among those of -m"),
        (("-m", "٣"), "must be a number of tokens"),
        (("-m", "9" * 5000), "must be a number of tokens"),
        (("-m", "1-"), "'1-' must be a number of tokens, 1 to 1048576, or a range such as 1-64 or 64-1024:32"),
        (("-m", "16,-64"), "'-64' must be a number of tokens"),
        (("-m", "1-64:"), "'1-64:' must be a number of tokens"),
        (("-m", "1-64:0"), "'1-64:0' must be a number of tokens"),
        (("-m", "1-2-3"), "'1-2-3' must be a number of tokens"),
        (("-m", "8:2"), "'8:2' must be a number of tokens"),
        (("-m", "64-1"), "'64-1' must name the smaller number of tokens first"),
        (("-m", "1-64:64"), "'1-64:64' has a step longer than the range; it must be at most 63"),
        (("-m", "1-1048576"), "names 1048576 numbers of tokens, where 4096 are the most; give ranges a step"),
        (("--shape", "٣,64"), "must be outputs and inputs"),
        (("--budget", "0"), "0"),
        (("--budget", "nan"), "'nan' is no number of seconds"),
        (("--budget", "inf"), "'inf' is no number of seconds"),
        (("--json", "/nowhere/a.json"), "no folder that can be written"),
        (("--plot", "/nowhere/a.png"), "no folder that can be written"),
        (("--from", "/nowhere/a.json"), "does not exist"),
        (("--from", __file__, "--quick"), "--from measures nothing, and goes with --plot and -v only"),
        (("--readme", __file__, "--from", __file__), "--readme stands alone"),
    ],
)
def test_usage_errors(args: tuple[str, ...], says: str) -> None:
    done = call(*args)
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 0}', '{"schema": 1}', '{"schema": 1, "cells": 3}'])
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    done = call("--from", tmp_path / "a.json")
    assert done.exit_code == 5
    assert done.stderr.startswith(f"error: {tmp_path / 'a.json'}: ")
    assert done.stderr.count("\n") == 1


def test_presets(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Named options replace a preset's; without one, --quick's hold."""
    layers = (selection.Linear("one", 64, 64),)
    monkeypatch.setitem(selection.MODELS, "qwen2.5-7b", selection.Suite("qwen2.5-7b", layers))

    def chosen(*args: str) -> dict[str, Any]:
        done = call(*args, "--json", tmp_path / "a.json")
        assert done.exit_code == 0, done.output
        made: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())["selection"]
        return made

    assert chosen() == chosen("--quick")
    assert chosen("--quick")["m"] == list(selection.QUICK.tokens)
    assert chosen("--quick", "--dtype", "int8") == {**chosen("--quick"), "types": ["int8"]}
    assert chosen("--dtype", "int8")["budget_s"] > chosen("--quick")["budget_s"]
    full = chosen("--full", "-m", "16", "--part", "pack", "--dtype", "bf16,int8")
    assert (full["m"], full["parts"], full["sustained_m"], full["types"]) == ([16], ["pack"], [], ["bf16", "int8"])
    assert full["patterns"] == list(selection.FULL.patterns)
