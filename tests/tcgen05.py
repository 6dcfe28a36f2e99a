"""A pair of thread blocks on sm_100 in NumPy: both memories, barriers, copies, the tensor cores, and the threads of gemm.cu.

The threads take the descriptors, addresses and steps that the kernel gets, from `Config.defines`. The instructions read them by
code of their own, written from the PTX ISA. Copies, arrivals and products end at random times, and the destination of a copy
holds garbage until then. So y is wrong, or the model fails, if a thread reads early, if a slot or sums are overwritten early,
or if a wait never ends.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from slidesparse_nb.arch.sm100 import Config
from slidesparse_nb.core.dtypes import BFLOAT16, CUDA_CODES, FLOAT8, FLOAT16, INT8, DType
from slidesparse_nb.core.problem import GemmProblem

Array = Any
Wait = tuple["Barrier", int]
"""A barrier, and the parity of the phase that a thread waits for."""
Thread = Generator["Wait | None", None, None]

TYPES: Mapping[tuple[str, int], DType] = {
    ("i8", 1): INT8, ("f8f6f4", 0): FLOAT8, ("f16", 0): FLOAT16, ("f16", 1): BFLOAT16,
}  # fmt: skip
KINDS = {INT8: "i8", FLOAT8: "f8f6f4", BFLOAT16: "f16", FLOAT16: "f16"}
"""Of the instruction, which the kernel names by its type."""


class Barrier:
    """An mbarrier."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.bytes = self.phase = 0

    def arrive(self, expected: int = 0) -> None:
        assert self.pending, "more arrivals than a phase has"
        self.bytes += expected
        self.pending -= 1
        self._complete()

    def complete(self, size: int) -> None:
        self.bytes -= size
        assert self.bytes >= 0, "more bytes than were announced"
        self._complete()

    def _complete(self) -> None:
        if not self.pending and not self.bytes:
            self.phase, self.pending = self.phase + 1, self.arrivals

    def passes(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Block:
    """Shared memory, tensor memory and barriers of one thread block."""

    def __init__(self, rank: int, stages: int, shared_bytes: int) -> None:
        self.rank = rank
        self.shared = np.full(shared_bytes, 0xA5, np.uint8)
        self.tensor = np.full((128, 512), 0xA5A5A5A5, np.uint32)
        self.full = [Barrier(2 if rank == 0 else 1) for _ in range(stages)]
        self.empty = [Barrier(1) for _ in range(stages)]
        self.sums_full, self.sums_empty = Barrier(1), Barrier(8)


# ---- the instructions, as the manual describes them ------------------------------------------------------------------


def columns(address: int, count: int) -> slice:
    """Columns of tensor memory from an address in lane 0 on."""
    assert address >> 16 == 0
    assert address + count <= 512
    return slice(address, address + count)


def rows_of(shared: Array, descriptor: int, rows: int, size: int) -> Array:
    """What a shared memory descriptor names: uint8 [rows, size], of a K-major operand."""
    return shared[places(descriptor, rows, size)]


@functools.cache
def places(descriptor: int, rows: int, size: int) -> Array:
    """Where it is in shared memory."""
    assert descriptor >> 46 & 7 == 1, "version"
    assert not descriptor >> 49 & 0xFFF, "base offset, mode, reserved bits"
    width, mask = {0: (16, 0), 6: (32, 1), 4: (64, 3), 2: (128, 7)}[descriptor >> 61]
    row, byte = np.arange(rows)[:, None], np.arange(size)
    at = (descriptor & 0x3FFF) * 16 + row // 8 * (descriptor >> 32 & 0x3FFF) * 16 + row % 8 * width + byte
    return at ^ (at >> 7 & mask) << 4


def tcgen05_cp(block: Block, to: int, descriptor: int) -> None:
    """.128x128b: 128 rows of 16 bytes."""
    block.tensor[:, columns(to, 4)] = np.ascontiguousarray(rows_of(block.shared, descriptor, 128, 16)).view(np.uint32)


def positions(block: Block, address: int, selector: int, dtype: DType) -> Array:
    """Nibbles of an instruction's metadata: uint8 [128 rows, 16 or 8 windows of four columns]."""
    lane = np.arange(128)
    if dtype.bits == 8:
        assert selector == 0
        words, shifts = block.tensor[:, columns(address, 2)], np.arange(0, 32, 4, dtype=np.uint32)
        return (words[:, :, None] >> shifts & 15).reshape(128, 16)
    assert address % 2 == 0, "the selector tells which column of a pair"
    assert selector < 2
    word = block.tensor[:, columns(address + selector, 1)][:, 0]
    half = [word[lane % 8 + lane // 16 * 16 + 8 * h] >> (16 * (lane // 8 % 2)).astype(np.uint32) for h in (0, 1)]
    shifts = np.arange(0, 16, 4, dtype=np.uint32)
    return np.concatenate([h[:, None] >> shifts & 15 for h in half], 1)


def tcgen05_mma_sp(pair: list[Block], kind: str, d: int, a: int, b: int, metadata: int, instruction: int, add: bool) -> None:
    """cta_group::2: each block's rows of A times both blocks' tokens."""
    assert instruction >> 2 & 1, "dense"
    assert not instruction & (1 << 3 | 1 << 6 | 0xF << 13 | 1 << 23 | 1 << 29 | 3 << 30), "saturation, negation, transposition"
    assert instruction >> 24 & 31 == 256 >> 4
    n = (instruction >> 17 & 63) * 8
    assert n % (32 if kind == "i8" else 16) == 0
    dtype, other = TYPES[kind, instruction >> 7 & 7], TYPES[kind, instruction >> 10 & 7]
    sums = {1: np.float32, 2: np.int32}[instruction >> 4 & 3]
    assert (sums is np.int32) == (kind == "i8")
    tokens = np.concatenate([rows_of(block.shared, b, n // 2, 64) for block in pair]).view(other.numpy)
    for block in pair:
        kept = np.ascontiguousarray(rows_of(block.shared, a, 128, 32)).view(dtype.numpy)
        nibble = positions(block, metadata, instruction & 3, dtype)
        first, second = nibble & 3, nibble >> 2
        assert (first < second).all(), "unordered metadata"
        dense = np.zeros((128, tokens.shape[1]), np.float32)
        window = 4 * np.arange(nibble.shape[1])
        np.put_along_axis(dense, window + first, kept[:, 0::2].astype(np.float32), 1)
        np.put_along_axis(dense, window + second, kept[:, 1::2].astype(np.float32), 1)
        held = block.tensor[:, columns(d, n)]
        with np.errstate(invalid="ignore", over="ignore"):
            product = (dense @ tokens.astype(np.float32).T).astype(sums)
            held[...] = (held.view(sums) + product if add else product).view(np.uint32)


# ---- the kernel ------------------------------------------------------------------------------------------------------


class Pair:
    """One pair of thread blocks of a launch of gemm.cu.

    Args:
        x, weights: bytes of the operands.
        scales: of tokens [m] and outputs [n]; bias [n]; all float32.
        y: float32 [m, n], written.
        defines: in place of the launch's.
        fault: a mistake that a thread makes.
    """

    def __init__(
        self, config: Config, problem: GemmProblem, x: Array, weights: Array, scales: tuple[Array, Array], bias: Array,
        y: Array, number: int, rng: np.random.Generator, defines: Mapping[str, int | str] | None = None, fault: str = "",
    ) -> None:  # fmt: skip
        told = {**config.defines(), **(defines or {})}
        self.say = {name: int(str(value), 0) for name, value in told.items() if name != "STEPS"}
        self.steps = [tuple(map(int, re.findall(r"\d+", step))) for step in re.findall(r"{(.*?)}", str(told["STEPS"]))]
        named = {code: name for name, code in CUDA_CODES.items()}[self.say["DTYPE"]]
        self.dtype = next(dtype for dtype in KINDS if dtype.name == named)
        self.problem, self.arguments = problem, config.arguments(problem)
        self.pairs, self.number, self.rng, self.fault = config.grid(problem)[0] // 2, number, rng, fault
        self.x, self.weights, self.scales, self.bias, self.y = x.reshape(-1), weights.reshape(-1), scales, bias, y
        self.blocks = 2 if self.dtype.bits == 16 else 1
        self.block_bytes, self.weight_bytes = self.say["TOKENS"] // 2 * 128, self.blocks * 8192 + 2048
        self.pair = [Block(rank, self.say["STAGES"], self.say["SHARED_BYTES"]) for rank in (0, 1)]
        self.tensor_cores: list[Callable[[], None]] = []  # what they do, in order
        self.later: list[Callable[[], None]] = []  # copies and commits, which end at any time
        self.arrivals: list[Callable[[], None]] = []  # of threads, on the other block's barriers; done before the threads end

    def run(self) -> None:
        """To the end, in a random order, in which some threads and some kinds of events are much slower than others."""
        threads: list[Thread] = []
        for block in self.pair:
            threads += [self.produce(block), self.multiply() if block.rank == 0 else self.relay(block)]
            threads += [self.epilogue(block, warp) for warp in range(4)]
        waits: dict[Thread, Wait | None] = dict.fromkeys(threads)
        slow = self.rng.random(len(threads)) < self.rng.choice([0, 0.4])
        speeds = dict(zip(threads, np.where(slow, 0.01, 1), strict=True))
        rates = self.rng.choice([3, 3, 0.003], 3)
        while waits:
            ready = [thread for thread, wait in waits.items() if wait is None or wait[0].passes(wait[1])]
            events = [self.later, self.arrivals, self.tensor_cores]
            odds = [*(speeds[thread] for thread in ready), *(rate * bool(e) for rate, e in zip(rates, events, strict=True))]
            ends = np.cumsum(odds)
            assert ends[-1], "deadlock"
            chosen = int(np.searchsorted(ends, self.rng.random() * ends[-1], "right"))
            if chosen < len(ready):
                try:
                    waits[ready[chosen]] = next(ready[chosen])
                except StopIteration:
                    del waits[ready[chosen]]
            else:
                queue = events[chosen - len(ready)]
                event = 0 if queue is self.tensor_cores else int(self.rng.integers(len(queue)))  # which go in order
                queue.pop(event)()
        assert not self.later, "something is under way to a block that has ended"
        assert not self.tensor_cores, "something is under way in a block that has ended"

    def work(self) -> Generator[tuple[int, int, int], None, None]:
        """Tiles of this pair: number, tile along n, tile along m. scheduler.cuh"""
        group = self.arguments["raster_group"]
        tiles_m, tiles_n = -(-self.problem.m // self.say["TOKENS"]), -(-self.problem.n // 256)
        for number, tile in enumerate(range(self.number, tiles_m * tiles_n, self.pairs)):
            before = tile // (group * tiles_m) * group
            inside, width = tile - before * tiles_m, max(1, min(tiles_n - before, group))
            yield number, before + inside % width, inside // width

    def slots(self, parity: int) -> Generator[tuple[int, int], None, None]:
        while True:
            for slot in range(self.say["STAGES"]):
                yield slot, parity
            parity ^= 1

    def copy(self, block: Block, to: int, operand: Array, at: int, size: int, barrier: Barrier) -> None:
        assert to % 16 == at % 16 == size % 16 == 0
        assert at + size <= len(operand)
        block.shared[to : to + size] = 0x7F  # until the bytes have arrived

        def arrived() -> None:
            block.shared[to : to + size] = operand[at : at + size]
            barrier.complete(size)

        self.later.append(arrived)

    def produce(self, block: Block) -> Thread:
        say, rows, row_tiles = self.say, -(-self.problem.m // 8) * 8, -(-self.problem.n // 256) * 2
        slots = self.slots(0 if self.fault == "slots start full" else 1)
        for _, tile_n, tile_m in self.work():
            first = tile_m * say["TOKENS"] + block.rank * (say["TOKENS"] // 2)
            size = max(0, min(rows - first, say["TOKENS"] // 2)) * 128
            for k_tile in range(self.arguments["k_tiles"]):
                slot, parity = next(slots)
                full, to = block.full[slot], slot * say["STAGE_BYTES"]
                if self.fault != "loads do not wait":
                    yield block.empty[slot], parity
                full.arrive(self.weight_bytes + self.blocks * size)
                at = ((k_tile * row_tiles) + 2 * tile_n + block.rank) * self.weight_bytes
                self.copy(block, to + say["VALUES_AT"], self.weights, at, self.weight_bytes, full)
                for b in range(self.blocks if size else 0):
                    at = ((k_tile * self.blocks + b) * rows + first) * 128
                    self.copy(block, to + b * self.block_bytes, self.x, at, size, full)
                yield None
        if self.fault == "loads end early":
            return
        for _ in range(say["STAGES"]):
            slot, parity = next(slots)
            yield block.empty[slot], parity

    def commit(self, name: str, slot: int | None = None) -> None:
        """On both blocks' barriers, after all that was issued before."""
        for block in self.pair:
            found = getattr(block, name)
            barrier = found if slot is None else found[slot]
            self.tensor_cores.append(lambda barrier=barrier: self.later.append(barrier.arrive))

    def multiply(self) -> Thread:
        say, leader, slots = self.say, self.pair[0], self.slots(0)
        for number, _, _ in self.work():
            if self.fault != "sums are not waited for":
                yield leader.sums_empty, number % 2 ^ 1
            sums = number % 2 * say["SECOND_COLUMN"]
            for k_tile in range(self.arguments["k_tiles"]):
                slot, parity = next(slots)
                yield leader.full[slot], parity
                stage, metadata = slot * say["STAGE_BYTES"] >> 4, say["METADATA_COLUMN"] + slot * 4
                if self.fault == "metadata share a slot":
                    metadata = say["METADATA_COLUMN"]
                for block in self.pair:  # may execute before what was issued earlier: only cp -> mma is ordered
                    tcgen05_cp(block, metadata, say["METADATA_DESCRIPTOR"] + stage + (say["METADATA_AT"] >> 4))
                if self.fault == "slots are released early":
                    self.commit("empty", slot)
                a = say["VALUES_DESCRIPTOR"] + stage + (say["VALUES_AT"] >> 4)
                b = say["ACTIVATIONS_DESCRIPTOR"] + stage
                for i, (of_b, of_a, column, selector) in enumerate(self.steps):
                    given = (sums, a + of_a, b + of_b, metadata + column, say["INSTRUCTION_DESCRIPTOR"] | selector)
                    self.tensor_cores.append(
                        lambda given=given, add=k_tile > 0 or i > 0: tcgen05_mma_sp(self.pair, KINDS[self.dtype], *given, add)
                    )
                if self.fault != "slots are released early":
                    self.commit("empty", slot)
                yield None
            self.commit("sums_full")

    def relay(self, block: Block) -> Thread:
        slots = self.slots(0)
        for _ in self.work():
            for _ in range(self.arguments["k_tiles"]):
                slot, parity = next(slots)
                if self.fault != "relay does not wait":
                    yield block.full[slot], parity
                self.arrivals.append(self.pair[0].full[slot].arrive)

    def epilogue(self, block: Block, warp: int) -> Thread:
        say, problem, chunks = self.say, self.problem, self.say["TOKENS"] // 32
        for number, tile_n, tile_m in self.work():
            chosen = number % 2
            n = (2 * tile_n + block.rank) * 128 + 32 * warp
            outputs = slice(n, max(n, min(n + 32, problem.n)))
            yield block.sums_full, chosen
            for c in range(chunks):
                first = not chosen if self.fault == "the shared chunk is read last" else chosen
                at = (c if first else chunks - 1 - c) * 32
                m0 = tile_m * say["TOKENS"] + at
                tokens = slice(m0, max(m0, min(m0 + 32, problem.m)))
                if c == 0 and self.fault == "sums are released early":
                    self.arrivals.append(self.pair[0].sums_empty.arrive)
                    yield None
                address = (32 * warp << 16) + chosen * say["SECOND_COLUMN"] + at
                lanes = address >> 16
                sums = block.tensor[lanes : lanes + 32, columns(address & 0xFFFF, 32)].copy()
                if c == 0 and self.fault != "sums are released early":
                    self.arrivals.append(self.pair[0].sums_empty.arrive)
                v = (sums.view(np.int32) if self.dtype is INT8 else sums.view(np.float32)).astype(np.float32).T
                v = v[: tokens.stop - tokens.start, : outputs.stop - outputs.start]
                with np.errstate(invalid="ignore", over="ignore"):
                    if self.dtype.bits == 8:
                        v = v * self.scales[0][tokens, None] * self.scales[1][outputs]
                    self.y[tokens, outputs] = v + self.bias[outputs]
                yield None
