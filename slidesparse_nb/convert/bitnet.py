"""BitNet b1.58 (arXiv 2402.17764): weights -1, 0 and 1 times one scale a matrix, read as the INT8 weights that they are.

    packed    X.weight U8 [n/4, k], X.weight_scale [1]: the byte of row r and column j holds, from its lowest bits up, rows r,
              r + n/4, r + 2n/4 and r + 3n/4 of column j, two bits each: the weight plus 1
              linear_class "bitlinear" divides by weight_scale, "autobitlinear" (quantization_mode "offline") multiplies by it
    masters   X.weight [n, k] in floating point, "autobitlinear" with quantization_mode "online": the scale is s = mean |w|, at
              least 1e-5, and a weight is round(w / s), clipped to -1 and 1

Layouts and scales are those of transformers' `integrations/bitnet.py`. Its scale of masters ends up in their type, so here it
is rounded to that type, too. Both forms round activations as INT8_W8A8 does: int8 a token, with the scale max |x| / 127.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..checkpoint.hf_folder import CONFIG
from ..checkpoint.packed_config import activation_facts, storage_facts
from ..checkpoint.safetensors import SafetensorsFile, TensorFile, TensorInfo
from ..core.dtypes import NUMPY_OF
from ..core.scheme import Scheme
from ..errors import FormatError, UnsupportedError, shown
from . import kinds
from .layout import row_ranges
from .options import UNIT_BYTES

METHOD = "bitnet"
DIVIDES, MULTIPLIES = "bitlinear", "autobitlinear"
SMALLEST_SCALE = 1e-5
FLOATS = ("F32", "F16", "BF16")

_KNOWN: dict[str, tuple[Any, ...]] = {
    "quant_method": (METHOD,),
    "linear_class": (DIVIDES, MULTIPLIES),
    "quantization_mode": ("offline", "online"),
    "use_rms_norm": (False,),
}
"""Entry of the statement -> values that are understood; the first is the default."""
_FREE = ("modules_to_not_convert", "rms_norm_eps")


@dataclass(frozen=True)
class Statement:
    """What config.json says of a BitNet model.

    Attributes:
        linear_class, mode: as transformers names them.
        kept: patterns of modules that are not ternary, as transformers matches them.
    """

    linear_class: str
    mode: str
    kept: tuple[str, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any] | None) -> Statement | None:
        """None where a config.json does not name BitNet. Raises UnsupportedError for what is not understood."""
        said = (config or {}).get("quantization_config")
        if not isinstance(said, Mapping) or said.get("quant_method") != METHOD:
            return None
        where = f"{CONFIG}: quantization_config"
        for key, value in said.items():
            if key in _KNOWN and value not in _KNOWN[key]:
                raise UnsupportedError(
                    f"{where} has {key} {shown(value)}; of BitNet {' or '.join(map(str, _KNOWN[key]))} is read"
                )
            if key not in _KNOWN and key not in _FREE and value not in (None, False, "", [], {}):
                raise UnsupportedError(
                    f"{where} has {shown(key)}: {shown(value)}, which is unknown of BitNet; remove it if it says nothing"
                )
        chosen = {key: said.get(key, values[0]) for key, values in _KNOWN.items()}
        if (chosen["linear_class"], chosen["quantization_mode"]) == (DIVIDES, "online"):
            raise UnsupportedError(f"{where}: quantization_mode 'online' needs linear_class {MULTIPLIES!r}; mend the config")
        kept = said.get("modules_to_not_convert") or []
        if not isinstance(kept, list) or not all(isinstance(each, str) and _is_expression(each) for each in kept):
            raise UnsupportedError(f"{where}.modules_to_not_convert is {shown(kept)}, must be a list of names or expressions")
        return cls(chosen["linear_class"], chosen["quantization_mode"], tuple(kept))

    def keeps(self, module: str) -> bool:
        """Whether a module is not ternary."""
        return any(re.match(rf"(?:{each})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(each) for each in self.kept)


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


class BitnetFile(TensorFile):
    """A file of a BitNet model whose ternary matrices are read as I8 [n, k], with F32 scales [1] that multiply.

    Attributes:
        ternary: the matrices, by module, as the file holds them.
    """

    def __init__(self, file: SafetensorsFile, said: Statement, vocabularies: frozenset[int]) -> None:
        """Raises UnsupportedError for a linear layer or a scale in another form than the config says."""
        self.file, self.said, self.path, self.state, self.metadata = file, said, file.path, file.state, file.metadata
        self.tensors, self.ternary = {}, dict[str, TensorInfo]()
        self._means: dict[str, np.float32] = {}
        for name, info in file.tensors.items():
            module, _, part = name.rpartition(".")
            if part == "weight" and len(info.shape) == 2 and self._is_ternary(module, info, vocabularies):
                self.ternary[module] = info
                self._present(name, "I8", (info.shape[0] * (4 if info.code == "U8" else 1), info.shape[1]))
                if said.mode == "online":
                    self._present(f"{module}.weight_scale", "F32", (1,))
            elif part == "weight_scale":
                if said.mode == "online" or info.code not in FLOATS or prod(info.shape) != 1:
                    rule = "no scale is stored" if said.mode == "online" else "a scale is one floating-point number"
                    raise UnsupportedError(
                        f"{shown(name)}: is {info.code} {list(info.shape)}, but with quantization_mode {said.mode!r} {rule};"
                        " start from another copy of the model"
                    )
                self._present(name, "F32", (1,))
            else:
                self.tensors[name] = info

    def _is_ternary(self, module: str, info: TensorInfo, vocabularies: frozenset[int]) -> bool:
        wanted = ("U8",) if self.said.mode == "offline" else FLOATS
        if info.code == "U8" == wanted[0]:
            return True
        linear = kinds.not_linear(module, info.shape, vocabularies) is None and not self.said.keeps(module)
        if linear and info.code not in wanted:
            raise UnsupportedError(
                f"{shown(info.name)}: is {info.code}, but linear layers of BitNet's quantization_mode {self.said.mode!r} are"
                f" {' or '.join(wanted)}; if it is not ternary, name it in modules_to_not_convert of {CONFIG}"
            )
        return linear

    def _present(self, name: str, code: str, shape: tuple[int, ...]) -> None:
        self.tensors[name] = TensorInfo(name, code, shape, 0, prod(shape) * NUMPY_OF[code].itemsize)

    def _is_made(self, name: str) -> bool:
        return self.info(name) is not self.file.tensors.get(name)

    def close(self) -> None:
        self.file.close()

    def rows(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Rows first to last - 1 of a tensor, int8 of a ternary matrix."""
        if not self._is_made(name):
            return self.file.rows(name, first, last)
        module, _, part = name.rpartition(".")
        if part == "weight_scale":
            return np.array([self._scale(module)], np.float32)[first:last]
        if self.ternary[module].code == "U8":
            return self._unpacked(name, first, min(last, self.info(name).shape[0]))
        w = np.asarray(self.file.rows(name, first, last), np.float32)
        rounded: NDArray[np.int8] = np.clip(np.rint(w * (np.float32(1) / self._mean(module))), -1, 1).astype(np.int8)
        return rounded

    def _unpacked(self, name: str, first: int, last: int) -> NDArray[np.int8]:
        packed = self.file.array(name)
        index = np.arange(first, last)
        two = (packed[index % len(packed)] >> (2 * (index // len(packed)))[:, None].astype(np.uint8)) & 3
        if (two == 3).any():
            row, column = map(int, np.argwhere(two == 3)[0])
            raise FormatError(
                f"{self.path}: {shown(name)}: the two bits of row {first + row}, column {column} are 3, must be 0, 1 or 2 (the"
                " weight plus 1); download it again"
            )
        return two.astype(np.int8) - np.int8(1)

    def _mean(self, module: str) -> np.float32:
        """The scale of masters in float32: mean |w|, at least 1e-5. Raises FormatError for NaN and infinity."""
        if module not in self._means:
            info, total = self.ternary[module], 0.0
            for first, last in row_ranges(info.shape[0], info.nbytes // max(1, info.shape[0]), UNIT_BYTES):
                total += float(np.abs(np.asarray(self.file.rows(info.name, first, last), np.float32)).sum(dtype=np.float64))
            if not np.isfinite(total):
                raise FormatError(f"{self.path}: {shown(info.name)}: holds NaN or infinity; download it again")
            self._means[module] = max(np.float32(total / max(1, prod(info.shape))), np.float32(SMALLEST_SCALE))
        return self._means[module]

    def _scale(self, module: str) -> np.float32:
        """What multiplies the ternary weights of a matrix. Raises FormatError if it is no positive number."""
        if self.said.mode == "online":
            return np.float32(np.asarray(self._mean(module)).astype(NUMPY_OF[self.ternary[module].code]))
        stored = np.float32(self.file.array(f"{module}.weight_scale").reshape(-1)[0])
        if not np.isfinite(stored) or stored <= 0:
            raise FormatError(
                f"{self.path}: {shown(f'{module}.weight_scale')}: is {stored}, must be positive; download it again"
            )
        return stored if self.said.linear_class == MULTIPLIES else np.float32(1) / stored

    def array(self, name: str) -> NDArray[Any]:
        """A whole tensor, as `rows` reads it."""
        return self.rows(name, 0, self.info(name).shape[0]) if self._is_made(name) else self.file.array(name)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Bytes [start, stop) of a tensor, as `rows` reads it."""
        return (
            self.array(name).view(np.uint8).reshape(-1)[start:stop] if self._is_made(name) else self.file.raw(name, start, stop)
        )

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let go of the memory behind bytes [start, stop) of a tensor; of packed rows, which are everywhere, after the last."""
        info = self.info(name)
        if not self._is_made(name):
            self.file.release(name, start, stop)
        elif (stored := self.ternary.get(name.removesuffix(".weight"))) is not None:
            stop = info.nbytes if stop is None else min(stop, info.nbytes)
            if stored.code != "U8":
                size = NUMPY_OF[stored.code].itemsize
                self.file.release(name, start * size, stop * size)
            elif stop == info.nbytes:
                self.file.release(name)


def read_bitnet(checkpoint: Checkpoint, vocabularies: frozenset[int]) -> Checkpoint:
    """A BitNet checkpoint as one of INT8 W8A8, config and all; any other as it is.

    Raises:
        UnsupportedError: what config.json says of BitNet, or a tensor, is not understood.
    """
    said = Statement.read(checkpoint.config)
    if said is None or checkpoint.config is None:
        return checkpoint
    files = [BitnetFile(file, said, vocabularies) for file in checkpoint.files if isinstance(file, SafetensorsFile)]
    scheme = Scheme.of("INT8_W8A8")
    names = (name.removesuffix(".weight") for file in files for name in file.tensors if name.endswith(".weight"))
    group = {"weights": {**storage_facts(scheme.weights), "strategy": "tensor"}, "input_activations": activation_facts(scheme)}
    config = {
        **checkpoint.config,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
            "ignore": [name for name in names if said.keeps(name)],
        },
    }
    count = sum(len(file.ternary) for file in files)
    scale = "mean |w|" if said.mode == "online" else f"weight_scale, which {said.linear_class} {_USES[said.linear_class]}"
    note = f"BitNet: {count} matrices of -1, 0 and 1 are read as INT8, with one scale each: {scale}"
    return checkpoint.read_as(files, config, (note,))


_USES = {DIVIDES: "divides by", MULTIPLIES: "multiplies by"}
