"""A dense checkpoint -> a packed one (or, with format="dense", a pruned and quantized one)."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from .. import __version__, packing
from ..checkpoint import Checkpoint, packed_entries, read_packed
from ..checkpoint.hf_folder import OTHER_WEIGHTS
from ..checkpoint.safetensors import checked_path
from ..core import prune as pruning
from ..core.packed import PackedWeight
from ..core.prune import Pruning
from ..core.scheme import Scheme
from ..core.untrusted_json import frozen, uncollected
from ..cpu.kernels import violations
from ..errors import OperandError, PatternError, SlideSparseError, UnsupportedError, VerificationError, shown
from ..packing import violations_hint
from .config_json import is_renamed, output_config, output_metadata
from .kinds import in_block
from .layout import Item, Piece, dense_entries, dense_pieces, output_layout, row_ranges
from .options import UNIT_BYTES, Options, Report, Run
from .proof import prove_copies
from .run import all_items, carry_out, extent, new_report, output_target, release_rows, source_scale
from .select import APART, Module, Selection, select

SMALL = 2**16
"""Bytes of a source weight up to which modules are packed and proved several at a time."""

_SKIP = "or leave such modules dense with --skip-bad"
"""Advice that follows why a module cannot be packed, where `skip_bad` is not given."""


def pack_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    run: Run | None = None,
    *,
    dry_run: bool = False,
) -> Report:
    """Pack a checkpoint: a .safetensors file, a Hugging Face folder, or an index file.

    Args:
        source: what to read; nothing there is changed.
        out: a folder, or one .safetensors file if `source` is one; by default beside the source, named after pattern and type.
        options: what to make. run: how to work.
        dry_run: return the plan and write nothing.

    Raises:
        OperandError: wrong arguments, or `out` exists.
        PatternError: weights break the pattern (naming tensor, row, group and how many).
        FormatError, UnsupportedError: the source is broken, or of a kind that cannot be packed.
        VerificationError: what was written is not what was meant.
        OSError: reading or writing failed; what is done is kept for `resume`. In every other case nothing is left behind.
    """
    options, run, source = options or Options(), run or Run(), checked_path(source, "source")
    with Checkpoint.open(source) as checkpoint:
        with uncollected():
            selection = select(
                checkpoint, pattern=options.pattern, scheme=options.scheme, targets=options.targets, ignore=options.ignore
            )
        refused = {} if options.skip_bad else selection.bad
        if refused and not dry_run:
            raise UnsupportedError(f"{next(iter(refused.values()))}, {_SKIP}")
        maker = _Maker(checkpoint, options)
        for module in selection.modules if pruning.takes_statistics(options.prune) else ():
            maker.pruning(module)
        skipped = _settle_bad(checkpoint, selection, options, run)
        scheme = selection.modules[0].scheme
        target, single = output_target(source, checkpoint, out, _label(options, scheme))
        if single and options.max_shard_size is not None:
            raise OperandError(f"max_shard_size: {target} is one file and is not split; name a folder as the output")
        with uncollected():
            layout = output_layout(
                all_items(checkpoint, selection.modules, maker.item),
                checkpoint,
                metadata=output_metadata(checkpoint, options.format, options.pattern, scheme),
                config=output_config(
                    checkpoint,
                    selection.source,
                    options.format,
                    options.pattern,
                    scheme,
                    [m.name for m in selection.modules] + list(refused),
                ),
                max_shard_size=options.max_shard_size,
                single=target.name if single else None,
            )
        report = new_report(
            source,
            target,
            checkpoint,
            selection.modules,
            layout,
            pattern=options.pattern,
            scheme=scheme,
            format=options.format,
            prune=options.prune,
            left_dense=selection.left_dense,
            skipped=skipped,
            notes=[
                *selection.notes,
                *([] if single else _companion_notes(checkpoint)),
                *_config_notes(checkpoint, selection, options, scheme),
            ],
        )
        report.dry_run = dry_run
        if dry_run:
            if not options.skip_bad:  # then they are among the skipped
                report.refused = refused | maker.check_all(selection.modules, run)
                report.unsupported = sorted(refused)
            if os.path.lexists(target) and not (run.overwrite or run.resume):
                report.notes.append(f"{target} exists: a run needs --overwrite, --resume or another place")
            _count_bytes(report, selection, checkpoint, single)
        else:
            facts = {"options": options.facts(), "version": __version__}
            maker.warm_up(selection.modules[0])

            def prove(written: Checkpoint, add: Callable[[int], None]) -> None:
                maker.prove(written, selection.modules, run, add)

            try:
                with frozen():
                    carry_out(layout, target, single, checkpoint, facts, run, report, "packing", prove)
            except _Broken as error:
                raise maker.explain(error) from None
            _count_bytes(report, selection, checkpoint, single)
        return report


def _count_bytes(report: Report, selection: Selection, checkpoint: Checkpoint, single: bool) -> None:
    """Where every byte of the source goes, and the bytes of the files that go along."""
    refused = set(report.refused)
    packed = {name for m in selection.modules if m.name not in refused for name in m.replaced}
    for name, (info, _) in checkpoint.tensors.items():
        owners = {name, name.removesuffix(".weight"), name.rpartition(".")[0], name + APART}
        if name in packed:
            report.packed_bytes += info.nbytes
        elif owners & refused:
            report.refused_bytes += info.nbytes
        elif owners & {*selection.left_dense, *report.skipped}:
            report.dense_bytes += info.nbytes
        else:
            report.other_bytes += info.nbytes
    if checkpoint.root is not None and not single:
        report.copied_bytes = sum((checkpoint.root / name).stat().st_size for name in checkpoint.companions)


def _label(options: Options, scheme: Scheme) -> str:
    """ "6of8-int8": what a default output name says."""
    kind = {"float8_e4m3fn": "fp8", "bfloat16": "bf16", "float16": "fp16"}.get(str(scheme), str(scheme).lower())
    return f"{options.pattern.nnz}of{options.pattern.group}-{kind}{'-dense' * (options.format == 'dense')}"


def _companion_notes(checkpoint: Checkpoint) -> list[str]:
    """Which files do not go along, and why; and which weights go along unpacked."""
    reasons: dict[str, list[str]] = {}
    for name, why in checkpoint.left_behind.items():
        reasons.setdefault(why, []).append(name)
    notes = [f"not copied ({why}): {_listed(names)}" for why, names in reasons.items()]
    extra = [name for name in checkpoint.companions if _holds_weights(checkpoint, name)]
    return notes + ([f"copied as they are, not packed: {_listed(extra)}"] if extra else [])


def _config_notes(checkpoint: Checkpoint, selection: Selection, options: Options, scheme: Scheme) -> list[str]:
    """What of the source's config is lost, or what to check where a loader knows dense layers by their names alone."""
    if selection.source.kv_cache_scheme and (options.format != "dense" or not scheme.scaled):
        return ["kv_cache_scheme of the source's config.json is not carried over; its scale tensors are"]
    layers = [name for name in selection.left_dense if in_block(name) and f"{name}.weight" in checkpoint.tensors]
    if options.format != "dense" or not scheme.scaled or not layers or not is_renamed(checkpoint, selection.source):
        return []
    return [
        f"{shown(layers[0])} and {len(layers) - 1} other layers of blocks stay dense; loaders know them by name (`ignore` of"
        " config.json) and may rename this model's modules: compare its logits once"
    ]


def _holds_weights(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a file that goes along is of weights, by its name or by its size; a tokenizer takes up to 40 MB."""
    assert checkpoint.root is not None
    return name.lower().endswith((".safetensors", *OTHER_WEIGHTS)) or (checkpoint.root / name).stat().st_size > 50_000_000


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names[:8])) + f" and {len(names) - 8} more" * (len(names) > 8)


def _settle_bad(checkpoint: Checkpoint, selection: Selection, options: Options, run: Run) -> dict[str, str]:
    """With `skip_bad`, leave modules dense that cannot be packed: name -> why. Fail where none is left.

    Raises:
        PatternError: nothing is left to pack, since all modules break the pattern. UnsupportedError: nothing is left otherwise.
    """
    skipped, broken = dict[str, str](), dict[str, str]()
    if options.skip_bad:
        broken = _Maker(checkpoint, options).check_all(selection.modules, run)
        skipped = selection.bad | broken
        selection.drop(broken)
    for name in skipped:
        selection.left_dense.pop(name, None)
    if not selection.modules:
        if broken and len(broken) == len(skipped):
            raise PatternError(
                f"nothing to pack: all {len(broken)} modules break {options.pattern.described}, the first:"
                f" {next(iter(broken.values()))}; prune with --prune magnitude"
            )
        reasons = [*selection.bad.values(), *(f"{shown(name)}: {why}" for name, why in selection.left_dense.items())]
        reasons.sort(key=lambda reason: "fused by engines" not in reason)  # the one that a user may not expect
        together = "; name all that engines fuse, as in --targets '*[qkv]_proj'" if "fused by" in "".join(reasons[:1]) else ""
        raise UnsupportedError(
            "nothing to pack: no two-dimensional .weight tensor qualifies"
            + (f" ({'; '.join(reasons[:3])}{'; ...' * (len(reasons) > 3)}){together}" if reasons else "")
        )
    return skipped


def _packed_pieces(module: Module, block: PackedWeight, first: int) -> Iterator[Piece]:
    """The tensors of a packed module, rows from `first` on."""
    tensors = (("packed", block.values), ("meta", block.meta), ("scale", block.scale), ("block_scale", block.block_scale))
    for part, array in tensors:
        if array is not None:
            yield f"{module.name}.weight_{part}", first * array.shape[1] * array.itemsize, array
    if first == 0:
        yield f"{module.name}.weight_shape", 0, np.array(module.shape, np.int64)


_Rows = tuple[Module, int, int]
"""A module, and its rows first to last - 1."""
T = TypeVar("T")


class _Broken(PatternError):
    """Rows of a module break the pattern; several threads may find some, and one is explained in the end."""

    def __init__(self, module: Module, row: int, group: int) -> None:
        super().__init__(module.weight, row=row, group=group)
        self.module = module


@dataclass(frozen=True)
class _Maker:
    """Makes the rows of packed modules out of a dense checkpoint."""

    checkpoint: Checkpoint
    options: Options
    by_name: dict[str, Module] = field(default_factory=dict)

    @property
    def advice(self) -> str:
        """What follows why a module cannot be packed."""
        return "" if self.options.skip_bad else f", {_SKIP}"

    # ---- rows

    def stored_rows(self, module: Module, first: int, last: int) -> tuple[Any, Any]:
        """Rows pruned and quantized, and their scales; not yet checked against the pattern."""
        try:
            return packing.store_rows(
                self.checkpoint.array(module.weight)[first:last],
                self.options.pattern,
                module.scheme,
                scale=source_scale(self.checkpoint, module, first, last),
                prune=self.pruning(module).rows(slice(first, last)),
                first_row=first,
            )
        except OperandError as error:
            raise UnsupportedError(f"{module.weight}: {error}{self.advice}") from None

    def pruning(self, module: Module) -> Pruning:
        """Every module has its own statistics, and draws its own random numbers, whatever the order of work."""
        seed = int.from_bytes(hashlib.sha256(f"{self.options.seed} {module.name}".encode()).digest()[:8], "little")
        try:
            return pruning.bind(self.options.prune, module.shape, seed, self.options.statistics.get(module.name))
        except OperandError as error:
            raise OperandError(f"{module.name}: {error}") from None

    def packed_rows(self, module: Module, first: int, last: int) -> PackedWeight:
        """Rows first..last-1, packed. Raises _Broken."""
        q, scale = self.stored_rows(module, first, last)
        try:
            return packing.pack_rows(q, scale, self.options.pattern, module.scheme, first_row=first)
        except PatternError as error:
            raise _Broken(module, error.row, error.group) from None

    def explain(self, broken: _Broken, *, alone: bool = True) -> PatternError:
        """The error for a user: tensor and place, how many groups violate the pattern, what the weights look like instead.

        `alone`: with advice; False for one of many.
        """
        module, row, group = broken.module, broken.row, broken.group
        pattern, (n, k) = self.options.pattern, module.shape
        count = 0
        for first, last in row_ranges(*extent(self.checkpoint, module), UNIT_BYTES):
            count += len(violations(self.stored_rows(module, first, last)[0], pattern))
            release_rows(self.checkpoint, module, first, last)
        column, groups = group * pattern.columns, n * -(-k // pattern.columns)
        hint = violations_hint(self.checkpoint.array(module.weight), pattern)
        return PatternError(
            f"{module.weight}: row {row}, group {group} (columns {column} to {min(column + pattern.columns, k) - 1}) has more"
            f" than {pattern.nnz} non-zeros; {count} of {groups} groups ({100 * count / groups:.3g} %) break"
            f" {pattern.described}"
            + ("; prune with --prune magnitude" + self.advice if alone else "")
            + (f"; {hint}" if hint else ""),
            row=row,
            group=group,
            count=count,
        )

    def check_all(self, modules: list[Module], run: Run) -> dict[str, str]:
        """Of the modules that packing would refuse, name -> why."""
        refused: dict[str, str] = {}
        add = run.counter("checking", sum(self.checkpoint.tensors[m.weight][0].nbytes for m in modules))
        broken: dict[str, _Broken] = {}

        def one(rows: _Rows) -> SlideSparseError | None:
            try:
                self.packed_rows(*rows)
            except (_Broken, UnsupportedError) as error:
                return error
            finally:
                release_rows(self.checkpoint, *rows)
            return None

        for (module, first, last), error in self._each(modules, one, run):
            if isinstance(error, _Broken):
                broken.setdefault(module.name, error)
            elif error is not None:
                refused.setdefault(module.name, str(error))
            add((last - first) * extent(self.checkpoint, module)[1])
        refused |= {name: str(self.explain(error, alone=False)) for name, error in broken.items() if name not in refused}
        return refused

    def _each(self, modules: list[Module], work: Callable[[_Rows], T], run: Run) -> Iterator[tuple[_Rows, T]]:
        """Call `work` on ranges of rows of the modules, several at a time; the ranges and results in order.

        A range is small enough for a core's cache, and small modules share a task: a thread's turn costs more than they do.
        """
        tasks: list[list[_Rows]] = []
        filled = UNIT_BYTES
        for module in modules:
            rows, row_bytes = extent(self.checkpoint, module)
            for first, last in row_ranges(rows, row_bytes, UNIT_BYTES):
                if filled >= UNIT_BYTES:
                    tasks.append([])
                    filled = 0
                tasks[-1].append((module, first, last))
                filled += max(4096, (last - first) * row_bytes)
        with ThreadPoolExecutor(run.workers) as pool:
            for task, results in zip(tasks, pool.map(lambda task: [work(rows) for rows in task], tasks), strict=True):
                yield from zip(task, results, strict=True)

    def warm_up(self, module: Module) -> None:
        """Compile what packing calls, so that its rate is not that of the compiler."""
        with contextlib.suppress(SlideSparseError):
            self.packed_rows(module, 0, min(1, module.shape[0]))

    # ---- items

    def item(self, module: Module) -> Item:
        return self.packed_item(module) if self.options.format == "packed" else self.dense_item(module)

    def packed_item(self, module: Module) -> Item:
        def make(first: int, last: int) -> Iterator[Piece]:
            yield from _packed_pieces(module, self.packed_rows(module, first, last), first)
            release_rows(self.checkpoint, module, first, last)

        def together(items: Sequence[Item]) -> list[Iterable[Piece]]:
            return [
                list(_packed_pieces(m, block, 0)) for m, block in self.packed_together([self.by_name[i.name] for i in items])
            ]

        self.by_name[module.name] = module
        entries = tuple(packed_entries(module.name, self.options.pattern, module.scheme, module.shape))
        return Item(module.name, entries, *extent(self.checkpoint, module), make, key=self.key(module), together=together)

    # ---- many small modules

    def key(self, module: Module) -> object:
        """Modules of one key can be packed and proved as one matrix, row below row; None for those that must stand alone."""
        small = self.checkpoint.tensors[module.weight][0].nbytes <= SMALL and pruning.by_row(self.options.prune)
        return (module.shape[1], module.code, module.scheme.name) if small else None

    def stacked(self, modules: Sequence[Module]) -> tuple[Any, Any]:
        """Their source weights row below row, and the scales of all rows (None for unquantized weights)."""
        scales = [source_scale(self.checkpoint, m, 0, m.shape[0]) for m in modules]
        weights = np.concatenate([self.checkpoint.array(m.weight) for m in modules])
        if scales[0] is None:
            return weights, None
        rows = [np.broadcast_to(np.reshape(s, (-1, 1)), (m.shape[0], 1)) for s, m in zip(scales, modules, strict=True)]
        return weights, np.concatenate([np.asarray(r, np.float32) for r in rows])

    def packed_together(self, modules: Sequence[Module]) -> Iterator[tuple[Module, PackedWeight]]:
        """Whole modules of one key, packed. Raises SlideSparseError if one of them cannot be."""
        w, scale = self.stacked(modules)
        pattern, scheme = self.options.pattern, modules[0].scheme
        q, scale = packing.store_rows(w, pattern, scheme, scale=scale, prune=pruning.bind(self.options.prune, w.shape))
        whole, first = packing.pack_rows(q, scale, pattern, scheme), 0
        for module in modules:
            yield module, whole.rows(first, first := first + module.shape[0])
            release_rows(self.checkpoint, module, 0, module.shape[0])

    def batches(self, modules: Sequence[Module]) -> Iterator[list[Module]]:
        """Modules of one key, at most UNIT_BYTES of their sources at a time."""
        groups: dict[object, list[Module]] = {}
        for module in modules:
            if (key := self.key(module)) is not None:
                groups.setdefault(key, []).append(module)
        for group in groups.values():
            largest = max(self.checkpoint.tensors[m.weight][0].nbytes for m in group)
            step = UNIT_BYTES // max(4096, largest)
            yield from (group[at : at + step] for at in range(0, len(group), step))

    def proved_together(self, modules: Sequence[Module], packed: Mapping[str, PackedWeight]) -> bool:
        """Whether whole modules of one key are proved at once; False if one of them must be looked at alone."""
        w, source_scales = self.stacked(modules)
        try:
            whole = PackedWeight.concat(packed[m.name] for m in modules)
            packing.verify_rows(whole, w, scale=source_scales, prune=pruning.bind(self.options.prune, w.shape))
        except SlideSparseError:
            return False
        return True

    def dense_item(self, module: Module) -> Item:
        def make(first: int, last: int) -> Iterator[Piece]:
            q, scale = self.stored_rows(module, first, last)
            if len(bad := violations(q, self.options.pattern)):
                raise _Broken(module, first + int(bad[0][0]), int(bad[0][1]))
            yield from dense_pieces(module.name, q, scale, first)
            release_rows(self.checkpoint, module, first, last)

        return Item(
            module.name, dense_entries(module.name, module.scheme, module.shape), *extent(self.checkpoint, module), make
        )

    # ---- proof

    def prove(self, written: Checkpoint, modules: list[Module], run: Run, add: Callable[[int], None]) -> None:
        """Prove every packed module of `written` against the source, and every other tensor equal to it."""
        packed = read_packed(written)
        made = {module.name: [entry[0] for entry in self.item(module).entries] for module in modules}
        proved: set[str] = set()
        for batch in self.batches(modules) if self.options.format == "packed" else ():
            if self.proved_together(batch, packed):
                proved.update(module.name for module in batch)

        def done(module: Module) -> None:
            for name in made[module.name]:
                written.release(name)
            add(sum(self.checkpoint.tensors[name][0].nbytes for name in module.replaced))

        def one(rows: _Rows) -> None:
            self.prove_rows(rows[0], self.written_rows(written, packed, *rows), *rows[1:])
            release_rows(self.checkpoint, *rows)

        for module in modules:
            if module.name in proved:
                done(module)
        for (module, _, last), _ in self._each([m for m in modules if m.name not in proved], one, run):
            if last == module.shape[0]:
                done(module)
        replaced = [name for module in modules for name in module.replaced]
        prove_copies(written, self.checkpoint, replaced, (name for names in made.values() for name in names), add)

    def written_rows(
        self, written: Checkpoint, packed: dict[str, PackedWeight], module: Module, first: int, last: int
    ) -> PackedWeight:
        """Rows of a module as they were written, in packed form whatever the format."""
        if self.options.format == "packed":
            return packed[module.name].rows(first, last)
        q = written.array(module.weight)[first:last]
        scale = None if not module.scheme.scaled else written.array(f"{module.name}.weight_scale")[first:last]
        try:
            return packing.pack_rows(q, scale, self.options.pattern, module.scheme, first_row=first)
        except PatternError as error:
            raise VerificationError(f"{module.weight}: the output breaks the pattern: {error}") from None

    def prove_rows(self, module: Module, block: PackedWeight, first: int, last: int) -> None:
        try:
            packing.verify_rows(
                block,
                self.checkpoint.array(module.weight)[first:last],
                scale=source_scale(self.checkpoint, module, first, last),
                prune=self.pruning(module).rows(slice(first, last)),
                first_row=first,
            )
        except VerificationError as error:
            raise VerificationError(f"{module.weight}: {error}") from None
