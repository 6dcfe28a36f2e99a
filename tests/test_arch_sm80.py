"""The arranged weights and the way activations are read, against a NumPy model of the `mma.sp` instruction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from arranged import restore_sm80

from slidesparse_nb import arch
from slidesparse_nb.arch import choose, for_capability, multiplied, sm80, sm80_layout
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT16, INT8, PACKED
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.errors import UnsupportedError

PATTERNS = known_patterns()
LANE = np.arange(32)
G, Q = LANE >> 2, LANE & 3


def weights(rng, n, k, pattern, dtype):
    w = reference.prune(rng.standard_normal((n, k)).astype(np.float32), pattern)
    return reference.pack(w, pattern, dtype)


# ---- the instruction, from the tables of the PTX ISA -----------------------------------------------------------------


def mma_sp(a, e, b, dtype, selector):
    """D [16, 8] of one m16n8k64 (8-bit) or m16n8k32 (16-bit): a [32, 4], e [32], b [32, 4] are the lanes' registers."""
    per = 32 // dtype.bits  # elements of one register
    k = 16 * per
    dense, kept = np.zeros((16, k)), np.zeros((16, k // 2))
    a = np.ascontiguousarray(a).view(dtype.numpy).reshape(32, 4, per).astype(np.float64)
    b = np.ascontiguousarray(b).view(dtype.numpy).reshape(32, 4, per).astype(np.float64)
    activations, nibble = np.zeros((8, k)), np.zeros((16, k // 4), int)
    for lane in range(32):
        g, q = G[lane], Q[lane]
        for r in range(4):
            for i in range(per):
                kept[g + 8 * (r & 1), 4 * per * (r >> 1) + per * q + i] = a[lane, r, i]
                activations[g, 4 * per * r + per * q + i] = b[lane, r, i]
        word = int(e[lane])
        for j in range(8):
            if dtype.bits == 8:
                nibble[g + 8 * (q & 1), 8 * (q >> 1) + j] = word >> 4 * j & 15
            elif q >> 1 == selector:
                nibble[g + 8 * (j >> 2), 4 * (q & 1) + (j & 3)] = word >> 4 * j & 15
    for row in range(16):
        for window in range(k // 4):
            i0, i1 = nibble[row, window] & 3, nibble[row, window] >> 2
            assert i0 < i1
            dense[row, 4 * window + i0] = kept[row, 2 * window]
            dense[row, 4 * window + i1] = kept[row, 2 * window + 1]
    return dense @ activations.T


# ---- the kernel's inner loop -----------------------------------------------------------------------------------------


def lifted(words, layout, step):
    """The four B registers of every lane: words uint32 [32, words] -> uint32 [32, 4]."""
    units = sm80_layout.slot_units(layout)
    out = np.zeros((32, 4), np.uint32)
    for register in range(4):
        unit = units[4 * step + register]
        low = words[:, unit // 2]
        if unit % 2 == 0:
            out[:, register] = low
            continue
        high = words[:, unit // 2 + 1]
        if layout.bits == 8:
            out[:, register] = low >> 16 | high << 16  # __byte_perm(low, high, 0x5432)
        else:
            backwards = (Q >> 1 == 1) & layout.mirrored
            out[:, register] = np.where(np.where(backwards, Q & 1, 1 - (Q & 1)), high, low)
    return out


def simulated(x, arranged, packed, instruction=mma_sp):
    """x [8, k] @ w.T in float64, by the kernel's steps in the kernel's order."""
    layout = sm80_layout.layout(packed.pattern, packed.dtype.bits)
    blocks, strips = arranged.shape[:2]
    rows = np.zeros((8, blocks * layout.row_bytes), np.uint8)
    raw = np.ascontiguousarray(x).view(np.uint8)
    rows[:, : raw.shape[1]] = raw
    acc = np.zeros((strips, 16, 8))
    offsets = sm80_layout.word_offsets(layout)
    for block in range(blocks):
        row = np.ascontiguousarray(rows[:, block * layout.row_bytes : (block + 1) * layout.row_bytes]).view(np.uint32)
        words = row[G[:, None], offsets[Q] // 4]
        for strip in range(strips):
            piece = arranged[block, strip]
            a = piece[: 512 * layout.steps].view(np.uint32).reshape(layout.steps, 32, 4)
            e = piece[512 * layout.steps :].view(np.uint32).reshape(layout.meta_words, 32)
            for step in range(layout.steps):
                word, selector = (step, 0) if layout.bits == 8 else (step // 2, step % 2)
                acc[strip] += instruction(a[step], e[word], lifted(words, layout, step), packed.dtype, selector)
    return acc.reshape(-1, 8)[: packed.n].T


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_arranged_weights_through_the_instruction(pattern, dtype):
    rng = np.random.default_rng(1)
    layout = sm80_layout.layout(pattern, dtype.bits)
    for n, k in ((19, layout.columns + 3), (16, 2 * pattern.group - 1)):
        packed = weights(rng, n, k, pattern, dtype)
        x = (rng.integers(-127, 128, (8, k)) if dtype is INT8 else rng.standard_normal((8, k))).astype(dtype.numpy)
        want = x.astype(np.float64) @ reference.unpack(packed).astype(np.float64).T
        got = simulated(x, sm80_layout.arrange(packed), packed)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_word_and_window_has_one_owner(pattern, dtype):
    layout = sm80_layout.layout(pattern, dtype.bits)
    order, swapped = sm80_layout.window_order(layout)
    assert sorted(order.ravel()) == list(range(layout.windows))
    assert swapped.any() == (dtype.bits == 16 and pattern.group > 4)
    offsets = sm80_layout.word_offsets(layout)
    assert len({int(o) for o in offsets.ravel()}) == offsets.size  # nobody reads a word twice ...
    assert sorted(offsets.ravel()) == list(range(0, layout.row_bytes, 4))  # ... and every word is read


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 131), (33, 512), (0, 64), (5, 0)])
def test_restore_undoes_arrange(pattern, dtype, n, k):
    packed = weights(np.random.default_rng(3), n, k, pattern, dtype)
    layout = sm80_layout.layout(pattern, dtype.bits)
    arranged = sm80_layout.arrange(packed)
    assert arranged.shape == (layout.blocks(k), -(-n // 256) * 16, layout.block_bytes)
    assert arranged.dtype == np.uint8
    back = restore_sm80(arranged, packed)
    back.validate()
    assert (back.values.view(dtype.raw) == packed.values.view(dtype.raw)).all()
    assert (back.meta == packed.meta).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_layouts(pattern, bits):
    layout = sm80_layout.layout(pattern, bits)
    assert sm80_layout.bank_conflicts(layout) == 0
    assert layout.windows == 4 * layout.steps * layout.owners
    assert layout.columns % pattern.group == 0
    assert layout.stride % 16 == 0
    assert layout.row_bytes <= layout.stride < 2 * layout.row_bytes
    assert layout.block_bytes % 128 == 0


def test_bank_model_sees_conflicts():
    """A row of 128 bytes and no padding puts all eight tokens on the same banks."""
    layout = sm80_layout.layout(Pattern(6, 8), 16)
    bad = replace(layout, stride=128)
    assert sm80_layout.bank_conflicts(bad) == 8 * 7


def test_what_is_refused():
    with pytest.raises(UnsupportedError, match="no sparse tensor cores"):
        for_capability((7, 5))
    with pytest.raises(UnsupportedError, match=r"need compute capability 8\.9"):
        choose(GemmProblem.of((1, 8, 8, "6:8", "fp8", "float32"), Device((8, 6), 84)))
    with pytest.raises(UnsupportedError, match="wider than 16"):
        sm80_layout.layout(Pattern(30, 32), 8)
    assert [scheme.dtype for scheme in multiplied(sm80.ARCH, (8, 0))] == [INT8, BFLOAT16, FLOAT16]
    assert for_capability((12, 0)) is sm80.ARCH


# ---- tiles and their choice --------------------------------------------------------------------------------------------

CAPABILITIES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), (99, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_candidate_fits_its_device(capability):
    limit = sm80.sm_of(capability).block_shared
    for scheme in multiplied(sm80.ARCH, capability):
        for pattern in PATTERNS:
            found = list(sm80.ARCH.kernels(pattern, scheme, "float32", capability))
            assert any(c.tile.m == 8 for c in found)
            for config in found:
                assert config.shared_bytes <= limit
                assert 2 <= config.stages <= sm80.MOST_STAGES
                assert config.tile.n <= 16 * sm80_layout.ROW_TILES
                assert config.threads <= 1024
                assert set(config.defines()) >= {"DTYPE", "OUT", "GROUP", "TILE_N", "TILE_M", "STAGES"}


def test_the_choice_is_the_cheapest_and_says_what_it_is():
    problem = GemmProblem(16, 3584, 18944, Pattern(6, 8), INT8, "bfloat16", Device((9, 0), 132, portable=True))
    (chosen,), every = choose(problem), list(sm80.ARCH.candidates(problem))
    assert (chosen,) in every
    assert sm80.ARCH.cost((chosen,), problem) == min(sm80.ARCH.cost(way, problem) for way in every)
    assert {replace(config, splits=1) for (config,) in every} == set(
        sm80.ARCH.kernels(Pattern(6, 8), Scheme.of(INT8), "bfloat16", (9, 0))
    )
    assert chosen.splits > 1  # 56 tiles at most for 132 SMs
    assert chosen.counters(problem) == chosen.tiles(16, 3584)
    assert chosen.part_bytes(problem) == chosen.splits * chosen.tiles(16, 3584) * chosen.tile.m * chosen.tile.n * 4
    assert chosen.arguments(problem) == {"blocks": 148}
    assert str(chosen) == (
        f"{chosen.tile.m} tokens x {chosen.tile.n} outputs, {chosen.tile.warps_m} x {chosen.tile.warps_n} warps,"
        f" {chosen.stages} stages of 128 columns, split-K {chosen.splits}"
    )
    (large,) = choose(replace(problem, m=4096, n=37888, k=3584))
    assert large.splits == 1
    assert large.tile.m * large.tile.n >= 128 * 128


GEFORCE, PROFESSIONAL = "NVIDIA GeForce RTX of some year", "NVIDIA RTX PRO of some year"


@pytest.mark.parametrize(
    ("capability", "name", "int8", "fp8", "bf16"),
    [
        ((8, 0), "NVIDIA A100", 2, None, 2),
        ((8, 6), GEFORCE, 4, None, 8),
        ((8, 6), PROFESSIONAL, 4, None, 4),
        ((8, 9), GEFORCE, 4, 8, 8),
        ((8, 9), "", 4, 8, 8),
        ((8, 9), PROFESSIONAL, 4, 4, 4),
        ((9, 0), "NVIDIA H200", 2, 40, 2),
        ((12, 0), GEFORCE, 4, 4, 8),
        ((12, 0), PROFESSIONAL, 4, 4, 4),
        ((12, 1), "NVIDIA GB10", 4, 4, 4),
    ],
)
def test_clocks_of_an_instruction(capability, name, int8, fp8, bf16):
    """Of its fastest form; plain float8 is at half rate where bfloat16 is, and so int8 is preferred."""
    device = Device(capability, 84, name)
    for scheme, clocks in (("int8", int8), ("fp8", fp8), ("bf16", bf16)):
        found = list(sm80.ARCH.kernels(Pattern(6, 8), Scheme.of(scheme), "bfloat16", capability))
        if clocks is None:
            assert sm80.ARCH.refuses(capability, Scheme.of(scheme))
            continue
        assert {config.block_scaled for config in found} == (
            {True, False} if fp8 and scheme == "fp8" and capability[0] == 12 else {False}
        )
        for config in found:
            plain = bf16 if scheme == "fp8" and capability[0] == 12 else clocks
            assert config.mma_clocks(device) == (clocks if config.block_scaled else plain)
    assert ("prefer int8" in arch.advice(replace(device, portable=True))) == bool(fp8 and fp8 > int8)


def test_float8_takes_the_instruction_with_block_scales():
    for name, m in ((GEFORCE, 4096), (GEFORCE, 16), (PROFESSIONAL, 4096), ("NVIDIA GB10", 1)):
        device = Device((12, 1) if "GB10" in name else (12, 0), 84, name)
        problem = GemmProblem.of((m, 3584, 3584, "6:8", "fp8", "bfloat16"), device)
        (chosen,) = choose(problem)
        assert chosen.block_scaled
        assert (chosen.suffix, chosen.defines()["BLOCK_SCALED"]) == ("a", 1)
        assert "block-scaled MMA" in str(chosen)
        plain = replace(chosen, block_scaled=False)
        assert (plain,) in list(sm80.ARCH.candidates(problem)), "which serves where the other fails its test"
        assert (plain.suffix, "BLOCK_SCALED" in plain.defines()) == ("", False)
        assert sm80.ARCH.cost((plain,), problem) >= sm80.ARCH.cost((chosen,), problem)


@pytest.mark.parametrize("m", [1, 17, 100000])
def test_there_is_a_choice_for_every_shape(m):
    for n, k in ((1, 1), (5, 0), (100000, 7), (3, 100000)):
        for dtype in PACKED:
            (config,) = choose(GemmProblem(m, n, k, Pattern(14, 16), dtype, "float32", Device((12, 0), 188)))
            assert 1 <= config.splits <= max(1, config.layout.blocks(k) // 2)
