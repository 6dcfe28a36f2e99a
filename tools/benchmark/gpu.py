"""The GPU, through CuPy: operands, CUDA graphs, clocks, sensors.

burst       20 ms of idleness, then replays for about two milliseconds; the median of five such
sustained   half a second of replays without a pause, then half a second that is timed and watched
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

import slidesparse_nb as ss
from slidesparse_nb.tuning.clock import GpuClock, Launch, replays

from .cases import OURS, Call, Case

BURSTS = 5
WARM_S, TIMED_S, SPAN_S = 0.5, 0.5, 0.02


class Gpu(GpuClock):
    """Operands, graphs, clock and sensors of the current device.

    Raises:
        UnsupportedError: there is none, or no CuPy to reach it.
    """

    def __init__(self) -> None:
        for finding in ss.diagnose():
            if finding.part in ("driver", "GPU", "CuPy") and finding.state != "ok":
                raise ss.UnsupportedError(
                    f"bench: needs an NVIDIA GPU and CuPy ({finding.part}: {finding.text}); look at published results with"
                    " --from FILE.json"
                )
            if finding.part == "CuPy":
                break
        super().__init__()
        importlib.import_module("ml_dtypes")  # names bfloat16 for NumPy
        self._rng = self.cupy.random.default_rng(20240607)
        self._nvml: Any = None
        with contextlib.suppress(Exception):  # no module, no library, no permission: no readings
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByPciBusId(self.cupy.cuda.Device().pci_bus_id)
            self._nvml = nvml

    def facts(self) -> dict[str, Any]:
        """Device, driver and versions, as the results keep them."""
        runtime, properties = self.cupy.cuda.runtime, self.properties
        number = runtime.runtimeGetVersion()
        facts = {
            "gpu": _text(properties["name"]),
            "capability": f"{properties['major']}.{properties['minor']}",
            "sms": properties["multiProcessorCount"],
            "l2_bytes": self.l2_bytes,
            "cuda_runtime": f"{number // 1000}.{number % 1000 // 10}",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cupy": self.cupy.__version__,
        }
        with contextlib.suppress(Exception):
            facts["driver"] = _text(self._nvml.nvmlSystemGetDriverVersion())
            facts["power_limit_w"] = round(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000)
        return facts

    def self_tests(self) -> list[str]:
        """What kernels computed that were tested on this device before they were used; nothing where we ran them before."""
        return [finding.text for finding in ss.self_tests()]

    def compile_ahead(self, plan: Sequence[Case]) -> None:
        """Compile the kernels of our products into the cache, on all cores at once."""
        capability = (self.properties["major"], self.properties["minor"])
        products = [
            (case.m, linear.n, linear.k, case.pattern, case.kind.name, case.kind.activations)
            for case in plan
            if case.provider == OURS and case.pattern is not None and case.m is not None
            for linear in case.suite.linears
        ]
        ss.build_products(products, capability, self.properties["multiProcessorCount"])

    # ---- operands ------------------------------------------------------------------------------------------------

    def normal(self, rows: int, columns: int, dtype: str) -> Any:
        """Random numbers [rows, columns] of a normal distribution, "bfloat16" or "float16"."""
        return self._rng.standard_normal((rows, columns), dtype=np.float32).astype(np.dtype(dtype))

    def empty(self, rows: int, columns: int, dtype: str) -> Any:
        return self.cupy.empty((rows, columns), np.dtype(dtype))

    def workspace(self, m: int, packed: ss.PackedWeight, dtype: Any) -> Any:
        """Scratch memory for `matmul`, so that it allocates nothing; kernels are compiled on the way."""
        return self.cupy.empty(ss.workspace_bytes(m, packed, dtype), np.uint8)

    def host(self, array: Any, rows: Any = None, columns: Any = None) -> Any:
        """A NumPy copy of some rows and columns of a matrix, bit for bit."""
        bits = array.view(f"u{array.itemsize}")  # types that CuPy cannot gather
        if rows is not None:
            bits = bits[self.cupy.asarray(rows)]
        if columns is not None:
            bits = bits[:, self.cupy.asarray(columns)]
        return self.cupy.asnumpy(bits).view(array.dtype)

    def unwritten(self, array: Any) -> int:
        """Elements that are still as `poison` left them."""
        return int((array.view(f"u{array.itemsize}") == (1 << 8 * array.itemsize - 1) - 1).sum())

    def free(self) -> None:
        """Give unused memory back, for others to take."""
        self.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    # ---- graphs and clocks ---------------------------------------------------------------------------------------

    def bandwidth(self, count: int) -> dict[str, float]:
        """Bytes a second of a copy of `count` bytes, read and written by a kernel (the driver's is slower), and of a sum."""
        source, target = self.cupy.ones(count // 16, np.complex128), self.cupy.empty(count // 16, np.complex128)
        copy = self.capture([lambda: self.cupy.positive(source, out=target)])
        numbers, total = source.view(np.float32), self.cupy.empty((), np.float32)
        read = self.capture([lambda: numbers.sum(out=total)])
        return {
            name: x * count / median(self.bursts(launch)) * 1e6 for name, x, launch in (("copy", 2, copy), ("read", 1, read))
        }

    def bursts(self, launch: Launch) -> list[float]:
        """Microseconds of one launch, BURSTS times over, each in a short run after a pause."""
        launch()
        count = replays(self.timed(launch, 1))
        return [self.burst(launch, count) for _ in range(BURSTS)]

    def sustained(self, launch: Launch) -> tuple[list[float], dict[str, float | None]]:
        """Microseconds of one launch, a span of about 20 ms at a time, after half a second of the same; and mean readings."""
        launch()
        count = max(1, round(SPAN_S * 1e6 / max(self.timed(launch, 1), 1.0)))
        event = self.cupy.cuda.Event
        marks, reached, samples = [event()], list[float](), list[dict[str, float]]()

        def reach(mark: Any) -> None:
            mark.synchronize()
            reached.append(time.perf_counter())
            samples.append(self.sample())

        marks[0].record(self.stream)
        began = time.perf_counter()
        while len(marks) < 4 or reached[-1] - began < WARM_S + TIMED_S:
            for _ in range(count):
                launch()
            marks.append(event())
            marks[-1].record(self.stream)
            if len(marks) > 2:  # two spans ahead of the device, no more: it stays busy while the sensors are read
                reach(marks[-3])
        for mark in marks[-2:]:
            reach(mark)
        warm = next((i for i, at in enumerate(reached) if at - began >= WARM_S), 0)
        warm = min(warm, len(marks) - 2)
        elapsed = self.cupy.cuda.get_elapsed_time
        us = [elapsed(a, b) * 1e3 / count for a, b in zip(marks[warm:], marks[warm + 1 :], strict=False)]
        return us, means(samples[warm:-1])  # the last is read when all is done

    def host_us(self, call: Call) -> list[float]:
        """Microseconds by the host's clock, of a call that waits for the device, several times over."""
        call()
        times = []
        for _ in range(BURSTS):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            times.append((time.perf_counter() - began) * 1e6)
        return times

    # ---- sensors -------------------------------------------------------------------------------------------------

    def sample(self) -> dict[str, float]:
        """Clock, temperature, power, and energy since the driver was loaded, as far as they can be read; `at` in seconds."""
        nvml, found = self._nvml, {"at": time.perf_counter()}
        if nvml is None:
            return found
        readings: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("sm_mhz", lambda: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)),
            ("celsius", lambda: nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)),
            ("watts", lambda: nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000),
            ("joules", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000),
        )
        for name, read in readings:
            with contextlib.suppress(Exception):  # a reading that this device lacks
                found[name] = float(read())
        return found


def means(samples: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Of readings under steady load: sm_mhz, celsius, watts; None for what was not read.

    Power is the slope of the energy counter between its first and last change, where it changed at least twice, since the power
    reading itself is an average over a second; else the mean reading.
    """
    found: dict[str, float | None] = {}
    for name in ("sm_mhz", "celsius", "watts"):
        values = [sample[name] for sample in samples if name in sample]
        found[name] = fmean(values) if values else None
    counted = [(sample["at"], sample["joules"]) for sample in samples if "joules" in sample]
    changes = [after for before, after in itertools.pairwise(counted) if after[1] != before[1]]
    if len(changes) > 1:
        (t0, j0), (t1, j1) = changes[0], changes[-1]
        found["watts"] = (j1 - j0) / (t1 - t0)
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
