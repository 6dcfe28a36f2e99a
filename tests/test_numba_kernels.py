"""The Numba CUDA kernels compiled ahead, with no GPU: no spills, and the instructions that they were written for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="the kernels are Numba CUDA's: pip install 'slidesparse_nb[cuda13]'")

from slidesparse_nb.device import activations, numba_kernel, weight_kernels
from slidesparse_nb.device.activations import Variant
from slidesparse_nb.dtypes import BFLOAT16, FLOAT8, INT8

ARCHITECTURES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache folder of its own, so that everything is compiled now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def text(kernel: numba_kernel.Kernel, capability: tuple[int, int]) -> str:
    """PTX of a kernel that was assembled with no spills and no stack, and whose cubin names it."""
    built = kernel.build(capability)
    assert (built.spills, built.stack) == (0, 0), built.log
    assert 0 < built.registers <= 65536 // kernel.max_threads
    assert kernel.name.encode() in built.cubin.read_bytes()
    return (built.folder / "kernel.ptx").read_text()


@pytest.mark.parametrize("vectors", [*activations.VECTORS, 0])
@pytest.mark.parametrize("source", sorted(activations.SOURCES.values()))
@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
def test_activations(source: str, stored: str, vectors: int) -> None:
    ptx = text(activations.kernel(Variant(source, stored, vectors, 0, True)), (9, 0))
    assert ".local" not in ptx
    assert ptx.count("ld.global.v4") == vectors  # one 16-byte load for each, and no other
    assert len(re.findall(r"ld\.global(?!\.v4)", ptx)) == 0 if vectors else True
    assert (ptx.count("cvt.rn.satfinite.e4m3x2.f32") > 0) == (stored == "float8_e4m3fn")
    assert not re.search(
        r"\b(fma|mad)\.(rn|ftz)[^;]*f32|\.approx|\.ftz|div\.full", ptx
    )  # nothing fused, flushed or approximate
    assert ptx.count("div.rn.f32") == 2
    assert "redux.sync.max.u32" in ptx


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_every_architecture(capability: tuple[int, int]) -> None:
    native = capability >= (8, 9)
    for variant in (Variant("bfloat16", "int8", 4, 0, True), Variant("float16", "float8_e4m3fn", 8, 3, native)):
        assert f".target sm_{capability[0]}{capability[1]}" in text(activations.kernel(variant), capability)
    text(weight_kernels.slide_compress_kernel(INT8, 3), capability)


@pytest.mark.parametrize("group", [4, 8, 32])
def test_weights(group: int) -> None:
    windows = group // 2 - 1
    for kernel in (
        weight_kernels.prune_kernel("bfloat16", group, False),
        weight_kernels.prune_kernel("int8", group, True),
        weight_kernels.slide_compress_kernel(FLOAT8, windows),
        weight_kernels.slide_compress_kernel(BFLOAT16, windows),
        weight_kernels.unpack_kernel(8, 0x7F, windows),
    ):
        text(kernel, (9, 0))


@pytest.mark.parametrize("vectors", [0, 4])
def test_a_dependent_kernel_waits_before_it_touches_memory(vectors: int) -> None:
    ptx = text(activations.kernel(Variant("bfloat16", "int8", vectors, 0, True, dependent=True)), (9, 0))
    wait, launch = ptx.index("griddepcontrol.wait;"), ptx.index("griddepcontrol.launch_dependents;")
    assert wait < launch < min(ptx.index(access) for access in ("ld.global", "st.global"))
    assert "bra" not in ptx[:launch]  # every thread comes by
    assert "griddepcontrol" not in text(activations.kernel(Variant("bfloat16", "int8", vectors, 0, True)), (8, 0))


def test_rounding_and_scales() -> None:
    assert "cvt.rn.bf16.f32" in text(weight_kernels.round_kernel("float32", "bfloat16"), (8, 0))
    assert "cvt.rn.f16.f32" in text(weight_kernels.round_kernel("bfloat16", "float16"), (8, 0))
    text(weight_kernels.check_scales_kernel(), (8, 0))


def test_names_tell_kernels_apart() -> None:
    """The name is in the cache's key for what a kernel is specialized by, so no two may share one."""
    variants = [
        Variant(source, stored, vectors, windows, native, dependent)
        for source in activations.SOURCES.values()
        for stored in ("int8", "float8_e4m3fn")
        for vectors in (0, *activations.VECTORS)
        for windows in (0, 1, 3)
        for native in (True, False)
        for dependent in (True, False)
    ]
    assert len({v.name for v in variants}) == len(variants)


def test_a_kept_kernel_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = weight_kernels.check_scales_kernel()
    first = kernel.build((9, 0))
    monkeypatch.setattr(numba_kernel.Kernel, "ptx", None)
    assert kernel.build((9, 0)) == first


def test_compiling_needs_no_cupy() -> None:
    program = (
        "import sys; sys.modules['cupy'] = None\n"
        "from slidesparse_nb.device import weight_kernels\n"
        "assert weight_kernels.check_scales_kernel().build((8, 0)).cubin.stat().st_size"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], env=os.environ, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
