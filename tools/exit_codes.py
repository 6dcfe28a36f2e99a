"""How a command ends: the documented exit codes, and one line on stderr for an error."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import click

import slidesparse_nb as ss

from .terminal import say

EXIT_CODES = """\b
Exit codes: 0 done; 1 failed at run time; 2 wrong usage; 3 weights break the
pattern; 4 verification failed; 5 unsupported or broken input; 130 interrupted."""

F = TypeVar("F", bound=Callable[..., Any])

_CODES = ((ss.PatternError, 3), (ss.VerificationError, 4), (ss.UnsupportedError, 5), (ss.FormatError, 5), (ss.OperandError, 2))


def exits(function: F) -> F:
    """Turn errors into one line on stderr and the documented exit code; `-vv` shows where an error came from."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # names are data: what a terminal cannot show is escaped
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            return function(*args, **kwargs)
        except click.ClickException:
            raise
        except KeyboardInterrupt as stop:
            _fail(f"interrupted{'; ' * bool(stop.args)}{stop}", 130)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except ss.SlideSparseError as error:
            _fail(str(error), next((code for kind, code in _CODES if isinstance(error, kind)), 1))
        except (OSError, MemoryError) as error:
            _fail(str(error) or type(error).__name__, 1)

    return run  # type: ignore[return-value]


def _fail(message: str, code: int) -> None:
    if click.get_current_context().params.get("verbose", 0) > 1:
        traceback.print_exc()
    say(f"error: {message}", err=True)
    sys.exit(code)
