"""Files that measurements end up in: text that is whole or as it was, and the generated section of a document."""

from __future__ import annotations

import os
from pathlib import Path

import slidesparse_nb as ss


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside `path`, then rename it: whole, or as it was before."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except BaseException:
        if beside.parent.is_dir() and len(beside.name) < 256:
            beside.unlink(missing_ok=True)
        raise


def rewrite(document: Path, begin: str, end: str, section: str) -> bool:
    """Put a section between two lines of a document; True if that changed it.

    Raises:
        FormatError: the lines are not there, in order and the first once.
    """
    text = document.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    if text.count(begin) != 1 or end not in rest:
        raise ss.FormatError(f"{document}: must hold the lines {begin!r}, once, and {end!r} after it")
    new = f"{head}{begin}\n\n{section}\n{end}{rest.partition(end)[2]}"
    if new != text:
        write_whole(document, new)
    return new != text
