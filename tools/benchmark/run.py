"""The loop: each group is checked, timed and recorded; what fails is a named blank, and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import slidesparse_nb as ss

from .gpu import Sustained
from .results import UNMEASURED, Cell, Results
from .selection import ALL, OURS, Group, Linear
from .summary import median, spread
from .trial import Call, Contender, Launch, Verdict, copies

SUSTAINED_S = 2.5
"""Seconds that a group under sustained load takes: half a second of warming up, half a second timed, and operands."""


class Clock(Protocol):
    """What times launches; see gpu.Gpu."""

    l2_bytes: int

    def burst(self, launch: Launch, meanwhile: Verdict) -> list[float]: ...
    def sustained(self, launch: Launch) -> Sustained: ...
    def host_us(self, call: Call) -> list[float]: ...
    def synchronize(self) -> None: ...


@dataclass
class Bench:
    """One run.

    Attributes:
        clock: times launches.
        contenders: name -> contender, or the reason why it is not there.
        results: where cells go.
        budget: seconds from `began`, after which nothing more is begun.
        save: called after every group.
        say: told a line a group.
    """

    clock: Clock
    contenders: Mapping[str, Contender | str]
    results: Results
    budget: float
    began: float
    save: Callable[[], None]
    say: Callable[[str], None]

    def run(self, plan: list[Group]) -> None:
        """Measure the groups of `plan` in turn, until the budget is spent.

        cuSPARSELt's searches take as long as they like: what of them would leave too little time for sustained load waits until
        everything else is measured.
        """
        left, late = list(plan), list[Group]()
        while left or late:
            if not left:
                left, late = late, []
            group = left[0]
            elapsed = time.perf_counter() - self.began
            if elapsed > self.budget:
                self._stop([*left, *late], f"the budget of {self.budget:.0f} s was spent")
                return
            until = self.budget
            if group.contender == "cusparselt" and group.load == "burst":
                until -= SUSTAINED_S * sum(g.load == "sustained" and g.contender != "cusparselt" for g in left)
            del left[0]
            if elapsed > until:
                late.append(group)
                continue
            cells = self._group(group, until)
            self.results.seconds = time.perf_counter() - self.began
            self.say(f"[{self.results.seconds:5.1f} s] {group}: {self._outcome(group, cells)}")
            self.save()
            if self._lost():
                self._stop([*left, *late], f"the GPU stopped answering after {group}")
                return
        self.results.complete = True

    def _stop(self, left: list[Group], reason: str) -> None:
        for group in left:
            self._blank(group, f"{UNMEASURED}: {reason}")
        self.results.note(f"{len(left)} groups were not measured: {reason}")
        self.say(f"{reason}: {len(left)} groups are left unmeasured")

    # ---- one group -----------------------------------------------------------------------------------------------

    def _group(self, group: Group, until: float) -> list[Cell]:
        """Cells of a group; of its layers none is begun later than `until` seconds after the start."""
        contender = self.contenders[group.contender]
        if isinstance(contender, str):
            return self._blank(group, contender)
        if group.load == "sustained":
            return [self._recorded(group, contender, ALL, self._sustained)]
        cells: list[Cell] = []
        for linear in group.suite.linears:
            if cells and time.perf_counter() - self.began > until:
                cells.append(self._cell(group, linear, blank=f"{UNMEASURED}: its time was spent"))
                self.results.add(cells[-1])
            else:
                cells.append(self._recorded(group, contender, linear, self._burst))
        return cells

    def _recorded(self, group: Group, contender: Contender, what: Any, measure: Callable[..., Cell]) -> Cell:
        """Keep and return the cell of a measurement; a named blank if it fails."""
        full = False
        try:
            cell = measure(group, contender, what)
        except ss.VerificationError as error:
            cell = self._cell(group, what, blank=f"wrong: {error}", wrong=group.contender == OURS)
        except Exception as error:  # a peer's, a driver's, out of memory: whatever it is, the next may work
            text = " ".join(str(error).split())[:200]
            cell = self._cell(group, what, blank=f"{type(error).__name__}: {text}" if text else type(error).__name__)
            full = "memory" in f"{type(error).__name__} {text}".lower()
        if full:  # only now: the error held the operands
            self._release()
        self.results.add(cell)
        return cell

    def _burst(self, group: Group, contender: Contender, linear: Linear) -> Cell:
        trial = contender.trial(group, linear, copies([linear], group.kind, group.m, self.clock.l2_bytes))
        verdict = trial.check()
        if trial.on_host:
            verdict()
            times = self.clock.host_us(trial.calls[0])
        else:
            launch = contender.capture(trial.calls)
            trial.poison()
            self.clock.synchronize()  # another stream's work
            times = [us / len(trial.calls) for us in self.clock.burst(launch, verdict)]
        trial.check_again()()
        for note in trial.notes:
            self.results.note(note)
        return self._timed(group, linear, times, calls=len(trial.calls), rows=trial.rows)

    def _sustained(self, group: Group, contender: Contender, what: str) -> Cell:
        linears = group.suite.linears
        count = copies(linears, group.kind, group.m, self.clock.l2_bytes)
        trials = [contender.trial(group, linear, count) for linear in linears]
        for trial in trials:
            trial.check()()
        launch = contender.capture([trial.calls[i] for i in range(count) for trial in trials])
        for trial in trials:
            trial.poison()
        self.clock.synchronize()
        found = self.clock.sustained(launch)
        for trial in trials:
            trial.check_again()()
        times, seen = [us / count for us in found.us], found.means
        mj = None if seen.watts is None else seen.watts * median(times) * 1e-3
        return self._timed(
            group, what, times, calls=count * len(trials), rows=trials[0].rows,
            sm_mhz=seen.sm_mhz, celsius=seen.celsius, watts=seen.watts, mj=mj,
        )  # fmt: skip

    # ---- cells ---------------------------------------------------------------------------------------------------

    def _timed(self, group: Group, what: Any, times: list[float], **facts: Any) -> Cell:
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()}
        return self._cell(
            group, what, us=round(median(times), 3), spread=round(spread(times), 4), repeats=len(times), **rounded
        )  # fmt: skip

    def _cell(self, group: Group, what: Any, **facts: Any) -> Cell:
        layer, n, k = (what.name, what.n, what.k) if isinstance(what, Linear) else (what, None, None)
        return Cell(
            contender=group.contender,
            part=group.part,
            suite=group.suite.name,
            layer=layer,
            n=n,
            k=k,
            type=group.kind.key,
            pattern=group.pattern,
            m=group.m,
            load=group.load,
            **facts,
        )

    def _blank(self, group: Group, reason: str) -> list[Cell]:
        whats = [ALL] if group.load == "sustained" else group.suite.linears
        cells = [self._cell(group, what, blank=reason) for what in whats]
        for cell in cells:
            self.results.add(cell)
        return cells

    def _outcome(self, group: Group, cells: list[Cell]) -> str:
        """A group's total and how it compares, or what is wrong."""
        if blank := next((cell.blank for cell in cells if cell.blank), None):
            return blank
        us = sum(cell.us for cell in cells if cell.us is not None)
        text = f"{us:.1f} us"
        if group.part == "gemm" and group.contender != "dense":
            dense = self.results.us("dense", "gemm", group.suite.name, ALL, group.kind.key, None, group.m, group.load)
            text += f", {dense / us:.2f}x dense" if dense else ""
        return text

    # ---- when things go wrong ------------------------------------------------------------------------------------

    def _release(self) -> None:
        for contender in self.contenders.values():
            if not isinstance(contender, str):
                try:
                    contender.release()
                except Exception:  # the device is gone; _lost finds that out
                    return

    def _lost(self) -> bool:
        """Whether the device answers no more: after an illegal access no call of the process works."""
        try:
            self.clock.synchronize()
        except Exception:
            return True
        return False
