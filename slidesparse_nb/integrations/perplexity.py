"""Perplexity of a language model on a text, and its distance from another, through transformers.

    model, tokens = load("model-6of8-int8", "cuda"), tokens_of("model-6of8-int8", text)
    measure(model, tokens, window=512, stride=512, against=load("model", "cuda")).perplexity

A text is cut into windows of `window` tokens, one every `stride` tokens; the last may be shorter. In each window the tokens
that no earlier window has predicted are predicted, from those before them in the window:

    window 4, stride 4    0 [1 2 3]  4 [5 6 7]  8 [9]           predicted tokens are in brackets
    window 4, stride 2    0 [1 2 3]    2 3 [4 5]    4 5 [6 7]   more context, twice the work
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

import slidesparse_nb as ss

from ..pruning.model import read_text, require_room, tokenizer_of
from . import transformers as _registered  # noqa: F401  (packed folders load)

LOGITS = 1 << 27
"""Logits that are computed at once: as many windows, at least one; 512 MiB in float32."""


@dataclass(frozen=True)
class Measured:
    """What a model makes of a text.

    Attributes:
        tokens: of the text, as many as were asked for.
        predicted: tokens whose probability counts; every mean is over these.
        windows: of `window` tokens, one every `stride`; the last may be shorter.
        loss: mean negative log-likelihood, in nats.
        perplexity: e to the power of it.
        dense_perplexity: of the model compared with; this and what follows is None without one.
        divergence: mean Kullback-Leibler divergence D(that model || this one) of the distributions of the next token, in nats.
        agreement: share of tokens where both models have the same first choice.
    """

    tokens: int
    predicted: int
    windows: int
    window: int
    stride: int
    loss: float
    perplexity: float
    dense_perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None


def load(folder: Path | str, device: str = "cpu") -> Any:
    """The causal language model of a folder, dense or packed, in its own dtype.

    Raises:
        FormatError: there is no config.json, or it or the weights are broken.
        UnsupportedError: transformers has no such model, or needs another package for it.
        OperandError: the device is not there.
    """
    if not Path(folder, "config.json").is_file():
        raise ss.FormatError(f"{folder}: has no config.json; give a folder as transformers saves it")
    if device == "cuda" and not torch.cuda.is_available():
        raise ss.OperandError(f"device: PyTorch {torch.__version__} sees no GPU; use cpu")
    place = None if device == "cpu" else device
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=place, local_files_only=True)
    except (ValueError, ImportError, KeyError) as error:
        if isinstance(error, ss.SlideSparseError):
            raise
        raise ss.UnsupportedError(f"{folder}: transformers cannot load it as a causal language model: {error}") from error
    except OSError as error:
        raise ss.FormatError(f"{folder}: {error}") from error
    require_causal(folder, model.eval().requires_grad_(False))
    return model


def require_causal(folder: Path | str, model: Any) -> None:
    """UnsupportedError for a model that sees what it is to predict: an encoder, which transformers loads with a warning."""
    config = model.config.get_text_config()
    vocabulary, longest = (getattr(config, name, None) or 8 for name in ("vocab_size", "max_position_embeddings"))
    texts = (torch.arange(min(8, longest)) % vocabulary).repeat(2, 1)
    texts[1, -1] = (texts[0, -1] + 1) % vocabulary
    with torch.inference_mode():
        one, other = model(input_ids=texts.to(model.device), use_cache=False).logits[:, :-1].float()
    if float((one - other).abs().max()) > 0.005 * float(one.std()):
        raise ss.UnsupportedError(f"{folder}: is no causal language model: what it says of a token depends on later ones")


def tokens_of(folder: Path | str, text: str) -> tuple[list[int], list[int]]:
    """A text in tokens, and the tokens that this tokenizer puts before every text: none, or the one for its beginning."""
    tokenizer = tokenizer_of(folder)
    plain, marked, bare = tokenizer(text), tokenizer("a", special=True), tokenizer("a")
    start = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), 0)
    return plain, marked[:start]


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token, one past the last, first predicted token) of each window of a text of `count` tokens.

    Raises:
        OperandError: the text is shorter than one window, or window and stride are not possible.
    """
    if window < 2 or not 1 <= stride <= window:
        raise ss.OperandError(f"stride: {stride} must be 1 to {window}, the window, and the window 2 or more")
    if count < window:
        raise ss.OperandError(f"text: has {count} tokens, fewer than one window of {window}; give a longer text or --window")

    def each() -> Iterator[tuple[int, int, int]]:
        done = 0
        for first in range(0, count - 1, stride):
            last = min(first + window, count)
            yield first, last, max(done, first + 1)
            done = last
            if last == count:
                return

    return each()


def measure(
    model: Any,
    tokens: Sequence[int],
    window: int = 512,
    stride: int = 512,
    prefix: Sequence[int] = (),
    against: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
    at_once: int = LOGITS,
) -> Measured:
    """Perplexity of `model` on a text, and its distance from the model `against`.

    Args:
        tokens: the text.
        prefix: tokens before every window, which are not predicted and not counted.
        against: a model of the same tokens, the dense one as a rule.
        progress: called with ("eval", windows done, windows in all).
        at_once: logits that are computed at once; they take some 16 bytes each.

    Raises:
        OperandError: as `windows`; a token that the model does not know; more tokens in a window than the model has positions.
        UnsupportedError: a model's logits are not finite.
    """
    cuts = list(windows(len(tokens), window, stride))
    models = [model] if against is None else [model, against]
    for each in models:
        require_room(each, window + len(prefix), max(tokens))
    batch = max(1, at_once // (window * model.config.get_text_config().vocab_size))
    totals = torch.zeros(4, dtype=torch.float64)
    queue, done, predicted = iter(cuts), 0, 0
    while group := list(islice(queue, batch)):
        for same in _of_one_length(group):  # the last window may be shorter
            ids = torch.tensor([[*prefix, *tokens[first:last]] for first, last, _ in same], device=model.device)
            targets = ids[:, len(prefix) + 1 :]
            counts = torch.tensor([[first + 1 + i >= start for i in range(targets.shape[1])] for first, _, start in same])
            logs = [_log_probabilities(each, ids, len(prefix), done) for each in models]
            totals += _sums(logs, targets, counts.to(model.device)).cpu()
            predicted += int(counts.sum())
        done += len(group)
        if progress is not None:
            progress("eval", done, len(cuts))
    loss, dense, divergence, agreement = (totals / predicted).tolist()
    facts = len(tokens), predicted, len(cuts), window, stride, loss, math.exp(min(loss, 700.0))
    return Measured(*facts) if against is None else Measured(*facts, math.exp(min(dense, 700.0)), divergence, agreement)


def _of_one_length(group: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    lengths = dict.fromkeys(last - first for first, last, _ in group)
    return [[cut for cut in group if cut[1] - cut[0] == length] for length in lengths]


def _log_probabilities(model: Any, ids: torch.Tensor, skipped: int, done: int) -> torch.Tensor:
    """ids [windows, tokens] -> float32 [windows, predicted tokens, vocabulary], `skipped` tokens of a prefix left out."""
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits[:, skipped:-1].float()
    if not bool(torch.isfinite(logits).all()):
        raise ss.UnsupportedError(
            f"model: logits of {type(model).__name__} are not finite in window {done}; are its weights whole, and is"
            f" {model.dtype} wide enough for it?"
        )
    return torch.log_softmax(logits, -1).to(ids.device)


def _sums(logs: list[torch.Tensor], targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """float64 [4]: the loss of the model, that of the other, their divergence, and how often their first choices agree."""
    losses = [-each.gather(-1, targets[..., None])[..., 0] for each in logs]
    columns = [*losses, *(torch.zeros_like(losses[0]),) * (4 - len(losses))]
    if len(logs) == 2:
        own, other = logs
        if own.shape[-1] != other.shape[-1]:
            raise ss.OperandError(
                f"against: its vocabulary has {other.shape[-1]} tokens, not {own.shape[-1]}; compare models of one vocabulary"
            )
        columns[2] = (other.exp() * (other - own)).sum(-1)
        columns[3] = (own.argmax(-1) == other.argmax(-1)).float()
    return torch.stack([column[counts].double().sum() for column in columns])


def evaluate(
    folder: Path | str,
    text: Path | str,
    window: int = 512,
    stride: int = 512,
    limit: int | None = None,
    device: str = "cpu",
    against: Path | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Measured:
    """`measure` of the first `limit` tokens of a text by the model of a folder, and by that of the folder `against`.

    Args:
        text: a file of it, in UTF-8; or itself.

    Raises:
        FormatError: the file is not UTF-8.
        OperandError: the two folders cut the text into different tokens; and as `load`, `tokens_of` and `measure`.
    """
    text = read_text(text) if isinstance(text, Path) else text
    tokens, prefix = tokens_of(folder, text)
    if against is not None and tokens_of(against, text) != (tokens, prefix):
        raise ss.OperandError(
            f"{against}: its tokenizer cuts the text into other tokens than that of {folder}; compare models of one tokenizer"
        )
    list(windows(len(tokens[:limit]), window, stride))  # before minutes of loading
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [load(each, device) for each in (folder, against) if each is not None]
    return measure(models[0], tokens[:limit], window, stride, prefix, models[1] if against is not None else None, progress)
