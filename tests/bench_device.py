"""A stand-in for the GPU of `slidesparse bench`: NumPy arrays, real products, made-up times. Nothing it says is published."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401  names bfloat16 for NumPy
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tools.benchmark import gpu, torch_peers
from tools.benchmark.gpu import Sustained
from tools.benchmark.selection import Group, Linear
from tools.benchmark.sensors import Means
from tools.benchmark.trial import Call, Launch, Trial, Verdict
from tools.cli import main


class FakeGpu:
    """What `gpu.Gpu` offers, on the CPU. `burst` returns `us` for every launch.

    Attributes:
        damage: changes results before they are looked at, to see that this is found out.
        lost: the device answers no more.
    """

    l2_bytes = 2000
    stream = SimpleNamespace(ptr=0)

    def __init__(self, us: float = 10.0) -> None:
        self.us = us
        self.rng = np.random.default_rng(3)
        self.lost = False
        self.launches = 0

    def facts(self) -> dict[str, Any]:
        return {"gpu": "Imaginary GPU", "power_limit_w": 70.0, "driver": "1.2", "cupy": "none", "l2_bytes": self.l2_bytes}

    def compile_ahead(self, plan: Sequence[Group]) -> None:
        pass

    def state(self) -> dict[str, float | None]:
        return {"sm_mhz": 345.0, "celsius": 30.0, "watts": 70.0}

    def normal(self, rows: int, columns: int, dtype: str) -> Any:
        return self.rng.standard_normal((rows, columns)).astype(np.dtype(dtype))

    def empty(self, rows: int, columns: int, dtype: str) -> Any:
        return np.empty((rows, columns), np.dtype(dtype))

    def workspace(self, m: int, packed: Any, dtype: Any) -> None:
        return None

    def host(self, array: Any, rows: Any = None, columns: Any = None) -> Any:
        array = array if rows is None else array[rows]
        return np.ascontiguousarray(array if columns is None else array[:, columns])

    def poison(self, array: Any) -> None:
        array.view(np.uint16).fill(0x7FFF)

    def unwritten(self, array: Any) -> int:
        return int((array.view(np.uint16) == 0x7FFF).sum())

    def free(self) -> None:
        pass

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def capture(self, calls: Sequence[Call], slower: float = 1.0) -> Launch:
        def launch() -> None:
            self.launches += 1
            for call in calls:
                call()

        self.us_all = self.us * slower * len(calls)
        return launch

    def burst(self, launch: Launch, meanwhile: Verdict) -> list[float]:
        launch()
        meanwhile()
        return [self.us_all * factor for factor in (0.9, 1.0, 1.0, 1.0, 1.1)]

    def sustained(self, launch: Launch) -> Sustained:
        launch()
        return Sustained([self.us_all * 1.2] * 5, Means(1500.0, 60.0, 700.0))

    def host_us(self, call: Call) -> list[float]:
        call()
        return [100.0] * 5

    def copy_bandwidth(self, count: int) -> float:
        return 4e12

    def read_bandwidth(self, count: int) -> float:
        return 4.2e12


class FakePeers:
    """Peers that do nothing, on the clock of a FakeGpu, where they take 1.3 times as long."""

    def __init__(self, device: FakeGpu) -> None:
        self.device = device

    def facts(self) -> dict[str, Any]:
        return {"torch": "0.0"}

    def release(self) -> None:
        pass

    def capture(self, calls: Sequence[Call]) -> Launch:
        return self.device.capture(calls, slower=1.3)

    def trial(self, group: Group, linear: Linear, copies: int) -> Trial:
        assert group.m is not None
        if group.contender == "cusparselt" and linear.name == "no":
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED\nwhen calling something")
        return Trial([lambda: None] * copies, rows=32 if group.m < 32 else None, notes=["a peer's note"])


def stand_in(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The device that `slidesparse bench` finds from now on, and its peers."""
    made = FakeGpu()
    monkeypatch.setattr(gpu, "open_gpu", lambda: made)
    monkeypatch.setattr(torch_peers, "TorchPeers", lambda stream: FakePeers(made))
    return made


def call(*args: object) -> Result:
    """`slidesparse bench` with these arguments."""
    return CliRunner().invoke(main, ["bench", *map(str, args)])
