"""`tools/accuracy.py` on a tiny random Llama on the CPU: its pruning against plain formulas, its choice against all choices."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_llama import folder_of

import slidesparse_nb as ss
from slidesparse_nb.integrations.torch import SparseLinear
from slidesparse_nb.pruning.sparsegpt import sparsegpt
from tools.accuracy import accuracy
from tools.study.models import dense_model, linears, prune_layers, sparse_copy
from tools.study.sensitivity import choose, ideal_time, parts_of

PATTERN = ss.Pattern.of("6:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("study") / "model")


@pytest.fixture(scope="module")
def texts(folder: Path) -> Path:
    """Token ids as `texts` writes them."""
    out, rng = folder.with_name("texts"), np.random.default_rng(0)
    out.mkdir()
    for name, count in {"calibration": 512, "brown": 200, "addresses": 150}.items():
        np.save(out / f"{name}.npy", rng.integers(2, 60, count).astype(np.uint16))
    (out / "texts.json").write_text(json.dumps({name: {"title": name} for name in ("calibration", "brown", "addresses")}))
    return out


def call(*given: object) -> Result:
    return CliRunner().invoke(accuracy, [*map(str, given)])


def inputs_of(model: Any, name: str, ids: torch.Tensor) -> np.ndarray:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in seen]).double().numpy()


def test_layers_read_what_pruned_blocks_give(folder: Path) -> None:
    """The second block is pruned by the activations that the pruned first one gives."""
    model = dense_model(folder, "cpu")
    ids = torch.randint(2, 60, (8, 32), generator=torch.Generator().manual_seed(1))
    before = {name: layer.weight.data.clone() for name, layer in linears(model).items()}
    found = prune_layers(model, ids, dict.fromkeys(before, PATTERN), "sparsegpt")
    assert all(torch.equal(layer.weight, before[name]) for name, layer in linears(model).items())
    for name in before:
        if ".layers.0." in name:
            model.get_submodule(name).weight.data = found[name]
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"):
        x = inputs_of(model, name, ids)
        want = torch.from_numpy(sparsegpt(before[name].float().numpy(), (x.T @ x).astype(np.float32), PATTERN))
        assert (found[name].float() - want).norm() < 0.02 * want.norm()
        assert torch.equal(found[name] == 0, want.to(torch.bfloat16) == 0)


def test_some_layers_may_stay_dense_and_patterns_differ(folder: Path) -> None:
    model = dense_model(folder, "cpu")
    names = list(linears(model))
    plan = {name: ss.Pattern.of("2:4" if "mlp" in name else "8:10") for name in names if "o_proj" not in name}
    ids = torch.randint(2, 60, (4, 32), generator=torch.Generator().manual_seed(1))
    weights = prune_layers(model, ids, plan, "wanda")
    assert weights.keys() == plan.keys()
    made = sparse_copy(model, weights, plan, "BF16")
    for name in names:
        layer = made.get_submodule(name)
        assert isinstance(layer, SparseLinear) == (name in plan)
        if name in plan:
            assert layer.pattern == plan[name]
            values = torch.from_numpy(ss.unpack(layer.packed()).astype("float32"))
            assert torch.equal(values.to(torch.bfloat16), weights[name])


def test_the_choice_is_the_best() -> None:
    rng, patterns = np.random.default_rng(3), ["dense", "6:8", "2:4"]
    for seed in range(20):
        sizes = {f"{i} o": int(size) for i, size in enumerate(rng.integers(1, 9, 5))}
        costs = {part: dict(zip(patterns, [0.0, *np.sort(rng.random(2))], strict=True)) for part in sizes}
        limit = [0.6, 0.75, 0.9][seed % 3]
        chosen = choose(costs, sizes, limit)
        total = sum(sizes.values())

        def spent(given: dict[str, str], sizes: dict[str, int] = sizes, total: int = total) -> float:
            return sum(sizes[part] * ideal_time(each) for part, each in given.items()) / total

        def cost(given: dict[str, str], costs: dict[str, dict[str, float]] = costs) -> float:
            return sum(costs[part][each] for part, each in given.items())

        every = (dict(zip(sizes, each, strict=True)) for each in itertools.product(patterns, repeat=len(sizes)))
        best = min(cost(each) for each in every if spent(each) <= limit)
        assert spent(chosen) <= limit + 1e-12
        assert cost(chosen) <= best + max(max(each.values()) for each in costs.values())  # one part at most is not the best
    with pytest.raises(ss.OperandError, match="less than the fastest patterns take"):
        choose(costs, sizes, 0.4)
    assert parts_of(["model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_proj"]) == {
        "3 gate_up": ["model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_proj"]
    }


def test_a_study_goes_on_where_it_ended(folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    given = ("run", folder, "--texts", texts, "--json", out, "--device", "cpu", "--window", 32, "--calibration-window", 64)
    given = (*given, "--patterns", "6:8,2:4", "--schemes", "INT8_W8A8,BF16", "--sensitivity-tokens", 64, "--speedups", "1.4")
    short = call(*given, "--methods", "magnitude")
    assert short.exit_code == 0, short.output
    first = json.loads(out.read_text())
    points = {f"{p} {m} {s}" for p in ("6:8", "2:4") for m in ("magnitude",) for s in ("INT8_W8A8", "BF16")}
    mixed = {"mixed 1.4 sparsegpt INT8_W8A8"}
    assert first["points"].keys() == {"dense", "dense INT8_W8A8"} | points | mixed
    assert len(first["sensitivity"]) == 5 * 8 + 2 * (2 + 4)  # parts at every pattern; whole blocks and kinds at two
    assert first["points"]["mixed 1.4 sparsegpt INT8_W8A8"]["ideal_speedup"] >= 1.4
    whole = call(*given)
    assert whole.exit_code == 0, whole.output
    assert "magnitude" not in whole.stdout
    second = json.loads(out.read_text())
    assert {name: second["points"][name] for name in first["points"]} == first["points"]
    more = {f"{p} {m} {s}" for p in ("6:8", "2:4") for m in ("wanda", "sparsegpt") for s in ("INT8_W8A8", "BF16")}
    assert second["points"].keys() - first["points"].keys() == more | {"6:8 joint INT8_W8A8", "2:4 joint INT8_W8A8"}
    figures = second["points"]["6:8 sparsegpt BF16"]["texts"]
    assert figures["brown"]["predicted"] == 200 - 7
    assert 0 < figures["brown"]["divergence"] < second["points"]["2:4 magnitude BF16"]["texts"]["brown"]["divergence"]
    assert second["points"]["dense INT8_W8A8"]["texts"]["brown"]["divergence"] < figures["brown"]["divergence"]
    other = call(*given[:-2], "--window", 16)
    assert other.exit_code == 2
    assert "was measured with window 32, not 16" in other.stderr


def test_a_budget_that_ends(folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr("tools.study.store.time.monotonic", lambda: 10.0 * next(count))
    out = tmp_path / "found.json"
    given = ("--texts", texts, "--json", out, "--device", "cpu", "--window", 32, "--calibration-window", 64)
    result = call("run", folder, *given, "--budget", 40, "--schemes", "BF16", "--parts", "table")
    assert result.exit_code == 0, result.output
    assert "the budget ends before" in result.stdout
    assert json.loads(out.read_text())["points"].keys() >= {"dense"}
