"""Kernels compile for every architecture, without spills and with sparse matrix instructions; no GPU is needed.

`slidesparse build` compiles the full product, over 5000 kernels. `make test-kernels` compiles every tile for every architecture
and element type, the pattern going round so that every tile meets every pattern; `make test` compiles a sample.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from compilers import most_spilled

from slidesparse_nb.arch import multiplied, sm80
from slidesparse_nb.core.dtypes import FLOAT8, FLOAT16, INT8, PACKED, DType
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.cuda import ahead_of_time
from slidesparse_nb.cuda.jit import cache as jit
from slidesparse_nb.errors import OperandError
from tools.cli import main

pytestmark = pytest.mark.usefixtures("module_cache")

Work = tuple[ahead_of_time.Job, tuple[str, str, str, str, int]]
"""How a kernel is built, and what `slidesparse build` says of it."""

CASES = [
    (c, d)
    for c in ahead_of_time.CAPABILITIES
    for d in PACKED
    if (d is not FLOAT16 or c == (8, 0)) and {(10, 3): INT8, (12, 1): FLOAT8}.get(c, d) is d
]
"""float16 is bfloat16 with another instruction: once is enough; 12.1 is 12.0 but for the target of block-scaled float8, 10.3 is
10.0 but for int8, which the portable kernel multiplies there."""


def tiles(capability: tuple[int, int], dtype: DType) -> list[list[Work]]:
    """The kernels of an architecture and type: a list for every tile, of what it is for each pattern."""
    found: dict[tuple[str, str, bool], list[Work]] = {}
    for job, told in ahead_of_time._jobs([capability], known_patterns(), [Scheme.of(dtype)], "bfloat16"):
        tile = told[3].split(" stages")[0].rsplit(",", 1)[0]  # their number differs between patterns
        found.setdefault((told[0], tile, "compact metadata" in told[3]), []).append((job, told))
    assert bool(found) == (dtype in {scheme.dtype for scheme in multiplied(sm80.ARCH, capability)})
    return list(found.values())


def form(work: Work) -> tuple[object, ...]:
    """What tells kernels apart: their source; the warps of a tile; on Hopper warpgroups, split-K and compact metadata."""
    (source, defines, arch), _ = work
    if "WARPGROUPS" in defines:
        return arch, defines["WARPGROUPS"], defines["SPLIT_K"] != 1, defines["WINDOWS"] != 0
    return source, arch, defines.get("WARPS_N"), defines.get("WARPS_M")


def compiles(chosen: Sequence[Work]) -> None:
    """Assert that these compile to what they are meant to be."""
    most = most_spilled("nvidia-cuda-nvrtc")
    for built, (job, told) in zip(ahead_of_time.compile_all([job for job, _ in chosen], workers=2), chosen, strict=True):
        assert max(built.spills, built.stack) <= most, told
        assert bool(ahead_of_time.sparse_instructions(built)) == ahead_of_time.multiplies(job), told
        assert not built.serialized, told


@pytest.mark.parametrize(("capability", "dtype"), CASES, ids=lambda v: str(v) if v in PACKED else jit.architecture(v))
def test_a_sample(capability, dtype):
    """Every third form of Hopper's kernels, every fourth of others, which are all after three types and four cases; with every
    case another tile of a form and another pattern.
    """
    turn = CASES.index((capability, dtype))
    forms: dict[tuple[object, ...], list[Work]] = {}
    for options in tiles(capability, dtype):
        forms.setdefault(form(options[0]), []).append(options[turn % len(options)])
    if forms:
        step = min(3 if capability == (9, 0) else 4, len(forms))
        compiles([options[turn % len(options)] for options in list(forms.values())[turn % step :: step]])


@pytest.mark.every_kernel
@pytest.mark.parametrize(("capability", "dtype"), CASES, ids=lambda v: str(v) if v in PACKED else jit.architecture(v))
def test_every_tile(capability, dtype):
    turn = CASES.index((capability, dtype))
    compiles([options[(turn + place) % len(options)] for place, options in enumerate(tiles(capability, dtype))])


@pytest.mark.parametrize("capability", sm80.BLOCK_SCALED, ids=jit.architecture)
def test_float8_at_full_rate(capability: tuple[int, int]) -> None:
    """Two targets, one with block scales and one without, of which every instruction is the one that is named."""
    jobs = [
        w for w in ahead_of_time._jobs([capability], [Pattern(6, 8)], [Scheme.of("fp8")], "bfloat16") if "64 tokens" in w[1][3]
    ]
    names = {"a": "QMMA.SF.SP.16864.F32.E4M3.E4M3.E8", "": "QMMA.SP.16864.F32.E4M3.E4M3"}
    for suffix, name in names.items():
        work = next(w for w in jobs if w[0][2] == jit.architecture(capability) + suffix)
        compiles([work])
        assert set(ahead_of_time.matrix_instructions(jit.build(*work[0])) or ()) == {name}


def fp4(capability: tuple[int, int], scheme: str) -> list[Work]:
    return list(ahead_of_time._jobs([capability], [Pattern(6, 8)], [Scheme.of(scheme)], "bfloat16"))


FORMS = {"nvfp4": "UE4M3.4X", "mxfp4": "E8"}


@pytest.mark.parametrize("scheme", FORMS)
@pytest.mark.parametrize("capability", sm80.BLOCK_SCALED, ids=jit.architecture)
def test_a_sample_over_pairs(capability: tuple[int, int], scheme: str) -> None:
    """One tile of those with many sums and one with few, of which every instruction is the one that is named."""
    work = [fp4(capability, scheme)[place] for place in (sm80.BLOCK_SCALED.index(capability), -1)]
    compiles(work)
    for job, _ in work:
        found = ahead_of_time.matrix_instructions(jit.build(*job))
        assert found is None or set(found) == {f"OMMA.SF.SP.168128.F32.E2M1.E2M1.{FORMS[scheme]}"}


@pytest.mark.every_kernel
@pytest.mark.parametrize("scheme", FORMS)
@pytest.mark.parametrize("capability", sm80.BLOCK_SCALED, ids=jit.architecture)
def test_every_tile_over_pairs(capability: tuple[int, int], scheme: str) -> None:
    compiles(fp4(capability, scheme))


def test_portable_kernels_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", "1")
    jobs = ahead_of_time._jobs([(9, 0)], [Pattern(6, 8)], [Scheme.of(PACKED[0])], "bfloat16")
    assert {told[0] for _, told in jobs} == {"sm_90"}


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two of the kernels that it names; all are compiled above."""
    real, named, steps = ahead_of_time._jobs, list[Any](), list[Any]()
    monkeypatch.setattr(ahead_of_time, "_jobs", lambda *given: named.extend(real(*given)) or named[:2])
    monkeypatch.setattr("tools.build.progress_bar", lambda *_: contextlib.nullcontext(lambda *step: steps.append(step)))
    arguments = ["build", "--arch", "sm_86", "--pattern", "6:8", "--dtype", "int8", "--out", "float16"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert steps == [("compiling", 1, 2), ("compiling", 2, 2)]
    assert len(named) == len(list(sm80.ARCH.kernels(Pattern(6, 8), Scheme.of(PACKED[0]), "float16", (8, 6))))
    head, *lines = shown.output.splitlines()
    assert head
    assert [line.split()[:2] for line in lines] == [["sm_86", "6:8"]] * 2
    told = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    keys = ("arch", "pattern", "dtype", "config", "registers", "spills", "stack", "shared", "sparse", "serialized")
    assert set(keys) == set(told[0])
    assert all(report["sparse"] > 0 and report["shared"] <= 99 << 10 for report in told)
    named.clear()
    assert CliRunner().invoke(main, ["build", "--arch", "sm_120a", "--pattern", "6:8", "--dtype", "fp8"]).exit_code == 0
    assert {told[0] for _, told in named} == {"sm_120", "sm_120a"}
    named.clear()
    shown = CliRunner().invoke(main, ["build", "--arch", "sm_121", "--pattern", "6:8", "--dtype", "nvfp4", "--json"])
    assert {told[:3] for _, told in named} == {("sm_121a", "6:8 pairs", "NVFP4")}
    assert [report["dtype"] for report in json.loads(shown.output)] == ["NVFP4"] * 2
    named.clear()
    shown = CliRunner().invoke(main, ["build", "--arch", "sm_90", "--dtype", "nvfp4"])
    assert (shown.exit_code, "dtypes: NVFP4 weights have no kernel for sm_90; name another" in shown.output) == (5, True)
    assert CliRunner().invoke(main, ["build", "--arch", "hopper"]).exit_code == 2
    assert CliRunner().invoke(main, ["build", "--arch", "sm_70"]).exit_code == 5


def test_a_kernel_that_spills_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    good = ahead_of_time.KernelReport("sm_80", "6:8", "int8", "", 100, 0, 0, 0, None)
    assert good.good
    for fault in ({"spills": 8}, {"stack": 8}, {"sparse": 0}, {"serialized": True}):
        bad = replace(good, **fault)
        assert not bad.good
    monkeypatch.setattr("slidesparse_nb.build_kernels", lambda **_: [good, bad], raising=False)
    assert CliRunner().invoke(main, ["build"]).exit_code == 1


def test_instructions_that_wait_for_each_other_are_found() -> None:
    log = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert jit.Built(Path(), log).serialized
    assert not jit.Built(Path(), "ptxas info    : Used 168 registers").serialized


def test_types_that_y_cannot_have() -> None:
    with pytest.raises(OperandError, match="out: int8 must be one of float32, float16, bfloat16"):
        ahead_of_time.build_kernels(out="int8")
    with pytest.raises(OperandError, match="out: 'bf16' must be one of"):
        ahead_of_time.build_products([(1, 256, 512, "6:8", "fp8", "bf16")], (9, 0), 132)


def test_numbers_that_cannot_be() -> None:
    for name, m, sms in (("m", 0, 132), ("m", "x", 132), ("m", 1.5, 132), ("sms", 1, 0)):
        with pytest.raises(OperandError, match=f"^{name}: .* must be a whole number of at least 1"):
            ahead_of_time.build_products([(m, 256, 512, "6:8", "fp8", "bfloat16")], (9, 0), sms)  # type: ignore[list-item]
    with pytest.raises(OperandError, match=r"^workers: 0 must be a whole number of at least 1"):
        ahead_of_time.build_kernels(workers=0)


def test_products_are_built_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel once: those that `choose` names; wide patterns as they are lifted for the portable kernel."""
    built: list[Any] = []
    monkeypatch.setattr(ahead_of_time, "compile_all", lambda jobs, compiler: built.extend(jobs) or jobs)
    monkeypatch.setattr(jit, "device_compiler", lambda: None)
    products = [(m, 256, 512, "6:8", "fp8", "bfloat16") for m in (1, 1, 4096)] + [(16, 256, 512, "14:16", "int8", "float16")]
    for capability, arch in (((9, 0), "sm_90a"), ((8, 9), "sm_89")):
        built.clear()
        assert ahead_of_time.build_products(products, capability, 132) == len(built)
        assert len({repr(job) for job in built}) == len(built) >= 3
        assert {job[2] for job in built} == {arch}
