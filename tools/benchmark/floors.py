"""The least time a measurement can take: its operations at the instruction's ceiling, or its bytes at memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Results
from .selection import KINDS, Kind, slid_k

CEILINGS = {
    "NVIDIA H200": {
        "fp8": {"burst": 3172e12, "sustained": 2763e12},
        "int8": {"burst": 3350e12, "sustained": 3152e12},
        "bf16": {"burst": 1662e12, "sustained": 1495e12},
        "fp16": {"burst": 1662e12, "sustained": 1495e12},
    }
}
"""Device -> type -> operations a second of wgmma.sp m64n256 alone, both operands in shared memory, nothing loaded, random
operands, 132 processors: measured 2026-11-22 in bursts of a few milliseconds and after half a second of load. They count two
operations for each of the m n ks products of the slid weights, zeros too. fp16 has bf16's, whose rate it shares."""


@dataclass(frozen=True)
class Work:
    """What a product, or a quantization, must do at least.

    Attributes:
        flops: 2 m n k: operations of the dense product, which ratios and TFLOP/s are counted in.
        slid_flops: 2 m n ks: what the sparse instruction is asked for.
        bytes: read and written, each once.
    """

    flops: float
    slid_flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.slid_flops + other.slid_flops, self.bytes + other.bytes)


def packed_bytes(kind: Kind, pattern: str, n: int, k: int) -> int:
    """Values, indices and scales of packed weights: `PackedWeight.nbytes`."""
    ks = slid_k(pattern, k)
    return n * (ks // 2 * kind.size + ks // 8 + 4 * kind.quantized)


def work(part: str, kind: Kind, pattern: str, m: int | None, n: int, k: int) -> Work:
    """Of one layer. Activations are counted as they are, not as any kernel lays them out."""
    weights, x16 = packed_bytes(kind, pattern, n, k), (m or 0) * k * 2
    x = (m or 0) * (k * kind.size + 4 * kind.quantized)
    if part == "pack":
        return Work(0, 0, n * k * 2 + weights)
    if part == "quantize":
        return Work(0, 0, x16 + x)
    rows = m or 0
    return Work(
        2.0 * rows * n * k, 2.0 * rows * n * slid_k(pattern, k), weights + (x16 if part == "linear" else x) + rows * n * 2
    )


def floor_us(
    results: Results, part: str, type: str, pattern: str, layers: list[tuple[str, int, int]], m: int | None, load: str
) -> float | None:
    """The sum of the layers' floors in microseconds; None if no bandwidth was measured."""
    if not results.bandwidth:
        return None
    bandwidth = max(results.bandwidth.values())  # of a copy, or of reading alone, which few tokens amount to
    rate = results.ceilings.get(type, {}).get(load)
    total = 0.0
    for _, n, k in layers:
        least = work(part, KINDS[type], pattern, m, n, k)
        total += max(least.bytes / bandwidth, least.slid_flops / rate if rate else 0.0) * 1e6
    return total
