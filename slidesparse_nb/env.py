"""Every environment variable that this library reads, here and nowhere else.

SLIDESPARSE_CACHE_DIR   compiled kernels and tuned products; by default slidesparse_nb in the user's cache folder
SLIDESPARSE_DEBUG       if set, and not 0, every first launch prints problem, configuration, source and launch
SLIDESPARSE_PORTABLE    if set, and not 0, the kernels that run everywhere are used where faster ones exist, to compare them
SLIDESPARSE_TUNED       if 0, what `slidesparse tune` found is left aside, to compare
CUDA_PATH, CUDA_HOME    where the CUDA toolkit is, if its compiler is not found elsewhere
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder of compiled kernels and tuned products; it need not exist yet."""
    if chosen := os.environ.get("SLIDESPARSE_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slidesparse_nb"


def debug() -> bool:
    """Whether launches explain themselves on standard error."""
    return os.environ.get("SLIDESPARSE_DEBUG", "0") not in ("", "0")


def portable() -> bool:
    """Whether kernels made for one architecture are left aside."""
    return os.environ.get("SLIDESPARSE_PORTABLE", "0") not in ("", "0")


def tuned() -> bool:
    """Whether what `slidesparse tune` found is looked up."""
    return os.environ.get("SLIDESPARSE_TUNED", "1") != "0"


def toolkits() -> list[str]:
    """Folders of CUDA toolkits that the user named."""
    return [root for name in ("CUDA_PATH", "CUDA_HOME") if (root := os.environ.get(name))]
