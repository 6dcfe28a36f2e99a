"""Times of calls on the current GPU: captured in a CUDA graph, which is replayed in bursts after a pause."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

CACHES = 5
"""L2 caches that a graph's operands fill at least, so that every call finds its weights in DRAM."""

MOST_CALLS = 32
"""Calls in a graph, at most."""

IDLE_S, BURST_US = 0.02, 2000.0
"""Pause before a burst of replays (seconds), and the duration of a burst (microseconds)."""

Launch = Callable[[], None]


def cold_calls(touched: int, l2_bytes: int) -> int:
    """Calls in a graph each of which touches this many bytes of its own."""
    return max(1, min(MOST_CALLS, math.ceil(CACHES * l2_bytes / max(1, touched))))


def replays(us: float) -> int:
    """Replays in a burst, of a graph that takes this many microseconds."""
    return max(1, round(BURST_US / max(1.0, us)))


def poison(array: Any) -> None:
    """Fill with NaN."""
    array.view(f"u{array.itemsize}").fill((1 << 8 * array.itemsize - 1) - 1)


class GpuClock:
    """Graphs and bursts on a stream of the current GPU.

    Raises:
        ImportError: CuPy is missing.
    """

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self.properties = self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.runtime.getDevice())
        self.l2_bytes = int(self.properties["l2CacheSize"])

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Launch:
        """Run each call once, then capture them all; what they return lives as long as the graph."""
        self.cupy.cuda.Device().synchronize()  # operands were made on another stream
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

        def launch(_kept: list[Any] = kept) -> None:
            graph.launch(self.stream)

        return launch

    def burst(self, launch: Launch, replays: int) -> float:
        """Microseconds a launch, of `replays` launches after a pause."""
        time.sleep(IDLE_S)
        if replays > 1:  # the device is busy while the others are queued: launch latency stays out of the time
            launch()
        return self.timed(launch, replays)

    def timed(self, launch: Launch, replays: int) -> float:
        """Microseconds a launch, of `replays` launches at once."""
        first, last = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        first.record(self.stream)
        for _ in range(replays):
            launch()
        last.record(self.stream)
        last.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(first, last)) * 1e3 / replays
