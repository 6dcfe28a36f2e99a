"""The GPU, through CuPy: operands, CUDA graphs, and the two ways to time them.

burst       20 ms of idleness, then replays for about two milliseconds; the median of five such
sustained   half a second of replays without a pause, then half a second that is timed and watched
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import slidesparse_nb as ss

from .selection import OURS, Group
from .sensors import Means, Sensors
from .summary import median
from .trial import Call, Launch, Verdict, nothing

IDLE_S = 0.02
BURST_US = 2000.0
BURSTS = 5
WARM_S, TIMED_S, PIECE_S = 0.5, 0.5, 0.02


@dataclass(frozen=True)
class Sustained:
    """Of one replay: times in microseconds, and the means of clock, temperature and power meanwhile."""

    us: list[float]
    means: Means


def open_gpu() -> Gpu:
    """The current CUDA device.

    Raises:
        UnsupportedError: there is none, or no CuPy to reach it.
    """
    for finding in ss.diagnose():
        if finding.part in ("driver", "GPU", "CuPy") and finding.state != "ok":
            raise ss.UnsupportedError(
                f"bench: needs an NVIDIA GPU and CuPy ({finding.part}: {finding.text}); look at published results with"
                " --from FILE.json"
            )
        if finding.part == "CuPy":
            break
    return Gpu(importlib.import_module("cupy"))


class Gpu:
    """Operands, graphs and clocks of the current device.

    Attributes:
        l2_bytes: of its second-level cache.
    """

    def __init__(self, cupy: Any) -> None:
        importlib.import_module("ml_dtypes")  # names bfloat16 for NumPy
        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        self.l2_bytes = int(self.properties["l2CacheSize"])
        self.sensors = Sensors(cupy.cuda.Device().pci_bus_id)
        self._rng = cupy.random.default_rng(20240607)

    def facts(self) -> dict[str, Any]:
        """Device, driver and versions, as the results keep them."""
        runtime, properties = self.cupy.cuda.runtime, self.properties
        return {
            "gpu": _text(properties["name"]),
            "capability": f"{properties['major']}.{properties['minor']}",
            "processors": properties["multiProcessorCount"],
            "memory_bytes": properties["totalGlobalMem"],
            "l2_bytes": self.l2_bytes,
            **self.sensors.facts,
            "before": self.state(),
            "cuda_driver": _version(runtime.driverGetVersion()),
            "cuda_runtime": _version(runtime.runtimeGetVersion()),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cupy": self.cupy.__version__,
        }

    def compile_ahead(self, plan: Sequence[Group]) -> None:
        """Compile the kernels of our products into the cache, on all processors at once."""
        capability = (self.properties["major"], self.properties["minor"])
        products = [
            (group.m, linear.n, linear.k, group.pattern, group.kind.name, group.kind.activations)
            for group in plan
            if group.contender == OURS and group.pattern is not None and group.m is not None
            for linear in group.suite.linears
        ]
        ss.build_products(products, capability, self.properties["multiProcessorCount"])

    def state(self) -> dict[str, float | None]:
        """Clock, temperature and power, now."""
        now = self.sensors.sample()
        return {"sm_mhz": now.sm_mhz, "celsius": now.celsius, "watts": now.watts}

    # ---- operands ------------------------------------------------------------------------------------------------

    def normal(self, rows: int, columns: int, dtype: str) -> Any:
        """Random numbers [rows, columns] of a normal distribution, "bfloat16" or "float16"."""
        return self._rng.standard_normal((rows, columns), dtype=np.float32).astype(np.dtype(dtype))

    def empty(self, rows: int, columns: int, dtype: str) -> Any:
        return self.cupy.empty((rows, columns), np.dtype(dtype))

    def workspace(self, m: int, packed: ss.PackedWeight, dtype: Any) -> Any:
        """What `matmul` needs so that it allocates nothing; kernels are compiled on the way."""
        return self.cupy.zeros(ss.workspace_bytes(m, packed, dtype), np.uint8)

    def host(self, array: Any, rows: Any = None, columns: Any = None) -> Any:
        """A NumPy copy of some rows and columns of a matrix, bit for bit."""
        bits = array.view(f"u{array.itemsize}")  # types that CuPy cannot gather
        if rows is not None:
            bits = bits[self.cupy.asarray(rows)]
        if columns is not None:
            bits = bits[:, self.cupy.asarray(columns)]
        return bits.get().view(array.dtype)

    def poison(self, array: Any) -> None:
        """Fill with NaN."""
        array.view(f"u{array.itemsize}").fill((1 << 8 * array.itemsize - 1) - 1)

    def unwritten(self, array: Any) -> int:
        """Elements that are still as `poison` left them."""
        return int((array.view(f"u{array.itemsize}") == (1 << 8 * array.itemsize - 1) - 1).sum())

    def free(self) -> None:
        """Give unused memory back, for others to take."""
        self.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    # ---- graphs --------------------------------------------------------------------------------------------------

    def capture(self, calls: Sequence[Call]) -> Launch:
        """Run each call once, then capture them all; what they return lives as long as the graph."""
        self.synchronize()  # operands were made on another stream
        with self.stream:
            kept = [call() for call in calls]
            self.stream.synchronize()
            del kept  # so that the memory pool has as much again, and capture needs no more from the driver
            self.stream.begin_capture()
            try:
                kept = [call() for call in calls]
            except BaseException:
                with contextlib.suppress(Exception):
                    self.stream.end_capture()
                raise
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        self.stream.synchronize()
        return _Replay(graph, self.stream, kept)

    def copy_bandwidth(self, count: int) -> float:
        """Bytes a second, read and written, of a device-to-device copy of `count` bytes by a kernel: the driver's is slower."""
        source, target = self.cupy.ones(count // 16, np.complex128), self.cupy.empty(count // 16, np.complex128)
        launch = self.capture([lambda: self.cupy.positive(source, out=target)])
        return 2 * count / median(self.burst(launch)) * 1e6

    def read_bandwidth(self, count: int) -> float:
        """Bytes a second of a sum over `count` bytes."""
        source = self.cupy.ones(count // 4, np.float32)
        total = self.cupy.empty((), np.float32)
        launch = self.capture([lambda: source.sum(out=total)])
        return count / median(self.burst(launch)) * 1e6

    # ---- clocks --------------------------------------------------------------------------------------------------

    def burst(self, launch: Launch, meanwhile: Verdict = nothing) -> list[float]:
        """Microseconds of one launch, several times over, each in a short run after idleness.

        Args:
            meanwhile: called once, while the device is idle for the first time; what it raises ends the burst, untimed.
        """
        launch()
        once = self._timed(launch, 1)
        count = max(1, round(BURST_US / max(once, 1.0)))
        times: list[float] = []
        for _ in range(BURSTS):
            began = time.perf_counter()
            if not times:
                meanwhile()
            time.sleep(max(0.0, IDLE_S - (time.perf_counter() - began)))
            if count > 1:  # the device is busy while the others are queued: launch latency stays out of the time
                launch()
            times.append(self._timed(launch, count))
        return times

    def sustained(self, launch: Launch) -> Sustained:
        """Microseconds of one launch, a piece of about 20 ms at a time, after half a second of the same."""
        launch()
        count = max(1, round(PIECE_S * 1e6 / max(self._timed(launch, 1), 1.0)))
        event = self.cupy.cuda.Event
        marks = []
        reached: list[float] = []
        with self.sensors.watch() as watch:
            marks.append(event())
            marks[0].record(self.stream)
            began = time.perf_counter()
            while len(marks) < 4 or reached[-1] - began < WARM_S + TIMED_S:
                for _ in range(count):
                    launch()
                marks.append(event())
                marks[-1].record(self.stream)
                if len(marks) > 2:  # two pieces ahead of the device, no more
                    marks[-3].synchronize()
                    reached.append(time.perf_counter())
            for mark in marks[-2:]:
                mark.synchronize()
                reached.append(time.perf_counter())
        warm = next((i for i, at in enumerate(reached) if at - began >= WARM_S), 0)
        warm = min(warm, len(marks) - 2)
        elapsed = self.cupy.cuda.get_elapsed_time
        us = [elapsed(a, b) * 1e3 / count for a, b in zip(marks[warm:], marks[warm + 1 :], strict=False)]
        return Sustained(us, watch.means(reached[warm], reached[-1]))

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

    def _timed(self, launch: Launch, count: int) -> float:
        first, last = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        first.record(self.stream)
        for _ in range(count):
            launch()
        last.record(self.stream)
        last.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(first, last)) * 1e3 / count


class _Replay:
    def __init__(self, graph: Any, stream: Any, kept: list[Any]) -> None:
        self._graph, self._stream, self._kept = graph, stream, kept

    def __call__(self) -> None:
        self._graph.launch(self._stream)


def library_version(function: str, *names: str) -> int | None:
    """What a library's own version function says, if one of these names can be loaded."""
    for name in names:
        with contextlib.suppress(OSError, AttributeError):
            version = getattr(ctypes.CDLL(name), function)
            version.restype = ctypes.c_size_t
            return int(version())
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
