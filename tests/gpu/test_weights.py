"""Packing on the GPU, against the reference and the CPU byte for byte."""

from __future__ import annotations

from dataclasses import replace

import cupy as cp
import numpy as np
import pytest
from cases import faulty
from device_cases import SOURCES, bits, same_weight

import slidesparse_nb as ss
from slidesparse_nb import matmul, packing
from slidesparse_nb.arch import for_capability, sm90, sm90_layout
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED
from slidesparse_nb.core.packed import PackedWeight
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.errors import FormatError, OperandError, PatternError, UnsupportedError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def weights():
    from slidesparse_nb.cuda import pack as weights

    return weights


def on_device(w):
    """w as a CuPy array; float8 as its bits."""
    raw = cp.asarray(bits(w))
    return raw if w.dtype == FLOAT8.numpy else raw.view(w.dtype)


def on_host(packed):
    """A packed weight of CuPy arrays as one of NumPy arrays."""
    scale = None if packed.scale is None else packed.scale.get()
    return PackedWeight(packed.values.get(), packed.meta.get(), scale, packed.pattern, packed.shape, packed.dtype)


def awkward_weights(n, k, source, seed=0):
    rng = np.random.default_rng([seed, n, k])
    w = rng.standard_normal((n, k)).astype(np.float32)
    w[rng.random((n, k)) < 0.1] = -0.0
    w[1::5] = rng.integers(-3, 4, w[1::5].shape)  # many equal magnitudes
    w[2::7] *= 2.0**-104
    w[3::11] = 0
    w[4::9] *= 1e-6  # rounds to zero in float16
    return w.astype(source)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_equals_the_reference(weights, source, dtype) -> None:
    every = dtype is INT8 and source == BFLOAT16.numpy
    for pattern in [*known_patterns(), Pattern(30, 32), Pattern(62, 64)] if every else [Pattern(6, 8)]:
        for n, k in [(1, 1), (13, 37), (7, 16), (29, 1009), (64, 512), (3, 18944)]:  # whole words and not
            w = awkward_weights(n, k, source)
            pruned = reference.prune(w, pattern)
            expected = reference.pack(pruned, pattern, dtype)
            packed = weights.pack(on_device(w), pattern, dtype, prune="magnitude")
            assert isinstance(packed.values, cp.ndarray)
            same_weight(on_host(packed), expected)
            dense, faulty = weights.unpack(packed)
            assert faulty is None
            np.testing.assert_array_equal(bits(dense.get()), bits(reference.unpack(expected)))
            if k % 16 == 0:
                same_weight(on_host(weights.pack(on_device(pruned), pattern, dtype)), expected)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", known_patterns()[1:], ids=str)
def test_expansion_equals_the_reference(pattern, dtype) -> None:
    if for_capability(divmod(int(cp.cuda.Device().compute_capability), 10)) is not sm90.ARCH:
        pytest.skip("no other kernel has compact metadata")
    rng = np.random.default_rng(pattern.group)
    for n, k in ((1, 1), (70, 75), (600, 4000), (1100, 1030)):
        there = ss.to_device(ss.pack(rng.standard_normal((n, k)).astype(np.float32), pattern, dtype, prune="magnitude"))
        bound = there.bind(8, "bfloat16", (sm90.Expansion(dtype, pattern.windows),))
        wanted = sm90_layout.expand(there.buffers["compact"].get(), pattern, dtype).ravel()
        assert bound.plan.derived_bytes == wanted.size
        workspace = cp.full(bound.plan.bytes + 4096, 0xA5, cp.uint8)
        there.multiply(bound, 0, 0, 0, 0, 0, workspace.data.ptr, cp.cuda.get_current_stream().ptr)
        found, at = workspace.get(), bound.plan.derived_at
        np.testing.assert_array_equal(found[at : at + wanted.size], wanted)
        assert (found[:at] == 0xA5).all()
        assert (found[at + wanted.size :] == 0xA5).all()


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_quantized_weights_keep_their_bytes(weights, dtype) -> None:
    rng = np.random.default_rng(3)
    for pattern in known_patterns():
        stored = rng.integers(0, 256, (33, 331), np.uint8)
        stored[stored & 0x7F == 0x7F] = 0x80
        w, scale = stored.view(dtype.numpy), rng.random((33, 1), np.float32)
        expected = reference.pack(reference.prune(w, pattern), pattern, dtype, scale)
        packed = weights.pack(on_device(w), pattern, dtype, scale=cp.asarray(scale), prune="magnitude")
        assert packing.pack(on_device(w), pattern, dtype, scale=scale[:, 0], prune="magnitude").values.device.id == 0
        same_weight(on_host(packed), expected)


def test_scores_and_strides(weights) -> None:
    rng = np.random.default_rng(4)
    score = rng.random((50, 250), np.float32)
    w = awkward_weights(50, 250, BFLOAT16.numpy)
    expected = packing.pack(w, "4:6", "int8", prune=score)
    transposed = on_device(np.ascontiguousarray(w.T)).T
    backwards = on_device(w[::-1, ::-1].copy())[::-1, ::-1]
    padded = cp.zeros((50, 251), BFLOAT16.numpy)[:, 1:]
    padded[...] = on_device(w)
    for placed in (on_device(w), transposed, backwards, padded):
        for given in (cp.asarray(score), score):  # scores on the device, and on the host
            same_weight(on_host(packing.pack(placed, "4:6", "int8", prune=given)), expected)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_random_pruning_is_that_of_the_cpu(dtype) -> None:
    for k in (1009, 512):
        w = awkward_weights(37, k, BFLOAT16.numpy)
        for seed in (0, -1, 2**63 + 5):
            expected = packing.pack(w, "6:8", dtype, prune="random", seed=seed)
            same_weight(on_host(packing.pack(on_device(w), "6:8", dtype, prune="random", seed=seed)), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, np.bool_])
def test_scores_of_any_real_type(dtype) -> None:
    w = awkward_weights(5, 64, np.float32)
    score = np.random.default_rng(1).integers(0, 2, w.shape).astype(dtype)
    same_weight(on_host(packing.pack(cp.asarray(w), prune=cp.asarray(score))), packing.pack(w, prune=score))


def test_pack_keeps_what_is_on_the_device_there(weights) -> None:
    """The public `pack` and `unpack`, of CuPy arrays and of another library's."""
    w = awkward_weights(33, 100, BFLOAT16.numpy)
    expected = packing.pack(w, "6:8", "int8", prune="magnitude")
    packed = packing.pack(on_device(w), "6:8", "int8", prune="magnitude")
    same_weight(on_host(packed), expected)
    np.testing.assert_array_equal(packing.unpack(packed).get(), packing.unpack(expected))
    scale = cp.full((33, 1), 0.5, cp.float64)
    assert (packing.pack(cp.ones((33, 6), cp.int8), scale=scale).scale.get() == 0.5).all()
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(w.astype(np.float32)).to("cuda", torch.bfloat16)
    same_weight(on_host(packing.pack(tensor, "6:8", "int8", prune="magnitude")), expected)


def test_a_whole_layer(weights) -> None:
    """18944 x 3584, compared with the CPU."""
    w = np.random.default_rng(0).standard_normal((18944, 3584), np.float32).astype(BFLOAT16.numpy)
    given = on_device(w)
    for dtype in (INT8, FLOAT8, BFLOAT16):
        expected = packing.pack(w, "6:8", dtype, prune="magnitude")
        same_weight(on_host(weights.pack(given, Pattern(6, 8), dtype, prune="magnitude")), expected)


def test_many_elements(weights) -> None:
    """More than 2^31 of them; the last rows are looked at."""
    n, k = (1 << 31) // 4096 + 32, 4096
    if cp.cuda.runtime.memGetInfo()[0] < 6 * n * k:
        pytest.fail("needs 13 GB of device memory")
    w = cp.zeros((n, k), cp.float16)
    last = awkward_weights(9, k, FLOAT16.numpy)
    w[-9:] = cp.asarray(last)
    packed = weights.pack(w, Pattern(6, 8), INT8, prune="magnitude")
    expected = packing.pack(last, "6:8", "int8", prune="magnitude")
    np.testing.assert_array_equal(packed.values[-9:].get(), expected.values)
    np.testing.assert_array_equal(packed.meta[-9:].get(), expected.meta)
    with pytest.raises(PatternError) as error:
        weights.pack(w, Pattern(6, 8), FLOAT16)
    broken = reference.violations(last, Pattern(6, 8))
    assert (error.value.row, error.value.group, error.value.count) == (broken[0, 0] + n - 9, broken[0, 1], len(broken))


def test_reports_violations(weights) -> None:
    w = np.ones((300, 400), np.float32)
    w[:7] = w[7, :16] = 0
    with pytest.raises(PatternError) as error:
        weights.pack(cp.asarray(w), Pattern(6, 8), INT8)
    assert (error.value.row, error.value.group, error.value.count) == (7, 2, 48 + 292 * 50)


@pytest.mark.parametrize("prune", ["none", "magnitude"])
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_refuses_what_is_not_finite(weights, dtype, prune) -> None:
    w = np.zeros((40, 4000), np.float32)
    w[20, 1717], w[20, 1800], w[33, 1] = -np.inf, np.nan, np.nan
    for source in SOURCES:
        with pytest.raises(OperandError, match=rf"w: -inf at row 20, column 1717; weights must be finite \({source}\)"):
            weights.pack(on_device(w.astype(source)), Pattern(6, 8), dtype, prune=prune)


@pytest.mark.parametrize("value", [-1, -1e-300, np.nan, np.inf, 1e300])
def test_scores_are_refused_as_on_the_cpu(value) -> None:
    w, score = np.ones((30, 400), np.float32), np.ones((30, 400))
    score[11, 17] = score[29, 3] = value
    with pytest.raises(OperandError, match="at row 11, column 17 must be finite and not negative") as wanted:
        packing.pack(w, prune=score)
    with pytest.raises(OperandError) as error:
        packing.pack(cp.asarray(w), prune=cp.asarray(score))
    assert str(error.value) == str(wanted.value)


def test_refuses_overflow() -> None:
    w = np.zeros((20, 80), np.float32)
    w[13, 3] = 70000
    with pytest.raises(OperandError, match=r"w: 70000\.0 at row 13, column 3 overflows float16; store it in another type"):
        packing.pack(cp.asarray(w), dtype="float16")


@pytest.mark.parametrize("pattern", ["2:4", "4:6"])
def test_hints_at_the_pattern_that_holds(pattern) -> None:
    w = awkward_weights(50, 384, BFLOAT16.numpy)
    for first in range(0, 384, 128):  # groups that start anew every 128 columns
        w[:, first : first + 128] = reference.prune(w[:, first : first + 128], Pattern(4, 6))
    with pytest.raises(PatternError, match="obey") as wanted:
        packing.pack(w, pattern)
    with pytest.raises(PatternError) as error:
        packing.pack(on_device(w), pattern)
    assert str(error.value) == str(wanted.value)
    assert (error.value.row, error.value.group, error.value.count) == (
        wanted.value.row,
        wanted.value.group,
        wanted.value.count,
    )


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("fault", ["twice", "index", "scale"])
def test_unpack_refuses_what_the_cpu_refuses(fault, dtype) -> None:
    if (packed := faulty(dtype, fault)) is None:
        return
    with pytest.raises(FormatError) as wanted:
        packing.unpack(packed)
    scale = None if packed.scale is None else cp.asarray(packed.scale)
    given = replace(packed, values=on_device(packed.values), meta=cp.asarray(packed.meta), scale=scale)
    with pytest.raises(FormatError) as error:
        packing.unpack(given)
    assert str(error.value) == str(wanted.value)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_parts_stay_on_the_device(dtype) -> None:
    """Rows, columns and concatenated weights are what they are on the host, and are multiplied from views."""
    w = reference.prune(awkward_weights(40, 90, SOURCES[0]), Pattern(6, 8))
    packed, there = packing.pack(w, "6:8", dtype), packing.pack(on_device(w), "6:8", dtype)
    ss.to_device(there)
    x = np.random.default_rng(0).standard_normal((7, 90)).astype(np.float32)
    for a, b, first, last in ((8, 37, 0, 90), (0, 40, 16, 64), (0, 40, 64, 90), (1, 9, 32, 90)):
        part, expected = (p.rows(a, b).columns(first, last) for p in (there, packed))
        fused = PackedWeight.concat([part, part.rows(0, 3)])
        assert isinstance(fused.meta, cp.ndarray)
        same_weight(on_host(fused), PackedWeight.concat([expected, expected.rows(0, 3)]))
        same_weight(on_host(PackedWeight.from_tensors(part.tensors("fc"), "6:8", dtype, name="fc")), expected)
        y, wanted = matmul(cp.asarray(x[:, first:last]), part), matmul(x[:, first:last], expected)
        np.testing.assert_allclose(y.get(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    with pytest.raises(OperandError, match=r"^weights\[1\].place: host must be <CUDA Device 0>"):
        PackedWeight.concat([there, packed])


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4"])
def test_pairs_are_arranged_on_the_device(scheme) -> None:
    """To the bytes that NumPy makes, on a GPU that need not multiply them."""
    from slidesparse_nb.arch import sm80_fp4

    for n, k in ((1000, 3000), (3, 61), (0, 64), (3, 0)):
        w = np.random.default_rng(n).standard_normal((n, k)).astype(np.float32)
        packed = packing.pack(w, "6:8", scheme, prune="magnitude")
        parts = {name: cp.asarray(getattr(packed, name).view(np.uint8)) for name in ("values", "meta", "block_scale")}
        np.testing.assert_array_equal(sm80_fp4.arrange(replace(packed, **parts), cp).get(), sm80_fp4.arrange(packed))


def test_block_scales_are_converted_on_the_device() -> None:
    """To the bytes that NumPy makes, of many rows of different spans; what would round is refused, and leaves nothing."""
    from slidesparse_nb.arch.multiplied_as import as_multiplied

    rng = np.random.default_rng(0)
    for n, k in ((1000, 3000), (3, 61), (0, 64), (3, 0)):
        down = np.repeat(rng.integers(0, 13, (n, -(-k // 128))), 128, axis=1)[:, :k]
        w = np.ldexp(rng.standard_normal((n, k)), rng.integers(-90, 90, (n, 1)) - down).astype(np.float32)
        w[::7] = w[1::7, :128] = 0
        packed = packing.pack(w, "6:8", "W4A8", prune="magnitude")
        parts = {name: cp.asarray(getattr(packed, name).view(np.uint8)) for name in ("values", "meta", "block_scale")}
        there = as_multiplied(replace(packed, **parts, scale=cp.asarray(packed.scale)), cp)
        same_weight(on_host(there), as_multiplied(packed, np))
    w = np.ones((2, 256), np.float32)
    w[1, 128:] = 2.0**-20
    packed = packing.pack(w, "6:8", "W4A8", prune="magnitude")
    with pytest.raises(UnsupportedError, match=r"^packed: row 1 has block scales 2\^-20 to 2\^0 and scale .* pack as FP8"):
        ss.to_device(packed)
    assert ss.to_device(packed.rows(0, 1)).nbytes
