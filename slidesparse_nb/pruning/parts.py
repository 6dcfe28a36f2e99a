"""Finished parts of a long run beside its output, so that it can be killed at any moment and resumed.

OUT.blocks/run.json             fingerprint of source and options; locked while a run is at work
OUT.blocks/00000.safetensors    the pruned weights of part 0, and the errors of its modules; whole or absent
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors import SafetensorsFile
from ..errors import OperandError
from .statistics import write_whole

MARK = "slidesparse_prune"


class Parts:
    """The folder of parts of one output.

    Args:
        out: where the output will be.
        fingerprint: of everything that decides the parts.
        resume: take up parts of the same fingerprint, if there are some.
        overwrite: drop those of another run.

    Raises:
        OperandError: an unfinished or a running job is stored there, or something that is not ours.
    """

    def __init__(self, out: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        self.out, self.folder = out, _place(out)
        found = _fingerprint(self.folder)
        if found and not (resume or overwrite):
            raise OperandError(
                f"out: an unfinished run of {out} is stored at {self.folder}; continue it with --resume, or start over with"
                " --overwrite"
            )
        if found and resume and found != fingerprint and not overwrite:
            raise OperandError(
                f"out: the unfinished run at {self.folder} was started with other options or another source; start over with"
                " --overwrite"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "run.json"
        self._file = mark.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise OperandError(f"out: another run is writing {out} at this moment; wait for it, or stop it") from None
        self.resumed = resume and found == fingerprint and any(self.folder.glob("*.safetensors"))
        if not self.resumed:
            for entry in self.folder.glob("*.safetensors*"):
                entry.unlink()
            self._file.truncate(0)
            self._file.write(json.dumps({MARK: 1, "fingerprint": fingerprint}))
            self._file.flush()
        self._open: dict[int, SafetensorsFile] = {}
        self._home: dict[str, int] = {}

    def path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.safetensors"

    def __contains__(self, part: object) -> bool:
        return isinstance(part, int) and self.path(part).exists()

    def write(self, part: int, arrays: Mapping[str, Any], errors: Mapping[str, float]) -> None:
        """Store a part: arrays by the names of their tensors."""
        write_whole(self.path(part), arrays, {"errors": json.dumps(dict(errors))})

    def read(self, part: int) -> dict[str, float]:
        """Open a finished part for `array`; returns its errors."""
        self._open[part] = SafetensorsFile(self.path(part))
        self._home |= dict.fromkeys(self._open[part].tensors, part)
        errors: dict[str, float] = json.loads(self._open[part].metadata["errors"])
        return errors

    def array(self, name: str) -> Any:
        """A tensor of a part that has been read."""
        return self._open[self._home[name]].array(name)

    def close(self) -> None:
        """Leave everything for a later run."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._file.close()

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def clear_parts(out: Path) -> None:
    """Remove what a run leaves that was killed after OUT was in its place."""
    if _fingerprint(_place(out)) is not None:
        shutil.rmtree(_place(out), ignore_errors=True)


def _place(out: Path) -> Path:
    return out.with_name(f"{out.name}.blocks")


def _fingerprint(folder: Path) -> str | None:
    """That of an unfinished run, "" if it was cut in its first line; None where there is none.

    Raises:
        OperandError: something else is there.
    """
    if not os.path.lexists(folder):
        return None
    try:
        if folder.is_symlink():
            raise ValueError
        text = (folder / "run.json").read_text() if any(folder.iterdir()) else ""
        told = json.loads(text) if text else {MARK: 1, "fingerprint": ""}
        if told[MARK] == 1:
            return str(told["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise OperandError(f"out: {folder} exists and is no unfinished run of this tool; move it first")
