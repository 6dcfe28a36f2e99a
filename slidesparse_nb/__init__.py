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

`slidesparse_nb.integrations` has modules for torch, transformers and vLLM. Importing this package imports NumPy and nothing
else; everything is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Pattern": "core.pattern",
    "Scheme": "core.scheme",
    "PackedWeight": "core.packed",
    "QuantizedActivations": "core.activations",
    "pack": "packing",
    "unpack": "packing",
    "verify": "packing",
    "matmul": "ops",
    "quantize": "ops",
    "rms_norm": "ops",
    "silu_and_mul": "ops",
    "gelu_and_mul": "ops",
    "to_device": "ops",
    "device_weight": "ops",
    "operand_bytes": "ops",
    "workspace_bytes": "ops",
    "build_kernels": "cuda.ahead_of_time",
    "build_products": "cuda.ahead_of_time",
    "tune_products": "tuning.search",
    "forget_tuned": "tuning.search",
    "diagnose": "doctor",
    "self_tests": "doctor",
    "load": "checkpoint",
    "save": "checkpoint",
    "pack_checkpoint": "convert",
    "unpack_checkpoint": "convert",
    "verify_checkpoint": "convert",
    "inspect_checkpoint": "convert",
    "prune_checkpoint": "pruning.run",
    "collect_statistics": "pruning.run",
    "PackedConfig": "checkpoint.packed_config",
    "Options": "convert",
    "PruneOptions": "pruning.options",
    "PruneReport": "pruning.options",
    "Run": "convert",
    "Report": "convert",
    "Facts": "convert",
    "Verification": "convert",
    "SlideSparseError": "errors",
    "OperandError": "errors",
    "PatternError": "errors",
    "FormatError": "errors",
    "VerificationError": "errors",
    "UnsupportedError": "errors",
}
"""Public name -> the module that holds it."""

PUBLIC = (*_HOME, "reference")
"""Every public name."""

_BRIEF = "device_weight", "operand_bytes", "self_tests", "rms_norm", "silu_and_mul", "gelu_and_mul"
__all__ = [name for name in _HOME if name.islower() and name not in _BRIEF]  # what help() prints

if TYPE_CHECKING:
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .checkpoint.packed_config import PackedConfig as PackedConfig
    from .convert import Facts as Facts
    from .convert import Options as Options
    from .convert import Report as Report
    from .convert import Run as Run
    from .convert import Verification as Verification
    from .convert import inspect_checkpoint as inspect_checkpoint
    from .convert import pack_checkpoint as pack_checkpoint
    from .convert import unpack_checkpoint as unpack_checkpoint
    from .convert import verify_checkpoint as verify_checkpoint
    from .core import reference as reference
    from .core.activations import QuantizedActivations as QuantizedActivations
    from .core.packed import PackedWeight as PackedWeight
    from .core.pattern import Pattern as Pattern
    from .core.scheme import Scheme as Scheme
    from .cuda.ahead_of_time import build_kernels as build_kernels
    from .cuda.ahead_of_time import build_products as build_products
    from .doctor import diagnose as diagnose
    from .doctor import self_tests as self_tests
    from .errors import FormatError as FormatError
    from .errors import OperandError as OperandError
    from .errors import PatternError as PatternError
    from .errors import SlideSparseError as SlideSparseError
    from .errors import UnsupportedError as UnsupportedError
    from .errors import VerificationError as VerificationError
    from .ops import device_weight as device_weight
    from .ops import gelu_and_mul as gelu_and_mul
    from .ops import matmul as matmul
    from .ops import operand_bytes as operand_bytes
    from .ops import quantize as quantize
    from .ops import rms_norm as rms_norm
    from .ops import silu_and_mul as silu_and_mul
    from .ops import to_device as to_device
    from .ops import workspace_bytes as workspace_bytes
    from .packing import pack as pack
    from .packing import unpack as unpack
    from .packing import verify as verify
    from .pruning.options import PruneOptions as PruneOptions
    from .pruning.options import PruneReport as PruneReport
    from .pruning.run import collect_statistics as collect_statistics
    from .pruning.run import prune_checkpoint as prune_checkpoint
    from .tuning.search import forget_tuned as forget_tuned
    from .tuning.search import tune_products as tune_products


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
