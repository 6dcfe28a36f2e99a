"""Pairs on GPUs that have the instruction, which NumPy plays: what is chosen, arranged, handed to kernels and tested first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_cases import blocked, same
from numpy_gpu import BF16, F16, F32, Array, array, close, forget_plans, numpy_for_cupy, ops, wanted, weight

import slidesparse_nb as ss
from slidesparse_nb import arch, doctor
from slidesparse_nb.arch import sm80, sm80_fp4
from slidesparse_nb.core import reference
from slidesparse_nb.core.packed import ORDERED_NIBBLES, part_arrays
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import SCHEMES
from slidesparse_nb.errors import UnsupportedError

NVFP4, MXFP4 = PAIRED = [SCHEMES["NVFP4"], SCHEMES["MXFP4"]]
PAIRS = Pattern(6, 8, 2)
schemes = pytest.mark.parametrize("scheme", PAIRED, ids=str)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path))
    with numpy_for_cupy(monkeypatch, False, getattr(request, "param", (12, 0))) as made:
        yield made


@pytest.fixture
def trusted(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU on which no kernel is tested first."""
    monkeypatch.setattr(arch, "RAN", frozenset({(sm80.ARCH.source, gpu.capability)}))
    return gpu


def device(gpu: Any) -> Device:
    return Device(gpu.capability, 132, "NumPy in CuPy's place")


def tokens(m: int, k: int) -> Any:
    return array(np.random.default_rng(m).standard_normal((m, k)).astype(BF16))


def packed_pairs(n: int, k: int, text: str = "6:8", scheme: ss.Scheme = NVFP4) -> ss.PackedWeight:
    return weight(n, k, scheme, scheme.pattern(text))


# ---- what a kernel must multiply first -------------------------------------------------------------------------------


def found(codes: Any) -> Any:
    """Which of 16 codes every lane has: bool [32, 16] of [..., 32]."""
    seen = np.zeros((32, 16), bool)
    seen[np.broadcast_to(np.arange(32), codes.shape), codes] = True
    return seen


@schemes
@pytest.mark.parametrize("pattern", known_patterns(), ids=str)
def test_the_test_shows_every_nibble_value_and_scale(gpu: Any, pattern: Pattern, scheme: ss.Scheme) -> None:
    """All but -0, which packed weights lack; sums of magnitudes are below 2^13 of their smallest step."""
    block = scheme.activations.block
    assert block is not None
    tests, steps = gpu.self_test, sm80_fp4.layout(block).steps
    for m, n, k in tests.SHAPES:
        made = tests.case(GemmProblem(m, n, 2 * k, scheme.pattern(pattern), scheme, "bfloat16", Device(gpu.capability, 84)))
        arranged = sm80_fp4.arrange(made.packed)
        words = np.ascontiguousarray(arranged[..., 512 * steps : 640 * steps]).view(np.uint32).reshape(-1, 32)
        values = arranged[..., : 512 * steps].reshape(-1, 32, 16).swapaxes(1, 2)
        assert all(found(words >> j & 15)[:, ORDERED_NIBBLES].all() for j in range(0, 32, 4))
        assert all(np.delete(found(nibbles), 8, axis=1).all() for nibbles in (values & 15, values >> 4))
        for scales, rows in ((made.packed.block_scale, n), (made.block_scale, m)):
            assert len(np.unique(scales.view(np.uint8))) > min(6, rows // 2)
            assert (np.ptp(scales.astype(np.float32), axis=1) > 0).all()
        x = np.abs(reference.times_blocks(made.x, made.block_scale, block.columns).astype(np.float64))
        w = np.abs(reference.decompress(reference.stored_values(made.packed), made.packed.meta, 2).astype(np.float64))
        least_x, least_w = (np.where(v > 0, v, np.inf).min(axis=1) for v in (x, w))
        assert (x @ w.T / (least_x[:, None] * least_w)).max() < 2**13


@schemes
@pytest.mark.parametrize("gpu", sm80.BLOCK_SCALED, ids=str, indirect=True)
def test_it_is_tested_once_and_then_multiplied(gpu: Any, scheme: ss.Scheme) -> None:
    packed, x = packed_pairs(40, 200, scheme=scheme), tokens(7, 200)
    close(ops().matmul(x, packed), wanted(x, packed))
    told = [(finding.state, finding.text) for finding in doctor.self_tests()]
    assert told == [
        ("ok", f"{len(gpu.self_test.outcomes(device(gpu)))} kernels that we never ran on such a GPU equal NumPy on this one")
    ]
    gpu.launched.clear()
    close(ops().matmul(x, packed_pairs(40, 200, scheme=scheme)), wanted(x, packed))
    assert gpu.launched == [f"blocks bfloat16 {scheme}", "gemm"]


def test_a_wrong_kernel_gives_way_and_with_none_left_the_product_is_refused(gpu: Any) -> None:
    packed, x = packed_pairs(40, 200), tokens(7, 200)
    (first,) = arch.choose(GemmProblem(7, 40, 200, PAIRS, NVFP4, "bfloat16", device(gpu)))
    gpu.spoil = lambda config, y: np.roll(y, 1, axis=1) if config.tile == first.tile else y
    assert gpu.gemm.to_device(packed).bind(7, "bfloat16").plan.configs[0].tile != first.tile
    close(ops().matmul(x, packed), wanted(x, packed))
    gpu.spoil = lambda config, y: np.roll(y, 1, axis=1)
    gpu.self_test._known.clear()
    forget_plans()
    for place in gpu.self_test.folder(device(gpu)).glob("*.json"):
        place.unlink()
    with pytest.raises(UnsupportedError, match=r"^device: no kernel for y\[7, 40\] .* passes its self-test .* report it$"):
        ops().matmul(x, packed_pairs(40, 200))


# ---- products ----------------------------------------------------------------------------------------------------------


@schemes
@pytest.mark.parametrize("source", [BF16, F16, F32], ids=str)
def test_matmul(trusted: Any, source: Any, scheme: ss.Scheme) -> None:
    """Whole, cut along n and k, joined, of a stack, arranged ahead: the reference's product."""
    packed, x = packed_pairs(40, 400, scheme=scheme), tokens(6, 400).astype(source).view(Array)
    bias = array(np.arange(40, dtype=np.float32))
    close(ops().matmul(x, packed, bias=bias), wanted(x, packed, np.asarray(bias)))
    assert trusted.launched[-2:] == [f"blocks {source} {scheme}", "gemm"]
    assert not trusted.gemm.to_device(packed).nbytes % 16
    for y in (
        ops().matmul(x.reshape(3, 2, 400), packed, out_dtype=F32).reshape(6, 40),
        ops().matmul(x, ops().to_device(packed), out_dtype=F32),
        ops().matmul(array(x.T).T, packed, out_dtype=F32),
        ops().matmul(x, ss.PackedWeight.stack([packed, packed])[1], out_dtype=F32),
        ops().matmul(x, ss.PackedWeight.concat([packed.rows(0, 8), packed.rows(8, 40)]), out_dtype=F32),
    ):
        close(y, wanted(x, packed, out=F32))
    for start, stop in ((0, 256), (256, 400)):
        part, of = packed.columns(start, stop), array(np.asarray(x)[:, start:stop])
        close(ops().matmul(of, part, out_dtype=F32), wanted(of, part, out=F32))


@schemes
@pytest.mark.parametrize("text", ["2:4", "14:16", "16:18"])
@pytest.mark.parametrize(("n", "k"), [(7, 301), (40, 1), (3, 0), (0, 64)])
def test_patterns_and_tails(trusted: Any, text: str, n: int, k: int, scheme: ss.Scheme) -> None:
    packed, x = packed_pairs(n, k, text, scheme), tokens(5, k)
    close(ops().matmul(x, packed), wanted(x, packed))


@schemes
def test_what_is_arranged(trusted: Any, scheme: ss.Scheme) -> None:
    """One buffer and the scales of rows, from the host and from the GPU; its copy is the weight again."""
    packed = packed_pairs(40, 400, scheme=scheme)
    there = replace(
        packed,
        **{part: array(np.asarray(a).view(f"u{a.itemsize}")) for part, a in part_arrays(packed).items() if part != "scale"},
        scale=array(packed.scale),
    )
    for weight_ in (packed, there):
        made = ops().to_device(weight_)
        assert (made.scheme, made.buffers.keys()) == (scheme, {"weights", "scale"})
        np.testing.assert_array_equal(np.asarray(made.buffers["weights"]), sm80_fp4.arrange(packed))
    (config,) = made.bind(7, "bfloat16").plan.configs
    blocks = config.arguments(made.problem(7, "bfloat16"))["blocks"]
    assert (blocks, blocks * 144) == (len(made.buffers["weights"]), made.operand.row_bytes)
    again = ops().device_weight(made.buffers, "6:8", scheme, (40, 400))
    assert (again.scheme, again.pattern, again.addresses) == (scheme, PAIRS, made.addresses)


@schemes
def test_by_addresses(trusted: Any, scheme: ss.Scheme) -> None:
    """The operand alone is the one that `operand_bytes` tells; a norm or a gate is not fused with it."""
    there, x = ops().to_device(packed_pairs(40, 200, scheme=scheme)), tokens(7, 200)
    size, scaled = ops().operand_bytes(7, 200, "6:8", scheme, trusted.capability)
    operand, scale = array(np.full(size, 0x55, np.uint8)), array(np.zeros(7, np.float32))
    there.quantize(7, x.data.ptr, "bfloat16", x.strides, operand.data.ptr, scale.data.ptr, 7)
    same(np.asarray(operand).reshape(7, -1), np.asarray(scale).reshape(7, 1), blocked(np.asarray(x), PAIRS, scheme))
    assert scaled
    at = x.data.ptr
    assert not there.rms_norm(7, at, "bfloat16", 400, 0, at, 0, 1e-5, operand.data.ptr, scale.data.ptr, 7)
    assert not there.gate_and_mul("silu_and_mul", 7, at, "bfloat16", 800, operand.data.ptr, scale.data.ptr, 7)


# ---- where it is not ---------------------------------------------------------------------------------------------------


@schemes
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (11, 0), (12, 2)], ids=str)
def test_refused_elsewhere(capability: tuple[int, int], scheme: ss.Scheme) -> None:
    major, minor = capability
    assert sm80.ARCH.refuses(capability, scheme) == (
        f"packed: {scheme} weights need compute capability 12.0 or 12.1, this device has {major}.{minor}; pack as"
        " int8 or bfloat16 for it"
    )
    for served in sm80.BLOCK_SCALED:
        assert not sm80.ARCH.refuses(served, scheme)
        assert "no kernel" in sm80.ARCH.refuses(served, SCHEMES["W4A8"]), "which is multiplied as FP8"


def test_doctor_names_it() -> None:
    assert [doctor._multiplied(c)[-1] for c in ((12, 0), (12, 1), (9, 0), (8, 0))] == [
        MXFP4, MXFP4, SCHEMES["W4A8"], SCHEMES["FP16"],
    ]  # fmt: skip


@schemes
def test_doctor_multiplies_it(trusted: Any, scheme: ss.Scheme) -> None:
    assert doctor._matmul(scheme).startswith("equals the reference to ")
    trusted.spoil = lambda config, y: y * np.float32(1.01)
    with pytest.raises(ArithmeticError, match="products differ from the reference"):
        doctor._matmul(scheme)


def test_it_is_not_tuned() -> None:
    with pytest.raises(
        UnsupportedError, match=r"^product: NVFP4 weights are not tuned; their launches are the model's choice$"
    ):
        ss.tune_products([(7, 40, 200, "6:8", "NVFP4", "bfloat16")])
