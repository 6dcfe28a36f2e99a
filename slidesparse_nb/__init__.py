"""slidesparse_nb: (2N-2):2N structured-sparse weights (6:8, 4:6, 8:10 ...) on 2:4 sparse tensor cores.

    import slidesparse_nb as ss
    packed = ss.pack(w, "6:8", "int8", prune="magnitude")   # w [n, k] -> PackedWeight
    y = ss.matmul(x, packed)                                # x [..., k] -> y [..., n]

Functions are below; `help(ss.PackedWeight)` and so on describe the classes:

    PackedWeight, QuantizedActivations           packed weights, and activations quantized once for several of them
    Pattern, Scheme, PackedConfig                which weights stay; how they are stored; both as config.json says them
    Options, Run, Report, Facts, Verification    of the functions on checkpoints
    PruneOptions, PruneReport                    of pruning
    SlideSparseError                             and its kinds: Operand-, Pattern-, Format-, Verification-, UnsupportedError
    reference                                    the whole method in NumPy, to be read
    rms_norm, silu_and_mul, gelu_and_mul         quantize what they make of x, on a GPU in one launch
    device_weight, operand_bytes                 functions for adapters of other libraries
    build_products, collect_statistics           kernels of some products ahead; what pruning must know of a text, in a file
    diagnose, self_tests                         what `slidesparse doctor` calls
    tune_products, forget_tuned                  what `slidesparse tune` calls

`slidesparse_nb.integrations` has modules for torch, transformers and vLLM. Importing this package imports NumPy and nothing
else; everything is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "packing": "pack unpack verify",
    "ops": "matmul quantize rms_norm silu_and_mul gelu_and_mul to_device device_weight operand_bytes workspace_bytes",
    "cuda.ahead_of_time": "build_kernels build_products",
    "tuning.search": "tune_products forget_tuned",
    "doctor": "diagnose self_tests",
    "checkpoint": "load save",
    "convert": "pack_checkpoint unpack_checkpoint verify_checkpoint inspect_checkpoint Options Run Report Facts Verification",
    "pruning.run": "prune_checkpoint collect_statistics",
    "pruning.options": "PruneOptions PruneReport",
    "checkpoint.packed_config": "PackedConfig",
    "core.pattern": "Pattern",
    "core.scheme": "Scheme",
    "core.packed": "PackedWeight",
    "core.activations": "QuantizedActivations",
    "errors": "SlideSparseError OperandError PatternError FormatError VerificationError UnsupportedError",
}
"""Module -> its public names; imported below for type checkers, too."""

_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

PUBLIC = (*_HOME, "reference")
"""Every public name."""

_BRIEF = (
    "rms_norm", "silu_and_mul", "gelu_and_mul", "device_weight", "operand_bytes", "build_products", "collect_statistics",
    "diagnose", "self_tests", "tune_products", "forget_tuned",
)  # fmt: skip
__all__ = [name for name in _HOME if name.islower() and name not in _BRIEF]  # what help() prints

if TYPE_CHECKING:
    from .checkpoint import load, save
    from .checkpoint.packed_config import PackedConfig
    from .convert import (
        Facts,
        Options,
        Report,
        Run,
        Verification,
        inspect_checkpoint,
        pack_checkpoint,
        unpack_checkpoint,
        verify_checkpoint,
    )
    from .core import reference
    from .core.activations import QuantizedActivations
    from .core.packed import PackedWeight
    from .core.pattern import Pattern
    from .core.scheme import Scheme
    from .cuda.ahead_of_time import build_kernels, build_products
    from .doctor import diagnose, self_tests
    from .errors import FormatError, OperandError, PatternError, SlideSparseError, UnsupportedError, VerificationError
    from .ops import (
        device_weight,
        gelu_and_mul,
        matmul,
        operand_bytes,
        quantize,
        rms_norm,
        silu_and_mul,
        to_device,
        workspace_bytes,
    )
    from .packing import pack, unpack, verify
    from .pruning.options import PruneOptions, PruneReport
    from .pruning.run import collect_statistics, prune_checkpoint
    from .tuning.search import forget_tuned, tune_products


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module(f"{__name__}.core.reference")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
