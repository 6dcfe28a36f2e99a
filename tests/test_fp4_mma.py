"""NVFP4's sparse instruction, `mma.sp` of .kind::mxf4nvf4: a NumPy model of its registers, fed by what the kernel loads.

No GPU of ours has it. The model is the PTX ISA's tables for m16n8k128 with scale_vec::4X; the kernel's loads from arranged
weights and rows of x must give the reference's products, and every way to load wrongly must change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy_gpu import numpy_for_cupy

from slidesparse_nb.arch import sm80, sm80_fp4, sm80_layout
from slidesparse_nb.arch.operand import scaled_rows
from slidesparse_nb.arch.sm80_fp4 import LAYOUT
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import FLOAT4, FLOAT8
from slidesparse_nb.core.packed import ORDERED_NIBBLES, PackedWeight
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import SCHEMES

NVFP4 = SCHEMES["NVFP4"]
LANE = np.arange(32)
G, Q = LANE >> 2, LANE & 3
BYTE = 8 * np.arange(4, dtype=np.uint32)
PATTERNS = ["2:4", "4:6", "6:8", "8:10", "14:16", "16:18"]
Array = Any


# ---- the instruction, from the tables of the PTX ISA -----------------------------------------------------------------


def nibbles_of(words: Array) -> Array:
    return words[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & np.uint32(15)


def ue4m3(words: Array) -> Array:
    """The four scales of each word; the sign bit is ignored."""
    return (words[..., None] >> BYTE & np.uint32(0x7F)).astype(np.uint8).view(FLOAT8.numpy).astype(np.float64)


def mma_sp_nvf4(a: Array, e: Array, b: Array, scale_a: Array, scale_b: Array, threads: tuple[int, int] = (0, 0)) -> Array:
    """D [16, 8] of one m16n8k128: registers a [32, 4], e [32], b [32, 4], words of scales [32] for A and for B.

    threads: lanes 2 t and 2 t + 1 of quad g give the scales of A's rows g and g + 8, lane t of quad g that of B's column g.
    """
    kept, x = np.zeros((16, 64)), np.zeros((8, 128))
    pairs = np.zeros((16, 16), int)
    values = [nibbles_of(part).astype(np.uint8).view(FLOAT4.numpy).astype(np.float64) for part in (a, b)]
    index = nibbles_of(e)
    for lane in LANE:
        g, q = G[lane], Q[lane]
        for r in range(4):
            kept[g + 8 * (r & 1), 32 * (r >> 1) + 8 * q + np.arange(8)] = values[0][lane, r]
            x[g, 32 * r + 8 * q + np.arange(8)] = values[1][lane, r]
        pairs[g + 8 * (q & 1), 8 * (q >> 1) + np.arange(8)] = index[lane]
    row, column = np.zeros((16, 4)), np.zeros((8, 4))
    for g in range(8):
        for half in range(2):
            row[g + 8 * half] = ue4m3(scale_a[4 * g + 2 * threads[0] + half])
        column[g] = ue4m3(scale_b[4 * g + threads[1]])
    dense = np.zeros((16, 16, 4, 2))
    i0, i1 = pairs & 3, pairs >> 2
    assert (i0 < i1).all()
    kept = kept.reshape(16, 16, 2, 2)
    for i, at in enumerate((i0, i1)):
        np.put_along_axis(dense, at[..., None, None], kept[:, :, i : i + 1], axis=2)
    scaled = dense.reshape(16, 4, 32) * row[..., None]
    return scaled.reshape(16, 128) @ (x.reshape(8, 4, 32) * column[..., None]).reshape(8, 128).T


# ---- the kernel's loads ------------------------------------------------------------------------------------------------


def loads(weights: Array, rows: Array, step: int) -> tuple[Array, ...]:
    """What lanes give the instruction: of a block, a row tile [block_bytes] and rows [8, stride] -> a, e, b and scales."""
    steps = LAYOUT.steps
    a = weights[512 * step : 512 * (step + 1)].view(np.uint32).reshape(32, 4)
    e = weights[512 * steps :][128 * step : 128 * (step + 1)].view(np.uint32)
    scale_a = weights[640 * steps :].view(np.uint32)[16 * step + 2 * G + Q % 2]
    words = np.ascontiguousarray(rows).view(np.uint32)
    b = np.empty((32, 4), np.uint32)
    for r in range(4):  # ldmatrix: lane 8 r + g points to 16 bytes, whose words the lanes of quad g get as register r
        for g in range(8):
            start = 64 * step + 16 * r
            b[4 * g : 4 * g + 4, r] = words[g, start // 4 : start // 4 + 4]
    return a, e, b, scale_a, words[G, (16 * LAYOUT.words + 4 * step) // 4]


Change = Callable[..., tuple[Array, ...]]
"""Spoils what an instruction is given."""


def unchanged(*given: Array) -> tuple[Array, ...]:
    return given


def product(packed: PackedWeight, x: Array, change: Change = unchanged) -> Array:
    """acc [8, n] of x [8, k] by the kernel's steps."""
    q, block_scale, _ = reference.quantize_blocks(reference.lift(x, packed.pattern), NVFP4.activations)
    return multiplied(packed, scaled_rows(reference.pack_nibbles(q), block_scale.view(np.uint8)), change)


def multiplied(packed: PackedWeight, rows: Array, change: Change = unchanged) -> Array:
    """acc [8, n] of eight rows as the kernel loads them, by its steps in its order, in float64."""
    assert rows.shape == (8, sm80_fp4.row_bytes(packed.pattern, packed.k))
    arranged = sm80_fp4.arrange(packed)
    blocks, tiles, size = arranged.shape
    assert size == LAYOUT.block_bytes
    acc = np.zeros((tiles, 16, 8))
    for block in range(blocks):
        here = rows[:, LAYOUT.stride * block : LAYOUT.stride * (block + 1)]
        for tile in range(-(-packed.n // 16)):
            for step in range(LAYOUT.steps):
                acc[tile] += mma_sp_nvf4(*change(*loads(arranged[block, tile], here, step)))
    return acc.reshape(-1, 8)[: packed.n].T


def operands(text: str, n: int, k: int) -> tuple[PackedWeight, Array]:
    """Weights and x [8, k] whose magnitudes differ from block to block, so that scales do, and among them zeros."""
    rng = np.random.default_rng(n + k)
    w, x = (
        rng.standard_normal((rows, k)) * np.exp2(rng.integers(-5, 3, (rows, k // 8 + 1)).repeat(8, 1)[:, :k]) for rows in (n, 8)
    )
    w, x = (np.where(rng.random(v.shape) < 0.2, 0, v).astype(np.float32) for v in (w, x))
    pattern = NVFP4.pattern(text)
    return reference.pack(reference.prune(w, pattern), pattern, NVFP4), x


def exactly(packed: PackedWeight, x: Array) -> Array:
    """The reference's sums of products before the float32 scales, in float64."""
    xs, _ = reference.lifted(x, packed.pattern, NVFP4)
    slid = reference.decompress(reference.stored_values(packed), packed.meta, 2)
    return xs.astype(np.float64) @ slid.astype(np.float64).T


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize(("n", "k"), [(19, 301), (16, 32), (1, 7), (33, 700)])
def test_what_the_kernel_loads_is_the_references_product(text: str, n: int, k: int) -> None:
    packed, x = operands(text, n, k)
    np.testing.assert_array_equal(product(packed, x), exactly(packed, x))


def test_every_nibble_and_value_in_every_lane() -> None:
    """Of the operands that faults are shown with: all six index nibbles, all values, many scales."""
    packed, _ = operands("6:8", 256, 4096)
    arranged = sm80_fp4.arrange(packed)
    words = arranged[..., 512 * LAYOUT.steps : 640 * LAYOUT.steps].view(np.uint32).reshape(-1, 32)
    for lane in range(32):
        assert set(nibbles_of(words[:, lane]).ravel()) == set(ORDERED_NIBBLES)
    values = nibbles_of(arranged[..., : 512 * LAYOUT.steps].view(np.uint32).reshape(-1, 32, 4))
    assert all(set(values[:, lane].ravel()) == set(range(16)) - {8} for lane in range(32))
    assert len(np.unique(packed.block_scale.view(np.uint8))) > 50


def only(place: int, change: Callable[[Array], Array]) -> Change:
    def changed(*given: Array) -> tuple[Array, ...]:
        made = list(given)
        made[place] = change(given[place].copy())
        return tuple(made)

    return changed


FAULTS = {
    "values of two lanes": only(0, lambda v: v[LANE ^ 1]),
    "rows of A": only(0, lambda v: v[:, [1, 0, 3, 2]]),
    "halves of k of A": only(0, lambda v: v[:, [2, 3, 0, 1]]),
    "nibbles of a pair of A": only(0, lambda v: v >> 4 & 0x0F0F0F0F | (v & 0x0F0F0F0F) << 4),
    "metadata of two lanes": only(1, lambda v: v[LANE ^ 1]),
    "halves of metadata": only(1, lambda v: v >> 16 | v << 16),
    "registers of B": only(2, lambda v: v[:, [0, 1, 3, 2]]),
    "columns of B": only(2, lambda v: v[LANE ^ 4]),
    "lanes of B": only(2, lambda v: v[LANE ^ 1]),
    "nibbles of a pair of B": only(2, lambda v: v >> 4 & 0x0F0F0F0F | (v & 0x0F0F0F0F) << 4),
    "rows of A's scales": only(3, lambda v: v[LANE ^ 1]),
    "quads of A's scales": only(3, lambda v: v[LANE ^ 4]),
    "bytes of A's scales": only(3, lambda v: v >> 8 | v << 24),
    "quads of B's scales": only(4, lambda v: v[LANE ^ 4]),
    "bytes of B's scales": only(4, lambda v: v >> 8 | v << 24),
    "scales of A and B": lambda a, e, b, sa, sb: (a, e, b, sb, sa),
    "no scales": lambda a, e, b, sa, sb: (a, e, b, np.full_like(sa, 0x38383838), sb),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_load_is_seen(name: str) -> None:
    packed, x = operands("6:8", 16, 301)
    assert (product(packed, x, FAULTS[name]) != exactly(packed, x)).any()


@pytest.fixture(scope="module")
def first_test() -> Callable[[Change], bool]:
    """Whether the test before the first product passes of the kernel's steps, given how their operands are spoilt."""
    with pytest.MonkeyPatch.context() as patch, numpy_for_cupy(patch, False, (12, 0)) as gpu:
        problem = GemmProblem(13, 280, 2092, Pattern(6, 8, 2), NVFP4, "float32", Device((12, 0), 84))
        given, form = gpu.self_test.case(problem), sm80.ARCH.operand(problem.pattern, problem.k, NVFP4)
        rows = gpu.self_test._operand(form, given.x, problem.pattern, given.block_scale)[:8]
    packed, right = given.packed.rows(248, 280), given.y[:8, 248:]

    def passes(change: Change) -> bool:
        acc = multiplied(packed, rows, change).astype(np.float32)
        y = (acc * given.scale_x[:8, None]) * np.asarray(packed.scale)[:, 0] + given.bias[248:]
        return bool((y == right).all())

    return passes


def test_the_test_before_the_first_product_passes(first_test: Callable[[Change], bool]) -> None:
    assert first_test(unchanged)


@pytest.mark.parametrize("name", FAULTS)
def test_the_test_before_the_first_product_sees_a_wrong_load(name: str, first_test: Callable[[Change], bool]) -> None:
    assert not first_test(FAULTS[name])


@pytest.mark.parametrize("threads", [(1, 0), (0, 1), (0, 3), (1, 2)])
def test_all_lanes_that_selectors_can_name_hold_scales(threads: tuple[int, int]) -> None:
    """The kernel selects lanes 0 and 1 of a quad, and 0; the others hold the same words, whatever hardware reads."""
    packed, _ = operands("6:8", 16, 301)
    here = scaled_rows(*(np.zeros((8, size), np.uint8) for size in (128, 8)))
    here[:] = np.arange(here.size).reshape(here.shape) % 97
    given = loads(sm80_fp4.arrange(packed)[0, 0], here, 1)
    np.testing.assert_array_equal(mma_sp_nvf4(*given, threads), mma_sp_nvf4(*given))


def test_loads_meet_no_bank_conflict() -> None:
    """Eight rows of ldmatrix, and the scale words of eight rows, fall on different banks of 4 bytes."""
    for width in (16, 4):
        banks = (np.arange(8)[:, None] * LAYOUT.stride + 4 * np.arange(width // 4)) // 4 % 32
        assert len(np.unique(banks)) == banks.size


def test_windows_lie_in_their_natural_order() -> None:
    order, swapped = sm80_layout.window_order(LAYOUT)
    assert order.ravel().tolist() == list(range(LAYOUT.windows))
    assert not swapped.any()


@pytest.mark.parametrize("capability", sm80.BLOCK_SCALED)
def test_every_tile_fits(capability: tuple[int, int]) -> None:
    found = list(sm80.ARCH.kernels(Pattern(6, 8, 2), FLOAT4, "bfloat16", capability))
    assert len(found) == len(sm80.TILES)
    assert all(config.suffix == "a" and config.stages >= 2 for config in found)
    assert all(config.mma_clocks(Device(capability, 84, "NVIDIA GeForce RTX of some year")) == 4 for config in found)
    assert all("stages of 128 pairs" in str(config) for config in found)
    assert all(config.shared_bytes <= sm80.sm_of(capability).block_shared for config in found)
