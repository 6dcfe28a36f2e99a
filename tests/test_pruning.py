"""Scores: which weights go, whatever the block they stand in."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import pytest
from cases import weights
from commands import slidesparse
from faults import interrupting
from toy_pruner import Toy

import slidesparse_nb as ss
from slidesparse_nb import OperandError, Pattern, VerificationError, pack, unpack, verify
from slidesparse_nb.core import prune as pruning
from slidesparse_nb.core import reference


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A method that is new here, by its row in the table."""
    monkeypatch.setitem(pruning.PRUNERS, "toy", method := Toy())
    return method


def test_uniform_is_a_function_of_seed_row_and_column() -> None:
    whole = pruning.uniform(7, 0, 50, 33)
    assert whole.dtype == np.float32
    for first in (0, 1, 20):
        assert (pruning.uniform(7, first, 5, 33) == whole[first : first + 5]).all()
    assert (pruning.uniform(7, 0, 50, 20) == whole[:, :20]).all()
    assert (pruning.uniform(8, 0, 50, 33) != whole).mean() > 0.99
    assert (pruning.uniform(-1, 0, 2, 2) == pruning.uniform(2**64 - 1, 0, 2, 2)).all()


def test_uniform_is_uniform() -> None:
    u = pruning.uniform(0, 0, 1000, 1000)
    assert u.min() >= 0
    assert u.max() < 1
    share = np.bincount((u * 16).astype(int).ravel(), minlength=16) / u.size
    assert np.abs(share - 1 / 16).max() < 0.001
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.005
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.005


def test_golden_random_scores() -> None:
    """A model pruned today is pruned alike tomorrow, and on other machines."""
    mask = 2**64 - 1

    def mixed(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    for seed, row, column in ((0, 0, 0), (5, 3, 2), (123456789, 4095, 1)):
        by_hand = mixed(mixed(mixed(seed) + (row + 1) * 0x9E3779B97F4A7C15 & mask) + (column + 1) * 0x9E3779B97F4A7C15 & mask)
        assert pruning.uniform(seed, row, 1, column + 1)[0, column] == (by_hand >> 40) / 2**24


def test_zero_weights_go_first() -> None:
    w = np.array([[5, 0, -0.0, 1, 2, 3, 4, 9]], np.float32)
    given = np.array([[0, 9, 9, 0, 0, 0, 0, 0]], np.float32)
    assert (pruning.bind(given, w.shape).scores(w) < 0).tolist() == [[False, True, True, False, False, False, False, False]]
    for method in ("random", "magnitude", given):
        assert (unpack(pack(w, "6:8", "float16", prune=method)) == w).all()


def test_scores_of_any_real_type() -> None:
    w = np.ones((1, 4), np.float32)
    for dtype in (np.int64, np.uint8, np.float64, np.float16, np.bool_):
        score = np.array([[0, 1, 0, 1]], dtype)
        assert unpack(pack(w, "2:4", "float16", prune=score)).tolist() == [[0, 1, 0, 1]]


def test_minus_zero_is_a_score_like_zero() -> None:
    w = np.array([[1, 2, 3, 0, 4, 5, 6, 0]], np.float32)
    score = np.array([[0, 0, 1, 1, 1, 1, 1, 1]], np.float32)
    minus = np.where(score == 0, np.float32(-0.0), score)
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        packed = pack(w, "6:8", "float16", prune=minus.astype(dtype))
        assert unpack(packed).tolist() == w.tolist() == unpack(pack(w, "6:8", "float16", prune=score)).tolist()
        verify(packed, w, prune=minus.astype(dtype))
        verify(packed, w, prune=score)


@pytest.mark.parametrize("seed", [3, np.int64(3), np.uint64(3), np.int8(3), 3 - 2**64, 3 + 2**65])
def test_seeds_of_every_integer_type(seed: Any) -> None:
    w = weights((5, 40))
    wanted = unpack(pack(w, "6:8", "float16", prune="random", seed=3))
    packed = pack(w, "6:8", "float16", prune="random", seed=seed)
    assert (unpack(packed) == wanted).all()
    verify(packed, w, prune="random", seed=seed)
    assert (pruning.uniform(np.int64(-1), 0, 2, 2) == pruning.uniform(2**64 - 1, 0, 2, 2)).all()


@pytest.mark.parametrize("seed", ["a", 1.5, [1], np.float32(1)])
@pytest.mark.parametrize("shape", [(2, 8), (0, 8)])
def test_seeds_that_are_none(seed: Any, shape: tuple[int, int]) -> None:
    w = weights(shape)
    for call in (lambda: pack(w, prune="random", seed=seed), lambda: verify(pack(w, prune="magnitude"), w, seed=seed)):
        with pytest.raises(OperandError, match=r"^seed: .* must be an integer$"):
            call()
    with pytest.raises(OperandError, match=r"^seed: None must be an integer$"):
        pack(w, prune="random", seed=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prune", "statistics", "message"),
    [
        ("toy", None, r"statistics: are missing; prune='toy' needs one number a column, an array of shape \(8,\)$"),
        ("toy", np.ones(7), r"statistics: shape \(7,\) must be \(8,\), one number a column$"),
        ("toy", np.array(["a"] * 8), "statistics: <U1 must be real numbers$"),
        ("toy", np.full(8, -2.0), "prune: score -2.0 at row 0, column 0 must be finite and not negative$"),
        ("magnitude", np.ones(8), "statistics: ndarray is given, but prune='magnitude' takes none; leave it out$"),
        (np.ones((1, 8)), np.ones(8), "statistics: ndarray is given, but scores takes none; leave it out$"),
        ("sgd", None, "prune: 'sgd' is not a method; it must be one of none, magnitude, random, wanda, toy, or an array"),
        (None, None, "prune: NoneType must be one of"),
        ([[1.0] * 8], None, "prune: list must be one of none, magnitude, random, wanda, toy, or a NumPy array"),
        (np.ones((8, 1)), None, r"prune: scores of shape \(8, 1\) must have one score a weight, \(1, 8\)"),
        (np.full((1, 8), -1.0), None, "prune: score -1.0 at row 0, column 0 must be finite and not negative"),
        *(
            (
                np.array([[0, 1, 2, bad, 4, 5, 6, 7]]),
                None,
                f"prune: score {re.escape(str(bad))} at row 0, column 3 must be finite",
            )
            for bad in (np.nan, 1e39, -1e-300)
        ),
        *(
            (np.zeros((1, 8), kind), None, f"prune: scores of type {re.escape(str(np.dtype(kind)))} must be real")
            for kind in ("U1", "c8", "O", "M8[s]", "m8[s]", "V4")
        ),
        (np.ma.ones((1, 8)), None, "prune: is a masked array, and the mask would be lost; pass prune.filled"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals(toy: Toy, prune: Any, statistics: Any, message: str) -> None:
    w = np.ones((1, 8), np.float32)
    packed = pack(w, "6:8", prune="magnitude")
    for call in (partial(pack, w, "6:8"), partial(verify, packed, w)):
        with pytest.raises(OperandError, match=f"^{message}"):
            call(prune=prune, statistics=statistics)


# ---- a method that is new: a file and a row ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_a_new_method_packs_and_verifies(toy: Toy, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidesparse_nb.cpu.threads.BLOCK", 100)
    w, norms = weights((23, 37)), np.random.default_rng(1).random(37)
    score = np.where(w == 0, -1, toy.scores(w, 3, 0, norms)).astype(np.float32)
    packed = pack(w, "6:8", "bfloat16", prune="toy", seed=3, statistics=norms, max_workers=workers)
    assert (unpack(packed) == reference.prune(w, Pattern(6, 8), score).astype(packed.dtype.numpy)).all()
    verify(packed, w, prune="toy", seed=3, statistics=norms, max_workers=workers)
    verify(packed, w, prune="toy", seed=None, statistics=norms)
    for other in ({"seed": 4, "statistics": norms}, {"seed": 3, "statistics": norms[::-1]}):
        with pytest.raises(VerificationError, match="prune='toy' would not have"):
            verify(packed, w, prune="toy", **other)


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_statistics_of_a_checkpoint(toy: Toy, tmp_path: Path, format: str, unit_bytes: Callable[[int], None]) -> None:
    unit_bytes(1024)  # several blocks a module
    source, out = models.folder(tmp_path / "in", parts := models.tensors(prune=None)), tmp_path / "out"
    modules = {name.removesuffix(".weight"): w for name, w in parts.items() if name.endswith(".weight") and w.ndim == 2}
    rng = np.random.default_rng(0)
    norms = {name: rng.random(w.shape[1]) for name, w in modules.items()}
    options = {"prune": "toy", "format": format}
    with pytest.raises(OperandError, match=r"^model\.layers\..*: statistics: are missing; prune='toy' needs one number"):
        ss.pack_checkpoint(source, out, ss.Options(**options, skip_bad=True))
    chosen, others = (ss.Options(**options, statistics=s) for s in (norms, {name: a[::-1] for name, a in norms.items()}))
    stop = interrupting(lambda phase, done, total: done > 0)
    with pytest.raises(KeyboardInterrupt):
        ss.pack_checkpoint(source, out, chosen, ss.Run(progress=stop))
    with pytest.raises(OperandError, match="was started with other options"):
        ss.pack_checkpoint(source, out, others, ss.Run(resume=True))
    assert ss.pack_checkpoint(source, out, chosen, ss.Run(resume=True)).resumed
    assert ss.pack_checkpoint(source, out, chosen, ss.Run(resume=True)).already_complete
    with pytest.raises(OperandError, match="is not what these options make"):
        ss.pack_checkpoint(source, out, others, ss.Run(resume=True))
    ss.pack_checkpoint(source, whole := tmp_path / "whole", chosen)
    made = [[p.read_bytes() for p in sorted(folder.glob("*.safetensors"))] for folder in (whole, out)]
    assert made[0] == made[1] != []


def test_a_new_method_on_the_command_line(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "statistics", "none")
    monkeypatch.setattr(Toy, "scores", lambda self, w, *_: 1 / (1 + np.abs(w)))
    source = models.folder(tmp_path / "in", models.tensors(prune=None))
    for method, code in {"toy": 0, "sgd": 2}.items():
        result = slidesparse("pack", source, "-o", tmp_path / method, "--prune", method)
        assert result.exit_code == code, result.output
    assert "prune: 'sgd' must be one of none, magnitude, random, wanda, toy" in result.stderr
