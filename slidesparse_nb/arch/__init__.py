"""What each GPU architecture wants, as data and NumPy; nothing here touches a GPU."""

from __future__ import annotations

from types import ModuleType

from .. import env
from ..errors import UnsupportedError
from . import sm80, sm90


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
