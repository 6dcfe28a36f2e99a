"""The clocks of slidesparse bench on a simulated CuPy: a device that works in the background, a host that queues and waits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import slidesparse_nb as ss
from tools.benchmark import gpu

QUEUE_US = 5.0
"""What a launch costs the host."""


class Array(np.ndarray):
    def get(self) -> Any:
        return np.asarray(self)


class Simulation:
    """Time in microseconds: the host's, and when the device will have done all it was given.

    Attributes:
        duration: of a launch, from the time at which it starts.
    """

    def __init__(self, duration: Callable[[float], float]) -> None:
        self.host = self.device = 0.0
        self.duration = duration
        self.starts: list[float] = []
        simulation = self

        class Event:
            def record(self, stream: Any) -> None:
                self.at = simulation.device = max(simulation.device, simulation.host)

            def synchronize(self) -> None:
                simulation.host = max(simulation.host, self.at)

        class Graph:
            def __init__(self, calls: int) -> None:
                self.calls = calls

            def upload(self, stream: Any) -> None:
                pass

            def launch(self, stream: Any) -> None:
                simulation.launch()

        class Stream:
            ptr = 1

            def __init__(self, non_blocking: bool) -> None:
                self.capturing = False

            def __enter__(self) -> Stream:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def synchronize(self) -> None:
                assert not self.capturing
                simulation.host = max(simulation.host, simulation.device)

            def begin_capture(self) -> None:
                self.capturing = True

            def end_capture(self) -> Graph:
                assert self.capturing
                self.capturing = False
                return Graph(0)

        properties = {
            "name": b"Imaginary GPU", "major": 9, "minor": 0, "multiProcessorCount": 1, "totalGlobalMem": 1, "l2CacheSize": 7,
        }  # fmt: skip
        runtime = SimpleNamespace(
            getDevice=lambda: 0,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda device: properties,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 12090,
        )
        device = SimpleNamespace(pci_bus_id="0000:00:00.0", synchronize=lambda: None)
        self.cupy = SimpleNamespace(
            __version__="0",
            cuda=SimpleNamespace(
                Stream=Stream, Event=Event, runtime=runtime, Device=lambda: device,
                get_elapsed_time=lambda a, b: (b.at - a.at) * 1e-3,
            ),
            random=SimpleNamespace(default_rng=np.random.default_rng),
            empty=lambda shape, dtype: np.empty(shape, dtype).view(Array),
            ones=lambda shape, dtype: np.ones(shape, dtype).view(Array),
            positive=np.positive,
            asarray=np.asarray,
        )  # fmt: skip

    def launch(self) -> None:
        self.host += QUEUE_US
        start = max(self.host, self.device)
        self.starts.append(start)
        self.device = start + self.duration(start)

    def clock(self) -> Any:
        def sleep(seconds: float) -> None:
            self.host += seconds * 1e6

        return SimpleNamespace(perf_counter=lambda: self.host * 1e-6, sleep=sleep)


def simulated(monkeypatch: pytest.MonkeyPatch, duration: Callable[[float], float]) -> tuple[Simulation, gpu.Gpu]:
    simulation = Simulation(duration)
    monkeypatch.setattr(gpu, "time", simulation.clock())
    return simulation, gpu.Gpu(simulation.cupy)


def test_bursts_leave_launch_latency_out(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, device = simulated(monkeypatch, lambda at: 100.0)
    assert device.burst(simulation.launch) == [100.0] * gpu.BURSTS
    launches = np.array(simulation.starts)
    runs = np.split(launches, np.flatnonzero(np.diff(launches) > 1e6 * gpu.IDLE_S) + 1)
    assert len(runs) == gpu.BURSTS + 1
    assert {len(run) for run in runs[1:]} == {1 + 20}  # one ahead of the clock, and 2 ms


def test_results_are_checked_while_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first timed launch, and as part of the idleness; a check that takes longer only makes that longer."""
    for takes, idle in ((15_000.0, 20_000.0), (45_000.0, 45_000.0)):
        simulation, device = simulated(monkeypatch, lambda at: 100.0)
        launched: list[int] = []

        def check(simulation: Simulation = simulation, takes: float = takes, launched: list[int] = launched) -> None:
            launched.append(len(simulation.starts))
            simulation.host += takes

        assert device.burst(simulation.launch, check) == [100.0] * gpu.BURSTS
        assert launched == [2], "once, after the two launches that tell how many make a burst"
        gaps = np.diff(simulation.starts)
        np.testing.assert_allclose(gaps[gaps > 1000], [idle, *[1e6 * gpu.IDLE_S] * (gpu.BURSTS - 1)], atol=200)

    def fails() -> None:
        raise ss.VerificationError("wrong")

    before = len(simulation.starts)
    with pytest.raises(ss.VerificationError):
        device.burst(simulation.launch, fails)
    assert len(simulation.starts) == before + 2


def test_a_long_launch_is_a_burst_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, device = simulated(monkeypatch, lambda at: 7000.0)
    assert device.burst(simulation.launch) == [7000.0 + QUEUE_US] * gpu.BURSTS
    assert len(simulation.starts) == gpu.BURSTS + 2


def test_sustained_load_is_timed_after_half_a_second_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 0.45 s a launch takes 100 us, later 130: the clock falls, and only that is told."""
    simulation, device = simulated(monkeypatch, lambda at: 100.0 if at < 0.45e6 else 130.0)
    found = device.sustained(simulation.launch)
    assert found.us == pytest.approx([130.0] * len(found.us))
    assert 0.45 < sum(found.us) * 200 * 1e-6 < 0.6  # 200 launches a piece of about 20 ms
    assert np.diff(simulation.starts[1:]).max() < 131
    assert found.means.watts is None


def test_sustained_load_of_launches_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, device = simulated(monkeypatch, lambda at: 300_000.0)
    found = device.sustained(simulation.launch)
    assert found.us == pytest.approx([300_000.0] * len(found.us))
    assert len(found.us) >= 2


def test_capture_runs_then_records_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, device = simulated(monkeypatch, lambda at: 1.0)
    log: list[str] = []

    def call() -> None:
        log.append("captured" if device.stream.capturing else "run")

    device.capture([call, call])()
    assert log == ["run", "run", "captured", "captured"]
    assert len(simulation.starts) == 1

    def fails() -> None:
        if device.stream.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        device.capture([fails])
    assert not device.stream.capturing


def test_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = simulated(monkeypatch, lambda at: 1.0)
    for dtype in ("bfloat16", "float16"):
        assert device.normal(3, 5, dtype).dtype == np.dtype(dtype)
        y = device.empty(6, 7, dtype)
        device.poison(y)
        assert np.isnan(y.astype(np.float32)).all()
        assert device.unwritten(y) == 42
        y[...] = np.arange(42, dtype=y.dtype).reshape(6, 7)
        assert device.unwritten(y) == 0
        np.testing.assert_array_equal(device.host(y, [0, 5], [1, 6]), np.asarray(y)[[0, 5]][:, [1, 6]])
        assert device.host(y, [2]).dtype == y.dtype


def test_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = simulated(monkeypatch, lambda at: 1.0)
    facts = device.facts()
    assert (facts["gpu"], facts["capability"], facts["cuda_driver"], facts["cuda_runtime"]) == (
        "Imaginary GPU", "9.0", "13.0", "12.9",
    )  # fmt: skip
    assert facts["before"] == device.state() == {"sm_mhz": None, "celsius": None, "watts": None}
    assert device.l2_bytes == 7
