"""W4A8 on GPUs: the conversion to FP8 is exact or refused, and what is arranged and multiplied there is that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arranged import restore_sm80, restore_sm90
from cases import every_mask, weights
from numpy_gpu import BF16, F32, array, close, gpu, ops, wanted

import slidesparse_nb as ss
from slidesparse_nb.arch import for_capability, sm80_layout, sm90_layout
from slidesparse_nb.arch.multiplied_as import LEAST, MOST, TABLE, as_multiplied
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import FLOAT4, FLOAT8
from slidesparse_nb.core.packed import part_arrays
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import SCHEMES, Scheme

__all__ = ["gpu"]  # the fixture

FP8 = Scheme.of("fp8")


def packed_w4a8(n: int, k: int, pattern: str = "6:8", spread: int = 14) -> ss.PackedWeight:
    """Rows whose blocks have scales up to `spread` powers of two apart; one is zero, and so are the first block of all."""
    rng, of = np.random.default_rng(n + k), Scheme.of("W4A8").slice_unit(Pattern.of(pattern))
    down = np.repeat(rng.integers(0, spread - 1, (n, -(-k // of))), of, axis=1)[:, :k]
    w = np.ldexp(rng.standard_normal((n, k)), rng.integers(-90, 90, (n, 1)) - down)
    w[:, :of] = w[n // 2 : n // 2 + 1] = 0
    return ss.pack(w.astype(np.float32), pattern, "W4A8", prune="magnitude")


def blocks(exponents: list[int], scale: float = 1.0, value: float = 1.0) -> ss.PackedWeight:
    """A weight of one row, 2:4, whose blocks hold `value` once each, times these powers of two."""
    packed = ss.pack(np.ones((1, 64 * len(exponents)), np.float32), "2:4", "W4A8", prune="magnitude")
    values = np.zeros_like(packed.values).reshape(len(exponents), -1)
    values[:, 0] = np.array(value).astype(FLOAT4.numpy).view(np.uint8)
    codes = np.array([exponents], np.int32).astype(np.uint8) + np.uint8(127)
    return replace(
        packed, values=values.reshape(1, -1), block_scale=codes, scale=np.array([[scale]], np.float32)
    )  # fmt: skip


def exactly(packed: ss.PackedWeight) -> Any:
    """The weights in float64, which holds them."""
    return reference.unpack(packed).astype(np.float64) * np.asarray(packed.scale, np.float64)


def test_every_value_at_every_exponent() -> None:
    """Both tables, e2m1 and e4m3, are whole: no exponent within the bounds rounds, and those beyond them do."""
    q = np.arange(16, dtype=np.uint8).view(FLOAT4.numpy).astype(np.float64)
    for d in range(-40, 41):
        with np.errstate(invalid="ignore", over="ignore"):
            there = (q * 2.0**d).astype(FLOAT8.numpy)
        exact = np.array_equal(there.astype(np.float64), q * 2.0**d)
        assert exact == (LEAST <= d <= MOST), d
        if exact:
            np.testing.assert_array_equal(TABLE[d - LEAST], there.view(np.uint8))


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "14:16"])
@pytest.mark.parametrize(("n", "k"), [(7, 1000), (3, 61), (0, 64), (3, 0), (1, 1)])
def test_weights(pattern: str, n: int, k: int) -> None:
    """The same numbers in the same slots, whatever the tail; and still when they are arranged."""
    packed = packed_w4a8(n, k, pattern)
    made = as_multiplied(packed, np).validate()
    assert (made.scheme, made.shape, made.pattern) == (FP8, (n, k), packed.pattern)
    assert made.meta is packed.meta
    np.testing.assert_array_equal(exactly(made), exactly(packed))
    assert np.isfinite(exactly(made)).all()
    for back in (restore_sm80(sm80_layout.arrange(made), made), restore_sm90(sm90_layout.arrange(made), made)):
        np.testing.assert_array_equal(exactly(back), exactly(packed))


def test_other_schemes_stay() -> None:
    for scheme in SCHEMES.values():
        packed = ss.pack(weights((4, 64)), "6:8", scheme, prune="magnitude")
        assert (as_multiplied(packed, np) is packed) == (scheme.kernel is scheme)
        assert scheme.kernel is (FP8 if scheme.name == "W4A8" else scheme)


def test_spans() -> None:
    """Every span that fits is exact, at any place, with the row's scale as it is where nothing is below 2^-8."""
    for lowest in range(-126, 1):
        for span in range(15):
            if lowest + span <= 0:
                for value in (0.5, -6.0):
                    packed = blocks([lowest, lowest + span], value=value)
                    made = as_multiplied(packed, np)
                    np.testing.assert_array_equal(exactly(made), exactly(packed))
                    assert (made.scale[0, 0] == 1) == (lowest >= LEAST)


@pytest.mark.parametrize(
    ("exponents", "scale", "told"),
    [
        ([0, -15], 1.0, "row 1 has block scales 2^-15 to 2^0 and scale 1,"),
        ([-40, -54, -60], 1.0, "row 1 has block scales 2^-60 to 2^-40 and scale 1,"),
        ([128, 0], 1.0, "row 1 has block scales 2^0 to 2^128 and scale 1,"),  # e8m0's NaN
        ([0, -14], 2.0**-149, "row 1 has block scales 2^-14 to 2^0 and scale 1.4013e-45,"),  # times 2^-6 it is 0
    ],
)
def test_what_would_round_is_refused(exponents: list[int], scale: float, told: str) -> None:
    packed = blocks(exponents, scale)
    packed = ss.PackedWeight.concat([blocks([0] * len(exponents)), packed])
    with pytest.raises(ss.UnsupportedError) as refused:
        as_multiplied(packed, np)
    rest = " which FP8 kernels cannot hold exactly (15 powers of two a row); pack as FP8_DYNAMIC, or use NumPy arrays"
    assert str(refused.value) == f"packed: {told}{rest}"


def test_blocks_of_zeros_do_not_count() -> None:
    packed = blocks([0, -126, -14])
    values = packed.values.copy().reshape(3, -1)
    values[1, 0] = 8  # -0, which no packer writes
    packed = replace(packed, values=values.reshape(1, -1))
    np.testing.assert_array_equal(exactly(as_multiplied(packed, np)), exactly(packed))
    dead = replace(packed, values=np.zeros_like(packed.values))
    assert not exactly(as_multiplied(dead, np)).any()


def test_every_mask() -> None:
    w = np.tile(every_mask(Pattern(6, 8)).astype(np.float32), (1, 20))
    packed = ss.pack(w, "6:8", "W4A8")
    np.testing.assert_array_equal(exactly(as_multiplied(packed, np)), exactly(packed))


# ---- on a GPU, which NumPy plays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [BF16, F32], ids=str)
def test_matmul(gpu: Any, source: Any) -> None:
    """Whole, cut along n and k, joined, of a stack, arranged ahead, of x quantized once: the reference's product of W4A8."""
    packed, x = packed_w4a8(40, 400), array(np.random.default_rng(1).standard_normal((3, 2, 400)).astype(source))
    flat, bias = np.asarray(x).reshape(6, 400), array(np.arange(40, dtype=np.float32))
    scale = array(np.asarray(packed.scale).T)  # rows are of very different size

    def check(y: Any, expected: Any) -> None:
        close((np.asarray(y, np.float32) / scale).astype(F32), (expected / scale).astype(F32))

    check(ops().matmul(x, packed, out_dtype=F32).reshape(6, 40), wanted(flat, packed, out=F32))
    check(ops().matmul(x, packed, bias=bias, out_dtype=F32).reshape(6, 40), wanted(flat, packed, np.asarray(bias), F32))
    assert gpu.launched[-1] == "gemm"
    for y in (
        ops().matmul(ops().quantize(x, packed), packed, out_dtype=F32),
        ops().matmul(ops().quantize(x, "6:8", "W4A8"), ops().to_device(packed), out_dtype=F32),
        ops().matmul(x, ss.PackedWeight.stack([packed, packed])[1], out_dtype=F32),
    ):
        check(y.reshape(6, 40), wanted(flat, packed, out=F32))
    gamma, gates = array(np.ones(400, source)), array(np.concatenate([flat, flat], axis=1))
    normed, gated = reference.rms_norm(flat, np.asarray(gamma), 1e-5)[0], reference.silu_and_mul(np.asarray(gates))
    for made, of in ((ops().rms_norm(array(flat), gamma, 1e-5, packed), normed), (ops().silu_and_mul(gates, packed), gated)):
        check(ops().matmul(made, packed, out_dtype=F32), wanted(of, packed, out=F32))
    left, right = packed.columns(0, 256), packed.columns(256, 400)
    for part, of in ((left, flat[:, :256]), (right, flat[:, 256:])):
        check(ops().matmul(array(of), part, out_dtype=F32), wanted(of, part, out=F32))
    scale = scale[:, 8:37]
    part = packed.rows(8, 37)
    check(ops().matmul(array(flat), part, out_dtype=F32), wanted(flat, part, out=F32))


def test_what_is_arranged(gpu: Any) -> None:
    """The buffers of the weight in FP8, from the host and from the GPU; the one refused leaves nothing behind."""
    packed = packed_w4a8(40, 400)
    fp8 = as_multiplied(packed, np)
    bits = {part: np.asarray(a).view(f"u{a.itemsize}") for part, a in part_arrays(packed).items() if part != "scale"}
    there = replace(packed, scale=array(packed.scale), **{part: array(a) for part, a in bits.items()})
    expected = ops().to_device(fp8).buffers
    for weight in (packed, there):
        made = ops().to_device(weight)
        assert (made.scheme, made.dtype, made.nbytes) == (FP8, FLOAT8, ops().to_device(fp8).nbytes)
        assert made.buffers.keys() == expected.keys()
        for name, buffer in made.buffers.items():
            np.testing.assert_array_equal(np.asarray(buffer), np.asarray(expected[name]))
        again = ops().device_weight(made.buffers, "6:8", "W4A8", (40, 400))
        assert (again.scheme, again.addresses) == (FP8, made.addresses)
    with pytest.raises(ss.UnsupportedError, match=r"^packed: row 0 has block scales"):
        ops().to_device(blocks([0, -15]))


def test_problems_are_those_of_fp8() -> None:
    """Tuning, candidates and the size of an operand."""
    asked = 64, 4096, 4096, "6:8"
    device = Device((9, 0), 132)
    assert GemmProblem.of((*asked, "W4A8", "bfloat16"), device) == GemmProblem.of((*asked, "fp8", "bfloat16"), device)
    for capability in (None, (8, 9), (9, 0), (10, 0)):
        assert ss.operand_bytes(5, 100, "6:8", "W4A8", capability) == ss.operand_bytes(5, 100, "6:8", "fp8", capability)
    assert for_capability((8, 0)).refuses((8, 0), Scheme.of("W4A8").kernel)
