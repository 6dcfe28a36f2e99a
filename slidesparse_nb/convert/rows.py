"""The rows of packed modules: made of a dense checkpoint, block by block, and proved against it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from .. import packing
from ..checkpoint import Checkpoint, packed_entries, read_packed
from ..core import prune as pruning
from ..core.packed import PackedWeight
from ..core.prune import Pruning
from ..cpu.kernels import violations
from ..errors import OperandError, PatternError, SlideSparseError, UnsupportedError, VerificationError
from ..packing import violations_hint
from .layout import Item, Piece, dense_item, row_ranges
from .module import Module
from .options import UNIT_BYTES, Options, Run
from .proof import prove_copies, prove_dequantized

SMALL = 2**16
"""Bytes of a source weight up to which modules are packed and proved several at a time."""

SKIP = "or leave such modules dense with --skip-bad"
"""Advice that follows why a module cannot be packed, where `skip_bad` is not given."""


def _packed_pieces(module: Module, block: PackedWeight, first: int) -> Iterator[Piece]:
    """The tensors of a packed module, rows from `first` on."""
    shape = f"{module.name}.weight_shape"
    for name, array in block.tensors(module.name).items():
        if name != shape:
            yield name, first * array.shape[1] * array.itemsize, array
    if first == 0:
        yield shape, 0, np.array(module.shape, np.int64)


_Rows = tuple[Module, int, int]
"""A module of one matrix, or one expert, and its rows first to last - 1."""
T = TypeVar("T")


class Broken(PatternError):
    """Rows of a module break the pattern; several threads may find some, and one is explained in the end."""

    def __init__(self, module: Module, row: int, group: int) -> None:
        super().__init__(module.weight, row=row, group=group)
        self.module = module


@dataclass(frozen=True)
class Maker:
    """Makes the rows of packed modules out of a dense checkpoint."""

    checkpoint: Checkpoint
    options: Options
    by_name: dict[str, Module] = field(default_factory=dict)

    @property
    def advice(self) -> str:
        """What follows why a module cannot be packed."""
        return "" if self.options.skip_bad else f", {SKIP}"

    # ---- rows

    def stored_rows(self, module: Module, first: int, last: int) -> tuple[Any, Any]:
        """Rows pruned and quantized, and their scales; not yet checked against the pattern."""
        try:
            return packing.store_rows(
                module.dense_rows(self.checkpoint, first, last),
                self.options.pattern,
                module.scheme,
                scale=module.scales(self.checkpoint, first, last),
                prune=self.pruning(module).rows(slice(first, last)),
                first_row=first,
            )
        except OperandError as error:
            raise UnsupportedError(f"{module.label}: {error}{self.advice}") from None

    def pruning(self, module: Module) -> Pruning:
        """Every matrix has its own statistics, and draws its own random numbers, whatever the order of work."""
        own = f"{module.name}{module.place}"
        seed = int.from_bytes(hashlib.sha256(f"{self.options.seed} {own}".encode()).digest()[:8], "little")
        statistics = self.options.statistics.get(module.name)
        try:
            if module.whole is not None and statistics is not None:
                statistics = packing.of_expert("statistics", statistics, module.expert, module.whole.count)
            return pruning.bind(self.options.prune, module.shape, seed, statistics)
        except OperandError as error:
            raise OperandError(f"{own}: {error}") from None

    def packed_rows(self, module: Module, first: int, last: int) -> PackedWeight:
        """Rows first..last-1 of all its matrices, packed. Raises Broken."""
        if module.stacked is not None and module.whole is None:
            blocks = [self.packed_rows(*part) for part in module.cut(first, last)]
            return blocks[0] if len(blocks) == 1 else PackedWeight.concat(blocks)
        q, scale = self.stored_rows(module, first, last)
        try:
            return packing.pack_rows(q, scale, self.options.pattern, module.scheme, first_row=first)
        except PatternError as error:
            raise Broken(module, error.row, error.group) from None

    def explain(self, broken: Broken, *, alone: bool = True) -> PatternError:
        """The error for a user: tensor and place, how many groups violate the pattern, what the weights look like instead.

        `alone`: with advice; False for one of many.
        """
        module, row, group = broken.module, broken.row, broken.group
        pattern, (n, k) = self.options.pattern, module.shape
        count = 0
        for first, last in row_ranges(*module.extent, UNIT_BYTES):
            count += len(violations(self.stored_rows(module, first, last)[0], pattern))
            module.release(self.checkpoint, first, last)
        column, groups = group * pattern.columns, n * -(-k // pattern.columns)
        hint = violations_hint(module.dense_array(self.checkpoint), pattern)
        return PatternError(
            f"{module.label}: row {row}, group {group} (columns {column} to {min(column + pattern.columns, k) - 1}) has more"
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
        add = run.counter("checking", sum(m.nbytes for m in modules))
        broken: dict[str, Broken] = {}

        def one(rows: _Rows) -> SlideSparseError | None:
            try:
                self.packed_rows(*rows)
            except (Broken, UnsupportedError) as error:
                return error
            finally:
                rows[0].release(self.checkpoint, *rows[1:])
            return None

        for (module, first, last), error in self._each(modules, one, run):
            if isinstance(error, Broken):
                broken.setdefault(module.name, error)
            elif error is not None:
                refused.setdefault(module.name, str(error))
            add((last - first) * module.row_bytes)
        refused |= {name: str(self.explain(error, alone=False)) for name, error in broken.items() if name not in refused}
        return refused

    def over(self, modules: list[Module], run: Run) -> tuple[int, int]:
        """How many groups of the source have too many non-zeros, before any pruning; and how many there are."""
        pattern = self.options.pattern
        add = run.counter("counting", sum(m.nbytes for m in modules))
        over = groups = 0
        count = lambda rows: len(violations(rows[0].dense_rows(self.checkpoint, *rows[1:]), pattern))  # noqa: E731
        for (module, first, last), found in self._each(modules, count, run):
            over, groups = over + found, groups + (last - first) * -(-module.k // pattern.columns)
            module.release(self.checkpoint, first, last)
            add((last - first) * module.row_bytes)
        return over, groups

    def _each(self, modules: list[Module], work: Callable[[_Rows], T], run: Run) -> Iterator[tuple[_Rows, T]]:
        """Call `work` on ranges of rows of the modules, several at a time; the ranges and results in order.

        A range is small enough for a core's cache, and small modules share a task: a thread's turn costs more than they do.
        """
        tasks: list[list[_Rows]] = []
        filled = UNIT_BYTES
        for module in (matrix for each in modules for matrix in each.matrices()):
            for first, last in row_ranges(*module.extent, UNIT_BYTES):
                if filled >= UNIT_BYTES:
                    tasks.append([])
                    filled = 0
                tasks[-1].append((module, first, last))
                filled += max(4096, (last - first) * module.row_bytes)
        with ThreadPoolExecutor(run.workers) as pool:
            for task, results in zip(tasks, pool.map(lambda task: [work(rows) for rows in task], tasks), strict=True):
                yield from zip(task, results, strict=True)

    def warm_up(self, module: Module) -> None:
        """Compile what packing calls, so that its rate is not that of the compiler."""
        with contextlib.suppress(SlideSparseError):
            self.packed_rows(module, 0, min(1, module.n))

    # ---- items

    def item(self, module: Module) -> Item:
        return self.packed_item(module) if self.options.format == "packed" else self.dense_item(module)

    def packed_item(self, module: Module) -> Item:
        def make(first: int, last: int) -> Iterator[Piece]:
            yield from _packed_pieces(module, self.packed_rows(module, first, last), first)
            for matrix, *rows in module.cut(first, last):
                matrix.release(self.checkpoint, *rows)

        def together(items: Sequence[Item]) -> list[Iterable[Piece]]:
            return [
                list(_packed_pieces(m, block, 0)) for m, block in self.packed_together([self.by_name[i.name] for i in items])
            ]

        self.by_name[module.name] = module
        entries = tuple(packed_entries(module.name, self.options.pattern, module.scheme, module.shape))
        return Item(module.name, entries, *module.extent, make, key=self.key(module), together=together)

    # ---- many small modules

    def key(self, module: Module) -> object:
        """Modules of one key can be packed and proved as one matrix, row below row; None for those that are made alone."""
        small = module.stacked is None and module.nbytes <= SMALL and pruning.by_row(self.options.prune)
        return (module.k, module.code, module.scheme.name) if small else None

    def stacked(self, modules: Sequence[Module]) -> tuple[Any, Any]:
        """Their source weights row below row, and the scales of all rows (None for unquantized weights)."""
        scales = [m.scales(self.checkpoint, 0, m.n) for m in modules]
        weights = np.concatenate([self.checkpoint.array(m.weight) for m in modules])
        if scales[0] is None:
            return weights, None
        rows = [np.broadcast_to(np.reshape(s, (-1, 1)), (m.n, 1)) for s, m in zip(scales, modules, strict=True)]
        return weights, np.concatenate([np.asarray(r, np.float32) for r in rows])

    def packed_together(self, modules: Sequence[Module]) -> Iterator[tuple[Module, PackedWeight]]:
        """Whole modules of one key, packed. Raises SlideSparseError if one of them cannot be."""
        w, scale = self.stacked(modules)
        pattern, scheme = self.options.pattern, modules[0].scheme
        q, scale = packing.store_rows(w, pattern, scheme, scale=scale, prune=pruning.bind(self.options.prune, w.shape))
        whole, first = packing.pack_rows(q, scale, pattern, scheme), 0
        for module in modules:
            yield module, whole.rows(first, first := first + module.n)
            module.release(self.checkpoint, 0, module.n)

    def batches(self, modules: Sequence[Module]) -> Iterator[list[Module]]:
        """Modules of one key, at most UNIT_BYTES of their sources at a time."""
        groups: dict[object, list[Module]] = {}
        for module in modules:
            if (key := self.key(module)) is not None:
                groups.setdefault(key, []).append(module)
        for group in groups.values():
            largest = max(m.nbytes for m in group)
            step = max(1, UNIT_BYTES // max(4096, largest))
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
        def rows(matrix: Module, first: int, last: int) -> tuple[Any, Any]:
            q, scale = self.stored_rows(matrix, first, last)
            if len(bad := violations(q, self.options.pattern)):
                raise Broken(matrix, first + int(bad[0][0]), int(bad[0][1]))
            matrix.release(self.checkpoint, first, last)
            return q, scale

        return dense_item(module, module.row_bytes, rows)

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
            rows[0].release(self.checkpoint, *rows[1:])

        for module in modules:
            if module.name in proved:
                done(module)
        for (module, _, last), _ in self._each([m for m in modules if m.name not in proved], one, run):
            if last == module.n and (module.whole is None or module.expert == module.whole.count - 1):
                done(module)
        replaced = [name for module in modules for name in module.replaced]
        prove_copies(written, self.checkpoint, replaced, (name for names in made.values() for name in names), add)

    def written_rows(
        self, written: Checkpoint, packed: dict[str, PackedWeight], module: Module, first: int, last: int
    ) -> PackedWeight:
        """Rows of a matrix as they were written, in packed form whatever the format."""
        if self.options.format == "packed":
            return module.packed_matrix(packed[module.name]).rows(first, last)
        q, scale = np.ascontiguousarray(module.dense_rows(written, first, last)), None
        if module.scheme.scaled:
            if module.stacked is None:
                scale = written.array(f"{module.name}.weight_scale")[first:last]
            else:  # of dequantized weights, the values and scales that they must come from
                dense, (q, scale) = q, self.stored_rows(module, first, last)
                prove_dequantized(module.label, dense, q, scale, first)
        try:
            return packing.pack_rows(q, scale, self.options.pattern, module.scheme, first_row=first)
        except PatternError as error:
            raise VerificationError(f"{module.label}: the output breaks the pattern: {error}") from None

    def prove_rows(self, module: Module, block: PackedWeight, first: int, last: int) -> None:
        try:
            packing.verify_rows(
                block,
                module.dense_rows(self.checkpoint, first, last),
                scale=module.scales(self.checkpoint, first, last),
                prune=self.pruning(module).rows(slice(first, last)),
                first_row=first,
            )
        except VerificationError as error:
            raise VerificationError(f"{module.label}: {error}") from None
