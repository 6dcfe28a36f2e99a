"""Quantization of activations on the GPU, against the reference bit for bit."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import cupy as cp
import numpy as np
import pytest
from device_cases import (
    SOURCES,
    awkward_rows,
    bits,
    blocked,
    launch_rows,
    made_on_device,
    plan_with,
    quantized,
    row_pitch,
    same,
    tiled,
    write,
)
from fused_cases import check_fused

from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT4, FLOAT8, FLOAT16, FLOATS, INT8, PACKED
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.cuda import quantize as activations
from slidesparse_nb.cuda.kernels.quantize import KINDS

pytestmark = pytest.mark.gpu

GUARD = 256
"""Bytes before and after every output, which must stay as they were."""


def on_device(x):
    """x as a CuPy array; bfloat16 through its bits."""
    return cp.asarray(bits(x)).view(x.dtype)


def guarded(shape, itemsize):
    """A poisoned array of bytes [rows, width * itemsize] inside a larger one, and that one."""
    rows, width = shape
    whole = cp.full(2 * GUARD + rows * width * itemsize, 0x5A, cp.uint8)
    return whole[GUARD : whole.size - GUARD].reshape(rows, width * itemsize), whole


def assert_guarded(*wholes) -> None:
    for whole in wholes:
        assert (whole[:GUARD] == 0x5A).all()
        assert (whole[-GUARD:] == 0x5A).all()


def check(x, dtype, pattern=None, placed=None, more=0):
    """Quantize x on the device into guarded, poisoned arrays and compare every byte."""
    width = row_pitch(x.shape[1], pattern) + more
    out, out_whole = guarded((x.shape[0], width), 1)
    scale, scale_whole = guarded((x.shape[0], 1), 4)
    given = on_device(x) if placed is None else placed
    write(given, dtype, out, scale.view(cp.float32), pattern, width)
    same(out.get(), scale.view(cp.float32).get(), quantized(x, dtype, pattern, width))
    assert_guarded(out_whole, scale_whole)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_equals_the_reference(source, dtype) -> None:
    for m, k in [(12, 1), (12, 31), (13, 64), (12, 1000), (37, 3584), (12, 3583), (5, 18944), (2, 65536), (2, 70000)]:
        check(awkward_rows(m, k, source), dtype)


@pytest.mark.parametrize(
    ("source", "dtype", "pattern"),
    [(BFLOAT16.numpy, INT8, p) for p in ("2:4", "4:6", "8:10", "10:12", "14:16")]
    + [(source, dtype, "6:8") for source in SOURCES for dtype in (INT8, FLOAT8)],
    ids=str,
)
def test_lifted_equals_the_reference(source, dtype, pattern) -> None:
    pattern = Pattern.of(pattern)
    for m, k in [(12, 1), (12, 41), (13, 64), (37, 3584), (12, 3583), (5, 18944)]:
        check(awkward_rows(m, k, source), dtype, pattern)


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4"])
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_blocks_equal_the_reference(source, scheme) -> None:
    """Those over pairs, which every GPU can write that converts to float8, whether or not it can multiply them."""
    if not activations.native_float8(cp.cuda.runtime.getDevice()):
        return
    for text, (m, k) in itertools.product(
        ("2:4", "4:6", "6:8", "14:16"), [(12, 1), (12, 41), (13, 64), (37, 3584), (12, 3583), (5, 18944), (2, 70000)]
    ):
        x, pattern = awkward_rows(m, k, source), Pattern.of(f"{text} pairs")
        expected = blocked(x, pattern, Scheme.of(scheme))
        (out, out_whole), (scale, scale_whole) = guarded(expected[0].shape, 1), guarded((m, 1), 4)
        write(
            on_device(x), FLOAT4, out, scale.view(cp.float32), pattern, out.shape[1], block=Scheme.of(scheme).activations.block
        )
        same(out.get(), scale.view(cp.float32).get(), expected)
        assert_guarded(out_whole, scale_whole)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_every_bfloat16_is_rounded_right(dtype) -> None:
    """Rows of every finite bfloat16 up to some magnitude: many scales meet every mantissa."""
    every = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16.numpy)
    every = every[np.isfinite(every.astype(np.float32))]
    size = np.abs(every.astype(np.float32))
    rows = [np.where(size <= np.float32(1.37 * 2.0**e), every, np.zeros((), every.dtype)) for e in (-99, -3, 0, 9, 60, 127)]
    check(np.stack(rows), dtype)


@pytest.mark.parametrize("architecture", [80, 89, 90])
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_architecture(source, architecture) -> None:
    rng = np.random.default_rng(5)
    x = np.exp2(rng.uniform(-14, 0, (64, 4096))).astype(np.float32) * rng.choice([-1, 1], (64, 4096))
    x = np.concatenate([x.astype(source), awkward_rows(12, 4096, source)])
    name = FLOATS[source]
    launch = activations.plan(name, FLOAT8.name, 4096, x.strides, True, architecture, width=4096)
    assert launch.variant.architecture == architecture
    out, scale = cp.empty((76, 4096), cp.uint8), cp.empty((76, 1), cp.float32)
    launch_rows(launch, 76, on_device(x), out, scale)
    same(out.get(), scale.get(), quantized(x, FLOAT8, None, 4096))


@pytest.mark.parametrize("vectors", [1, 2, 4, 8])
def test_every_number_of_vectors(vectors) -> None:
    k = 3584
    x = awkward_rows(20, k, BFLOAT16.numpy)
    for pattern in (None, Pattern(6, 8)):
        width = row_pitch(k, pattern)
        launch = plan_with(vectors, "bfloat16", "int8", k, x.strides, True, 90, pattern, width=width)
        out, scale = cp.empty((20, width), cp.uint8), cp.empty((20, 1), cp.float32)
        launch_rows(launch, 20, on_device(x), out, scale)
        same(out.get(), scale.get(), quantized(x, INT8, pattern, width))
    for dtype in (INT8, BFLOAT16):
        launch = plan_with(vectors, "bfloat16", dtype.name, k, x.strides, True, 90, Pattern(6, 8))
        expected, expected_scale = tiled(x, dtype, Pattern(6, 8))
        out, scale = cp.empty(expected.shape, cp.uint8), cp.empty((20, 1), cp.float32)
        launch_rows(launch, 20, on_device(x), out, scale)
        np.testing.assert_array_equal(out.get(), expected)  # bfloat16 as it is, NaN too
        if expected_scale is not None:
            np.testing.assert_array_equal(bits(scale.get()), bits(expected_scale))


# ---- tiles -------------------------------------------------------------------------------------------------------


def one_nan(tiles, dtype):
    """The bytes of tiles, every NaN of a 16-bit type alike: what rounding makes of their bits is the hardware's."""
    if Scheme.of(dtype).scaled:
        return tiles
    values = np.ascontiguousarray(tiles).view(dtype.numpy)
    return np.where(np.isnan(values.astype(np.float32)), dtype.inf_bits | 1, bits(values))


def check_tiles(x, dtype, pattern, placed=None):
    """Lay out x on the device, into guarded, poisoned arrays, and compare every byte."""
    expected, expected_scale = tiled(x, dtype, pattern)
    out, out_whole = guarded((1, expected.size), 1)
    scale, scale_whole = guarded((x.shape[0], 1), 4)
    given = on_device(x) if placed is None else placed
    source = dtype.name if x.dtype == dtype.numpy else ""
    scales = None if expected_scale is None else scale.view(cp.float32)
    write(given, dtype, out.reshape(expected.shape), scales, pattern, source=source)
    np.testing.assert_array_equal(one_nan(out.get().reshape(expected.shape), dtype), one_nan(expected, dtype))
    if expected_scale is None:
        assert (scale.get() == 0x5A).all()
    else:
        np.testing.assert_array_equal(bits(scale.view(cp.float32).get()), bits(expected_scale))
    assert_guarded(out_whole, scale_whole)


SHAPES = [(9, 41), (1, 64), (13, 64), (1, 3584), (8, 3584), (37, 3584), (3, 3583), (2, 18944)]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("source", [*SOURCES, "same"], ids=str)
def test_tiles_equals_the_reference(source, dtype) -> None:
    for m, k in SHAPES:
        if source != "same":
            x = awkward_rows(m, k, source)
        elif not Scheme.of(dtype).scaled:
            x = awkward_rows(m, k, dtype.numpy)
        else:
            x = quantized(awkward_rows(m, k, BFLOAT16.numpy), dtype, None, k)[0].view(dtype.numpy)
        check_tiles(x, dtype, Pattern(6, 8))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:6", "8:10", "10:12", "14:16", "62:64"])
def test_tiles_of_every_pattern(pattern, dtype) -> None:
    for m, k in SHAPES:
        check_tiles(awkward_rows(m, k, BFLOAT16.numpy), dtype, Pattern.of(pattern))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_tiles_of_long_rows(dtype) -> None:
    for k in (65536, 70000):
        check_tiles(awkward_rows(3, k, BFLOAT16.numpy), dtype, Pattern(6, 8))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("layout", ["odd address", "padded rows", "transposed", "every second", "backwards"])
def test_tiles_strides(layout, dtype) -> None:
    x = awkward_rows(40, 512, FLOAT16.numpy)
    check_tiles(x, dtype, Pattern(6, 8), placed=laid_out(x, layout))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_tiles_of_many_rows(dtype) -> None:
    """Tiles of more than 2^31 bytes, of x of more than 2^31 elements; a few groups of tokens are looked at."""
    m, k, pattern = (1 << 31) // 4096 + 61, 4096, Pattern(6, 8)
    if cp.cuda.runtime.memGetInfo()[0] < 7 * m * k:
        pytest.fail("needs 15 GB of device memory")
    x = cp.zeros((m, k), cp.float16)
    host = awkward_rows(8, k, FLOAT16.numpy)
    for group in (0, m // 16, m // 8):
        rows = slice(8 * group, min(8 * group + 8, m))
        x[rows] = cp.asarray(host[: rows.stop - rows.start])
    made, scale = made_on_device(x, dtype, pattern)
    for group in (0, m // 16, m // 8):
        count = min(8, m - 8 * group)
        expected, expected_scale = tiled(host[:count], dtype, pattern)
        np.testing.assert_array_equal(one_nan(made[:, group].get(), dtype), one_nan(expected[:, 0], dtype))
        if dtype is INT8:
            np.testing.assert_array_equal(bits(scale[8 * group : 8 * group + count].get()), bits(expected_scale))


def test_a_thousand_tiles_agree_while_launches_overlap() -> None:
    """Each launch may start before the one before is complete: its operand is written by that one, and it must wait for it."""
    pattern = Pattern(6, 8)
    xs = [on_device(awkward_rows(300, 3584, BFLOAT16.numpy, seed)) for seed in range(2)]
    x = cp.empty((300, 3584), cp.uint16).view(BFLOAT16.numpy)
    wanted = [made_on_device(x, FLOAT8, pattern)[0] for x in xs]
    differ = cp.zeros((), cp.int64)
    values, scale = cp.empty((300, 3584), cp.uint8), cp.empty((300, 1), cp.float32)
    again, unscaled = cp.empty_like(wanted[0]), cp.empty((300, 1), cp.float32)
    for i in range(1000):
        x.view(cp.uint16)[...] = xs[i % 2].view(cp.uint16)
        write(x, FLOAT8, values, scale, width=3584)  # then, from what it writes, the tiles
        write(values, FLOAT8, again, None, pattern, source=FLOAT8.name)
        differ += (again != wanted[i % 2]).any()
        write(x, FLOAT8, again, unscaled, pattern)
        differ += (again != wanted[i % 2]).any() + (unscaled.view(cp.uint32) != scale.view(cp.uint32)).any()
    assert int(differ) == 0


# ---- strides, streams --------------------------------------------------------------------------------------------


def laid_out(x, layout):
    """x [40, 512] float16 on the device, with awkward strides."""
    flat = cp.empty(40 * 600 + 8, cp.float16)
    if layout == "odd address":
        placed = flat[1 : 1 + 40 * 512].reshape(40, 512)
    elif layout == "padded rows":
        placed = flat[: 40 * 600].reshape(40, 600)[:, :512]
    elif layout == "transposed":
        placed = flat[: 40 * 512].reshape(512, 40).T
    elif layout == "every second":
        placed = cp.empty((40, 1024), cp.float16)[:, ::2]
    else:
        placed = flat[: 40 * 512].reshape(40, 512)[::-1, ::-1]
    placed[...] = cp.asarray(x)
    return placed


@pytest.mark.parametrize("layout", ["odd address", "padded rows", "transposed", "every second", "backwards"])
def test_strides(layout) -> None:
    x = awkward_rows(40, 512, FLOAT16.numpy)
    check(x, FLOAT8, placed=laid_out(x, layout), more=112)


def test_many_rows() -> None:
    """More than 2^31 bytes of values; three rows are looked at."""
    m, k = (1 << 31) // 4096 + 64, 4096
    if cp.cuda.runtime.memGetInfo()[0] < 4 * m * k:
        pytest.fail("needs 9 GB of device memory")
    x = cp.zeros((m, k), cp.float16)
    host = awkward_rows(3, k, FLOAT16.numpy)
    rows = [0, m // 2, m - 1]
    for i, row in enumerate(rows):
        x[row] = cp.asarray(host[i])
    out, scale = made_on_device(x, INT8)
    got = np.stack([out[row].get() for row in rows]), np.stack([scale[row].get() for row in rows])
    same(*got, quantized(host, INT8, None, k))


def test_streams_threads_and_graph() -> None:
    """The same numbers from four threads, each with a stream, and from a captured graph replayed on new data."""
    xs = [awkward_rows(64, 3584, BFLOAT16.numpy, seed) for seed in range(4)]
    expected = [quantized(x, INT8, None, 3584) for x in xs]
    given = [on_device(x) for x in xs]

    def work(i: int):
        with cp.cuda.Stream(non_blocking=True) as stream:
            for _ in range(50):
                made = made_on_device(given[i], INT8)
            stream.synchronize()
        return made

    cp.cuda.get_current_stream().synchronize()
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(work, range(4)))
    for (values, scale), wanted in zip(results, expected, strict=True):
        same(values.get(), scale.get(), wanted)

    x, out, scale = given[0].copy(), cp.empty((64, 3584), cp.int8), cp.empty((64, 1), cp.float32)
    cp.cuda.get_current_stream().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        write(x, INT8, out, scale, width=3584)
        graph = stream.end_capture()
        for i in (1, 2):
            x[...] = given[i]
            out.fill(0)
            graph.launch(stream)
            stream.synchronize()
            same(out.get(), scale.get(), expected[i])


def test_a_thousand_launches_agree() -> None:
    x = on_device(awkward_rows(300, 18944, BFLOAT16.numpy))
    pattern = Pattern(6, 8)
    width = row_pitch(18944, pattern)
    first, again = (cp.empty((300, width), cp.uint8) for _ in range(2))
    differ, scale = cp.zeros((), cp.int64), cp.empty((300, 1), cp.float32)
    write(x, FLOAT8, first, scale, pattern, width)
    for _ in range(1000):
        write(x, FLOAT8, again, scale, pattern, width)
        differ += (again != first).any()
    assert int(differ) == 0


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "k", "pattern"), [(1, 3584, "6:8"), (37, 3584, "6:8"), (9, 18944, "6:8"), (300, 8192, "4:6"), (5, 584, "14:16")]
)
def test_norms_and_gates(kind, dtype, m, k, pattern) -> None:
    check_fused(kind, BFLOAT16, dtype, m, k, Pattern.of(pattern), cp.asarray, lambda a: a.get())


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("kind", ["silu_and_mul", "gelu_and_mul"])
@pytest.mark.parametrize("spread", activations.SHARED_BY)
def test_gates_of_rows_that_blocks_share(spread, kind, dtype) -> None:
    if activations.architecture(cp.cuda.runtime.getDevice()) < 90:
        return
    shapes = (1, 18944, "6:8"), (9, 18944, "6:8"), (37, 8192, "4:6"), (5, 4672, "14:16"), (64, 9000, "2:4"), (3, 11008, "8:10")
    for m, k, pattern in shapes:
        check_fused(kind, BFLOAT16, dtype, m, k, Pattern.of(pattern), cp.asarray, lambda a: a.get(), spread=spread)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("kind", ["silu_and_mul", "gelu_and_mul"])
def test_gates_of_every_number(kind, dtype) -> None:
    check_fused(kind, dtype, dtype, 16, 4096, Pattern.of("6:8"), cp.asarray, lambda a: a.get(), every=True)
