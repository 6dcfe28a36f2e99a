"""`quantization_config` of a packed model's config.json, as engines read it (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.dtypes import NUMPY_OF
from ..core.pattern import Pattern
from ..core.scheme import SCHEMES, Scheme
from ..errors import FormatError, OperandError, shown
from .packed_format import VERSION, packed_entries, slidesparse_metadata

FORMAT = "slidesparse-packed"
KEYS = {"quant_method", "version", "format", "pattern", "weights", "input_activations", "ignore", "k_slice_unit"}


@dataclass(frozen=True)
class PackedConfig:
    """How the layers of a packed model are stored.

    Attributes:
        pattern, scheme: of every packed layer.
        ignore: the layers that stay dense: exact names, or "re:" and a regular expression that matches from the name's start.
    """

    pattern: Pattern
    scheme: Scheme
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, pattern: Pattern | str | tuple[int, int], scheme: object, ignore: tuple[str, ...] = ()) -> PackedConfig:
        """From the names of a pattern and a scheme; OperandError if they are none."""
        found = Scheme.of(scheme)
        return cls(found.pattern(pattern), found, ignore)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PackedConfig:
        """From the parsed JSON.

        Raises:
            FormatError: a version, format, key or value that this program does not know; update it, or pack again.
        """
        where = "config.json: quantization_config"
        if config.get("quant_method") != "slidesparse" or config.get("format") != FORMAT:
            raise FormatError(f"{where}: format {shown(config.get('format'))} must be {FORMAT!r}; slidesparse pack writes it")
        if config.get("version") != VERSION:
            raise FormatError(f"{where}: version {shown(config.get('version'))} is unknown; update slidesparse_nb")
        if unknown := sorted(config.keys() - KEYS) or sorted(KEYS - config.keys()):
            kind = "an unknown key" if config.keys() - KEYS else "missing"
            raise FormatError(f"{where}: {shown(unknown[0])} is {kind}; update slidesparse_nb, or pack the model again")
        pattern, ignore = config["pattern"], config["ignore"]
        described = {"weights": config["weights"], "input_activations": config["input_activations"]}
        scheme = next((row for row in SCHEMES.values() if not row.blocks and description(row) == described), None)
        if scheme is None:
            raise FormatError(f"{where}: weights {shown(config['weights'])} are of no scheme known here; update slidesparse_nb")
        if not isinstance(pattern, Mapping) or pattern.keys() != {"nnz", "group"}:
            raise FormatError(f'{where}: pattern {shown(pattern)} must be like {{"nnz": 6, "group": 8}}')
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise FormatError(f"{where}: ignore {shown(ignore)} must be a list of names")
        try:
            found = scheme.pattern(Pattern(**pattern))
        except OperandError as error:
            raise FormatError(f"{where}: {error}") from None
        if config["k_slice_unit"] != scheme.slice_unit(found):
            unit = shown(config["k_slice_unit"])
            raise FormatError(
                f"{where}: k_slice_unit {unit} must be {scheme.slice_unit(found)} at {found}; pack the model again"
            )
        return cls(found, scheme, tuple(ignore))

    def written(self) -> dict[str, Any]:
        """The JSON; the inverse of `read`."""
        return {
            "quant_method": "slidesparse",
            "version": VERSION,
            "format": FORMAT,
            "pattern": {"nnz": self.pattern.nnz, "group": self.pattern.group},
            **description(self.scheme),
            "ignore": list(self.ignore),
            "k_slice_unit": self.scheme.slice_unit(self.pattern),
        }

    def metadata(self) -> dict[str, str]:
        """`__metadata__` of the safetensors files."""
        return slidesparse_metadata(self.pattern, self.scheme.dtype)

    def tensors(self, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a packed layer whose weight is [n, k]: name -> (NumPy's name of the dtype, shape)."""
        entries = packed_entries("", self.pattern, self.scheme.dtype, (n, k))
        return {name.removeprefix("."): (NUMPY_OF[code].name, shape) for name, code, shape in entries}


def description(scheme: Scheme) -> dict[str, Any]:
    """`weights` and `input_activations` of a scheme without blocks, as compressed-tensors writes them."""
    dtype = scheme.dtype
    if not scheme.scaled:
        return {"weights": {"num_bits": 16, "type": "float", "dtype": dtype.name}, "input_activations": None}
    kind = "float" if dtype.inf_bits is not None else "int"
    both = {"num_bits": dtype.bits, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    return {"weights": both, "input_activations": {**both, "strategy": "token", "dynamic": True}}
