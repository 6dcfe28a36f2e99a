"""Slices of a weight's rows, and threads over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..core.checks import whole_number

BLOCK = 2**18
"""Weights that a thread handles at once: a float32 block and its temporaries stay in L2."""


def blocks(n: int, k: int) -> Iterator[slice]:
    """Rows 0 to n in slices of about BLOCK weights."""
    step = max(1, BLOCK // max(1, k))
    for first in range(0, n, step):
        yield slice(first, min(n, first + step))


def over_blocks(work: Callable[[slice], Any], n: int, k: int, max_workers: int | None) -> Iterator[Any]:
    """`work` of every block of rows, in order of rows, on up to `max_workers` threads."""
    todo = list(blocks(n, k))
    if max_workers is not None:
        max_workers = whole_number("max_workers", max_workers, 1)
    workers = min(len(todo), min(8, os.cpu_count() or 1) if max_workers is None else max_workers)
    if workers <= 1:
        yield from map(work, todo)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(work, todo)
        finally:
            pool.shutdown(cancel_futures=True)
