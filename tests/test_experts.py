"""Weights with leading dimensions, and the experts of a layer in one tensor: packed, verified and unpacked where the model type
tells how they are stored, and refused by name elsewhere.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from cases import SMALL, Array
from faults import interrupting
from hypothesis import given
from hypothesis import strategies as st
from toy_pruner import Toy

import slidesparse_nb as ss
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, INT8, PACKED, DType
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.prune import PRUNERS
from slidesparse_nb.core.scheme import SCHEMES

E, D, F = 3, 32, 24
"""Experts, hidden size, width of an expert."""

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": E, "hidden_size": D, "moe_intermediate_size": F, "intermediate_size": 5 * F},
    "mixtral": {"num_local_experts": E, "hidden_size": D, "intermediate_size": F},
    "gpt_oss": {"num_local_experts": E, "hidden_size": D, "intermediate_size": F},
    "granitemoe": {"num_local_experts": E, "hidden_size": D, "intermediate_size": F},
    "dbrx": {"d_model": D, "ffn_config": {"ffn_hidden_size": F, "moe_num_experts": E}},
    "llama4": {
        "text_config": {
            "model_type": "llama4_text", "num_local_experts": E, "hidden_size": D, "intermediate_size": F,
            "intermediate_size_mlp": 5 * F,
        },
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 5 * D, "intermediate_size": 7 * F},
    },
}  # fmt: skip

LAYERS = {
    "qwen3_moe": "model.layers.0.mlp", "mixtral": "model.layers.0.mlp", "gpt_oss": "model.layers.0.mlp",
    "granitemoe": "model.layers.0.block_sparse_moe", "dbrx": "transformer.blocks.0.ffn",
    "llama4": "language_model.model.layers.0.feed_forward",
}  # fmt: skip

ROUTERS = {"gpt_oss": "router", "granitemoe": "router.layer", "dbrx": "router.layer", "llama4": "router"}


def matrices(seed: int, *shape: int) -> Array:
    """[e, n, k] that obey 6:8 along k."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return reference.prune(w.reshape(-1, shape[-1]), Pattern(6, 8)).reshape(shape)


def layer(kind: str, dtype: Any = models.BF16, seed: int = 0) -> tuple[dict[str, Array], dict[str, Array]]:
    """A layer of a model type: its tensors as the type stores them, and its experts [e, n, k] by the names of modules."""
    at = LAYERS[kind]
    gate_up, down = matrices(seed, E, 2 * F, D).astype(dtype), matrices(seed + 1, E, D, F).astype(dtype)
    if kind == "dbrx":
        logical = {"experts.mlp.w1": gate_up[:, :F], "experts.mlp.v1": gate_up[:, F:], "experts.mlp.w2": down}
        stored = {
            f"{at}.{name}": (w.transpose(0, 2, 1) if name.endswith("w2") else w).reshape(E * F, D)
            for name, w in logical.items()
        }
    elif kind == "granitemoe":
        logical = {"input_linear": gate_up, "output_linear": down}
        stored = {f"{at}.{name}.weight": w for name, w in logical.items()}
    else:
        logical = {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
        turned = kind in ("gpt_oss", "llama4")
        stored = {f"{at}.{name}": w.transpose(0, 2, 1) if turned else w for name, w in logical.items()}
    if kind == "gpt_oss":
        stored |= {f"{at}.experts.gate_up_proj_bias": np.ones((E, 2 * F), dtype)}
    stored[f"{at}.{ROUTERS.get(kind, 'gate')}.weight"] = np.ones((E, D), dtype)
    attention = at.rpartition(".")[0] + ".self_attn.o_proj"
    stored[f"{attention}.weight"] = matrices(seed + 2, 1, D, D)[0].astype(dtype)
    logical = {f"{at}.{name}": np.ascontiguousarray(w) for name, w in logical.items()}
    return {name: np.ascontiguousarray(w) for name, w in stored.items()}, logical


def folder(path: Path, kind: str, parts: dict[str, Array] | None = None, **changes: Any) -> Path:
    models.folder(path, layer(kind)[0] if parts is None else parts)
    (path / "config.json").write_text(json.dumps({"model_type": kind, **CONFIGS[kind], **changes}))
    return path


FAST = ss.Run(max_workers=2)


# ---- a weight of several matrices ------------------------------------------------------------------------------------


@given(
    pattern=st.sampled_from(SMALL), scheme=st.sampled_from(list(SCHEMES.values())),
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    n=st.integers(1, 5), k=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), data=st.data(),
)  # fmt: skip
def test_a_stack_is_its_matrices(
    pattern: Pattern, scheme: ss.Scheme, lead: list[int], n: int, k: int, seed: int, data: st.DataObject
) -> None:
    """pack, unpack, rows, columns, concat and stack of a stack are those of every matrix in it."""
    rng, pattern = np.random.default_rng(seed), scheme.pattern(pattern)
    w = rng.standard_normal((int(np.prod(lead)) * n, k)).astype(np.float32)
    w = reference.prune(w, pattern, rng.random(w.shape, np.float32)).reshape(*lead, n, k)
    packed = ss.pack(w, pattern, scheme)
    ss.verify(packed, w)
    assert (packed.lead, packed.n, packed.k, len(packed.matrices())) == (tuple(lead), n, k, np.prod(lead))
    singles = [ss.pack(m, pattern, scheme) for m in w.reshape(-1, n, k)]
    unit, middle = packed.slice_unit, data.draw(st.integers(0, n))
    cut = data.draw(st.integers(0, k // unit)) * unit

    def same(stack: ss.PackedWeight, others: list[ss.PackedWeight]) -> None:
        stack.validate()
        for one, other in zip(stack.matrices(), others, strict=True):
            assert one.shape == other.shape
            assert [a.tobytes() for a in one.tensors().values()] == [a.tobytes() for a in other.tensors().values()]

    same(packed, singles)
    same(packed.rows(middle, n), [p.rows(middle, n) for p in singles])
    same(packed.columns(0, cut), [p.columns(0, cut) for p in singles])
    same(packed.columns(cut, k), [p.columns(cut, k) for p in singles])
    same(ss.PackedWeight.concat([packed.rows(0, middle), packed.rows(middle, n)]), singles)
    same(ss.PackedWeight.stack(list(packed)), singles)
    same(packed[-1], [p for p in singles][-len(packed[-1].matrices()) :])
    assert ss.unpack(packed).tobytes() == b"".join(ss.unpack(p).tobytes() for p in singles)
    same(ss.PackedWeight.from_tensors(packed.tensors("X"), pattern, scheme, name="X"), singles)


def test_scales_scores_and_statistics_of_every_matrix() -> None:
    w = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)
    score = np.random.default_rng(1).random(w.shape)
    packed = ss.pack(w, "6:8", "int8", prune=score)
    ss.verify(packed, w, prune=score)
    assert [p.values.tobytes() for p in packed] == [
        ss.pack(a, "6:8", "int8", prune=b).values.tobytes() for a, b in zip(w, score, strict=True)
    ]
    q = ss.unpack(packed)
    for scale in (packed.scale, packed.scale[..., 0], 0.5):
        assert ss.pack(q, "6:8", scale=scale).values.tobytes() == packed.values.tobytes()
    drawn = ss.pack(np.stack([w[0], w[0]]), "6:8", "int8", prune="random", seed=5)
    ss.verify(drawn, np.stack([w[0], w[0]]), prune="random", seed=5)
    assert drawn[0].values.tobytes() != drawn[1].values.tobytes()


STACK = ss.pack(np.zeros((2, 3, 16), np.float32), "6:8", "int8")


@pytest.mark.parametrize(
    ("act", "error", "why"),
    [
        (lambda: ss.matmul(np.zeros((1, 16), np.float32), STACK), ss.OperandError, r"take one of them, packed\[i\]"),
        (lambda: ss.quantize(np.zeros((1, 16), np.float32), STACK), ss.OperandError, r"take one of them, packed\[i\]"),
        (lambda: STACK[2], ss.OperandError, r"index 2 must be below 2"),
        (lambda: STACK[0][0], ss.OperandError, r"is one matrix \(3, 16\)"),
        (lambda: STACK["0"], ss.OperandError, "index '0' must be an integer"),  # type: ignore[index]
        (lambda: ss.PackedWeight.stack([STACK, STACK[0]]), ss.OperandError, r"\(3, 16\) must be \(2, 3, 16\)"),
        (lambda: ss.PackedWeight.concat([STACK, STACK[0]]), ss.OperandError, r"weights\[1\].lead: \(\) must be \(2,\)"),
        (lambda: ss.pack(np.ones((2, 3, 16), np.float32)), ss.PatternError, "^expert 0: w: row 0, group 0"),
        (lambda: ss.verify(STACK, np.ones((2, 3, 16), np.float32)), ss.VerificationError, "^expert 0: packed.values: .* row 0"),
        (lambda: ss.verify(STACK, np.zeros((3, 16), np.float32)), ss.VerificationError, r"shape \(2, 3, 16\) is not \(3, 16\)"),
        (lambda: ss.pack(np.zeros((2, 3, 16)), scale=np.ones((3, 3))), ss.OperandError, "scale: shape .* must begin with 2"),
    ],
)  # fmt: skip
def test_what_is_refused_of_a_stack(act: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        act()


def test_a_broken_stack_is_named_by_expert_and_row() -> None:
    meta = STACK.meta.copy()
    meta[1, 2, 0] = 0
    with pytest.raises(ss.FormatError, match="at expert 1, row 2, column 0"):
        ss.PackedWeight(STACK.values, meta, STACK.scale, STACK.pattern, STACK.shape, INT8).validate()

    blocks = ss.pack(np.ones((2, 3, 16), np.float32), "6:8", "W4A8", prune="magnitude")
    scales = blocks.block_scale.copy()
    scales.view(np.uint8)[1, 2, 0] = 255
    with pytest.raises(ss.FormatError, match="block_scale: nan at expert 1, row 2, block 0 must be"):
        replace(blocks, block_scale=scales).validate()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_stack_on_the_gpu(dtype: DType) -> None:
    """It is packed and unpacked there as on the host, and its matrices are multiplied."""
    import cupy as cp

    w = matrices(0, E, 40, 96)
    here, there = ss.pack(w, "6:8", dtype), ss.pack(cp.asarray(w), "6:8", dtype)
    for name, array in here.tensors().items():
        found = there.tensors()[name]
        assert (found.get() if isinstance(found, cp.ndarray) else found).tobytes() == array.tobytes()
    assert ss.unpack(there).get().tobytes() == ss.unpack(here).tobytes()
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    for one, other in zip(there, here, strict=True):
        wanted = ss.matmul(x, other)
        np.testing.assert_allclose(ss.matmul(cp.asarray(x), one).get(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    with pytest.raises(ss.OperandError, match=r"take one of them, packed\[i\]"):
        ss.matmul(cp.asarray(x), there)
    with pytest.raises(ss.OperandError, match=r"take one of them, packed\[i\]"):
        ss.to_device(there)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["auto", "INT8_W8A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_packed_along_k_and_come_back(tmp_path: Path, kind: str, scheme: str) -> None:
    """Every expert is what `pack` makes of its matrix; unpacked, the tensor has its name and axes again."""
    stored, logical = layer(kind)
    source = folder(tmp_path / "in", kind, stored)
    report = ss.pack_checkpoint(source, tmp_path / "packed", ss.Options(scheme=scheme), FAST)
    assert report.verified
    dtype = {"auto": BFLOAT16, "INT8_W8A8": INT8, "FP8_DYNAMIC": FLOAT8}[scheme]
    found = ss.load(tmp_path / "packed")
    for name, w in logical.items():
        packed = found[name]
        assert isinstance(packed, ss.PackedWeight)
        for one, matrix in zip(packed, w, strict=True):
            wanted = reference.pack(matrix, Pattern(6, 8), dtype)
            assert [a.tobytes() for a in one.tensors().values()] == [a.tobytes() for a in wanted.tensors().values()]
    dense = {name for name, value in found.items() if not isinstance(value, ss.PackedWeight)}
    assert dense == {name for name in stored if "router" in name or ".gate." in name or name.endswith("bias")}
    proof = ss.verify_checkpoint(tmp_path / "packed", source)
    assert (proof.modules, proof.pruned) == (len(logical) + 1, 0)
    listed = {m.name: (m.matrices, m.n, m.k) for m in ss.inspect_checkpoint(tmp_path / "packed").modules if m.packed}
    assert listed.items() >= {name: (E, E * w.shape[1], w.shape[2]) for name, w in logical.items()}.items()

    unpacked = ss.unpack_checkpoint(tmp_path / "packed", tmp_path / "dense", FAST)
    direct = ss.pack_checkpoint(source, tmp_path / "direct", ss.Options(scheme=scheme, format="dense"), FAST)
    assert (
        any("dequantized" in note for note in unpacked.notes)
        == any("dequantized" in n for n in direct.notes)
        == (scheme != "auto")
    )
    back, same = ss.load(tmp_path / "dense"), ss.load(tmp_path / "direct")
    for name, w in stored.items():
        if name.removesuffix(".weight") not in logical:
            continue
        assert back[name].shape == w.shape
        assert back[name].dtype == w.dtype  # type: ignore[union-attr]
        assert back[name].tobytes() == same[name].tobytes()  # type: ignore[union-attr]
        packed = found[name.removesuffix(".weight")]
        assert isinstance(packed, ss.PackedWeight)
        values = np.stack([reference.dequantize(reference.unpack(p), p.scale) for p in packed])
        if kind in ("gpt_oss", "llama4") or name.endswith("w2"):
            values = values.transpose(0, 2, 1)
        assert back[name].tobytes() == np.ascontiguousarray(values.astype(w.dtype)).tobytes()  # type: ignore[union-attr]
        if scheme == "auto":
            assert back[name].tobytes() == w.tobytes()  # type: ignore[union-attr]


def test_what_files_and_config_say(tmp_path: Path) -> None:
    """Version 2 and the dense tensors, where there are stacks; elsewhere version 1."""
    for kind, axes in {"gpt_oss": ["... k n"] * 2, "dbrx": ["(... n) k", "(... n) k", "(... k) n"]}.items():
        ss.pack_checkpoint(folder(tmp_path / kind, kind), tmp_path / f"{kind}-out", ss.Options(scheme="INT8_W8A8"), FAST)
        config = json.loads((tmp_path / f"{kind}-out" / "config.json").read_text())["quantization_config"]
        header = json.loads(ss.checkpoint.Checkpoint.open(tmp_path / f"{kind}-out").metadata["slidesparse"])
        assert (config["version"], header["version"]) == (2, 2)
        assert config["stacked"] == header["stacked"]
        assert [header["stacked"][name]["axes"] for name in sorted(header["stacked"])] == axes
        assert not any("bias" in name for name in config["ignore"])
        ss.unpack_checkpoint(tmp_path / f"{kind}-out", tmp_path / f"{kind}-dense", FAST)
        after = json.loads((tmp_path / f"{kind}-dense" / "config.json").read_text())
        assert after["slidesparse"]["version"] == 1
        assert set(after["quantization_config"]["ignore"]) >= set(header["stacked"])


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.blocks], ids=str)
def test_experts_in_four_bits(tmp_path: Path, scheme: ss.Scheme) -> None:
    """They are packed and proved as single matrices are; like those, they have no dense form."""
    stored, logical = layer("gpt_oss")
    source = folder(tmp_path / "in", "gpt_oss", stored)
    ss.pack_checkpoint(source, tmp_path / "out", ss.Options(scheme=scheme.name, prune="magnitude"), FAST)
    assert ss.verify_checkpoint(tmp_path / "out", source).modules == len(logical) + 1
    found = ss.load(tmp_path / "out")
    for name, w in logical.items():
        wanted = ss.pack(w, "6:8", scheme, prune="magnitude")
        assert {n: a.tobytes() for n, a in found[name].tensors().items()} == {
            n: a.tobytes() for n, a in wanted.tensors().items()
        }  # type: ignore[union-attr]
    ss.save(tmp_path / "one.safetensors", {"X": wanted})
    again = ss.load(tmp_path / "one.safetensors")["X"]
    assert isinstance(again, ss.PackedWeight)
    assert (again.scheme, again.shape) == (scheme, wanted.shape)
    with pytest.raises(ss.UnsupportedError, match="which have no dense form"):
        ss.unpack_checkpoint(tmp_path / "out", tmp_path / "dense", FAST)


def test_engines_refuse_packed_experts(tmp_path: Path) -> None:
    """config.json says all that it said, and engines that have no kernel for stacks name them and the way out."""
    ss.pack_checkpoint(folder(tmp_path / "in", "mixtral"), tmp_path / "out", ss.Options(scheme="INT8_W8A8"), FAST)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    read = ss.PackedConfig.read(said)
    assert read.written() == said
    header = json.loads(read.metadata()["slidesparse"])
    assert (header["version"], header["stacked"]) == (2, said["stacked"])
    with pytest.raises(ss.UnsupportedError, match=r"experts\.down_proj': .* not run by vLLM yet; pack .* dense \(--targets"):
        read.without_stacks("vLLM")
    dense = ss.PackedConfig.of("6:8", "int8")
    assert dense.without_stacks("vLLM") is dense
    with pytest.raises(ss.FormatError, match=r"version 1, weights .* are unknown here"):
        ss.PackedConfig.read({**said, "version": 1})
    with pytest.raises(ss.FormatError, match=r"quantization_config: stacked \[\] must be an object"):
        ss.PackedConfig.read({**said, "stacked": []})


def test_what_stock_loaders_are_told(tmp_path: Path) -> None:
    """Of experts alone, nothing quantized is left to describe; a Llama 4 with other layers in 8 bits is not loaded by them."""
    source = folder(tmp_path / "in", "llama4")
    for targets, told in {(): True, ("*experts*",): False}.items():
        options = ss.Options(scheme="INT8_W8A8", format="dense", targets=targets)
        report = ss.pack_checkpoint(source, tmp_path / str(told), options, FAST)
        assert any("will not load these" in note for note in report.notes) == told
        assert ("quantization_config" in json.loads((tmp_path / str(told) / "config.json").read_text())) == told


def files(path: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(path.glob("*.safetensors"))]


@pytest.mark.parametrize("kind", ["gpt_oss", "dbrx"])
@pytest.mark.parametrize("format", ["packed", "dense"])
def test_blocks_and_interruptions_change_nothing(
    tmp_path: Path, kind: str, format: str, unit_bytes: Callable[[int], None]
) -> None:
    """Blocks end one expert and begin the next. Also, every expert draws its own random numbers."""
    stored, logical = layer(kind)
    dense = {name: np.ones_like(w) for name, w in stored.items()}
    source = folder(tmp_path / "in", kind, dense)
    options = ss.Options(scheme="INT8_W8A8", prune="random", seed=7, format=format)
    ss.pack_checkpoint(source, tmp_path / "whole", options, FAST)
    if format == "packed":
        packed = ss.load(tmp_path / "whole")[next(iter(logical))]
        assert len({p.meta.tobytes() for p in packed}) == E  # type: ignore[union-attr]
    unit_bytes(7 * 2 * D)
    stop = interrupting(lambda phase, done, total: done > total // 2)
    with pytest.raises(KeyboardInterrupt):
        ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(progress=stop, max_workers=2))
    assert ss.pack_checkpoint(source, tmp_path / "out", options, ss.Run(resume=True, max_workers=2)).resumed
    assert files(tmp_path / "out") == files(tmp_path / "whole") != []
    if format == "packed":
        assert not ss.verify_checkpoint(tmp_path / "out", source).by_magnitude
        ss.unpack_checkpoint(tmp_path / "out", tmp_path / "dense", FAST)
        ss.pack_checkpoint(source, tmp_path / "direct", replace(options, format="dense"), FAST)
        assert files(tmp_path / "dense") == files(tmp_path / "direct")


def test_statistics_of_every_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRUNERS, "toy", Toy())
    monkeypatch.setattr(Toy, "seeded", False)
    monkeypatch.setattr(Toy, "scores", lambda self, w, seed, first_row, statistics: np.abs(w) * statistics)
    stored, logical = layer("llama4")
    source = folder(tmp_path / "in", "llama4", {name: w + 1 for name, w in stored.items()})
    norms = {name: np.random.default_rng(1).random((E, w.shape[2])) for name, w in logical.items()}
    options = {"prune": "toy", "targets": ("*experts*",)}
    ss.pack_checkpoint(source, tmp_path / "out", ss.Options(**options, statistics=norms), FAST)  # type: ignore[arg-type]
    found = ss.load(tmp_path / "out")
    for name, w in logical.items():
        wanted = ss.pack(w + 1, "6:8", prune="toy", statistics=norms[name])
        assert found[name].values.tobytes() == wanted.values.tobytes()  # type: ignore[union-attr]
    short = {name: a[:2] for name, a in norms.items()}
    with pytest.raises(ss.OperandError, match=r"experts\.\w+\[0\]: statistics: shape \(2, \d+\) must begin with 3"):
        ss.pack_checkpoint(source, tmp_path / "no", ss.Options(**options, statistics=short), FAST)  # type: ignore[arg-type]


def test_the_experts_of_a_layer_are_packed_together_or_not_at_all(tmp_path: Path) -> None:
    for kind in ("qwen3_moe", "granitemoe", "dbrx"):
        stored, logical = layer(kind)
        one, *others = logical
        source = folder(tmp_path / kind, kind, stored)
        report = ss.pack_checkpoint(source, tmp_path / "o", ss.Options(ignore=(one,)), dry_run=True)
        assert [m.name for m in report.modules] == [f"{LAYERS[kind].rpartition('.')[0]}.self_attn.o_proj"]
        assert all("fused by engines" in report.left_dense[name] for name in others)
        assert report.packed_bytes + report.dense_bytes + report.other_bytes == report.source_bytes
        report = ss.pack_checkpoint(source, tmp_path / "o", ss.Options(targets=tuple(logical)), dry_run=True)
        assert {m.name: m.size for m in report.modules} == {name: " x ".join(map(str, w.shape)) for name, w in logical.items()}
        facts = {m.name: m for m in ss.inspect_checkpoint(source).modules}
        assert all("6:8" in facts[name].satisfies and not facts[name].reason for name in logical)


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("qwen3_moe", {"model_type": "olmoe"}, "of model type 'olmoe': which axis is k is not known .*; unstack them"),
        ("qwen3_moe", {"moe_intermediate_size": D}, r"must be \[3, 32, 32\] by config.json's sizes .*e = 3, d = 32, f = 32"),
        ("qwen3_moe", {"num_experts": None}, "must say their num_local_experts or num_experts or moe_num_experts, once"),
        ("mixtral", {"num_experts": E + 1}, "must say their num_local_experts or num_experts or moe_num_experts, once"),
        ("mixtral", {"model_type": "gpt_oss"}, r"must be \[3, 24, 32\]"),
        ("dbrx", {"ffn_config": {"ffn_hidden_size": F}}, "must say their num_local_experts"),
        ("mixtral", {"other": {"model_type": "dbrx"}}, "of model type 'mixtral, dbrx': which axis"),
    ],
)
def test_experts_that_are_not_understood_are_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], why: str
) -> None:
    source = folder(tmp_path / "in", kind, **changes)
    with pytest.raises(ss.UnsupportedError, match=rf"{LAYERS[kind]}\.experts\.\S+: stacked experts .*{why}.*--skip-bad$"):
        ss.pack_checkpoint(source, tmp_path / "out", None, FAST)
    report = ss.pack_checkpoint(source, tmp_path / "out", ss.Options(skip_bad=True), FAST)
    assert len(report.skipped) >= 2
    assert [m.name.rpartition(".")[2] for m in report.modules] == ["o_proj"]
    assert "experts" in " ".join(json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"])


MIXTRAL, OSS = layer("mixtral")[0], LAYERS["gpt_oss"]


@pytest.mark.parametrize(
    ("kind", "parts", "changes", "why"),
    [
        ("mixtral", {**MIXTRAL, f"{LAYERS['mixtral']}.experts.down_proj.weight": np.zeros((D, F), models.BF16)}, {},
         "beside another weight of that name"),
        ("mixtral", {name: w.astype(FLOAT8.numpy) if "experts" in name else w for name, w in MIXTRAL.items()}, {},
         "of type F8_E4M3 cannot be packed; convert them to one of F32"),
        ("gpt_oss", None, {"quantization_config": {"quant_method": "mxfp4"}},
         r"quantization_config says method 'mxfp4', which is not supported"),
        ("gpt_oss", {f"{OSS}.experts.down_proj_blocks": np.zeros((E, D, 1, 16), np.uint8)}, {},
         r"down_proj_blocks': .* is written by a block format such as MXFP4"),
        (None, MIXTRAL, {}, r"without a config\.json that tells the model type"),
    ],
)  # fmt: skip
def test_other_stacks_that_are_refused(tmp_path: Path, kind: str | None, parts: Any, changes: Any, why: str) -> None:
    source = (
        models.write(tmp_path / "m.safetensors", parts) if kind is None else folder(tmp_path / "in", kind, parts, **changes)
    )
    with pytest.raises(ss.UnsupportedError, match=why):
        ss.pack_checkpoint(source, tmp_path / "out", None, FAST)


def square(path: Path, kind: str) -> Path:
    """A checkpoint whose experts have n = k in one tensor, and obey 6:8 along its last axis only."""
    w = matrices(0, E, D, D).astype(models.BF16)
    parts = {"l.0.experts.down_proj": w, "l.0.experts.gate_up_proj": matrices(1, E, 2 * D, D).astype(models.BF16)}
    if kind == "gpt_oss":
        parts["l.0.experts.gate_up_proj"] = np.ascontiguousarray(parts["l.0.experts.gate_up_proj"].transpose(0, 2, 1))
    return folder(path, kind, parts, intermediate_size=D)


def test_the_model_type_decides_where_the_shape_cannot(tmp_path: Path) -> None:
    """As gpt_oss stores it, the same square tensor breaks the pattern; and a file that says otherwise is no proof."""
    ss.pack_checkpoint(square(tmp_path / "mixtral", "mixtral"), tmp_path / "packed", None, FAST)
    source = square(tmp_path / "gpt", "gpt_oss")
    with pytest.raises(
        ss.PatternError, match=r"^l\.0\.experts\.down_proj\[0\]: row 0, group \d .* has more than 6 non-zeros; \d+ of"
    ):
        ss.pack_checkpoint(source, tmp_path / "no", None, FAST)
    ss.pack_checkpoint(source, tmp_path / "pruned", ss.Options(prune="magnitude"), FAST)
    (file,) = (tmp_path / "pruned").glob("*.safetensors")
    data = file.read_bytes()
    assert data.count(b"... k n") == 2
    file.write_bytes(data.replace(b"... k n", b"... n k", 1))
    first = "down_proj" if data.index(b'down_proj\\",\\"axes') < data.index(b'gate_up_proj\\",\\"axes') else "gate_up_proj"
    with pytest.raises(ss.VerificationError, match=rf"{first}"):
        ss.verify_checkpoint(tmp_path / "pruned", source)


def test_a_changed_expert_is_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "mixtral")
    ss.pack_checkpoint(source, tmp_path / "out", ss.Options(scheme="INT8_W8A8"), FAST)
    name = f"{LAYERS['mixtral']}.experts.down_proj"
    with ss.checkpoint.Checkpoint.open(tmp_path / "out") as written:
        info, file = written.tensors[f"{name}.weight_packed"]
        at = info.start + info.nbytes // E * 2 + int(np.flatnonzero(written.array(info.name)[2])[0])
    data = bytearray(file.path.read_bytes())
    data[at] ^= 1
    file.path.write_bytes(data)
    with pytest.raises(ss.VerificationError, match=rf"^{name}\[2\]: packed\.values: .* at row 0|^{name}\[2\]: .*row 0"):
        ss.verify_checkpoint(tmp_path / "out", source)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_stack_comes_back(tmp_path: Path) -> None:
    """`save` gives it the plain dense form X.weight [*lead, n, k]."""
    w = np.stack([matrices(s, E, 4, 16) for s in range(2)])
    packed = ss.pack(w, "6:8", "fp8")
    ss.save(tmp_path / "m.safetensors", {"X": packed})
    found = ss.load(tmp_path / "m.safetensors")["X"]
    assert isinstance(found, ss.PackedWeight)
    assert found.shape == (2, E, 4, 16)
    ss.verify_checkpoint(tmp_path / "m.safetensors")
    ss.unpack_checkpoint(tmp_path / "m.safetensors", tmp_path / "d.safetensors", FAST)
    back = ss.load(tmp_path / "d.safetensors")["X.weight"]
    values = ss.unpack(packed).astype(np.float32) * packed.scale
    assert back.tobytes() == values.astype(models.BF16).tobytes()  # type: ignore[union-attr]
    with pytest.raises(ss.OperandError, match="at most 8 dimensions"):
        ss.save(tmp_path / "n.safetensors", {"X": deep(packed, 5)})


def deep(packed: ss.PackedWeight, count: int) -> ss.PackedWeight:
    for _ in range(count):
        packed = ss.PackedWeight.stack([packed])
    return packed


ENTRY = {"tensor": "X.weight", "axes": "... n k", "dtype": "bfloat16"}


MANY = {"X.weight_packed": np.zeros((2**30, 1, 0), models.BF16), "X.weight_meta": np.zeros((2**30, 1, 0), np.uint8)}
MANY |= {"X.weight_shape": np.array((2**30, 1, 0))}


@pytest.mark.parametrize(
    ("stacked", "parts", "why"),
    [
        ([], None, r"stacked \[\] must be an object"),
        *(
            ({"X": {**ENTRY, **wrong}}, None, "must have the keys tensor")
            for wrong in ({"axes": "n k"}, {"dtype": "int8"}, {"tensor": 1}, {"dtype": []}, {"more": 1})
        ),
        ({"Y": ENTRY}, None, r"is I64 \(3,\), must be I64 \(2,\): metadata 'slidesparse' says that the module is not stacked"),
        ({"X": {**ENTRY, "dtype": "bfloat16"}}, MANY, r"shape \(1073741824, 1, 0\) of a stack must not have a dimension of 0"),
        (
            {"X": ENTRY, "Y": ENTRY},
            {**STACK.tensors("X"), **STACK.tensors("Y")},
            r"X\.weight: is the dense tensor of both X and Y",
        ),
    ],
)
def test_what_a_file_says_of_stacks_is_checked(tmp_path: Path, stacked: Any, parts: Any, why: str) -> None:
    """Also, many empty matrices take no bytes, and would take forever."""
    scheme = "BF16" if parts is MANY else "INT8_W8A8"
    header = {"version": 2, "pattern": {"nnz": 6, "group": 8}, "scheme": scheme, "tool": "t", "stacked": stacked}
    path = models.write(tmp_path / "m.safetensors", parts or STACK.tensors("X"), {"slidesparse": json.dumps(header)})
    with pytest.raises(ss.FormatError, match=why):
        ss.unpack_checkpoint(path, tmp_path / "d.safetensors", FAST) if "both" in why else ss.load(path)


def test_an_empty_stack_is_not_saved(tmp_path: Path) -> None:
    empty = ss.PackedWeight.stack([ss.pack(np.zeros((0, 16), np.float32))])
    with pytest.raises(ss.OperandError, match=r"shape \(1, 0, 16\) of a stack must not have a dimension of 0"):
        ss.save(tmp_path / "n.safetensors", {"X": empty})


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_a_stack_is_never_held_whole(
    tmp_path: Path, format: str, unit_bytes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is done with it takes less memory than half of it, a quarter of its float32 copy."""
    unit_bytes(2**16)
    monkeypatch.setattr("slidesparse_nb.checkpoint.hf_folder._LARGEST_JSON", 10**6)  # what reading config.json allots
    options = ss.Options(scheme="INT8_W8A8", prune="magnitude", format=format)

    def work(source: Path, out: Path) -> None:
        ss.pack_checkpoint(source, out / "packed", options, FAST)
        if format == "packed":
            ss.unpack_checkpoint(out / "packed", out / "dense", FAST)
            ss.verify_checkpoint(out / "packed", source)

    work(folder(tmp_path / "small", "gpt_oss"), tmp_path)  # compiles, which takes more memory than the work
    d, stack = 512, np.ones((16, 512, 1024), models.BF16)
    sizes = {"num_local_experts": len(stack), "hidden_size": d, "intermediate_size": d}
    source = folder(tmp_path / "in", "gpt_oss", {"l.0.experts.gate_up_proj": stack}, **sizes)
    tracemalloc.start()
    try:
        work(source, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < stack.nbytes // 2
    finally:
        tracemalloc.stop()
