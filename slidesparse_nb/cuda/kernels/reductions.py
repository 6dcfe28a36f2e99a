"""Reductions over the threads of a block that holds a row; sums are in the order of `reference.sum_of_squares`."""

from __future__ import annotations

import numpy as np

from ..jit.numba import SIMULATED, cuda, device_function
from .ptx import LANES, Float, Word, larger, warp_max, warp_sum

SLOTS = 1024 // LANES
WARP = np.uint32(32)
ZERO, NOTHING = np.uint32(0), np.float32(0)


@device_function("u32", "u32")
def block_max(word: Word) -> Word:
    """The largest word of the block, to all its threads."""
    slots = cuda.shared.array(SLOTS, np.uint32)
    thread, lanes = np.uint32(cuda.threadIdx.x), np.uint32(LANES)
    warps = np.uint32(np.uint32(cuda.blockDim.x) // lanes)
    lane = np.uint32(thread % lanes)
    word = warp_max(word)
    if lane == ZERO:
        slots[np.uint32(thread // lanes)] = word
    cuda.syncthreads()
    word = slots[lane] if lane < warps else ZERO
    if SIMULATED:
        for i in range(warps):
            word = larger(word, slots[i])
    return warp_max(word)


if SIMULATED:

    def block_sum(part: Float) -> Float:
        """`reference.sum_of_squares`'s sum over the threads of a block, to all of them."""
        slots = cuda.shared.array(1024, np.float32)
        slots[cuda.threadIdx.x] = part
        cuda.syncthreads()
        sums = [slots[i] for i in range(cuda.blockDim.x)]
        cuda.syncthreads()
        warps = [_halved(sums[i : i + 32]) for i in range(0, len(sums), 32)]
        return _halved(warps + [NOTHING] * (32 - len(warps)))

    def _halved(sums: list[Float]) -> Float:
        while (half := len(sums) // 2) > 0:
            sums = [np.float32(a) + np.float32(b) for a, b in zip(sums[:half], sums[half:], strict=True)]
        return sums[0]

    in_kernels = cuda.jit(device=True)  # the simulator replaces `cuda` in the modules of these, and of kernels
    block_max, block_sum = in_kernels(block_max), in_kernels(block_sum)
else:

    @device_function("f32", "f32")
    def block_sum(part: Float) -> Float:
        """`reference.sum_of_squares`'s sum over the threads of a block, to all of them."""
        slots = cuda.shared.array(32, np.float32)
        thread = np.uint32(cuda.threadIdx.x)
        lane, warps = np.uint32(thread % WARP), np.uint32(np.uint32(cuda.blockDim.x) // WARP)
        part = warp_sum(part)
        if lane == ZERO:
            slots[np.uint32(thread // WARP)] = part
        cuda.syncthreads()
        return warp_sum(slots[lane] if lane < warps else NOTHING)
