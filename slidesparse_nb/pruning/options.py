"""What to prune and how, and what came of it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ..checkpoint.safetensors import checked_path, open_regular
from ..convert import Report
from ..convert.options import DEFAULT_PATTERN, settle
from ..core.checks import whole_number
from ..core.pattern import Pattern
from ..errors import OperandError, shown
from .sparsegpt import DAMPING, checked_damping, checked_scheme

METHODS = ("magnitude", "wanda", "sparsegpt")
CALIBRATED = METHODS[1:]
"""Methods that need a text, or statistics made of one."""
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class PruneOptions:
    """Everything that decides the bytes of a pruned checkpoint.

    Attributes:
        pattern: (2N-2):2N, of columns or of pairs.
        method: magnitude, wanda or sparsegpt; "" where `scores` are given.
        calibration: a text in UTF-8, for wanda and sparsegpt: the model runs on it, block by block.
        tokens, window: the first `tokens` tokens of the text are read in windows of `window`, without overlap; a rest goes.
        statistics: in place of a text, a file that `collect_statistics` made; then neither PyTorch nor transformers is needed.
        scores: in place of a method, a .safetensors file of scores or masks made elsewhere: "X" or "X.weight" -> [n, k]. A
            tensor of zeros and ones is a mask: zeros go.
        scheme: of sparsegpt, INT8_W8A8, FP8_DYNAMIC, BF16 or FP16: make up for its rounding, too.
        damping: of sparsegpt, share of the diagonal of the Hessian that is added to it; None for 0.1.
        device: "cpu" or "cuda", for the model and the mathematics.
        targets, ignore: which modules, as for `Options`.
        max_shard_size: as for `Options`.

    Raises:
        OperandError: a value is none of these, or they do not go together. UnsupportedError: a scheme with scales along k.
    """

    pattern: Pattern = DEFAULT_PATTERN
    method: str = ""
    calibration: str | os.PathLike[str] | None = None
    tokens: int = 65536
    window: int = 2048
    statistics: str | os.PathLike[str] | None = None
    scores: str | os.PathLike[str] | None = None
    scheme: str | None = None
    damping: float | None = None
    device: str = "cpu"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_shard_size: int | None = None

    def __post_init__(self) -> None:
        settle(self)
        if self.scores is not None and self.method:
            raise OperandError(f"scores: take the place of method {self.method!r}; give one of them")
        if self.scores is None and self.method not in METHODS:
            raise OperandError(f"method: {shown(self.method)} must be one of {', '.join(METHODS)}, or give scores")
        given = [name for name in ("calibration", "statistics") if getattr(self, name) is not None]
        if self.method in CALIBRATED and len(given) != 1:
            raise OperandError(f"method: {self.method} needs a calibration text, or statistics made of one, and not both")
        if self.method not in CALIBRATED and given:
            raise OperandError(f"{given[0]}: is of methods {' and '.join(CALIBRATED)}; leave it out")
        if self.method == "sparsegpt":
            object.__setattr__(self, "scheme", None if self.scheme is None else checked_scheme(self.scheme).name)
            object.__setattr__(self, "damping", DAMPING if self.damping is None else checked_damping(self.damping))
        elif self.scheme is not None:
            raise OperandError("scheme: is of method sparsegpt, which makes up for rounding; otherwise pack rounds, afterwards")
        elif self.damping is not None:
            raise OperandError("damping: is of method sparsegpt; leave it out")
        if self.device not in DEVICES:
            raise OperandError(f"device: {shown(self.device)} must be one of {', '.join(DEVICES)}")
        for name in ("window", "tokens"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        if self.tokens < self.window:
            raise OperandError(f"tokens: {shown(self.tokens)} must be at least one window of {shown(self.window)}")

    @property
    def label(self) -> str:
        """The method, or "scores"."""
        return self.method or "scores"

    def facts(self) -> dict[str, Any]:
        """All options in plain types, files by a hash of their bytes, to tell runs apart."""
        facts = asdict(self)
        for name in ("calibration", "statistics", "scores"):
            if (path := facts[name]) is not None:
                digest = hashlib.sha256()
                with open(open_regular(checked_path(path, name)), "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                facts[name] = digest.hexdigest()
        return {**facts, "pattern": str(self.pattern)}


@dataclass
class PruneReport(Report):
    """What pruning did: a `Report`, whose `prune` is the method and whose modules keep their type.

    Attributes:
        errors: module -> ||X (W - W')^T||^2 / ||X W^T||^2 of the weights as written, where the inputs X are known.
        calibration: tokens, window, windows; empty without a text.
    """

    errors: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, int] = field(default_factory=dict)
