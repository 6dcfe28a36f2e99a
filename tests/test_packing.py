"""pack and unpack: every source, every way to lay it out, and one clear sentence for everything else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import FLOATS, LARGE, SHAPES, SMALL, every_mask, same, schemes, stored, stored_twice, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from slidesparse_nb import (
    FormatError,
    OperandError,
    Options,
    Pattern,
    PatternError,
    Run,
    Scheme,
    VerificationError,
    pack,
    pack_checkpoint,
    packing,
    save,
    unpack,
    verify,
)
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED, DType
from slidesparse_nb.core.prune import uniform
from slidesparse_nb.core.scheme import SCHEMES


def check(w: Any, pattern: Pattern, scheme: Scheme, prune: Any, scale: Any = None, workers: int = 1) -> None:
    """pack gives the bytes of the reference, unpack its values, and verify accepts what pack makes."""
    pattern = scheme.pattern((pattern.nnz, pattern.group))
    score = uniform(5, 0, *w.shape) if isinstance(prune, str) and prune == "random" else prune
    pruned = reference.prune(w, pattern, None if isinstance(score, str) else np.where(w == 0, np.float32(-1), score))
    packed = pack(w, pattern, scheme, scale=scale, prune=prune, seed=5, max_workers=workers).validate()
    same(packed, reference.pack(pruned, pattern, scheme, scale))
    same(pack(pruned, pattern, scheme, scale=scale), packed)
    back = unpack(packed)
    assert back.tobytes() == reference.unpack(packed).tobytes()
    assert not back[pruned == 0].any()
    verify(packed)
    verify(packed, pruned, scale=scale)
    for seed in (5, None) if not scheme.blocks else (5,):
        verify(packed, w, scale=scale, prune=prune, seed=seed, max_workers=workers)


@schemes
@pytest.mark.parametrize("shape", [*SHAPES, (7, 300)], ids=str)
def test_equals_the_reference(bodies: str, scheme: Scheme, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks and the threads; of weights that are quantized already, bytes and scales are kept."""
    score = np.random.default_rng(1).integers(0, 9, shape)
    if compiled := bodies == "compiled":  # in other threads, NumPy's scalars would warn
        monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", 128)
    for i, pattern in enumerate([*SMALL, LARGE[1]] if compiled else SMALL[:2]):
        for prune in ("magnitude", "random", score):
            check(weights(shape, FLOATS[i % 3], seed=i), pattern, scheme, prune, workers=1 + i % 3 * compiled)
            if scheme.dtype.numpy.itemsize == 1 and not scheme.blocks:
                q, scale = stored(shape, Pattern(30, 32), scheme.dtype, seed=i), np.linspace(0, 1, shape[0], dtype=np.float32)
                check(q, pattern, scheme, prune, scale[:, None])


@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_every_mask_of_a_group(pattern: Pattern) -> None:
    check(every_mask(pattern), pattern, Scheme.of(INT8), "magnitude", np.float32([[1]]).repeat(len(every_mask(pattern)), 0))


MADE = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "ties": lambda rng, shape: rng.integers(-3, 4, shape),
    "wide": lambda rng, shape: rng.standard_normal(shape) * 2.0 ** rng.integers(-110, 10, shape),
    "bits": lambda rng, shape: np.nan_to_num(rng.integers(0, 2**32, shape, np.uint32).view(np.float32)).clip(-6e4, 6e4),
}


@settings(max_examples=200)
@given(
    st.sampled_from(list(SCHEMES.values())), st.sampled_from(SMALL + LARGE), st.sampled_from(FLOATS), st.sampled_from([*MADE]),
    st.sampled_from(["magnitude", "random", "scores"]), st.tuples(st.integers(0, 5), st.integers(0, 150)),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_weights(
    scheme: Scheme, pattern: Pattern, source: np.dtype, made: str, prune: str, shape: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = MADE[made](rng, shape).astype(source)
    check(w, pattern, scheme, rng.integers(0, 4, shape) if prune == "scores" else prune)


@pytest.mark.parametrize(
    "scale",
    [
        0.5,
        np.float64(0.5),
        np.array(0.5),
        np.array([0.5]),
        np.array([[0.5]], np.float16),
        np.full(3, 0.5),
        np.full((3, 1), 0.5, ml_dtypes.bfloat16),
    ],
    ids=str,
)
def test_scales_of_every_shape(scale: Any) -> None:
    packed = pack(np.ones((3, 2), np.int8), scale=scale)
    assert packed.scale.dtype == np.float32
    assert packed.scale.tolist() == [[0.5]] * 3


def test_minus_zero_and_tiny_scales() -> None:
    packed = pack(np.ones((3, 2), np.int8), scale=[-0.0, 1e-45, 0])
    assert packed.scale.tobytes() == np.array([0, 1e-45, 0], np.float32).tobytes()
    verify(packed, np.ones((3, 2), np.int8), scale=[-0.0, 1e-45, 0])


def test_default_types() -> None:
    w = np.zeros((1, 8))
    assert pack(w.astype(np.float32)).dtype is BFLOAT16
    assert pack(w.astype(np.float16)).dtype is FLOAT16
    assert pack(w.astype(ml_dtypes.bfloat16)).dtype is BFLOAT16
    assert pack(w.astype(np.int8), scale=1).dtype is INT8
    assert pack(w.astype(ml_dtypes.float8_e4m3fn), scale=1).dtype is FLOAT8
    assert pack(w.astype(np.float32)).pattern == Pattern(6, 8)


@pytest.mark.parametrize("source", [*FLOATS, INT8.numpy, FLOAT8.numpy], ids=str)
def test_every_layout_in_memory(source: np.dtype, tmp_path: Path) -> None:
    scale = 1 if source.itemsize == 1 else None
    w = np.random.default_rng(0).integers(-9, 10, (6, 40)).astype(source)
    before = w.tobytes()
    wanted = pack(w, "6:8", scale=scale, prune="magnitude")
    fixed = w.copy()
    fixed.flags.writeable = False
    mapped = np.memmap(tmp_path / "w", source, "w+", shape=w.shape)
    mapped[:] = w
    for same_w in (
        np.asfortranarray(w),
        np.repeat(np.repeat(w, 2, 0), 3, 1)[::2, ::3],
        w[::-1, ::-1].copy()[::-1, ::-1],
        fixed,
        mapped,
    ):
        got = pack(same_w, "6:8", scale=scale, prune="magnitude")
        same(got, wanted)
        assert type(got.values) is np.ndarray
    assert w.tobytes() == before  # pruning is not in place
    q, _ = packing.store_rows(w, "6:8", wanted.dtype, scale=scale)
    assert not np.shares_memory(q, w)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_unpack_refuses_a_column_stored_twice(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = stored_twice(dtype)
    with pytest.raises(FormatError, match=r"^packed: row 2 stores column 19 in two windows, as no packer does"):
        unpack(packed)
    monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", 32)
    with pytest.raises(FormatError, match=r"^packed: row 2 stores column 19"):
        unpack(packed)
    with pytest.raises(VerificationError, match=r"window 6 of row 2 \(group 2\) is not canonical"):
        verify(packed)


def test_threads_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights((37, 90))
    wanted = pack(w, "8:10", "int8", prune="magnitude", max_workers=1)
    monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", 200)
    for workers in (None, 1, 2, 7, np.int64(2), np.uint8(1)):
        same(pack(w, "8:10", "int8", prune="magnitude", max_workers=workers), wanted)
    assert (unpack(wanted) == reference.unpack(wanted)).all()


def test_quantization_can_make_room() -> None:
    """Non-zero means non-zero as stored."""
    w = np.full((1, 8), 1e-3, np.float32)
    w[0, :6] = 1
    assert pack(w, "6:8", "int8").values.tolist() == [[127] * 6 + [0] * 6]
    with pytest.raises(PatternError):
        pack(w, "6:8", "bfloat16")


@pytest.mark.parametrize("value", [None, np.ones((1, 8)), "6:8"], ids=["none", "array", "text"])
def test_unpack_and_verify_want_a_packed_weight(value: Any) -> None:
    for call in (unpack, verify):
        with pytest.raises(OperandError, match=r"^packed: \w+ must be a PackedWeight; pack\(w\) or load\(path\) makes one$"):
            call(value)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_violations_are_counted_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", 64)
    w = np.zeros((50, 32), np.float32)
    w[13, 8:15] = w[13, 16:24] = w[49] = 1
    for workers in (1, 2):
        with pytest.raises(PatternError, match=r"row 13, group 1 \(columns 8 to 15\) .* so have 6 groups in all") as caught:
            pack(w, "6:8", max_workers=workers)
        assert (caught.value.row, caught.value.group, caught.value.count) == (13, 1, 6)
    with pytest.raises(PatternError, match="row 113, group 1") as caught:
        packing.pack_rows(w.astype(np.float16), None, "6:8", "fp16", first_row=100)
    assert caught.value.row == 113


def test_hint_at_the_pattern_that_holds() -> None:
    w = reference.prune(weights((4, 128)), Pattern(6, 8))
    with pytest.raises(
        PatternError, match=r"they do obey 6:8 \(2 zeros in 8\), which tools that count zeros call 2:8: pass '6:8'"
    ):
        pack(w, "2:4")
    assert packing.violations_hint(w, "2:4") == packing.violations_hint(w.astype(np.float16), Pattern(2, 4))
    assert packing.violations_hint(np.ones((2, 256), np.int8), "6:8") == ""


def test_hint_at_groups_that_start_anew_every_128_columns() -> None:
    w = np.ones((3, 384), np.float32)
    for first in range(0, 384, 128):
        w[:, first : first + 128] = reference.prune(w[:, first : first + 128], Pattern(4, 6))
    with pytest.raises(PatternError, match=r"obey 4:6 if groups start anew every 128 columns, .* such as 6:8$"):
        pack(w, "4:6")
    w[0] = 1
    assert packing.violations_hint(w, "4:6") == ""


@pytest.mark.parametrize("dtype", [*PACKED, None], ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("prune", ["none", "random"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(dtype: DType | None, source: np.dtype, prune: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", 32)
    w = np.zeros((20, 16), source)
    w[17, 3] = value
    for workers in (1, 2):
        with pytest.raises(OperandError, match=f"w: {value} at row 17, column 3; weights must be finite"):
            pack(w, "6:8", dtype, prune=prune, max_workers=workers)


def test_float8_nan() -> None:
    w = np.array([[1, np.nan]], FLOAT8.numpy)
    with pytest.raises(OperandError, match="w: nan at row 0, column 1"):
        pack(w, scale=1)


@pytest.mark.parametrize(
    ("source", "dtype", "value"),
    [
        (np.float32, "float16", 65520),
        (np.float32, "float16", -1e5),
        (np.float32, "bfloat16", 3.4e38),
        (ml_dtypes.bfloat16, "float16", 1e5),
    ],
)
def test_overflow(source: Any, dtype: str, value: float) -> None:
    w = np.zeros((4, 16), source)
    w[2, 7] = value
    with pytest.raises(OperandError, match=f"at row 12, column 7 overflows {dtype}; store it in another type"):
        packing.store_rows(w, "6:8", dtype, first_row=10)


F32, I8 = np.ones((2, 8), np.float32), np.ones((2, 8), np.int8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([[1.0]],), {}, "w: list is not an array; pass a NumPy array"),
        ((None,), {}, "w: NoneType is not an array"),
        ((F32[0],), {}, r"w: shape \(8,\) must be \[n, k\]"),
        ((F32.astype(np.float64),), {}, r"w: float64 cannot be packed; .* convert it first: w.astype\(np.float32\)"),
        ((I8.astype(np.int32),), {}, "w: int32 cannot be packed"),
        ((F32.astype(">f4"),), {}, "w: >f4 cannot be packed"),
        (
            (F32.astype(np.complex64),),
            {},
            "w: complex64 cannot be packed; it must be one of float32, float16, bfloat16, int8, float8_e4m3fn$",
        ),
        ((F32, "3:8"), {}, "pattern: 3:8"),
        ((F32, "6:8", "int4"), {}, "dtype: 'int4' is not a packed type"),
        ((F32,), {"scale": 1}, "scale: float32 weights are quantized here and take none"),
        ((I8,), {}, "scale: is missing; int8 weights are quantized already"),
        ((I8, "6:8", "bfloat16"), {"scale": 1}, "dtype: int8 weights are quantized already and keep their type, got bfloat16"),
        ((I8, "6:8", "fp8"), {"scale": 1}, "dtype: int8 weights .* got float8_e4m3fn"),
        ((I8,), {"scale": np.ones(3)}, r"scale: shape \(3,\) must be \[2, 1\], \[2\], or one number"),
        ((I8,), {"scale": np.ones((1, 2))}, r"scale: shape \(1, 2\)"),
        ((I8,), {"scale": [1, -1]}, "scale: -1.0 at row 1 must be finite and not negative"),
        ((I8,), {"scale": np.nan}, "scale: nan at row 0"),
        ((I8,), {"scale": 1e39}, "scale: inf at row 0"),
        ((I8,), {"scale": "a"}, "scale: <U1 must be real numbers"),
        ((I8,), {"scale": 1e-300}, "scale: 1e-300 at row 0 must be .* not so small that float32 makes it zero"),
        ((I8,), {"scale": [1, -1e-300]}, "scale: -1e-300 at row 1 must be finite and not negative"),
        ((I8,), {"scale": 10**400}, "scale: object must be real numbers"),
        ((I8,), {"scale": [1, [2]]}, "scale: list cannot be made an array .*; pass real numbers"),
        ((I8,), {"scale": 1j}, "scale: complex128 must be real numbers"),
        ((I8,), {"scale": np.datetime64("2020")}, r"scale: datetime64\[Y\] must be real numbers"),
        ((I8,), {"scale": np.ma.ones(2)}, "scale: is a masked array, and the mask would be lost"),
        ((np.ma.ones((2, 8), np.float32),), {}, r"w: is a masked array, .* pass w.filled\(value\)"),
        ((F32,), {"max_workers": np.int64(0)}, "max_workers: .* must be"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OperandError, match=f"^{message}"):
        pack(*args, **options)


# ---- the same bytes as ever --------------------------------------------------------------------------------------


def test_a_small_model_packs_to_the_bytes_of_release_0_1(tmp_path: Path) -> None:
    """The data of the files that the code of 5d7fe3c, before there were schemes, made of this model."""
    raw = np.random.default_rng(15).integers(0, 2**32, (48, 100), np.uint32)
    w = (raw >> 8).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    w *= np.float32(2) ** (raw & 7).astype(np.float32)
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save(source, {"mlp.up_proj.weight": w[:24], "mlp.down_proj.weight": w[24:, :90].copy(), "norm.weight": w[0]})
    total = hashlib.sha256()
    for pattern in ("2:4", "4:6", "6:8", "8:10", "14:16"):
        for scheme in ("INT8_W8A8", "FP8_DYNAMIC", "BF16", "FP16"):
            for method in ("magnitude", "random"):
                options = Options(pattern=pattern, scheme=scheme, prune=method, seed=7)  # type: ignore[arg-type]
                pack_checkpoint(source, out, options, Run(overwrite=True, verify=False))
                data = out.read_bytes()
                total.update(data[8 + int.from_bytes(data[:8], "little") :])
    assert total.hexdigest() == "a563337b0135c4a445244d4fd6553e1191a6c4c03f9edc32eaad6df331436732"
