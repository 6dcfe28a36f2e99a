"""Wanda and SparseGPT with CuPy, against NumPy; and a checkpoint pruned by statistics on the GPU."""

from __future__ import annotations

from pathlib import Path

import cupy as cp
import numpy as np
import pytest
from models import write

import slidesparse_nb as ss
from slidesparse_nb.core import reference
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.pruning.sparsegpt import sparsegpt
from slidesparse_nb.pruning.statistics import Moments, Statistics
from slidesparse_nb.pruning.wanda import wanda

pytestmark = pytest.mark.gpu


def case(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [n, k] and correlated inputs [tokens, k], a dead column among them."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3 * k, k)) @ (np.eye(k) + 0.1 * rng.standard_normal((k, k)))).astype(np.float32)
    x[:, 5] = 0
    return rng.standard_normal((n, k)).astype(np.float32), x


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "8:10", "6:8 pairs"])
@pytest.mark.parametrize("scheme", [None, "INT8_W8A8", "FP8_DYNAMIC", "BF16"])
def test_cupy_prunes_as_numpy_does(pattern: str, scheme: str | None) -> None:
    w, x = case(96, 237)
    on_host, on_gpu = Moments.empty("a", 237, gram=True), Moments.empty("a", 237, gram=True, xp=cp)
    on_host.add(x)
    on_gpu.add(cp.asarray(x))
    np.testing.assert_allclose(on_gpu.norms.get(), on_host.norms, rtol=1e-6)
    found = wanda(cp.asarray(w), cp.asarray(on_host.norms), pattern)
    np.testing.assert_array_equal(found.get(), wanda(w, on_host.norms, pattern))
    found = sparsegpt(cp.asarray(w), on_gpu.hessian, pattern, scheme).get()
    wanted = sparsegpt(w, on_host.hessian, pattern, scheme)
    assert not len(reference.violations(found, Pattern.of(pattern)))
    assert ((found != 0) == (wanted != 0)).mean() > 0.995, "but for costs that float32 does not tell apart"
    errors = [float((((w - pruned) @ x.T) ** 2).sum()) for pruned in (found, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_a_checkpoint_on_the_gpu(tmp_path: Path) -> None:
    w, x = case(64, 128)
    moments = Moments.empty("a", 128, gram=True)
    moments.add(x)
    Statistics({"a": "a"}, {"a": moments}).save(tmp_path / "s.safetensors")
    source = write(tmp_path / "m.safetensors", {"a.weight": w})
    options = ss.PruneOptions(method="sparsegpt", statistics=tmp_path / "s.safetensors", device="cuda")
    report = ss.prune_checkpoint(source, tmp_path / "out.safetensors", options)
    assert [note.partition(".safetensors ")[2] for note in report.notes] == ["does not say of which model its statistics are"]
    assert 0 < report.errors["a"] < 0.05
