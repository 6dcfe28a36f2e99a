"""A stand-in for the GPU of `slidesparse bench`: a CuPy of NumPy arrays, real products, simulated time.

The host queues launches, and the device works them off in the background, as CUDA does. Nothing it says is published.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401  names bfloat16 for NumPy
import numpy as np
import pytest
from commands import slidesparse

import slidesparse_nb as ss
from slidesparse_nb.tuning import clock as timing
from tools.benchmark import gpu, measure, peers
from tools.benchmark.cases import Call, Calls, Case, Linear
from tools.benchmark.peers import TorchPeers as TorchPeers
from tools.benchmark.peers import VllmPeers as VllmPeers

QUEUE_US = 5.0
"""What a launch costs the host."""


class Device:
    """Time in microseconds: the host's, and when the device will have done all it was given.

    Attributes:
        duration: seconds of a graph, from its number of calls and its start.
        capturing: the calls of the graph that is being captured, else None.
        starts: of all launches.
        lost: the device answers no more.
    """

    def __init__(self, duration: Callable[[float, float], float] = lambda at, calls: 10.0 * calls) -> None:
        self.now = self.busy = 0.0
        self.duration, self.capturing, self.starts, self.lost = duration, False, list[float](), False

    def launch(self, calls: float) -> None:
        self.now += QUEUE_US
        self.starts.append(max(self.now, self.busy))
        self.busy = self.starts[-1] + self.duration(self.starts[-1], calls)

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")
        self.now = max(self.now, self.busy) + 1

    def sleep(self, seconds: float) -> None:
        self.now += seconds * 1e6

    def cupy(self) -> Any:
        """What of CuPy `gpu.Gpu` uses."""
        device = self

        class Event:
            def record(self, stream: Any) -> None:
                self.at = device.busy = max(device.busy, device.now)

            def synchronize(self) -> None:
                device.now = max(device.now, self.at)

        class Stream:
            ptr = 1

            def __init__(self, non_blocking: bool) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: object) -> None:
                pass

            def synchronize(self) -> None:
                assert not device.capturing
                device.synchronize()

            def begin_capture(self) -> None:
                device.capturing = True

            def end_capture(self) -> Any:
                device.capturing = False
                return SimpleNamespace(upload=lambda stream: None, launch=lambda stream: device.launch(1))

        properties = {"name": b"Imaginary GPU", "major": 9, "minor": 0, "multiProcessorCount": 1, "l2CacheSize": 2000}
        runtime = SimpleNamespace(
            getDevice=lambda: 0, getDeviceProperties=lambda index: properties, runtimeGetVersion=lambda: 12090
        )
        cuda = SimpleNamespace(
            Stream=Stream, Event=Event, runtime=runtime,
            Device=lambda: SimpleNamespace(pci_bus_id="0000:00:00.0", synchronize=device.synchronize),
            get_elapsed_time=lambda a, b: (b.at - a.at) * 1e-3,
        )  # fmt: skip
        pool = SimpleNamespace(free_all_blocks=lambda: None)
        names = ("empty", "ones", "positive", "asarray")
        return SimpleNamespace(
            __version__="0", cuda=cuda, random=np.random, asnumpy=np.asarray, get_default_memory_pool=lambda: pool,
            **{name: getattr(np, name) for name in names},
        )  # fmt: skip


class FakeGpu(gpu.Gpu):
    """A graph runs its calls at its first launch, so that what they write can be looked at, and only tells time afterwards."""

    def __init__(self, device: Device) -> None:
        self.device, self.cupy_made = device, device.cupy()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "cupy", self.cupy_made)
            patch.setattr(gpu.ss, "diagnose", list)
            super().__init__()

    def self_tests(self) -> list[str]:
        return ["3 kernels equal NumPy"]

    def compile_ahead(self, plan: Sequence[Case]) -> None:
        pass

    def workspace(self, m: int, packed: ss.PackedWeight, dtype: Any) -> Any:
        return None

    def capture(self, calls: Sequence[Call], slower: float = 1.0) -> Callable[[], None]:
        super().capture(calls)
        todo = list(calls)

        def launch() -> None:
            while todo:
                todo.pop()()
            self.device.launch(slower * len(calls))

        return launch

    def sample(self) -> dict[str, float]:
        return {"at": self.device.now * 1e-6, "sm_mhz": 1500.0, "celsius": 60.0, "watts": 700.0}


class FakePeers:
    """Baselines that do nothing, on the clock of a FakeGpu, where they take 1.3 times as long."""

    def __init__(self, device: FakeGpu) -> None:
        self.device = device

    def facts(self) -> dict[str, Any]:
        return {"torch": "0.0"}

    def release(self) -> None:
        pass

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        return self.device.capture(calls, slower=1.3)

    def prepare(self, case: Case, linear: Linear, copies: int) -> Calls:
        assert case.m is not None
        if case.provider == "cusparselt" and linear.name == "no":
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED\nwhen calling something")
        return Calls([lambda: None] * copies, rows=32 if case.m < 32 else None, notes=["a peer's note"])


def stand_in(monkeypatch: pytest.MonkeyPatch, device: Device | None = None) -> FakeGpu:
    """The GPU that `slidesparse bench` finds from now on, its baselines, and its time."""
    made = FakeGpu(device or Device())
    monkeypatch.setattr(gpu, "Gpu", lambda: made)
    for name in ("TorchPeers", "VllmPeers"):
        monkeypatch.setattr(peers, name, lambda stream: FakePeers(made))
    monkeypatch.setattr(measure, "COPIED", 1 << 10)
    clock = SimpleNamespace(perf_counter=lambda: made.device.now * 1e-6, sleep=made.device.sleep)
    for module in (gpu, measure, timing):
        monkeypatch.setattr(module, "time", clock)
    return made


call = functools.partial(slidesparse, "bench")
"""`slidesparse bench` with these arguments."""
