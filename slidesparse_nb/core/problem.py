"""GemmProblem: what is multiplied, into what, on what device. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import env
from .checks import float_dtype, whole_number
from .dtypes import FLOATS, DType
from .pattern import Pattern
from .scheme import Scheme

Asked = tuple[int, int, int, "Pattern | str", "Scheme | DType | str", str]
"""A problem as a user names it: m, n, k, pattern, scheme or dtype of the weights, name of the type of y."""


@dataclass(frozen=True)
class Device:
    """What a choice needs to know of a GPU.

    Attributes:
        capability: its compute capability, such as (9, 0).
        sms: its SMs.
        name: as the driver spells it, under which tuned results are kept; "" where no GPU was asked.
        portable: kernels made for one architecture are left aside; by default what SLIDESPARSE_PORTABLE says.
    """

    capability: tuple[int, int]
    sms: int
    name: str = ""
    portable: bool = field(default_factory=env.portable)


NOWHERE = Device((0, 0), 0, portable=False)
"""Of a problem that no device was named for."""


@dataclass(frozen=True)
class GemmProblem:
    """y [m, n] = x [m, k] @ w.T, with packed weights w [n, k].

    Attributes:
        pattern: of the weights.
        scheme: of the product: that of the weights, or the one that it is multiplied as on GPUs.
        out: name of the type of y.
        groups: such products at once, each with weights of its own.
        unquantized: x is of the type of y, and the kernel quantizes it; else it is an operand (`Arch.quantizes`).
    """

    m: int
    n: int
    k: int
    pattern: Pattern
    scheme: Scheme
    out: str
    device: Device
    groups: int = 1
    unquantized: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", Scheme.of(self.scheme).kernel)

    @property
    def dtype(self) -> DType:
        """Element type of the weights."""
        return self.scheme.dtype

    @classmethod
    def of(cls, asked: Asked, device: Device = NOWHERE) -> GemmProblem:
        """The problem that a user names.

        Raises:
            OperandError: m, n or k is no number from 1 on; a pattern that is none, or a type that is none of weights, or of y.
        """
        *sizes, pattern, dtype, out = asked
        m, n, k = (whole_number(name, size, 1) for name, size in zip("mnk", sizes, strict=True))
        scheme = Scheme.of(dtype)
        return cls(m, n, k, scheme.pattern(pattern), scheme, FLOATS[float_dtype("out", out)], device)

    def __str__(self) -> str:
        times = f"{self.groups} x " if self.groups > 1 else ""
        x = f"{'unquantized ' * self.unquantized}x[{self.m}, {self.k}]"
        product = f"y[{self.m}, {self.n}] = {x} @ w.T"
        return f"{times}{product}, {self.pattern.described} {self.scheme} -> {self.out}"
