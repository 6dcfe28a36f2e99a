"""Tuning, all but the GPU: candidates, files, what a plan makes of them, the race on a clock that is told, the command."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
from cases import packed_weight
from commands import slidesparse
from lacking import LACKS, assert_refused, take_away
from numpy_gpu import BF16, array, close, gpu, ops, wanted, weight

import slidesparse_nb as ss
from slidesparse_nb import arch
from slidesparse_nb.arch import choose, sm90
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.cuda import tuned_store
from slidesparse_nb.errors import OperandError, UnsupportedError
from slidesparse_nb.tuning import search

__all__ = ["gpu"]  # the fixture

P = Pattern(6, 8)
HOPPER = Device((9, 0), 132, "NVIDIA H200", False)
AMPERE = Device((8, 0), 108, "NVIDIA A100", False)
BLACKWELL = Device((12, 0), 170, "NVIDIA GeForce RTX 5090", False)


@pytest.fixture(autouse=True)
def nothing_tuned(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SLIDESPARSE_TUNED", raising=False)
    tuned_store.look_again()
    yield
    tuned_store.look_again()


def product(m: int = 16, n: int = 4608, k: int = 3584, where: Device = HOPPER, dtype: Any = INT8) -> GemmProblem:
    return GemmProblem(m, n, k, P, dtype, "bfloat16", where)


def another(of: GemmProblem) -> arch.Candidate:
    """A candidate that the model does not choose."""
    return tuned_store.likely(of)[1]


# ---- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("where", [HOPPER, AMPERE, BLACKWELL], ids=lambda where: where.name)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (4608, 3584), (37888, 3584), (3584, 18944)])
@pytest.mark.parametrize("m", [1, 16, 1000, 4096])
def test_the_models_choice_is_the_first_of_the_likely(m: int, n: int, k: int, where: Any, dtype: Any) -> None:
    of = product(m, n, k, where, dtype)
    if arch.of(of).refuses(where.capability, of.scheme):
        return
    likely, every = tuned_store.likely(of), tuned_store.ranked(of, every=False)
    costs = {candidate: cost for cost, candidate in every}
    assert likely[0] == choose(of) == tuned_store.best(of)
    assert costs[likely[0]] == min(costs.values())
    near = [cost for cost, _ in every if cost <= 1.5 * every[0][0]]
    assert sorted(costs[candidate] for candidate in set(likely)) == near[: tuned_store.MOST_CANDIDATES]
    words = {json.dumps([*map(tuned_store.described, candidate)]) for candidate in costs}
    assert len(words) == len(costs), "two candidates of one description"


def test_a_description_outlives_a_fit() -> None:
    config = another(product())[0]
    assert isinstance(config, sm90.Config)
    costlier = replace(config, tile=replace(config.tile, stage_ns=1, tile_ns=1))
    assert tuned_store.described(costlier) == tuned_store.described(config)
    assert tuned_store.described(replace(config, resident=3)) != tuned_store.described(config)
    assert tuned_store.described(replace(config, raster_group=3)) != tuned_store.described(config)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [HOPPER, AMPERE], ids=lambda where: where.name)
def test_round_trip(where: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    of = product(where=where)
    assert tuned_store.found(of) is None
    tuned_store.keep(of, another(of), {"us": 1.0})
    assert tuned_store.best(of) == another(of) != choose(of)
    devices = {"device": replace(where, sms=60)}, {"device": replace(where, name="H20")}
    for change in ({"m": 17}, {"n": 4672}, {"out": "float16"}, *devices):
        other = replace(of, **change)
        assert tuned_store.best(other) == choose(other)
    monkeypatch.setenv("SLIDESPARSE_TUNED", "0")
    assert tuned_store.best(of) == choose(of)
    monkeypatch.delenv("SLIDESPARSE_TUNED")
    tuned_store.drop(of)
    tuned_store.drop(of)
    assert tuned_store.best(of) == choose(of)
    assert tuned_store.forget() == 0


def test_the_kernels_source_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    of = product()
    tuned_store.keep(of, another(of), {})
    monkeypatch.setattr(tuned_store.cache, "source_hash", lambda source: "of another source")
    tuned_store.look_again()
    assert tuned_store.found(of) is None


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    of = product()
    assert tuned_store.found(of) is None
    monkeypatch.setattr(tuned_store, "folder", lambda: 1 / 0)
    assert tuned_store.found(replace(of)) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"[" * 100_000, b'{"launches": 3}', b'{"launches": []}', b'{"launches": [[]]}',
        b'{"launches": null}', b'{"launches": {"a": 1}}', b'{"launches": ["a"], "launches": ["b"]}',
    ],
    ids=lambda content: content[:24],
)  # fmt: skip
def test_broken_files_are_ignored(content: bytes) -> None:
    of = product()
    tuned_store.file(of).parent.mkdir(parents=True)
    tuned_store.file(of).write_bytes(content)
    assert tuned_store.best(of) == choose(of)


def test_what_is_no_file_is_ignored(cache: Path) -> None:
    of = product()
    tuned_store.file(of).mkdir(parents=True)
    assert tuned_store.best(of) == choose(of)
    assert tuned_store.forget() == 1
    cache.joinpath("tuned").write_text("a file in the folder's place")
    tuned_store.look_again()
    assert tuned_store.best(of) == choose(of)
    with pytest.raises(UnsupportedError, match=r"^cache: .* cannot be written .*; set SLIDESPARSE_CACHE_DIR"):
        tuned_store.keep(of, another(of), {})


def test_launches_that_are_no_more_are_ignored() -> None:
    """A candidate of another release, of another m, of too many blocks, of half the launches."""
    of = product(1024)
    candidate = next(
        candidate for _, candidate in tuned_store.ranked(of) if len(candidate) == 2 and isinstance(candidate[0], sm90.Config)
    )
    config = candidate[0]
    assert isinstance(config, sm90.Config)
    for stale in (
        (replace(config, stages=config.stages + 1), candidate[1]),
        (replace(config, blocks=config.blocks + 1), candidate[1]),
        candidate[:1],
        candidate[::-1],
        another(product(512)),
    ):
        tuned_store.keep(of, stale, {})
        assert tuned_store.best(of) == choose(of)
    tuned_store.keep(of, candidate, {})
    assert tuned_store.best(of) == candidate


def test_processes_write_at_once(cache: Path) -> None:
    """Each its own product, and all the same one; nothing is lost, nothing torn, nothing left lying about."""
    code = """if True:
        import sys
        from slidesparse_nb.cuda import tuned_store as tuned
        from slidesparse_nb.core.problem import Device, GemmProblem
        for m in (int(sys.argv[1]), 1) * 20:
            of = GemmProblem.of((m, 4608, 3584, "6:8", "int8", "bfloat16"), Device((9, 0), 132, "NVIDIA H200"))
            tuned.keep(of, tuned.likely(of)[1], {"by": sys.argv[1]})
    """
    running = [subprocess.Popen([sys.executable, "-c", code, str(m)], cwd=Path(__file__).parent.parent) for m in (16, 17, 18)]
    assert [process.wait() for process in running] == [0, 0, 0]
    for m in (1, 16, 17, 18):
        assert tuned_store.best(product(m)) == another(product(m))
    assert len([file for file in cache.rglob("*") if file.is_file()]) == 4
    assert tuned_store.forget() == 4
    assert tuned_store.best(product(1)) == choose(product(1))


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_takes_what_was_tuned(gpu: Any) -> None:
    """The device modules are imported afresh by the fixture: `here` is the one that they know."""
    here = importlib.import_module("slidesparse_nb.cuda.tuned_store")
    packed = weight(300, 512, INT8)
    x = array(np.random.default_rng(0).standard_normal((16, 512)).astype(BF16))
    device = gpu.gemm.to_device(packed)
    of = device.problem(16, "bfloat16")
    assert of.device == Device((9, 0), 132, "NumPy in CuPy's place", not gpu.own)
    here.keep(of, another(of), {})
    close(ops().matmul(x, packed), wanted(x, packed))
    assert device.bound(16, "bfloat16").plan.configs == another(of)
    close(ops().matmul(x[:15], packed), wanted(x[:15], packed))
    assert device.bound(15, "bfloat16").plan.configs == choose(device.problem(15, "bfloat16"))
    other = gpu.gemm.to_device(weight(300, 512, INT8, seed=1))  # weights of one shape share plans, until results change
    assert other.bind(16, "bfloat16").plan is device.bind(16, "bfloat16").plan
    here.drop(of)
    assert other.bind(16, "bfloat16").plan.configs == choose(of)


# ---- the race --------------------------------------------------------------------------------------------------------


class ToldClock:
    """Runs the calls; a burst of the i-th graph takes what it is told."""

    l2_bytes = 100_000

    def __init__(self, us: dict[int, float]) -> None:
        self.us, self.captured, self.bursts = us, 0, 0

    def capture(self, calls: Any) -> Any:
        for call in calls:
            call()
        self.captured += 1
        return self.captured - 1

    def burst(self, launch: int, replays: int) -> float:
        self.bursts += 1
        return self.us.get(launch, 100.0) * (1 + 0.001 * (self.bursts % 3))


@pytest.fixture
def timing(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = importlib.import_module("slidesparse_nb.tuning.race")
    monkeypatch.setattr(
        module, "normal", lambda m, k: array(np.random.default_rng(1).standard_normal((m, k)).astype(np.float32))
    )
    return module


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
def test_the_fastest_wins(gpu: Any, timing: Any, dtype: Any) -> None:
    track = timing.Track(weight(300, 512, dtype), clock := ToldClock({1: 80.0, 2: 90.0}))
    candidates = tuned_store.likely(track.problem(16, "bfloat16"))[:8]
    race = track.race(16, "bfloat16", candidates)
    assert race.best == candidates[1]
    assert race.candidates == clock.captured == len(candidates)
    calls = len(track.weights)
    assert calls > 1
    there = [next(iter(timing.to_device(weight).buffers.values())).data.ptr for weight in track.weights]
    assert len({*there}) == calls, "weights in memory of their own"
    assert race.model_us * calls == pytest.approx(100, rel=0.01)
    assert race.best_us * calls == pytest.approx(80, rel=0.01)
    assert not race.wrong
    assert not any(timing.to_device(weight).plans for weight in track.weights)


def test_the_models_choice_wins(gpu: Any, timing: Any) -> None:
    track = timing.Track(weight(300, 512, INT8), ToldClock({0: 70.0}))
    candidates = tuned_store.likely(track.problem(5, "float32"))[:8]
    race = track.race(5, "float32", candidates)
    assert race.best == candidates[0]
    assert race.model_us == race.best_us


def test_weights_that_lack_a_form_of_metadata(gpu: Any, timing: Any) -> None:
    """16-bit weights with three zeros in a group: their candidates are those that they can run."""
    w = np.random.default_rng(1).standard_normal((300, 512)).astype(np.float32)
    w[0, :3] = 0
    packed = ss.pack(w, P, BFLOAT16, prune="magnitude")
    track = timing.Track(packed, ToldClock({}))
    assert track.buffers == (("values", "expanded") if gpu.own else ("weights",))
    race = track.race(300, "bfloat16", candidates := tuned_store.likely(track.problem(300, "bfloat16"), track.buffers)[:6])
    assert (race.candidates, race.wrong) == (len(candidates), ())


def test_a_winner_is_timed_once_more_against_the_models_choice(gpu: Any, timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was lucky until then is given its true time."""
    track = timing.Track(weight(300, 512, INT8), clock := ToldClock({1: 50.0}))
    candidates = tuned_store.likely(track.problem(5, "float32"))[:8]
    luck = 2 * len(candidates) + timing.AGAIN * timing.FINALISTS
    told = clock.burst
    monkeypatch.setattr(clock, "burst", lambda *of: told(*of) if clock.bursts < luck else told(0, 1))
    race = track.race(5, "float32", candidates)
    assert race.best == candidates[1]
    assert race.best_us == pytest.approx(race.model_us, rel=0.01)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("fault", ["wrong", "nothing"])
def test_wrong_results_are_told_and_not_timed(
    gpu: Any, timing: Any, dtype: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    track = timing.Track(weight(600, 1200, dtype), clock := ToldClock({}))
    candidates = tuned_store.likely(track.problem(16, "bfloat16"))[:4]
    matmul = timing.matmul.matmul

    def faulty(x: Any, packed: Any, out: Any, workspace: Any) -> None:
        bad = timing.to_device(packed).plans[16, "bfloat16"].plan.configs == candidates[2]
        if not bad or fault == "wrong":
            matmul(x, packed, out=out, workspace=workspace)
        if bad and fault == "wrong":
            out[7, 200:208] = 3 * float(np.abs(out.astype(np.float32)).max())

    monkeypatch.setattr(timing.matmul, "matmul", faulty)
    race = track.race(16, "bfloat16", candidates)
    assert race.wrong == (candidates[2],)
    assert race.candidates == clock.captured == 3


# ---- the function and the command ------------------------------------------------------------------------------------


@pytest.fixture
def tuner(gpu: Any, timing: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tune_products` on the stand-in: nothing is compiled, packing is the reference's, the clock is told."""
    clock = ToldClock({i: 80.0 for i in range(1, 400, 2)})
    monkeypatch.setattr(search, "GpuClock", lambda: clock)
    gpu.cupy = sys.modules["cupy"]
    monkeypatch.setattr(search, "compile_all", lambda jobs, compiler: len(jobs))
    monkeypatch.setattr(search.cache, "device_compiler", lambda: None)
    here = importlib.import_module("slidesparse_nb.cuda.tuned_store")
    monkeypatch.setattr(search, "tuned_store", here)
    monkeypatch.setattr(search.packing, "pack", lambda w, pattern, dtype, prune: weight(*w.shape, dtype, pattern))
    return SimpleNamespace(clock=clock, tuned=here, monkeypatch=monkeypatch)


def test_command(gpu: Any, tuner: Any) -> None:
    done = slidesparse("tune", "--shape", "300,512", "--pattern", "6:8", "--dtype", "int8,bf16", "-m", "1,16", "--json", "-q")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [(one["m"], one["n"], one["k"], one["dtype"], one["out"]) for one in told] == [
        (m, 300, 512, dtype, "bfloat16") for dtype in ("int8", "bfloat16") for m in (1, 16)
    ]
    for one in told:
        assert one["candidates"] > 1
        assert one["kept"] == (one["best"] != one["model"]) == (one["gain"] > 0.02)
        packed = weight(one["n"], one["k"], INT8 if one["dtype"] == "int8" else BFLOAT16)
        of = gpu.gemm.to_device(packed).problem(one["m"], one["out"])
        assert [str(config) for config in tuned_store.best(of)] == one["best"]
    assert any(one["kept"] for one in told)
    assert slidesparse("tune", "--forget").stdout == f"{sum(one['kept'] for one in told)} results forgotten\n"
    assert slidesparse("tune", "--forget").stdout == "0 results forgotten\n"


def test_command_for_readers(gpu: Any, tuner: Any) -> None:
    done = slidesparse("tune", "--shape", "300,512", "-m", "16", "-v")
    assert done.exit_code == 0, done.output
    head, row, *_, last = done.stdout.splitlines()
    assert head.split() == ["n,", "k", "pattern", "type", "m", "candidates", "model", "us", "best", "us", "gain", "kept"]
    assert row.startswith("300, 512  6:8      int8 -> bfloat16  16")
    assert last.startswith("1 of 1 product kept; new processes use them")
    assert done.stderr.startswith("1/1  300 x 512, 6:8, int8 -> bfloat16, m=16: ")


def test_a_result_that_no_longer_holds_is_dropped(gpu: Any, tuner: Any) -> None:
    assert json.loads(slidesparse("tune", "--shape", "300,512", "-m", "16", "--json").stdout)[0]["kept"]
    tuner.clock.us = {}
    assert not json.loads(slidesparse("tune", "--shape", "300,512", "-m", "16", "--json").stdout)[0]["kept"]
    assert slidesparse("tune", "--forget").stdout == "0 results forgotten\n"


def test_an_interrupt_keeps_what_was_found(gpu: Any, tuner: Any, timing: Any) -> None:
    race = timing.Track.race

    def interrupted(track: Any, m: int, *rest: Any) -> Any:
        if m == 16:
            raise KeyboardInterrupt
        return race(track, m, *rest)

    tuner.monkeypatch.setattr(timing.Track, "race", interrupted)
    done = slidesparse("tune", "--shape", "300,512", "-m", "1,16", "--json")
    assert done.exit_code == 130
    assert done.stderr.endswith("error: interrupted; what was found until now is kept\n")
    assert [one["m"] for one in json.loads(done.stdout)] == [1]
    assert slidesparse("tune", "--forget").stdout == "1 result forgotten\n"


def test_time_that_is_up(gpu: Any, tuner: Any) -> None:
    tuner.monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=iter(range(0, 1000, 2)).__next__))
    done = slidesparse("tune", "--shape", "300,512", "-m", "1,16-64:48", "--seconds", "3", "--json")
    assert done.exit_code == 0
    assert [one["m"] for one in json.loads(done.stdout)] == [1]
    assert done.stderr.endswith("time is up: 2 of 3 products were not begun\n")


def test_wrong_results_fail_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    one = search.Tuned(16, 300, 512, "6:8", "int8", "bfloat16", 3, ("a",), ("a",), 2.0, 2.0, False, ("b",))
    monkeypatch.setattr("slidesparse_nb.tune_products", lambda *_: iter([one]), raising=False)
    done = slidesparse("tune", "--shape", "300,512", "-m", "16")
    assert done.exit_code == 4
    assert "1 result differed from that of the model's choice" in done.stderr
    assert "300, 512" in done.stdout


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The products that the command asks for."""
    found: list[Any] = []
    monkeypatch.setattr("slidesparse_nb.tune_products", lambda products, *_: iter(found.extend(products) or ()), raising=False)
    return found


def test_a_packed_checkpoint(tmp_path: Path, asked: list[Any]) -> None:
    packed = packed_weight(48, 64)
    ss.save(tmp_path / "packed.safetensors", {"a": packed, "b": packed})
    assert slidesparse("tune", tmp_path / "packed.safetensors", "-m", "1,8", "--out", "float16").exit_code == 0
    assert asked == [(1, 48, 64, "6:8", "int8", "float16"), (8, 48, 64, "6:8", "int8", "float16")]
    for scheme, code, told in (
        ("W4A8", 0, ""),
        ("NVFP4", 5, "a: NVFP4 weights are not tuned; their launches are the model's choice"),
    ):
        asked.clear()
        ss.save(tmp_path / "packed.safetensors", {"a": ss.pack(np.zeros((48, 64), np.float32), "6:8", scheme)})
        done = slidesparse("tune", tmp_path / "packed.safetensors", "-m", "8")
        assert (done.exit_code, told in done.stderr) == (code, True)
        assert asked == [(8, 48, 64, "6:8", "float8_e4m3fn", "bfloat16")][code:]
    done = slidesparse("tune", models.folder(tmp_path / "dense"))
    assert done.exit_code == 5
    assert "holds no packed weights; slidesparse pack makes them" in done.stderr


def test_model_names_are_the_benchs(asked: list[Any]) -> None:
    assert slidesparse("tune", "--model", "qwen2.5-7b", "--dtype", "fp8,fp16", "-m", "16").exit_code == 0
    assert (16, 4608, 3584, "6:8", "float8_e4m3fn", "bfloat16") in asked
    assert (16, 4608, 3584, "6:8", "float16", "float16") in asked
    assert len(asked) == 8


@pytest.mark.parametrize(
    "arguments",
    [(), ("--forget", "--shape", "8,8"), ("--shape", "8"), ("--shape", "8,8", "-m", "0"), ("--model", "gpt"), ("--out", "int8"),
     ("--shape", "8,8", "--seconds", "0"), ("--shape", "8,8", "--dtype", "int4"), ("--shape", "8,8", "--pattern", "3:4"),
     ("absent.safetensors",)],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)  # fmt: skip
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert slidesparse("tune", *arguments).exit_code == 2


@pytest.mark.parametrize("part", LACKS)
def test_machines_that_lack_a_part(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_away(part, monkeypatch)
    assert_refused(slidesparse("tune", "--shape", "64,64"), "tune", part)


@pytest.mark.parametrize(
    ("product", "message"),
    [
        ((0, 8, 8, "6:8", "int8", "float32"), "m: 0 must be a whole number of at least 1"),
        ((1, 8, 2**18, "2:4", "int8", "float32"), "product: k=262144 takes"),
        ((1, 8, 8, "6:8", "int4", "float32"), "int4"),
        ((1, 8, 8, "6:8", "int8", "int8"), "out: int8 must be one of float32, float16, bfloat16"),
    ],
)
def test_products_that_cannot_be(product: Any, message: str) -> None:
    with pytest.raises(OperandError, match=message):
        ss.tune_products([product])


def test_types_that_the_gpu_does_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_capability", lambda: (8, 0))
    with pytest.raises(UnsupportedError, match="float8_e4m3fn weights need compute capability"):
        ss.tune_products([(1, 8, 8, "6:8", "float8_e4m3fn", "float32")])
