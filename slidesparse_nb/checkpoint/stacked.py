"""The dense tensors of weights with leading dimensions: their names, the order of their axes, and what files say of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from numpy.typing import NDArray

from ..core.dtypes import BFLOAT16, CODE_OF, FLOATS, NUMPY_OF
from ..core.scheme import Scheme
from ..errors import FormatError, shown

AXES = ("... n k", "... k n", "(... n) k", "(... k) n")
"""How a dense tensor may hold the matrices [n, k] of a stack: as they are or transposed, and with the experts' rows joined."""


MOST_DIMENSIONS = 8
"""Of a packed weight in a file."""


def stack_problem(shape: tuple[int, ...]) -> str:
    """What forbids a file to hold a stack of this shape: one clause, or ""."""
    if len(shape) > MOST_DIMENSIONS:
        return f"shape {shape} must have at most {MOST_DIMENSIONS} dimensions"
    return f"shape {shape} of a stack must not have a dimension of 0" if 0 in shape else ""


@dataclass(frozen=True)
class Stacked:
    """The dense tensor that a weight [*lead, n, k] is packed from and unpacked to.

    Attributes:
        tensor: its name.
        axes: one of AXES.
        dtype: NumPy's name of its type, a float type.
    """

    tensor: str
    axes: str
    dtype: str

    @classmethod
    def plain(cls, module: str, scheme: Scheme) -> Stacked:
        """Of a weight that no checkpoint was packed from: X.weight, [*lead, n, k]; bfloat16 if its values are quantized."""
        return cls(f"{module}.weight", AXES[0], (BFLOAT16 if scheme.scaled else scheme.dtype).name)

    @property
    def transposed(self) -> bool:
        return self.axes.endswith("n")

    @property
    def code(self) -> str:
        """Safetensors code of the dense tensor."""
        return _CODES[self.dtype]

    def dense_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The dense tensor's shape, of a weight of `shape` (*lead, n, k)."""
        *lead, n, k = shape
        rows, columns = (k, n) if self.transposed else (n, k)
        return (prod(lead) * rows, columns) if "(" in self.axes else (*lead, rows, columns)

    def matrices(self, dense: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """A contiguous dense tensor as its matrices [prod(lead), n, k], a view; `shape` is (*lead, n, k)."""
        *lead, n, k = shape
        if self.transposed:
            return dense.reshape(prod(lead), k, n).transpose(0, 2, 1)
        return dense.reshape(prod(lead), n, k)


_CODES = {name: CODE_OF[dtype] for dtype, name in FLOATS.items()}
"""Names of the types that a dense tensor of experts may have -> safetensors codes."""


def float_name(code: str) -> str:
    """NumPy's name of a float type, from its safetensors code."""
    return FLOATS[NUMPY_OF[code]]


def stacked_json(stacked: Mapping[str, Stacked]) -> dict[str, dict[str, str]]:
    """What a file says of the weights with leading dimensions, by module."""
    return {module: asdict(entry) for module, entry in stacked.items()}


def parse_stacked(value: Any, where: str) -> dict[str, Stacked]:
    """Inverse of `stacked_json`.

    Raises:
        FormatError: it is anything else.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{where}: stacked {shown(value)} must be an object")
    for module, entry in value.items():
        well = isinstance(entry, dict) and entry.keys() == {"tensor", "axes", "dtype"}
        well = well and all(isinstance(text, str) for text in entry.values())
        if not well or entry["axes"] not in AXES or entry["dtype"] not in _CODES:
            raise FormatError(
                f"{where}: stacked {shown(module)}: {shown(entry)} must have the keys tensor (a name), axes (one of"
                f" {', '.join(map(repr, AXES))}) and dtype (one of {', '.join(_CODES)})"
            )
    return {module: Stacked(**entry) for module, entry in value.items()}
