"""matmul and quantize on a GPU, all but the GPU: CuPy is played by NumPy, and launches by the references of their kernels.

What the kernels compute is proved elsewhere (test_device_simulator.py, tests/gpu). Here it is what Python hands them: which
kernel, which addresses, strides and offsets into which memory, and how often.
"""

from __future__ import annotations

import copy
import gc
import importlib
import re
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from device_cases import awkward_rows
from numpy_gpu import BF16, F16, F32, Array, Tensor, array, close, empty, gpu, numpy_for_cupy, ops, wanted, weight

from slidesparse_nb.arch import ARCHITECTURES, sm80, sm90
from slidesparse_nb.arch.operand import to_tiles
from slidesparse_nb.core import reference
from slidesparse_nb.core.activations import QuantizedActivations
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8, PACKED, DType
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.cuda.jit import cache
from slidesparse_nb.errors import OperandError

__all__ = ["gpu"]  # the fixture


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("source", [BF16, F16, F32], ids=str)
def test_matmul(gpu: Any, dtype: DType, source: Any) -> None:
    packed = weight(40, 96, dtype)
    x = array(awkward_rows(7, 96, F16).astype(source))
    bias = array(np.arange(40, dtype=np.float32))
    close(ops().matmul(x, packed, bias=bias), wanted(x, packed, np.asarray(bias)))
    form = "tiles" if gpu.own else "rows" if Scheme.of(dtype).scaled else "copy"
    if form == "copy" and source == dtype.numpy:
        assert gpu.launched == ["gemm"]
    else:
        assert gpu.launched == [f"{form} {source} {dtype}", "gemm"]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_parts(gpu: Any, dtype: DType) -> None:
    """Rows, columns and concatenated weights are arranged anew, from views."""
    packed = weight(40, 90, dtype)
    parts = [packed.rows(8, 37), packed.columns(16, 64), packed.columns(64, 90), packed.rows(1, 9).columns(32, 90)]
    parts.append(type(packed).concat([parts[0], packed.rows(0, 8)]))
    for part in parts:
        x = array(np.random.default_rng(5).standard_normal((7, part.k)).astype(BF16))
        close(ops().matmul(x, part), wanted(x, part))


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("k", [64, 61])
def test_quantized_once(gpu: Any, dtype: DType, k: int) -> None:
    first, second = weight(24, k, dtype), weight(16, k, dtype, seed=1)
    x = array(np.random.default_rng(2).standard_normal((2, 5, k)).astype(BF16))
    flat = np.asarray(x).reshape(10, k)
    shared = ops().quantize(x, first)
    assert len(gpu.launched) == 1
    assert (shared.k, shared.m, shared.lead) == (k, 10, (2, 5))
    assert isinstance(shared, gpu.gemm.TiledActivations) == gpu.own
    assert ("values" in vars(shared)) == (not gpu.own)
    gpu.launched.clear()
    for packed in (first, second):
        y = ops().matmul(shared, packed)
        assert y.shape == (2, 5, packed.n)
        close(np.asarray(y).reshape(10, -1), wanted(flat, packed))
    if gpu.own or k == 64:  # the portable kernel loads whole 16-byte chunks
        assert gpu.launched == ["gemm"] * 2
    by_pattern = ops().quantize(x, "6:8", dtype)
    close(np.asarray(ops().matmul(by_pattern, first)).reshape(10, -1), wanted(flat, first))

    with np.errstate(over="ignore"):
        expected = reference.quantize(flat, dtype)[0] if Scheme.of(dtype).scaled else flat.astype(dtype.numpy)
    np.testing.assert_array_equal(np.asarray(shared.values).view(dtype.raw), expected.view(dtype.raw))
    assert shared.values is shared.values
    assert "6:8" in repr(shared) or not gpu.own


@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("source", [BF16, F32], ids=str)
@pytest.mark.parametrize("k", [64, 61])
def test_quantized_after_a_norm_or_a_gate(gpu: Any, dtype: DType, source: Any, k: int) -> None:
    packed, rng = weight(24, k, dtype), np.random.default_rng(2)
    x, residual, gamma, gates = (
        rng.standard_normal(shape).astype(source) for shape in ((2, 5, k), (2, 5, k), (k,), (2, 5, 2 * k))
    )
    operations = {
        "rms_norm": lambda on, to: ops().rms_norm(on(x), on(gamma), 1e-5, *to),
        "add_rms_norm": lambda on, to: ops().rms_norm(on(x), on(gamma), 1e-5, *to, residual=on(residual)),
        "silu_and_mul": lambda on, to: ops().silu_and_mul(on(gates), *to),
        "gelu_and_mul": lambda on, to: ops().gelu_and_mul(on(gates), *to),
    }
    for kind, operation in operations.items():
        here, there, by_pattern = (
            operation(np.asarray, (packed,)),
            operation(array, (packed,)),
            operation(array, ("6:8", dtype)),
        )
        gpu.launched.clear()
        operation(array, (packed,))
        assert len(gpu.launched) == 1
        fused = source == BF16 and k == 64 and (gpu.own or Scheme.of(dtype).scaled)
        assert (gpu.launched[0].split()[0] == kind) == fused
        if kind == "add_rms_norm":
            (here, want), (there, got), (by_pattern, _) = here, there, by_pattern
            assert got.shape == x.shape
            assert got.dtype == source
            np.testing.assert_array_equal(np.asarray(got), want)
        for made in (there, by_pattern):
            assert (made.k, made.lead, made.source) == (k, (2, 5), source)
            np.testing.assert_array_equal(np.asarray(made.values).view(dtype.raw), here.values.view(dtype.raw))
            close(ops().matmul(made, packed), ops().matmul(here, packed))


def test_few_rows_of_a_gate_have_several_blocks_each(gpu: Any) -> None:
    packed, rng = weight(8, 4096, INT8), np.random.default_rng(3)
    for m, by in ((1, " by 4"), (24, " by 4"), (25, " by 2"), (64, " by 2"), (65, "")):
        x = rng.standard_normal((m, 8192)).astype(BF16)
        gpu.launched.clear()
        made = ops().silu_and_mul(array(x), packed)
        assert gpu.launched == [f"silu_and_mul bfloat16 int8{by if gpu.own else ''}"]
        np.testing.assert_array_equal(np.asarray(made.values), ops().silu_and_mul(x, packed).values)


def test_operands_of_norms_and_gates_that_do_not_fit() -> None:
    x, ones = np.zeros((3, 16), np.float32), np.ones(16, np.float32)
    for call, message in (
        (lambda: ops().rms_norm(x, ones[1:], 0, "6:8", "int8"), r"gamma: float32 \(15,\) must be float32 \(16,\), as x is"),
        (lambda: ops().rms_norm(x, ones.astype(F16), 0, "6:8", "int8"), r"gamma: float16 \(16,\) must be float32"),
        (lambda: ops().rms_norm(x, None, 0, "6:8", "int8"), r"gamma: NoneType \(\) must be"),
        (lambda: ops().rms_norm(x, ones, 0, "6:8", "int8", residual=x[:2]), r"residual: float32 \(2, 16\) must be"),
        (lambda: ops().rms_norm(x, ones, -1, "6:8", "int8"), "epsilon: -1 must be a number from 0 to the largest of float32"),
        (lambda: ops().rms_norm(x, ones, 10**400, "6:8", "int8"), "epsilon: <an integer of 1329 bits> must be"),
        (lambda: ops().rms_norm(x, ones, 0, None, "int8"), "packed: is missing; pass the weights"),  # type: ignore[arg-type]
        (lambda: ops().rms_norm(x, ones, "tiny", "6:8", "int8"), "epsilon: 'tiny' must be"),
        (lambda: ops().rms_norm(x, ones.tolist(), 0, "6:8", "int8"), "gamma: list must be a NumPy array, as x is"),
        (lambda: ops().silu_and_mul(x[:, :15], "6:8", "int8"), r"x: shape \(3, 15\) must be \[..., 2k\]"),
        (lambda: ops().gelu_and_mul(x, weight(8, 16, INT8)), r"must be \[..., 32, twice the k of packed\]"),
    ):
        with pytest.raises(OperandError, match=message):
            call()
    one, same = (ops().rms_norm(x + 1, ones, epsilon, "6:8", "int8").scale for epsilon in (1.0, np.int64(1)))
    np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_quantized_for_another_pattern(gpu: Any, dtype: DType) -> None:
    packed = weight(16, 64, dtype)
    x = array(np.random.default_rng(3).standard_normal((9, 64)).astype(F32))
    q, scale = (
        reference.quantize(np.asarray(x), dtype) if Scheme.of(dtype).scaled else (np.asarray(x).astype(dtype.numpy), None)
    )
    scale = None if scale is None else array(scale)
    tiles = array(to_tiles(q, Pattern(4, 6)))
    other = gpu.gemm.TiledActivations(tiles, Pattern(4, 6), 64, scale, (9,), dtype, F32)
    close(ops().matmul(other, packed), wanted(x, packed))
    assert gpu.launched[-1] == "gemm"
    assert "values" not in vars(other)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_nothing_is_allocated_with_a_workspace(gpu: Any, dtype: DType) -> None:
    packed = weight(300, 512, dtype)
    for m in (3, 40):
        x, y = array(np.random.default_rng(m).standard_normal((m, 512)).astype(BF16)), empty((m, 300), BF16)
        size = ops().workspace_bytes(m, packed, BF16)
        whole = empty(size + 64, np.uint8)
        workspace = whole[:size]
        whole[size:] = 0x5A
        ops().matmul(x, packed, out=y, workspace=workspace)
        gpu.allocated = 0
        for _ in range(2):
            y.view(np.uint8)[...] = 0xA5
            assert ops().matmul(x, packed, out=y, workspace=workspace) is y
            close(y, wanted(x, packed))
        shared = ops().quantize(x, packed)
        gpu.allocated = 0
        close(ops().matmul(shared, packed, out=y, workspace=workspace), wanted(x, packed))
        assert gpu.allocated == 0
        assert (whole[size:] == 0x5A).all()
        with pytest.raises(OperandError, match=f"workspace: {size - 16} bytes must be at least {size}"):
            ops().matmul(x, packed, out=y, workspace=workspace[:-16])


@pytest.mark.parametrize("layout", ["odd address", "transposed", "every second", "backwards", "rows backwards"])
@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
def test_strides(gpu: Any, dtype: DType, layout: str) -> None:
    packed = weight(16, 64, dtype)
    x = np.random.default_rng(4).standard_normal((10, 64)).astype(BF16)
    space = array(np.zeros(2 * x.size + 1, BF16))
    placed = {
        "odd address": space[1 : 1 + x.size].reshape(10, 64),
        "transposed": space[: x.size].reshape(64, 10).T,
        "every second": space[: 2 * x.size].reshape(10, 128)[:, ::2],
        "backwards": space[: x.size].reshape(10, 64)[::-1, ::-1],
        "rows backwards": space[: x.size].reshape(10, 64)[::-1],
    }[layout]
    placed[...] = x
    close(ops().matmul(placed, packed), wanted(x, packed))


def test_y_of_any_strides(gpu: Any) -> None:
    packed = weight(16, 64, INT8)
    x = array(np.random.default_rng(5).standard_normal((2, 6, 64)).astype(F32))
    expected = wanted(np.asarray(x).reshape(12, 64), packed, out=F16).reshape(2, 6, 16)
    for out in (empty((2, 6, 16), F16), empty((16, 6, 2), F16).T, empty((2, 6, 40), F16)[:, :, 8:24]):
        out.view(np.uint16)[...] = 0x7E00
        assert ops().matmul(x, packed, out=out) is out
        close(out, expected)


def test_nothing_to_do(gpu: Any) -> None:
    packed = weight(16, 64, INT8)
    assert ops().matmul(array(np.zeros((0, 64), np.float32)), packed).shape == (0, 16)
    empty_x = ops().quantize(array(np.zeros((3, 0, 64), np.float32)), packed)
    assert ops().matmul(empty_x, packed).shape == (3, 0, 16)
    assert empty_x.values.shape == (0, 64)
    assert ops().workspace_bytes(0, packed, BF16) == ops().workspace_bytes(0, packed, "bfloat16") == 0


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_no_columns(gpu: Any, dtype: DType) -> None:
    bias = np.arange(5, dtype=np.float32)
    y = ops().matmul(array(np.zeros((3, 0), np.float32)), weight(5, 0, dtype), bias=array(bias))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (3, 5)))


def test_a_server_sees_any_number_of_shapes(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidesparse_nb.cuda.weight.MOST_BOUND", 4)
    packed = weight(16, 64, INT8)
    for m in range(1, 12):
        x = array(np.ones((m, 64), np.float32))
        assert ops().matmul(x, packed).shape == (m, 16)
        assert len(gpu.gemm.to_device(packed).plans) <= 4


def test_weights_of_one_shape_share_kernels(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And plans: only the first of them has its kernels looked up."""
    plans: Any = importlib.import_module("slidesparse_nb.cuda.plan")
    asked: list[Any] = []
    build = plans.jit.build
    monkeypatch.setattr(plans.jit, "build", lambda *job: asked.append(job) or build(*job))
    x = array(np.ones((40, 512), np.float32))
    weights = [weight(300, 512, INT8, seed=seed) for seed in range(3)]
    for packed in weights:
        close(ops().matmul(x, packed), wanted(x, packed))
    bound = [gpu.gemm.to_device(packed).bound(40, "float32") for packed in weights]
    assert len({id(each.plan) for each in bound}) == 1
    assert len(asked) == len(bound[0].plan.configs)


@pytest.mark.parametrize(
    ("m", "out_dtype", "message"),
    [(-1, "float32", "m: -1"), (4, "float64", "out_dtype: float64 must be"), (4, "foo", "out_dtype: 'foo' must")],
)
def test_workspaces_that_cannot_be(gpu: Any, m: int, out_dtype: str, message: str) -> None:
    with pytest.raises(OperandError, match=message):
        ops().workspace_bytes(m, weight(16, 64, INT8), out_dtype)


def test_what_is_refused(gpu: Any) -> None:
    packed = weight(16, 64, INT8)
    x = array(np.ones((4, 64), np.float32))
    q = ops().quantize(x, packed)
    unscaled, long = (QuantizedActivations(q.values, *of, INT8, F32) for of in ((None, (4,)), (q.scale, (5,))))
    for change, message in (
        ({"x": q, "packed": weight(16, 64, FLOAT8)}, "x: is quantized to int8, but packed holds float8_e4m3fn"),
        ({"x": q, "packed": weight(16, 72, INT8)}, "x: k=64 must be 72"),
        ({"packed": weight(16, 72, INT8)}, r"x: shape \(4, 64\) must be \[..., 72\]"),
        ({"x": unscaled}, r"x.scale: must be a contiguous float32 array \[4, 1\]"),
        ({"x": long}, r"x.values: int8 \(4, 64\) must be int8"),
        ({"x": array(np.zeros((4, 64), np.int32))}, "x: int32 must be one of"),
        ({"out": array(np.zeros((4, 15), F32))}, "out: float32"),
        ({"out": np.zeros((4, 16), F32)}, "out: is a NumPy array, but x is on a GPU"),
        ({"out_dtype": np.int8}, "out_dtype: int8 must be"),
        ({"bias": array(np.zeros(15, F32))}, "bias: float32"),
        ({"stream": "fast"}, "stream: str is not a CUDA stream"),
    ):
        with pytest.raises(OperandError, match=f"^{message}"):
            ops().matmul(**{"x": x, "packed": packed, **change})
    with pytest.raises(OperandError, match=r"^x: shape \(4, 64\) must be \[..., 72\]"):
        ops().quantize(x, weight(16, 72, INT8))
    if gpu.own:
        scale = array(np.ones((40, 1), np.float32))
        wrong = gpu.gemm.TiledActivations(q.tiles, q.pattern, q.k, scale, (40,), INT8, F32)
        with pytest.raises(OperandError, match=r"x.tiles: uint8 .* must be .* bytes; make x with quantize"):
            ops().matmul(wrong, packed)


def test_out_has_memory_of_its_own(gpu: Any) -> None:
    packed = weight(16, 16, INT8)
    x = array(np.random.default_rng(8).standard_normal((4, 16)).astype(F32))
    q = ops().quantize(x, packed)
    memory = empty(4096 + ops().workspace_bytes(4, packed, F32), np.uint8)

    def place(first: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Any:
        """float32 in `memory`, from its byte `first` on."""
        return np.ndarray(shape, F32, memory, first, strides).view(Array)

    out, scale, workspace = place(64, (4, 16)), place(0, (4, 1)), memory[320:]  # out ends where the workspace begins
    scale[...] = np.asarray(q.scale)
    scaled = copy.copy(q)
    scaled.__dict__["scale"] = scale
    close(ops().matmul(scaled, packed, out=out, workspace=workspace), wanted(x, packed))
    for name, given, operands in (
        ("x", out, {}),
        ("x", out[::-1], {}),
        ("x.scale", scaled, {"out": place(8, (4, 16))}),
        ("x.scale", scaled, {"out": place(12, (4, 16), (128, 4))}),
        ("bias", x, {"bias": out[2]}),
        ("bias", scaled, {"bias": place(316, (16,))}),
        ("bias", x, {"bias": np.ndarray((16,), np.float64, memory, 256).view(Array)}),
        ("workspace", x, {"workspace": memory[48:]}),
        ("workspace", scaled, {"workspace": memory[304:]}),
    ):
        launched = len(gpu.launched)
        with pytest.raises(OperandError, match=f"^out: shares memory with {name}; pass an array of its own$"):
            ops().matmul(given, packed, **{"out": out, **operands})
        assert len(gpu.launched) == launched


def test_out_beside_other_operands_in_one_array(gpu: Any) -> None:
    packed, both = weight(16, 16, INT8), array(np.random.default_rng(9).standard_normal((5, 32)).astype(F32))
    x, y, bias = both[1:, :16], both[1:, 16:], both[0, 16:]
    expected = wanted(x.copy(), packed, np.array(bias))
    assert ops().matmul(x, packed, bias=bias, out=y) is y
    close(y, expected)


def test_the_stream_is_the_one_given(gpu: Any) -> None:
    packed, x = weight(16, 64, INT8), array(np.ones((4, 64), np.float32))
    close(ops().matmul(x, packed, stream=99), wanted(x, packed))  # the launches assert it
    close(ops().matmul(ops().quantize(x, packed, stream=99), packed), wanted(x, packed))
    assert gpu.streams == [7]


@pytest.mark.parametrize(
    "stream",
    [99, SimpleNamespace(ptr=99), SimpleNamespace(cuda_stream=99), SimpleNamespace(__cuda_stream__=lambda: (0, 99))],
    ids=["address", "ptr", "PyTorch's", "protocol"],
)
@pytest.mark.parametrize("cupy_13", [False, True])
def test_arrays_of_another_library_are_viewed_in_the_stream(
    gpu: Any, stream: Any, cupy_13: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere DLPack would put an event of another stream into it, which breaks the capture of a graph."""
    if cupy_13:
        cupy: Any = importlib.import_module("cupy")
        monkeypatch.delattr(cupy.cuda.Stream, "from_external")
    packed, x, bias = weight(16, 64, INT8), array(np.ones((4, 64), F32)), array(np.ones(16, F32))
    y = Tensor(empty((4, 16), F32))
    workspace = empty(ops().workspace_bytes(4, packed, F32), np.uint8)
    tensors = {"bias": Tensor(bias), "out": y, "workspace": Tensor(workspace)}
    assert ops().matmul(Tensor(x), packed, stream=stream, **tensors) is y
    close(y.array, wanted(x, packed, np.asarray(bias)))
    assert gpu.viewed == [99] * 4
    close(ops().matmul(ops().quantize(Tensor(x), packed, stream=stream), packed), wanted(x, packed))
    assert gpu.viewed == [99] * 5
    ops().matmul(Tensor(x), packed)
    assert gpu.viewed == [99] * 5 + [7]


def test_an_array_that_cannot_be_viewed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise BufferError("Can't export tensors that require gradient")

    monkeypatch.setattr("cupy.from_dlpack", refuse)
    with pytest.raises(OperandError, match=r"^x: Tensor is not an array .* \(Can't export tensors that require grad"):
        ops().matmul(Tensor(np.ones((4, 64), F32)), weight(16, 64, INT8))


def parameters_of(source: str, kernel: str) -> dict[str, str]:
    """A kernel's parameters, as its own text lists them."""
    text = re.sub(r"//.*", "", (cache.source_folder() / source).read_text())
    found = re.search(rf'extern "C" __global__[^;{{]*?\b{kernel}\(([^)]*)\)\s*{{', text)
    assert found, source
    told = {}
    for declared in found[1].split(","):
        kind, name = re.fullmatch(r"\s*(.*[\s*])(\w+)\s*", declared, re.DOTALL).groups()  # type: ignore[union-attr]
        assert "*" in kind or kind.strip() == "i64", declared
        told[name.rstrip("_")] = "address" if "*" in kind else "integer"  # m_: an int m follows in the kernel
    return told


def test_parameters_are_the_kernels(gpu: Any) -> None:
    plans: Any = importlib.import_module("slidesparse_nb.cuda.plan")
    for source, kernel, parameters in (
        *((arch.source, "gemm", arch.parameters) for arch in ARCHITECTURES),
        (sm90.Expansion.source, "expand", sm90.Expansion.parameters),
        (plans.ROWS_KERNEL, "rows", plans.ROWS_PARAMETERS),
    ):
        assert list(parameters.items()) == list(parameters_of(source, kernel).items())


def test_architectures(gpu: Any) -> None:
    device = gpu.gemm.to_device(weight(16, 64, INT8))
    assert device.arch is (sm90 if gpu.own else sm80).ARCH


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_weight_in_buffers_of_the_caller(gpu: Any, dtype: DType) -> None:
    """The packed tensors, and the first arranged ones, may be freed."""
    packed, x = weight(40, 96, dtype), array(np.random.default_rng(4).standard_normal((7, 96)).astype(BF16))
    expected = wanted(x, packed)
    first = ops().to_device(packed)
    assert ops().to_device(packed) is first
    ours = {name: array(buffer) for name, buffer in first.buffers.items()}
    again = importlib.import_module("slidesparse_nb.ops").device_weight(ours, packed.pattern, dtype, packed.shape)
    with pytest.raises(OperandError, match=r"^buffers\['scale'\]: must be contiguous"):
        ops().device_weight({"scale": empty((4, 8))[:, :2]}, packed.pattern, dtype, packed.shape)
    with pytest.raises(OperandError, match=r"^device: 5 is not the current GPU, 0; make it so first"):
        ops().device_weight(ours, packed.pattern, dtype, packed.shape, 5)
    with pytest.raises(
        OperandError, match=r"^buffers: bytes \{'.*\} must be \{.*\} for DeviceWeight\(400 x 96, 6:8 .*; pass all that"
    ):
        ops().device_weight(ours, packed.pattern, dtype, (400, 96))
    with pytest.raises(OperandError, match=r"^buffers: bytes \{'scale': 160\} must be|^buffers: bytes \{\} must be"):
        ops().device_weight({name: a for name, a in ours.items() if name == "scale"}, packed.pattern, dtype, packed.shape)
    with pytest.raises(OperandError, match=r"^shape: 40 must be \(n, k\), that of the packed weight"):
        ops().device_weight(ours, packed.pattern, dtype, 40)
    gpu.weights[:] = [(again, packed)]
    close(ops().matmul(x, again), expected)
    close(ops().matmul(ops().quantize(x, again), again), expected)
    gone = weakref.ref(packed)
    gpu.weights.clear()
    del packed
    gc.collect()
    assert gone() is None
    with pytest.raises(OperandError, match="packed: DeviceWeight must be a PackedWeight"):
        ops().matmul(np.zeros((1, 96), np.float32), again)


@pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
@pytest.mark.parametrize("source", [BF16, F32], ids=str)
def test_the_entry_for_adapters(gpu: Any, dtype: DType, source: Any) -> None:
    packed, m = weight(300, 512, dtype), 40
    x = array(np.random.default_rng(4).standard_normal((m, 512)).astype(source))
    bias, y = array(np.arange(300, dtype=np.float32)), empty((m, 304), BF16)
    there = ops().to_device(packed)
    size = there.workspace_bytes(m, "bfloat16")
    workspace = empty(size, np.uint8)
    for _ in range(2):
        y[...] = 0
        gpu.allocated = 0
        there.linear(
            m, x.data.ptr, str(source), x.strides, y.data.ptr, 304, "bfloat16", workspace.data.ptr, 7, bias.data.ptr, 4
        )
        assert gpu.allocated == 0
        close(y[:, :300], wanted(x, packed, np.asarray(bias), BF16))
        assert not y[:, 300:].any()


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_metadata_that_a_plan_expands(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the workspace, before each product, with x quantized apart or not; the weight's memory stays as it was."""
    m, n, k = 300, 300, 512
    packed, x = weight(n, k, dtype), array(np.random.default_rng(2).standard_normal((m, k)).astype(BF16))
    expected = wanted(x, packed)
    with numpy_for_cupy(monkeypatch, False) as gpu:
        there = gpu.gemm.to_device(packed, least_memory=True)
        assert [*there.buffers] == ["values", "compact", "scale"][: 2 + there.scaled]
        held, problem = there.nbytes, there.problem(m, "bfloat16")
        candidates = {"expand" in c[0].source: c for c in there.arch.candidates(problem, tuple(there.buffers))}
        plain, expanding = (there.bind(m, "bfloat16", candidates[of]) for of in (False, True))
        expanded = sm90.Expansion(dtype, 3).derived_bytes(problem)
        assert (plain.plan.derived_bytes, expanding.plan.derived_bytes) == (0, expanded)
        assert expanding.plan.bytes == plain.plan.bytes + expanded
        there.plans[m, "bfloat16"] = expanding
        for given in (x, ops().quantize(x, packed)):
            for workspace in (None, empty(expanding.plan.bytes, np.uint8)):
                gpu.launched.clear()
                close(ops().matmul(given, packed, workspace=workspace), expected)
                assert gpu.launched[-len(expanding.launches) :] == ["expand", *["gemm"] * (len(expanding.launches) - 1)]
        q, y, start = ops().quantize(x, packed), empty((m, n), BF16), expanding.plan.parts_at
        scratch = empty(expanding.plan.bytes - start, np.uint8)  # a product alone needs the end of a workspace
        scale = 0 if q.scale is None else q.scale.data.ptr
        there.multiply(expanding, q.tiles.data.ptr, 0, scale, y.data.ptr, n, scratch.data.ptr - start, 7)
        close(y, expected)
        assert there.nbytes == held


def test_metadata_that_cannot_be_compact(gpu: Any) -> None:
    """16-bit weights with a group of zeros, which stay as they are for any number of tokens."""
    w = np.random.default_rng(5).standard_normal((300, 512)).astype(np.float32)
    w[7, 8:16] = 0
    packed = reference.pack(reference.prune(w, Pattern(6, 8)), Pattern(6, 8), BFLOAT16)
    x = array(np.random.default_rng(6).standard_normal((700, 512)).astype(BF16))
    for m in (5, 700):
        close(ops().matmul(x[:m], packed), wanted(x[:m], packed))
    assert set(gpu.launched[1::2]) == {"gemm"}
    assert [*gpu.gemm.to_device(packed).buffers] == (["values", "expanded"] if gpu.own else ["weights"])


def test_kernels_that_are_compiled_ahead(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every m up to 512, and of those above that the model is asked for."""
    there, found = ops().to_device(weight(300, 512, INT8)), {}
    weights: Any = importlib.import_module("slidesparse_nb.cuda.weight")
    monkeypatch.setattr(weights.jit, "device_compiler", lambda: None)
    monkeypatch.setattr(weights, "compile_all", lambda work, compiler: found.update({repr(job): job for job in work}))
    there.compile_ahead(700, "bfloat16")
    assert len(found) > 1
    for m in (*range(1, 513), 544, 640, 700):
        for config in there.bound(m, "bfloat16").plan.configs:
            assert repr((config.source, config.defines(), f"sm_90{config.suffix}")) in found
    found.clear()
    there.compile_ahead(1, "bfloat16")
    few = [m for m in (1, 2, 3) if there.quantizes(m, "bfloat16", "bfloat16", (1024, 2), 0)]  # the kernel does
    assert few == ([1, 2] if gpu.own else [])
    every = [there.bound(1, "bfloat16"), *(there.bound(m, "bfloat16", unquantized=True) for m in few)]
    assert {*found} == {
        repr((config.source, config.defines(), f"sm_90{config.suffix}")) for bound in every for config in bound.plan.configs
    }


def test_tokens_that_the_kernel_quantizes(gpu: Any) -> None:
    """x as it is, in rows of whole vectors; nothing is compiled for any other."""
    packed = weight(300, 512, INT8)
    there, x = ops().to_device(packed), np.random.default_rng(8).standard_normal((2, 520)).astype(BF16)
    ops().matmul(array(x)[:, 1:513], packed)
    ops().matmul(array(x)[:, :512], packed, out_dtype=np.float32)
    ops().matmul(array(x.astype(np.float32))[:, :512], packed, out_dtype=BF16)
    assert not there.unquantized
    for m in (1, 2):
        gpu.launched.clear()
        given = array(x)[:m, :512]
        close(ops().matmul(given, packed), wanted(given, packed))
        assert ((m, "bfloat16") in there.unquantized) == gpu.own
        assert (set(gpu.launched) == {"gemm"}) == gpu.own
    assert ops().workspace_bytes(1, packed, np.float16) > 0
    assert ((1, "float16") in there.unquantized) == gpu.own  # compiled on the way


def test_counters_of_any_number_of_streams(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = importlib.import_module("slidesparse_nb.cuda.plan")
    monkeypatch.setattr(plan, "COUNTER_SETS", 2)
    made = plan.Counters()
    made.reserve()
    sets = [made.of(stream) for stream in (5, 6, 7, 5, 8, 9)]
    assert len(set(sets)) == 5
    assert sets[0] == sets[3]
    assert all(abs(a - b) >= 4 * plan.COUNTERS for a in set(sets) for b in set(sets) - {a})
