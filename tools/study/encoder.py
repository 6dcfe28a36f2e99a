"""The same question for a sentence encoder: how far its embeddings move, and whether passages keep their nearest neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import slidesparse_nb as ss

from .models import linears, pruned, sparse_copy, statistics
from .store import Store
from .texts import brown

PASSAGES = 512
LENGTH = 32
"""Tokens of a passage, with those that the tokenizer adds; longer paragraphs are cut, shorter ones are not taken."""
BATCH = 128
METHODS = ("magnitude", "wanda", "sparsegpt")


def passages(documents: Sequence[str], tokenizer: Any) -> Tensor:
    """The beginnings of paragraphs at equal distances through the documents: int64 [PASSAGES, LENGTH] at most."""
    lines = [line for text in documents for line in text.split("\n") if len(line.split()) >= LENGTH]
    ids = tokenizer(lines[:: max(1, len(lines) // PASSAGES)][:PASSAGES], truncation=True, max_length=LENGTH).input_ids
    return torch.tensor([each for each in ids if len(each) == LENGTH])


def embed(model: Any, ids: Tensor) -> Tensor:
    """Unit vectors [passages, hidden]: the mean of each passage's token vectors, normalized."""
    vectors = []
    for batch in ids.split(BATCH):
        with torch.no_grad():
            hidden = model(batch.to(model.device)).last_hidden_state
        vectors.append(torch.nn.functional.normalize(hidden.float().mean(1), dim=-1).cpu())
    return torch.cat(vectors)


def run(
    folder: Path, brown_file: Path, store: Store, patterns: Sequence[str], scheme: str, device: str, say: Any = print
) -> None:
    """Measure the dense encoder, and each pattern and method, on passages of Brown's odd documents."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    dense = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device).eval()
    documents = brown(brown_file)
    texts, calibration = passages(documents[1::2], tokenizer), passages(documents[0::2], tokenizer)
    layers = linears(dense)
    found, want = statistics(dense, calibration, gram=True), embed(dense, texts)
    store.add("setup", "encoder", {"passages": len(texts), "length": LENGTH, "calibration_tokens": calibration.numel()})
    for method in METHODS:
        for pattern in patterns:
            name = f"{pattern} {method} {scheme}"
            if store.has("encoder", name):
                continue
            plan = dict.fromkeys(layers, ss.Pattern.of(pattern))
            weights = {} if method == "magnitude" else pruned(layers, found, plan, method)
            model = sparse_copy(dense, weights, plan, scheme, "none" if weights else "magnitude")
            kept = compared(embed(model, texts), want)
            store.add("encoder", name, {"pattern": pattern, "method": method, "scheme": scheme, **kept})
            say(f"encoder {name}: mean cosine {kept['cosine']:.3f}, nearest neighbour kept {kept['nearest']:.0%}")


def compared(vectors: Tensor, want: Tensor) -> dict[str, float]:
    """Mean and least cosine with the dense model's vectors, and the share of texts whose nearest neighbour is the same."""
    cosine = (vectors * want).sum(-1)
    own, other = (each @ each.T - 2 * torch.eye(len(each)) for each in (vectors, want))
    nearest = (own.argmax(-1) == other.argmax(-1)).float()
    return {"cosine": float(cosine.mean()), "least": float(cosine.min()), "nearest": float(nearest.mean())}
