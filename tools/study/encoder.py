"""The same question for a sentence encoder: how far its embeddings move, and whether passages keep their nearest neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import slidesparse_nb as ss

from .models import Inputs, linears, pruned, sparse_copy
from .store import Store
from .texts import brown

PASSAGES = 512
WORDS = (10, 60)
"""Words of a passage, at least and at most."""
BATCH = 64
METHODS = ("magnitude", "wanda", "sparsegpt")


def passages(documents: Sequence[str], count: int) -> list[str]:
    """Paragraphs of ordinary length, at equal distances through the documents."""
    found = [line for text in documents for line in text.split("\n") if WORDS[0] <= len(line.split()) <= WORDS[1]]
    return found[:: max(1, len(found) // count)][:count]


def embed(model: Any, tokenizer: Any, texts: Sequence[str], inputs: Inputs | None = None) -> Tensor:
    """Unit vectors [texts, hidden]: the mean of each text's token vectors, normalized. Texts of one length go together."""
    ids = tokenizer(list(texts), truncation=True, max_length=256).input_ids
    vectors = torch.zeros(len(texts), model.config.hidden_size)
    by_length: dict[int, list[int]] = {}
    for i, each in enumerate(ids):
        by_length.setdefault(len(each), []).append(i)
    for same in by_length.values():
        for start in range(0, len(same), BATCH):
            chosen = same[start : start + BATCH]
            with torch.no_grad():
                hidden = model(torch.tensor([ids[i] for i in chosen], device=model.device)).last_hidden_state
            vectors[chosen] = torch.nn.functional.normalize(hidden.float().mean(1), dim=-1).cpu()
            if inputs is not None:
                inputs.end_batch(hidden.shape[0] * hidden.shape[1])
    return vectors


def run(
    folder: Path, brown_file: Path, store: Store, patterns: Sequence[str], scheme: str, device: str, say: Any = print
) -> None:
    """Measure the dense encoder, and each pattern and method, on passages of Brown's odd documents."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    dense = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device).eval()
    documents = brown(brown_file)
    texts, calibration = passages(documents[1::2], PASSAGES), passages(documents[0::2], PASSAGES)
    layers = linears(dense)
    inputs = Inputs(layers, gram=True)
    embed(dense, tokenizer, calibration, inputs)
    inputs.close()
    want = embed(dense, tokenizer, texts)
    store.add("setup", "encoder", {"passages": len(texts), "calibration_tokens": inputs.tokens, "linears": len(layers)})
    for method in METHODS:
        for pattern in patterns:
            name = f"{pattern} {method} {scheme}"
            if store.has("encoder", name):
                continue
            weights: dict[str, Tensor] = {}
            for group in inputs.groups().values() if method != "magnitude" else ():
                given = {each: layers[each].weight.data for each in group}
                weights |= pruned(given, inputs, ss.Pattern.of(pattern), method, None)
            plan = dict.fromkeys(layers, ss.Pattern.of(pattern))
            model = sparse_copy(dense, weights, plan, scheme, "none" if weights else "magnitude")
            found = compared(embed(model, tokenizer, texts), want)
            store.add("encoder", name, {"pattern": pattern, "method": method, "scheme": scheme, **found})
            say(f"encoder {name}: mean cosine {found['cosine']:.3f}, nearest neighbour kept {found['nearest']:.0%}")


def compared(vectors: Tensor, want: Tensor) -> dict[str, float]:
    """Mean and least cosine with the dense model's vectors, and the share of texts whose nearest neighbour is the same."""
    cosine = (vectors * want).sum(-1)
    own, other = (each @ each.T - 2 * torch.eye(len(each)) for each in (vectors, want))
    nearest = (own.argmax(-1) == other.argmax(-1)).float()
    return {"cosine": float(cosine.mean()), "least": float(cosine.min()), "nearest": float(nearest.mean())}
