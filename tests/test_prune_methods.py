"""Wanda and SparseGPT against the papers' formulas, written here as loops in float64; statistics and their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import inputs, weights
from models import write

import slidesparse_nb as ss
from slidesparse_nb import FormatError, OperandError, Pattern, UnsupportedError
from slidesparse_nb.core import reference
from slidesparse_nb.pruning import refine
from slidesparse_nb.pruning.run import relative_error
from slidesparse_nb.pruning.sparsegpt import InverseFactor, inverse_factor, sparsegpt, to_grid
from slidesparse_nb.pruning.statistics import Moments, Statistics
from slidesparse_nb.pruning.wanda import wanda

PATTERNS = ["2:4", "4:6", "6:8", "8:10", "6:8 pairs"]
patterns = pytest.mark.parametrize("pattern", PATTERNS)


def gram(x: Any) -> Any:
    return x.T @ x


def error(w: Any, pruned: Any, x: Any) -> float:
    return float((((w - pruned) @ x.T) ** 2).sum() / ((w @ x.T) ** 2).sum())


def goes(cost: Any, pattern: Pattern) -> list[int]:
    """The places of one group of one row that go: the cheapest; of equal ones the rightmost."""
    units = [cost[at : at + pattern.unit] for at in range(0, len(cost), pattern.unit)]
    order = sorted(range(len(units)), key=lambda i: (sum(units[i]), -i))[: max(0, len(units) - pattern.nnz)]
    return [c for i in order for c in range(i * pattern.unit, min((i + 1) * pattern.unit, len(cost)))]


def plain_wanda(w: Any, norms: Any, pattern: Pattern) -> Any:
    out = w.astype(np.float64)
    for row in out:
        for first in range(0, len(row), pattern.columns):
            group = slice(first, first + pattern.columns)
            for c in goes(np.abs(row[group]) * norms[group], pattern):
                row[first + c] = 0
    return out


def plain_sparsegpt(w: Any, hessian: Any, pattern: Pattern, damping: float = 0.1) -> Any:
    """Column by column, as the paper says it: remaining columns take H^-1 of the remaining, by elimination.

    Damping apart, which is a share of every column's own diagonal here.
    """
    out, k = w.astype(np.float64), w.shape[1]
    h = hessian.astype(np.float64)
    h = h + damping * np.diag(np.diag(h))
    inverse = np.linalg.inv(h)
    diagonals = np.empty(k)
    rows = []
    for j in range(k):  # Gaussian elimination of one column after another: row j of each remaining inverse
        diagonals[j] = inverse[j, j]
        rows.append(inverse[j] / inverse[j, j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    for row in out:
        gone: list[int] = []
        for j in range(k):
            if j % pattern.columns == 0:
                group = slice(j, j + pattern.columns)
                gone = [j + c for c in goes(row[group] ** 2 / diagonals[group], pattern)]
            if j in gone:
                value = row[j]
                row[j:] -= value * rows[j][j:]
                row[j] = 0
    return out


@patterns
@pytest.mark.parametrize("k", [80, 77, 79])
def test_wanda_is_the_papers(pattern: str, k: int) -> None:
    of, w, norms = Pattern.of(pattern), weights((9, k)), np.random.default_rng(1).random(k).astype(np.float32)
    found = wanda(w, norms, pattern)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, plain_wanda(w, norms.astype(np.float64), of))
    assert not len(reference.violations(found, of))


@patterns
@pytest.mark.parametrize("k", [240, 237, 239])
def test_sparsegpt_is_the_papers(pattern: str, k: int) -> None:
    """k passes several of the 128 columns after which the original starts groups anew."""
    of, x = Pattern.of(pattern), inputs(600, k)
    w = np.random.default_rng(2).standard_normal((6, k)).astype(np.float32)
    found, wanted = sparsegpt(w, gram(x), pattern, refined=False), plain_sparsegpt(w, gram(x), of)
    assert not len(reference.violations(found, of))
    same = ((found != 0) == (wanted != 0)).all(axis=1)
    assert same.sum() >= 5, "one row may differ, where float32 does not tell two costs apart"
    np.testing.assert_allclose(found[same], wanted[same], atol=2e-5)
    assert error(w[same], found[same], x) == pytest.approx(error(w[same], wanted[same], x), rel=1e-4)


@patterns
def test_retained_weights_are_those_of_least_squares(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, the normal equations of the columns that stay, in float64; ten steps go most of the way."""
    x, w = inputs(600, 77), np.random.default_rng(2).standard_normal((6, 77)).astype(np.float32)
    h = gram(x).astype(np.float64)
    h += 0.1 * np.diag(np.diag(h))
    first = sparsegpt(w, gram(x), pattern, refined=False)
    some = sparsegpt(w, gram(x), pattern, keep=first != 0)
    monkeypatch.setattr(refine, "STEPS", 200)
    many = refine.least_squares(first.T, w.T, (h / h.diagonal().mean()).astype(np.float32), (first != 0).T).T
    best = np.zeros(w.shape)
    for row, stays, dense in zip(best, first != 0, w, strict=True):
        row[stays] = np.linalg.solve(h[np.ix_(stays, stays)], h[stays] @ dense)
    np.testing.assert_allclose(many, best, atol=2e-4)
    costs = [np.sum((w - v) @ h * (w - v), axis=1) for v in (first, some, best)]
    assert (costs[1] < costs[0]).all()
    assert costs[1].sum() - costs[2].sum() < 0.2 * (costs[0].sum() - costs[2].sum())


def plain_admm(w: Any, h: Any, start: Any, pattern: Pattern) -> Any:
    """The mask after 30 rounds of ADMM in float64: a linear solve a round, and groups one by one."""
    scale = np.sqrt(np.diag(h))
    a, w, obeys = h / np.outer(scale, scale), w * scale, start * scale
    dual, rho = np.zeros(w.shape), 0.1
    for _ in range(30):
        free = np.linalg.solve(a + rho * np.eye(len(a)), (w @ a + rho * obeys - dual).T).T
        obeys = free + dual / rho
        for row in obeys:
            for first in range(0, len(row), pattern.columns):
                for c in goes(row[first : first + pattern.columns] ** 2, pattern):
                    row[first + c] = 0
        dual += rho * (free - obeys)
        rho *= 1.1
    return obeys != 0


@patterns
def test_a_better_mask_is_that_of_admm(pattern: str) -> None:
    of, x, w = Pattern.of(pattern), inputs(600, 77), np.random.default_rng(2).standard_normal((40, 77)).astype(np.float32)
    h = gram(x).astype(np.float64)
    h += 0.1 * np.diag(np.diag(h))
    first = sparsegpt(w, gram(x), pattern, refined=False)
    start = sparsegpt(w, gram(x), pattern, keep=first != 0)
    _, mask = refine.admm(start.T, w.T, (h / h.diagonal().mean()).astype(np.float32), of)
    assert (plain_admm(w, h, start, of) == mask.T).all(axis=1).mean() > 0.9, "float32 does not tell all weights apart"
    found = sparsegpt(w, gram(x), pattern)
    assert not len(reference.violations(found, of))
    costs = [np.sum((w - v) @ h * (w - v), axis=1) for v in (start, found)]
    assert (costs[1] <= costs[0] * (1 + 1e-5)).all(), "a row keeps the better mask"
    assert costs[1].sum() < 0.97 * costs[0].sum()


def test_a_column_of_large_inputs_does_not_damp_the_others() -> None:
    x = inputs(600, 48)
    w = np.random.default_rng(5).standard_normal((6, 48)).astype(np.float32)
    large = x.copy()
    large[:, 47] *= 1000
    rest = slice(0, 40)
    np.testing.assert_allclose(sparsegpt(w, gram(large), "6:8")[:, rest], sparsegpt(w, gram(x), "6:8")[:, rest], atol=1e-2)


def test_second_order_beats_norms_beats_magnitude() -> None:
    x, rng = inputs(2000, 96), np.random.default_rng(3)
    w = rng.standard_normal((64, 96)).astype(np.float32)
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(axis=0))
    for pattern in ("2:4", "4:6", "6:8", "8:10"):
        by_magnitude = error(w, reference.prune(w, Pattern.of(pattern)), x)
        by_norm, second = error(w, wanda(w, norms, pattern), x), error(w, sparsegpt(w, gram(x), pattern), x)
        assert second < by_norm < by_magnitude, pattern


@patterns
def test_pack_prunes_by_wanda(pattern: str) -> None:
    w, norms = weights((11, 70)).astype(ml_dtypes.bfloat16), np.random.default_rng(1).random(70)
    scheme = "W4A8" if "pairs" not in pattern else "NVFP4"
    packed = ss.pack(w, pattern, scheme, prune="wanda", statistics=norms)
    ss.verify(packed, w, prune="wanda", statistics=norms)
    if "pairs" not in pattern:
        assert (ss.unpack(ss.pack(w, pattern, prune="wanda", statistics=norms)) == wanda(w, norms, pattern)).all()


def test_equal_costs_leave_the_leftmost() -> None:
    w = np.ones((2, 8), np.float32)
    for pruned in (wanda(w, np.ones(8), "6:8"), sparsegpt(w, np.eye(8), "6:8")):
        assert pruned.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]] * 2


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (1, 1), (2, 3), (2, 7)])
def test_small_shapes(shape: tuple[int, int]) -> None:
    w = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    for pruned in (wanda(w, np.ones(shape[1]), "6:8"), *(sparsegpt(w, np.eye(shape[1]), "6:8", s) for s in (None, "int8"))):
        assert pruned.shape == shape
        assert (pruned == 0).sum() == (shape[0] if shape[1] == 7 else 0)


# ---- joint with quantization -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        *((scheme, t) for scheme in ("INT8_W8A8", "FP8_DYNAMIC", "BF16") for t in (np.float32, ml_dtypes.bfloat16)),
        ("FP16", np.float16),
    ],
)
def test_pack_stores_what_was_made_up_for(scheme: str, dtype: Any) -> None:
    """The values times the scales that `pack` finds are the pruned weights, bit for bit."""
    x, rng = inputs(500, 90), np.random.default_rng(4)
    w = (0.05 * rng.standard_normal((40, 90))).astype(np.float32)
    w[3] = 0
    pruned = sparsegpt(w, gram(x), "6:8", scheme, damping=0.01)  # little, since the error below is counted without
    packed = ss.pack(pruned.astype(dtype), "6:8", scheme)
    stored = reference.dequantize(reference.unpack(packed), packed.scale)
    np.testing.assert_array_equal(stored, pruned)
    apart = ss.pack(sparsegpt(w, gram(x), "6:8", damping=0.01), "6:8", scheme)
    assert error(w, pruned, x) < error(w, reference.dequantize(reference.unpack(apart), apart.scale), x)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn"])
def test_grids_are_the_types(name: str) -> None:
    rng, dtype = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, name, None) or name)
    largest = float(ml_dtypes.finfo(dtype).max)
    x = (rng.standard_normal(20000) * 2.0 ** rng.integers(-30, 18, 20000)).astype(np.float32)
    x[:4] = 0, largest, -largest, largest / 3
    np.testing.assert_array_equal(to_grid(x, name, largest), np.clip(x, -largest, largest).astype(dtype).astype(np.float32))


# ---- hostile operands --------------------------------------------------------------------------------------------


def test_dead_columns_and_too_few_tokens() -> None:
    x, w = inputs(5, 24), np.random.default_rng(0).standard_normal((7, 24)).astype(np.float32)  # rank 5 of 24
    x[:, [3, 4, 20]] = 0
    pruned = sparsegpt(w, gram(x), "6:8")
    assert np.isfinite(pruned).all()
    assert (pruned[:, [3, 4, 20]] == 0).all()
    assert (pruned[:, :8] != 0).sum() == 6 * 7, "dead columns are the two that go"
    assert (sparsegpt(w, np.zeros((24, 24)), "6:8") == 0).all()
    with pytest.raises(OperandError, match=r"^hessian: is not positive definite with damping 0; raise it, or"):
        sparsegpt(w, gram(x), "6:8", damping=0)


def test_refused_operands() -> None:
    w, bad = np.ones((2, 8), np.float32), np.ones((2, 8), np.float32)
    bad[1, 2] = np.nan
    one, nan = np.ones(8), np.full(8, np.nan)
    for call, message in (
        (lambda: wanda(w.tolist(), one, "6:8"), "w: list must be an array"),
        (lambda: wanda(bad, one, "6:8"), "w: holds NaN or infinity"),
        (lambda: wanda(w[0], one, "6:8"), r"w: shape \(8,\) must be"),
        (lambda: wanda(w, one[1:], "6:8"), r"norms: shape \(7,\) must be \(8,\)"),
        (lambda: wanda(w, nan, "6:8"), "norms: holds NaN"),
        (lambda: wanda(w, -one, "6:8"), "norms: hold a negative number"),
        (lambda: wanda(np.full((1, 8), "a"), one, "6:8"), "w: .* must be real numbers"),
        (lambda: wanda(w, one, "5:8"), "pattern: 5:8 is not of the form"),
        (lambda: sparsegpt(w, np.ones((8, 7)), "6:8"), r"hessian: shape \(8, 7\) must be \[k, k\]"),
        (lambda: sparsegpt(w, np.eye(6), "6:8"), "hessian: is of 6 columns, w of 8"),
        (lambda: sparsegpt(w, np.diag(nan), "6:8"), "hessian: holds NaN"),
        (lambda: sparsegpt(w, -np.eye(8), "6:8"), "hessian: has a negative number on its diagonal"),
        (lambda: sparsegpt(w, np.eye(8), "6:8", damping=-1), "damping: -1 must be a share"),
        (lambda: sparsegpt(w, np.eye(8), "6:8", damping=1e308), r"damping: 1e\+308 must be a share"),
        (lambda: sparsegpt(w, np.eye(8), "6:8", keep=w), r"keep: float32 \(2, 8\) must be bool"),
    ):
        with pytest.raises(OperandError, match=f"^{message}"):
            call()
    with pytest.raises(UnsupportedError, match=r"^scheme: NVFP4 has scales along k.* such as '6:8 pairs', and pack as NVFP4$"):
        sparsegpt(w, np.eye(8), "6:8", "NVFP4")


def test_a_factor_serves_several_layers_and_masks() -> None:
    x, w = inputs(100, 32), np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    factor = inverse_factor(gram(x))
    assert isinstance(factor, InverseFactor)
    assert (sparsegpt(w, factor, "6:8") == sparsegpt(w, gram(x), "6:8")).all()
    mask = wanda(w, np.linalg.norm(x, axis=0), "6:8") != 0
    made_up = sparsegpt(w, factor, "6:8", keep=mask)
    assert ((made_up != 0) == mask).all()
    assert error(w, made_up, x) < error(w, w * mask, x)


@pytest.mark.filterwarnings("error")
def test_huge_and_tiny_weights_are_pruned_alike() -> None:
    x, w = inputs(300, 48), np.random.default_rng(5).standard_normal((6, 48)).astype(np.float32)
    norms = np.sqrt((x**2).mean(axis=0))
    by_norm, second = wanda(w, norms, "6:8"), sparsegpt(w, gram(x), "6:8")
    for power in (100, -100):
        other = np.ldexp(w, power)
        np.testing.assert_array_equal(sparsegpt(other, gram(x), "6:8"), np.ldexp(second, power))
        np.testing.assert_array_equal(wanda(other, np.ldexp(norms, power), "6:8"), np.ldexp(by_norm, power))
        assert relative_error(other, np.ldexp(second, power), gram(x)) == pytest.approx(relative_error(w, second, gram(x)))
    with pytest.raises(OperandError, match=r"^w: a weight that makes up for others overflows float32; raise the damping"):
        sparsegpt(np.full((2, 8), 3e38, np.float32), np.ones((8, 8)) + 1e-3 * np.eye(8), "6:8")


# ---- statistics --------------------------------------------------------------------------------------------------


def test_moments_and_their_file(tmp_path: Path) -> None:
    x, one = inputs(30, 12), Moments.empty("a.q", 12, gram=True)
    one.add(x[:10])
    one.add(x[10:])
    np.testing.assert_allclose(one.norms, np.sqrt((x.astype(np.float64) ** 2).mean(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(one.hessian, gram(x), rtol=1e-4, atol=1e-3)
    path, other = tmp_path / "s.safetensors", Moments.empty("a.o", 4, gram=False)
    other.add(np.ones((2, 4), np.float32))
    made = Statistics({"a.q": "a.q", "a.k": "a.q", "a.o": "a.o"}, {"a.q": one, "a.o": other}, {"window": 10}, {"a.q": 3})
    made.save(path)
    read = Statistics.load(path)
    assert (read.inputs, read.facts, read.model) == (made.inputs, {"window": 10}, {"a.q": 3})
    assert (read.of("a.k").hessian == one.hessian).all()
    assert (read.of("a.o").squares == [2] * 4).all()
    with pytest.raises(OperandError, match=r"^'a\.o': statistics hold column norms alone; SparseGPT needs"):
        read.of("a.o").hessian  # noqa: B018
    with pytest.raises(OperandError, match=r"^statistics: hold nothing of 'b'; make them anew"):
        read.of("b")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_moments_refuse() -> None:
    moments = Moments.empty("up", 4, gram=True)
    with pytest.raises(OperandError, match=r"^'up': no token of the calibration text reaches it"):
        moments.norms  # noqa: B018
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(UnsupportedError, match=r"^'up': its inputs hold NaN or infinity"):
            moments.add(np.array([[1, 2, bad, 4]], np.float32))
    with pytest.raises(OperandError, match=r"^'up': inputs of shape \(1, 3\) must be \[tokens, 4\]"):
        moments.add(np.ones((1, 3), np.float32))
    assert moments.tokens == 0
    assert not moments.squares.any()


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    good = {"X.column_squares": np.ones(4), "X.tokens": np.array([3])}
    told = {"slidesparse_statistics": '{"version": 1, "inputs": {"X": "X"}}'}
    for parts, metadata, message in (
        (good, {}, "is no file of statistics of version 1"),
        (good, {"slidesparse_statistics": '{"version": 2, "inputs": {}}'}, "is no file of statistics"),
        (good, {"slidesparse_statistics": '{"version": 1, "inputs": {"X": 3}}'}, "is no file of statistics"),
        ({"X.tokens": good["X.tokens"]}, told, "lacks column_squares, F64"),
        ({**good, "X.column_squares": np.array([1, np.nan])}, told, "holds NaN, infinity or a negative number"),
        ({**good, "X.gram": np.ones((4, 3), np.float32)}, told, r"'X\.gram' is float32 \(4, 3\), must be F32 \(4, 4\)"),
        *(({**good, "X.tokens": np.array([bad])}, told, r"lacks .* tokens, I64 \[1\]") for bad in (-3, np.nan, np.float32(3))),
        *(
            ({**good, "X.gram": bad.astype(np.float32)}, told, r"'X\.gram' is not X\^T X, symmetric and with column_squares")
            for bad in (np.eye(4) + np.eye(4, k=1) / 2, -np.eye(4), 2 * np.eye(4), np.eye(4) * np.nan, np.eye(4) + np.inf)
        ),
    ):
        path = write(tmp_path / "s.safetensors", parts, metadata)
        with pytest.raises(FormatError, match=message):
            Statistics.load(path)
