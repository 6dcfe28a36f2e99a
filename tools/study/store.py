"""What was measured: one JSON file, written after every figure, to which several processes may add."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import slidesparse_nb as ss

from ..documents import write_whole


class Store:
    """Sections of named figures: {"setup": {...}, "points": {name: {...}}, ...}.

    Args:
        path: the file; it need not exist.
        budget: seconds after which `room` says no.
    """

    def __init__(self, path: Path, budget: float = float("inf")) -> None:
        self.path, self.start, self.budget = path, time.monotonic(), budget

    def read(self) -> dict[str, Any]:
        """Everything so far. Raises FormatError if the file is no JSON object."""
        if not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text())
        except ValueError as error:
            raise ss.FormatError(f"{self.path}: is no JSON ({error}); name another file") from error
        if not isinstance(found, dict):
            raise ss.FormatError(f"{self.path}: is no JSON object; name another file")
        return found

    def has(self, section: str, name: str) -> bool:
        return name in self.read().get(section, {})

    def add(self, section: str, name: str, value: Any) -> None:
        """Write one figure; the file is whole at every moment."""
        with self._alone():
            found = self.read()
            found.setdefault(section, {})[name] = value
            write_whole(self.path, json.dumps(found, indent=1) + "\n")

    def set_up(self, facts: dict[str, Any]) -> None:
        """What all figures of the file share. Raises OperandError if figures were made of something else."""
        for key, value in facts.items():
            old = self.read().get("setup", {}).get(key, value)
            if old != value:
                raise ss.OperandError(f"{self.path}: was measured with {key} {old}, not {value}; name another file")
            self.add("setup", key, value)

    def room(self, seconds: float = 0.0) -> bool:
        """Whether `seconds` more fit into the budget."""
        return time.monotonic() - self.start + seconds < self.budget

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
