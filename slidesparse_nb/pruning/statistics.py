"""What pruning must know of a layer's inputs: column sums of squares (Wanda) and X^T X (SparseGPT), and a file of them.

    calibration X [tokens, k] --add, window by window--> Moments --save--> FILE.safetensors --load--> Moments of every module

The file holds the statistics of the model that was run, which is the dense one, and serves every pattern and method. Block by
block pruning (`pruning.model`) needs other numbers for every pattern, since each block reads the outputs of blocks that are
pruned already; it makes them on its way and saves none. With a file every layer is pruned as if those before it were dense:
exact for the first block, an approximation for the others.

    X.column_squares  F64 [k]     sum over tokens of x^2
    X.gram            F32 [k, k]  sum over tokens of x x^T; absent where only column sums were asked for
    X.tokens          I64 [1]
    metadata          "slidesparse_statistics": {"version": 1, "inputs": {module: X}, "model": {tensor: CRC-32}, ...facts}

Modules that read the same tensor (q/k/v, gate/up) share one X, the name of the first of them. The CRC-32 of the bytes of every
tensor of the checkpoint tells of which model the statistics are; a file that was made elsewhere may lack it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checkpoint.safetensors import SafetensorsFile, TensorFile, checked_path
from ..checkpoint.safetensors_writer import write_whole
from ..core.dtypes import CODE_OF
from ..core.untrusted_json import parse_json
from ..errors import FormatError, OperandError, UnsupportedError, shown
from .groups import namespace

METADATA = "slidesparse_statistics"


@dataclass
class Moments:
    """Second moments of the inputs of a layer, added up on the host or a GPU.

    Attributes:
        name: what errors call the layer.
        squares: float64 [k], of NumPy or CuPy: sum of x^2.
        gram: float32 [k, k] of the same library, X^T X; None where it is not wanted.
        tokens: rows of X so far.
    """

    name: str
    squares: Any
    gram: Any = None
    tokens: int = 0

    @classmethod
    def empty(cls, name: str, k: int, *, gram: bool, xp: Any = np) -> Moments:
        """Moments of no tokens."""
        return cls(name, xp.zeros(k, np.float64), xp.zeros((k, k), np.float32) if gram else None)

    def add(self, x: Any) -> None:
        """Add inputs: float32 [tokens, k] of the same library.

        Raises:
            OperandError: another shape. UnsupportedError: NaN or infinity.
        """
        if x.ndim != 2 or x.shape[1] != len(self.squares):
            raise OperandError(f"{shown(self.name)}: inputs of shape {x.shape} must be [tokens, {len(self.squares)}]")
        squares = namespace(x).square(x, dtype=np.float64).sum(axis=0)
        if not bool(namespace(x).isfinite(squares).all()):
            raise UnsupportedError(
                f"{shown(self.name)}: its inputs hold NaN or infinity on the calibration text; check the model"
            )
        self.squares += squares
        self.tokens += len(x)
        if self.gram is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused where it is used
                self.gram += x.T @ x

    def on(self, xp: Any) -> Moments:
        """The same with arrays of `xp`, NumPy or CuPy."""
        if namespace(self.squares) is xp:
            return self
        squares, gram = (a if a is None else a.get() if xp is np else xp.asarray(a) for a in (self.squares, self.gram))
        return Moments(self.name, squares, gram, self.tokens)

    @property
    def norms(self) -> Any:
        """Root mean square of every column, float32 [k]: Wanda's norm over the square root of the number of tokens.

        Raises:
            OperandError: no token has been added.
        """
        self.require_tokens()
        return namespace(self.squares).sqrt(self.squares / self.tokens).astype(np.float32)

    @property
    def hessian(self) -> Any:
        """X^T X, float32 [k, k].

        Raises:
            OperandError: it was not added up, or no token has been added.
        """
        self.require_tokens()
        if self.gram is None:
            raise OperandError(
                f"{shown(self.name)}: statistics hold column norms alone; SparseGPT needs those made with method sparsegpt"
            )
        return self.gram

    def require_tokens(self) -> None:
        """Raise OperandError if no token has been added: nothing is known of the inputs."""
        if self.tokens == 0:
            raise OperandError(
                f"{shown(self.name)}: no token of the calibration text reaches it, or the model computes with its weight by"
                " itself; give more text, or leave it dense (--ignore)"
            )


@dataclass
class Statistics:
    """Moments of the inputs of many modules.

    Attributes:
        inputs: module -> name of the moments that it reads.
        moments: by name.
        facts: what else the file says: of the text, the window and the model.
        model: tensor of the checkpoint -> CRC-32 of its bytes; may be empty.
    """

    inputs: dict[str, str] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    model: dict[str, int] = field(default_factory=dict)

    def of(self, module: str) -> Moments:
        """Those of a module's inputs. Raises OperandError if there are none."""
        if module not in self.inputs:
            raise OperandError(f"statistics: hold nothing of {shown(module)}; make them anew, or leave it dense with --ignore")
        return self.moments[self.inputs[module]]

    def groups(self) -> dict[str, list[str]]:
        """Name of moments -> the modules that read them."""
        found: dict[str, list[str]] = {}
        for module, name in self.inputs.items():
            found.setdefault(name, []).append(module)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to one .safetensors file, which appears whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {}
        for name, moments in self.moments.items():
            arrays[f"{name}.column_squares"] = moments.on(np).squares
            if moments.gram is not None:
                arrays[f"{name}.gram"] = moments.on(np).gram
            arrays[f"{name}.tokens"] = np.array([moments.tokens], np.int64)
        told = {"version": 1, "inputs": self.inputs, "model": self.model, **self.facts}
        write_arrays(path, arrays, {METADATA: json.dumps(told)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read such a file.

        Raises:
            FormatError: it is none, or broken.
        """
        with SafetensorsFile(path) as file:  # the arrays are views of it
            told = parse_json(file.metadata.get(METADATA, "{}").encode(), path, strict=True)
            inputs, model = told.pop("inputs", None), told.pop("model", {})
            if told.pop("version", None) != 1 or not _maps(inputs, str) or not _maps(model, int):
                raise FormatError(f"{path}: is no file of statistics of version 1; make one with --save-statistics")
            return cls(inputs, {name: _read(file, name) for name in dict.fromkeys(inputs.values())}, told, model)


def _read(file: TensorFile, name: str) -> Moments:
    """The moments of that name. Raises FormatError."""
    names = [f"{name}.{part}" for part in ("column_squares", "gram", "tokens")]
    squares, gram, tokens = (file.array(each) if each in file.tensors else None for each in names)
    if squares is None or tokens is None or squares.dtype != np.float64 or squares.ndim != 1 or not _counts(tokens):
        raise FormatError(f"{file.path}: lacks column_squares, F64 [k], or tokens, I64 [1], of {shown(name)}; make it anew")
    if gram is not None and (gram.dtype != np.float32 or gram.shape != 2 * squares.shape):
        raise FormatError(
            f"{file.path}: {shown(names[1])} is {gram.dtype} {gram.shape}, must be F32 {2 * squares.shape}; make it anew"
        )
    if not np.isfinite(squares).all() or (squares < 0).any():
        raise FormatError(f"{file.path}: {shown(names[0])} holds NaN, infinity or a negative number; make it anew")
    if gram is not None and not _is_gram(gram, squares):
        raise FormatError(
            f"{file.path}: {shown(names[1])} is not X^T X, symmetric and with column_squares on its diagonal; make it anew"
        )
    for each in (names[0], *names[1:2] * (gram is not None)):
        file.release(each)
    return Moments(name, squares, gram, int(tokens[0]))


def _maps(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(each) is kind for each in value.values())


def _counts(tokens: Any) -> bool:
    return bool(tokens.shape == (1,) and tokens.dtype == np.int64 and tokens[0] >= 0)


def _is_gram(gram: Any, squares: Any) -> bool:
    """Whether it can be X^T X of these column sums, float32's rounding apart; |x y| <= |x| |y| says how large that may be."""
    norms = np.sqrt(squares)
    for first in range(0, len(gram), 256):
        rows = slice(first, first + 256)
        with np.errstate(invalid="ignore"):
            unlike = np.abs(gram[rows, first:] - gram[first:, rows].T)
        if not (unlike <= 1e-3 * norms[rows, None] * norms[first:]).all():
            return False
    return bool(np.allclose(gram.diagonal(), squares, rtol=1e-2, atol=1e-35))


def crc32(a: Any, crc: int = 0) -> int:
    """CRC-32 of the bytes of a NumPy array, in row-major order, after those that `crc` is of."""
    return zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data, crc)


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Write NumPy arrays to a .safetensors file that appears whole or not at all."""
    entries = [(name, CODE_OF[array.dtype], array.shape) for name, array in arrays.items()]
    write_whole(checked_path(path, "out"), entries, arrays, metadata)
