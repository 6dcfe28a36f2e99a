"""The points of the table: the dense model, and each pattern, method and scheme of weights pruned once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers

import slidesparse_nb as ss
from slidesparse_nb.integrations.perplexity import LOGITS, measure

from .models import Patterns, linears, prune_layers, simulated_copy, sparse_copy
from .store import Store


@dataclass
class Study:
    """What all points share.

    Attributes:
        dense: the model, on its device.
        calibration: int64 [windows, tokens].
        texts: name -> tokens.
        window: tokens; windows do not overlap.
    """

    dense: Any
    calibration: Any
    texts: dict[str, Any]
    window: int
    store: Store
    say: Any = print

    def measured(self, model: Any) -> dict[str, Any]:
        """Perplexity on every text; on the first, divergence from the dense model, too."""
        at_once = LOGITS if self.dense.device.type == "cpu" else 4 * LOGITS
        found = {}
        for i, (name, ids) in enumerate(self.texts.items()):
            against = self.dense if i == 0 and model is not self.dense else None
            figures = asdict(measure(model, ids, self.window, self.window, against=against, at_once=at_once))
            found[name] = {key: value for key, value in figures.items() if value is not None}
        return found

    def point(self, name: str, model: Any, **facts: Any) -> None:
        """Measure a model and write it down."""
        start = time.monotonic()
        figures = self.measured(model)
        seconds = round(time.monotonic() - start, 2)
        self.store.add("points", name, {**facts, "texts": figures, "seconds": seconds})
        told = ", ".join(f"{text} {each['perplexity']:.2f}" for text, each in figures.items())
        self.say(f"{name}: perplexity {told} ({seconds:.1f} s)")

    def prune(self, name: str, patterns: Patterns, method: str, scheme: str | None = None) -> dict[str, Any]:
        """Weights pruned layer by layer; how long it took is written down."""
        start = time.monotonic()
        if self.dense.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = prune_layers(self.dense, self.calibration, patterns, method, scheme)
        facts = {"seconds": round(time.monotonic() - start, 2), "linears": len(found)}
        if self.dense.device.type == "cuda":
            torch.cuda.synchronize()
            facts = {**facts, "seconds": round(time.monotonic() - start, 2), "bytes": torch.cuda.max_memory_allocated()}
        self.store.add("pruning", name, facts)
        self.say(f"pruned {name} in {facts['seconds']:.1f} s")
        return found


def todo(patterns: Sequence[str], methods: Sequence[str], schemes: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(pattern, method, schemes that share its weights), cheap methods first."""
    for method in methods:
        for pattern in patterns:
            if method == "joint":
                yield from ((pattern, method, [scheme]) for scheme in schemes if ss.Scheme.of(scheme).scaled)
            else:
                yield pattern, method, list(schemes)


def run(study: Study, patterns: Sequence[str], methods: Sequence[str], schemes: Sequence[str]) -> None:
    """Measure what is missing; stop where the next step would not fit into the budget."""
    store, took = study.store, {"prune": 0.0, "point": 0.0}
    if not store.has("points", "dense"):
        study.point("dense", study.dense)
    for pattern, method, shared in todo(patterns, methods, schemes):
        missing = [scheme for scheme in shared if not store.has("points", f"{pattern} {method} {scheme}")]
        needed = took["prune"] * (method in ("sparsegpt", "joint")) + took["point"] * len(missing)
        if not missing:
            continue
        if not store.room(needed):
            study.say(f"the budget ends before {pattern} {method}")
            return
        plan, weights, start = dict.fromkeys(linears(study.dense), ss.Pattern.of(pattern)), {}, time.monotonic()
        if method != "magnitude":
            joint = missing[0] if method == "joint" else None
            weights = study.prune(
                " ".join(filter(None, (pattern, method, joint))), plan, "sparsegpt" if joint else method, joint
            )
            took["prune"] = time.monotonic() - start
        for scheme in missing:
            start = time.monotonic()
            model = sparse_copy(study.dense, weights, plan, scheme, "none" if weights else "magnitude")
            study.point(f"{pattern} {method} {scheme}", model, pattern=pattern, method=method, scheme=scheme)
            took["point"] = time.monotonic() - start
    for scheme in filter(lambda each: ss.Scheme.of(each).scaled, schemes):
        if not store.has("points", f"dense {scheme}") and store.room():
            study.point(f"dense {scheme}", simulated_copy(study.dense, ss.Scheme.of(scheme)), method="dense", scheme=scheme)


def windows(ids: Any, length: int) -> Any:
    """Token ids as int64 [windows, length]; what is left over at the end is dropped. Raises OperandError if that is all."""
    count = len(ids) // length
    if count == 0:
        raise ss.OperandError(f"calibration: has {len(ids)} tokens, fewer than one window of {length}; give more text")
    return torch.from_numpy(np.asarray(ids[: count * length], np.int64).reshape(count, length))


def machine(device: str) -> str:
    """The device and the versions, in words."""
    chip = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{chip}, PyTorch {torch.__version__}, transformers {transformers.__version__}"
