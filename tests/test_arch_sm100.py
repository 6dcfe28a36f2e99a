"""The kernel on tcgen05.mma.sp: its launches on a model of a pair of thread blocks (tcgen05.py), and its machine code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compilers import locked, most_spilled
from tcgen05 import Pair

from slidesparse_nb.arch import choose, for_capability, multiplied, of, sm80, sm90, sm100, sm100_layout
from slidesparse_nb.arch.operand import to_tiles
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED, DType
from slidesparse_nb.core.pattern import Pattern, known_patterns
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.cuda import ahead_of_time
from slidesparse_nb.cuda.jit import cache as jit

pytestmark = pytest.mark.usefixtures("cache")

P = Pattern(6, 8)
ALL = [sm100.Config(dtype, "bfloat16", tokens) for dtype in PACKED for tokens in sm100.TOKENS]


def multiply(
    config: sm100.Config, m: int, n: int, k: int, pattern: Pattern = P, pairs: int = 1, seed: int = 0,
    defines: Mapping[str, int | str] | None = None, fault: str = "",
) -> tuple[Any, Any]:  # fmt: skip
    """y of the model and y of NumPy, float32 [m, n], exact: small integers, and scales that are powers of two."""
    rng = np.random.default_rng(seed)
    w = reference.prune(rng.integers(-7, 8, (n, k)).astype(np.float32), pattern).astype(config.dtype.numpy)
    scales = [2.0 ** rng.integers(-3, 4, count).astype(np.float32) for count in (m, n)]
    packed = reference.pack(w, pattern, config.dtype, scale=scales[1][:, None] if config.dtype.bits == 8 else None)
    x, bias = rng.integers(-7, 8, (m, k)).astype(config.dtype.numpy), rng.integers(-7, 8, n).astype(np.float32)
    problem = GemmProblem(m, n, k, pattern, Scheme.of(config.dtype), "float32", Device((10, 0), 2 * pairs))
    assert to_tiles(x, pattern).nbytes == sm100.ARCH.operand(pattern, k, problem.scheme).bytes(m)
    y = np.full((m, n), np.nan, np.float32)
    weights = sm100.ARCH.arrange(packed)["weights"]
    for number in range(config.grid(problem)[0] // 2):
        Pair(config, problem, to_tiles(x, pattern), weights, (*scales,), bias, y, number, rng, defines, fault).run()
    wanted = x.astype(np.float32) @ w.astype(np.float32).T
    if config.dtype.bits == 8:
        wanted = wanted * scales[0][:, None] * scales[1]
    return y, wanted + bias


# ---- the model of the data's movement --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ALL, ids=str)
def test_a_pair_of_blocks_multiplies(config: sm100.Config) -> None:
    """Tails of m, n and k; three tiles for the first pair, so that both sets of sums are used again."""
    m, n = 2 * config.tokens + 13, 300
    np.testing.assert_array_equal(*multiply(config, m, n, 200, pairs=2, seed=config.tokens))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("pattern", [*known_patterns(), Pattern(22, 24)], ids=str)
def test_every_pattern(pattern: Pattern, dtype: DType) -> None:
    np.testing.assert_array_equal(*multiply(sm100.Config(dtype, "float32", 32), 40, 260, 75, pattern))


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("k_tiles", [2, 4, 18])
def test_no_order_of_events_deadlocks_or_overwrites(k_tiles: int, dtype: DType) -> None:
    """Rings that are not filled, filled, and passed several times, by three tiles; every seed gives another order."""
    config = sm100.Config(dtype, "float32", 256)
    k = k_tiles * sm100_layout.COLUMNS * 2 // 3 - 5
    for seed in range(6 if k_tiles < 10 else 2):
        np.testing.assert_array_equal(*multiply(config, 40, 700, k, seed=seed))


def test_arranged_metadata_are_the_packed_form_in_tiles() -> None:
    """8-bit types: rows of 16 bytes, tiles of 128 rows; quarters as Hopper's activations are stored."""
    rng = np.random.default_rng(0)
    w = reference.prune(rng.integers(-7, 8, (256, 160)).astype(np.float32), P).astype(np.int8)
    packed = reference.pack(w, P, INT8, scale=np.ones((256, 1), np.float32))
    made = sm100_layout.arrange(packed)["weights"][..., sm100_layout.VALUE_BYTES :]
    assert made.shape == (2, 2, 128 * 16)
    tile = packed.meta[128:, :16].reshape(128, 4, 4)[:, [0, 2, 1, 3]].reshape(-1)
    np.testing.assert_array_equal(made[0, 1], tile)


# ---- mistakes are caught ---------------------------------------------------------------------------------------------


def differs(*given: Any, **more: Any) -> bool:
    """Whether the model computes something else, or refuses."""
    try:
        y, wanted = multiply(*given, **more)
    except (AssertionError, IndexError, KeyError, ValueError):
        return True
    return not np.array_equal(y, wanted)


def swapped(config: sm100.Config, changed: Mapping[int, tuple[int, int]]) -> str:
    """STEPS in which step i has another value in a place: {i: (place, value)}."""
    steps = [list(step) for step in sm100_layout.steps(config.dtype, config.tokens)]
    for i, (place, value) in changed.items():
        steps[i][place] = value
    return ", ".join("{" + ", ".join(map(str, step)) + "}" for step in steps)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
def test_every_field_of_every_descriptor_matters(dtype: DType) -> None:
    config = sm100.Config(dtype, "float32", 32)
    given = (config, 40, 260, 150)
    assert not differs(*given)
    told = config.defines()
    for fields, names in (
        (sm100_layout.INSTRUCTION, ["INSTRUCTION_DESCRIPTOR"]),
        (sm100_layout.SHARED, ["ACTIVATIONS_DESCRIPTOR", "VALUES_DESCRIPTOR", "METADATA_DESCRIPTOR"]),
    ):
        for name in names:
            for field, (first, _) in fields.items():
                if field != "leading":  # which no operand uses
                    assert differs(*given, defines={name: int(str(told[name]), 0) ^ 1 << first}), (name, field)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_every_step_and_address_matters(dtype: DType) -> None:
    config = sm100.Config(dtype, "float32", 32)
    given, told = (config, 40, 260, 150), config.defines()
    for i, step in enumerate(sm100_layout.steps(dtype, config.tokens)):
        for place, value in enumerate(step):
            assert differs(*given, defines={"STEPS": swapped(config, {i: (place, value ^ (2 if place < 3 else 1))})}), (
                i,
                place,
            )
    for name, by in (("VALUES_AT", 512), ("METADATA_AT", 16), ("STAGE_BYTES", -1024)):
        assert any(differs(*given, seed=s, defines={name: int(told[name]) + by}) for s in range(9)), name
    large = sm100.Config(dtype, "float32", 256)
    told = large.defines()
    for name, by in (("SECOND_COLUMN", -32), ("SECOND_COLUMN", 4), ("METADATA_COLUMN", -4), ("METADATA_COLUMN", 512 - 480)):
        assert any(differs(large, 40, 700, 500, seed=s, defines={name: int(told[name]) + by}) for s in range(40)), (name, by)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_every_place_of_the_arranged_weights_matters(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong lane, nibble, chunk or order of k."""
    given = (sm100.Config(dtype, "float32", 32), 40, 260, 150)
    metadata, values = sm100_layout.metadata_at(dtype), sm100_layout.value_at()
    other = sm100_layout.metadata_at(BFLOAT16 if dtype is INT8 else INT8)
    wrong = (
        ("metadata_at", lambda _: np.roll(metadata, 16)),  # the next lane
        ("metadata_at", lambda _: metadata ^ 1),
        ("metadata_at", lambda _: metadata ^ 2),
        ("metadata_at", lambda _: metadata ^ 4),  # the next column
        ("metadata_at", lambda _: other),
        ("value_at", lambda: np.arange(len(values))),  # no swizzle
        ("value_at", lambda: values ^ 64),
        *([("QUARTERS", (0, 1, 2, 3))] if dtype is INT8 else []),
    )
    for name, made in wrong:
        with monkeypatch.context() as patch:
            patch.setattr(sm100_layout, name, made)
            assert differs(*given), name
    with monkeypatch.context() as patch:
        compress = reference.compress
        patch.setattr(reference, "compress", lambda *a: (compress(*a)[0], compress(*a)[1] >> 4 | compress(*a)[1] << 4))
        assert differs(*given), "nibbles"


FAULTS = (
    "slots start full", "loads do not wait", "loads end early", "sums are not waited for", "metadata share a slot",
    "slots are released early", "relay does not wait", "the shared chunk is read last", "sums are released early",
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_wait_matters(fault: str) -> None:
    config = sm100.Config(INT8, "float32", 256)
    assert not any(differs(config, 40, 700, 300, seed=seed) for seed in range(4))
    assert any(differs(config, 40, 700, 300, seed=seed, fault=fault) for seed in range(40))


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_descriptors_are_those_of_an_independent_program() -> None:
    """Of 128 outputs x 128 tokens: computed beside the manual's tables, before this project had them."""
    for dtype, word in ((BFLOAT16, 0x8200494), (FLOAT8, 0x8200014), (INT8, 0x82004A4)):
        twice = sm100_layout.instruction_descriptor(dtype, 128)
        assert twice == word + (8 << 24), "a pair has twice the outputs"
    with pytest.raises(AssertionError, match="stride"):
        sm100_layout.encode(sm100_layout.SHARED, stride=1 << 14)


def test_who_serves() -> None:
    int8, fp8 = Scheme.of("int8"), Scheme.of("fp8")
    assert for_capability((10, 0)) is for_capability((10, 3)) is sm100.ARCH
    assert for_capability((10, 0), portable=True) is sm80.ARCH
    assert [scheme.dtype for scheme in multiplied(sm100.ARCH, (10, 0))] == [INT8, FLOAT8, BFLOAT16, FLOAT16]
    assert [scheme.dtype for scheme in multiplied(sm100.ARCH, (10, 3))] == [FLOAT8, BFLOAT16, FLOAT16]
    assert for_capability((10, 3), scheme=int8) is sm80.ARCH
    assert for_capability((10, 3), scheme=fp8) is for_capability((10, 0), scheme=int8) is sm100.ARCH
    problem = GemmProblem.of((512, 4096, 4096, "6:8", "int8", "bfloat16"), Device((10, 3), 148, portable=False))
    assert of(problem) is sm80.ARCH
    assert choose(problem)[0].source == sm80.ARCH.source
    assert of(replace(problem, scheme=fp8)) is sm100.ARCH
    operands = [arch.operand(P, 1000, int8) for arch in (sm90.ARCH, sm100.ARCH)]
    assert operands[0] == operands[1], "one kernel quantizes for both"


def test_tiles_grow_with_m() -> None:
    chosen = []
    for m in (1, 32, 64, 128, 512, 4096):
        problem = GemmProblem.of((m, 8192, 8192, "6:8", "fp8", "bfloat16"), Device((10, 0), 148, portable=False))
        (config,) = choose(problem)
        chosen.append(config.tokens)
        assert config.grid(problem)[0] == 2 * min(config.tiles(problem), 74)
        assert not config.part_bytes(problem) + config.derived_bytes(problem) + config.counters(problem)
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (32, 256)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, BFLOAT16], ids=str)
def test_the_host_launches_it(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the kernel; then from x and a packed weight, its operand made in one launch, to the arguments of the kernel."""
    pytest.importorskip("numba_cuda")
    from numpy_gpu import BF16, array, close, numpy_for_cupy, ops, wanted, weight

    monkeypatch.setattr(sm100.Blackwell, "serves", lambda own, capability: True)  # the GPU of the fakes is another
    choose.cache_clear()
    with numpy_for_cupy(monkeypatch, False) as gpu:
        packed, x = weight(300, 96, dtype), array(np.random.default_rng(0).standard_normal((7, 96)).astype(BF16))
        close(ops().matmul(x, packed), wanted(x, packed))
        assert gpu.launched[-2:] == [f"tiles bfloat16 {dtype}", "gemm"]
        assert set(gpu.launched[:-2]) == {"gemm"}  # of the test
        plan = gpu.gemm.to_device(packed).bound(7, "bfloat16").plan
        assert plan.configs == (sm100.Config(dtype, "bfloat16", 32),)
        assert plan.bytes == plan.parts_at, "nothing but the operand and its scales"
    choose.cache_clear()


# ---- machine code ----------------------------------------------------------------------------------------------------

MATRIX = [
    (capability, config)
    for capability in ((10, 0), (10, 3))
    for config in ALL
    if capability != (10, 3) or config.dtype is not INT8
]
SAMPLE = [(c, config) for c, config in MATRIX if config.tokens == 256 and config.dtype is not FLOAT16]
OPERATIONS = {INT8: "UTCIMMA", FLOAT8: "UTCQMMA", BFLOAT16: "UTCHMMA", FLOAT16: "UTCHMMA"}


def named(value: Any) -> str:
    return jit.architecture(value) if isinstance(value, tuple) else f"{value.dtype} {value.tokens}"


def compiles(capability: tuple[int, int], config: sm100.Config) -> None:
    built = jit.build(config.source, config.defines(), jit.architecture(capability) + config.suffix)
    assert max(built.spills, built.stack) <= most_spilled("nvidia-cuda-nvrtc")
    assert ahead_of_time.sparse_instructions(built) == len(sm100_layout.steps(config.dtype, config.tokens))
    tool = ahead_of_time.disassembler()
    assert tool
    text = subprocess.run([tool, "-c", str(built.cubin)], check=True, capture_output=True, text=True).stdout
    assert len(re.findall(rf"\b{OPERATIONS[config.dtype]}\.2CTA gdesc.* idesc", text)) == 2 * sm100_layout.blocks(config.dtype)
    assert len(re.findall(r"\bUTCCP\S*\.2CTA\.128dp128bit\b", text)) == 1, "one copy of metadata a k-tile"
    for selector in {step[3] for step in sm100_layout.steps(config.dtype, config.tokens)}:
        word = sm100_layout.instruction_descriptor(config.dtype, config.tokens) | selector
        assert word & 4, "sparse"
        assert f"{word:#x}" in text or not locked("nvidia-cuda-nvrtc", "nvidia-cuda-nvdisasm")


@pytest.mark.parametrize(("capability", "config"), SAMPLE, ids=named)
def test_the_largest_tiles_compile(capability: tuple[int, int], config: sm100.Config) -> None:
    compiles(capability, config)


@pytest.mark.every_kernel
@pytest.mark.parametrize(("capability", "config"), [case for case in MATRIX if case not in SAMPLE], ids=named)
def test_every_tile_compiles(capability: tuple[int, int], config: sm100.Config) -> None:
    compiles(capability, config)


def test_the_kernel_asserts_what_the_host_says() -> None:
    config = sm100.Config(FLOAT8, "bfloat16", 256)
    changed = {
        "INSTRUCTION_DESCRIPTOR": "0x10400010",
        "STEPS": "{0, 0, 0, 0}, {4, 2, 1, 0}",
        "METADATA_COLUMN": 484,
        "STAGE_BYTES": 26640,
    }
    for name, value in changed.items():
        with pytest.raises(jit.KernelError, match="does not compile"):
            jit.build(config.source, {**config.defines(), name: value}, "sm_100a")
