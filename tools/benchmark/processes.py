"""The loop over engines: a process for each task, since one holds no two engines, and what one loses costs no other."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import slidesparse_nb as ss

from . import gpu
from .cases import OURS
from .engines import ENGINES, LOADS, Load, Serving, Task
from .measure import Keeper, Tell, terminated_by_exception
from .results import UNMEASURED, Results, Served

COMMAND = (sys.executable, "-m", f"{__package__}.serve")
"""What measures a task; it is told the task, the folder of the model, and the file to which it writes findings, a line each."""


def measure_engines(results: Results, serving: Serving, json_path: Path | None, tell: Tell) -> None:
    """Fill `results` and, as they come, their file; errors are those of `measure`, and UnsupportedError without the engine."""
    began = time.perf_counter()
    for name in serving.engines:
        if importlib.util.find_spec(name) is None:
            raise ss.UnsupportedError(f"--engine: {name} is not installed; pip install 'slidesparse_nb[{name}]'")
    results.machine.update(gpu.Gpu().facts())
    keeper = Keeper(results, json_path, tell)
    tasks = [(i, task) for i in range(serving.rounds) for task in serving.tasks()]
    seen: defaultdict[tuple[Any, ...], Seen] = defaultdict(Seen)
    with terminated_by_exception(), tempfile.TemporaryDirectory(prefix="slidesparse-bench-") as folder:
        try:
            for i, task in tasks:
                left = serving.budget - (time.perf_counter() - began)
                spent = f"{UNMEASURED}: the budget of {serving.budget:.0f} s was spent"
                blank = ENGINES[task.engine].own.get(task.type, "") if task.provider != OURS else ""
                if not blank and left > 0:
                    blank = _run(task, Path(folder), left, spent, seen, results)
                cells = [seen[task, load].cell(task, load, blank or spent) for load in LOADS]
                for cell in cells:
                    results.add(cell)
                results.seconds = round(time.perf_counter() - began, 1)
                tell(f"[{results.seconds:5.1f} s] {task}{f', round {i + 1}' * (serving.rounds > 1)}: {_outcome(cells)}")
                keeper.save()
            results.complete = time.perf_counter() - began < serving.budget
        finally:
            results.seconds = round(time.perf_counter() - began, 1)
            keeper.end()


class Seen:
    """What was found of a task and a load, in all rounds."""

    def __init__(self) -> None:
        self.ms, self.gpu_ms, self.bytes, self.blank = list[float](), list[float](), 0, ""

    def cell(self, task: Task, load: Load, blank: str) -> Served:
        """The medians; the reason in their place if there is none, `blank` if the process did not come to tell it."""
        if not self.ms:
            return Served(*task, *load, blank=self.blank or blank)
        ms, (low, high) = median(self.ms), np.percentile(self.ms, [10, 90])
        busy = round(median(self.gpu_ms), 4) if self.gpu_ms else None
        return Served(*task, *load, round(ms, 4), busy, round((high - low) / ms, 4), self.bytes or None)


def _run(task: Task, folder: Path, left: float, spent: str, seen: dict[tuple[Any, ...], Seen], results: Results) -> str:
    """Run a task's process for `left` seconds at most, and take what it found; why it found no more."""
    model, found, log = folder / str(task).replace(" ", "-").replace(":", "of"), folder / "found", folder / "log"
    command = [*COMMAND, json.dumps(task), str(model), str(found)]
    reason = ""
    found.write_text("")
    with log.open("wb") as out:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            reason = spent
        finally:  # and what it started
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = found.read_text().rpartition("\n")[0].splitlines()  # the last may be half a line
    held = 0
    for line in map(json.loads, lines):
        results.machine.update(line.get("machine", {}))
        held, reason = line.get("bytes", held), line.get("failed", reason)
        if "load" in line:
            here = seen[task, Load(*line["load"])]
            here.ms += line.get("ms", ())
            here.gpu_ms += line.get("gpu_ms", ())
            here.bytes, here.blank = held, line.get("blank", here.blank)
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    return reason or f"its process ended with {process.returncode}: {last[-200:]}"


def _outcome(cells: list[Served]) -> str:
    """Milliseconds of each load, or the first reason why there are none."""
    texts = [f"{cell.phase} {Load(cell.phase, cell.batch, cell.prompt).size}: {cell.ms:.2f} ms" for cell in cells if cell.ms]
    return ", ".join(texts) or next(cell.blank for cell in cells if cell.blank) or ""
