"""matmul on a GPU: every pattern, type, output, tile and awkward shape, against exact products; then how it is called."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cupy as cp
import numpy as np
import pytest
from gemm_cases import (
    capability_here,
    check,
    compare,
    compile_ahead,
    family,
    gemm,
    host,
    of_operands,
    on_gpu,
    product,
    sms_here,
    tokens,
    weight,
    with_expansion,
)

import slidesparse_nb as ss
from slidesparse_nb.arch import multiplied, sm80, sm90
from slidesparse_nb.arch.multiplied_as import as_multiplied
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.cuda.ahead_of_time import launches_of
from slidesparse_nb.cuda.matmul import TiledActivations
from slidesparse_nb.cuda.plan import plan_of
from slidesparse_nb.cuda.weight import shared_plans

__all__ = ["family", "gemm"]  # the fixtures
pytestmark = pytest.mark.gpu

BF16, F16, F32 = BFLOAT16.numpy, FLOAT16.numpy, np.dtype(np.float32)
SHAPES = [(1, 1, 1), (1, 16, 64), (3, 17, 131), (8, 128, 512), (33, 130, 257), (131, 259, 1031), (70, 512, 3072)]
SCHEMES = [*PACKED, ss.Scheme.of("W4A8")]
"""Types of weights that name their scheme, and the one that is multiplied as another."""
TILED = ["2:4", "4:6", "6:8", "14:16"]
"""Patterns of which every kernel is tested."""
OUTS = {"bfloat16": BF16, "float16": F16, "float32": F32}
GUARD = 4096
"""Bytes before and after an output, which must stay as they were."""


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(family):
    """What the tests launch, compiled by all processors at once, as `slidesparse build` does it."""
    capability = capability_here()
    dtypes = [scheme.dtype for scheme in multiplied(family, capability) if not scheme.blocks]
    configs = [c for p, d, out in itertools.product(TILED, dtypes, OUTS) for c in to_test(family, Pattern.of(p), d, out)]
    if family is sm80.ARCH:  # of Hopper's many tiles, these types of y take few
        configs += [
            c
            for d, out in itertools.product(dtypes, OUTS)
            for c in family.kernels(Pattern(6, 8), ss.Scheme.of(d), out, capability)
        ]
    products = [(*shape, p, d, "bfloat16") for p, d, shape in itertools.product(known_patterns(), dtypes, SHAPES)]
    compile_ahead(configs + launches_of(products, capability, sms_here()))


def to_test(family, pattern, dtype, out):
    """The kernels whose tiles and splits are all tested; of y of other types than bfloat16, the oddest epilogues."""
    every = of_operands(family, pattern, dtype, out)
    if out == "bfloat16" or family is sm80.ARCH:
        return every if out == "bfloat16" else []
    return [c for c in every if c.tile.consumers_load or c.tile.pairs or c.split_k == 3 or (c.tile.wide and c.tile.tokens > 64)]


def guarded(m, n, dtype, pitch=None):
    """A poisoned [m, n] array inside a larger one, and a function that checks what surrounds it."""
    dtype, pitch = np.dtype(dtype), pitch or n
    inside = m * pitch * dtype.itemsize
    whole = cp.full(GUARD + inside + GUARD, 0xA5, cp.uint8)
    y = whole[GUARD : GUARD + inside].view(f"u{dtype.itemsize}").reshape(m, pitch)[:, :n].view(dtype)

    def surroundings():
        after = whole.get()
        assert (after[:GUARD] == 0xA5).all()
        assert (after[GUARD + inside :] == 0xA5).all()
        gaps = after[GUARD : GUARD + inside].reshape(m, pitch * dtype.itemsize)[:, n * dtype.itemsize :]
        assert (gaps == 0xA5).all()

    return y, surroundings


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SCHEMES, ids=str)
@pytest.mark.parametrize("pattern", known_patterns(), ids=str)
def test_every_pattern_and_type(pattern, dtype):
    rng = np.random.default_rng(pattern.group)
    for m, n, k in SHAPES:
        packed = weight(rng, n, k, pattern, dtype)
        x = tokens(rng, m, k, BF16)
        bias = rng.standard_normal(n).astype(np.float32) if n % 2 else None
        y, surroundings = guarded(m, n, BF16, pitch=n + n % 3)
        given = None if bias is None else cp.asarray(bias)
        assert ss.matmul(on_gpu(x), packed, bias=given, out=y) is y
        check(host(cp.ascontiguousarray(y)), x, packed, bias)
        surroundings()


@pytest.mark.parametrize("out", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("source", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("dtype", SCHEMES, ids=str)
def test_types_of_x_and_y(dtype, source, out):
    rng = np.random.default_rng(5)
    for m, n, k in ((5, 33, 200), (64, 256, 1024)):
        packed, x = weight(rng, n, k, "6:8", dtype), tokens(rng, m, k, source)
        bias = rng.standard_normal(n).astype(out)
        y = ss.matmul(on_gpu(x), packed, bias=on_gpu(bias), out_dtype=out)
        assert y.dtype == out
        check(host(y), x, packed, bias)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("pattern", TILED)
def test_every_tile_and_split(gemm, family, pattern, dtype):
    rng = np.random.default_rng(6)
    k = 2100  # every block of a cluster has steps, whatever the type
    n = 433  # seven row tiles
    packed = weight(rng, n, k, pattern, dtype, full=True)
    device, pattern = gemm.to_device(packed), packed.pattern
    assert family is sm80.ARCH or ("compact" in device.buffers) == (pattern.group > 4)

    def ways(config, m):
        """The launches to try: on few blocks and on many, with split-K and without, one launch and two."""
        if family is sm80.ARCH:
            return [(dataclasses.replace(config, splits=splits),) for splits in (1, 2, 5)]
        config = dataclasses.replace(config, row_tiles=(0, 7))
        tiles = config.tiles(m)
        alone = dataclasses.replace(config, end=tiles, blocks=min(3, tiles) if config.split_k == 1 else tiles * config.split_k)
        whole = sm90.configured(config.tile, 1, pattern, dtype, config.out, config.compact)
        before = dataclasses.replace(whole, row_tiles=(0, 7), end=tiles // 2, blocks=1, order=sm90.BEFORE_REST)
        after = dataclasses.replace(
            config, begin=tiles // 2, end=tiles, blocks=(tiles - tiles // 2) * config.split_k, order=sm90.REST
        )
        cut = 2 if config.tile.wide else 4
        if config.tile.wide or config.tile.pairs:  # two row tiles are too few; whole tiles are no kernel of pairs
            two = next(tile for tile in sm90.TILES if tile.warpgroups == 2)
            whole = sm90.configured(two, 1, pattern, dtype, config.out, config.compact)
        left = dataclasses.replace(whole, row_tiles=(0, cut), blocks=1, order=sm90.BEFORE_REST)
        right = dataclasses.replace(config, row_tiles=(cut, 7), order=sm90.REST)
        right = dataclasses.replace(right, end=right.tiles(m), blocks=right.tiles(m) * config.split_k)
        if config.tile.pairs:  # three tiles, of which two blocks share the last
            left, right = dataclasses.replace(left, end=left.tiles(m)), dataclasses.replace(right, blocks=2)
            first, second = (dataclasses.replace(launch, order=0) for launch in (left, right))
            return [with_expansion(launches, device) for launches in ((left, right), (first, second))]
        every = [(alone,), (before, after), (dataclasses.replace(left, end=left.tiles(m)), right)]
        every += [(dataclasses.replace(alone, blocks=tiles),)] if config.split_k == 1 else []
        return [with_expansion(launches, device) for launches in every]

    bias = rng.standard_normal(n).astype(np.float32)

    @functools.cache
    def operands(m, biased):
        """x and bias on the GPU, and what comes of them."""
        x = tokens(rng, m, k, BF16)
        return on_gpu(x), on_gpu(bias) if biased else None, product(x, packed, bias if biased else None)

    for out, y_type in OUTS.items():
        for config in to_test(family, pattern, dtype, out):
            each = config.tile.m if family is sm80.ARCH else config.tile.tokens
            m = each * (3 if family is sm90.ARCH and config.tile.pairs else 2) - each // 2 + 1
            x, given, exact = operands(m, y_type != BF16)
            for launches in ways(config, m):
                device.plans[m, out] = device.bind(m, out, launches)
                y, surroundings = guarded(m, n, y_type, pitch=440)
                ss.matmul(x, packed, bias=given, out=y)
                compare(host(cp.ascontiguousarray(y)), *exact, packed)
                surroundings()
                del device.plans[m, out]


@pytest.mark.parametrize("dtype", SCHEMES, ids=str)
def test_nan_and_infinity_reach_what_the_reference_says(dtype):
    rng = np.random.default_rng(7)
    for pattern in ("4:6", "6:8", "8:10"):
        packed = weight(rng, 40, 96, pattern, dtype)
        x = tokens(rng, 30, 96, F32 if ss.Scheme.of(dtype).scaled else dtype.numpy)
        for row, value in enumerate((np.nan, np.inf, -np.inf)):
            x[4 * row + 3, rng.integers(96)] = value
        for row in range(15, 30):
            x[row, rng.integers(96)] = np.inf
        want = reference.matmul(x, packed)
        got = ss.matmul(on_gpu(x), packed, out_dtype=F32).get()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
        np.testing.assert_array_equal(got[np.isinf(got)], want[np.isinf(want)])
        finite = np.isfinite(x.astype(np.float32)).all(axis=1)
        check(got[finite], x[finite], packed)
        assert finite.sum() >= 12


def test_int8_equals_the_processor_bit_for_bit():
    """The same call with NumPy arrays and with CuPy arrays."""
    rng = np.random.default_rng(8)
    packed = weight(rng, 300, 1000, "6:8", INT8)
    for source in (F32, F16, BF16):
        x, bias = tokens(rng, 50, 1000, source), rng.standard_normal(300).astype(np.float32)
        cpu = ss.matmul(x, packed, bias=bias)
        gpu = ss.matmul(on_gpu(x), packed, bias=cp.asarray(bias))
        np.testing.assert_array_equal(host(gpu).view(f"u{gpu.itemsize}"), cpu.view(f"u{cpu.itemsize}"))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16, FLOAT16], ids=str)
def test_groups_too_wide_for_registers(dtype):
    rng = np.random.default_rng(9)
    for pattern in ("16:18", "30:32"):
        packed, x = weight(rng, 70, 500, pattern, dtype), tokens(rng, 20, 500, BF16)
        check(host(ss.matmul(on_gpu(x), packed)), x, packed)
        if dtype is INT8:
            check(host(ss.matmul(ss.quantize(on_gpu(x), packed), packed)), x, packed)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("m", [300, 700])
@pytest.mark.parametrize("family", ["own"], indirect=True)
def test_expanded_metadata_give_the_same_bits_as_compact(gemm, family, m, dtype):
    """Two weights by turns in one workspace, so that metadata which are read too early are the other weight's."""
    rng, n, k = np.random.default_rng(24), 2000, 1500
    weights, x = [weight(rng, n, k, "6:8", dtype, full=True) for _ in range(2)], on_gpu(tokens(rng, m, k, BF16))
    there = [gemm.to_device(packed, least_memory=True) for packed in weights]

    def but_metadata(candidate):
        launches = candidate[isinstance(candidate[0], sm90.Expansion) :]
        return tuple(dataclasses.replace(launch, windows=0, stages=0, derived=False) for launch in launches)

    every = list(family.candidates(there[0].problem(m, "bfloat16"), tuple(there[0].buffers)))
    expanding = {but_metadata(c): c for c in every if isinstance(c[0], sm90.Expansion)}
    reading = {but_metadata(c): c for c in every if c not in expanding.values()}
    both = [(reading[launches], expanding[launches]) for launches in reading.keys() & expanding.keys()]
    assert len(both) > 5
    workspace = cp.full(max(there[0].bind(m, "bfloat16", c).plan.bytes for c in expanding.values()), 0xA5, np.uint8)
    y, q, differing = cp.empty((m, n), BF16), ss.quantize(x, weights[0]), cp.zeros((), cp.int64)
    for candidates in both:
        bits = []
        for candidate in candidates:
            for device in there:
                device.plans[m, "bfloat16"] = device.bind(m, "bfloat16", candidate)
            bits = bits or [ss.matmul(x, packed).view(np.uint16) for packed in weights]
        for given in (x, q) * 10:
            for packed, wanted in zip(weights, bits, strict=True):
                ss.matmul(given, packed, out=y, workspace=workspace)
                differing += (y.view(np.uint16) != wanted).sum()
    assert int(differing) == 0


FEW = [(1, 1, 8), (2, 257, 2104), (2, 1000, 5000), (1, 130, 3584), (1, 130, 7168), (1, 300, 18944), (1, 20000, 1024)]
FEW += [(1, 970, 1024), (1, 970, 2560), (2, 970, 3584)]
"""m, n, k: together their candidates, of which some are for four SMs, are every kernel that quantizes x itself."""


@pytest.mark.parametrize("out", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [FLOAT8, INT8, ss.Scheme.of("W4A8")], ids=str)
@pytest.mark.parametrize("pattern", TILED[1:])
@pytest.mark.parametrize("family", ["own"], indirect=True)
def test_few_tokens_that_blocks_quantize(gemm, family, pattern, dtype, out):
    """By every kernel; x in rows of a larger array, of which one may be zero, infinite or no number."""
    rng, of = np.random.default_rng(30), OUTS[out]
    kernels = family.kernels(ss.Pattern.of(pattern), ss.Scheme.of(dtype).kernel, out, capability_here())
    left = {c.kernel for c in kernels if getattr(c, "own_x", 0)}
    for m, n, k in FEW:
        packed, rows = weight(rng, n, k, pattern, dtype), tokens(rng, m, k + 8, of)
        device, bias = gemm.to_device(packed), rng.standard_normal(n).astype(np.float32)
        problem, there = dataclasses.replace(device.problem(m, out), unquantized=True), cp.asarray(bias)
        assert family.quantizes(device.problem(m, out), tuple(device.buffers))
        for row in (None, 0, np.inf, np.nan):
            if row is not None:
                rows[m - 1, (k // 2) if row else slice(None)] = row
            given, finite = on_gpu(rows)[:, :k], np.isfinite(rows[:, :k].astype(np.float32)).all(axis=1)
            exact, magnitude = product(rows[finite, :k], packed, bias)
            on_four = dataclasses.replace(problem, device=dataclasses.replace(problem.device, sms=4))
            ways = [c for p in (problem, on_four) for c in family.candidates(p, tuple(device.buffers))]
            for candidate in (None, *dict.fromkeys(ways)):
                y, surroundings = guarded(m, n, of, pitch=n + 8)
                if candidate is None:
                    ss.matmul(given, packed, bias=there, out=y)
                    assert (m, out) in device.unquantized
                else:
                    left -= {launch.but(order=0).kernel for launch in candidate}
                    bound = device.bind(m, out, candidate, unquantized=True)
                    at, address = cp.cuda.get_current_stream().ptr, given.data.ptr
                    device.multiply(bound, address, given.strides[0], 0, y.data.ptr, n + 8, 0, at, there.data.ptr, 4)
                values = host(cp.ascontiguousarray(y))
                compare(values[finite], exact, magnitude, packed)
                assert np.isnan(values[~finite].astype(np.float32)).all()
                surroundings()
    assert not left


def test_x_that_blocks_do_not_quantize():
    """A float32 x or y, odd addresses, and elements that are not side by side: a writer makes an operand first."""
    rng, n, k = np.random.default_rng(31), 130, 1024
    packed, x = weight(rng, n, k, "6:8", INT8), tokens(rng, 1, 2 * k, BF16)
    for columns in (slice(k), slice(1, k + 1), slice(None, None, 2)):
        check(host(ss.matmul(on_gpu(x)[:, columns], packed)), x[:, columns], packed)
        for source, out in ((BF16, F32), (F32, F32), (F32, BF16), (F16, BF16)):
            given = x[:, columns].astype(source)
            check(host(ss.matmul(on_gpu(np.ascontiguousarray(given)), packed, out_dtype=out)), given, packed)


def test_a_thousand_launches_give_the_same_bits(gemm):
    rng = np.random.default_rng(10)
    for dtype, m, n, k in ((BFLOAT16, 16, 256, 4096), (BFLOAT16, 300, 512, 1024), (INT8, 40, 512, 2048)):
        packed, x = weight(rng, n, k, "6:8", dtype), on_gpu(tokens(rng, m, k, BF16))
        y = cp.empty((m, n), F32)
        first = ss.matmul(x, packed, out_dtype=F32).view(cp.uint32)
        differing = cp.zeros((), cp.int64)
        for _ in range(1000):
            y.view(cp.uint32).fill(0x7FA5A5A5)
            ss.matmul(x, packed, out=y)
            differing += (y.view(cp.uint32) != first).sum()
        assert int(differing) == 0
    assert gemm.to_device(packed).plans


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_many_long_rows(dtype):
    """On Hopper fewer threads quantize a row of many, each more of it."""
    rng, n, k = np.random.default_rng(34), 40, 18944
    packed = weight(rng, n, k, "6:8", dtype)
    for m in (256, 257, 300):
        x = tokens(rng, m, k, BF16)
        check(host(ss.matmul(on_gpu(x), packed)), x, packed)


def test_outputs_past_two_to_the_31():
    """n * m > 2^31 elements, y of 4.4 GB; samples from all corners, and the row and column sums of a few."""
    rng = np.random.default_rng(11)
    m, n, k = 65600, 32800, 64
    packed = weight(rng, n, k, "6:8", INT8)
    x = tokens(rng, m, k, BF16)
    y = ss.matmul(on_gpu(x), packed)
    rows = np.r_[0:5, m // 2, m - 40 : m]
    check(host(y[rows]), x[rows], packed)
    columns = np.r_[0:3, n // 2, n - 20 : n]
    part = ss.PackedWeight(
        packed.values[columns], packed.meta[columns], packed.scale[columns], packed.pattern, (len(columns), k), packed.dtype
    )
    check(host(cp.ascontiguousarray(y[:, columns])), x, part)


# ---- arrays ----------------------------------------------------------------------------------------------------------


class SpeaksDLPack:
    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **arguments):
        return self._array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class SpeaksCudaArrayInterface:
    def __init__(self, array):
        self._array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_x_of_any_strides_and_libraries(dtype):
    rng = np.random.default_rng(12)
    packed = weight(rng, 48, 90, "6:8", dtype)
    x = tokens(rng, 24, 90, F16)
    want = host(ss.matmul(on_gpu(x), packed))
    wide = cp.zeros((24, 3 * 90 + 5), F16)
    wide[:, 1:271:3] = on_gpu(x)
    shifted = cp.zeros(24 * 90 + 1, F16)
    shifted[1:] = on_gpu(x).ravel()
    given = {
        "every third column": wide[:, 1:271:3],
        "columns first": cp.asfortranarray(on_gpu(x)),
        "rows backwards": on_gpu(x[::-1].copy())[::-1],
        "address not aligned": shifted[1:].reshape(24, 90),
        "three dimensions": on_gpu(x).reshape(2, 12, 90),
        "dlpack": SpeaksDLPack(on_gpu(x)),
        "array interface": SpeaksCudaArrayInterface(on_gpu(x)),
    }
    for name, a in given.items():
        y = ss.matmul(a, packed)
        assert y.shape == ((2, 12, 48) if name == "three dimensions" else (24, 48))
        np.testing.assert_array_equal(host(y).reshape(24, 48), want, err_msg=name)
    one = ss.matmul(on_gpu(x)[3], packed)
    assert one.shape == (48,)
    np.testing.assert_array_equal(host(one), want[3])


def test_y_of_any_strides():
    rng = np.random.default_rng(13)
    packed, x = weight(rng, 50, 128, "6:8", INT8), on_gpu(tokens(rng, 12, 128, BF16))
    want = host(ss.matmul(x, packed))
    for pitch in (50, 51, 56, 64):
        y, surroundings = guarded(12, 50, BF16, pitch)
        ss.matmul(x, packed, out=y)
        np.testing.assert_array_equal(host(cp.ascontiguousarray(y)), want)
        surroundings()
    transposed = cp.empty((50, 12), BF16).T
    assert ss.matmul(x, packed, out=transposed) is transposed
    np.testing.assert_array_equal(host(cp.ascontiguousarray(transposed)), want)
    spaced = cp.zeros((3, 8, 50), BF16)[:, ::2]
    ss.matmul(x.reshape(3, 4, 128), packed, out=spaced)
    np.testing.assert_array_equal(host(cp.ascontiguousarray(spaced)).reshape(12, 50), want)


@pytest.mark.parametrize("dtype", SCHEMES, ids=str)
def test_nothing_to_do(dtype):
    rng = np.random.default_rng(14)
    packed = weight(rng, 20, 32, "6:8", dtype)
    assert ss.matmul(cp.zeros((0, 32), F32), packed).shape == (0, 20)
    assert ss.matmul(cp.zeros((4, 0, 32), F32), packed).shape == (4, 0, 20)
    empty = weight(rng, 0, 32, "6:8", dtype)
    assert ss.matmul(cp.zeros((3, 32), F32), empty).shape == (3, 0)
    nothing = weight(rng, 5, 0, "6:8", dtype)
    bias = np.arange(5, dtype=np.float32)
    y = ss.matmul(cp.zeros((3, 0), F32), nothing, bias=cp.asarray(bias)).get()
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (3, 5)))


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("k", [96, 91])
def test_one_quantized_x_for_several_weights(family, dtype, k):
    rng = np.random.default_rng(15)
    x = tokens(rng, 17, k, BF16)
    first, second, third = weight(rng, 30, k, "6:8", dtype), weight(rng, 50, k, "4:6", dtype), weight(rng, 20, k, "6:8", dtype)
    shared = ss.quantize(on_gpu(x).reshape(1, 17, k), first)
    assert (shared.k, isinstance(shared, TiledActivations)) == (k, family is sm90.ARCH)
    for given in (shared, ss.quantize(on_gpu(x)[None], "6:8", dtype)):
        for packed in (first, second, third):
            y = ss.matmul(given, packed)
            assert y.shape == (1, 17, packed.n)
            assert y.dtype == BF16
            np.testing.assert_array_equal(host(y)[0], host(ss.matmul(on_gpu(x), packed)))
    expected = reference.quantize(x, dtype)[0] if ss.Scheme.of(dtype).scaled else x.astype(dtype.numpy)
    np.testing.assert_array_equal(shared.values.get().view(dtype.raw), expected.view(dtype.raw))


def test_activations_quantized_elsewhere_are_laid_out(family):
    """Values that are not in the swizzled tile layout, of both kernels and of the user's own making."""
    rng = np.random.default_rng(22)
    for dtype in PACKED:
        packed, x = weight(rng, 40, 80, "6:8", dtype), tokens(rng, 20, 80, BF16)
        q, scale = reference.quantize(x, dtype) if ss.Scheme.of(dtype).scaled else (x.astype(dtype.numpy), None)
        scale = None if scale is None else cp.asarray(scale)
        given = ss.QuantizedActivations(on_gpu(q).view(dtype.raw), scale, (20,), dtype, BF16)
        np.testing.assert_array_equal(host(ss.matmul(given, packed)), host(ss.matmul(on_gpu(x), packed)))


# ---- streams, graphs, threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SCHEMES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 200])
def test_captured_in_a_graph(dtype, m):
    rng = np.random.default_rng(17)
    packed = weight(rng, 256, 2048, "6:8", dtype)
    inputs = [tokens(rng, m, 2048, BF16) for _ in range(3)]
    x, y = on_gpu(inputs[0]), cp.empty((m, 256), BF16)
    workspace = cp.full(ss.workspace_bytes(m, packed, BF16), 0xA5, np.uint8)
    stream = cp.cuda.Stream(non_blocking=True)
    ss.matmul(x, packed, out=y, workspace=workspace, stream=stream)  # compiled and loaded before the capture
    stream.synchronize()
    pool = cp.get_default_memory_pool()
    before = pool.total_bytes(), pool.used_bytes()
    with stream:
        stream.begin_capture()
        for _ in range(2):  # the second follows while the first may still run, in the same workspace
            ss.matmul(x, packed, out=y, workspace=workspace)
        graph = stream.end_capture()
    assert (pool.total_bytes(), pool.used_bytes()) == before
    for values in inputs:
        x.view(cp.uint16)[...] = cp.asarray(values.view(np.uint16))
        y.view(cp.uint16).fill(0x7FA5)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        check(host(y), values, packed)


def test_a_token_through_two_weights_a_thousand_times():
    """Each product starts while the one before, whose y it quantizes, still runs; the first takes two launches."""
    rng, n, k = np.random.default_rng(33), 20000, 1024
    packed = [weight(rng, n, k, "6:8", INT8), weight(rng, k, n, "6:8", INT8)]
    x, middle, y = on_gpu(tokens(rng, 1, k, BF16)), cp.empty((1, n), BF16), cp.empty((1, k), BF16)
    stream = cp.cuda.Stream(non_blocking=True)

    def multiply():
        ss.matmul(x, packed[0], out=middle)
        ss.matmul(middle, packed[1], out=y)

    cp.cuda.Device().synchronize()
    with stream:
        multiply()
        stream.synchronize()
        check(host(y), host(middle), packed[1])
        first, differing = [a.view(np.uint16).copy() for a in (middle, y)], cp.zeros((), cp.int64)
        stream.begin_capture()
        for _ in range(10):
            multiply()
        graph = stream.end_capture()
        for _ in range(100):
            middle.view(np.uint16).fill(0x7FA5)
            y.view(np.uint16).fill(0x7FA5)
            graph.launch(stream)
            for got, wanted in zip((middle, y), first, strict=True):
                differing += (got.view(np.uint16) != wanted).sum()
        stream.synchronize()
        assert int(differing) == 0


def test_two_streams_and_a_foreign_one():
    rng = np.random.default_rng(18)
    packed = weight(rng, 512, 4096, "6:8", INT8)  # k is split: both streams need counters
    inputs = [tokens(rng, 9, 4096, BF16) for _ in range(2)]
    given = [on_gpu(a) for a in inputs]
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    cp.cuda.Device().synchronize()
    results = [[ss.matmul(x, packed, stream=s) for x, s in zip(given, streams, strict=True)] for _ in range(50)]
    cp.cuda.Device().synchronize()
    for pair in results:
        for y, x in zip(pair, inputs, strict=True):
            check(host(y), x, packed)
    with streams[0]:
        y = ss.matmul(given[0], packed, stream=streams[1].ptr)
    streams[1].synchronize()
    check(host(y), inputs[0], packed)


def test_two_threads():
    rng = np.random.default_rng(19)
    packed = weight(rng, 300, 1024, "6:8", INT8)  # arranged by whoever comes first
    inputs = [tokens(rng, m, 1024, BF16) for m in (7, 150)]

    def work(x):
        with cp.cuda.Stream(non_blocking=True) as stream:
            a = on_gpu(x)
            for _ in range(100):
                y = ss.matmul(a, packed)
            stream.synchronize()
            check(host(y), x, packed)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, inputs))


@pytest.mark.parametrize("dtype", [INT8, SCHEMES[-1]], ids=str)
def test_to_device_ahead_and_explanation(gemm, family, dtype, monkeypatch, capfd):
    monkeypatch.setenv("SLIDESPARSE_DEBUG", "1")
    plan_of.cache_clear()
    shared_plans.cache_clear()
    packed = weight(np.random.default_rng(20), 64, 128, "6:8", dtype)
    there = ss.to_device(packed)
    assert ss.to_device(packed) is there
    converted = as_multiplied(packed, np)
    weight_there, wanted = gemm.to_device(packed), {**family.arrange(converted, np), "scale": converted.scale.reshape(-1)}
    assert [*weight_there.buffers] == [*wanted]
    for name, buffer in wanted.items():
        np.testing.assert_array_equal(weight_there.buffers[name].get(), buffer)
    ss.matmul(cp.zeros((3, 128), F32), packed)
    told = capfd.readouterr().err
    assert f"y[3, 64] = x[3, 128] @ w.T, 6:8 (2 zeros in 8) {there.scheme} -> float32" in told
    assert "kernel.cu" in told
    ss.matmul(cp.zeros((3, 128), F32), packed)
    assert not capfd.readouterr().err


def test_chained_launches_wait_for_each_other():
    """A stack of linears, each of which may start before the one before is complete, gives what it gives one at a time."""
    rng = np.random.default_rng(23)
    for dtype in PACKED:
        layers = [weight(rng, 512, 512, "6:8", dtype) for _ in range(6)]
        x = y = on_gpu(tokens(rng, 70, 512, BF16))
        for packed in layers:
            y = ss.matmul(y, packed)
            cp.cuda.Device().synchronize()
        want = host(y).view(np.uint16)
        for _ in range(50):
            y = x
            for packed in layers:
                y = ss.matmul(y, packed)
            np.testing.assert_array_equal(host(y).view(np.uint16), want)


@pytest.mark.parametrize(("family", "pause"), [("own", 0), ("own", 50000), ("portable", 0)], indirect=["family"])
def test_on_an_idle_gpu_with_weights_that_no_cache_holds(family, pause):
    """Every product ends, and gives the same bits; in a process of its own, or one that never ends would stop the suite."""
    program = Path(__file__).with_name("idle_products.py")
    path = os.pathsep.join([str(program.parents[2]), os.environ.get("PYTHONPATH", "")])
    command, env = [sys.executable, str(program), str(pause)], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
