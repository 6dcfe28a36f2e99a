"""Machines that fail: system calls that change files fail, or end the process, at a chosen one of them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHANGES = ("pwrite", "write", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir", "rmdir")
FILLING = ("pwrite", "write", "mkdir")
"""Of these, the ones that need room on the disk."""


@contextlib.contextmanager
def intercepted(act: Callable[..., Any], names: Sequence[str] = CHANGES) -> Iterator[None]:
    """act(number of the change, counted from 1, name, the real function, *arguments) in place of every function of `names`."""
    real = {name: getattr(os, name) for name in names}
    count = 0

    def replacement(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return act(count, name, lambda *other: real[name](*(other or args), **kwargs), *args)

        return call

    try:
        for name in names:
            setattr(os, name, replacement(name))
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def failing(at: int, code: int = errno.ENOSPC, *, lasting: bool = False) -> contextlib.AbstractContextManager[None]:
    """The at-th change of the file system fails, or (lasting) every one from there that needs room."""

    def act(number: int, name: str, go: Callable[..., Any], *_: Any) -> Any:
        if number == at or (lasting and number > at and name in FILLING):
            raise OSError(code, os.strerror(code))
        return go()

    return intercepted(act)


def killed(work: Callable[[], object], at: int, *, torn: bool = False, names: Sequence[str] = CHANGES) -> bool:
    """Work in a forked process that dies at its at-th change (one of `names`), or (torn) half way through a write.

    False where it ended before.
    """
    if (child := os.fork()) == 0:

        def act(number: int, name: str, go: Callable[..., Any], *args: Any) -> Any:
            if number == at:
                if torn and "write" in name:
                    go(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return go()

        code = 1
        with contextlib.suppress(BaseException), intercepted(act, names):
            work()
            code = 0
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def interrupting(when: Callable[[str, int, int], bool]) -> Callable[[str, int, int], None]:
    """Progress of a run (phase, done, total) on which the user presses Ctrl-C."""

    def progress(phase: str, done: int, total: int) -> None:
        if when(phase, done, total):
            raise KeyboardInterrupt

    return progress


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file under a folder; of a link what it says, of a folder "/"."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(each.relative_to(path)): os.readlink(each).encode()
        if each.is_symlink()
        else b"/"
        if each.is_dir()
        else each.read_bytes()
        for each in path.rglob("*")
    }
