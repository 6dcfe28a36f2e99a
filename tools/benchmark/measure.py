"""The loop that checks, times and records each case, within a budget."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import click
import numpy as np

import slidesparse_nb as ss
from slidesparse_nb.tuning.clock import poison

from . import gpu, peers
from .cases import ALL, OURS, Case, Provider, Selection, copies, plan, told
from .ours import Ours
from .results import UNMEASURED, Cell, Results

COPIED = 1 << 30
"""Bytes of the copy whose bandwidth is the floor's."""

SAVE_S = 2.0
"""Seconds between two writings of a run's file, at least."""

Tell = Callable[[str], None]


def measure(results: Results, selection: Selection, json_path: Path | None, tell: Tell) -> None:
    """Fill `results` and, as they come, their file, which is whole after every writing.

    Raises:
        OSError: the file lacks what was measured last.
        click.UsageError: it cannot be written at all.
        UnsupportedError: there is no GPU, or no CuPy.
    """
    began, device = time.perf_counter(), gpu.Gpu()
    results.machine.update(device.facts())
    keeper = Keeper(results, json_path, tell)
    cases = plan(selection)
    providers: dict[str, Provider | str] = {OURS: Ours(device)}
    with ThreadPoolExecutor(1) as beside:  # compiles while PyTorch is imported
        compiled = beside.submit(device.compile_ahead, cases)
        if selection.peers:
            providers.update(_baselines(device, selection, results))
        try:
            results.bandwidth.update(device.bandwidth(COPIED))
        except Exception as error:  # too little memory: no floors, but everything else
            results.note(f"bandwidth: not measured ({told(error)})")
        device.free()
        if (failed := compiled.exception()) is not None:
            results.note(f"kernels were not compiled ahead ({told(failed)})")
    with terminated_by_exception():
        try:
            Bench(device, providers, results, selection.budget, began, keeper.save, tell).run(cases)
            for text in device.self_tests():
                results.note(f"self-test: {text}")
        finally:
            results.seconds = round(time.perf_counter() - began, 1)
            keeper.end()


def _baselines(device: gpu.Gpu, selection: Selection, results: Results) -> dict[str, Provider | str]:
    """The baselines by name; the reason in their place if PyTorch or vLLM cannot be used."""
    made: dict[str, Provider | str] = {}
    for package, title, provide in (("torch", "PyTorch", peers.TorchPeers), ("vllm", "vLLM", peers.VllmPeers)):
        if names := [name for name, peer in selection.peers.items() if peer.package == package]:
            try:
                provider = provide(device.stream.ptr)
                results.machine.update(provider.facts())
                made.update(dict.fromkeys(names, provider))
            except Exception as error:  # ImportError, or whatever a broken installation raises
                reason = f"{title} cannot be used ({told(error)})"
                results.note(f"no {', '.join(names)}: {reason}")
                made.update(dict.fromkeys(names, reason))
    return made


@contextlib.contextmanager
def terminated_by_exception() -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, becomes SystemExit(143): what was measured is kept."""

    def stop(*_: object) -> NoReturn:
        raise SystemExit(143)

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if here else None
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


class Keeper:
    """Writes a run's file as results come. A full disk is noted, and the run goes on; only the last writing must succeed.

    Raises:
        click.UsageError: the file cannot be written at all, which is found out before anything is measured.
    """

    def __init__(self, results: Results, path: Path | None, tell: Tell) -> None:
        self.results, self.path, self.tell, self._saved = results, path, tell, time.perf_counter()
        try:
            self.end()
        except OSError as error:
            raise click.UsageError(str(error)) from None

    def end(self) -> None:
        """Write the file."""
        if self.path is not None:
            try:
                self.results.save(self.path)
            except (OSError, ValueError) as error:  # ValueError: JSON has no NaN
                reason = getattr(error, "strerror", None) or error
                raise OSError(f"--json: {self.path} could not be written ({reason})") from None

    def save(self) -> None:
        """Write the file if that was not done lately."""
        if time.perf_counter() - self._saved >= SAVE_S:
            try:
                self.end()
            except OSError as error:
                self.tell(str(error))
                self.results.note(f"for a while: {error}")
            self._saved = time.perf_counter()


@dataclass
class Bench:
    """One run: each case is checked, timed and recorded; what fails is a blank cell with its reason, and the run goes on.

    Attributes:
        providers: name -> provider, or the reason why it cannot be used.
        results: where cells go.
        budget: seconds from `began`, after which nothing more is begun.
        save: called after every case.
        say: told a line a case.
    """

    device: gpu.Gpu
    providers: Mapping[str, Provider | str]
    results: Results
    budget: float
    began: float
    save: Callable[[], None]
    say: Tell

    def run(self, plan: Sequence[Case]) -> None:
        """Measure the cases in turn, until the budget is spent."""
        for i, case in enumerate(plan):
            if self._elapsed() > self.budget:
                self._stop(plan[i:], f"the budget of {self.budget:.0f} s was spent")
                return
            cells = self._case(case)
            self.results.seconds = round(self._elapsed(), 1)
            self.say(f"[{self.results.seconds:5.1f} s] {case}: {self._outcome(case, cells)}")
            self.save()
            try:
                self.device.synchronize()
            except Exception:  # after an illegal access no call of the process works
                self._stop(plan[i + 1 :], f"the GPU stopped answering after {case}")
                return
        self.results.complete = True

    def _elapsed(self) -> float:
        return time.perf_counter() - self.began

    def _stop(self, left: Sequence[Case], reason: str) -> None:
        for case in left:
            for layer in self._layers(case):
                self._record(case, layer, blank=f"{UNMEASURED}: {reason}")
        self.results.note(f"{len(left)} cases were not measured: {reason}")
        self.say(f"{reason}: {len(left)} cases are left unmeasured")

    @staticmethod
    def _layers(case: Case) -> list[str]:
        return [ALL] if case.load == "sustained" else [linear.name for linear in case.suite.linears]

    def _record(self, case: Case, layer: str, **facts: Any) -> Cell:
        pattern = case.pattern
        cell = Cell(case.provider, case.part, case.suite.name, layer, case.kind.key, pattern, case.m, case.load, **facts)
        self.results.add(cell)
        return cell

    def _case(self, case: Case) -> list[Cell]:
        provider, cells = self.providers[case.provider], list[Cell]()
        for layer in self._layers(case):
            if isinstance(provider, str):
                facts: dict[str, Any] = {"blank": provider}
            elif cells and self._elapsed() > self.budget:
                facts = {"blank": f"{UNMEASURED}: the budget of {self.budget:.0f} s was spent"}
            else:
                facts = self._measured(case, provider, layer)
            cells.append(self._record(case, layer, **facts))
        return cells

    def _measured(self, case: Case, provider: Provider, layer: str) -> dict[str, Any]:
        """The facts of a cell: its time, or why there is none."""
        full = False
        try:
            return self._timed(case, provider, layer)
        except ss.VerificationError as error:
            return {"blank": f"wrong: {error}", "wrong": case.provider == OURS}
        except Exception as error:  # a peer's, a driver's, out of memory: whatever it is, the next may work
            full = "memory" in told(error).lower()
            return {"blank": told(error)}
        finally:
            if full:  # only now: the error held the operands
                for each in self.providers.values():
                    with contextlib.suppress(Exception):  # the device is gone, which `run` finds out
                        if not isinstance(each, str):
                            each.release()

    def _timed(self, case: Case, provider: Provider, layer: str) -> dict[str, Any]:
        """Check, time, check again: one layer, or all in turn."""
        linears = [linear for linear in case.suite.linears if layer in (linear.name, ALL)]
        count = copies(linears, case.kind, case.m, self.device.l2_bytes)
        made = [provider.prepare(case, linear, count) for linear in linears]
        for calls in made:
            if calls.outputs:
                poison(calls.outputs[0])
            calls.calls[0]()
            calls.check(0)
        seen: dict[str, float | None] = {}
        if made[0].on_host:
            times = self.device.host_us(made[0].calls[0])
        else:
            launch = provider.capture([calls.calls[i] for i in range(count) for calls in made])
            for calls in made:
                if calls.outputs:
                    poison(calls.outputs[-1])
            self.device.synchronize()  # another stream's work
            if case.load == "sustained":
                times, seen = self.device.sustained(launch)
                seen["mj"] = None if seen["watts"] is None else seen["watts"] * median(times) / count * 1e-3
            else:
                times = self.device.bursts(launch)
            times = [us / count for us in times]
        for calls in made:
            calls.check(-1)
            for note in calls.notes:
                self.results.note(note)
        low, high = np.percentile(times, [10, 90])
        us = max(median(times), 1e-3)  # a cell has a time above 0
        found = {"us": round(us, 3), "spread": round((high - low) / us, 4), "rows": made[0].rows}
        return found | {name: None if value is None else round(value, 3) for name, value in seen.items()}

    def _outcome(self, case: Case, cells: list[Cell]) -> str:
        """The total of a case and how it compares, or what is wrong."""
        if blank := next((cell.blank for cell in cells if cell.blank), None):
            return blank
        us = sum(cell.us for cell in cells if cell.us is not None)
        dense = self.results.us("dense", "gemm", case.suite.name, ALL, case.kind.key, None, case.m, case.load)
        ratio = f", {dense / us:.2f}x dense" if dense and case.part == "gemm" and case.provider != "dense" else ""
        return f"{us:.1f} us{ratio}"
