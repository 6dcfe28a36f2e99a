"""What tests demand of compilers: everything of those that .ci/lock.txt names; of others what no version changes."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

LOCK = Path(__file__).parents[1] / ".ci" / "lock.txt"

FEW_BYTES = 64
"""Spills allowed to other compilers: 16 of the 255 registers of a thread. NVRTC 13.0 spills 8 bytes of two tiles, 13.2 none."""


def locked(*packages: str) -> bool:
    """Whether these are installed in the versions that .ci/lock.txt names."""
    return all(f"{name}=={version(name)}" in re.findall(r"^\S+==\S+", LOCK.read_text(), re.MULTILINE) for name in packages)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def most_spilled(*packages: str) -> int:
    """Bytes that kernels may spill, compiled by these packages."""
    return 0 if locked(*packages) else FEW_BYTES
