"""What slidesparse bench writes and reads: files that cannot be written, and files that are no results."""

from __future__ import annotations

import copy
import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_device
import numpy as np
import pytest
from bench_device import call
from click.testing import Result

import slidesparse_nb as ss
from tools.benchmark import gpu, keeper, ours, readme, results, torch_peers

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--shape", "70,96", "-m", "1,40", "--dtype", "int8")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> bench_device.FakeGpu:
    return bench_device.stand_in(monkeypatch)


def says(done: Result, code: int, text: str) -> None:
    assert done.exit_code == code, done.output
    assert text in " ".join(done.stderr.replace("│", " ").split())


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_path_that_cannot_be_written_is_found_out_first(device: bench_device.FakeGpu, tmp_path: Path) -> None:
    done = call(*SMALL, "--json", tmp_path / ("x" * 250 + ".json"))
    says(done, 2, "cannot be written (File name too long)")
    assert not device.launches
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("until", [3, 10**9])
def test_a_full_disk_does_not_cost_the_run(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, until: int
) -> None:
    """Of writes after the first, up to number `until` fail."""
    write, count = results.write_whole, 0

    def fails(path: Path, text: str) -> None:
        nonlocal count
        count += 1
        if 1 < count <= until:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(results, "write_whole", fails)
    done = call(*SMALL, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert "10.0" in done.stdout
    assert "the file of the results could not be written for a while or to the end (No space left on device)" in done.stdout
    assert (tmp_path / "a.png").exists()
    if until == 3:
        assert done.exit_code == 0, done.output
        assert results.load(tmp_path / "a.json").complete
    else:
        says(done, 1, f"error: --json: {tmp_path / 'a.json'} could not be written (No space left on device)")
        assert not results.load(tmp_path / "a.json").cells


def test_writing_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Writing takes a second, of results that come ten times a second: written every 20 s, and in the end."""
    now, written = 0.0, list[float]()

    def write(path: Path, text: str) -> None:
        nonlocal now
        now += 1
        written.append(now)

    monkeypatch.setattr(results, "write_whole", write)
    monkeypatch.setattr(keeper, "time", SimpleNamespace(perf_counter=lambda: now))
    kept = keeper.Keeper(results.Results("2000", {}, {}, {}), tmp_path / "a.json", print)
    while now < 60:
        kept.save()
        now += 0.1
    np.testing.assert_allclose(np.diff(written), 21, atol=0.2)
    kept.save(at_once=True)
    assert now - written[-1] == 0


def test_what_is_no_number_of_jsons_is_never_written(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "copy_bandwidth", lambda count: float("nan"))
    done = call(*SMALL, "--json", tmp_path / "a.json")
    says(done, 1, "a.json could not be written (Out of range float values are not JSON compliant")
    assert "NaN" not in (tmp_path / "a.json").read_text()


def test_files_in_each_others_place(device: bench_device.FakeGpu, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    says(call(*SMALL, "--json", path, "--plot", path), 2, "is the file of the results, too")
    says(call(*SMALL, "--json", ""), 2, "--json: '.' is not the name of a file")
    says(call(*SMALL, "--json", "/dev/null"), 2, "--json: '/dev/null' is not the name of a file")
    says(call(*SMALL, "--plot", ""), 2, "--plot: '.' is not the name of a file")
    assert call(*SMALL, "--json", path).exit_code == 0
    says(call("--from", path, "--plot", tmp_path / "." / "a.png"), 2, "is the file of the results, too")
    assert results.load(path).complete


def test_results_keep_the_mode_and_the_link_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "b").symlink_to("a")
    results.write_whole(tmp_path / "b", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "b").is_symlink()


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--plot", "a.svg"), "a.svg must end in .png"),
        (("--plot", "a.png", "--peers", "none"), "measure --part gemm --peers dense, too"),
        (("--plot", "a.png", "--part", "pack"), "measure --part gemm --peers dense, too"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused_first(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    says(call(*SMALL, *args), 2, text)
    assert not device.launches


def test_without_matplotlib(device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "tools.benchmark.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    says(call(*SMALL, "--plot", tmp_path / "a.png"), 1, "--plot needs matplotlib")
    assert not device.launches


def test_a_failing_picture_does_not_hide_wrong_results(
    device: bench_device.FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = ss.matmul
    monkeypatch.setattr(ours.ss, "matmul", lambda x, packed, *, out, workspace: right(x, packed, out=out).__iadd__(1))
    done = call(*SMALL, "--plot", tmp_path / "a.png")
    says(done, 4, "error: 2 results are wrong and have no time")
    assert "error: --plot: the results hold no product with a dense peer" in done.stderr


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A file of a run of several parts, some cells of each."""
    path = tmp_path_factory.mktemp("run") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        made = bench_device.FakeGpu()
        patch.setattr(gpu, "open_gpu", lambda: made)
        patch.setattr(torch_peers, "TorchPeers", lambda stream: bench_device.FakePeers(made))
        args = ("--shape", "70,96", "-m", "1,40", "--dtype", "int8", "--part", "gemm,linear,pack", "--sustained", "40")
        assert call(*args, "--json", path).exit_code == 0
    text: dict[str, Any] = json.loads(path.read_text())
    text["ceilings"] = {"int8": {"burst": 1e15}}
    return text


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (("schema",), True, "schema True must be 1"),
        (("schema",), 1.0, "schema 1.0 must be 1"),
        (("notes",), 1.5, "notes is 1.5 and must be a list"),
        (("notes",), [1], "notes[0] is 1 and must be text"),
        (("machine",), [], "machine is [] and must be an object"),
        (("machine", "power_limit_w"), "x", "machine.power_limit_w is 'x' and must be a number or null"),
        (("machine", "after"), 1, "machine.after is 1 and must be an object"),
        (("bandwidth", "copy"), 0, "bandwidth.copy is 0 and must be a number above 0"),
        (("ceilings", "int8"), 1, "ceilings.int8 is 1 and must be an object"),
        (("started",), -1, "started is -1 and must be a time, ISO 8601"),
        (("started",), "soon", "started is 'soon' and must be a time, ISO 8601"),
        (("seconds",), None, "seconds is None and must be a number, 0 or more"),
        (("suites", "70 x 96"), [], "suites.70 x 96 is [] and must be a list of layers"),
        (("suites", "70 x 96", 0), ["shape", 70, float("inf")], "Infinity is no JSON number"),
        (("suites", "70 x 96", 0), ["shape", 70, 10**400], "and must be a layer of its own name, [name, n, k]"),
        (("cells", 0), [], "cells[0] is [] and must be an object"),
        (("cells", 0, "suite"), "no", "cells[0].suite is 'no' and must be one of suites"),
        (("cells", 0, "type"), {}, "cells[0].type is {} and must be one of fp8, int8, bf16, fp16"),
        (("cells", 0, "us"), "x", "cells[0].us is 'x' and must be a number above 0"),
        (("cells", 0, "n"), 71, "cells[0]: layer, n and k must be those of its suite"),
        (("cells", 0, "speed"), 1, "cells[0].speed is no key of a results file"),
        (("cells", 0, "blank"), "both", "cells[0]: there must be us or blank, not both"),
        (("cells", 0, "wrong"), True, "cells[0]: wrong goes with blank"),
        (("cells", 0, "part"), "pack", "cells[0]: m belongs to every part but pack"),
        (("cells", 0, "pattern"), "6:8", "cells[0]: a pattern belongs to sparse weights alone"),
        (("cells", 1, "pattern"), "2:8", "cells[1].pattern is '2:8' and must be a pattern such as 6:8"),
    ],
)
def test_rules(written: dict[str, Any], tmp_path: Path, at: tuple[Any, ...], value: Any, text: str) -> None:
    given = copy.deepcopy(written)
    inner: Any = given
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    (tmp_path / "a.json").write_text(json.dumps(given))
    done = call("--from", tmp_path / "a.json")
    says(done, 5, text)
    assert done.stderr.startswith(f"error: {tmp_path / 'a.json'}: ")
    assert done.stderr.count("\n") == 1


def test_missing_keys_and_repeated_cells(written: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({key: value for key, value in written.items() if key != "seconds"}))
    says(call("--from", path), 5, "a.json: seconds is missing")
    path.write_text(json.dumps({**written, "cells": written["cells"] + written["cells"][:1]}))
    says(call("--from", path), 5, "two of its cells measure the same")


def test_whatever_stands_in_the_file_it_is_shown_or_refused_in_a_sentence(written: dict[str, Any], tmp_path: Path) -> None:
    """Every value of the file replaced by others in turn: shown, or exit code 5, and never a traceback."""

    def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [here] * bool(here) + [place for key, item in inner for place in places(item, (*here, key))]

    few = {**written, "cells": [cell for i, cell in enumerate(written["cells"]) if i % 4 == 0]}
    path, codes = tmp_path / "a.json", set()
    for place in places(few):
        for value in (None, 0, -1, "x", [], {}, 1.5, True, 10**400, [[]]):
            given = copy.deepcopy(few)
            inner: Any = given
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path.write_text(json.dumps(given))
            done = call("--from", path, "-v")
            codes.add(done.exit_code)
            assert done.exit_code in (0, 5), (place, value, done.output, done.exception)
            assert done.stderr.count("\n") == (done.exit_code == 5)
            if done.exit_code == 0:
                readme.section(results.load(path))
    assert codes == {0, 5}


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_made_of_the_published_results_alone(tmp_path: Path) -> None:
    before = (ROOT / "README.md").read_bytes()
    (tmp_path / "a.json").write_text("{}")
    says(call("--readme", tmp_path / "a.json"), 2, f"is not {readme.PUBLISHED}, which README names as its source")
    for option in ("-q", "-v"):
        says(call("--readme", tmp_path / "a.json", option), 2, "--readme stands alone")
    assert (ROOT / "README.md").read_bytes() == before
