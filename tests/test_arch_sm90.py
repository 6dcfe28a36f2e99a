"""Hopper's layouts and choices: a model of wgmma.sp multiplies the layouts of arrange and to_tiles."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arranged import restore_sm90

from slidesparse_nb.arch import (
    asked_for,
    choose,
    common,
    for_capability,
    modelled,
    multiplied,
    sm80,
    sm90,
    sm90_launch,
    sm90_layout,
)
from slidesparse_nb.arch.operand import from_tiles, stages, to_tiles
from slidesparse_nb.arch.sm90_layout import arrange, expand
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED, DType
from slidesparse_nb.core.packed import PackedWeight
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import Scheme

HOPPER = (9, 0)
DEVICE = Device(HOPPER, 132, portable=False)


def packed_weight(rng: np.random.Generator, n: int, k: int, pattern: Pattern, dtype: DType, full: bool = False) -> PackedWeight:
    """Small integers; `full`: as many non-zeros as the pattern allows."""
    w = rng.integers(-9, 10, (n, k)).astype(np.float32)
    w = reference.prune(np.where(w == 0, 1, w) if full else w, pattern).astype(dtype.numpy)
    return reference.pack(w, pattern, dtype, scale=np.ones((n, 1), np.float32) if dtype.bits == 8 else None)


def instruction(values: np.ndarray, words: np.ndarray, step: int, dtype: DType) -> np.ndarray:
    """The 64 x k matrix that instruction `step` of a stage reads as its sparse operand, thread by thread (PTX ISA)."""
    size, row, byte = dtype.bits // 8, np.arange(64)[:, None], np.arange(64)
    kept = values[row * 64 + (byte ^ (row // 2 % 4 * 16))].view(dtype.numpy).astype(np.float64)
    kept = kept[:, step * 32 // size : (step + 1) * 32 // size]  # 32 bytes a row
    words = words.view(np.uint32)
    dense = np.zeros((64, 64 // size))
    for thread in range(128):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        if size == 1:
            places = [(16 * warp + g + 8 * (q & 1), 8 * (q >> 1) + j, int(words[2 * thread + step]) >> 4 * j) for j in range(8)]
        elif q >> 1 == step:  # the selector
            places = [
                (16 * warp + g + 8 * h, 4 * (q & 1) + j, int(words[thread]) >> (16 * h + 4 * j))
                for h in (0, 1)
                for j in range(4)
            ]
        else:
            continue
        for r, window, bits in places:
            first, second = bits & 3, bits >> 2 & 3
            assert first < second
            dense[r, 4 * window + first] = kept[r, 2 * window]
            dense[r, 4 * window + second] = kept[r, 2 * window + 1]
    return dense


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("pattern", [*known_patterns(), Pattern(22, 24)], ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_layouts_multiply_to_the_product(pattern: Pattern, dtype: DType, full: bool) -> None:
    rng = np.random.default_rng(pattern.group)
    n, k, m = 70, 75, 19
    packed = packed_weight(rng, n, k, pattern, dtype, full)
    x = rng.integers(-9, 10, (m, k)).astype(dtype.numpy)
    arranged, tiles = arrange(packed), to_tiles(x, pattern)
    count = stages(pattern, k, dtype)
    assert arranged["values"].shape == (count, 2, 4096)
    assert ("compact" in arranged) == (2 <= pattern.windows <= 7 and (full or dtype.bits == 8))
    words = expand(arranged["compact"], pattern, dtype) if "compact" in arranged else arranged["expanded"]
    assert "compact" not in arranged or words.nbytes == 2 * arranged["compact"].nbytes
    assert tiles.shape == (count, 3, 8, 128)
    assert tiles.nbytes == sm90.ARCH.operand(pattern, k, Scheme.of(dtype)).bytes(m)
    y = np.zeros((128, 24))
    for stage in range(count):
        rows, token, byte = tiles[stage].reshape(24, 128), np.arange(24)[:, None], np.arange(128)
        slid = np.take_along_axis(rows, byte ^ (token % 8 * 16), 1).view(dtype.numpy).astype(np.float64)
        for tile in range(2):
            for step in range(2):
                part = slid[:, step * slid.shape[1] // 2 : (step + 1) * slid.shape[1] // 2]  # 64 bytes a token
                y[64 * tile : 64 * tile + 64] += (
                    instruction(arranged["values"][stage, tile], words[stage, tile], step, dtype) @ part.T
                )
    np.testing.assert_array_equal(y[:n, :m], reference.unpack(packed).astype(np.float64) @ x.astype(np.float64).T)
    assert not y[n:].any()
    assert not y[:, m:].any()


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", [*known_patterns(), Pattern(22, 24)], ids=str)
def test_from_tiles_is_the_inverse_of_to_tiles(pattern: Pattern, dtype: DType) -> None:
    for m, k in ((19, 75), (8, 64), (1, 1), (0, 16), (3, 0)):
        x = np.random.default_rng(k).integers(-9, 10, (m, k)).astype(dtype.numpy)
        back = from_tiles(to_tiles(x, pattern), m, k, pattern, dtype)
        np.testing.assert_array_equal(back, x.view(dtype.raw))


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16", "22:24"])
@pytest.mark.parametrize("shape", [(0, 40), (1, 1), (5, 0), (64, 128), (65, 300), (200, 33), (8200, 20)])
def test_restore_gives_the_same_matrix(shape: tuple[int, int], pattern: str, dtype: DType) -> None:
    packed = packed_weight(np.random.default_rng(1), *shape, Pattern.of(pattern), dtype)
    back = restore_sm90(arrange(packed), packed).validate()
    np.testing.assert_array_equal(
        reference.unpack(back).view(dtype.raw), reference.unpack(packed).view(dtype.raw), err_msg="dense"
    )
    if pattern in ("2:4", "22:24"):  # no compact metadata: everything stays where it was
        assert back.values.tobytes() == packed.values.tobytes()
        assert back.meta.tobytes() == packed.meta.tobytes()


@pytest.mark.parametrize("pattern", known_patterns()[1:], ids=str)
def test_every_mask_has_a_number_and_its_nibbles(pattern: Pattern) -> None:
    table = sm90_layout.nibbles(pattern)
    masks = [set(range(pattern.group)) - {a, b} for b in range(pattern.group) for a in range(b)]
    assert len(table) == len(masks) <= 1 << sm90_layout.mask_bits(pattern)
    for mask, row in zip(masks, table, strict=True):
        assert [2 * j + p for j, nibble in enumerate(row) for p in (nibble & 3, nibble >> 2)] == sorted(mask)
    assert sm90_layout.mask_bits(pattern) * sm90_layout.masks_per_word(pattern) <= 32


def test_a_column_stored_in_two_windows_is_multiplied_twice_without_compact_metadata() -> None:
    # 6:8, two groups: columns 0 2 | 2 3 | ...
    values = np.array([[1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]], np.int8)
    meta = np.array([[0x48, 0x44, 0x44]], np.uint8)
    packed = PackedWeight(values, meta, np.ones((1, 1), np.float32), Pattern(6, 8), (1, 16), INT8)
    arranged = arrange(packed)
    assert "compact" not in arranged
    back = restore_sm90(arranged, packed)
    assert back.values.tobytes() == values.tobytes()
    assert back.meta.tobytes() == meta.tobytes()


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_kernels_fit(dtype: DType, out: str) -> None:
    *kernels, expansion = sm90.ARCH.kernels(Pattern(6, 8), Scheme.of(dtype), out, HOPPER)
    assert expansion == sm90.Expansion(dtype, 3)
    for config in kernels:
        assert isinstance(config, sm90.Config)
        room = (common.SHARED_MEMORY + 1024) // config.resident - 1024  # each block takes one KiB more
        assert config.stages >= (5 if config.tile.tokens <= 64 else 4)
        assert config.shared_bytes <= room
        more = config.shared_bytes + sm90_launch.stage_bytes(config.tile, dtype, config.compact)
        assert more > room - 1024 or config.stages == sm90_launch.MOST_STAGES
        assert str(config.tile) in str(config)


QWEN = [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]
"""(n, k) of the linear layers of Qwen2.5-7B, as engines fuse them."""

SHAPES = [*QWEN, (130, 70), (1, 1), (8448, 512), (64, 100000), (8500, 300)]


def products(candidate: Sequence[sm90.Config | sm90.Expansion]) -> tuple[sm90.Config, ...]:
    """The launches after an expansion, if there is one, which comes first."""
    rest = candidate[isinstance(candidate[0], sm90.Expansion) :]
    assert all(isinstance(launch, sm90.Config) for launch in rest)
    return tuple(rest)  # type: ignore[arg-type]


def test_blocks_that_quantize_have_room() -> None:
    """What cuda_src/sm90/own_x.cuh keeps in shared memory, for every block of a cluster."""
    ways = 0
    for m, (n, k), pattern in itertools.product([1, 2], [*QWEN, (1, 8), (300, 2104), (20000, 1024)], known_patterns()[1:]):
        problem = GemmProblem(m, n, k, pattern, Scheme.of(INT8), "float16", DEVICE, unquantized=True)
        every = list(sm90.ARCH.candidates(problem))
        operand = replace(problem, unquantized=False)
        fast = every and min(sm90.ARCH.cost(c, problem) for c in every) <= 2600 + sm90.ARCH.cost(choose(operand), operand)
        assert bool(fast and m * k <= 20480) == sm90.ARCH.quantizes(operand)
        for launch in (launch for candidate in every for launch in products(candidate)):
            assert launch.own_x
            assert launch.compact
            assert (launch.threads - 32) % (32 * m) == 0
            assert launch.threads - 32 >= 128 * m
            steps, ways = stages(pattern, k, INT8) // 2, ways + 1
            parts = 1 if launch.tile.pairs else launch.split_k  # blocks of pairs have a whole tile first
            for rank in range(parts):
                first, last = (2 * (steps * r // parts) for r in (rank, rank + 1))
                one, end = ((w + w // pattern.windows) // 4 for w in (32 * first, 32 * last))  # vectors of four pairs
                made, kept = (last - first) * 128 * m, 16 * (end + 1 - one) * m
                assert made + max(kept, 16 * (8 - m)) <= launch.own_x
    assert ways > 100
    assert sm90.ARCH.quantizes(GemmProblem(1, *QWEN[3], Pattern(6, 8), Scheme.of(INT8), "float16", DEVICE))


def test_x_that_no_block_quantizes() -> None:
    few = GemmProblem(1, 300, 512, Pattern(6, 8), Scheme.of(INT8), "bfloat16", DEVICE)
    assert sm90.ARCH.quantizes(few)
    assert sm90.ARCH.quantizes(few, ("values", "compact"))
    assert not sm90.ARCH.quantizes(few, ("values", "expanded"))
    others = {"m": 3, "k": 508, "pattern": Pattern(2, 4), "out": "float32", "scheme": Scheme.of(BFLOAT16)}
    for name, other in others.items():
        assert not sm90.ARCH.quantizes(replace(few, **{name: other}))
    assert not sm90.ARCH.quantizes(replace(few, k=20488))
    assert not sm80.ARCH.quantizes(few)


@pytest.mark.parametrize("m", [1, 16, 17, 64, 200, 256, 300, 1024, 4096, 65536])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_candidate_covers_every_tile_and_step(m: int, shape: tuple[int, int]) -> None:
    n, k = shape
    problem = GemmProblem(m, n, k, Pattern(6, 8), FLOAT8, "bfloat16", DEVICE)
    chosen = choose(problem)
    every = list(sm90.ARCH.candidates(problem))
    assert chosen in every
    for candidate in every:
        launches = products(candidate)
        assert (launches != candidate) == any(config.derived for config in launches)
        assert [config.order for config in launches] in ([sm90_launch.ALONE], [sm90.BEFORE_REST, sm90.REST])
        first, last = launches[0], launches[-1]
        assert (first.row_tiles[0], last.row_tiles[1]) == (0, -(-n // 64))
        assert (first.begin, last.end) == (0, last.tiles(m))
        if first is not last:
            if first.row_tiles == last.row_tiles:  # tiles after tiles
                assert first.end == last.begin
                assert first.tile == last.tile
                # else both launches would compute outputs of the last two tiles, in two orders of addition
                assert first.tile.warpgroups < 3 or -(-n // 64) % 3 == 0
            else:  # row tiles after row tiles; the second launch may take two at a time
                assert (first.end, last.begin) == (first.tiles(m), 0)
                assert first.row_tiles[1] == last.row_tiles[0]
                assert last.row_tiles[0] % 2 == 0
        for config in launches:
            tiles = config.end - config.begin
            assert tiles > 0
            assert config.possible(sm90.along_k(problem))
            assert config.arguments(problem) == {
                "stages": sm90.along_k(problem), "first_row_tile": config.row_tiles[0], "last_row_tile": config.row_tiles[1],
                "begin": config.begin, "end": config.end, "order": config.order, "raster_group": config.raster_group,
            }  # fmt: skip
            if config.tile.pairs:
                assert m <= config.tile.tokens
                assert config.blocks == 132 < tiles
                assert 47 <= tiles % 132 <= 66  # 0.7 of the pairs have one of the others
            elif config.split_k > 1:
                assert config.blocks == tiles * config.split_k <= 132 * config.resident
                assert sm90.along_k(problem) // 2 >= config.split_k  # every block has a step, of two stages at most
            elif config.order == sm90.REST:
                assert config.blocks == tiles <= 132 * config.resident
            else:
                assert config.blocks == min(tiles, 132)
                assert len(launches) == 1 or tiles % 132 == 0


@pytest.mark.parametrize("dtype", [FLOAT8, INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", QWEN)
def test_fewer_tokens_never_cost_more(shape: tuple[int, int], dtype: DType) -> None:
    """What serves more tokens can serve fewer: no m up to 1024 is estimated to take longer than a larger one."""
    assert all(tile.tokens % 8 == 0 for tile in sm90.TILES), "choices change at m = 8 i + 1 alone"
    n, k = shape
    least, at = float("inf"), 0
    for m in sorted({m for eights in range(0, 1024, 8) for m in (eights + 1, eights + 8)}, reverse=True):
        problem = GemmProblem(m, n, k, Pattern(6, 8), dtype, "bfloat16", DEVICE)
        chosen = choose(problem)
        ns = sm90.ARCH.cost(chosen, problem)
        assert ns <= 1.01 * least, f"m = {m}: {ns:.0f} ns by {chosen}, where m = {at} takes {least:.0f}"
        if ns < least:
            least, at = ns, m


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_the_choice_is_among_tiles_no_larger_than_needed(pattern: str, dtype: DType) -> None:
    def first(problem: GemmProblem, every: bool) -> list[sm90.Config]:
        return [products(candidate)[0] for candidate in sm90.ARCH.candidates(problem, every=every)]

    for m, n, k in itertools.product((1, 9, 64, 100, 144, 257, 1000, 4096), (64, 128, 192, 1024, 37888), (8, 160, 3584)):
        problem = GemmProblem(m, n, k, Pattern.of(pattern), dtype, "bfloat16", DEVICE)
        few, every = first(problem, False), first(problem, True)
        assert few
        assert {config.kernel for config in few} <= {config.kernel for config in every}
        assert products(choose(problem))[0] in few
    problem = GemmProblem(144, 1024, 3584, Pattern.of(pattern), dtype, "bfloat16", DEVICE)
    taken = {(c.tile.tokens, c.split_k) for c in first(problem, False) if c.tile.warpgroups == 2}
    assert taken == {*itertools.product((96, 144), (1, 2, 3)), (96, 4), (160, 4)}  # 144 is not cut in four


def test_few_tokens_take_small_tiles_and_many_large_ones() -> None:
    def tokens(m: int) -> int:
        return products(choose(GemmProblem(m, 37888, 3584, Pattern(6, 8), FLOAT8, "bfloat16", DEVICE)))[0].tile.tokens

    assert tokens(1) <= 16
    assert tokens(4096) >= 160


def test_hopper_has_kernels_of_its_own_unless_portable_ones_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert for_capability((9, 0)) is sm90.ARCH
    assert for_capability((8, 0)) is for_capability((12, 0)) is sm80.ARCH
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", "1")
    assert for_capability((9, 0)) is sm80.ARCH


def test_all_types_are_supported() -> None:
    assert [scheme.dtype for scheme in multiplied(sm90.ARCH, HOPPER)] == [INT8, FLOAT8, BFLOAT16, FLOAT16]


@pytest.mark.parametrize("tile", [tile for tile in sm90.TILES if tile.warpgroups == 3 and not tile.pairs], ids=str)
def test_three_warpgroups_have_row_tiles_enough_and_consumers_that_load_stages(tile: sm90.Tile) -> None:
    assert tile.consumers_load == (tile.tokens > 192)
    short, m, metadata = not tile.consumers_load, 4096, sm90.DERIVED  # 160 columns of 6:8 are two stages
    if tile.tokens <= sm90.SMALL_TOKENS:
        m, metadata = 1, sm90.COMPACT
    for n, k, possible in ((192, 3584, True), (193, 3584, True), (129, 3584, True), (128, 3584, False), (192, 160, short)):
        problem = GemmProblem(m, n, k, Pattern(6, 8), FLOAT8, "bfloat16", DEVICE)
        assert bool(list(sm90.candidates_of(tile, problem, metadata))) == possible, (n, k)


def test_wide_tiles_take_all_tokens_and_mostly_one_round() -> None:
    assert {(tile.tokens, tile.n) for tile in sm90.TILES if tile.wide} == {(8, 256), (16, 320), (32, 256), (96, 256)}

    def blocks(m: int, n: int, unquantized: bool = False) -> dict[tuple[int, int], int]:
        """(tokens, outputs) of wide tiles that are candidates -> blocks."""
        problem = GemmProblem(m, n, 4096, Pattern(6, 8), INT8, "bfloat16", DEVICE, unquantized=unquantized)
        every = [products(c) for c in sm90.ARCH.candidates(problem, ("values", "compact"))]
        assert all(len(launches) == 1 for launches in every if any(launch.tile.wide for launch in launches))
        return {(c.tile.tokens, c.tile.n): c.blocks for (c, *_) in every if c.tile.wide}

    assert blocks(1, 28672) == {(8, 256): 112, (16, 320): 90}
    assert blocks(16, 28672) == {(16, 320): 90, (32, 256): 112}
    assert blocks(64, 28672) == blocks(96, 28672) == {(96, 256): 112}
    assert blocks(97, 28672) == blocks(1, 192) == {}  # 192 outputs are three row tiles
    assert blocks(1, 256) == {(8, 256): 1}
    assert blocks(1, 320 * 132) == {(8, 256): 132, (16, 320): 132}  # two rounds of 256 outputs
    assert blocks(1, 320 * 132 + 1) == blocks(1, 256 * 264) == {(8, 256): 132}
    assert blocks(1, 256 * 264 + 1) == {}
    assert blocks(1, 256 * 106, True) == {(8, 256): 106}
    assert blocks(1, 256 * 105, True) == blocks(1, 256 * 133, True) == {}  # SMs without a block; two rounds


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_pairs_share_what_is_left_of_whole_tiles(dtype: DType) -> None:
    """Of 198 tiles of 192 outputs 132 blocks take one each, and each two one of the other 66."""
    tiles = {tile.tokens: tile for tile in sm90.TILES if tile.pairs}
    assert set(tiles) == {8, 16, 32, 64, 96, 128, 144, 160, 176, 192}

    def shared(m: int, n: int, sms: int = 132) -> set[int]:
        problem = GemmProblem(m, n, 3584, Pattern(6, 8), dtype, "bfloat16", Device((9, 0), sms))
        pairs = [c for (c, *more) in map(products, sm90.ARCH.candidates(problem, ("values", "compact"))) if c.tile.pairs]
        assert all((c.split_k, c.blocks, c.end) == (2, sms // 2 * 2, -(-n // 192)) for c in pairs)
        return {c.tile.tokens for c in pairs}

    assert shared(1, 37888) == {8, 16}
    assert shared(16, 37888) == {16, 32}
    assert shared(17, 37888) == shared(32, 37888) == {32, 64}
    assert shared(33, 37888) == {64, 96, 128}
    assert shared(129, 37888) == {144, 160, 176, 192}
    assert shared(193, 37888) == set()
    assert shared(1, 192 * 179) == {8, 16}
    assert not any(shared(1, 192 * count) for count in (100, 132, 178, 199, 264))  # 178: too few pairs have one
    assert shared(1, 37888, 1) == set()
    assert shared(1, 192 * (130 + 65), 131) == {8, 16}  # an odd number of SMs
    assert choose(GemmProblem(16, 37888, 3584, Pattern(6, 8), dtype, "bfloat16", DEVICE))[0].tile.pairs  # type: ignore[union-attr]


def test_metadata_that_candidates_read() -> None:
    """Of weights that keep both forms either, in small tiles and in those that take all tokens; else expanded."""
    compact, expanded, derived = {"compact"}, {"expanded"}, {"derived"}
    either, some = compact | expanded, compact | derived
    cases = [  # m, tile, type, metadata of weights with both, of weights with compact alone
        (30, 32, 2, FLOAT8, compact, compact), (100, 64, 2, FLOAT8, either, compact), (50, 64, 3, FLOAT8, either, compact),
        (30, 32, 2, BFLOAT16, either, compact), (128, 128, 2, FLOAT8, either, some), (129, 128, 2, FLOAT8, expanded, some),
        (256, 256, 2, FLOAT8, either, some), (100, 256, 3, FLOAT8, expanded, derived), (128, 128, 2, BFLOAT16, either, some),
        (100, 160, 2, BFLOAT16, expanded, some), (4096, 256, 2, INT8, expanded, some), (4096, 256, 3, INT8, expanded, derived),
    ]  # fmt: skip
    for m, tokens, warpgroups, dtype, both, alone in cases:
        problem = GemmProblem(m, 4608, 3584, Pattern(6, 8), dtype, "bfloat16", DEVICE)
        for of, buffers, metadata in (
            (problem, None, both),
            (problem, ("values", "compact", "expanded"), both),
            (problem, ("values", "compact", "scale"), alone),
            (problem, ("values", "expanded"), expanded if expanded & both else set()),
            (replace(problem, pattern=Pattern(2, 4)), None, expanded),
        ):
            firsts = [products(candidate)[0] for candidate in sm90.ARCH.candidates(of, buffers)]
            read = {c.buffers["metadata"] for c in firsts if (c.tile.tokens, c.tile.warpgroups) == (tokens, warpgroups)}
            assert read == metadata, (of, tokens, warpgroups, buffers)


def test_what_follows_an_expansion_is_not_early() -> None:
    """An early launch would load metadata that are not written yet; that of the rest follows a launch that has waited."""
    for m in (96, 300, 4096):
        problem = GemmProblem(m, 37888, 3584, Pattern(6, 8), INT8, "bfloat16", DEVICE)
        for candidate in sm90.ARCH.candidates(problem, ("values", "compact")):
            for launch in products(candidate):
                one_tile = launch.split_k == 1 and launch.blocks == launch.end - launch.begin
                early = launch.order == sm90.REST or ((m <= sm90_launch.PDL_TOKENS or one_tile) and not launch.derived)
                assert launch.early(problem) == early
        stages_, row_tiles = sm90.along_k(problem), sm90_layout.row_tiles(37888)
        expansion = sm90.Expansion(INT8, 3)
        assert expansion.derived_bytes(problem) == stages_ * row_tiles * 1024
        assert expansion.grid(problem) == (stages_ * -(-row_tiles // sm90_launch.EXPAND_ROW_TILES), 1, 1)


def test_expansion_pays_at_last() -> None:
    def expands(m: int, dtype: DType) -> bool:
        problem = GemmProblem(m, 37888, 3584, Pattern(6, 8), dtype, "bfloat16", DEVICE)
        assert not isinstance(choose(problem)[0], sm90.Expansion)
        return isinstance(choose(problem, ("values", "compact"))[0], sm90.Expansion)

    assert not any(expands(m, dtype) for m in (1, 64, 128) for dtype in PACKED)
    assert all(expands(16384, dtype) for dtype in PACKED)


def test_small_tiles_are_for_few_tokens_and_rasterization_groups_narrow_for_not_too_many() -> None:
    def launches(m: int) -> list[sm90.Config]:
        problem = GemmProblem(m, 4608, 3584, Pattern(6, 8), FLOAT8, "bfloat16", DEVICE)
        return [config for candidate in sm90.ARCH.candidates(problem) for config in products(candidate)]

    assert min(config.tile.tokens for config in launches(sm90.SMALL_M)) <= sm90.SMALL_TOKENS
    assert min(config.tile.tokens for config in launches(sm90.SMALL_M + 1)) > sm90.SMALL_TOKENS
    for m, group in ((sm90.NARROW_TOKENS, sm90.NARROW_RASTER_GROUP), (sm90.NARROW_TOKENS + 1, sm90.RASTER_GROUP)):
        assert {config.raster_group for config in launches(m) if config.tile.tokens == 256} == {group}
        assert {config.raster_group for config in launches(m) if config.tile.tokens < 256} == {sm90.RASTER_GROUP}


def test_many_tokens_take_the_tile_that_copies_least() -> None:
    chosen = choose(GemmProblem(16384, 37888, 3584, Pattern(6, 8), FLOAT8, "bfloat16", DEVICE))
    assert [config.tile.n for config in products(chosen)] == [192]


def test_many_tokens_start_early_where_each_block_has_one_whole_tile() -> None:
    def early(m: int, n: int, k: int) -> bool:
        problem = GemmProblem(m, n, k, Pattern(6, 8), INT8, "bfloat16", DEVICE)
        return products(choose(problem, ("values", "compact", "expanded", "scale")))[0].early(problem)

    assert early(512, 37888, 3584)
    assert early(1024, 3584, 3584)
    assert not early(1024, 37888, 3584)  # six rounds of tiles
    assert not early(1024, 2048, 8192)  # tiles shared by clusters


def named(config: sm90.Config) -> str:
    """As candidates-h200.json names a launch."""
    tile, expanded = config.tile, "" if config.compact else "e"
    pairs = "p" if tile.pairs else ""
    return f"{tile.tokens}x{tile.n}{pairs}/{config.split_k} s{config.stages} r{config.resident} b{config.blocks}{expanded}"


@pytest.mark.parametrize(
    ("timings", "dtype", "buffers", "linears", "mean", "most"),
    [
        ("us", INT8, ("values", "compact", "scale"), 871, 0.007, 0.10),
        ("us_both", INT8, ("values", "compact", "expanded", "scale"), 886, 0.008, 0.10),
        ("us_bfloat16", Scheme.of("bfloat16"), ("values", "compact", "expanded"), 294, 0.009, 0.10),
        ("us_own", INT8, ("values", "compact", "expanded", "scale"), 41, 0.014, 0.15),
    ],
    ids=["int8 compact", "int8", "bfloat16", "int8 by the blocks"],
)
def test_the_choice_is_near_the_fastest_that_was_timed(
    timings: str, dtype: DType | Scheme, buffers: tuple[str, ...], linears: int, mean: float, most: float
) -> None:
    """Of the linears that the estimate was fitted to."""
    results = Path(__file__).parent.parent / "docs/results/candidates-h200.json"
    loss = []
    for linear, timed in json.loads(results.read_text())[timings].items():
        n, k, m = map(int, linear.split())
        own = timings == "us_own"
        problem = GemmProblem(m, n, k, Pattern(6, 8), Scheme.of(dtype), "bfloat16", DEVICE, unquantized=own)
        chosen = " + ".join(named(config) for config in products(choose(problem, buffers)))
        loss += [timed[chosen] / min(timed.values()) - 1] if chosen in timed else []
    assert len(loss) >= linears, "what is chosen was timed"
    assert sum(loss) / len(loss) < mean
    assert max(loss) < most


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize(("pattern", "form"), [("6:8", ""), ("6:8", "compact"), ("6:8", "expanded"), ("2:4", "expanded")])
def test_few_tokens_take_no_tile_for_many(pattern: str, form: str, dtype: DType) -> None:
    """However small the product is: the estimate was fitted to none so small."""
    buffers = ("values", "scale", form) if form else None
    none_is_small = dtype.bits == 8 and (pattern, form) == ("6:8", "expanded")  # small tiles read compact metadata
    for shape, (m, most) in itertools.product(
        ((64, 128), (2048, 2048), (37888, 512)), {1: 16, 3: 16, 8: 16, 9: 32, 16: 32, 17: 64, 32: 64}.items()
    ):
        problem = GemmProblem(m, *shape, Pattern.of(pattern), dtype, "bfloat16", DEVICE)
        tokens = max(config.tile.tokens for config in products(choose(problem, buffers)))
        assert (tokens > 32) if none_is_small else (tokens <= most), (shape, m)


def test_other_numbers_of_tokens_take_the_same_kernels() -> None:
    """Where they make other tiles, too; only where no candidate has these kernels the model is asked again."""
    buffers, anew, searched, loss = ("values", "compact", "scale"), 0, 0, []
    for n, k in ((5120, 3072), (3072, 3072), (3584, 18944)):
        for m in range(520, 5000, 88):
            problem = GemmProblem(m, n, k, Pattern(6, 8), INT8, "bfloat16", Device((9, 0), 132))
            chosen = choose(replace(problem, m=asked_for(m)), buffers)
            candidate = modelled(problem, buffers)
            assert candidate in list(sm90.ARCH.candidates(problem, buffers))
            same = [launch.kernel for launch in candidate] == [launch.kernel for launch in chosen]
            anew, searched = anew + (not same), searched + (same and candidate != chosen)
            assert same or candidate == choose(problem, buffers)
            loss.append(sm90.ARCH.cost(candidate, problem) / sm90.ARCH.cost(choose(problem, buffers), problem))
    assert searched > anew
    assert sum(loss) / len(loss) < 1.02
