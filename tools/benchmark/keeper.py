"""The file of a run in progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from .results import Results

SHARE = 0.05
"""Of a run's time, what writing its file may take."""


@dataclass
class Keeper:
    """Writes a run's file as results come; what cannot be written is noted, and the run goes on.

    Attributes:
        failed: why the file is not the results' last state, if it is not.
    """

    results: Results
    path: Path | None
    tell: Callable[[str], None]
    failed: OSError | None = None
    _saved: float = -math.inf
    _took: float = 0.0

    def begin(self) -> None:
        """Write results that are still empty, which proves the path."""
        if self.path is not None:
            try:
                self.results.save(self.path)
            except OSError as error:
                raise click.UsageError(f"--json: {self.path} cannot be written ({error.strerror})") from None

    def save(self, at_once: bool = False) -> None:
        """Write the file; unless `at_once`, only if the time for it, which grows with the results, is earned."""
        began = time.perf_counter()
        if self.path is None or not (at_once or began - self._saved >= max(0.2, self._took / SHARE)):
            return
        try:
            self.results.save(self.path)
            self.failed = None
        except (OSError, ValueError) as error:  # ValueError: JSON has no NaN
            reason = getattr(error, "strerror", None) or error
            self.failed = OSError(f"--json: {self.path} could not be written ({reason})")
            note = f"the file of the results could not be written for a while or to the end ({reason})"
            if note not in self.results.notes:
                self.results.note(note)
                self.tell(note)
        self._saved = time.perf_counter()
        self._took = self._saved - began
