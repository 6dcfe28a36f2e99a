"""Whole checkpoints: dense -> packed and packed -> dense, each proved equal to its source before it appears.

sources, quantization   what a source says of itself, wherever it says it: understood or refused
kinds                   what a matrix is, by its name, its shape and the vocabularies
experts                 how model types store the experts of a layer in one tensor
select, module          which tensors are linear layers to pack, and why the others are not
config_json             what an output says of itself
layout                  what the output will look like, before a byte of it is written
staging, write, run     the output as it grows, killable and resumable; its pieces; the order of steps that both ways share
to_packed, rows         dense -> packed: the whole, and the rows that it is made of
to_dense                packed -> dense
proof                   that what was written is what was meant
inspect                 what a checkpoint holds
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
