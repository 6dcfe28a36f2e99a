"""prune_checkpoint: a dense checkpoint -> a dense checkpoint that obeys the pattern; collect_statistics: what that needs, once.

    magnitude, scores      rows are pruned while the output is written
    a text                 block by block: inputs of its layers, pruned weights -> OUT.blocks/, their outputs, the next block
    statistics             layer by layer: pruned weights -> OUT.blocks/
    then                   OUT.blocks/ + source -> OUT, as `convert` writes it; proved to obey the pattern before it appears

Wanda and SparseGPT see a block as its authors do: all layers of a block are pruned by the activations of the block as it was,
whose inputs come from blocks that are pruned already, in the type that is written. A run that was killed goes on after the last
finished block, from hidden states that it computes anew; the bytes are those of a run that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.packed_format import TOOL, pattern_facts
from ..checkpoint.safetensors import checked_path
from ..convert import Run
from ..convert.config_json import output_metadata
from ..convert.layout import Item, Piece, dense_item, output_layout, row_ranges
from ..convert.module import Module
from ..convert.options import UNIT_BYTES, instance_of
from ..convert.proof import prove_copies
from ..convert.run import CONTINUE, Conversion, all_items, output_target, refuse_existing, with_way
from ..convert.select import Selection, select
from ..core.checks import infinite, require_finite
from ..core.dtypes import NUMPY_OF
from ..core.untrusted_json import frozen, uncollected
from ..cpu import kernels
from ..errors import OperandError, SlideSparseError, UnsupportedError, VerificationError, shown
from .groups import namespace
from .model import BlockwiseModel, load_model, namespace_of, read_windows
from .options import CALIBRATED, PruneOptions, PruneReport
from .parts import Parts, clear_parts
from .scores import Given, Rows, Scored
from .sparsegpt import LARGER
from .statistics import Statistics, crc32
from .together import prune_together


def prune_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: PruneOptions | None = None,
    run: Run | None = None,
) -> PruneReport:
    """Prune a checkpoint: write a dense one, of the source's types and names, whose linear layers obey the pattern.

    Args:
        source: a .safetensors file, a Hugging Face folder, or an index file; a folder where a text is given.
        out: as for `pack_checkpoint`. options: how to prune. run: how to work.

    Raises:
        As `pack_checkpoint`; OperandError also for a text, statistics or scores that do not fit; PatternError for a mask that
        breaks the pattern; UnsupportedError for a model that transformers cannot run, or whose activations are not finite.
    """
    options = PruneOptions(method="magnitude") if options is None else instance_of("options", options, PruneOptions)
    run, source = instance_of("run", run, Run), checked_path(source, "source")
    with Checkpoint.open(source) as checkpoint:
        work = _Work(checkpoint, options, run, *_selected(checkpoint, options))
        target, single = output_target(
            source, checkpoint, out, f"{options.pattern.nnz}of{options.pattern.group}-{options.label}"
        )
        conversion = work.conversion(source, target, single)
        plan = conversion.report(prune=options.label, left_dense=work.left_dense, skipped={}, notes=work.notes)
        report = PruneReport(**vars(plan))
        report.modules = [replace(row, stored=row.source) for row in plan.modules]
        report.scheme = options.scheme or "none"
        complete = run.resume and not run.overwrite and os.path.lexists(target) and (single or any(target.iterdir()))
        if not complete:
            refuse_existing(target, single, run.overwrite)
            work.begin(target, report)
        keep = True
        try:
            with frozen():
                conversion.carry_out(work.facts, work.run, report, "writing", work.prove)
        except VerificationError:
            keep = False
            raise
        finally:
            if work.parts is not None:
                work.parts.close(keep=keep)
        report.seconds += work.seconds
        clear_parts(target)
    return report


def collect_statistics(
    source: str | os.PathLike[str], out: str | os.PathLike[str], options: PruneOptions, run: Run | None = None
) -> None:
    """Run the dense model on the calibration text of `options`, and write the statistics of all its layers to one file.

    They serve every pattern. Method "wanda" asks for column norms alone, "sparsegpt" for Hessians, too; all of them are in the
    host's memory until the end, 4 k^2 bytes each. Scheme and damping play no part.

    Raises:
        As `prune_checkpoint`.
    """
    options, run = instance_of("options", options, PruneOptions), instance_of("run", run, Run)
    source, out = checked_path(source, "source"), checked_path(out, "out")
    if os.path.lexists(out) and not run.overwrite:
        raise OperandError(f"out: {out} exists; --overwrite replaces it, or name another place")
    if options.calibration is None:
        raise OperandError("calibration: is missing; statistics are made of a text")
    with Checkpoint.open(source) as checkpoint:
        work = _Work(checkpoint, options, run, *_selected(checkpoint, options))
        model, windows = work.model()
        found = Statistics(model=work.checksums(), facts={"tokens": windows.numel(), "window": options.window})
        add = run.counter("calibrating", sum(m.nbytes for m in work.modules))
        for i, made in model.walk(windows, gram=options.method == "sparsegpt", prunes=False):
            found.inputs |= made.inputs
            found.moments |= {name: moments.on(np) for name, moments in made.moments.items()}
            add(sum(work.by_name[name].nbytes for name in model.linears[i]))
        try:
            found.save(out)
        except OSError as error:
            raise with_way(error, out) from error


def _selected(checkpoint: Checkpoint, options: PruneOptions) -> tuple[Selection, list[Module]]:
    """What to prune, by the rules of packing. Raises UnsupportedError where nothing can be, or a layer is of another kind."""
    with uncollected():  # the scheme decides nothing here; FP16 is one that every source can have
        selection = select(checkpoint, pattern=options.pattern, scheme="FP16", targets=options.targets, ignore=options.ignore)
    if selection.bad:
        raise UnsupportedError(f"{next(iter(selection.bad.values()))}, or leave it dense with --ignore")
    stacked = next((m for m in selection.modules if m.stacked is not None), None)
    if stacked is not None and options.method in CALIBRATED:
        raise UnsupportedError(
            f"{stacked.name}: holds the experts of a layer in one tensor, whose inputs are not known one by one; prune by"
            f" magnitude, or leave it dense with --ignore {shown(stacked.name)}"
        )
    if not selection.modules:
        raise UnsupportedError("nothing to prune: no two-dimensional .weight tensor qualifies")
    return selection, selection.modules


@dataclass
class _Work:
    """One run."""

    checkpoint: Checkpoint
    options: PruneOptions
    run: Run
    selection: Selection
    modules: list[Module]
    rows: Rows | None = None
    parts: Parts | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.by_name = {module.name: module for module in self.modules}
        self.left_dense, self.notes = self.selection.left_dense, self.selection.notes
        self.facts = {"options": self.options.facts(), "version": __version__}

    # ---- what will be written

    def conversion(self, source: Path, target: Path, single: bool) -> Conversion:
        """The output, planned."""
        options, checkpoint = self.options, self.checkpoint
        made = {"pattern": pattern_facts(options.pattern), "method": options.label, "scheme": options.scheme, "tool": TOOL}
        told = hashlib.sha256(json.dumps(self.facts, sort_keys=True, default=str).encode()).hexdigest()
        metadata = {**output_metadata(checkpoint, "dense", options.pattern, None, self.modules), "slidesparse_pruned": told}
        config = None if checkpoint.config is None else {**checkpoint.config, "slidesparse": made}
        conversion = Conversion(
            source, checkpoint, self.selection.source, target, single, self.modules, options.pattern, None, "dense"
        )
        with uncollected():
            conversion.layout = output_layout(
                all_items(checkpoint, self.modules, self.item),
                checkpoint,
                metadata=metadata,
                config=config,
                max_shard_size=options.max_shard_size,
                single=target.name if single else None,
            )
        return conversion

    def item(self, module: Module) -> Item:
        def rows(matrix: Module, first: int, last: int) -> Any:
            assert self.rows is not None
            return self.rows(matrix, first, last)

        def make(first: int, last: int) -> Iterator[Piece]:
            yield module.weight, first * module.row_bytes, rows(module, first, last)
            module.release(self.checkpoint, first, last)

        if module.stacked is not None:
            return dense_item(module, module.row_bytes, lambda *of: (rows(*of), None))
        return Item(module.name, ((module.weight, module.code, module.shape),), module.n, module.row_bytes, make)

    def prove(self, written: Checkpoint, add: Callable[[int], None]) -> None:
        """That every module obeys the pattern and is what was made, and that every other tensor is the source's."""
        for matrix in (matrix for module in self.modules for matrix in module.matrices()):
            for first, last in row_ranges(matrix.n, matrix.row_bytes, UNIT_BYTES):
                block = np.ascontiguousarray(matrix.dense_array(written)[first:last])
                if len(broken := kernels.violations(block, self.options.pattern)):
                    raise VerificationError(
                        f"{matrix.label}: row {first + broken[0][0]} of the output breaks {self.options.pattern}"
                    )
                if self.rows is not None and self.rows(matrix, first, last).tobytes() != block.tobytes():
                    raise VerificationError(f"{matrix.label}: rows {first} to {last - 1} of the output are not what was made")
            add(matrix.n * matrix.row_bytes)
        weights = [module.weight for module in self.modules]
        prove_copies(written, self.checkpoint, weights, weights, add)

    # ---- pruning

    def begin(self, target: Path, report: PruneReport) -> None:
        """Make `rows`, after all that is slow; fill in the report."""
        start, self.notes = time.perf_counter(), report.notes
        if self.options.method == "magnitude":
            self.rows = Scored(self.checkpoint, self.options.pattern).rows
            return
        if self.options.scores is not None:
            self.rows = Given(self.checkpoint, self.options.pattern, self.options.scores, self.by_name).rows
            return
        files = [(str(f.path.resolve()), f.path.stat().st_size, f.path.stat().st_mtime_ns) for f in self.checkpoint.files]
        fingerprint = hashlib.sha256(json.dumps([self.facts, files], sort_keys=True, default=str).encode()).hexdigest()
        try:
            parts = self.parts = Parts(target, fingerprint, resume=self.run.resume, overwrite=self.run.overwrite)
        except OSError as error:
            raise with_way(error, target) from error
        if parts.broken:
            many = f"{parts.broken} blocks" if parts.broken > 1 else "1 block"
            self.notes.append(f"{many} of the run before had been damaged, and had to be made again")
        try:
            if self.options.statistics is not None:
                self.by_statistics()
            else:
                self.by_blocks(report)
        except BaseException as error:  # what an earlier run has done is not lost
            kept = parts.close(keep=parts.resumed or not isinstance(error, SlideSparseError))
            way = f"what is done is kept in {parts.folder}: {CONTINUE}" if kept else ""
            if isinstance(error, KeyboardInterrupt) and kept:
                raise KeyboardInterrupt(way) from None
            if isinstance(error, OSError):
                raise with_way(error, target, way) from error
            raise
        report.errors = {module.name: parts.errors[module.name] for module in self.modules if module.name in parts.errors}
        self.rows = lambda matrix, first, last: parts.array(matrix.weight)[first:last]
        self.seconds = time.perf_counter() - start

    def by_statistics(self) -> None:
        """Prune every layer by statistics of the dense model."""
        assert self.options.statistics is not None
        found, xp = Statistics.load(self.options.statistics), self.namespace()
        for module in self.modules:
            if len(found.of(module.name).squares) != module.k:
                raise OperandError(
                    f"statistics: those of {shown(module.name)} are of another number of columns than its {module.k}"
                )
        for name, crc in self.checksums().items() if found.model else ():
            if found.model.get(name, crc) != crc:
                raise OperandError(f"statistics: are of another model, whose {shown(name)} holds other numbers; make them anew")
        if not found.model:
            self.notes.append(f"{self.options.statistics} does not say of which model its statistics are")
        found.inputs = {module.name: found.inputs[module.name] for module in self.modules}
        done = self.run.counter("pruning", sum(m.nbytes for m in self.modules))
        for part, (of, names) in enumerate(found.groups().items()):
            self.part(part, Statistics(dict.fromkeys(names, of), {of: found.moments[of].on(xp)}))
            done(sum(self.by_name[name].nbytes for name in names))

    def namespace(self) -> Any:
        """The library of the mathematics, with a note if it is not that of the device."""
        xp = namespace_of(self.options.device)
        if xp is np and self.options.device == "cuda":
            self.notes.append("CuPy is missing or finds no GPU (`slidesparse doctor` says why): the mathematics ran on the CPU")
        return xp

    def model(self) -> tuple[BlockwiseModel, Any]:
        """The model and the windows of the text, int64 [windows, tokens].

        Raises:
            OperandError: there is no folder. UnsupportedError: a module is in no block, or has other weights there.
        """
        options, root = self.options, self.checkpoint.root
        if root is None or self.checkpoint.config is None:
            raise OperandError("calibration: needs a model's folder with config.json and tokenizer; give that, or statistics")
        assert options.calibration is not None
        windows = read_windows(root, checked_path(options.calibration, "calibration"), options.tokens, options.window)
        model = BlockwiseModel(load_model(root, options.device), set(self.by_name), options.device)
        self.namespace()
        for linears in model.linears:
            for name, linear in linears.items():
                if not np.array_equal(linear.weight.detach().numpy(), self.weight(name)):
                    raise UnsupportedError(
                        f"{name}: holds other weights in transformers than in the file; leave it dense with --ignore"
                    )
        if model.astray:
            name = min(model.astray)
            branch = f"{name.partition('.')[0]}."
            runs = any(each.startswith(branch) for linears in model.linears for each in linears)
            raise UnsupportedError(
                f"{name}: is no linear layer of a block that transformers runs, so its inputs are not known; leave it dense"
                f" with --ignore {shown(name if runs else f'{branch}*')}"
            )
        return model, windows

    def by_blocks(self, report: PruneReport) -> None:
        """Prune block after block, each by what the pruned ones before it make of the text."""
        assert self.parts is not None
        model, windows = self.model()
        report.calibration = {"tokens": windows.numel(), "window": self.options.window, "windows": len(windows)}
        done = self.run.counter("pruning", sum(m.nbytes for m in self.modules))
        for i, found in model.walk(windows, gram=True, prunes=True, done=self.parts):
            self.part(i, found)
            for name, linear in model.linears[i].items():
                model.set(linear, self.parts.array(self.by_name[name].weight).astype(np.float32))
            done(sum(self.by_name[name].nbytes for name in model.linears[i]))

    def part(self, part: int, found: Statistics) -> None:
        """Prune the modules of some statistics and store them as one part, if it is not there yet."""
        assert self.parts is not None
        if part in self.parts:
            return
        options, arrays, errors = self.options, dict[str, Any](), dict[str, float]()
        for of, names in found.groups().items():
            moments = found.moments[of]
            xp = namespace(moments.squares)
            weights = {name: xp.asarray(self.weight(name)) for name in names}
            made = prune_together(
                weights, moments, options.method, options.pattern, scheme=options.scheme, damping=options.damping
            )
            for name, w in weights.items():
                arrays[self.by_name[name].weight] = stored = self.stored(name, made[name])
                if moments.gram is not None:
                    errors[name] = relative_error(w, xp.asarray(stored.astype(np.float32)), moments.gram)
        self.parts.write(part, arrays, errors)

    def stored(self, name: str, made: Any) -> Any:
        """Pruned weights of a module in its type, on the host."""
        with np.errstate(over="ignore"):
            stored = (made if isinstance(made, np.ndarray) else made.get()).astype(NUMPY_OF[self.by_name[name].code])
        if infinite(stored) is not None:
            raise OperandError(f"{name}: a weight that makes up for others overflows {stored.dtype}; {LARGER}")
        return stored

    def checksums(self) -> dict[str, int]:
        """Tensor -> CRC-32 of its bytes, to tell models apart."""
        found = {}
        for name in self.checkpoint.tensors:
            found[name] = crc32(self.checkpoint.raw(name))
            self.checkpoint.release(name)
        return found

    def weight(self, name: str) -> Any:
        """A dense weight, float32 [n, k]. Raises UnsupportedError for NaN and infinity."""
        w = np.ascontiguousarray(self.by_name[name].dense_array(self.checkpoint))
        try:
            require_finite(w)
        except OperandError as error:
            raise UnsupportedError(f"{name}.weight: {error}") from None
        return kernels.to_float32(w)


def relative_error(w: Any, pruned: Any, gram: Any) -> float:
    """||X (W - W')^T||^2 / ||X W^T||^2 by X^T X; 0 where both are."""
    size = (float(abs(w).max()) if w.size else 0.0) or 1.0  # products of huge weights leave float32's range
    dense, pruned = w / size, pruned / size
    lost, whole = (float(((a @ gram) * a).sum(dtype=np.float64)) for a in (dense - pruned, dense))
    return lost / whole if whole else 0.0
