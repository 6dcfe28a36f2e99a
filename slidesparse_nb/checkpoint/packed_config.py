"""`quantization_config` of a packed model's config.json, as engines read it (docs/format.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.dtypes import NUMPY_OF
from ..core.pattern import Pattern
from ..core.scheme import SCHEMES, Scheme, Storage
from ..errors import FormatError, OperandError, UnsupportedError, shown
from .packed_format import packed_entries, pattern_facts, slidesparse_metadata, version_of
from .stacked import Stacked, parse_stacked, stacked_json

FORMAT = "slidesparse-packed"
KEYS = {"quant_method", "version", "format", "pattern", "weights", "input_activations", "ignore", "k_slice_unit"}


@dataclass(frozen=True)
class PackedConfig:
    """How the layers of a packed model are stored.

    Attributes:
        pattern, scheme: of every packed layer.
        ignore: the layers that stay dense: exact names, or "re:" and a regular expression that matches from the name's start.
        stacked: module -> dense tensor, of the packed weights with leading dimensions (the experts of a layer).
    """

    pattern: Pattern
    scheme: Scheme
    ignore: tuple[str, ...] = ()
    stacked: Mapping[str, Stacked] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, pattern: Pattern | str | tuple[int, int], scheme: object, ignore: Iterable[str] = ()) -> PackedConfig:
        """From the names of a pattern and a scheme; OperandError if they are none, or `ignore` no list of names."""
        found = Scheme.of(scheme)
        if problem := names_problem("ignore", ignore):
            raise OperandError(problem)
        return cls(found.pattern(pattern), found, tuple(ignore))

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PackedConfig:
        """From the parsed JSON.

        Raises:
            FormatError: a version, format, key or value that this program does not know; update it, or pack again.
        """
        where = "config.json: quantization_config"
        if config.get("quant_method") != "slidesparse" or config.get("format") != FORMAT:
            raise FormatError(f"{where}: format {shown(config.get('format'))} must be {FORMAT!r}; slidesparse pack writes it")
        more = sorted(config.keys() - KEYS - {"stacked"})
        if unknown := more or sorted(KEYS - config.keys()):
            kind = "an unknown key" if more else "missing"
            raise FormatError(f"{where}: {shown(unknown[0])} is {kind}; update slidesparse_nb, or pack the model again")
        pattern, ignore, stacked = config["pattern"], config["ignore"], parse_stacked(config.get("stacked", {}), where)
        described = {"weights": config["weights"], "input_activations": config["input_activations"]}
        scheme = next((row for row in SCHEMES.values() if description(row) == described), None)
        if scheme is None or config["version"] != version_of(scheme, stacked):
            stored = f"version {shown(config['version'])}, " + ", ".join(
                f"{of} {shown(value)}" for of, value in described.items()
            )
            raise FormatError(f"{where}: {stored} are unknown here; update slidesparse_nb")
        if not isinstance(pattern, Mapping) or pattern.keys() - {"unit"} != {"nnz", "group"}:
            raise FormatError(f'{where}: pattern {shown(pattern)} must be like {{"nnz": 6, "group": 8}}')
        if problem := names_problem("ignore", ignore):
            raise FormatError(f"{where}: {problem}")
        try:
            found = scheme.pattern(Pattern(**pattern))
        except OperandError as error:
            raise FormatError(f"{where}: {error}") from None
        if config["k_slice_unit"] != scheme.slice_unit(found):
            unit = shown(config["k_slice_unit"])
            raise FormatError(
                f"{where}: k_slice_unit {unit} must be {scheme.slice_unit(found)} at {found}; pack the model again"
            )
        return cls(found, scheme, tuple(ignore), stacked)

    def written(self) -> dict[str, Any]:
        """The JSON; the inverse of `read`."""
        return {
            "quant_method": "slidesparse",
            "version": version_of(self.scheme, self.stacked),
            "format": FORMAT,
            "pattern": pattern_facts(self.pattern),
            **description(self.scheme),
            "ignore": list(self.ignore),
            "k_slice_unit": self.scheme.slice_unit(self.pattern),
            **({"stacked": stacked_json(self.stacked)} if self.stacked else {}),
        }

    def metadata(self) -> dict[str, str]:
        """`__metadata__` of the safetensors files."""
        return slidesparse_metadata(self.pattern, self.scheme, stacked=self.stacked)

    def without_stacks(self, engine: str) -> PackedConfig:
        """Itself, for an engine that has no kernel for the experts of a layer in one tensor.

        Raises:
            UnsupportedError: some are packed.
        """
        if self.stacked:
            raise UnsupportedError(
                f"{shown(min(self.stacked))}: packed experts in one tensor are not run by {engine} yet; pack the model with its"
                " experts dense (--targets for the other layers, or --ignore with the experts' names)"
            )
        return self

    def tensors(self, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a packed layer whose weight is [n, k]: name -> (NumPy's name of the dtype, shape)."""
        entries = packed_entries("", self.pattern, self.scheme, (n, k))
        return {name.removeprefix("."): (NUMPY_OF[code].name, shape) for name, code, shape in entries}


def names_problem(key: str, names: object) -> str:
    """Why the value of `key` is no list of names, exact or "re:" and a regular expression: one clause; "" if it is one."""
    if isinstance(names, str | Mapping) or not isinstance(names, Iterable) or not all(isinstance(v, str) for v in names):
        return f"{key} {shown(names)} must be a list of names"
    for name in names:
        try:
            re.compile(name[3:] if name.startswith("re:") else "")
        except re.error as error:
            return f"{key} {shown(name)} is not a regular expression ({error})"
    return ""


def description(scheme: Scheme) -> dict[str, Any]:
    """`weights` and `input_activations` of a scheme."""
    return {"weights": storage_facts(scheme.weights), "input_activations": activation_facts(scheme)}


def storage_facts(storage: Storage) -> dict[str, Any]:
    """How an operand is stored, as compressed-tensors names it; a block of `group_size` columns is one of the expanded k."""
    element = storage.element
    if not storage.row_scale:
        return {"num_bits": 16, "type": "float", "dtype": element.name}
    facts = {"num_bits": element.bits, "type": "int" if element.numpy.kind == "i" else "float"}
    if (block := storage.block) is None:
        return {**facts, "strategy": "channel", "symmetric": True, "dynamic": False}
    block_facts = {"group_size": block.columns, "scale_dtype": block.scale.name}
    return {**facts, "strategy": "tensor_group", **block_facts, "symmetric": True, "dynamic": False}


def activation_facts(scheme: Scheme) -> dict[str, Any] | None:
    """How activations are stored, as compressed-tensors names it; None where they are not quantized."""
    if not scheme.scaled:
        return None
    facts = storage_facts(scheme.activations)
    return {**facts, **({} if scheme.lift_first else {"strategy": "token"}), "dynamic": True}
