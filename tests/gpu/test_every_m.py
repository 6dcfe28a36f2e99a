"""matmul on a GPU: every m from 1 to 300, in every way that there is; the same bits every time; sharing out at its edges.

Tokens do not know of each other, so one exact product of all of them serves every m. Results are compared on the GPU, and
what is wrong with them is counted there and looked at once.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import cupy as cp
import numpy as np
import pytest
from gemm_cases import (
    Wanted,
    capability_here,
    compile_ahead,
    family,
    gemm,
    of_operands,
    on_gpu,
    product,
    sms_here,
    tokens,
    weight,
    with_expansion,
)

import slidesparse_nb as ss
from slidesparse_nb.arch import MOST_UNQUANTIZED, choose, operand, sm80, sm90
from slidesparse_nb.arch import multiplied as multiplied_by
from slidesparse_nb.core.dtypes import BFLOAT16, INT8, PACKED
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.cuda import tuned_store

__all__ = ["family", "gemm"]  # the fixtures
pytestmark = pytest.mark.gpu

BF16, OUT = BFLOAT16.numpy, "bfloat16"
P = Pattern(6, 8)
MOST = 300
UNWRITTEN = 0x7FA5
"""A NaN that no kernel writes."""

SHAPES = [(200, 520), (131, 20003), (8504, 264)]
"""(n, k): small; split-K in clusters, and rows of x and y that are not aligned; more tiles than SMs, so two launches."""

LAYERS = [(4608, 3584), (3584, 18944), (37888, 512)]
"""(n, k): q, k and v; a down projection; gate and up of few columns, where pairs of 132 blocks share overlapping tiles."""
SOME_M = (1, 7, 16, 33, 64, 100, 129, 256, 300)
RUNS = 50


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(family):
    """Every kernel of the pattern, so that no m waits for one."""
    capability = capability_here()
    schemes = multiplied_by(family, capability)
    compile_ahead([c for scheme in schemes for c in family.kernels(P, scheme, OUT, capability)])


class Tally:
    """What is wrong in each of many cases, counted on the GPU."""

    def __init__(self):
        self.cases, self.counts = [], cp.zeros(1 << 16, np.int64)

    def add(self, case, *counts):
        for count in counts:
            self.counts[len(self.cases)] += count
        self.cases.append(case)

    def check(self):
        counts = self.counts.get()[: len(self.cases)]
        wrong = [(case, int(count)) for case, count in zip(self.cases, counts, strict=True) if count]
        assert not wrong, f"{len(wrong)} of {len(self.cases)} cases are wrong, the first: {wrong[:5]}"


def multiplied(x, packed, m, quantized=False):
    """y [m, n] of the first m tokens, which was NaN before, and how many elements of a row after it were written to.

    Args:
        quantized: x is, beforehand, so that no block does it.
    """
    bits = cp.full((m + 1, packed.n), UNWRITTEN, np.uint16)
    y = bits.view(BF16)[:m]
    ss.matmul(ss.quantize(x[:m], packed) if quantized else x[:m], packed, out=y)
    return y, (bits[m] != UNWRITTEN).sum()


def made(dtype, n, k, most, full):
    """A weight, `most` tokens, the awkward ones not the first, and `product` of them."""
    rng = np.random.default_rng(n + k)
    packed, x = weight(rng, n, k, P, dtype, full), np.roll(tokens(rng, most, k, BF16), 5, axis=0)
    return packed, x, *product(x, packed)


made_once = functools.cache(made)
"""For both kernels."""


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_m(gemm, dtype, shape):
    """The way that is chosen for it, and another one, which is the next with every m."""
    packed, x, exact, magnitude = made_once(dtype, *shape, MOST, shape is not SHAPES[0])
    packed = replace(packed)  # each family arranges it in its own way
    wanted, there, device = Wanted(exact, magnitude, packed), on_gpu(x), gemm.to_device(packed)
    tally = Tally()
    for m in range(1, MOST + 1):
        y, beyond = multiplied(there, packed, m)
        tally.add((m, "chosen"), wanted.off(y), beyond)
        if m % 8 == 1:  # all tiles are of multiples of 8 tokens: those of seven more m are the same
            ways = list(device.arch.candidates(device.problem(m, OUT), device.buffers))
        device.plans[m, OUT] = device.bind(m, OUT, ways[m % len(ways)])
        y, beyond = multiplied(there, packed, m, quantized=m <= MOST_UNQUANTIZED)
        tally.add((m, *map(str, ways[m % len(ways)])), wanted.off(y), beyond)
    tally.check()


# ---- the same bits ---------------------------------------------------------------------------------------------------


def kind(way):
    """What makes ways differ in how they share out the work."""
    products = [c for c in way if not isinstance(c, sm90.Expansion)]
    if isinstance(products[0], sm80.Config):
        return tuple((c.splits > 1,) for c in products)
    return tuple((c.order, c.split_k > 1, c.tile.pairs, c.tile.wide, c.row_tiles[0] > 0) for c in products)


def ways_of_each_kind(asked, buffers):
    """The way that is chosen, and the cheapest of every kind."""
    best = {}
    for _, way in tuned_store.ranked(asked, buffers):
        best.setdefault(kind(way), way)
    return list(dict.fromkeys([choose(asked, buffers), *best.values()]))


class Neighbour:
    """Work on another stream: another product, and a pass over more memory than L2 holds."""

    def __init__(self, dtype):
        self.stream = cp.cuda.Stream(non_blocking=True)
        self.packed = random_weight(1000, 2000, dtype)
        self.x, self.y = random_numbers(90, 2000), cp.empty((90, 1000), BF16)
        self.noise = cp.zeros(32 << 20, np.float32)

    def disturb(self):
        with self.stream:
            ss.matmul(self.x, self.packed, out=self.y)
            cp.add(self.noise, 1, out=self.noise)


def random_numbers(rows, columns):
    return cp.random.default_rng(rows + columns).standard_normal((rows, columns), dtype=np.float32)


def random_weight(n, k, dtype):
    """Packed on the GPU."""
    return ss.pack(random_numbers(n, k), P, dtype, prune="magnitude")


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_every_run_gives_the_same_bits(gemm, family, dtype, shape):
    """Alone, and while another stream keeps SMs, caches and memory busy."""
    n, k = shape
    packed, x, neighbour = random_weight(n, k, dtype), random_numbers(MOST, k), Neighbour(dtype)
    device, tally, kinds = gemm.to_device(packed), Tally(), set()
    main = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with main:
        for m in SOME_M:
            q = ss.quantize(x[:m], packed)
            bits = cp.empty((m, n), np.uint16)
            y = bits.view(BF16)
            for way in ways_of_each_kind(device.problem(m, OUT), tuple(device.buffers)):
                kinds.add(kind(way))
                device.plans[m, OUT] = device.bind(m, OUT, way)
                ss.matmul(q, packed, out=y)
                first = bits.copy()
                for busy in (False, True):
                    differing = cp.zeros((), np.int64)
                    for _ in range(RUNS):
                        if busy:
                            neighbour.disturb()
                        bits.fill(UNWRITTEN)
                        ss.matmul(q, packed, out=y)
                        differing += (bits != first).sum()
                    tally.add((m, busy, *map(str, way)), differing, (first == UNWRITTEN).sum())
        main.synchronize()
    neighbour.stream.synchronize()
    tally.check()
    if family is sm90.ARCH:
        assert any(split for way in kinds for _, split, *_ in way)
        assert any(order == sm90.REST for way in kinds for order, *_ in way) or shape == LAYERS[1]
        assert any(pairs for way in kinds for _, _, pairs, *_ in way) == (shape == LAYERS[2]) or sms_here() != 132
    else:
        assert any(split for way in kinds for (split,) in way) or shape == LAYERS[2]


# ---- edges of sharing out --------------------------------------------------------------------------------------------


def few_stages(stages, dtype):
    """A k, not of whole groups, whose expanded columns fill this number of stages of Hopper's kernel, 128 bytes each."""
    return 8 * (128 * stages * 8 // dtype.bits // 12) - 1


def size_of(config):
    """Outputs and tokens of a tile."""
    return config.tile.n, config.tile.m if isinstance(config, sm80.Config) else config.tile.tokens


def shared_out(config, m, n, stages, sms):
    """The launches of all tiles: on a block an SM, on few, on a block each; split-K."""
    if isinstance(config, sm80.Config):
        return [(config,)]
    config = replace(config, row_tiles=(0, -(-n // 64)))
    tiles = config.tiles(m)
    if config.tile.consumers_load and stages < config.stages:
        return []
    if config.tile.pairs:
        most = (blocks for blocks in (2, 4, sms // 2 * 2) if tiles > blocks and 0 < tiles % blocks <= blocks // 2)
        return [(replace(config, end=tiles, blocks=blocks),) for blocks in most if stages >= 4]
    if config.split_k > 1:
        return [(replace(config, end=tiles, blocks=tiles * config.split_k),)] if stages >= 2 * config.split_k else []
    return [(replace(config, end=tiles, blocks=blocks),) for blocks in dict.fromkeys((min(tiles, sms), min(tiles, 5), tiles))]


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_as_many_tiles_as_processors_and_few_stages(gemm, family, dtype, stages):
    """1 tile, one less than SMs, as many, one more; with one row of tiles and two, of 1 token, or full."""
    sms = sms_here()
    configs = of_operands(family, P, dtype, OUT)
    widest, tallest = (max(size) for size in zip(*map(size_of, configs), strict=True))
    packed, x, exact, magnitude = made(dtype, widest * (sms + 1), few_stages(stages, dtype), tallest + 1, True)
    wanted, there, weights = Wanted(exact, magnitude, packed), on_gpu(x), {}
    tally = Tally()

    for config in configs:
        outputs, full = size_of(config)
        for columns, m in [(c, m) for c in (1, sms - 1, sms, sms + 1) for m in (1, full)] + [(sms // 2, full + 1)]:
            n = outputs * columns - 3
            part = weights[n] = weights.get(n) or packed.rows(0, n)
            device = gemm.to_device(part)
            for way in shared_out(config, m, n, operand.stages(P, packed.k, dtype), sms):
                device.plans[m, OUT] = device.bind(m, OUT, with_expansion(way, device))
                y, beyond = multiplied(there, part, m)
                tally.add((m, *map(str, way)), wanted.off(y), beyond)
    tally.check()
