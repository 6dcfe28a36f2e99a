"""The sparse instruction over pairs, `mma.sp` of .kind::mxf4nvf4: a NumPy model of its registers, fed by what the kernel loads.

No GPU of ours has it. The model is the PTX ISA's tables for m16n8k128 with scale_vec::4X (NVFP4) and 2X (MXFP4); the kernel's
loads from arranged weights and rows of x must give the reference's products, and every way to load wrongly must change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy_gpu import numpy_for_cupy

from slidesparse_nb.arch import sm80, sm80_fp4, sm80_layout
from slidesparse_nb.arch.operand import SCALED_BLOCK, scaled_rows
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import FLOAT4, DType
from slidesparse_nb.core.packed import ORDERED_NIBBLES, PackedWeight
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import SCHEMES, Block, Scheme

PAIRED = [SCHEMES["NVFP4"], SCHEMES["MXFP4"]]
schemes = pytest.mark.parametrize("scheme", PAIRED, ids=str)
LANE = np.arange(32)
G, Q = LANE >> 2, LANE & 3
BYTE = 8 * np.arange(4, dtype=np.uint32)
PATTERNS = ["2:4", "4:6", "6:8", "8:10", "14:16", "16:18"]
Array = Any


# ---- the instruction, from the tables of the PTX ISA -----------------------------------------------------------------


def nibbles_of(words: Array) -> Array:
    return words[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & np.uint32(15)


def scales_of(words: Array, scale: DType, byte: int) -> Array:
    """The scales of each word, from `byte` on: four of e4m3, whose sign bit is ignored, or two of e8m0."""
    e4m3 = scale.name == "float8_e4m3fn"
    codes = (words[..., None] >> BYTE & np.uint32(0x7F if e4m3 else 0xFF)).astype(np.uint8)[..., byte:]
    return codes[..., : 4 if e4m3 else 2].view(scale.numpy).astype(np.float64)


def mma_sp_fp4(
    block: Block, byte: int, a: Array, e: Array, b: Array, scale_a: Array, scale_b: Array, threads: tuple[int, int] = (0, 0)
) -> Array:
    """D [16, 8] of one m16n8k128: registers a [32, 4], e [32], b [32, 4], words of scales [32] for A and for B.

    byte: where a word's scales begin; 0 with block scales for 32 columns, 0 or 2 for 64.
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
    count = 128 // block.columns
    row, column = np.zeros((16, count)), np.zeros((8, count))
    for g in range(8):
        for half in range(2):
            row[g + 8 * half] = scales_of(scale_a[4 * g + 2 * threads[0] + half], block.scale, byte)
        column[g] = scales_of(scale_b[4 * g + threads[1]], block.scale, byte)
    dense = np.zeros((16, 16, 4, 2))
    i0, i1 = pairs & 3, pairs >> 2
    assert (i0 < i1).all()
    kept = kept.reshape(16, 16, 2, 2)
    for i, at in enumerate((i0, i1)):
        np.put_along_axis(dense, at[..., None, None], kept[:, :, i : i + 1], axis=2)
    scaled = dense.reshape(16, count, block.columns) * row[..., None]
    return scaled.reshape(16, 128) @ (x.reshape(8, count, block.columns) * column[..., None]).reshape(8, 128).T


# ---- the kernel's loads ------------------------------------------------------------------------------------------------


def loads(block: Block, weights: Array, rows: Array, step: int) -> tuple[Any, ...]:
    """What lanes give the instruction: of a block, a row tile [block_bytes] and rows [8, stride] -> byte, a, e, b, scales."""
    lay = sm80_fp4.layout(block)
    steps, word = lay.steps, step * lay.scales // 4 // lay.steps
    byte = 0 if lay.scales == 8 else 2 * step
    a = weights[512 * step : 512 * (step + 1)].view(np.uint32).reshape(32, 4)
    e = weights[512 * steps :][128 * step : 128 * (step + 1)].view(np.uint32)
    scale_a = weights[640 * steps :].view(np.uint32)[16 * word + 2 * G + Q % 2]
    words = np.ascontiguousarray(rows).view(np.uint32)
    b = np.empty((32, 4), np.uint32)
    for r in range(4):  # ldmatrix: lane 8 r + g points to 16 bytes, whose words the lanes of quad g get as register r
        for g in range(8):
            start = 64 * step + 16 * r
            b[4 * g : 4 * g + 4, r] = words[g, start // 4 : start // 4 + 4]
    return byte, a, e, b, scale_a, words[G, 4 * lay.words + word]


Change = Callable[..., tuple[Any, ...]]
"""Spoils what an instruction is given."""


def unchanged(*given: Any) -> tuple[Any, ...]:
    return given


def block_of(scheme: Scheme) -> Block:
    assert scheme.activations.block is not None
    return scheme.activations.block


def product(packed: PackedWeight, x: Array, change: Change = unchanged) -> Array:
    """acc [8, n] of x [8, k] by the kernel's steps."""
    q, block_scale, _ = reference.quantize_blocks(reference.lift(x, packed.pattern), packed.scheme.activations)
    return multiplied(
        packed, scaled_rows(reference.pack_nibbles(q), block_scale.view(np.uint8), block_of(packed.scheme)), change
    )


def multiplied(packed: PackedWeight, rows: Array, change: Change = unchanged) -> Array:
    """acc [8, n] of eight rows as the kernel loads them, by its steps in its order, in float64."""
    of, arranged = block_of(packed.scheme), sm80_fp4.arrange(packed)
    lay = sm80_fp4.layout(of)
    assert rows.shape == (8, sm80_fp4.operand(packed.pattern, packed.k, of).row_bytes)
    blocks, tiles, size = arranged.shape
    assert size == lay.block_bytes
    acc = np.zeros((tiles, 16, 8))
    for block in range(blocks):
        here = rows[:, lay.stride * block : lay.stride * (block + 1)]
        for tile in range(-(-packed.n // 16)):
            for step in range(lay.steps):
                byte, *given = loads(of, arranged[block, tile], here, step)
                acc[tile] += mma_sp_fp4(of, byte, *change(*given))
    return acc.reshape(-1, 8)[: packed.n].T


def operands(scheme: Scheme, text: str, n: int, k: int) -> tuple[PackedWeight, Array]:
    """Weights and x [8, k] whose magnitudes differ from block to block, so that scales do, and among them zeros."""
    rng = np.random.default_rng(n + k)
    w, x = (
        rng.standard_normal((rows, k)) * np.exp2(rng.integers(-5, 3, (rows, k // 8 + 1)).repeat(8, 1)[:, :k]) for rows in (n, 8)
    )
    w, x = (np.where(rng.random(v.shape) < 0.2, 0, v).astype(np.float32) for v in (w, x))
    pattern = scheme.pattern(text)
    return reference.pack(reference.prune(w, pattern), pattern, scheme), x


def exactly(packed: PackedWeight, x: Array) -> Array:
    """The reference's sums of products before the float32 scales, in float64."""
    xs, _ = reference.lifted(x, packed.pattern, packed.scheme)
    slid = reference.decompress(reference.stored_values(packed), packed.meta, 2)
    return xs.astype(np.float64) @ slid.astype(np.float64).T


@schemes
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize(("n", "k"), [(19, 301), (16, 32), (1, 7), (33, 700)])
def test_what_the_kernel_loads_is_the_references_product(scheme: Scheme, text: str, n: int, k: int) -> None:
    packed, x = operands(scheme, text, n, k)
    np.testing.assert_array_equal(product(packed, x), exactly(packed, x))


@schemes
def test_every_nibble_and_value_in_every_lane(scheme: Scheme) -> None:
    """Of the operands that faults are shown with: all six index nibbles, all values, many scales."""
    packed, _ = operands(scheme, "6:8", 256, 4096)
    arranged, steps = sm80_fp4.arrange(packed), sm80_fp4.layout(block_of(scheme)).steps
    words = arranged[..., 512 * steps : 640 * steps].view(np.uint32).reshape(-1, 32)
    for lane in range(32):
        assert set(nibbles_of(words[:, lane]).ravel()) == set(ORDERED_NIBBLES)
    values = nibbles_of(arranged[..., : 512 * steps].view(np.uint32).reshape(-1, 32, 4))
    assert all(set(values[:, lane].ravel()) == set(range(16)) - {8} for lane in range(32))
    assert len(np.unique(packed.block_scale.view(np.uint8))) > (50 if scheme.name == "NVFP4" else 7)


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
    "no scales": lambda a, e, b, sa, sb: (a, e, b, np.full_like(sa, 0x38383838), sb),  # of e8m0 some other power of two
}


@schemes
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_load_is_seen(scheme: Scheme, name: str) -> None:
    packed, x = operands(scheme, "6:8", 16, 301)
    assert (product(packed, x, FAULTS[name]) != exactly(packed, x)).any()


@pytest.fixture(scope="module", params=PAIRED, ids=str)
def first_test(request: pytest.FixtureRequest) -> Callable[[Change], bool]:
    """Whether the test before the first product passes of the kernel's steps, given how their operands are spoilt."""
    with pytest.MonkeyPatch.context() as patch, numpy_for_cupy(patch, False, (12, 0)) as gpu:
        problem = GemmProblem(13, 280, 2092, Pattern(6, 8, 2), request.param, "float32", Device((12, 0), 84))
        given, form = gpu.self_test.case(problem), sm80.ARCH.operand(problem.pattern, problem.k, request.param)
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


@schemes
@pytest.mark.parametrize("threads", [(1, 0), (0, 1), (0, 3), (1, 2)])
def test_all_lanes_that_selectors_can_name_hold_scales(scheme: Scheme, threads: tuple[int, int]) -> None:
    """The kernel selects lanes 0 and 1 of a quad, and 0; the others hold the same words, whatever hardware reads."""
    (packed, _), block = operands(scheme, "6:8", 16, 301), block_of(scheme)
    here = scaled_rows(*(np.zeros((8, size), np.uint8) for size in (128, 4)), block)
    here[:] = np.arange(here.size).reshape(here.shape) % 97
    given = loads(block, sm80_fp4.arrange(packed)[0, 0], here, 1)
    np.testing.assert_array_equal(mma_sp_fp4(block, *given, threads), mma_sp_fp4(block, *given))


def test_loads_meet_no_bank_conflict() -> None:
    """Eight rows of ldmatrix, and the scale words of eight rows, fall on different banks of 4 bytes."""
    for width in (16, 4):
        banks = (np.arange(8)[:, None] * SCALED_BLOCK + 4 * np.arange(width // 4)) // 4 % 32
        assert len(np.unique(banks)) == banks.size


@schemes
def test_windows_lie_in_their_natural_order(scheme: Scheme) -> None:
    lay = sm80_fp4.layout(block_of(scheme))
    order, swapped = sm80_layout.window_order(lay)
    assert order.ravel().tolist() == list(range(lay.windows))
    assert not swapped.any()


@schemes
@pytest.mark.parametrize("capability", sm80.BLOCK_SCALED)
def test_every_tile_fits(capability: tuple[int, int], scheme: Scheme) -> None:
    found = list(sm80.ARCH.kernels(Pattern(6, 8, 2), scheme, "bfloat16", capability))
    assert len(found) == len(sm80.TILES)
    assert all(config.suffix == "a" and config.stages >= 2 for config in found)
    assert all(config.mma_clocks(Device(capability, 84, "NVIDIA GeForce RTX of some year")) == 4 for config in found)
    assert all("stages of 128 pairs" in str(config) for config in found)
    assert all(config.shared_bytes <= sm80.sm_of(capability).block_shared for config in found)
