"""A model of transformers, block by block: what goes into its linear layers while a text runs through it.

    hidden states of every batch --block i--> statistics of its linear layers; pruned weights --block i--> hidden states

Blocks are the items of the longest ModuleList whose items hold Linear layers, and that is itself in no such list. Arguments of
a block that are no hidden states (masks, position embeddings) come from the model's own forward pass: blocks before it hand on
what they are given, and the block itself ends the pass. So a device holds the weights and Hessians of one block and the hidden
states between two blocks (tokens * hidden size * 4 bytes), and any architecture works whose blocks hand hidden states to each
other and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import cuda
from ..errors import FormatError, OperandError, UnsupportedError, shown
from .statistics import Moments, Statistics

BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Tokens that go through a block at once, by device; at least one window."""


class _Reached(Exception):
    """Ends a forward pass at a block, whose arguments it carries."""


def libraries() -> tuple[Any, Any]:
    """PyTorch and transformers. Raises UnsupportedError where they cannot be imported."""
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise UnsupportedError(
            f"calibration: needs torch and transformers ({error}): pip install slidesparse_nb[transformers]; or give statistics"
        ) from None


def read_text(path: Path) -> str:
    """A text. Raises FormatError if it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def tokenizer_of(folder: Path | str) -> Callable[..., list[int]]:
    """The tokenizer of a folder: (text, special=False) -> tokens, with those that it puts around a text where `special`.

    Raises:
        UnsupportedError: there is none, transformers cannot read it, or later, it cannot read the text.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any(Path(folder, name).is_file() for name in names):
        raise UnsupportedError(f"{folder}: holds no tokenizer; copy that of its model (tokenizer.json) into the folder")
    transformers = libraries()[1]

    def tokens(text: str, special: bool = False) -> list[int]:
        try:
            return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        except Exception as error:
            raise UnsupportedError(
                f"{folder}: its tokenizer cannot read the text ({error}); copy that of its model into the folder"
            ) from error

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a file of the folder makes transformers or tokenizers raise
        raise UnsupportedError(f"{folder}: transformers cannot read its tokenizer: {error}") from error
    return tokens


def renamer(model: Any) -> Callable[[str], str] | None:
    """How transformers renames tensors of a checkpoint that it loads into a model; None if its version does not tell."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        renamings = [entry.rename_source_key for entry in mapping if not hasattr(entry, "operations")]

        def rename(name: str) -> str:
            return functools.reduce(lambda key, by: by(key)[0], renamings, name)

        rename("layer.weight")
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return rename


def require_room(model: Any, window: int, largest: int) -> None:
    """Raise OperandError where windows of so many tokens, the largest of this id, do not fit a model of transformers."""
    config, kind = model.config.get_text_config(), type(model).__name__
    positions, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    if isinstance(positions, int) and window > positions:
        raise OperandError(f"window: {window} tokens must be at most {positions}, the positions of {kind}; shorten it")
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise OperandError(
            f"tokens: {largest} must be below {vocabulary}, the vocabulary of {kind}; give the tokenizer that belongs to it"
        )


def read_windows(folder: Path, text: Path, tokens: int, window: int) -> Any:
    """The first tokens of a text by the model's own tokenizer: int64 [windows, window] of PyTorch, no special tokens added.

    Raises:
        FormatError: the text is no UTF-8. OperandError: it is shorter than a window. UnsupportedError: as `tokenizer_of`.
    """
    torch, words = libraries()[0], read_text(text)
    ids = tokenizer_of(folder)(words)[:tokens]
    if len(ids) < window:
        raise OperandError(
            f"calibration: {text} has {len(ids)} tokens, less than one window of {window}; give more text, or a shorter window"
        )
    return torch.tensor(ids[: len(ids) // window * window]).reshape(-1, window)


class BlockwiseModel:
    """A model of transformers, of which one block at a time runs on a device.

    Attributes:
        blocks: the decoder (or encoder) blocks, in order.
        linears: for each block, checkpoint name of a module -> Linear layer, of those wanted.
        astray: wanted modules that are no Linear layer of a block.
    """

    def __init__(self, model: Any, wanted: set[str], device: str) -> None:
        """Take over a model, on the host or the device; it is of no use afterwards.

        Raises:
            UnsupportedError: no block is found in it.
        """
        self.torch, _ = libraries()
        model.config.use_cache = False
        self.model, self.device, self.xp = model, device, namespace_of(device)
        name, self.blocks = _blocks(self.model, self.torch)
        self.linears: list[dict[str, Any]] = [{} for _ in self.blocks]
        rename = renamer(model) or str
        renamed = {rename(f"{each}.weight").removesuffix(".weight"): each for each in sorted(wanted)}
        for at, module in self.model.named_modules():
            linear = isinstance(module, self.torch.nn.Linear) and at.startswith(f"{name}.")
            if linear and (known := renamed.get(at) or _known(at, wanted)) is not None:
                self.linears[int(at[len(name) + 1 :].split(".")[0])][known] = module
        self.astray = wanted - {name for linears in self.linears for name in linears}
        self.at: int | None = None
        self.passed: Any = None
        self.form = 0
        for i, block in enumerate(self.blocks):
            block.forward = self._interrupted(i, block.forward)

    # ---- blocks

    def _interrupted(self, i: int, real: Any) -> Any:
        """The forward of block i; during `_arguments` it returns what it is given, or ends the pass."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.at is None:
                return real(*args, **kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if i and hidden is not self.passed:
                raise UnsupportedError(
                    f"calibration: the model changes hidden states between blocks {i - 1} and {i}; give statistics"
                )
            if i == self.at:
                raise _Reached(hidden, args[1:], kwargs)
            self.passed = hidden
            return (hidden, *[None] * (self.form - 1)) if self.form else hidden

        return forward

    def _arguments(self, i: int, ids: Any) -> Any:
        """Hidden states of the embedding, and the other arguments of block i, for one window."""
        self.at = i
        try:
            self.model(input_ids=ids)
        except _Reached as reached:
            return reached.args
        finally:
            self.at, self.passed = None, None
        raise UnsupportedError(f"calibration: the model does not run its block {i}; give statistics")

    def walk(self, windows: Any, *, gram: bool, prunes: bool, done: Container[int] = ()) -> Iterator[tuple[int, Statistics]]:
        """Run a text through the blocks, one after another.

        Args:
            windows: int64 [windows, tokens].
            gram: whether X^T X is wanted, besides column norms.
            prunes: the caller gives a block other weights before it asks for the next one, which reads what these make of it.
            done: blocks whose weights the caller has; there are no statistics of them.

        Yields:
            (i, what the linear layers of block i read).

        Raises:
            OperandError: windows that are longer than the model allows, or tokens that it does not know.
            UnsupportedError: a model that cannot be run block by block, or inputs of a layer that hold NaN or infinity.
            MemoryError: the device's is too small.
        """
        require_room(self.model, windows.shape[1], int(windows.max()))
        batches = windows.to(self.model.device).split(max(1, BATCH_TOKENS[self.device] // windows.shape[1]))
        with self.torch.no_grad(), self._memory():
            hidden = [self._moved(self._arguments(0, ids)[0]) for ids in batches]
        for i in range(len(self.blocks)):
            self.load(i)
            yield i, Statistics() if i in done else self.watched(i, hidden, batches, gram=gram, advance=not prunes)
            for at, ids in enumerate(batches if prunes and i + 1 < len(self.blocks) else ()):
                hidden[at] = self.run(i, hidden[at], ids)
            self.unload(i)

    def run(self, i: int, hidden: Any, ids: Any) -> Any:
        """Block i on hidden states of one batch."""
        with self.torch.no_grad(), self._memory():
            _, args, kwargs = self._arguments(i, ids)
            out = self.blocks[i](hidden, *self._moved(args), **self._moved(kwargs))
        self.form = len(out) if isinstance(out, tuple) else 0
        return out[0] if self.form else out

    def _moved(self, value: Any) -> Any:
        """`value` with all tensors in it on the device."""
        if isinstance(value, self.torch.Tensor):
            return value.to(self.device)
        if isinstance(value, (tuple, list)):
            return type(value)(self._moved(each) for each in value)
        return {key: self._moved(each) for key, each in value.items()} if isinstance(value, dict) else value

    def load(self, i: int) -> None:
        """Bring block i to the device."""
        with self._memory():
            self.blocks[i].to(self.device)

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        """Raise MemoryError, which says what takes the memory, where PyTorch runs out of a device's."""
        try:
            yield
        except self.torch.OutOfMemoryError:
            raise MemoryError(
                "device: has too little memory for a block and its hidden states; give fewer tokens, or a shorter window"
            ) from None

    def unload(self, i: int) -> None:
        """Take it back, and let go of the device's memory."""
        self.blocks[i].to("cpu")
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            if self.xp is not np:
                self.xp.get_default_memory_pool().free_all_blocks()

    # ---- linear layers

    def watched(self, i: int, hidden: list[Any], batches: Sequence[Any], *, gram: bool, advance: bool) -> Statistics:
        """Statistics of the inputs of block i's linear layers; `advance`: and let the hidden states go on to the next block."""
        found, last = Statistics(), _Last()

        def see(name: str, linear: Any, x: Any) -> None:
            shares = x is last.x
            if name not in found.inputs:
                found.inputs[name] = last.owner if shares else name
                if not shares:
                    found.moments[name] = Moments.empty(name, linear.in_features, gram=gram, xp=self.xp)
            owner = found.inputs[name]
            if shares != (owner != name):
                raise UnsupportedError(
                    f"calibration: {shown(name)} does not always read what {shown(owner)} reads; give statistics"
                )
            if not shares:
                found.moments[name].add(as_array(x.reshape(-1, linear.in_features), self.xp))
            last.x, last.owner = x, owner

        hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name, linear=linear: see(name, linear, args[0]))
            for name, linear in self.linears[i].items()
        ]
        try:
            for at, ids in enumerate(batches):
                out = self.run(i, hidden[at], ids)
                hidden[at] = out if advance else hidden[at]
                last.x = None
        finally:
            for hook in hooks:
                hook.remove()
        for name in self.linears[i].keys() - found.inputs.keys():
            found.inputs[name] = name
            found.moments[name] = Moments.empty(name, self.linears[i][name].in_features, gram=gram)
        return found

    def set(self, linear: Any, w: Any) -> None:
        """Give a linear layer other weights: float32 [n, k], of NumPy or `xp`."""
        with self.torch.no_grad():
            linear.weight.copy_(self.torch.from_dlpack(w))


class _Last:
    """The last tensor that a linear layer read, and whose moments it is in."""

    x: Any = None
    owner = ""


def load_model(folder: Path, device: str) -> Any:
    """The model of a folder, in float32 on the host, by the class that its config names.

    Raises:
        OperandError: PyTorch has no such device. UnsupportedError: transformers cannot load it.
    """
    torch, transformers = libraries()
    if device == "cuda" and not torch.cuda.is_available():
        raise OperandError("device: PyTorch finds no GPU; use cpu, or install PyTorch for CUDA")
    bars = transformers.utils.logging
    enable = bars.enable_progress_bar if bars.is_progress_bar_enabled() else bars.disable_progress_bar
    bars.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kind = transformers.AutoModel
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError) as error:
        raise UnsupportedError(f"{folder}: transformers cannot load it ({error}); give statistics made elsewhere") from None
    finally:
        enable()
    return model


def as_array(tensor: Any, xp: Any) -> Any:
    """A tensor as a float32 array of CuPy or NumPy, without a copy where type and device allow it."""
    tensor = tensor.detach().float().contiguous()
    return tensor.cpu().numpy() if xp is np else xp.from_dlpack(tensor)


def namespace_of(device: str) -> Any:
    """CuPy on a GPU, where it is installed and finds it; NumPy otherwise."""
    with contextlib.suppress(UnsupportedError):
        return cuda.cupy("device", "NumPy") if device == "cuda" else np
    return np


def _blocks(model: Any, torch: Any) -> tuple[str, list[Any]]:
    """The name of the ModuleList that holds the blocks, and the blocks. Raises UnsupportedError if there is none."""

    def lists(module: Any, at: str) -> Iterator[tuple[str, Any]]:
        for name, child in module.named_children():
            where = f"{at}.{name}" if at else name
            if isinstance(child, torch.nn.ModuleList) and all(map(has_linear, child)):
                yield where, child
            else:
                yield from lists(child, where)

    def has_linear(module: Any) -> bool:
        return any(isinstance(each, torch.nn.Linear) for each in module.modules())

    found = max(lists(model, ""), key=lambda pair: len(pair[1]), default=("", ()))
    if not found[1]:
        raise UnsupportedError(
            "calibration: the model has no list of blocks with linear layers; give statistics made elsewhere"
        )
    return found[0], list(found[1])


def _known(at: str, wanted: set[str]) -> str | None:
    """The checkpoint's name of a module: the same, or with other first parts on one side (model., transformer.)."""
    if at in wanted:
        return at
    found = [name for name in wanted if at.endswith(f".{name}") or name.endswith(f".{at}")]
    return found[0] if len(found) == 1 else None
