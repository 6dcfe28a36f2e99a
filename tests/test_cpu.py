"""The compiled functions give the bits of the reference; each test also runs the kernels' Python bodies, uncompiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest
from cases import FLOATS, LARGE, SMALL, drop_two, weights

from slidesparse_nb import OperandError, Pattern
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, DType
from slidesparse_nb.cpu import kernels as cpu
from slidesparse_nb.cpu import threads


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def all_bits(dtype: Any) -> np.ndarray:
    """Every value of an 8- or 16-bit type."""
    size = np.dtype(dtype).itemsize
    return np.arange(256**size, dtype=f"u{size}").view(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, INT8.numpy, FLOAT8.numpy], ids=str)
def test_to_float32(bodies: str, dtype: np.dtype) -> None:
    w = weights((5, 9), dtype) if dtype == np.float32 else all_bits(dtype)[:: 1 if bodies == "compiled" else 97]
    for view in (w, w[..., ::2], w[..., ::-1]):
        got = cpu.to_float32(view)
        np.testing.assert_array_equal(got, view.astype(np.float32))
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert not np.shares_memory(got, view)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_round16(bodies: str, dtype: DType) -> None:
    """Every value of the type, all midpoints and their neighbours, everything near overflow, and random bits."""
    exact = all_bits(dtype.numpy).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    half = np.nextafter(exact, np.float32(np.inf))
    values = np.sort(exact)
    middle = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    edge = np.array([65503, 65504, 65519.996, 65520, 65536, 1e30, 3.38e38, 3.3962e38, 3.4e38, np.inf, 1e-45, 0], np.float32)
    noise = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    around = np.concatenate([np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.float32(np.inf))])
    x = np.concatenate([exact, half, middle, around, edge, -edge, noise])[:: 1 if bodies == "compiled" else 211]
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = x.astype(dtype.numpy)
    got = cpu.round16(x, dtype)
    finite = ~np.isnan(x)
    assert (got[finite].view(np.uint16) == wanted[finite].view(np.uint16)).all()
    assert np.isnan(got[~finite].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("absmax", [448, 127, 1, 3e-3, 447.9], ids=str)
def test_quantize_of_every_16_bit_value(bodies: str, dtype: DType, source: type, absmax: float) -> None:
    """As rows of which one value, `absmax`, sets the scale."""
    x = all_bits(source).astype(np.float32)
    x = x[np.abs(x) <= absmax][:: 1 if bodies == "compiled" else 301]
    x = np.concatenate([[absmax], x]).astype(np.float32)[None]
    q, scale = cpu.quantize(x, dtype)
    wanted, wanted_scale = reference.quantize(x, dtype)
    assert same_bits(q, wanted)
    assert same_bits(scale, wanted_scale)
    if absmax == 448 and dtype is FLOAT8:  # nothing is scaled: ml_dtypes' own rounding
        assert same_bits(q, x.astype(ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_quantize_of_random_bits(bodies: str, dtype: DType) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, (400 if bodies == "compiled" else 20, 33), np.uint32).view(np.float32).copy()
    x[::3] = rng.standard_normal(x[::3].shape)
    x[1::3] = rng.standard_normal(x[1::3].shape) * 2.0**-99
    for special, row in zip((np.nan, np.inf, -np.inf, 0, -0.0, 2.0**-100, 1e-31, 3.4e38), range(8), strict=True):
        x[row, 5] = special
    x[9], x[10] = 0, np.float32(2.0**-101)
    with np.errstate(invalid="ignore"):
        wanted, wanted_scale = reference.quantize(x, dtype)
    q, scale = cpu.quantize(x, dtype)
    np.testing.assert_array_equal(scale, wanted_scale)
    assert same_bits(q, wanted)


@pytest.mark.parametrize("pattern", [*SMALL, LARGE[0], Pattern(6, 8, 2)], ids=str)
def test_groups_with_too_many(bodies: str, pattern: Pattern) -> None:
    w = np.random.default_rng(0).integers(0, 2, (40, 5 * pattern.group - 1)).astype(np.int8)
    w[:, ::3] = 1
    w[:, 1::7] *= -1
    wanted = reference.violations(w, pattern)
    for dtype in (*FLOATS, INT8.numpy, FLOAT8.numpy, np.float64, np.int16):
        found = cpu.violations(w.astype(dtype) * w.astype(dtype).dtype.type(-1), pattern)  # with -0.0
        assert found.shape == wanted.shape
        assert (found == wanted).all()
    assert pattern.unit == 2 or cpu.slide_compress(w, pattern)[2] == len(wanted) > 0


def test_strided_and_read_only_inputs_compile_nothing_new() -> None:
    w = drop_two(weights((6, 32)), Pattern(6, 8)).astype(np.float16)
    expected = cpu.slide_compress(w, Pattern(6, 8))
    compiled = len(cpu._slide_compress.signatures)  # type: ignore[attr-defined]
    fixed = w.copy()
    fixed.flags.writeable = False
    for same in (np.asfortranarray(w), np.repeat(w, 2, axis=0)[::2], fixed):
        for got, wanted in zip(cpu.slide_compress(same, Pattern(6, 8)), expected, strict=True):
            assert np.array_equal(got, wanted)
    assert len(cpu._slide_compress.signatures) == compiled  # type: ignore[attr-defined]


def add_one(x: int) -> int:
    return x + 1


def test_jit_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither the package nor the user has a folder that can be written, kernels compile all the same."""

    def no_folder(*_: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(cpu, "_Cache", no_folder)
    assert cpu.jit(add_one)(2) == 3


@pytest.mark.parametrize("kind", ["nbi", "nbc"])  # index and code
@pytest.mark.parametrize("damage", ["empty", "cut", "garbled", "folder"])
def test_jit_with_a_damaged_cache(kind: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert cpu.jit(add_one)(2) == 3
    (file,) = tmp_path.rglob(f"*.{kind}")
    whole = file.read_bytes()
    again: Any = cpu.jit(add_one)
    assert (again(2), again.stats.cache_hits.total()) == (3, 1)
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbled": b"\xff" * len(whole)}[damage])
    again = cpu.jit(add_one)
    assert (again(2), again.stats.cache_hits.total()) == (3, 0)
    if damage != "folder":  # the damaged file has been written anew
        again = cpu.jit(add_one)
        assert (again(2), again.stats.cache_hits.total()) == (3, 1)


def test_jit_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    for name in ("_save_data", "_save_index"):
        with monkeypatch.context() as patch:
            patch.setattr(f"numba.core.caching.IndexDataCacheFile.{name}", full)
            assert cpu.jit(add_one)(2) == 3


def test_blocks_cover_all_rows_once() -> None:
    for n, k in ((0, 5), (7, 0), (1, 10**7), (1000, 3000), (5, 2**18)):
        rows = [r for part in threads.blocks(n, k) for r in range(part.start, part.stop)]
        assert rows == [*range(n)]


def test_over_blocks_keeps_order_and_stops_at_errors() -> None:
    n, k = 64, threads.BLOCK // 2
    for workers in (None, 1, 3, np.int64(3), np.uint8(2)):
        assert [part.start for part in threads.over_blocks(lambda rows: rows, n, k, workers)] == [*range(0, n, 2)]

    def fail(rows: slice) -> None:
        if rows.start >= 4:
            raise ValueError(rows.start)

    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"^4$"):
            list(threads.over_blocks(fail, n, k, workers))
    for workers in (0, -1, 1.5, True, "2", np.int64(0), np.float64(2), np.True_):
        with pytest.raises(OperandError, match=r"max_workers: .* must be a whole number of at least 1"):
            list(threads.over_blocks(fail, n, k, workers))  # type: ignore[arg-type]
