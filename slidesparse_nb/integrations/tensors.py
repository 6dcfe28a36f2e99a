"""PyTorch's tensors as arrays of NumPy and CuPy, and packed weights in tensors: on a GPU arranged, in PyTorch's memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import slidesparse_nb as ss

from .. import env

MISSING = ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu")
"""Types that NumPy and CuPy lack; NumPy has them by ml_dtypes."""

NUMPY = {getattr(torch, name): name for name in ("float32", "float16", "int8", "uint8", "int64", *MISSING)}
"""PyTorch dtype -> NumPy's or ml_dtypes' name of it."""

TORCH = {name: dtype for dtype, name in NUMPY.items()}

PACKED = ("weight_packed", "weight_meta", "weight_scale", "weight_block_scale", "weight_shape")


# ---- tensors of one library as arrays of another ---------------------------------------------------------------------


def as_numpy(tensor: Tensor) -> Any:
    """A CPU tensor as a NumPy array of the same memory, bfloat16 and float8 as ml_dtypes has them."""
    name = NUMPY[tensor.dtype]
    if name in MISSING:
        bits = torch.int16 if name == "bfloat16" else torch.uint8
        return tensor.detach().view(bits).numpy().view(np.dtype(numpy_type(name)))
    return tensor.detach().numpy()


def from_numpy(array: Any) -> Tensor:
    """The inverse of `as_numpy`."""
    name = array.dtype.name
    if name in MISSING:
        return torch.from_numpy(array.view(f"i{array.itemsize}")).view(TORCH[name])
    return torch.from_numpy(array)


def numpy_type(name: str) -> Any:
    """A type that NumPy lacks, of that name."""
    import ml_dtypes

    return getattr(ml_dtypes, name)


def as_cupy(tensor: Tensor) -> Any:
    """A contiguous CUDA tensor as a CuPy array of the same memory, as bits where CuPy lacks the type. It owns nothing."""
    import cupy

    name = NUMPY[tensor.dtype]
    dtype = np.dtype(numpy_type(name) if name == "bfloat16" else "uint8" if name in MISSING else name)
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), max(1, tensor.nbytes), None, tensor.get_device())
    return cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0))


# ---- weights by their operands ---------------------------------------------------------------------------------------

ALIGNED = 256
"""Bytes that the buffers of an arranged weight are aligned to, in the one tensor that holds them, and bytes of its head."""

WEIGHTS: dict[tuple[int, int, int, str], Any] = {}
"""Address, n, k and facts of an arranged weight -> DeviceWeight. An entry lives as long as the weight's memory."""


def device_weight(weight: Sequence[Tensor], n: int, k: int, facts: str) -> Any:
    """The DeviceWeight in this tensor, made where it is not known: after a copy, or in another process."""
    pattern, scheme = facts.rsplit(" ", 1)
    head = bytes(weight[0][:ALIGNED].cpu().numpy()).rstrip() if len(weight) == 1 else b""
    if not head.startswith(f"{facts} {n} {k} ".encode()):
        raise ss.OperandError(f"weight: is not arranged for a GPU as {facts} [{n}, {k}]; call settle() of its layer")
    buffers, at = {}, ALIGNED
    for name, size in (part.split(":") for part in head.decode().split(" ")[-1].split(",")):
        buffers[name] = as_cupy(weight[0][at : at + int(size)])
        at += -(-int(size) // ALIGNED) * ALIGNED
    key = weight[0].data_ptr(), n, k, facts
    made = WEIGHTS[key] = ss.device_weight(buffers, pattern, scheme, (n, k), weight[0].get_device())
    weakref.finalize(weight[0].untyped_storage(), _forget, key, made)
    return made


def _forget(key: tuple[int, int, int, str], made: Any) -> None:
    if WEIGHTS.get(key) is made:
        del WEIGHTS[key]


def packed_of(weight: Sequence[Tensor], n: int, k: int, facts: str) -> ss.PackedWeight:
    """The PackedWeight of operands on the CPU."""
    pattern, scheme = facts.rsplit(" ", 1)
    if len(weight) == 1:
        raise ss.OperandError("weight: is arranged for a GPU, but on the CPU; call settle() of its layer")
    names = ss.PackedConfig.of(pattern, scheme).tensors(n, k)
    tensors = dict(zip(names, (*map(as_numpy, weight), np.array([n, k])), strict=True))
    return ss.PackedWeight.from_tensors(tensors, pattern, scheme)


def arrange(packed: ss.PackedWeight, device: torch.device) -> Tensor:
    """A packed weight arranged for a GPU in PyTorch's memory: a uint8 tensor of a head and all buffers.

    The head tells what the tensor holds, so that no compiled graph has to: "6:8 int8 4096 4096 values:12582912,compact:...".
    """
    import cupy

    with torch.cuda.device(device):
        torch.cuda.synchronize(device)  # CuPy's stream is not PyTorch's, which may still write what is read or reused here
        there = ss.to_device(packed, device.index, least_memory=not env.both_forms())
        sizes = {name: own.nbytes for name, own in there.buffers.items()}
        parts = ",".join(f"{name}:{size}" for name, size in sizes.items())
        head = f"{facts_of(packed)} {packed.n} {packed.k} {parts}".encode().ljust(ALIGNED)
        at, end = ALIGNED, ALIGNED + sum(-(-size // ALIGNED) * ALIGNED for size in sizes.values())
        weight = torch.empty(end, dtype=torch.uint8, device=device)
        weight[:ALIGNED] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        torch.cuda.synchronize(device)
        for name, size in sizes.items():
            as_cupy(weight[at : at + size])[...] = there.buffers[name].reshape(-1).view(np.uint8)
            at += -(-size // ALIGNED) * ALIGNED
        torch.cuda.synchronize(device)
        del there
        cupy.get_default_memory_pool().free_all_blocks()  # an engine counts what is left
    return weight


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Errors inside name the layer."""
    try:
        yield
    except ss.SlideSparseError as error:
        raise type(error)(f"{name}: {error}") from error


def facts_of(packed: Any) -> str:
    """The operators' `facts` of a packed weight, or of whatever has a pattern and a scheme."""
    return f"{packed.pattern} {packed.scheme}"
