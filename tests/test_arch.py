"""The protocol of architectures: nothing outside arch/ names one, and a new one is a row of a table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_gpu import BF16, P, array, close, numpy_for_cupy, ops, wanted, weight

from slidesparse_nb import arch, doctor
from slidesparse_nb.arch import sm80, sm90
from slidesparse_nb.arch.operand import Operand
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, INT8, PACKED
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.cuda import ahead_of_time
from slidesparse_nb.errors import UnsupportedError

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"sm_?\d\d|hopper|ampere|blackwell", re.IGNORECASE)
FILES = sorted(
    {*(ROOT / "slidesparse_nb").rglob("*.py"), *(ROOT / "tools").rglob("*.py")} - {*(ROOT / "slidesparse_nb/arch").glob("*")}
)

TARGETS = {"tools/build.py"}
"""Whose strings name the compiler's targets, as users name them: --arch sm_90."""


def words(file: Path) -> Iterator[str]:
    """Every name and string of a file, but its docstrings."""
    tree, targets = ast.parse(file.read_text()), str(file.relative_to(ROOT)) in TARGETS
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    for node in ast.walk(tree):
        for name in ("id", "attr", "name", "module", "asname", "arg"):
            if isinstance(value := getattr(node, name, None), str):
                yield value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told and not targets:
            yield node.value


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_outside_names_an_architecture(file: Path) -> None:
    assert not [word for word in words(file) if NAMED.search(word)]


# ---- an architecture that nobody knows -------------------------------------------------------------------------------


PARAMETERS = {
    "w": "address", "many": "integer", "n": "integer", "m": "integer", "y": "address", "y_pitch": "integer", "x": "address",
    "x_bytes": "integer", "x_pitch": "integer", "bias_type": "integer", "bias": "address", "scale_w": "address",
    "scale_x": "address", "arrived": "address", "parts": "address",
}  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """A launch of the toy's kernel, on so many blocks."""

    many: int
    source, suffix, parameters, threads, shared_bytes = "toy/gemm.cu", "t", PARAMETERS, 64, 1024
    buffers = {"w": "everything"}  # noqa: RUF012  a field otherwise

    def defines(self) -> dict[str, int | str]:
        return {"THREADS": self.threads, "SHARED_BYTES": self.shared_bytes}

    def shares(self) -> dict[str, object]:
        return {"many": self.many}

    def grid(self, problem: GemmProblem) -> tuple[int, int, int]:
        return self.many, 1, 1

    def arguments(self, problem: GemmProblem) -> dict[str, int]:
        return {"many": self.many}

    def early(self, problem: GemmProblem) -> bool:
        return False

    def counters(self, problem: GemmProblem) -> int:
        return 3

    def part_bytes(self, problem: GemmProblem) -> int:
        return 40

    def derived_bytes(self, problem: GemmProblem) -> int:
        return 0


class Toy:
    """Rows of x, weights in one buffer, parameters in an order of its own; two launches, of which more blocks are cheaper."""

    source, parameters, portable = "toy/gemm.cu", PARAMETERS, False

    def serves(self, capability: tuple[int, int]) -> bool:
        return capability == (9, 0)

    def refuses(self, capability: tuple[int, int], scheme: Scheme) -> str:
        return "" if scheme.dtype is INT8 else f"packed: the toy has no {scheme}"

    def operand(self, pattern: Pattern, k: int, scheme: Scheme) -> Operand:
        return Operand(False, None, k * scheme.dtype.bits // 8)

    def arrange(self, packed: Any, xp: Any, least_memory: bool = False) -> dict[str, Any]:
        return {"everything": packed.values}

    def again(self, candidate: Any, chosen: int, problem: GemmProblem, buffers: Any = None) -> Any:
        return candidate

    def kernels(self, pattern: Pattern, scheme: Scheme, out: str, capability: tuple[int, int]) -> Iterator[Whole]:
        yield Whole(1)

    def buffer_bytes(self, pattern: Pattern, n: int, k: int, scheme: Scheme) -> tuple[dict[str, int], ...]:
        return ({"everything": n * k},)

    def candidates(self, problem: GemmProblem, buffers: Any = None, every: bool = True) -> Iterator[tuple[Whole, ...]]:
        yield from ((Whole(2),), (Whole(5), Whole(6)))

    def cost(self, candidate: tuple[Whole, ...], problem: GemmProblem) -> float:
        return 1 / len(candidate)

    def error(self, scheme: Scheme, ks: int) -> float:
        return 0.0


@pytest.fixture
def toy_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A GPU that the toy serves first."""
    monkeypatch.setattr(arch, "ARCHITECTURES", (Toy(), *arch.ARCHITECTURES))
    monkeypatch.setattr(arch, "LEFT_ASIDE", set())
    arch.choose.cache_clear()
    with numpy_for_cupy(monkeypatch, False) as gpu:
        yield gpu
    arch.choose.cache_clear()


def test_a_row_of_the_table_is_all_that_an_architecture_needs(toy_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "RAN", arch.RAN | {(Toy.source, (9, 0))})
    packed, x = weight(40, 96, INT8), array(np.random.default_rng(0).standard_normal((7, 96)).astype(BF16))
    close(ops().matmul(x, packed), wanted(x, packed))
    close(ops().matmul(ops().quantize(x, packed), packed), wanted(x, packed))
    plan = toy_gpu.gemm.to_device(packed).bound(7, "bfloat16").plan
    assert plan.configs == (Whole(5), Whole(6))
    assert [launch.grid[0] for launch in plan.launches] == [5, 6]
    assert toy_gpu.launched == ["rows bfloat16 int8", *["gemm"] * 2, "rows bfloat16 int8", *["gemm"] * 2]
    other = weight(40, 96, BFLOAT16)
    close(ops().matmul(x, other), wanted(x, other))
    assert toy_gpu.gemm.to_device(other).arch is sm90.ARCH, "what the toy refuses is the next one's"
    assert [str(scheme) for scheme in doctor._multiplied((9, 0))] == [*map(str, PACKED), "W4A8"]
    schemes = [Scheme.of("int8"), Scheme.of("fp8")]
    jobs = [job for job, _ in ahead_of_time._jobs([(9, 0)], [Pattern(6, 8)], schemes, "bfloat16")]
    assert jobs[0] == ("toy/gemm.cu", {"THREADS": 64, "SHARED_BYTES": 1024}, "sm_90t")
    assert {job[0] for job in jobs} == {"toy/gemm.cu", "sm90/gemm.cu", "sm90/expand.cu", "sm80/gemm.cu"}
    assert ahead_of_time.launches_of([(7, 40, 96, "6:8", "int8", "bfloat16")], (9, 0), 132) == [Whole(5), Whole(6)]


def test_the_portable_kernel_serves_where_one_that_nobody_ran_is_wrong(toy_gpu: Any) -> None:
    toy_gpu.spoil = lambda config, y: np.roll(y, 1, axis=1) if config.source == Toy.source else y
    packed, x = weight(40, 96, INT8), array(np.random.default_rng(0).standard_normal((7, 96)).astype(BF16))
    assert ops().operand_bytes(7, 96, "6:8", "int8", (9, 0)) == (Operand(False, None, 96).bytes(7), True)
    close(ops().matmul(x, packed), wanted(x, packed))
    there = toy_gpu.gemm.to_device(packed)
    assert (there.arch, there.device.portable) == (sm80.ARCH, True)
    assert arch.for_capability((9, 0), scheme=packed.scheme) is sm80.ARCH
    assert ops().operand_bytes(7, 96, "14:16", "int8", (9, 0))[0] == there.arch.operand(P, 96, packed.scheme).bytes(7)
    assert isinstance(arch.for_capability((9, 0)), Toy), "other schemes were not tested"


@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16", "18:20"])
@pytest.mark.parametrize(("own", "capability"), [*zip(arch.ARCHITECTURES, ((10, 0), (9, 0), (12, 0)), strict=True)])
def test_the_bytes_of_what_is_arranged(own: arch.Arch[Any], capability: tuple[int, int], pattern: str) -> None:
    w = np.random.default_rng(0).standard_normal((70, 333)).astype(np.float32)
    for scheme in arch.multiplied(own, capability):
        over = scheme.pattern(pattern)
        packed = reference.pack(reference.prune(w, over), over, scheme)
        forms = own.buffer_bytes(over, 70, 333, scheme)
        for least in (True, False):
            made = own.arrange(replace(packed, values=packed.values.view(packed.dtype.raw)), np, least)
            assert {name: buffer.nbytes for name, buffer in made.items()} in forms


# ---- problems, and what is refused -----------------------------------------------------------------------------------


def test_a_problem_is_a_plain_value(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem.of((3, 64, 128, "6:8", "fp8", "bfloat16"), Device((9, 0), 132))
    assert str(problem) == "y[3, 64] = x[3, 128] @ w.T, 6:8 (2 zeros in 8) float8_e4m3fn -> bfloat16"
    assert len({problem, replace(problem), replace(problem, m=4)}) == 2
    assert arch.of(problem) is sm90.ARCH
    monkeypatch.setenv("SLIDESPARSE_PORTABLE", "1")
    assert arch.of(problem) is sm90.ARCH, "a device is what it was when it was named"
    assert arch.of(replace(problem, device=Device((9, 0), 132))) is sm80.ARCH


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_numbers_of_tokens_that_share_a_choice(capability: tuple[int, int], dtype: Any) -> None:
    """It is a candidate for each of them, and the model's own choice up to 512 tokens."""
    device = Device(capability, 132)
    for m in (1, 5, 9, 63, 121, 250, 383, 511, 513, 1001, 1537, 2045, 2049, 3333, 9999):
        problem = GemmProblem(m, 3584, 1024, Pattern(6, 8), Scheme.of(dtype), "bfloat16", device)
        chosen = arch.modelled(problem)
        assert chosen in list(arch.of(problem).candidates(problem))
        assert m > 512 or chosen == arch.choose(problem)
        assert [*chosen] == ahead_of_time.launches_of([(m, 3584, 1024, "6:8", dtype, "bfloat16")], capability, 132)


def test_what_no_kernel_multiplies() -> None:
    problem = GemmProblem.of((3, 64, 128, "6:8", "int8", "bfloat16"), Device((9, 0), 132))
    with pytest.raises(UnsupportedError, match=r"^problem: 2 x y\[3, 64\] = .*: no kernel multiplies groups"):
        arch.choose(replace(problem, groups=2))
    for major, minor in ((9, 0), (10, 0), (8, 9)):
        device, pairs = Device((major, minor), 132, portable=False), Pattern(6, 8, 2)
        told = rf"need compute capability 12\.0 or 12\.1, this device has {major}\.{minor}; pack as int8 or bfloat16 for it"
        with pytest.raises(UnsupportedError, match=f"^packed: NVFP4 weights {told}$"):
            arch.choose(replace(problem, device=device, pattern=pairs, scheme="NVFP4"))


@pytest.mark.parametrize("own", [sm80.ARCH, sm90.ARCH], ids=["portable", "own"])
def test_a_scheme_is_refused_for_its_activations_too(own: arch.Arch[Any]) -> None:
    int8 = Scheme.of("int8")
    assert int8 in arch.multiplied(own, (9, 0))
    assert own.refuses((9, 0), replace(int8, name="INT8_W8A16", activations=Scheme.of("bf16").activations))


def test_wide_groups_are_lifted_in_memory_where_registers_are_too_few() -> None:
    wide = Pattern(16, 18)
    int8 = Scheme.of("int8")
    assert sm80.ARCH.operand(Pattern(14, 16), 100, int8) == Operand(False, None, 100)
    assert sm80.ARCH.operand(wide, 100, int8) == Operand(False, wide, wide.expanded_k(100))
    (config,) = arch.choose(GemmProblem(8, 64, 100, wide, INT8, "bfloat16", Device((8, 6), 84)))
    assert config.layout.pattern == Pattern(2, 4)
    assert config.arguments(GemmProblem(8, 64, 100, wide, INT8, "bfloat16", Device((8, 6), 84))) == {
        "blocks": config.layout.blocks(wide.expanded_k(100))
    }
