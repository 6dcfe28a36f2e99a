"""Inverses of what architectures make of packed weights, to prove that nothing is lost. NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from slidesparse_nb.arch import sm80_layout, sm90_layout
from slidesparse_nb.core.packed import PackedWeight


def restore_sm80(arranged: Any, packed: PackedWeight) -> PackedWeight:
    """Inverse of arrange: the packed weight, whose pattern, shape, dtype and scale are taken from `packed`. NumPy."""
    lay = sm80_layout.layout(packed.pattern, packed.dtype.bits)
    blocks, row_tiles = arranged.shape[:2]
    arranged = arranged.transpose(1, 0, 2)
    fragments = np.ascontiguousarray(arranged[:, :, : 512 * lay.steps]).view(packed.dtype.raw)
    places = 16 if lay.bits == 8 else 8
    values = fragments.reshape(row_tiles, blocks, lay.steps, 8, 4, 2, 2, 32 // lay.bits).transpose(0, 6, 3, 1, 2, 5, 4, 7)
    values = values.reshape(16 * row_tiles, blocks, lay.steps, places, 2)
    pairs = arranged[:, :, 512 * lay.steps :]
    nibble = np.stack([pairs & 15, pairs >> 4], axis=3)
    if lay.bits == 8:
        nibble = nibble.reshape(row_tiles, blocks, lay.steps, 8, 2, 2, 8).transpose(0, 5, 3, 1, 2, 4, 6)
    else:
        nibble = nibble.reshape(row_tiles, blocks, lay.meta_words, 8, 2, 2, 2, 4).transpose(0, 6, 3, 1, 2, 4, 5, 7)
    stored_steps = lay.steps if lay.bits == 8 else 2 * lay.meta_words
    nibble = nibble.reshape(16 * row_tiles, blocks, stored_steps, places)[:, :, : lay.steps]

    order, swapped = sm80_layout.window_order(lay)
    back = np.argsort(order.ravel())
    nibble = np.where(swapped, sm80_layout.SWAPPED_NIBBLE[nibble], nibble)  # swapping twice changes nothing
    values = np.where((swapped & sm80_layout.SWAPPED_VALUES[nibble])[..., None], values[..., ::-1], values)
    n, have = packed.n, packed.ks // 4
    every = blocks * lay.windows
    nibble = nibble.reshape(16 * row_tiles, blocks, lay.windows)[:, :, back].reshape(16 * row_tiles, every)[:n, :have]
    values = values.reshape(16 * row_tiles, blocks, lay.windows, 2)[:, :, back].reshape(16 * row_tiles, every, 2)[:n, :have]
    meta = nibble[:, 0::2] | nibble[:, 1::2] << 4
    kept = np.ascontiguousarray(values).reshape(n, 2 * have).view(packed.dtype.numpy)
    return PackedWeight(kept, meta, packed.scale, packed.pattern, packed.shape, packed.scheme)


def restore_sm90(arranged: dict[str, Any], packed: PackedWeight) -> PackedWeight:
    """A packed weight with the same matrix; equal to `packed` where that stores no zeros, or has no compact metadata. NumPy."""
    size = packed.dtype.bits // 8
    values = arranged["values"]
    count, many = values.shape[:2]
    values = (
        values[:, :, sm90_layout.value_at(size)]
        .reshape(count, many, 64, 64)
        .transpose(1, 2, 0, 3)
        .reshape(64 * many, 64 * count)
    )
    compact, expanded = arranged.get("compact"), arranged.get("expanded")
    words = sm90_layout.expand(compact, packed.pattern, packed.dtype) if expanded is None else expanded
    if size == 1:
        meta = words.reshape(count, many, 4, 8, 2, 2, 2, 4).transpose(1, 2, 5, 3, 0, 4, 6, 7)
    else:
        meta = words.reshape(count, many, 4, 8, 2, 2, 2, 2).transpose(1, 2, 6, 3, 0, 4, 5, 7)
    meta = meta.reshape(64 * many, 16 // size * count)
    n, ks = packed.n, packed.ks
    stored = np.ascontiguousarray(values[:n, : ks // 2 * size]).view(packed.dtype.numpy)
    return PackedWeight(
        stored, np.ascontiguousarray(meta[:n, : ks // 8]), packed.scale, packed.pattern, packed.shape, packed.scheme
    )
