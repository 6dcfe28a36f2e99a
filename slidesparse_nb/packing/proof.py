"""verify(packed, w): a proof that a packed weight is canonical and equals its source, by other means than packed it.

What was packed is unpacked again, and every value compared with what NumPy and ml_dtypes make of the source by the definition;
which weights were pruned is told from their ranks in the group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import prune as pruning
from ..core import reference
from ..core.checks import check_weights, infinite, require_finite, row_scales
from ..core.dtypes import DType
from ..core.packed import PackedWeight, part_arrays, require_packed
from ..core.pattern import Pattern
from ..core.prune import NOTHING, Pruning
from ..core.reference import TINY, compress, decompress, in_groups, nibbles, nonzero_units, unpack_nibbles, window_index
from ..cpu import kernels, threads
from ..errors import FormatError, OperandError, PatternError, VerificationError
from .experts import each, of_expert

Array = NDArray[Any]


def verify(
    packed: PackedWeight,
    w: Array | None = None,
    *,
    scale: Array | float | None = None,
    prune: str | Array = "none",
    seed: int | None = 0,
    statistics: Array | None = None,
    max_workers: int | None = None,
) -> None:
    """Prove that `packed` is what `pack` makes.

    Without w: dtypes, shapes and order of indices; no NaN, infinity or -0.0; unused slots hold +0; and each value stands in the
    window that format and greedy assignment give it. With w also: every stored value is the weight, quantized with a scale that
    is absmax / t of the weights kept; every weight that is zero though its source is not was pruned, as `prune` demands.

    Args:
        packed: arrays are NumPy's.
        w, scale, prune, statistics: as they were given to `pack`.
        seed: as given to `pack`; None if it is not known: prune="random" may then have dropped any weights of a group, but no
            more than the pattern demands.

    Raises:
        FormatError: a tensor has the wrong dtype or shape, an index is out of order, a scale negative or not finite.
        VerificationError: anything else that is not as `pack` makes it.
        OperandError: packed is no PackedWeight; w, scale, prune, seed or statistics are nothing that could have been packed.
    """
    require_packed(packed).validate()
    if not isinstance(packed.values, np.ndarray):
        raise OperandError(
            f"packed: arrays are {type(packed.values).__name__}; verify needs NumPy arrays, bring it to the host"
        )
    if packed.lead:
        _verify_experts(packed, w, seed, {"scale": scale, "prune": prune, "statistics": statistics}, max_workers)
        return
    scales: Array | None = None
    method = NOTHING
    if w is not None:
        w = check_source(packed, w)
        scales = row_scales(w, scale)
        method = pruning.bind(prune, w.shape, None if seed is None else pruning.check_seed(seed), statistics)

    def block(rows: slice) -> None:
        verify_rows(
            packed.rows(rows.start, rows.stop),
            None if w is None else w[rows],
            scale=None if scales is None else scales[rows],
            prune=method.rows(rows),
            first_row=rows.start,
        )

    for _ in threads.over_blocks(block, packed.n, packed.k, max_workers):
        pass


def _verify_experts(
    packed: PackedWeight, w: Array | None, seed: int | None, given: dict[str, Any], max_workers: int | None
) -> None:
    """`verify` for a weight with leading dimensions."""
    if w is not None and getattr(w, "shape", packed.shape) != packed.shape:
        raise VerificationError(f"packed: shape {packed.shape} is not {w.shape}, that of w")
    count = packed.lead[0]

    def expert(i: int) -> None:
        own = {name: of_expert(name, value, i, count) for name, value in given.items()}
        own["seed"] = None if seed is None else pruning.check_seed(seed) + i
        verify(packed[i], None if w is None else w[i], **own, max_workers=max_workers)

    each(count, expert)


def verify_rows(
    packed: PackedWeight,
    w: Array | None = None,
    *,
    scale: Array | float | None = None,
    prune: Pruning = NOTHING,
    first_row: int = 0,
) -> None:
    """`verify` for a block of rows, on one thread: `packed` and w are rows first_row ... of the whole, as errors name them."""
    packed.validate(first_row=first_row)
    q = canonical(packed, first_row)
    if w is None:
        return
    w = check_source(packed, w)
    require_finite(w, first_row)
    if packed.scheme.blocks:
        row_scales(w, scale, first_row)
        _equals_reference(packed, w, prune, first_row)
        return
    weights = w.astype(np.float32)
    mask = np.array(packed.dtype.nonzero_mask, packed.dtype.raw)
    stored = q.view(packed.dtype.raw)
    kept = (stored & mask) != 0
    if w.dtype == packed.dtype.numpy:
        wanted, wanted_scale = w, row_scales(w, scale, first_row)
    elif not packed.scheme.scaled:
        with np.errstate(over="ignore"):  # what is infinite is no stored value, and said below
            wanted, wanted_scale = weights.astype(packed.dtype.numpy), None
    else:
        row_scales(w, scale, first_row)
        wanted, wanted_scale = quantized(weights, kept, packed.dtype)
    if wanted_scale is not None and not (same := wanted_scale == packed.scale).all():
        row = int(np.flatnonzero(~same)[0])
        raise VerificationError(
            f"packed.scale: {packed.scale[row, 0]!s} at row {first_row + row} is not {wanted_scale[row, 0]!s}, the source's"
        )
    bits = np.ascontiguousarray(wanted).view(packed.dtype.raw)
    if (wrong := kept & (bits != stored)).any():
        row, column = map(int, np.argwhere(wrong)[0])
        raise VerificationError(
            f"packed.values: {q[row, column]} for row {first_row + row}, column {column} is not {wanted[row, column]},"
            f" what w = {w[row, column]} is stored as"
        )
    lost = ~kept & ((bits & mask) != 0)
    illegal = _illegal(lost, kept, weights, packed.pattern, prune, first_row)
    if illegal.any():
        row, column = map(int, np.argwhere(illegal)[0])
        how = "the scores" if prune.name == "scores" else f"prune={prune.name!r}" if prune.seed is not None else "pruning"
        state = "kept" if kept[row, column] else "lost"
        raise VerificationError(
            f"packed.values: w = {w[row, column]} at row {first_row + row}, column {column} was {state},"
            f" but at pattern {packed.pattern} {how} would not have {state} it"
        )


def check_source(packed: PackedWeight, w: Array) -> Array:
    """w as a plain NumPy array, or an error unless it may be the source of `packed`."""
    w = check_weights(w)
    if w.shape != packed.shape:
        raise VerificationError(f"packed: shape {packed.shape} is not {w.shape}, that of w")
    if w.dtype.itemsize == 1 and w.dtype != packed.dtype.numpy:
        raise VerificationError(f"packed: {packed.dtype} values cannot come from {w.dtype} weights, which keep their type")
    return w


def canonical(packed: PackedWeight, first_row: int = 0) -> Array:
    """The dense stored values [n, k], or VerificationError unless the packed form is the one that `pack` would give them.

    Values with block scales are those of `unpack`; the window of each is taken for granted, since the weights gave it.
    """
    if packed.scheme.blocks:
        return _canonical_blocks(packed, first_row)
    dtype, pattern = packed.dtype, packed.pattern
    raw = packed.values.view(dtype.raw)
    if (bad := infinite(packed.values.view(dtype.numpy))) is not None:
        row, slot = map(int, np.argwhere(bad)[0])
        raise VerificationError(f"packed.values: NaN or infinity at row {first_row + row}, window {slot // 2}")
    if packed.scale is not None and (minus := np.signbit(packed.scale[:, 0])).any():
        raise VerificationError(f"packed.scale: -0.0 at row {first_row + int(np.flatnonzero(minus)[0])}, where pack writes 0.0")
    q = kernels.decompress(packed.values, packed.meta, pattern, packed.k, dtype)
    values, meta, _ = kernels.slide_compress(q, pattern)
    same = values.view(dtype.raw) == raw
    if not same.all() or not np.array_equal(meta, packed.meta):
        windows = ~in_groups(same, 2).all(axis=2)
        windows |= nibbles(meta) != nibbles(packed.meta)
        row, window = map(int, np.argwhere(windows)[0])
        raise VerificationError(
            f"packed: window {window} of row {first_row + row} (group {window // pattern.windows}) is not canonical:"
            " its values are not where left-to-right assignment puts them, or an unused slot does not hold +0"
        )
    return q


def _canonical_blocks(packed: PackedWeight, first_row: int) -> Array:
    """`canonical` of values with block scales."""
    unit = packed.pattern.unit
    values = unpack_nibbles(packed.values)
    again, meta = compress(decompress(values, packed.meta, unit), unit)
    windows = ~in_groups(again.view(np.uint8) == values.view(np.uint8), 2 * unit).all(axis=2)
    if (windows := windows | (nibbles(meta) != nibbles(packed.meta))).any():
        row, window = map(int, np.argwhere(windows)[0])
        raise VerificationError(
            f"packed: window {window} of row {first_row + row} (group {window // packed.pattern.windows}) is not canonical:"
            " its values are not where their zeros put them, or one is -0"
        )
    try:
        dense = unpack_blocks(packed, first_row, padded=True)
    except FormatError as error:
        raise VerificationError(str(error)) from None
    if (past := dense[:, packed.k :] != 0).any():
        row, column = map(int, np.argwhere(past)[0])
        raise VerificationError(
            f"packed.values: row {first_row + row} stores column {packed.k + column}, past k = {packed.k}; pack stores zeros"
        )
    return dense[:, : packed.k]


def _equals_reference(packed: PackedWeight, w: Array, prune: Pruning, first_row: int) -> None:
    """Raise VerificationError unless rows with block scales are, byte for byte, what `reference.pack` makes of w."""
    if prune.pruner is not None:
        if prune.pruner.seeded and prune.seed is None:
            raise VerificationError(
                f"packed: {packed.scheme} weights pruned at random cannot be told from those that rounded to zero; verify them"
                " with the seed they were packed with"
            )
        weights = w.astype(np.float32)
        score = None if prune.kernel == "magnitude" else prune.scores(weights, first_row)
        w = reference.prune(weights, packed.pattern, score)
    try:
        wanted = reference.pack(w, packed.pattern, packed.scheme)
    except PatternError as error:
        raise VerificationError(f"packed: cannot be what w packs to: {error}") from None
    for part, array in part_arrays(wanted).items():
        found = getattr(packed, part)
        if (wrong := found.view(np.uint8) != array.view(np.uint8)).any():
            row = int(np.argwhere(wrong)[0, 0])
            how = "" if prune.pruner is None else f", pruned by {'scores' if prune.name == 'scores' else repr(prune.name)}"
            raise VerificationError(f"packed.{part}: row {first_row + row} is not what the same row of w packs to{how}")


def unpack_blocks(packed: PackedWeight, first_row: int, *, padded: bool = False) -> Array:
    """`reference.unpack` of rows with block scales, those past k too if `padded`. FormatError: two windows store one column.

    Or one pair of columns.
    """
    values, unit = reference.stored_values(packed), packed.pattern.unit
    dense = reference.unslide(decompress(values, packed.meta, unit), packed.pattern, packed.pattern.padded_k(packed.k))
    if np.count_nonzero(nonzero_units(dense, unit)) != np.count_nonzero(nonzero_units(values, unit)):
        raise stored_twice(values, packed.meta, packed, first_row)
    return dense if padded else dense[:, : packed.k]


def stored_twice(values: Array, meta: Array, packed: PackedWeight, first_row: int) -> FormatError:
    """The error to raise for a block of packed weights, a row of which stores a column in two windows."""
    windows = packed.pattern.lift_index(packed.k).reshape(-1, 4, packed.pattern.unit)[:, :, 0]
    stored = nonzero_units(values, packed.pattern.unit)
    row, column = next(
        (row, int(columns[count > 1][0]))
        for row in range(values.shape[0])
        for at in [np.take_along_axis(windows, window_index(meta[row : row + 1])[0], axis=1).ravel()]
        for columns, count in [np.unique(at[stored[row]], return_counts=True)]
        if (count > 1).any()
    )
    return FormatError(
        f"packed: row {first_row + row} stores column {column} in two windows, as no packer does and no dense"
        " weight can hold; matmul adds up the two"
    )


def quantized(weights: Array, kept: Array, dtype: DType) -> tuple[Array, Array]:
    """What each weight would be stored as, and the scale, if the weights `kept` gave the row its absmax.

    A row of which nothing was kept has scale 1, and every weight that would have forbidden this stands as the largest value.
    """
    t = np.float32(dtype.largest)
    absmax = np.max(np.abs(weights), axis=1, keepdims=True, initial=0, where=kept)
    live = absmax >= TINY
    safe = np.where(live, absmax, np.float32(1))
    with np.errstate(over="ignore"):
        scaled = weights * (t / safe)
    if not live.all():
        scaled = np.where(live, scaled, np.where(np.abs(weights) >= TINY, t, np.float32(0)))
    if dtype.numpy.kind == "i":
        np.rint(scaled, out=scaled)
    return np.clip(scaled, -t, t, out=scaled).astype(dtype.numpy), np.where(live, safe / t, np.float32(1))


def _illegal(lost: Array, kept: Array, w: Array, pattern: Pattern, prune: Pruning, first_row: int) -> Array:
    """Which weights were lost that pruning keeps, or kept that it drops: bool [rows, k]."""
    if prune.pruner is None:
        return lost
    if prune.pruner.seeded and prune.seed is None:
        over = np.maximum(_padded_groups(w != 0, pattern).sum(axis=2) - pattern.nnz, 0)
        too_many = _padded_groups(lost, pattern).sum(axis=2) > over
        return np.asarray(lost & np.repeat(too_many, pattern.group, axis=1)[:, : w.shape[1]])
    if not lost.any() and not kernels.violations(w, pattern).size:
        return lost  # nothing had to go, nothing went
    dropped = lowest_two(prune.scores(w, first_row), pattern)
    return np.asarray((lost & ~dropped) | (kept & dropped))


def _padded_groups(a: Array, pattern: Pattern) -> Array:
    return in_groups(np.pad(a, ((0, 0), (0, -a.shape[1] % pattern.group))), pattern.group)


def lowest_two(score: Array, pattern: Pattern) -> Array:
    """The two elements of lowest score in every group, of equal ones the rightmost; columns past k count: bool [rows, k]."""
    rows, k = score.shape
    keys = np.full((rows, -(-k // pattern.group) * pattern.group), -(2**40), np.int64)
    keys[:, :k] = score.view(np.int32)
    keys *= pattern.group
    keys -= np.arange(keys.shape[1]) % pattern.group  # all keys of a group differ
    groups = in_groups(keys, pattern.group)
    lowest, second = groups[:, :, 0], np.full(groups.shape[:2], 2**62, np.int64)
    for j in range(1, pattern.group):
        second = np.minimum(second, np.maximum(lowest, groups[:, :, j]))
        lowest = np.minimum(lowest, groups[:, :, j])
    return (groups <= second[:, :, None]).reshape(keys.shape)[:, :k]
