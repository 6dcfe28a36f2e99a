"""What packing and unpacking a checkpoint have in common: where the output goes, what is copied, and the order of steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.packed_format import parse_metadata, unreadable
from ..checkpoint.safetensors import TensorInfo, checked_path
from ..core.pattern import Pattern
from ..core.scheme import Scheme
from ..core.untrusted_json import uncollected
from ..errors import FormatError, OperandError, SlideSparseError, UnsupportedError, VerificationError
from .config_json import is_ours, output_config, output_metadata
from .layout import Item, Layout, Piece, dequantized_notes, output_layout
from .module import Module
from .options import UNIT_BYTES, ModuleReport, Report, Run
from .proof import prove_files
from .sources import Source
from .staging import Staging, clear_leftovers
from .write import write_layout

CONTINUE = "the same command with --resume continues"


def output_target(source: Path, checkpoint: Checkpoint, out: str | os.PathLike[str] | None, label: str) -> tuple[Path, bool]:
    """Where the output goes, and whether it is one file.

    Raises:
        OperandError: a file name for a folder, or a place inside the source or around it.
    """
    origin = source.resolve()
    root = origin if origin.is_dir() or checkpoint.root is None else origin.parent
    if out is None:
        if checkpoint.is_single_file:
            return source.with_name(f"{source.name.removesuffix('.safetensors')}-{label}.safetensors"), True
        folder, name = (root, root.name) if checkpoint.root is not None else (source.absolute().parent, source.stem)
        hub = folder.parents[1].name if folder.parent.name == "snapshots" else ""
        if hub.startswith("models--"):  # a hub cache keeps nothing of ours
            return Path(f"{hub.rpartition('--')[2] if folder == root else name}-{label}"), False
        return (source if folder != root else root).with_name(f"{name}-{label}"), False
    if str(out) == "":
        raise OperandError("out: is empty; name a folder or a .safetensors file")
    target = checked_path(out, "out").absolute()
    if ".." in target.parts:  # after a link it leads where the operating system says, not one name back
        whole = target.name == ".."
        target = Path(os.path.realpath(target)) if whole else Path(os.path.realpath(target.parent), target.name)
    single = target.suffix == ".safetensors"
    if single and not checkpoint.is_single_file:
        raise OperandError(f"out: {target} is one file, but the output of {source} is a folder; name a folder")
    place, here = target.resolve(), Path.cwd()
    if place == here or place in here.parents:
        raise OperandError(f"out: {target} is the current folder or around it, and would be replaced as a whole; name another")
    if place == origin or place in origin.parents or (not checkpoint.is_single_file and root in place.parents):
        raise OperandError(f"out: {target} is the source {source}, inside it or around it; name a place of its own")
    return target, single


def copied_item(checkpoint: Checkpoint, info: TensorInfo) -> Item:
    """A tensor that goes through byte for byte."""

    def make(first: int, last: int) -> Iterator[Piece]:
        yield info.name, first, checkpoint.raw(info.name, first, last)
        checkpoint.release(info.name, first, last)

    return Item(info.name, ((info.name, info.code, info.shape),), info.nbytes, 1, make, copied=True)


def all_items(checkpoint: Checkpoint, modules: Iterable[Module], make_item: Callable[[Module], Item]) -> list[Item]:
    """Every output item in the source's order: a module where its weight (or first tensor) stood, other tensors as they are.

    Raises:
        UnsupportedError: a tensor that goes through has the name of one that a module writes, or could not be read back beside
            it. FormatError: metadata 'slidesparse' of the source is none, or gives two modules one dense tensor.
    """
    for file in checkpoint.files:
        parse_metadata(file.metadata, file.path)  # of another version, its tensors may mean something else
    owner = {name: module for module in modules for name in module.replaced}
    items: list[Item] = []
    made: dict[str, str] = {}
    begun: set[str] = set()
    with uncollected():
        for name, (info, _) in checkpoint.tensors.items():
            if name not in owner:
                items.append(copied_item(checkpoint, info))
            elif (module := owner[name]).name not in begun:
                begun.add(module.name)
                items.append(make_item(module))
                for entry in items[-1].entries:
                    if (other := made.setdefault(entry[0], module.name)) != module.name:
                        raise FormatError(f"{entry[0]}: is the dense tensor of both {other} and {module.name}")
    for item in items:
        if item.copied and item.name in made:
            raise UnsupportedError(
                f"{item.name}: stands in the source, and module {made[item.name]} would write a tensor of that name; rename it,"
                f" or leave {made[item.name]} dense with --ignore"
            )
    packed = [item.name for item in items if f"{item.name}.weight_packed" in made]
    if why := unreadable({name: code for item in items for name, code, _ in item.entries}, packed, "the output"):
        raise UnsupportedError(f"{why}; rename it in the source, or leave the module beside it dense with --ignore")
    return items


Prove = Callable[[Checkpoint, Callable[[int], None]], None]
"""Raises VerificationError unless the written checkpoint equals its source; counts the bytes it has proved."""


@dataclass
class Conversion:
    """A checkpoint and what is to become of it.

    Attributes:
        source, checkpoint: the path, and what is open there. said: what it says of itself.
        target, single: where the output goes, and whether it is one file.
        modules: those that are packed or unpacked.
        pattern, scheme, format: of the output; `scheme` is None where modules are of several.
        layout: what will be written, once it is planned.
    """

    source: Path
    checkpoint: Checkpoint
    said: Source
    target: Path
    single: bool
    modules: Collection[Module]
    pattern: Pattern
    scheme: Scheme | None
    format: str
    layout: Layout = field(init=False)

    def plan(self, make_item: Callable[[Module], Item], refused: Iterable[str] = (), max_shard_size: int | None = None) -> None:
        """Decide what will be written; `refused`: names of modules that a real run would not leave as they are.

        Raises:
            As `all_items` and `output_config`.
        """
        of = self.checkpoint, self.said, self.format, self.pattern
        self.layout = output_layout(
            all_items(self.checkpoint, self.modules, make_item),
            self.checkpoint,
            metadata=output_metadata(self.checkpoint, self.format, self.pattern, self.scheme, self.modules),
            config=output_config(*of, self.scheme, self.modules, refused) if self.scheme else None,
            max_shard_size=max_shard_size,
            single=self.target.name if self.single else None,
        )

    def report(self, *, prune: str, left_dense: dict[str, str], skipped: dict[str, str], notes: list[str]) -> Report:
        """The report before the work is done."""
        shards, held = self.layout.shards, self.checkpoint.tensors
        sizes = {item.name: item.nbytes for shard in shards for item in shard.items if not item.copied}
        rows = []
        for module in self.modules:
            n, k, size = module.rows, module.k, sizes[module.name]
            stored = module.scheme.name if module.scheme.blocks else module.scheme.dtype.safetensors
            source_bytes, bits = sum(held[name][0].nbytes for name in module.replaced), 8 * size / max(1, n * k)
            rows.append(ModuleReport(module.name, n, k, module.code, stored, source_bytes, size, bits, module.count))
        dequantized = dequantized_notes(self.modules, self.said.model_types.values()) if self.format == "dense" else []
        return Report(
            input=str(self.source),
            output=str(self.target),
            pattern=str(self.pattern),
            scheme=self.scheme.name if self.scheme else "mixed",
            format=self.format,
            prune=prune,
            expansion=float(self.pattern.expansion),
            ideal_speedup=float(self.pattern.speedup),
            modules=rows,
            left_dense=left_dense,
            skipped=skipped,
            notes=notes + dequantized,
            files=[shard.name for shard in shards] + [file.name for file in self.layout.files],
            weights=sum(row.n * row.k for row in rows),
            source_bytes=sum(info.nbytes for info, _ in held.values()),
            output_bytes=sum(shard.nbytes for shard in shards),
        )

    def carry_out(self, facts: dict[str, Any], run: Run, report: Report, phase: str, prove: Prove) -> None:
        """Write the layout beside the target, prove it, and put it in its place; fill in the report.

        Args:
            facts: what besides the headers decides the output's bytes.
            phase: what progress calls the work.
        """
        target, single = self.target, self.single
        if run.resume and not run.overwrite and os.path.lexists(target) and (single or not _is_empty(target)):
            self._require_complete(run, prove)
            clear_leftovers(target)
            report.already_complete = report.verified = True
            return
        refuse_existing(target, single, run.overwrite)
        identity = [(str(f.path.resolve()), f.path.stat().st_size, f.path.stat().st_mtime_ns) for f in self.checkpoint.files]
        fingerprint = self.layout.fingerprint({**facts, "source": identity})
        try:
            may_replace = partial(_is_ours, target, single) if run.overwrite else None
            staging = Staging(target, self.layout, fingerprint, single=single, resume=run.resume, may_replace=may_replace)
        except OSError as error:
            raise with_way(error, target) from error
        report.resumed = bool(staging.done)
        try:
            start = time.perf_counter()
            add = run.counter(phase, report.source_bytes)
            write_layout(self.layout, staging, workers=run.workers, memory=run.max_memory, unit_bytes=UNIT_BYTES, progress=add)
            if run.progress is not None:
                run.progress(phase, report.source_bytes, report.source_bytes)
            report.seconds = time.perf_counter() - start
            if run.verify:
                start = time.perf_counter()
                with Checkpoint.open(staging.folder / target.name if single else staging.folder) as written:
                    self._prove_all(written, run, prove)
                report.verified, report.verify_seconds = True, time.perf_counter() - start
            _refuse_changed(self.checkpoint)
            staging.publish()
        except KeyboardInterrupt:
            staging.keep()
            raise KeyboardInterrupt(f"what is done is kept in {staging.folder}: {CONTINUE}") from None
        except OSError as error:
            staging.keep()
            raise with_way(error, target, f"what is done is kept: {CONTINUE}") from error
        except BaseException:
            staging.discard()
            raise

    def _require_complete(self, run: Run, prove: Prove) -> None:
        """Raise OperandError unless the target holds the whole output."""
        if not (why := self.layout.differing_shard(self.target, self.single)):
            try:  # the same headers may hold other weights: pruned otherwise, or from an earlier state of the source
                with Checkpoint.open(self.target) as written:
                    self._prove_all(written, run, prove)
            except (VerificationError, FormatError, UnsupportedError) as error:
                why = str(error)
        if why:
            way = "--overwrite replaces it" if _is_ours(self.target, self.single) else "remove it first"
            raise OperandError(
                f"out: {self.target} exists and is not what these options make of this source ({why}); {way}, or name another"
                " place"
            )

    def _prove_all(self, written: Checkpoint, run: Run, prove: Prove) -> None:
        """`prove`, and that the small files are the layout's, and that the source held still. Raises VerificationError."""
        prove(written, run.counter("verifying", sum(info.nbytes for info, _ in self.checkpoint.tensors.values())))
        if written.root is not None:
            prove_files(written.root, self.layout)
        _refuse_changed(self.checkpoint)


def with_way(error: OSError, target: Path, kept: str = "") -> OSError:
    """The error to raise where writing `target` failed; `kept`: what can be continued, and how."""
    told = f"{error.strerror}; {kept}" if kept else f"cannot be written ({error.strerror}); name another place"
    return OSError(error.errno, told, str(error.filename or target))


def _refuse_changed(source: Checkpoint) -> None:
    """Raise VerificationError where a file of the source was written to while it was read."""
    if (changed := source.changed()) is not None:
        raise VerificationError(f"{changed}: was written to while it was read, and the output may mix two states; run again")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def refuse_existing(target: Path, single: bool, overwrite: bool) -> None:
    """Raise OperandError where something is at `target` that must not be replaced."""
    if not os.path.lexists(target) or (not single and _is_empty(target)):
        return
    if not overwrite:
        raise OperandError(f"out: {target} exists; --overwrite replaces it, or name another place")
    if target.is_symlink() or not _is_ours(target, single):
        raise OperandError(f"out: {target} is not a checkpoint that this tool wrote, so it is not overwritten; remove it first")


def _is_ours(target: Path, single: bool) -> bool:
    """Whether a file, or a folder, is an output of this library."""
    if target.is_dir() == single:
        return False
    try:
        with Checkpoint.open(target) as checkpoint:
            return is_ours(checkpoint)
    except SlideSparseError:
        return False
