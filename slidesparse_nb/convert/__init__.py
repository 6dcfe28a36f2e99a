"""Whole checkpoints: dense -> packed and packed -> dense, each proved equal to its source before it appears.

source        what a source says of itself, wherever it says it: understood or refused
quantization  which configs of quantized weights are understood
kinds         what a matrix is, by its name, its shape and the vocabularies
selection     which tensors are linear layers to pack, and why the others are not
config        what an output says of itself
layout        what the output will look like, before a byte of it is written
streaming     writes a layout piece by piece, killable and resumable
to_packed, to_dense   what the pieces are made of
proof         that what was written is what was meant
inspection    what a checkpoint holds
"""

from .inspect import Facts, ModuleFacts, Verification, inspect_checkpoint, verify_checkpoint
from .options import Options, Report, Run
from .to_dense import unpack_checkpoint
from .to_packed import pack_checkpoint

__all__ = [
    "Facts",
    "ModuleFacts",
    "Options",
    "Report",
    "Run",
    "Verification",
    "inspect_checkpoint",
    "pack_checkpoint",
    "unpack_checkpoint",
    "verify_checkpoint",
]
