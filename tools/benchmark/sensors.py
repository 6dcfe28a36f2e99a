"""Clock, temperature and power of the GPU while it works: NVML if its Python module is there, else nvidia-smi, else nothing."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .summary import slope

INTERVAL = 0.02
"""Seconds between samples."""


@dataclass(frozen=True)
class Sample:
    """One look at the GPU; None for what could not be read.

    Attributes:
        at: seconds, time.perf_counter.
        joules: since the driver was loaded.
    """

    at: float
    sm_mhz: float | None
    celsius: float | None
    watts: float | None
    joules: float | None


@dataclass(frozen=True)
class Means:
    sm_mhz: float | None
    celsius: float | None
    watts: float | None


def means(samples: list[Sample]) -> Means:
    """Over a span of steady load. Power is the energy counter's slope where it moved, since the power reading itself is an
    average over a second; else the mean reading."""

    def mean(name: str) -> float | None:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        return sum(values) / len(values) if values else None

    energy = [(sample.at, sample.joules) for sample in samples if sample.joules is not None]
    watts = slope(energy)
    return Means(mean("sm_mhz"), mean("celsius"), mean("watts") if watts is None else watts)


class Sensors:
    """What of a GPU can be read.

    Args:
        bus: its PCI bus id, "0000:18:00.0".
    """

    def __init__(self, bus: str) -> None:
        self.bus = bus
        self.facts: dict[str, Any] = {}
        self._read: Callable[[], Sample] | None = None
        with contextlib.suppress(Exception):  # no module, no library, no permission: the next way
            self._read = self._nvml()
            self._read()
            return
        self._read = None
        with contextlib.suppress(Exception):
            self._read = self._smi()
            self._read()
            return
        self._read = None

    def sample(self) -> Sample:
        """One look, now."""
        with contextlib.suppress(Exception):
            if self._read is not None:
                return self._read()
        return Sample(time.perf_counter(), None, None, None, None)

    def watch(self) -> Watch:
        """A context that samples in the background."""
        return Watch(self)

    def _nvml(self) -> Callable[[], Sample]:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByPciBusId(self.bus)
        self.facts["sensors"] = "NVML"
        self.facts["driver"] = _text(nvml.nvmlSystemGetDriverVersion())

        def get(read: Callable[..., Any], *args: Any, scale: float = 1.0) -> float | None:
            try:
                return float(read(handle, *args)) * scale
            except Exception:  # a reading that this device does not have
                return None

        self.facts["power_limit_w"] = get(nvml.nvmlDeviceGetEnforcedPowerLimit, scale=1e-3)
        self.facts["sm_mhz_max"] = get(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM)
        self.facts["memory_mhz"] = get(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM)

        def read() -> Sample:
            return Sample(
                time.perf_counter(),
                get(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
                get(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
                get(nvml.nvmlDeviceGetPowerUsage, scale=1e-3),
                get(nvml.nvmlDeviceGetTotalEnergyConsumption, scale=1e-3),
            )

        return read

    def _smi(self) -> Callable[[], Sample]:
        def query(names: str) -> list[str]:
            command = ["nvidia-smi", "-i", self.bus, f"--query-gpu={names}", "--format=csv,noheader,nounits"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return [part.strip() for part in done.stdout.strip().split(",")]

        driver, limit = query("driver_version,enforced.power.limit")
        self.facts.update({"sensors": "nvidia-smi", "driver": driver, "power_limit_w": _number(limit)})

        def read() -> Sample:
            clock, celsius, watts = (_number(text) for text in query("clocks.sm,temperature.gpu,power.draw.instant"))
            return Sample(time.perf_counter(), clock, celsius, watts, None)

        return read


class Watch:
    """Samples taken in the background, between enter and exit."""

    def __init__(self, sensors: Sensors) -> None:
        self.samples: list[Sample] = []
        self._sensors, self._stop = sensors, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def means(self, first: float, last: float) -> Means:
        """Of the samples between two times of time.perf_counter."""
        return means([sample for sample in self.samples if first <= sample.at <= last])

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.samples.append(self._sensors.sample())


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None
