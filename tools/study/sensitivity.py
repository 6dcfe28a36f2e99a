"""What each part of a model costs if it alone is pruned, and a pattern for each part that costs least in a given ideal time.

A part is the linear layers that engines fuse: q/k/v, o, gate/up, down of one block. Each is pruned by Wanda, with the
activations of the dense model, and the divergence from the dense model on a part of the calibration text is its cost. Costs of
parts are added as if they did not depend on each other; what the chosen patterns really cost is then measured as a point.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch

import slidesparse_nb as ss
from slidesparse_nb.integrations.perplexity import measure

from .models import linears, pruned, sparse_copy, statistics
from .points import Study
from .store import Store

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
DENSE = "dense"
PATTERNS = ("2:4", "4:6", "6:8", "8:10", "14:16")
WHOLE = ("2:4", "6:8")
"""Patterns for which whole blocks and all layers of one kind are pruned, too."""


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Part ("3 qkv": block and kind) -> its linear layers."""
    found: dict[str, list[str]] = {}
    for name in names:
        block = next((each for each in name.split(".") if each.isdigit()), "")
        last = name.rpartition(".")[2]
        found.setdefault(f"{block} {FUSED.get(last, last.removesuffix('_proj'))}", []).append(name)
    return found


def wholes(parts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Whole blocks ("block 3") and kinds ("kind qkv") -> their linear layers."""
    found: dict[str, list[str]] = {}
    for part, names in parts.items():
        block, kind = part.split()
        for whole in (f"block {block}", f"kind {kind}"):
            found.setdefault(whole, []).extend(names)
    return found


def run(study: Study, tokens: int) -> None:
    """Measure the cost of every part at every pattern on `tokens` of the calibration text, as long as the budget allows."""
    layers, store = linears(study.dense), study.store
    text = study.calibration.reshape(-1)[:tokens].tolist()
    store.add("setup", "sensitivity_tokens", len(text))
    found, parts = statistics(study.dense, study.calibration[:32], gram=False), parts_of(layers)
    for pattern in PATTERNS:
        sparse = pruned(layers, found, dict.fromkeys(layers, ss.Pattern.of(pattern)), "wanda")
        for part, names in (parts | (wholes(parts) if pattern in WHOLE else {})).items():
            if store.has("sensitivity", f"{part} {pattern}"):
                continue
            if not store.room():
                study.say(f"the budget ends in sensitivity, at {part} {pattern}")
                return
            store.add("sensitivity", f"{part} {pattern}", _cost(study, {name: sparse[name] for name in names}, text))
        study.say(f"sensitivity at {pattern} is measured")


def _cost(study: Study, weights: Mapping[str, Any], text: list[int]) -> float:
    """Divergence of the dense model with some weights replaced; measured with two models that share all others."""
    memo = {id(each): each for each in (*study.dense.parameters(), *study.dense.buffers())}
    changed = copy.deepcopy(study.dense, memo)
    for name, weight in weights.items():
        layer = changed.get_submodule(name)
        layer.weight = torch.nn.Parameter(weight, False)
    found = measure(changed, text, study.window, study.window, against=study.dense).divergence
    assert found is not None
    return found


def choose(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], time: float) -> dict[str, str]:
    """The pattern of each part, of least total cost where the ideal time is at most `time` of the dense model's.

    For a price of time, each part takes the pattern of least cost + price * time; the lowest price that keeps the limit is
    found by halving an interval. What is left of the limit goes, part by part, to the change that saves most cost.

    Args:
        costs: part -> pattern ("dense", "6:8", ...) -> cost.
        sizes: part -> weights.

    Raises:
        OperandError: no choice is that fast.
    """
    total = sum(sizes.values())
    times = {part: {each: sizes[part] * ideal_time(each) / total for each in costs[part]} for part in costs}

    def at(price: float) -> dict[str, str]:
        return {part: min(costs[part], key=lambda each: costs[part][each] + price * times[part][each]) for part in costs}

    def spent(chosen: Mapping[str, str]) -> float:
        return sum(times[part][each] for part, each in chosen.items())

    low, high = 0.0, 1.0
    while spent(at(high)) > time:
        high *= 4
        if high > 1e12:
            raise ss.OperandError(f"time: {time:.3f} of the dense model's is less than the fastest patterns take; allow more")
    if spent(at(low)) <= time:
        return at(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(at(middle)) <= time else (middle, high)
    chosen = at(high)
    while True:
        room = time - spent(chosen)
        changes = [
            (costs[part][chosen[part]] - costs[part][each], part, each)
            for part in costs
            for each in costs[part]
            if times[part][each] - times[part][chosen[part]] <= room and costs[part][each] < costs[part][chosen[part]]
        ]
        if not changes:
            return chosen
        _, part, each = max(changes)
        chosen[part] = each


def ideal_time(pattern: str) -> float:
    """Of the product with this pattern, over the dense one's."""
    return 1.0 if pattern == DENSE else float(1 / Fraction(ss.Pattern.of(pattern).speedup))


def mixed(study: Study, speedups: Iterable[float], scheme: str, method: str) -> None:
    """Choose patterns for each ideal speed-up, prune, and measure them as points."""
    layers, store = linears(study.dense), study.store
    parts = parts_of(layers)
    costs = costs_of(store, parts)
    if costs is None:
        study.say("mixed patterns need the sensitivity of every part; the budget ended before")
        return
    sizes = {part: sum(layers[name].weight.numel() for name in names) for part, names in parts.items()}
    for speedup in speedups:
        name = f"mixed {speedup:.3g} {method} {scheme}"
        if store.has("points", name):
            continue
        if not store.room():
            study.say(f"the budget ends before {name}")
            return
        chosen = choose(costs, sizes, 1 / speedup)
        plan = {each: ss.Pattern.of(chosen[part]) for part in parts for each in parts[part] if chosen[part] != DENSE}
        weights = study.prune(name, plan, method)
        time = sum(sizes[part] * ideal_time(chosen[part]) for part in parts) / sum(sizes.values())
        facts = {"method": method, "scheme": scheme, "patterns": chosen, "ideal_speedup": 1 / time}
        study.point(name, sparse_copy(study.dense, weights, plan, scheme), pattern="mixed", **facts)


def costs_of(store: Store, parts: Iterable[str]) -> dict[str, dict[str, float]] | None:
    """Part -> pattern -> cost, dense for nothing; None if something was not measured."""
    found = store.read().get("sensitivity", {})
    if any(f"{part} {pattern}" not in found for part in parts for pattern in PATTERNS):
        return None
    return {part: {DENSE: 0.0, **{pattern: max(0.0, found[f"{part} {pattern}"]) for pattern in PATTERNS}} for part in parts}
