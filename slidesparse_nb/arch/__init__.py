"""What each GPU architecture wants, as data and NumPy; nothing here touches a GPU."""

from __future__ import annotations

from types import ModuleType

from .. import env
from ..dtypes import DType
from ..errors import UnsupportedError
from ..pattern import Pattern
from . import sm80, sm90

Config = sm80.Config | sm90.Config


def for_capability(capability: tuple[int, int]) -> ModuleType:
    """The module that serves a compute capability, such as (9, 0): sm90 for Hopper, sm80 for everything else since Ampere.

    Raises:
        UnsupportedError: the device has no sparse tensor cores.
    """
    if capability < (8, 0):
        raise UnsupportedError(
            f"device: compute capability {capability[0]}.{capability[1]} has no sparse tensor cores; 8.0 (A100) or later is"
            " needed, or NumPy arrays, which are multiplied on the CPU"
        )
    return sm90 if capability == (9, 0) and not env.portable() else sm80


def as_multiplied(family: ModuleType, pattern: Pattern, k: int) -> tuple[Pattern, int]:
    """Pattern and k as a family's kernel sees them: of the slid weight, if it has no lift for groups so wide."""
    if family is sm80 and pattern.group > sm80.LARGEST_GROUP:
        return Pattern(2, 4), pattern.slid_k(k)
    return pattern, k


def choose(
    family: ModuleType, m: int, n: int, k: int, pattern: Pattern, dtype: DType, out: str, capability: tuple[int, int], sms: int
) -> tuple[Config, ...]:
    """The launches of a family's kernel for y [m, n] = x [m, k] @ w.T; pattern and k `as_multiplied`."""
    shape = (m, n, k, pattern, dtype, out, capability, sms)
    return sm90.choose(*shape) if family is sm90 else (sm80.choose(*shape),)
