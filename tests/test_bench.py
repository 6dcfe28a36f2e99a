"""slidesparse bench as a user runs it: without a GPU; and whole, on a stand-in for one whose times mean nothing."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import bench_device
import numpy as np
import pytest
from bench_device import call
from click.testing import Result
from lacking import LACKS, assert_refused, take_away

from tools.benchmark import cases, ours, peers, results, show
from tools.benchmark.results import load

bench = importlib.import_module("tools.bench")  # the name in the package is the command
ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--shape", "70,96", "--shape", "33,40", "-m", "1,40", "--pattern", "6:8,2:4")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> bench_device.FakeGpu:
    return bench_device.stand_in(monkeypatch)


def says(done: Result, code: int, text: str) -> None:
    assert done.exit_code == code, (done.output, done.exception)
    assert text in " ".join(done.stderr.replace("│", " ").split())


# ---- machines that lack things ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", LACKS)
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    take_away(part, monkeypatch)
    assert_refused(call("--quick"), "bench", part)


def test_without_pytorch(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "TorchPeers", bench_device.TorchPeers)
    monkeypatch.setitem(sys.modules, "torch", None)
    done = call(*SMALL, "--dtype", "int8", "--peers", "dense,cusparselt", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "4 blank of dense (cuBLASLt): PyTorch cannot be used (ModuleNotFoundError" in done.stdout
    assert all((cell.us is None) == (cell.provider != "ours") for cell in load(tmp_path / "a.json").cells.values())
    assert "self-test: 3 kernels equal NumPy" in load(tmp_path / "a.json").notes


@pytest.mark.parametrize("there", [True, False])
def test_vllms_linears_take_the_place_of_pytorchs(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name if there else None)
    chosen = {"cutlass", "marlin-w4a8", "marlin-w4a16"} if there else {"torch"}
    assert set(peers.default(peers.PEERS)) == {"dense", "cusparselt"} | chosen
    monkeypatch.setattr(peers, "VllmPeers", bench_device.VllmPeers)
    monkeypatch.setitem(sys.modules, "torch", None)
    done = call(*SMALL, "--dtype", "int8", "--part", "linear", "--peers", "torch,cutlass", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "blank of cutlass (vLLM's 8-bit linear: CUTLASS): vLLM cannot be used (ModuleNotFoundError" in done.stdout
    cells = load(tmp_path / "a.json").cells.values()
    assert {cell.provider for cell in cells if cell.us} == {"ours", "torch"}


def test_without_matplotlib(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "tools.benchmark.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    says(call(*SMALL, "--plot", tmp_path / "a.png"), 1, "--plot needs matplotlib")
    assert not device.device.starts


# ---- the whole command -----------------------------------------------------------------------------------------------


def test_everything(device: bench_device.FakeGpu, tmp_path: Path) -> None:
    done = call(
        *SMALL, "--dtype", "fp8,int8,bf16,fp16", "--part", "gemm,linear,quantize,pack", "--peers", "dense,cusparselt,torch",
        "--sustained", "40", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "-v",
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    found = load(tmp_path / "a.json")
    cells = [*found.cells.values()]
    assert found.complete
    assert not found.wrong
    assert all(cell.us for cell in cells), "nothing is blank"
    quantized = {(c.part, c.type) for c in cells if c.provider == "ours"}
    assert quantized == {(part, kind) for part in cases.PARTS for kind in cases.KINDS}
    sustained = [cell for cell in cells if cell.load == "sustained" and cell.provider == "ours"]
    assert len(sustained) == 2 * 2 * 4
    assert all((cell.watts, cell.sm_mhz, cell.m, cell.layer) == (700.0, 1500.0, 40, "all") for cell in sustained)
    assert all(cell.mj == pytest.approx(700 * cell.us * 1e-3) for cell in sustained if cell.us)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "gemm, sustained, the layers in turn, m = 40" in done.stdout
    assert "70 x 96 gemm FP8 6:8 m=40 burst ours: 10.0 us, 1.30x dense" in done.stderr
    assert call("--from", tmp_path / "a.json", "-v").stdout == done.stdout
    found.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_wrong_kernel_has_no_time(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ours.ss.matmul

    def wrong(x: Any, packed: Any, *, out: Any, workspace: Any) -> Any:
        right(x, packed, out=out)
        if packed.dtype.name == "float8_e4m3fn":
            out *= np.dtype("bfloat16").type(1.25)
        return out

    monkeypatch.setattr(ours.ss, "matmul", wrong)
    done = call(*SMALL, "--dtype", "fp8,int8", "--peers", "none", "--json", tmp_path / "a.json")
    says(done, 4, "error: 8 results are wrong and have no time, the first gemm fp8 6:8 shape m=1: wrong: ")
    cells = load(tmp_path / "a.json").cells.values()
    assert {(cell.type, cell.us is None, cell.wrong) for cell in cells} == {("fp8", True, True), ("int8", False, False)}


def test_a_graph_that_writes_nothing_has_no_time(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is right; the clock's launch does not run the calls, as if capture had lost them."""
    monkeypatch.setattr(device, "bursts", lambda launch: [1.0] * 5)
    says(call("--shape", "64,64", "-m", "8", "--dtype", "int8", "--peers", "none"), 4, "results were not written")


def test_a_failing_peer_is_a_named_blank(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = (cases.Linear("yes", 64, 64), cases.Linear("no", 32, 64))
    monkeypatch.setitem(cases.MODELS, "qwen2.5-7b", cases.Suite("qwen2.5-7b", layers))
    path = tmp_path / "a.json"
    done = call("--model", "qwen2.5-7b", "-m", "8", "--dtype", "int8", "--peers", "dense,cusparselt", "--json", path)
    assert done.exit_code == 0, done.output
    cells = {cell.layer: cell for cell in load(path).cells.values() if cell.provider == "cusparselt"}
    assert (cells["yes"].us, cells["yes"].rows, cells["no"].us) == (13, 32, None)
    blank = "RuntimeError: CUSPARSE_STATUS_NOT_SUPPORTED when calling something"
    assert cells["no"].blank == blank
    assert f"1 blank of cusparselt (cuSPARSELt): {blank}" in done.stdout
    assert load(path).us("cusparselt", "gemm", "qwen2.5-7b", "all", "int8", "6:8", 8, "burst") is None


def test_the_budget_ends_the_run_cleanly(device: bench_device.FakeGpu, tmp_path: Path) -> None:
    done = call(*SMALL, "--dtype", "int8,fp8", "--sustained", "1,40", "--budget", 2, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    found = load(tmp_path / "a.json")
    assert not found.complete
    blanks = [cell.blank for cell in found.cells.values() if cell.us is None]
    assert 0 < len(blanks) < len(found.cells)
    assert set(blanks) == {"not measured: the budget of 2 s was spent"}
    assert "not everything was measured" in done.stdout
    assert "  not measured" not in done.stdout  # no row for each, but a count
    assert "  not measured" in call("--from", tmp_path / "a.json", "-v").stdout


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_keeps_and_shows_what_it_has(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    def bursts(launch: Any) -> list[float]:
        if (tmp_path / "once").exists():
            signal.raise_signal(stop)
        (tmp_path / "once").touch()
        return [10.0] * 5

    monkeypatch.setattr(device, "bursts", bursts)
    monkeypatch.setattr(device, "bandwidth", lambda count: {})
    monkeypatch.setattr(device, "unwritten", lambda y: 0)
    monkeypatch.setattr(ours, "check_product", lambda *arrays: None)
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    done = call("--shape", "32,64", "-m", "1,40", "--dtype", "int8", "--peers", "none", "--json", tmp_path / "a.json")
    signal.signal(signal.SIGINT, interrupt)
    assert done.exit_code == code, (done.output, done.exception)
    assert [cell.m for cell in load(tmp_path / "a.json").cells.values()] == [1]
    assert "gemm, burst, 32 x 64" in done.stdout
    assert signal.getsignal(signal.SIGTERM) == before
    assert {path.name for path in tmp_path.iterdir()} == {"once", "a.json"}


def test_a_lost_device_ends_the_run(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def sustained(launch: Any) -> None:
        device.device.lost = True
        device.synchronize()

    monkeypatch.setattr(device, "sustained", sustained)
    done = call(*SMALL, "--sustained", "40", "--dtype", "int8", "--peers", "none", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "the GPU stopped answering after 70 x 96 gemm INT8 6:8 m=40 sustained ours" in done.stdout
    assert not load(tmp_path / "a.json").complete


# ---- options and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--model", "gpt-5"), "'gpt-5' is not one of llama3.2-1b"),
        (("-m", "16,x"), "'x' must be a number of tokens, 1 to 1048576, or a range such as 1-64 or 64-1024:32"),
        (("-m", ","), "names nothing"),
        (("-m", "9" * 5000), "must be a number of tokens"),
        (("-m", "1-64:0"), "'1-64:0' must be a number of tokens"),
        (("-m", "64-1"), "'64-1' must name the smaller number of tokens first"),
        (("-m", "1-64:64"), "'1-64:64' has a step longer than the range; it must be at most 63"),
        (("-m", "1-1048576"), "names 1048576 numbers of tokens, where 4096 are the most; give ranges a step"),
        (("-m", "16", "--sustained", "32"), "m=32 is not among those of -m"),
        (("--pattern", "2:8"), "is 6:8 here"),
        (("--dtype", "fp4"), "'fp4' is not one of fp8, int8, bf16, fp16"),
        (("--part", "all"), "'all' is not one of gemm, linear, quantize, pack"),
        (("--peers", "cublas"), "'cublas' is not one of dense, cusparselt, cutlass, marlin-w4a8"),
        (("--peers", "none,dense"), "none goes with no other"),
        (("--shape", "٣,64"), "must be outputs and inputs"),
        (("--quick", "--full"), "not both"),
        (("--budget", "inf"), "'inf' is no number of seconds"),
        (("--json", "/nowhere/a.json"), "no folder that can be written"),
        (("--json", ""), "--json: '.' is not the name of a file"),
        (("--plot", "/nowhere/a.png"), "no folder that can be written"),
        (("--plot", "a.svg"), "a.svg must end in .png"),
        (("--plot", "a.png", "--json", "a.png"), "is the file of the results, too"),
        (("--plot", "a.png", "--part", "pack"), "measure --part gemm --peers dense, too"),
        (("--from", __file__, "--quick"), "--from measures nothing, and goes with --plot and -v only"),
        (("--readme", __file__, "--from", __file__), "--readme stands alone"),
        (("--readme", __file__), "is not docs/results/h200.json or docs/results/engines.json, which README"),
    ],
)
def test_usage_errors(device: bench_device.FakeGpu, args: tuple[str, ...], text: str) -> None:
    says(call(*args), 2, text)
    assert not device.device.starts


def test_presets(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Named options replace a preset's; without one, --quick's hold."""
    small = (cases.Suite("one", (cases.Linear("one", 64, 64),)),)
    for name in ("QUICK", "FULL"):
        monkeypatch.setattr(bench, name, dataclasses.replace(getattr(peers, name), suites=small))

    def chosen(*args: str) -> dict[str, Any]:
        done = call(*args, "--json", tmp_path / "a.json")
        assert done.exit_code == 0, (done.output, done.exception)
        return dict(load(tmp_path / "a.json").selection)

    quick = chosen("--quick")
    assert chosen() == quick
    assert quick["tokens"] == [16, 1024, 4096]
    assert chosen("--quick", "--dtype", "int8") == {**quick, "kinds": ["int8"]}
    assert chosen("--dtype", "int8")["budget"] > quick["budget"]
    full = chosen("--full", "-m", "16", "--part", "pack", "--dtype", "bf16,int8")
    assert (full["tokens"], full["parts"], full["sustained"], full["kinds"]) == ([16], ["pack"], [], ["bf16", "int8"])
    assert full["patterns"] == ["6:8", "2:4", "4:6", "8:10"]


@pytest.mark.parametrize("until", [2, 10**9])
def test_a_full_disk_does_not_cost_the_run(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, until: int
) -> None:
    """Of writes after the first, up to number `until` fail; a run of seconds writes more often."""
    write, count = results.write_whole, 0

    def fails(path: Path, text: str) -> None:
        nonlocal count
        count += 1
        if 1 < count <= until:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(results, "write_whole", fails)
    done = call(*SMALL, "--dtype", "int8,fp8", "--sustained", "1,40", "--json", tmp_path / "a.json")
    assert "10.0" in done.stdout
    assert "a.json could not be written (No space left on device)" in done.stdout
    assert load(tmp_path / "a.json").complete == (until == 2)
    says(done, 0 if until == 2 else 1, "--json: ")


def test_a_file_that_cannot_be_written_is_found_out_first(device: bench_device.FakeGpu, tmp_path: Path) -> None:
    says(call(*SMALL, "--json", tmp_path / ("x" * 250 + ".json")), 2, "could not be written (File name too long)")
    assert not device.device.starts
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"schema": 2', '"schema": 1'), ('"schema": 2', '"sch": 2'), ('"seconds"', '"second"'), ('"us": ', '"us": -'),
        ('"us": ', '"us": "x", "speed": '), ('"m": 1,', '"m": "1",'), ('"type": "int8"', '"type": "int4"'),
        ('"suite": "70 x 96"', '"suite": "no"'), ('"layer": "shape"', '"layer": "no"'),
        ('"pattern": "6:8"', '"pattern": "2:8"'), ('{"schema"', '["schema"'),
        ('"notes": [', '"notes": [1,'), ('"70 x 96": [[', '"70 x 96": [[['),
        ('"copy": ', '"copy": "x", "y": '), ("{", ""),
    ],
)  # fmt: skip
def test_files_that_are_no_results(device: bench_device.FakeGpu, tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "a.json"
    assert call("--shape", "70,96", "-m", "1,40", "--dtype", "int8", "--json", path).exit_code == 0
    text = path.read_text()
    path.write_text(text.replace(old, new) if old != '{"schema"' else "[1]")
    done = call("--from", path)
    says(done, 5, f"error: {path}: is no file of results of schema 2 (")
    assert done.stderr.count("\n") == 1


# ---- what is published -----------------------------------------------------------------------------------------------


def test_published_results_can_be_read_and_were_right() -> None:
    for path in sorted((ROOT / "docs" / "results").glob("[eh]*.json")):  # others are no results of bench
        found = load(path)
        assert not found.wrong
        assert found.served or found.bandwidth["copy"] > 0
        drawn = found.served or "dense" in found.selection["peers"]  # over which pictures show products
        assert path.with_suffix(".png").exists() == bool(drawn)
        assert '"/' not in path.read_text(), "a path of the machine it was made on"


def test_readme_shows_the_published_results() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (path for path in show.PUBLISHED if path == show.PUBLISHED[0] or (ROOT / path).exists()):
        section = text.partition(f"{show.BEGIN.format(path)}\n\n")[2].partition(f"\n{show.END}")[0]
        assert section == show.section(load(ROOT / path)), f"run python tools/bench.py --readme {path}"


def test_json_holds_no_nan(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "bandwidth", lambda count: {"copy": float("nan")})
    says(call(*SMALL, "--dtype", "int8", "--json", tmp_path / "a.json"), 1, "a.json could not be written (Out of range float")
    assert "NaN" not in json.dumps(json.loads((tmp_path / "a.json").read_text()))
