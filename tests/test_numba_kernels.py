"""The Numba CUDA kernels compiled ahead, with no GPU: no spills, and the instructions that they were written for.

`make test` compiles a sample of them, `make test-kernels` the rest.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from compilers import locked, most_spilled

pytest.importorskip("numba_cuda", reason="the kernels are Numba CUDA's: pip install 'slidesparse_nb[cuda13]'")

from slidesparse_nb.arch.common import SHARED_MEMORY
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, FLOATS, INT8, PACKED
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.cuda import quantize
from slidesparse_nb.cuda.jit import numba
from slidesparse_nb.cuda.kernels import pack as weight_kernels
from slidesparse_nb.cuda.kernels import unpack
from slidesparse_nb.cuda.kernels.pack_stages import LARGEST_HELD
from slidesparse_nb.cuda.kernels.pack_stages import Variant as Packing
from slidesparse_nb.cuda.kernels.quantize import KINDS
from slidesparse_nb.cuda.kernels.quantize_stages import Variant
from slidesparse_nb.errors import UnsupportedError

COMPILERS = "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink"
pytestmark = pytest.mark.usefixtures("module_cache")

ARCHITECTURES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)]


def text(kernel: numba.Kernel, capability: tuple[int, int]) -> str:
    """PTX of a kernel that was assembled with no spills and no stack, and whose cubin names it."""
    built = kernel.build(capability)
    assert max(built.spills, built.stack) <= most_spilled(*COMPILERS), built.log
    assert 0 < built.registers <= (kernel.max_registers or 65536 // kernel.max_threads)
    assert kernel.name.encode() in built.cubin.read_bytes()
    return (built.folder / "kernel.ptx").read_text()


def has(ptx: str, instruction: str, count: int) -> bool:
    """Whether it stands in `ptx` so often; other compilers than the locked ones may unroll loops and copy code."""
    found = ptx.count(instruction)
    return found == count if locked(*COMPILERS) else (found > 0) == (count > 0)


NOTHING_FUSED = re.compile(r"\b(fma|mad)\.(rn|ftz)[^;]*f32|\.approx|\.ftz|div\.full")
"""What must not be there: products that are fused, flushed or approximate."""


def sampled(cases: Iterable[tuple[Any, ...]], sample: Callable[..., bool]) -> list[Any]:
    """Cases of which `make test` runs those in the sample, and `make test-kernels` the others."""
    return [case if sample(*case) else pytest.param(*case, marks=pytest.mark.every_kernel) for case in cases]


LOADS = [0, *quantize.VECTORS]


@pytest.mark.parametrize(
    ("source", "stored", "vectors"),
    sampled(
        itertools.product(sorted(FLOATS.values()), ["int8", "float8_e4m3fn"], LOADS),
        lambda source, stored, vectors: (len(source) + LOADS.index(vectors)) % 2 == (stored == "int8"),
    ),
)
def test_activations(source: str, stored: str, vectors: int) -> None:
    ptx = text(quantize.kernel(Variant(source, stored, vectors, architecture=90)), (9, 0))
    assert ".local" not in ptx
    assert has(ptx, "ld.global.v4", vectors)  # one 16-byte load for each, and no other
    assert len(re.findall(r"ld\.global(?!\.v4)", ptx)) == 0 if vectors else True
    assert (ptx.count("cvt.rn.satfinite.e4m3x2.f32") > 0) == (stored == "float8_e4m3fn")
    assert ("max.u16x2" in ptx) == (vectors > 0 and source != "float32")
    assert not NOTHING_FUSED.search(ptx)
    assert has(ptx, "div.rn.f32", 2)
    assert "redux.sync.max.u32" in ptx


@pytest.mark.parametrize(
    ("kind", "source", "stored"),
    sampled(
        itertools.product(KINDS, ["bfloat16", "float16"], ["int8", "float8_e4m3fn", "bfloat16"]),
        lambda kind, source, stored: (source, stored) == ("bfloat16", "int8"),
    ),
)
def test_norms_and_gates(kind: str, source: str, stored: str) -> None:
    ptx = text(quantize.kernel(Variant(source, stored, 4, 3, True, 90), kind, 128), (9, 0))
    assert ".local" not in ptx
    assert has(ptx, "ld.global.v4", 12 if kind == "add_rms_norm" else 8)
    assert len(re.findall(r"ld\.global(?!\.v4)", ptx)) == 0
    estimates = re.compile(r"(ex2|rcp)\.approx\.ftz\.f32")  # test_gates.py
    assert bool(estimates.search(ptx)) == ("norm" not in kind)
    assert not NOTHING_FUSED.search(estimates.sub("", ptx))
    assert ("sqrt.rn.f32" in ptx) == ("norm" in kind)


def test_no_sm_takes_more_than_its_share_of_the_blocks() -> None:
    """By their shared memory; few blocks, and more of them than run at once, are left alone."""
    of = "bfloat16", "int8", 3584, (2 * 3584, 2), True, 90, Pattern.of("6:8")
    short, long = quantize.plan(*of), quantize.plan(*of[:2], 18944, (2 * 18944, 2), *of[4:])
    for launch, shares in ((short, {48: 2, 264: 2, 265: 3, 512: 4}), (long, {48: 1, 128: 1, 133: 2, 264: 2})):
        for m, share in shares.items():
            block = launch.shared_for(m, 132) + 1024
            assert share * block <= SHARED_MEMORY + 1024 < (share + 1) * block, (m, share)
        assert launch.shared_for(40, 132) == launch.shared_for(1 << 16, 132) == launch.shared
        assert max(launch.shared_for(m, 132) for m in range(1, 512)) <= quantize.APART


def test_what_keeps_blocks_apart_leaves_room_for_their_sums() -> None:
    for kind, spread in (
        ("", 1),
        ("rms_norm", 1),
        ("add_rms_norm", 1),
        ("silu_and_mul", 1),
        ("gelu_and_mul", 2),
        ("silu_and_mul", 4),
    ):
        for stored in ("int8", "float8_e4m3fn", "bfloat16"):
            of = "bfloat16", stored, 8192, (4 * 8192, 2), True, 90, Pattern.of("6:8")
            ptx = text(quantize.plan(*of, kind=kind, spread=spread).kernel, (9, 0))
            own = sum(map(int, re.findall(r"\.shared .*\[(\d+)\];", ptx)))
            assert (own > 0) == (stored != "bfloat16" or "norm" in kind), "maxima, or sums of squares"
            assert own + quantize.APART <= SHARED_MEMORY


def test_blocks_of_a_cluster_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vector and every chunk is one block's, and few rows have several blocks."""
    monkeypatch.setattr(numba, "SIMULATED", False)
    for k, pattern in ((4096, "6:8"), (11008, "4:6"), (18944, "14:16"), (8200, "2:4")):
        of = "bfloat16", "int8", k, (4 * k, 2), True, 90, Pattern.of(pattern)
        (four, by_four), (two, by_two), (_, whole) = quantize.plans(*of, kind="silu_and_mul")
        assert (four, two, by_four.blocks(9), by_two.blocks(9), whole.blocks(9)) == (24, 64, 64, 32, 16)
        for launch in (by_two, by_four):
            spread, (chunks, _, _, part, part_chunks) = launch.variant.spread, launch.after
            group, vectors = 2 * Pattern.of(pattern).windows + 2, k // 8
            assert 0 < part * (spread - 1) < vectors
            assert 8 * part % group == 0
            assert part_chunks * 16 == 8 * part // group * 4 * (group // 2 - 1)
            assert part_chunks * (spread - 1) < chunks == whole.after[0]
            assert launch.threads * launch.variant.vectors >= max(part, launch.before[2] - part * (spread - 1))
            ptx = text(launch.kernel, (9, 0))
            assert f".reqnctapercluster {spread}, 1, 1" in ptx
            assert ptx.count("st.shared::cluster.u32") == 1
        assert quantize.plans(*of, kind="silu_and_mul", shared=False) == [(math.inf, whole)]
        assert len(quantize.plans(*of)) == (2 if k > quantize.LONG_K else 1)
        assert len(quantize.plans(*of, kind="rms_norm")) == 1
        assert len(quantize.plans(*of[:5], 80, *of[6:], kind="silu_and_mul")) == 1
        assert len(quantize.plans(*of, shared=False)) == 1
    wide = "bfloat16", "int8", 4160, (4 * 4160, 2), True, 90, Pattern(126, 128)
    assert len(quantize.plans(*wide, kind="silu_and_mul")) < 3, "those that cannot share leave it"
    longest = "bfloat16", "int8", 53248, (4 * 53248, 2), True, 90, Pattern.of("6:8")
    for _, launch in quantize.plans(*longest, kind="silu_and_mul")[:-1]:
        text(launch.kernel, (9, 0))
    with pytest.raises(UnsupportedError, match=r"^spread: 4 blocks do not share rows of 16 columns; take one$"):
        quantize.plan("bfloat16", "int8", 16, (64, 2), True, 90, Pattern.of("6:8"), kind="silu_and_mul", spread=4)


@pytest.mark.parametrize(
    ("kind", "vectors"), [(kind, v) for kind, lengths in quantize.GATED.items() for v, _ in lengths if v in (3, 5)]
)
def test_gates_hold_a_row_in_registers(kind: str, vectors: int) -> None:
    """With four: above; eight do not fit."""
    assert ".local" not in text(quantize.kernel(Variant("bfloat16", "int8", vectors, 3, True, 90), kind), (9, 0))


SAMPLED_TILES = {("bfloat16", "int8"), ("float32", "float8_e4m3fn"), ("same", "bfloat16"), ("float16", "int8")}


@pytest.mark.parametrize(
    ("source", "stored"),
    sampled(
        itertools.product([*sorted(FLOATS.values()), "same"], [d.name for d in PACKED]),
        lambda *case: case in SAMPLED_TILES,
    ),
)
def test_tiles(source: str, stored: str) -> None:
    """Whole vectors in, whole chunks out, and a few instructions a chunk."""
    source = stored if source == "same" else source
    built_sizes = {}
    for windows in (1, 3, 4, 33):
        ptx = text(quantize.kernel(Variant(source, stored, 4, windows, True, 90)), (9, 0))
        assert ".local" not in ptx
        assert has(ptx, "ld.global.v4", 4)
        assert len(re.findall(r"ld\.global(?!\.v4)", ptx)) == 0
        assert has(ptx, "st.global.v4", 1)  # in a loop
        assert "st.shared" + {1: ".u32", 2: ".v2.u32", 4: ".v4.u32"}[Variant(source, stored, 4).words] in ptx
        loop = re.split(r"\n\$L\w+:", ptx[: ptx.index("st.global.v4")])[-1]
        built_sizes[windows] = len(re.findall(r"^\s+[a-z@]", loop, re.MULTILINE))
        assert has(loop, "ld.shared.u32", 4)
        assert not NOTHING_FUSED.search(ptx)
    assert not locked(*COMPILERS) or max(built_sizes[1], built_sizes[3], built_sizes[4]) < 45 < 80 > built_sizes[33]
    any_row = text(quantize.kernel(Variant(source, stored, 0, 3, True, 90)), (9, 0))
    assert "griddepcontrol.wait;" in any_row


@pytest.mark.parametrize(
    ("capability", "number"),
    sampled(
        itertools.product(ARCHITECTURES, range(4)),
        lambda capability, number: ARCHITECTURES.index(capability) % 4 == number,
    ),
    ids=str,
)
def test_every_architecture(capability: tuple[int, int], number: int) -> None:
    native = capability >= (8, 9)
    architecture = max(g for g in (80, 89, 90) if g <= 10 * capability[0] + capability[1])
    kernel = (
        lambda: quantize.kernel(Variant("float32", "float8_e4m3fn", 0, 15, architecture=architecture)),
        lambda: quantize.kernel(Variant("bfloat16", "int8", 4, architecture=architecture)),
        lambda: quantize.kernel(Variant("float16", "float8_e4m3fn", 8, 3, architecture=architecture)),
        lambda: weight_kernels.pack_kernel(Packing("bfloat16", FLOAT8, 3, "magnitude", 4, native)),
    )[number]()
    ptx = text(kernel, capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert number % 2 == 0 or ("e4m3x2" in ptx) == (native and number == 3)


@pytest.mark.parametrize(
    "group", [8, pytest.param(6, marks=pytest.mark.every_kernel), pytest.param(16, marks=pytest.mark.every_kernel)]
)
def test_weights(group: int) -> None:
    windows = group // 2 - 1
    for packing, rounding in (
        (Packing("bfloat16", INT8, windows, "magnitude", 4 if group % 8 == 0 else 1, True), ""),
        (Packing("float32", FLOAT8, windows, "none", 4 if group % 4 == 0 else 1, True), "cvt.rn.satfinite.e4m3x2.f32"),
        (Packing("float32", BFLOAT16, windows, "random", 1, False), "cvt.rn.bf16.f32"),
        (Packing("bfloat16", FLOAT16, windows, "scores", 0, False), "cvt.rn.f16.f32"),
    ):
        ptx = text(weight_kernels.pack_kernel(packing), (9, 0) if packing.native else (8, 0))
        assert (packing.vector == 4) == ("ld.global.v4.u32" in ptx)
        assert rounding in ptx
        assert not NOTHING_FUSED.search(ptx)
        assert has(ptx, "div.rn.f32", 2 if packing.quantized else 0)
    for dtype in (INT8, BFLOAT16):
        text(unpack.unpack_kernel(dtype, windows), (9, 0))


@pytest.mark.parametrize(
    ("vector", "windows"), [(1, LARGEST_HELD // 2 - 1), pytest.param(0, 2047, marks=pytest.mark.every_kernel)]
)
def test_long_groups_are_not_held(vector: int, windows: int) -> None:
    text(weight_kernels.pack_kernel(Packing("float32", FLOAT16, windows, "scores", vector, True)), (9, 0))


@pytest.mark.parametrize("vectors", [0, 4])
def test_a_dependent_kernel_waits_before_it_touches_memory(vectors: int) -> None:
    ptx = text(quantize.kernel(Variant("bfloat16", "int8", vectors, 3, True, 90)), (9, 0))
    wait, launch = ptx.index("griddepcontrol.wait;"), ptx.index("griddepcontrol.launch_dependents;")
    assert wait < launch < min(ptx.index(access) for access in ("ld.global", "st.global"))
    assert "bra" not in ptx[:launch]  # every thread comes by
    assert "griddepcontrol" not in text(quantize.kernel(Variant("bfloat16", "int8", vectors)), (8, 0))


def test_names_tell_kernels_apart() -> None:
    """The name is in the cache's key for what a kernel is specialized by, so no two may share one."""
    variants = [
        Variant(source, stored, vectors, windows, tiled, architecture, spread=spread)
        for spread in (1, *quantize.SHARED_BY)
        for stored in ("int8", "float8_e4m3fn", "bfloat16")
        for source in {*FLOATS.values(), stored}
        for vectors in (0, *quantize.VECTORS)
        for windows, tiled in ((0, False), (1, False), (3, False), (1, True), (3, True))
        for architecture in (80, 89, 90)
    ]
    assert len({v.name for v in variants}) == len(variants)


def test_a_kept_kernel_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = unpack.unpack_kernel(INT8, 3)
    first = kernel.build((9, 0))
    monkeypatch.setattr(numba.Kernel, "ptx", None)
    assert kernel.build((9, 0)) == first


def test_compiling_needs_no_cupy() -> None:
    program = (
        "import sys; sys.modules['cupy'] = None\n"
        "from slidesparse_nb.cuda.kernels import unpack\n"
        "from slidesparse_nb.core.dtypes import INT8\n"
        "assert unpack.unpack_kernel(INT8, 3).build((8, 0)).cubin.stat().st_size"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], env=os.environ, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
