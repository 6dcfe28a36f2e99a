"""Every environment variable that this library reads, here and nowhere else.

SLIDESPARSE_CACHE_DIR   folder of compiled kernels, tuned products and outcomes of self-tests
XDG_CACHE_HOME          without SLIDESPARSE_CACHE_DIR they are in its subfolder slidesparse_nb; by default ~/.cache
SLIDESPARSE_TUNED       0: what `slidesparse tune` found is not used
SLIDESPARSE_PORTABLE    1: the kernel for every GPU is used where one for Hopper or B200 exists, to compare the two
SLIDESPARSE_DEBUG       1: the first launch of every product prints problem, configuration, source and launch on standard error
SLIDESPARSE_BOTH_FORMS  1: weights in PyTorch and engines keep both forms of metadata (docs/hopper.md): more memory, less time
SLIDESPARSE_FUSE        0: vLLM runs norms, activations and the quantization that follows in launches of their own
CUDA_PATH, CUDA_HOME    CUDA toolkit whose compiler is used if no other is found

README has the same table.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder of compiled kernels, tuned products and outcomes of self-tests; it need not exist yet."""
    if chosen := os.environ.get("SLIDESPARSE_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slidesparse_nb"


def _flag(name: str, default: str) -> bool:
    return (os.environ.get(name) or default) != "0"


def debug() -> bool:
    """Whether launches explain themselves on standard error."""
    return _flag("SLIDESPARSE_DEBUG", "0")


def portable() -> bool:
    """Whether kernels made for one architecture are left aside."""
    return _flag("SLIDESPARSE_PORTABLE", "0")


def both_forms() -> bool:
    """Whether adapters arrange weights for speed alone."""
    return _flag("SLIDESPARSE_BOTH_FORMS", "0")


def fuse() -> bool:
    """Whether vLLM's graphs are rewritten (integrations/vllm/fusion.py)."""
    return _flag("SLIDESPARSE_FUSE", "1")


def tuned() -> bool:
    """Whether what `slidesparse tune` found is looked up."""
    return _flag("SLIDESPARSE_TUNED", "1")


def toolkits() -> list[str]:
    """Folders of CUDA toolkits that the user named."""
    return [root for name in ("CUDA_PATH", "CUDA_HOME") if (root := os.environ.get(name))]
