"""Whole checkpoints: what is packed, what passes through, and what the output says of itself."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import pytest

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint
from slidesparse_nb.checkpoint.safetensors import SafetensorsFile
from slidesparse_nb.checkpoint.safetensors_writer import SafetensorsWriter
from slidesparse_nb.core import reference

P = ss.Pattern(6, 8)
SPARSE = reference.prune(np.ones((16, 32), np.float32), P)


def pack(
    source: Path, out: Path | str | None, *, dry_run: bool = False, run: dict[str, Any] | None = None, **given: Any
) -> ss.Report:
    """Pack with these options, in two threads."""
    return ss.pack_checkpoint(source, out, ss.Options(**given), ss.Run(**{"max_workers": 2, **(run or {})}), dry_run=dry_run)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder whose weights obey 6:8."""
    return models.folder(tmp_path / "in")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder whose weights obey no pattern."""
    return models.folder(tmp_path / "in", models.tensors(np.float32, layers=1, prune=None))


def written(tmp_path: Path, parts: dict[str, np.ndarray], name: str = "m.safetensors") -> Path:
    return models.write(tmp_path / name, parts)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """At most so much of a resource."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


# ---- what is made ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ss.Scheme.names())
@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "8:10", "14:16"])
def test_every_pattern_and_scheme(tmp_path: Path, dense: Path, pattern: str, scheme: str) -> None:
    report = pack(dense, tmp_path / "out", pattern=pattern, scheme=scheme.lower(), prune="magnitude")
    assert (report.verified, report.scheme, len(report.modules)) == (True, scheme, 7)
    proof = ss.verify_checkpoint(tmp_path / "out", dense)
    assert (proof.modules, proof.by_magnitude, proof.pruned > 0) == (7, True, True)
    facts = {m.packed for m in ss.inspect_checkpoint(tmp_path / "out").modules if m.packed}
    assert facts == {report.pattern} == {str(ss.Scheme.of(scheme).pattern(pattern))}
    models.assert_made(tmp_path / "out", dense, report)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_auto_keeps_the_type_and_already_sparse_weights_need_no_pruning(tmp_path: Path, dtype: type) -> None:
    models.folder(tmp_path / "in", models.tensors(dtype))
    report = pack(tmp_path / "in", tmp_path / "out")
    assert report.scheme == ("FP16" if dtype is np.float16 else "BF16")
    assert any("float32 weights are stored as bfloat16" in note for note in report.notes) == (dtype is np.float32)
    result = ss.verify_checkpoint(tmp_path / "out", tmp_path / "in")
    assert (result.modules, result.pruned) == (14, 0)


def test_a_folder_goes_with_its_companions_and_a_new_config(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", shards=3)
    report = pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", prune="magnitude")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == '{"mode": "mean"}'
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert any("pytorch_model.bin" in note for note in report.notes)
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "llama"
    assert "sparsity_config" not in json.dumps(config)
    quantization = config["quantization_config"]
    pattern = {"nnz": 6, "group": 8}
    assert (quantization["quant_method"], quantization["pattern"], quantization["k_slice_unit"]) == ("slidesparse", pattern, 16)
    gates = {f"model.layers.{i}.mlp.gate" for i in range(2)}
    assert set(quantization["ignore"]) == {"lm_head", "model.embed_tokens", *gates, "re:.*[.](gate|router)$"}
    header = json.loads(SafetensorsFile(tmp_path / "out" / "model.safetensors").metadata["slidesparse"])
    assert (header["pattern"], header["dtype"]) == (pattern, "float8_e4m3fn")


def test_shards_are_split_where_asked_and_hold_the_same(tmp_path: Path, source: Path) -> None:
    report = pack(source, tmp_path / "many", max_shard_size=30_000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    models.assert_made(tmp_path / "many", source, report)


def test_sharded_folder_index_file_and_single_file_give_the_same_weights(tmp_path: Path) -> None:
    parts = models.tensors()
    models.folder(tmp_path / "in", parts, shards=2)
    file = written(tmp_path, parts, "file/m.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    for path, out in ((tmp_path / "in", "a"), (index, "b"), (file, "c.safetensors"), (file, "d")):
        models.assert_made(tmp_path / out, file, pack(path, tmp_path / out))
    assert (tmp_path / "d" / "model.safetensors").exists()


def test_default_output_stands_beside_the_input_and_says_pattern_and_type(tmp_path: Path, source: Path) -> None:
    file = written(tmp_path, models.tensors())
    assert Path(pack(file, None, scheme="INT8_W8A8").output) == tmp_path / "m-6of8-int8.safetensors"
    out = Path(pack(source, None, scheme="FP8_DYNAMIC", format="dense").output)
    assert out == tmp_path / "in-6of8-fp8-dense"
    assert out.is_dir()


def test_output_of_a_hub_cache_goes_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.folder(tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc123")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pack(source, None)
    assert (tmp_path / "here" / "tiny-6of8-bf16" / "model.safetensors").exists()
    assert names(source.parent) == ["abc123"]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_quantized_sources_keep_bytes_and_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: Callable[[int], None], kind: str, scales: str
) -> None:
    unit_bytes(1024)  # several blocks a module
    monkeypatch.setattr("slidesparse_nb.convert.rows.SMALL", -1)
    parts, config = models.quantized(kind, scales)
    source = models.folder(tmp_path / "in", parts, config=config)
    report = pack(source, tmp_path / "out")
    assert report.scheme == ("INT8_W8A8" if kind == "int8" else "FP8_DYNAMIC")
    models.assert_made(tmp_path / "out", source, report)
    assert ss.verify_checkpoint(tmp_path / "out", source).modules == 14
    ss.unpack_checkpoint(tmp_path / "out", tmp_path / "dense")
    unpacked = ss.load(tmp_path / "dense")
    for name, array in parts.items():
        if not name.endswith("weight_scale"):
            assert unpacked[name].tobytes() == array.tobytes()  # type: ignore[union-attr]
    quantization = config_of(tmp_path / "dense")["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == config["quantization_config"]["format"]


@pytest.mark.parametrize("scheme", ["INT8_W8A8", "FP8_DYNAMIC", "BF16", "FP16"])
def test_unpack_of_packed_is_the_dense_format_byte_for_byte(tmp_path: Path, dense: Path, scheme: str) -> None:
    pack(dense, tmp_path / "packed", scheme=scheme, prune="magnitude")
    pack(dense, tmp_path / "dense", scheme=scheme, prune="magnitude", format="dense")
    assert ss.unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked").verified
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "unpacked" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    assert config_of(tmp_path / "dense")["slidesparse"]["pattern"] == {"nnz": 6, "group": 8}


def test_random_pruning_depends_on_the_seed_alone(tmp_path: Path, dense: Path) -> None:
    made = []
    for name, seed, workers in (("a", 1, 1), ("b", 1, 3), ("c", 2, 2)):
        pack(dense, tmp_path / name, prune="random", seed=seed, run={"max_workers": workers})
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    ss.verify_checkpoint(tmp_path / "a", dense)
    same = SPARSE.astype(np.float32) * 0 + 1
    alike = written(tmp_path, {"a.weight": same, "b.weight": same})
    pack(alike, tmp_path / "p.safetensors", prune="random")
    found = ss.load(tmp_path / "p.safetensors")
    assert found["a"].meta.tobytes() != found["b"].meta.tobytes()  # type: ignore[union-attr]  # every module draws its own


def test_modules_of_several_types_keep_them(tmp_path: Path) -> None:
    w = reference.prune(np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32), P)
    packed = {"a": ss.pack(w, "6:8", "int8"), "b": ss.pack(w, "6:8", "bf16"), "c": ss.pack(w, "6:8", "fp8")}
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "model.safetensors"
    ss.save(file, packed)
    assert ss.verify_checkpoint(file, written(tmp_path, {f"{name}.weight": w for name in packed})).modules == 3
    ss.unpack_checkpoint(file, tmp_path / "d.safetensors")
    dense = ss.load(tmp_path / "d.safetensors")
    for name, weight in packed.items():
        assert dense[f"{name}.weight"].tobytes() == ss.unpack(weight).tobytes()
        assert dense[f"{name}.weight"].dtype == weight.dtype.numpy
    ss.unpack_checkpoint(tmp_path / "in", tmp_path / "d")  # no config.json has to describe them
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(ss.UnsupportedError, match=r"bfloat16 \(b\) and float8_e4m3fn \(c\) and int8 \(a\).*one by one"):
        ss.unpack_checkpoint(tmp_path / "in", tmp_path / "e")


def test_small_modules_are_packed_together_and_each_is_named_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"x.{i}.weight": np.full((1 + i % 5, 16 + i % 2), i % 100, np.int8) for i in range(600)}
    parts |= {f"x.{i}.weight_scale": np.full(1, i, np.float32) for i in range(600)}
    source = written(tmp_path, parts)
    pack(source, tmp_path / "p.safetensors", prune="magnitude", targets="x.*")
    with monkeypatch.context() as patched:
        patched.setattr("slidesparse_nb.convert.rows.SMALL", -1)
        pack(source, tmp_path / "q.safetensors", prune="magnitude", targets="x.*")
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()
    written(tmp_path, {**parts, "x.307.weight": np.full((3, 17), -1, np.int8)})
    with pytest.raises(ss.PatternError, match=r"^x\.1\.weight: row 0, group 0"):
        pack(source, tmp_path / "r.safetensors", targets="x.*")
    with pytest.raises(ss.VerificationError, match=r"x\.307"):
        ss.verify_checkpoint(tmp_path / "p.safetensors", source)


def test_no_rows_cost_no_memory(tmp_path: Path) -> None:
    """Of [0, 2^31 - 1] nothing is stored; a row of it would take 4 GB."""
    source, k = tmp_path / "m.safetensors", 2**31 - 1
    with SafetensorsWriter(source, [("fc.weight", "F32", (0, k)), ("gc.weight", "F32", (k, 0))], {}):
        pass
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, now + (1 << 30)):
        pack(source, tmp_path / "p.safetensors", targets="fc")
        ss.verify_checkpoint(tmp_path / "p.safetensors", source)
        ss.unpack_checkpoint(tmp_path / "p.safetensors", tmp_path / "d.safetensors")
        assert ss.load(tmp_path / "d.safetensors")["fc.weight"].shape == (0, k)


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    parts = {f"t{i}": np.ones(1, np.float32) for i in range(300)}
    source = models.folder(tmp_path / "in", {**parts, "a.weight": np.zeros((8, 16), np.float32)})
    with limited(resource.RLIMIT_NOFILE, 200):
        report = pack(source, tmp_path / "out", max_shard_size=1, run={"verify": False})
    assert len([name for name in report.files if name.endswith(".safetensors")]) == 301


def test_weights_without_elements_pass_through_at_once(tmp_path: Path) -> None:
    shapes = {"a": (8, 16), "b": (2**50, 0), "c": (0, 9)}
    file = written(tmp_path, {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert pack(file, tmp_path / "p.safetensors").left_dense == {"b": "empty", "c": "empty"}
    assert {m.name for m in ss.inspect_checkpoint(file).modules} == {"a", "b", "c"}


def test_dense_format_may_hold_a_tensor_of_a_modules_name(tmp_path: Path) -> None:
    parts = {"a": np.ones((16, 32), np.float32), "a.weight": SPARSE}
    file, out = written(tmp_path, parts), tmp_path / "d.safetensors"
    report = pack(file, out, scheme="INT8_W8A8", format="dense")
    assert (ss.load(out)["a"] == parts["a"]).all()
    assert report.left_dense == {"a (the tensor)": "not named .weight"}
    for path in (file, out):
        facts = ss.inspect_checkpoint(path)
        assert [m.name for m in facts.modules] == ["a", "a (the tensor)"]
        assert sum(m.bytes for m in facts.modules) + facts.other_bytes == facts.bytes
    scalar = written(tmp_path, {"a": parts["a"], "a.weight": np.array(1, np.float32)}, "s.safetensors")
    assert [(m.name, m.n, m.k) for m in ss.inspect_checkpoint(scalar).modules] == [("a", 16, 32)]


# ---- what is told ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_what_is_planned_is_made_and_shown(tmp_path: Path, source: Path, format: str) -> None:
    plan = pack(source, tmp_path / "out", scheme="int8", format=format, dry_run=True)
    assert names(tmp_path) == ["in"]
    report = pack(source, tmp_path / "out", scheme="int8", format=format)
    assert (plan.modules, plan.output_bytes) == (report.modules, report.output_bytes)
    assert report.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (plan.expansion, plan.ideal_speedup) == (1.5, pytest.approx(4 / 3))
    facts = ss.inspect_checkpoint(tmp_path / "out")
    assert sum(m.bytes for m in facts.modules) + facts.other_bytes == facts.bytes
    shown = {m.name: m.bytes for m in facts.modules}
    assert all(shown[m.name] == m.bytes for m in report.modules)


def test_inspection_names_patterns_that_dense_weights_satisfy(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", models.tensors(prune="4:6"))
    facts = {m.name: m for m in ss.inspect_checkpoint(source).modules}
    up = facts["model.layers.0.mlp.up_proj"]
    assert "4:6" in up.satisfies
    assert "2:4" not in up.satisfies
    assert up.zeros == pytest.approx(1 / 3, abs=0.01)
    assert (facts["lm_head"].satisfies, facts["lm_head"].reason) == ((), "an output head")


def test_verification_tells_pruned_from_rounded(tmp_path: Path) -> None:
    w = np.full((4, 16), 1000, np.float32)
    w[:, 1::8], w[:, 2::8], w[:, 3::8] = 1, 2, 3  # the two smallest of a group go; the third rounds to zero in int8
    source, found = written(tmp_path, {"fc.weight": w}), {}
    for prune in ("magnitude", "random"):
        pack(source, out := tmp_path / f"{prune}.safetensors", scheme="INT8_W8A8", prune=prune, seed=3)
        found[prune] = ss.verify_checkpoint(out, source)
    # all three are too small to be stored
    assert (found["magnitude"].pruned, found["magnitude"].rounded, found["magnitude"].by_magnitude) == (0, 24, True)
    assert found["random"].pruned > 0
    assert not found["random"].by_magnitude
    with pytest.raises(ss.VerificationError, match="no weight of shape"):
        ss.verify_checkpoint(tmp_path / "magnitude.safetensors", models.folder(tmp_path / "other"))


def test_verification_catches_a_changed_byte_anywhere(tmp_path: Path, source: Path) -> None:
    pack(source, tmp_path / "out", scheme="INT8_W8A8")
    path = tmp_path / "out" / "model.safetensors"
    good = path.read_bytes()
    with Checkpoint.open(tmp_path / "out") as made:
        places = [info.start for info, _ in made.tensors.values() if info.nbytes]
    for start in places:
        bad = bytearray(good)
        bad[start] ^= 0x01
        path.write_bytes(bad)
        with pytest.raises((ss.VerificationError, ss.FormatError)):
            ss.verify_checkpoint(tmp_path / "out", source)
    path.write_bytes(good)
    assert ss.verify_checkpoint(tmp_path / "out", source).copies == len(places) - 14 * 4


def test_verification_catches_tensors_that_have_no_source(tmp_path: Path) -> None:
    file, out = written(tmp_path, models.tensors(layers=1)), tmp_path / "p.safetensors"
    pack(file, out)
    ss.save(out, {**ss.load(out), "evil.bias": np.ones(5, np.float32)})
    with pytest.raises(ss.VerificationError, match=r"evil\.bias"):
        ss.verify_checkpoint(out, file)


@pytest.mark.parametrize("name", ["fc.weight", "re:(", "*", "lm_head", "model.q_proj"])
def test_verification_takes_names_as_they_are(tmp_path: Path, name: str) -> None:
    other = {"model.k_proj.weight": SPARSE, "scalar": np.ones((), np.float32)}
    file = written(tmp_path, {f"{name}.weight": SPARSE, **other})
    ss.save(tmp_path / "p.safetensors", {name: ss.pack(SPARSE, "6:8", "int8"), **other})
    assert ss.verify_checkpoint(tmp_path / "p.safetensors", file).modules == 1


def test_a_broken_block_is_named_by_its_true_row(tmp_path: Path, unit_bytes: Callable[[int], None]) -> None:
    file, packed = written(tmp_path, {"a.weight": np.zeros((64, 64), np.float32)}), tmp_path / "p.safetensors"
    pack(file, packed, scheme="INT8_W8A8")
    with Checkpoint.open(packed) as made:
        info = made.tensors["a.weight_meta"][0]
    data = bytearray(packed.read_bytes())
    data[info.start + 50 * info.shape[1]] = 0  # positions (0, 0), twice
    packed.write_bytes(data)
    unit_bytes(256)
    with pytest.raises(ss.FormatError, match=r"^a: .*row 50,"):
        ss.verify_checkpoint(packed)
    with pytest.raises(ss.FormatError, match=r"^a\.meta: .*row 50,"):
        ss.unpack_checkpoint(packed, tmp_path / "d.safetensors")


# ---- what is refused ---------------------------------------------------------------------------------------------


def refused(source: Path, kind: type[Exception], why: str, out: Path | str | None = None, **given: Any) -> Any:
    """Packing fails, and leaves nothing; the error."""
    before = names(source.parent)
    with pytest.raises(kind, match=why) as caught:
        pack(source, source.with_name("out") if out is None else out, **given)
    assert names(source.parent) == before
    return caught.value


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_violations_name_tensor_row_group_and_count(tmp_path: Path, unit_bytes: Callable[[int], None], format: str) -> None:
    unit_bytes(256)
    parts = models.tensors()
    w = parts["model.layers.1.mlp.up_proj.weight"]
    w[5, 8:16] = w[7, :8] = 1
    source = models.folder(tmp_path / "in", parts)
    why = r"^model\.layers\.1\.mlp\.up_proj\.weight: row 5, group 1 .*2 of 576 groups"
    error = refused(source, ss.PatternError, why, format=format)
    assert (error.row, error.group, error.count) == (5, 1, 2)
    assert set(pack(source, None, dry_run=True).refused) == {"model.layers.1.mlp.up_proj"}
    assert not pack(source, None, prune="magnitude", dry_run=True).refused


def test_where_all_modules_break_the_pattern_none_can_be_skipped(dense: Path) -> None:
    why = r"nothing to pack: all 7 modules break 6:8.*, the first: model.*; prune with"
    refused(dense, ss.PatternError, why, skip_bad=True)
    refused(dense, ss.UnsupportedError, r"fused by engines with .*; name all that engines fuse", targets="*q_proj")


def test_skip_bad_leaves_the_module_and_its_fused_sibling_dense(tmp_path: Path) -> None:
    at, parts = "model.layers.0.mlp", models.tensors()
    parts[f"{at}.up_proj.weight"] = np.ones_like(parts[f"{at}.up_proj.weight"])
    parts["model.layers.1.self_attn.o_proj.weight"][3, 4] = np.nan
    parts["model.layers.1.mlp.experts.gate_up_proj"] = np.ones((2, 8, 8), models.BF16)
    source = models.folder(tmp_path / "in", parts)
    refused(source, ss.UnsupportedError, r"or leave such modules dense with --skip-bad$")
    report = pack(source, tmp_path / "out", skip_bad=True)
    assert not any("--skip-bad" in reason for reason in report.skipped.values())
    bad = {f"{at}.up_proj", "model.layers.1.self_attn.o_proj"}
    assert set(report.skipped) == bad | {"model.layers.1.mlp.experts.gate_up_proj"}
    assert f"{at}.gate_proj" in report.left_dense
    found = ss.load(tmp_path / "out")
    for name in (*bad, f"{at}.gate_proj"):
        assert found[f"{name}.weight"].tobytes() == parts[f"{name}.weight"].tobytes()  # type: ignore[union-attr]
    assert len(report.modules) == 11
    assert "row 3, column 4" in report.skipped["model.layers.1.self_attn.o_proj"]


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    parts = models.tensors()
    parts["model.layers.0.self_attn.k_proj.weight"][2, 9] = np.inf
    why = r"k_proj\.weight: .*inf at row 2, column 9.*finite.*or leave such modules dense with --skip-bad$"
    refused(models.folder(tmp_path / "in", parts), ss.UnsupportedError, why, prune="magnitude")


def test_the_output_may_not_exist_nor_lie_in_the_source(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    pack(source, tmp_path / "out")  # an empty folder is no obstacle
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    refused(source, ss.OperandError, "exists; --overwrite")
    pack(source, tmp_path / "out", scheme="INT8_W8A8", run={"overwrite": True})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    written(tmp_path, models.tensors(seed=9), "precious.safetensors")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear")
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "home")
    for path, out, why in (
        *((source, place, "name a place of its own") for place in (source, source / "sub", tmp_path / "home" / ".." / "in")),
        (source / "model.safetensors", source / "model.safetensors", "name a place of its own"),
        (source, tmp_path, "current folder or around it"),
        (source, ".", "current folder"),
        (source, "", "is empty"),
        (source, tmp_path / "x.safetensors", "name a folder"),
        (source / "model.safetensors", tmp_path / "precious.safetensors", "not a checkpoint that this tool wrote"),
        (source, tmp_path / "link", "not a checkpoint that this tool wrote"),
    ):
        refused(path, ss.OperandError, why, out, run={"overwrite": True})
    monkeypatch.chdir("/")
    refused(source, ss.OperandError, "not a checkpoint that this tool wrote", tmp_path / "home", run={"overwrite": True})
    refused(source, ss.OperandError, "name a place of its own", tmp_path, run={"overwrite": True})
    assert (tmp_path / "home" / "diary.txt").read_text() == "dear"
    assert SafetensorsFile(tmp_path / "precious.safetensors").tensors


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_overwrite_knows_its_own_output_without_a_config(tmp_path: Path, format: str) -> None:
    file = written(tmp_path, models.tensors(layers=1))
    for out in ("a", "a.safetensors"):
        for _ in range(2):
            pack(file, tmp_path / out, format=format, run={"overwrite": True})


def test_resume_calls_complete_only_what_these_options_make(tmp_path: Path, dense: Path) -> None:
    run = {"resume": True, "verify": False}
    pack(dense, tmp_path / "out", prune="random", seed=1)
    assert pack(dense, tmp_path / "out", prune="random", seed=1, run=run).already_complete
    for other in ({"prune": "random", "seed": 2}, {"prune": "magnitude"}):
        refused(dense, ss.OperandError, "is not what these options make", run=run, **other)
    models.folder(dense, models.tensors(np.float32, layers=1, prune=None, seed=5))
    refused(dense, ss.OperandError, "is not what these options make", run=run, prune="random", seed=1)


def test_odd_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"{name}.weight": SPARSE for name in ("layers[0].fc", "b[1]", "embed" * 50_000 + ".x")}
    file = written(tmp_path, parts)
    (tmp_path / "cwd").mkdir()
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "else" / "deep")
    monkeypatch.chdir(tmp_path / "cwd")
    assert len(pack(Path("../m.safetensors"), "one", targets="layers[0].fc").modules) == 1
    assert len(pack(file, "sub/../o").modules) == 3
    assert ss.verify_checkpoint("o", file).modules == 3
    pack(file, f"{tmp_path}/link/../o.safetensors")  # where the system says
    assert names(tmp_path / "else") == ["deep", "o.safetensors"]
    bad = tmp_path / "bad\udcff.safetensors"
    bad.write_bytes(file.read_bytes())
    assert Path(pack(bad, None).output).exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_source_that_changes_is_not_published(source: Path, name: str) -> None:
    def change(phase: str, done: int, total: int) -> None:
        os.utime(source / name, ns=(1, 1))

    run = {"progress": change, "verify": name == "config.json"}
    refused(source, ss.VerificationError, f"{name}: was written to while it was read", run=run)


def test_a_companion_that_is_a_pointer_is_refused(source: Path) -> None:
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(source, ss.FormatError, r"tokenizer.json: is a pointer of Git LFS")


@pytest.mark.parametrize("extra", ["a", "a.weight_scale", "weight_shape", "b.weight_meta"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_load_could_not_read_back_is_refused_at_the_start(tmp_path: Path, extra: str, dry_run: bool) -> None:
    file = written(tmp_path, {"a.weight": SPARSE, extra: np.ones((16, 1), np.float32)})
    why = r"the output: .*rename it in the source, or leave the module|a scale beside|b\.weight_meta.*rename this tensor"
    refused(file, ss.UnsupportedError, why, dry_run=dry_run, run={"verify": False})


def test_a_packed_folder_that_ignores_what_is_no_expression_is_refused(tmp_path: Path, source: Path) -> None:
    pack(source, tmp_path / "out", scheme="int8")
    config = config_of(tmp_path / "out")
    config["quantization_config"]["ignore"] = ["re:("]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ss.UnsupportedError, match=r"ignore 're:\(' is not a regular expression"):
        ss.unpack_checkpoint(tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    "given",
    [{"scheme": "INT4"}, {"prune": "sparsegpt"}, {"statistics": {"a": np.ones(3)}}, {"format": "zip"}, {"max_shard_size": 0},
     {"max_shard_size": "5GB"}, {"targets": 5}, {"ignore": (5,)}, {"pattern": "2:8"}, {"run": {"max_workers": 0}},
     {"run": {"max_workers": 1.5}}, {"run": {"max_memory": 1 << 20}}, {"run": {"progress": "bar"}}],
    ids=str,
)  # fmt: skip
def test_options_and_run_refuse_what_they_do_not_know(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ss.OperandError, match=next(iter(given.get("run", given)))):
        pack(tmp_path, None, **given)
