"""The likely candidates for a product, and the one that `slidesparse tune` found to be the fastest (docs/tuning.md).

    <cache>/tuned/<GPU>-<SMs>-<kernel>-<hash of its source>/16x4608x3584-6of8-int8-bfloat16.json

One file a product, written beside its place and renamed: processes that tune at the same time need no lock, and the last one
to write a product is right. A file describes its launches in words, which are looked up among the candidates. A file that is
broken, of another release or of another kernel is therefore ignored, and can never launch anything else.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from .. import arch, env
from ..arch import Candidate, Config, modelled
from ..core.problem import GemmProblem
from ..core.untrusted_json import parse_json
from ..errors import FormatError
from .jit import cache

version = 0
"""Of what was read: who remembers choices asks again where it is another."""

WITHIN = 1.5
"""Candidates whose estimated cost is at most this multiple of the cheapest are timed."""

MOST_CANDIDATES = 40
"""How many of these are timed at most, the cheapest first."""


def best(problem: GemmProblem, buffers: tuple[str, ...] | None = None) -> Candidate:
    """The stored candidate for this m and weights of these buffers (`Arch.candidates`), or else the model's choice."""
    return (env.tuned() and found(problem, buffers)) or modelled(problem, buffers)


def ranked(problem: GemmProblem, buffers: tuple[str, ...] | None = None, every: bool = True) -> list[tuple[float, Candidate]]:
    """The candidates (`Arch.candidates`) and their estimated cost, the cheapest first."""
    own = arch.of(problem)
    return sorted(((own.cost(c, problem), c) for c in own.candidates(problem, buffers, every)), key=lambda of: of[0])


def likely(problem: GemmProblem, buffers: tuple[str, ...] | None = None) -> list[Candidate]:
    """The candidates that are worth timing, the model's choice first."""
    chosen_from = ranked(problem, buffers, every=False)
    near = [c for cost, c in chosen_from if cost <= WITHIN * chosen_from[0][0]]
    return list(dict.fromkeys([modelled(problem, buffers), *near]))[:MOST_CANDIDATES]


def file(problem: GemmProblem) -> Path:
    """Path of the stored candidate, whether or not there is one."""
    source, device = arch.of(problem).source, problem.device
    kernel = f"{source.removesuffix('.cu')}-{cache.source_hash(source)}"
    place = re.sub(r"[^A-Za-z0-9]+", "-", f"{device.name}-{device.sms}-{kernel}")
    pattern = str(problem.pattern).replace(":", "of")
    shape = f"{problem.m}x{problem.n}x{problem.k}{'-unquantized' * problem.unquantized}"
    return folder() / place / f"{shape}-{pattern}-{problem.dtype}-{problem.out}.json"


def folder() -> Path:
    """Folder of all results, for every GPU."""
    return env.cache_dir() / "tuned"


def described(config: Config) -> str:
    """A launch in words: all that makes it differ from another, and nothing that was fitted."""
    return " ".join(f"{name}={value}" for name, value in {**config.defines(), **config.shares()}.items())


@lru_cache(maxsize=4096)
def found(problem: GemmProblem, buffers: tuple[str, ...] | None = None) -> Candidate | None:
    """The stored candidate for a product; None if there is none, or none that this release has. Read once a process."""
    try:
        if not folder().is_dir():
            return None
        launches = parse_json(file(problem).read_bytes(), "tuned").get("launches")
    except (OSError, FormatError):
        return None
    return next((c for c in arch.of(problem).candidates(problem, buffers) if [*map(described, c)] == launches), None)


def look_again() -> None:
    """Forget what was read."""
    global version
    version += 1
    found.cache_clear()


def keep(problem: GemmProblem, candidate: Candidate, told: Mapping[str, object]) -> None:
    """Store a candidate, and facts for a reader.

    Raises:
        UnsupportedError: the cache folder cannot be written.
    """
    text = json.dumps({"launches": [*map(described, candidate)], **told}, indent=1) + "\n"
    cache.replace_text(file(problem), text)
    look_again()


def drop(problem: GemmProblem) -> None:
    """Remove the stored candidate of a product."""
    with contextlib.suppress(OSError):
        file(problem).unlink()
    look_again()


def forget() -> int:
    """Remove the stored candidates of all products, on every GPU; return how many there were."""
    count = len(list(folder().glob("*/*.json")))
    shutil.rmtree(folder(), ignore_errors=True)
    look_again()
    return count
