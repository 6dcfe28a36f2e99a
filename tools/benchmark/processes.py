"""The loop over engines: a process for each task, since one holds no two engines, and what one loses costs no other."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

import slidesparse_nb as ss

from . import gpu
from .cases import OURS, Selection
from .engines import ENGINES, LOADS, Load, Task, tasks
from .measure import Keeper, Tell, terminated_by_exception
from .results import UNMEASURED, Cell, Results

COMMAND = (sys.executable, "-m", f"{__package__}.serve")
"""What measures a task; it is told the task, the folder of the model, and the file to which it writes findings, a line each."""


FAIR_S = 240.0
"""Seconds that a process may take, whatever the budget leaves to the others."""


def measure_engines(results: Results, selection: Selection, json_path: Path | None, tell: Tell) -> None:
    """Fill `results` and, as they come, their file; errors are those of `measure`, and UnsupportedError without the engine."""
    began = time.perf_counter()
    for name in selection.engines:
        if importlib.util.find_spec(name) is None:
            raise ss.UnsupportedError(f"--engine: {name} is not installed; pip install 'slidesparse_nb[{name}]'")
    results.machine.update(gpu.Gpu().facts())
    keeper = Keeper(results, json_path, tell)
    seen = {task: {load: Seen() for load in LOADS} for task in tasks(selection)}
    spent = f"{UNMEASURED}: the budget of {selection.budget:.0f} s was spent"
    with terminated_by_exception(), tempfile.TemporaryDirectory(prefix="slidesparse-bench-") as folder:
        try:
            coming = list(itertools.product(range(selection.rounds), seen))
            for number, (i, task) in enumerate(coming):
                left = selection.budget - (time.perf_counter() - began)
                left = min(left, max(FAIR_S, left / (len(coming) - number)))  # one that hangs costs no other its turn
                blank = "" if task.provider == OURS else ENGINES[task.engine].own[task.type]
                if not blank and left > 0:
                    blank = _run(task, Path(folder), left, seen[task], results)
                cells = [found.cell(task, load, blank or spent) for load, found in seen[task].items()]
                for cell in cells:
                    results.add(cell)
                results.seconds = round(time.perf_counter() - began, 1)
                tell(f"[{results.seconds:5.1f} s] {task}{f', round {i + 1}' * (selection.rounds > 1)}: {_outcome(cells)}")
                keeper.save()
            results.complete = time.perf_counter() - began < selection.budget
        finally:
            results.seconds = round(time.perf_counter() - began, 1)
            keeper.end()


@dataclass
class Seen:
    """What was found of a task and a load, in all rounds; blank: why nothing more."""

    ms: list[float] = field(default_factory=list)
    gpu_ms: list[float] = field(default_factory=list)
    bytes: int | None = None
    blank: str = ""

    def cell(self, task: Task, load: Load, blank: str) -> Cell:
        """The medians; if there are none the reason, `blank` where the process did not come to tell it."""
        at = (task.provider, load.phase, task.model, str(load), task.type, task.pattern, load.m, task.engine)
        if not self.ms:
            return Cell(*at, blank=self.blank or blank)
        ms, (low, high) = median(self.ms), np.percentile(self.ms, [10, 90])
        busy = round(median(self.gpu_ms) * 1e3, 1) if self.gpu_ms else None
        return Cell(*at, max(0.1, round(ms * 1e3, 1)), round((high - low) / ms, 4), gpu_us=busy, bytes=self.bytes)


def _run(task: Task, folder: Path, left: float, seen: Mapping[Load, Seen], results: Results) -> str:
    """Run a task's process for `left` seconds at most, and take what it found; why it found no more, "" if time ended."""
    found, log, ended = folder / "found", folder / "log", True
    found.write_text("")
    command = [*COMMAND, json.dumps(task), str(folder / "".join(c if c.isalnum() else "-" for c in str(task))), str(found)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            ended = False
        finally:  # and what it started
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    reason, size = f"its process ended with {process.returncode}: {last[-200:]}" if ended else "", None
    for line in found.read_text().rpartition("\n")[0].splitlines():  # the last may be half a line
        facts = json.loads(line)
        results.machine.update(facts.get("machine", {}))
        reason, size = facts.get("failed", reason), facts.get("bytes", size)
        if "load" in facts:
            here = seen[Load(*facts["load"])]
            here.ms += facts.get("ms", ())
            here.gpu_ms += facts.get("gpu_ms", ())
            here.blank, here.bytes = facts.get("blank", here.blank), size
            if here.ms and here.blank:
                results.note(f"{task}, {Load(*facts['load'])}: {here.blank}")
    return reason


def _outcome(cells: list[Cell]) -> str:
    """Milliseconds of each load, or the first reason why there are none."""
    return ", ".join(f"{cell.part} {cell.layer} {cell.us / 1e3:.2f} ms" for cell in cells if cell.us) or str(cells[0].blank)
