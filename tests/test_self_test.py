"""The test of kernels before their first product on a GPU on which we never ran them, with a GPU of NumPy."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_gpu import BF16, P, array, close, forget_plans, gpu, numpy_for_cupy, ops, wanted, weight

from slidesparse_nb import arch, doctor
from slidesparse_nb.arch import sm80, sm80_layout, sm90
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, INT8, PACKED
from slidesparse_nb.core.packed import ORDERED_NIBBLES
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.errors import SlideSparseError, UnsupportedError

__all__ = ["gpu"]
pytestmark = pytest.mark.usefixtures("cache")


def here() -> Device:
    return Device((9, 0), 132, "NumPy in CuPy's place")


@pytest.fixture
def unknown_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU on which we ran nothing."""
    monkeypatch.setattr(arch, "RAN", frozenset())
    monkeypatch.setattr(arch, "LEFT_ASIDE", set())
    return gpu


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that is tested here, where it does not matter which kernels the GPU gets."""
    with numpy_for_cupy(monkeypatch, True) as made:
        yield made.self_test


def restart(gpu: Any) -> None:
    """What a new process knows."""
    gpu.self_test._known.clear()
    gpu.self_test._decided.clear()
    forget_plans()
    arch.LEFT_ASIDE.clear()


def tokens(m: int) -> Any:
    return array(np.random.default_rng(m).standard_normal((m, 96)).astype(BF16))


def one_wrong(config: Any, y: Any) -> Any:
    """y with the last element of the second row changed, of the products that are tests."""
    if y.shape[1] in (280, 970):
        y[1, -1] = -y[1, -1]
    return y


# ---- what is multiplied ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", known_patterns(), ids=str)
def test_operands_show_every_nibble_in_every_fragment_position(tests: Any, pattern: Any, dtype: Any) -> None:
    layout = sm80_layout.layout(pattern, dtype.bits)
    for m, n, k in tests.SHAPES:
        made = tests.case(GemmProblem(m, n, k, pattern, Scheme.of(dtype), "bfloat16", here()))
        words = sm80_layout.arrange(made.packed)[..., 512 * layout.steps :].view(np.uint32).reshape(-1, 32)
        for j in range(0, 32, 4):
            nibbles = words >> j & 15
            assert all(set(nibbles[:, lane]) >= set(ORDERED_NIBBLES) for lane in range(32))
        assert (made.x != 0).all()
        assert (made.scale_x is None) == (made.packed.scale is None) == (dtype.bits == 16)
        for scale in () if made.scale_x is None else (made.scale_x, made.packed.scale):
            assert (scale != 1).all()
        magnitudes = np.abs(made.x.astype(np.float64)) @ np.abs(reference.unpack(made.packed).astype(np.float64)).T
        assert magnitudes.max() < (2**24 if dtype is INT8 else 2**13)
        assert all(size % tile for size, tile in ((m, 8), (n, 16), (k, 16)))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_some_product_launches_every_kernel_that_multiplies_an_operand(tests: Any, pattern: str, dtype: Any) -> None:
    scheme, device, left = Scheme.of(dtype), Device((9, 0), 132, portable=False), set()
    for config in sm90.ARCH.kernels(Pattern.of(pattern), scheme, "bfloat16", device.capability):
        left |= {config.kernel} if isinstance(config, sm90.Config) and not config.own_x else set()
    for shape, form in itertools.product(tests.SHAPES, (["compact", "expanded"], ["compact"], ["expanded"])):
        few = replace(device, sms=tests.FEW_SMS.get(shape, device.sms))
        problem = GemmProblem(*shape, Pattern.of(pattern), scheme, "bfloat16", few)
        for launches in sm90.ARCH.candidates(problem, ("values", "scale", *form)):
            left -= {launch.but(order=0, derived=False).kernel for launch in launches if isinstance(launch, sm90.Config)}
    assert not left


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_rows_lifted_in_memory_lie_one_behind_another(tests: Any, dtype: Any) -> None:
    pattern, x = Pattern(16, 18), np.arange(3 * 40).reshape(3, 40).astype(dtype.numpy)
    form = sm80.ARCH.operand(pattern, 40, Scheme.of(dtype))
    rows = tests._operand(form, x, pattern)
    assert rows.flags.c_contiguous
    assert rows.tobytes() == b"".join(row.tobytes().ljust(form.pitch, b"\0") for row in reference.lift(x, pattern))


def test_products_are_the_references(tests: Any) -> None:
    made = tests.case(GemmProblem(*tests.SHAPES[1], P, Scheme.of("bf16"), "float16", here()))
    np.testing.assert_array_equal(made.y, reference.matmul(made.x, made.packed, made.bias, np.float16))


# ---- kernels that are right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_right_kernel_is_tested_once_for_a_device_and_driver(unknown_gpu: Any, dtype: Any) -> None:
    packed, x = weight(40, 96, dtype), tokens(7)
    close(ops().matmul(x, packed), wanted(x, packed))
    tests = unknown_gpu.self_test
    first, outcomes = len(unknown_gpu.launched), tests.outcomes(here())
    assert outcomes
    assert all(outcome.passed for outcome in outcomes)
    restart(unknown_gpu)
    close(ops().matmul(x, weight(40, 96, dtype)), wanted(x, packed))
    assert len(unknown_gpu.launched) - first <= 3
    tests.driver.release = lambda: "1.2.4"
    restart(unknown_gpu)
    assert tests.outcomes(here()) == []
    close(ops().matmul(x, weight(40, 96, dtype)), wanted(x, packed))
    assert len(tests.outcomes(here())) == len(outcomes)
    assert len(list(tests.folder(here()).parent.iterdir())) == 2


def test_nothing_is_tested_where_we_ran_the_kernel(gpu: Any, cache: Path) -> None:
    packed, x = weight(40, 96, INT8), tokens(7)
    close(ops().matmul(x, packed), wanted(x, packed))
    assert len(gpu.launched) <= 3
    assert not (cache / "self-test").exists()
    assert not list(doctor.self_tests())


# ---- kernels that are wrong --------------------------------------------------------------------------------------------


def spoiled_first(gpu: Any, packed: Any, m: int, spoil: Any) -> Any:
    """Spoil the kernels of the model's choice for m tokens; return that choice."""
    own = arch.for_capability((9, 0), not gpu.own)
    first = arch.choose(
        GemmProblem(m, *packed.shape, P, packed.scheme, "bfloat16", here()), (*own.arrange(packed, np), "scale")
    )
    kernels = gpu.self_test.kernels(first)
    gpu.spoil = lambda config, y: spoil(config, y) if gpu.self_test.kernels((config,)) <= kernels else y
    return first


def test_a_wrong_kernel_gives_way_to_the_next_candidate(unknown_gpu: Any) -> None:
    packed, x, tests = weight(40, 96, INT8), tokens(7), unknown_gpu.self_test
    first = spoiled_first(unknown_gpu, packed, 7, one_wrong)
    for _ in range(2):  # in this process and in the next
        there = unknown_gpu.gemm.to_device(weight(40, 96, INT8))
        chosen = there.bind(7, "bfloat16").plan.configs
        assert not tests.kernels(chosen) & tests.kernels(first)
        close(ops().matmul(x, there), wanted(x, packed))
        restart(unknown_gpu)
        unknown_gpu.spoil = lambda config, y: y
    failed = [outcome for outcome in tests.outcomes(here()) if not outcome.passed]
    assert failed
    assert f"on {here().name}, compute capability 9.0, driver 1.2.3: 1 of " in failed[0].text
    assert "elements of y are wrong, the first at row 1, column 279: expected " in failed[0].text
    found = [(finding.state, finding.text) for finding in doctor.self_tests()]
    assert found[0] == ("broken", f"{failed[0].text}; not used again with this driver; please report this line")
    assert found[-1][0] == "ok"


def test_a_launch_that_the_driver_refuses_is_a_failure(unknown_gpu: Any) -> None:
    launch = importlib.import_module("slidesparse_nb.cuda.launch")

    def refused(config: Any, y: Any) -> Any:
        raise launch.LaunchError("launch: refused")

    first = spoiled_first(unknown_gpu, packed := weight(40, 96, INT8), 7, refused)
    there = unknown_gpu.gemm.to_device(packed)
    assert not unknown_gpu.self_test.kernels(there.bind(7, "bfloat16").plan.configs) & unknown_gpu.self_test.kernels(first)
    assert "launch: refused; y[" in unknown_gpu.self_test.outcomes(here())[0].text


def test_a_capture_is_no_failure_of_the_kernel(unknown_gpu: Any) -> None:
    cupy: Any = importlib.import_module("cupy")
    error = cupy.cuda.runtime.CUDARuntimeError("cudaErrorStreamCaptureUnsupported")
    error.status = 900

    def captured(config: Any, y: Any) -> Any:
        raise error

    unknown_gpu.spoil = captured
    with pytest.raises(UnsupportedError, match="while a CUDA graph is captured; multiply 300 tokens once before"):
        ops().matmul(tokens(300), weight(40, 96, INT8))
    assert unknown_gpu.self_test.outcomes(here()) == []


def test_a_kernel_that_stops_the_gpu_ends_the_process_and_is_left_aside_by_the_next(unknown_gpu: Any) -> None:
    cupy: Any = importlib.import_module("cupy")
    stopped: list[Any] = []

    def stop(*_: Any) -> Any:
        stopped.append(cupy.cuda.runtime.CUDARuntimeError("cudaErrorIllegalInstruction"))
        raise stopped[0]

    first = spoiled_first(unknown_gpu, packed := weight(40, 96, INT8), 7, stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy.cuda.Stream, "synchronize", lambda stream: stop() if stopped else None)
        with pytest.raises(
            SlideSparseError, match=r"cudaErrorIllegalInstruction; y.* start it again, and that kernel is left aside"
        ):
            unknown_gpu.gemm.to_device(packed).bind(7, "bfloat16")
    restart(unknown_gpu)
    chosen = unknown_gpu.gemm.to_device(weight(40, 96, INT8)).bind(7, "bfloat16").plan.configs
    assert not unknown_gpu.self_test.kernels(chosen) & unknown_gpu.self_test.kernels(first)


def test_no_kernel_left(unknown_gpu: Any) -> None:
    unknown_gpu.spoil = one_wrong
    with pytest.raises(
        UnsupportedError, match=r"^device: no kernel for y\[7, 40\] .* passes its self-test on NumPy in .*doctor"
    ):
        ops().matmul(tokens(7), weight(40, 96, BFLOAT16))
    failed = unknown_gpu.self_test.outcomes(here())
    assert failed
    assert not any(outcome.passed for outcome in failed)
    if unknown_gpu.own:  # three of its kernels were tried, then every portable one
        assert len([outcome for outcome in failed if outcome.text.startswith("sm90")]) == unknown_gpu.self_test.TRIED


def test_a_broken_outcome_is_no_outcome(unknown_gpu: Any) -> None:
    packed, x, tests = weight(40, 96, INT8), tokens(7), unknown_gpu.self_test
    ops().matmul(x, packed)
    for text in ("", "[]", json.dumps({"passed": "yes", "text": "x"})):
        for place in tests.folder(here()).glob("*.json"):
            place.write_text(text)
        assert tests.outcomes(here()) == []
        restart(unknown_gpu)
        ops().matmul(x, weight(40, 96, INT8))
        assert tests.outcomes(here())[0].passed


def test_tuning_times_no_wrong_kernel(unknown_gpu: Any) -> None:
    packed = weight(40, 96, INT8)
    timing: Any = importlib.import_module("slidesparse_nb.tuning.race")
    timing = importlib.reload(timing)
    first = spoiled_first(unknown_gpu, packed, 7, one_wrong)
    track = timing.Track(packed, None)
    likely = track.likely(track.problem(7, "bfloat16"))
    assert likely
    assert not any(unknown_gpu.self_test.kernels(c) & unknown_gpu.self_test.kernels(first) for c in likely)
