"""Whole checkpoints: what is packed, what passes through, and what the output says of itself."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import ml_dtypes
import models
import numpy as np
import pytest
from safetensors import safe_open

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import Checkpoint
from slidesparse_nb.checkpoint.safetensors import SafetensorsWriter
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import packed_dtype

SCHEMES = {"INT8_W8A8": "int8", "FP8_DYNAMIC": "float8_e4m3fn", "BF16": "bfloat16", "FP16": "float16"}
FAST = ss.Run(max_workers=2)


def options(**given: object) -> ss.Options:
    return ss.Options(**{"pattern": "6:8", **given})  # type: ignore[arg-type]


def assert_packed(out: Path, parts: dict[str, np.ndarray], pattern: str, scheme: str) -> None:
    """Every module holds what the reference makes of its source; every other tensor is the source's, byte for byte."""
    found = ss.load(out)
    for name, w in parts.items():
        module = name.removesuffix(".weight")
        if module.endswith(models.MODULES) and name.endswith(".weight"):
            packed = found.pop(module)
            assert isinstance(packed, ss.PackedWeight)
            wanted = reference.pack(
                reference.prune(w, ss.Pattern.of(pattern)), ss.Pattern.of(pattern), packed_dtype(SCHEMES[scheme])
            )
            assert packed.values.tobytes() == wanted.values.tobytes()
            assert packed.meta.tobytes() == wanted.meta.tobytes()
            assert (packed.scale is None) == (wanted.scale is None)
            assert packed.scale is None or packed.scale.tobytes() == wanted.scale.tobytes()
        else:
            other = found.pop(name)
            assert isinstance(other, np.ndarray)
            assert other.dtype == w.dtype
            assert other.shape == w.shape
            assert other.tobytes() == w.tobytes()
    assert not found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "8:10", "14:16"])
def test_every_pattern_and_scheme(tmp_path: Path, pattern: str, scheme: str) -> None:
    parts = models.tensors(np.float32, prune=None)
    models.folder(tmp_path / "in", parts)
    report = ss.pack_checkpoint(
        tmp_path / "in", tmp_path / "out", options(pattern=pattern, scheme=scheme, prune="magnitude"), FAST
    )
    assert report.verified
    assert len(report.modules) == 14
    assert_packed(tmp_path / "out", parts, pattern, scheme)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_auto_keeps_the_type_and_already_sparse_weights_need_no_pruning(tmp_path: Path, dtype: type) -> None:
    models.folder(tmp_path / "in", models.tensors(dtype))
    report = ss.pack_checkpoint(tmp_path / "in", tmp_path / "out", options(), FAST)
    assert report.scheme == ("FP16" if dtype is np.float16 else "BF16")
    assert any("float32 weights are stored as bfloat16" in note for note in report.notes) == (dtype is np.float32)
    result = ss.verify_checkpoint(tmp_path / "out", tmp_path / "in")
    assert (result.modules, result.pruned) == (14, 0)


def test_a_folder_goes_with_its_companions_and_a_new_config(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", shards=3)
    report = ss.pack_checkpoint(source, tmp_path / "out", options(scheme="FP8_DYNAMIC", prune="magnitude"), FAST)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == '{"mode": "mean"}'
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert any("pytorch_model.bin" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "slidesparse"
    assert quantization["pattern"] == {"nnz": 6, "group": 8}
    assert quantization["k_slice_unit"] == 16
    assert set(quantization["ignore"]) == {
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
        "re:.*[.](gate|router)$",
    }
    assert "sparsity_config" not in json.dumps(config)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        header = json.loads(file.metadata()["slidesparse"])
    assert header["pattern"] == {"nnz": 6, "group": 8}
    assert header["dtype"] == "float8_e4m3fn"


def test_shards_are_split_where_asked_and_hold_the_same(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    ss.pack_checkpoint(source, tmp_path / "one", options(), FAST)
    ss.pack_checkpoint(source, tmp_path / "many", options(max_shard_size=30_000), FAST)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert [shard.name for shard in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    one, many = ss.load(tmp_path / "one"), ss.load(tmp_path / "many")
    assert one.keys() == many.keys()
    ss.verify_checkpoint(tmp_path / "many", source)


def test_sharded_folder_index_file_and_single_file_give_the_same_weights(tmp_path: Path) -> None:
    parts = models.tensors()
    models.folder(tmp_path / "sharded", parts, shards=2)
    file = models.write(tmp_path / "file" / "m.safetensors", parts)
    ss.pack_checkpoint(tmp_path / "sharded", tmp_path / "a", options(), FAST)
    ss.pack_checkpoint(tmp_path / "sharded" / "model.safetensors.index.json", tmp_path / "b", options(), FAST)
    ss.pack_checkpoint(file, tmp_path / "c.safetensors", options(), FAST)
    ss.pack_checkpoint(file, tmp_path / "d", options(), FAST)
    for out in ("a", "b", "c.safetensors", "d"):
        assert_packed(tmp_path / out, parts, "6:8", "BF16")
    assert (tmp_path / "d" / "model.safetensors").exists()


def test_default_output_stands_beside_the_input_and_says_pattern_and_type(tmp_path: Path) -> None:
    file = models.write(tmp_path / "m.safetensors", models.tensors())
    assert (
        Path(ss.pack_checkpoint(file, None, options(scheme="INT8_W8A8"), FAST).output) == tmp_path / "m-6of8-int8.safetensors"
    )
    source = models.folder(tmp_path / "model")
    out = Path(ss.pack_checkpoint(source, None, options(scheme="FP8_DYNAMIC", format="dense"), FAST).output)
    assert out == tmp_path / "model-6of8-fp8-dense"
    assert out.is_dir()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_quantized_sources_keep_bytes_and_scales(tmp_path: Path, kind: str, scales: str) -> None:
    parts, config = models.quantized(kind, scales)
    source = models.folder(tmp_path / "in", parts, config=config)
    report = ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)
    assert report.scheme == ("INT8_W8A8" if kind == "int8" else "FP8_DYNAMIC")
    for name, packed in ss.load(tmp_path / "out").items():
        if isinstance(packed, ss.PackedWeight):
            assert ss.unpack(packed).tobytes() == parts[f"{name}.weight"].tobytes()
            assert (packed.scale == parts[f"{name}.weight_scale"].astype(np.float32).reshape(-1, 1)).all()
    assert ss.verify_checkpoint(tmp_path / "out", source).modules == 14
    ss.unpack_checkpoint(tmp_path / "out", tmp_path / "dense")
    unpacked = ss.load(tmp_path / "dense")
    for name, array in parts.items():
        if not name.endswith("weight_scale"):
            assert unpacked[name].tobytes() == array.tobytes()  # type: ignore[union-attr]
    quantization = json.loads((tmp_path / "dense" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == config["quantization_config"]["format"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpack_of_packed_is_the_dense_format_byte_for_byte(tmp_path: Path, scheme: str) -> None:
    source = models.folder(tmp_path / "in", models.tensors(np.float32, prune=None))
    ss.pack_checkpoint(source, tmp_path / "packed", options(scheme=scheme, prune="magnitude"), FAST)
    ss.pack_checkpoint(source, tmp_path / "dense", options(scheme=scheme, prune="magnitude", format="dense"), FAST)
    report = ss.unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert report.verified
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "unpacked" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["slidesparse"]["pattern"] == {"nnz": 6, "group": 8}


def test_where_all_modules_break_the_pattern_none_can_be_skipped(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", models.tensors(layers=1, prune=None))
    with pytest.raises(ss.PatternError, match=r"nothing to pack: all 7 modules break 6:8.*, the first: model.*; prune with"):
        ss.pack_checkpoint(source, tmp_path / "out", options(skip_bad=True), FAST)
    with pytest.raises(ss.UnsupportedError, match=r"fused by engines with .*; name all that engines fuse"):
        ss.pack_checkpoint(source, tmp_path / "out", options(targets=("*q_proj",)), FAST)


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_what_is_shown_of_an_output_adds_up(tmp_path: Path, format: str) -> None:
    source = models.folder(tmp_path / "in")
    report = ss.pack_checkpoint(source, tmp_path / "out", options(scheme="int8", prune="magnitude", format=format), FAST)
    facts = ss.inspect_checkpoint(tmp_path / "out")
    assert sum(m.bytes for m in facts.modules) + facts.other_bytes == facts.bytes
    shown = {m.name: m.bytes for m in facts.modules}
    assert all(shown[m.name] == m.bytes for m in report.modules)


def test_a_packed_folder_that_ignores_what_is_no_expression_is_refused(tmp_path: Path) -> None:
    ss.pack_checkpoint(models.folder(tmp_path / "in"), tmp_path / "out", options(scheme="int8"), FAST)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:("]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ss.UnsupportedError, match=r"ignore: 're:\(' is no regular expression"):
        ss.unpack_checkpoint(tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_random_pruning_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", models.tensors(prune=None))
    made = []
    for name, seed, workers in (("a", 1, 1), ("b", 1, 3), ("c", 2, 2)):
        ss.pack_checkpoint(source, tmp_path / name, options(prune="random", seed=seed), ss.Run(max_workers=workers))
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    ss.verify_checkpoint(tmp_path / "a", source)


def test_violations_name_tensor_row_group_and_count_and_leave_nothing(tmp_path: Path) -> None:
    parts = models.tensors()
    w = parts["model.layers.1.mlp.up_proj.weight"].copy()
    w[5, 8:16] = 1
    w[7, :8] = 1
    parts["model.layers.1.mlp.up_proj.weight"] = w
    source = models.folder(tmp_path / "in", parts)
    with pytest.raises(
        ss.PatternError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: row 5, group 1 .*2 of 576 groups"
    ) as caught:
        ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)
    assert (caught.value.row, caught.value.group, caught.value.count) == (5, 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    with pytest.raises(ss.PatternError):
        ss.pack_checkpoint(source, tmp_path / "out", options(format="dense"), FAST)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_skip_bad_leaves_the_module_and_its_fused_sibling_dense(tmp_path: Path) -> None:
    parts = models.tensors()
    parts["model.layers.0.mlp.up_proj.weight"] = np.ones_like(parts["model.layers.0.mlp.up_proj.weight"])
    bad = parts["model.layers.1.self_attn.o_proj.weight"].copy()
    bad[3, 4] = np.nan
    parts["model.layers.1.self_attn.o_proj.weight"] = bad
    parts["model.layers.1.mlp.experts.gate_up_proj"] = np.ones((2, 8, 8), models.BF16)
    source = models.folder(tmp_path / "in", parts)
    with pytest.raises(ss.UnsupportedError, match=r"or leave such modules dense with --skip-bad$"):
        ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)
    finite = {name: part for name, part in parts.items() if "experts" not in name and "up_proj" not in name}
    with pytest.raises(ss.UnsupportedError, match=r"finite.*or leave such modules dense with --skip-bad$"):
        ss.pack_checkpoint(models.folder(tmp_path / "nan", finite), tmp_path / "out", options(), FAST)
    report = ss.pack_checkpoint(source, tmp_path / "out", options(skip_bad=True), FAST)
    assert not any("--skip-bad" in reason for reason in report.skipped.values())
    assert set(report.skipped) == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    }
    assert "model.layers.0.mlp.gate_proj" in report.left_dense
    found = ss.load(tmp_path / "out")
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ):
        assert found[name].tobytes() == parts[name].tobytes()  # type: ignore[union-attr]
    assert len(report.modules) == 11
    for name, why in {"model.layers.1.self_attn.o_proj": "row 3, column 4"}.items():
        assert why in report.skipped[name]


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    parts = models.tensors()
    parts["model.layers.0.self_attn.k_proj.weight"][2, 9] = np.inf
    source = models.folder(tmp_path / "in", parts)
    with pytest.raises(ss.UnsupportedError, match=r"k_proj\.weight: .*inf at row 2, column 9"):
        ss.pack_checkpoint(source, tmp_path / "out", options(prune="magnitude"), FAST)
    assert not (tmp_path / "out").exists()


def test_the_output_may_not_exist_nor_lie_in_the_source(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)  # an empty folder is no obstacle
    with pytest.raises(ss.OperandError, match="exists; --overwrite"):
        ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    ss.pack_checkpoint(source, tmp_path / "out", options(scheme="INT8_W8A8"), ss.Run(overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    for place in (source, source / "sub", tmp_path):
        with pytest.raises(ss.OperandError, match="name a place of its own"):
            ss.pack_checkpoint(source, place, options(), ss.Run(overwrite=True))
    with pytest.raises(ss.OperandError, match="name a folder"):
        ss.pack_checkpoint(source, tmp_path / "x.safetensors", options(), FAST)
    precious = models.write(tmp_path / "precious.safetensors", models.tensors(seed=9))
    bytes_before = precious.read_bytes()
    with pytest.raises(ss.OperandError, match="not a checkpoint that this tool wrote"):
        ss.pack_checkpoint(source / "model.safetensors", precious, options(), ss.Run(overwrite=True))
    assert precious.read_bytes() == bytes_before
    precious.unlink()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear")
    with pytest.raises(ss.OperandError, match="not a checkpoint that this tool wrote"):
        ss.pack_checkpoint(source, tmp_path / "home", options(), ss.Run(overwrite=True))
    assert (tmp_path / "home" / "diary.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "in", "out"]


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_overwrite_knows_its_own_output_without_a_config(tmp_path: Path, format: str) -> None:
    file = models.write(tmp_path / "m.safetensors", models.tensors())
    for out in ("a", "a.safetensors"):
        for _ in range(2):
            ss.pack_checkpoint(file, tmp_path / out, options(format=format), ss.Run(overwrite=True))


def test_resume_calls_complete_only_what_these_options_make(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", models.tensors(prune=None))
    ss.pack_checkpoint(source, tmp_path / "out", options(prune="random", seed=1), FAST)
    again = ss.Run(resume=True, verify=False)
    assert ss.pack_checkpoint(source, tmp_path / "out", options(prune="random", seed=1), again).already_complete
    for other in (options(prune="random", seed=2), options(prune="magnitude")):
        with pytest.raises(ss.OperandError, match="is not what these options make"):
            ss.pack_checkpoint(source, tmp_path / "out", other, again)
    models.folder(source, models.tensors(prune=None, seed=5))
    with pytest.raises(ss.OperandError, match="is not what these options make"):
        ss.pack_checkpoint(source, tmp_path / "out", options(prune="random", seed=1), again)


def test_output_of_a_hub_cache_goes_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.folder(tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc123")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ss.pack_checkpoint(source, None, options(), FAST)
    assert (tmp_path / "here" / "tiny-6of8-bf16" / "model.safetensors").exists()
    assert [p.name for p in source.parent.iterdir()] == ["abc123"]


def test_verification_tells_pruned_from_rounded(tmp_path: Path) -> None:
    w = np.full((4, 16), 1000, np.float32)
    w[:, 1::8], w[:, 2::8], w[:, 3::8] = 1, 2, 3  # the two smallest of a group go; the third rounds to zero in int8
    source = models.write(tmp_path / "m.safetensors", {"fc.weight": w})
    for prune in ("magnitude", "random"):
        ss.pack_checkpoint(source, tmp_path / f"{prune}.safetensors", options(scheme="INT8_W8A8", prune=prune, seed=3), FAST)
    found = ss.verify_checkpoint(tmp_path / "magnitude.safetensors", source)
    assert (found.pruned, found.rounded, found.by_magnitude) == (0, 24, True)  # all three are too small to be stored
    found = ss.verify_checkpoint(tmp_path / "random.safetensors", source)
    assert found.pruned > 0
    assert not found.by_magnitude
    with pytest.raises(ss.VerificationError, match="no weight of shape"):
        ss.verify_checkpoint(tmp_path / "magnitude.safetensors", models.folder(tmp_path / "other"))


def test_dry_run_names_what_would_be_refused(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", models.tensors(prune="8:10"))
    plan = ss.pack_checkpoint(source, tmp_path / "out", options(), FAST, dry_run=True)
    assert len(plan.refused) == 14
    assert not ss.pack_checkpoint(source, tmp_path / "out", options(prune="magnitude"), FAST, dry_run=True).refused


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    plan = ss.pack_checkpoint(source, tmp_path / "out", options(scheme="INT8_W8A8"), FAST, dry_run=True)
    assert not (tmp_path / "out").exists()
    done = ss.pack_checkpoint(source, tmp_path / "out", options(scheme="INT8_W8A8"), FAST)
    assert plan.modules == done.modules
    assert plan.output_bytes == done.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (plan.expansion, plan.ideal_speedup) == (1.5, pytest.approx(4 / 3))


def test_verification_catches_a_changed_byte_anywhere(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    ss.pack_checkpoint(source, tmp_path / "out", options(scheme="INT8_W8A8"), FAST)
    path = tmp_path / "out" / "model.safetensors"
    good = path.read_bytes()
    with Checkpoint.open(tmp_path / "out") as written:
        places = {name: info.start for name, (info, _) in written.tensors.items() if info.nbytes}
    for name, start in places.items():
        bad = bytearray(good)
        bad[start] ^= 0x01
        path.write_bytes(bad)
        with pytest.raises((ss.VerificationError, ss.FormatError)):
            ss.verify_checkpoint(tmp_path / "out", source)
        assert name in places
    path.write_bytes(good)
    assert ss.verify_checkpoint(tmp_path / "out", source).copies == len(places) - 14 * 4


def test_inspection_names_patterns_that_dense_weights_satisfy(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in", models.tensors(prune="4:6"))
    facts = {m.name: m for m in ss.inspect_checkpoint(source).modules}
    assert "4:6" in facts["model.layers.0.mlp.up_proj"].satisfies
    assert "2:4" not in facts["model.layers.0.mlp.up_proj"].satisfies
    assert facts["lm_head"].satisfies == ()
    assert facts["lm_head"].reason == "an output head"
    assert facts["model.layers.0.mlp.up_proj"].zeros == pytest.approx(1 / 3, abs=0.01)


def test_options_and_run_refuse_what_they_do_not_know() -> None:
    for bad in (
        {"scheme": "INT4"},
        {"prune": "wanda"},
        {"statistics": {"a": np.ones(3)}},
        {"format": "zip"},
        {"max_shard_size": 0},
        {"pattern": "2:8"},
    ):
        with pytest.raises(ss.OperandError):
            options(**bad)
    for bad_run in ({"max_workers": 0}, {"max_memory": 1 << 20}):
        with pytest.raises(ss.OperandError):
            ss.Run(**bad_run)


def test_an_interrupted_proof_or_a_failed_disk_keeps_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.folder(tmp_path / "in")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(OSError, match="No space"):
            ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ss.OperandError, match="--resume"):
        ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)
    ss.pack_checkpoint(source, tmp_path / "out", options(), ss.Run(resume=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_dense_format_may_hold_a_tensor_of_a_modules_name(tmp_path: Path) -> None:
    parts = {"a": np.ones((16, 32), np.float32), "a.weight": reference.prune(np.ones((16, 32), np.float32), ss.Pattern(6, 8))}
    file = models.write(tmp_path / "m.safetensors", parts)
    report = ss.pack_checkpoint(file, tmp_path / "d.safetensors", options(scheme="INT8_W8A8", format="dense"), FAST)
    assert (ss.load(tmp_path / "d.safetensors")["a"] == parts["a"]).all()
    assert report.left_dense == {"a (the tensor)": "not named .weight"}
    scalar = models.write(tmp_path / "s.safetensors", {"a": np.ones((16, 32), np.float32), "a.weight": np.array(1, np.float32)})
    assert [(m.name, m.n, m.k) for m in ss.inspect_checkpoint(scalar).modules] == [("a", 16, 32)]
    for path in (file, tmp_path / "d.safetensors"):
        facts = ss.inspect_checkpoint(path)
        assert [m.name for m in facts.modules] == ["a", "a (the tensor)"]
        assert sum(m.bytes for m in facts.modules) + facts.other_bytes == facts.bytes


@pytest.mark.parametrize("extra", ["a", "a.weight_scale", "weight_shape"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_load_could_not_read_back_is_refused_at_the_start(tmp_path: Path, extra: str, dry_run: bool) -> None:
    w = reference.prune(np.ones((16, 32), np.float32), ss.Pattern(6, 8))
    file = models.write(tmp_path / "m.safetensors", {"a.weight": w, extra: np.ones((16, 1), np.float32)})
    with pytest.raises(ss.UnsupportedError, match=r"the output: .*rename it in the source, or leave the module|a scale beside"):
        ss.pack_checkpoint(file, tmp_path / "p.safetensors", options(), dry_run=dry_run)
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("name", ["fc.weight", "re:(", "*", "lm_head", "model.q_proj"])
def test_verification_takes_names_as_they_are(tmp_path: Path, name: str) -> None:
    w = reference.prune(np.ones((16, 32), np.float32), ss.Pattern(6, 8))
    other = {"model.k_proj.weight": w, "scalar": np.ones((), np.float32)}
    file = models.write(tmp_path / "m.safetensors", {f"{name}.weight": w, **other})
    ss.save(tmp_path / "p.safetensors", {name: ss.pack(w, "6:8", "int8"), **other})
    assert ss.verify_checkpoint(tmp_path / "p.safetensors", file).modules == 1


def test_modules_of_several_types_keep_them(tmp_path: Path) -> None:
    w = reference.prune(np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32), ss.Pattern(6, 8))
    packed = {"a": ss.pack(w, "6:8", "int8"), "b": ss.pack(w, "6:8", "bf16"), "c": ss.pack(w, "6:8", "fp8")}
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "model.safetensors"
    ss.save(file, packed)
    source = models.write(tmp_path / "m.safetensors", {f"{name}.weight": w for name in packed})
    assert ss.verify_checkpoint(file, source).modules == 3
    ss.unpack_checkpoint(file, tmp_path / "d.safetensors", FAST)
    dense = ss.load(tmp_path / "d.safetensors")
    for name, weight in packed.items():
        assert dense[f"{name}.weight"].tobytes() == ss.unpack(weight).tobytes()
        assert dense[f"{name}.weight"].dtype == weight.dtype.numpy
    ss.unpack_checkpoint(tmp_path / "in", tmp_path / "d", FAST)  # no config.json has to describe them
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(ss.UnsupportedError, match=r"bfloat16 \(b\) and float8_e4m3fn \(c\) and int8 \(a\).*one by one"):
        ss.unpack_checkpoint(tmp_path / "in", tmp_path / "e", FAST)


def test_no_rows_cost_no_memory(tmp_path: Path) -> None:
    """Of [0, 2^31 - 1] nothing is stored; a row of it would take 4 GB."""
    source, k = tmp_path / "m.safetensors", 2**31 - 1
    with SafetensorsWriter(source, [("fc.weight", "F32", (0, k)), ("gc.weight", "F32", (k, 0))], {}):
        pass
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + (1 << 30), hard))
    try:
        ss.pack_checkpoint(source, tmp_path / "p.safetensors", options(targets=("fc",)), FAST)
        ss.verify_checkpoint(tmp_path / "p.safetensors", source)
        ss.unpack_checkpoint(tmp_path / "p.safetensors", tmp_path / "d.safetensors", FAST)
        assert ss.load(tmp_path / "d.safetensors")["fc.weight"].shape == (0, k)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_small_modules_are_packed_together_and_each_is_named_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"x.{i}.weight": np.full((1 + i % 5, 16), i % 100, np.int8) for i in range(600)}
    parts |= {f"x.{i}.weight_scale": np.full(1, i, np.float32) for i in range(600)}
    source = models.write(tmp_path / "m.safetensors", parts)
    chosen = options(prune="magnitude", targets=("x.*",))
    ss.pack_checkpoint(source, tmp_path / "p.safetensors", chosen, FAST)
    monkeypatch.setattr("slidesparse_nb.convert.rows.SMALL", -1)
    ss.pack_checkpoint(source, tmp_path / "q.safetensors", chosen, FAST)
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()
    monkeypatch.undo()
    parts["x.307.weight"] = np.full((2, 16), -1, np.int8)
    models.write(source, parts)
    with pytest.raises(ss.PatternError, match=r"^x\.1\.weight: row 0, group 0"):
        ss.pack_checkpoint(source, tmp_path / "r.safetensors", options(prune="none", targets=("x.*",)), FAST)
    with pytest.raises(ss.VerificationError, match=r"x\.307"):
        ss.verify_checkpoint(tmp_path / "p.safetensors", source)


def test_out_is_where_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "else" / "deep")
    source = models.write(tmp_path / "m.safetensors", models.tensors(layers=1))
    ss.pack_checkpoint(source, f"{tmp_path}/link/../o.safetensors", options(), FAST)
    assert sorted(os.listdir(tmp_path / "else")) == ["deep", "o.safetensors"]


def test_a_source_that_changes_is_not_published(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        source = models.folder(tmp_path / "in")

        def change(phase: str, done: int, total: int, path: Path = source / name) -> None:
            os.utime(path, ns=(1, 1))

        with pytest.raises(ss.VerificationError, match=f"{name}: was written to while it was read"):
            ss.pack_checkpoint(source, tmp_path / "out", options(), ss.Run(progress=change))
        assert os.listdir(tmp_path) == ["in"]


def test_a_companion_that_is_a_pointer_is_refused(tmp_path: Path) -> None:
    source = models.folder(tmp_path / "in")
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ss.FormatError, match=r"tokenizer.json: is a pointer of Git LFS"):
        ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)


@pytest.mark.parametrize("part", ["weight_scale", "input_scale", "pre_quant_scale", "R4_input.weight", "gamma"])
def test_what_acts_on_a_layer_beside_its_weight_is_refused(tmp_path: Path, part: str) -> None:
    parts = {
        "a.weight": np.zeros((16, 32), np.float32),
        "b.weight": np.zeros((8, 32), np.float32),
        "b.bias": np.ones(8, np.float32),
    }
    file = models.write(tmp_path / "m.safetensors", {**parts, f"a.{part}": np.ones((16, 1), np.float32)})
    with pytest.raises(ss.UnsupportedError, match=rf"a\.{part}"):
        ss.pack_checkpoint(file, tmp_path / "p.safetensors", options(), FAST)
    if part != "pre_quant_scale":  # which only another tool's loader can read
        ss.pack_checkpoint(file, tmp_path / "p.safetensors", options(skip_bad=True), FAST)
        assert ss.load(tmp_path / "p.safetensors")["a.weight"].shape == (16, 32)


@pytest.mark.parametrize("part", ["weight_shape", "weight_meta"])
def test_names_that_only_packed_files_may_hold_are_refused(tmp_path: Path, part: str) -> None:
    file = models.write(
        tmp_path / "m.safetensors", {"a.weight": np.zeros((8, 16), np.float32), f"b.{part}": np.ones(3, np.float32)}
    )
    with pytest.raises(ss.UnsupportedError, match=f"b.{part}"):
        ss.pack_checkpoint(file, None, None, ss.Run(verify=False))


def test_verification_catches_tensors_that_have_no_source(tmp_path: Path) -> None:
    file = models.write(tmp_path / "m.safetensors", models.tensors(layers=1))
    ss.pack_checkpoint(file, tmp_path / "p.safetensors", None, FAST)
    ss.save(tmp_path / "p.safetensors", {**ss.load(tmp_path / "p.safetensors"), "evil.bias": np.ones(5, np.float32)})
    with pytest.raises(ss.VerificationError, match=r"evil\.bias"):
        ss.verify_checkpoint(tmp_path / "p.safetensors", file)


def test_weights_without_elements_pass_through_at_once(tmp_path: Path) -> None:
    parts = {
        "a.weight": np.zeros((8, 16), np.float32),
        "b.weight": np.zeros((2**50, 0), np.float32),
        "c.weight": np.zeros((0, 9), np.float32),
    }
    file = models.write(tmp_path / "m.safetensors", parts)
    report = ss.pack_checkpoint(file, tmp_path / "p.safetensors", None, FAST)
    assert report.left_dense == {"b": "empty", "c": "empty"}
    assert {m.name for m in ss.inspect_checkpoint(file).modules} == {"a", "b", "c"}


def test_odd_names_of_modules_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"{name}.weight": np.zeros((8, 16), np.float32) for name in ("layers[0].fc", "b[1]", "embed" * 50_000 + ".x")}
    file = models.write(tmp_path / "m.safetensors", parts)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(ss.OperandError, match="current folder"):
        ss.pack_checkpoint("../m.safetensors", ".", options(), FAST)
    assert len(ss.pack_checkpoint("../m.safetensors", "one", options(targets="layers[0].fc"), FAST).modules) == 1
    assert len(ss.pack_checkpoint(file, "sub/../o", None, FAST).modules) == 3
    assert ss.verify_checkpoint("o", file).modules == 3
    with pytest.raises(ss.OperandError, match="is empty"):
        ss.pack_checkpoint(file, "")
    bad = tmp_path / "bad\udcff.safetensors"
    bad.write_bytes(file.read_bytes())
    assert Path(ss.pack_checkpoint(bad, None, None, FAST).output).exists()


@pytest.mark.parametrize(
    "config",
    [
        {"a": "\ud800"},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": [1]}}}},
    ],
)
def test_nonsense_in_config_is_no_crash(tmp_path: Path, config: dict[str, object]) -> None:
    source = models.folder(tmp_path / "in", config=config)
    if "a" in config:
        ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)
    else:
        with pytest.raises(ss.UnsupportedError, match="must be objects"):
            ss.pack_checkpoint(source, tmp_path / "out", options(), FAST)


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    parts = {f"t{i}": np.ones(1, np.float32) for i in range(300)}
    source = models.folder(tmp_path / "in", {**parts, "a.weight": np.zeros((8, 16), np.float32)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        report = ss.pack_checkpoint(source, tmp_path / "out", options(max_shard_size=1), ss.Run(verify=False))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len([name for name in report.files if name.endswith(".safetensors")]) == 301


def test_a_broken_block_is_named_by_its_true_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = models.write(tmp_path / "m.safetensors", {"a.weight": np.zeros((64, 64), np.float32)})
    packed = tmp_path / "p.safetensors"
    ss.pack_checkpoint(file, packed, options(scheme="INT8_W8A8"), FAST)
    with Checkpoint.open(packed) as written:
        info = written.tensors["a.weight_meta"][0]
    data = bytearray(packed.read_bytes())
    data[info.start + 50 * info.shape[1]] = 0  # positions (0, 0), twice
    packed.write_bytes(data)
    for module in ("inspect", "to_dense", "run"):
        monkeypatch.setattr(f"slidesparse_nb.convert.{module}.UNIT_BYTES", 256)
    with pytest.raises(ss.FormatError, match=r"^a: .*row 50,"):
        ss.verify_checkpoint(packed)
    with pytest.raises(ss.FormatError, match=r"^a\.meta: .*row 50,"):
        ss.unpack_checkpoint(packed, tmp_path / "d.safetensors")
