"""Checkpoints pruned without a text: by magnitude, statistics, or scores made elsewhere; killed, resumed, refused; commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from cases import drop_two, inputs, weights
from commands import slidesparse
from faults import contents, failing, interrupting, killed
from models import MODULES, folder, tensors, write

import slidesparse_nb as ss
from slidesparse_nb import OperandError, Pattern, UnsupportedError
from slidesparse_nb.core import reference
from slidesparse_nb.pruning.sparsegpt import sparsegpt
from slidesparse_nb.pruning.statistics import Moments, Statistics, crc32
from slidesparse_nb.pruning.wanda import wanda


def made_up_statistics(path: Path, parts: dict[str, Any], *, hessians: bool) -> Statistics:
    """Statistics of a random text for every layer of a made-up decoder; q/k/v share theirs."""
    found = Statistics()
    for name, w in parts.items():
        module = name.removesuffix(".weight")
        if not module.endswith(MODULES):
            continue
        first = module.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        found.inputs[module] = first
        if first not in found.moments:
            found.moments[first] = Moments.empty(first, w.shape[1], gram=hessians)
            found.moments[first].add(inputs(300, w.shape[1], seed=len(found.moments)))
    found.save(path)
    return found


class Dense(NamedTuple):
    """A folder, its tensors, statistics of all its layers, and where an output goes."""

    source: Path
    parts: dict[str, Any]
    statistics: Path
    out: Path

    @property
    def options(self) -> ss.PruneOptions:
        return ss.PruneOptions(method="sparsegpt", statistics=self.statistics)


@pytest.fixture
def dense(tmp_path: Path) -> Dense:
    made = Dense(tmp_path / "in", tensors(prune=None), tmp_path / "s.safetensors", tmp_path / "out")
    folder(made.source, made.parts)
    made_up_statistics(made.statistics, made.parts, hessians=True)
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_checkpoint(dtype: Any, method: str, tmp_path: Path) -> None:
    parts = tensors(dtype, prune=None)
    source, out, file = folder(tmp_path / "in", parts, shards=2), tmp_path / "out", tmp_path / "s.safetensors"
    found = made_up_statistics(file, parts, hessians=method == "sparsegpt")
    options = ss.PruneOptions(method=method, statistics=None if method == "magnitude" else file)
    report = ss.prune_checkpoint(source, out, options)
    assert report.verified
    assert {m.name for m in report.modules} == found.inputs.keys()
    made = ss.load(out)
    assert made.keys() == parts.keys()
    for name, w in parts.items():
        got, module = made[name], name.removesuffix(".weight")
        assert isinstance(got, np.ndarray)
        assert (got.dtype, got.shape) == (w.dtype, w.shape)
        if module not in found.inputs:
            assert got.tobytes() == w.tobytes()
        elif method == "sparsegpt":
            wanted = sparsegpt(w, found.of(module).hessian, "6:8").astype(dtype)
            np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
            x_squared = found.of(module).hessian
            lost = got.astype(np.float64) - w.astype(np.float64)
            whole = np.sum(w.astype(np.float64) @ x_squared * w.astype(np.float64))
            assert report.errors[module] == pytest.approx(np.sum(lost @ x_squared * lost) / whole, rel=1e-3)
        else:
            wanted = reference.prune(w, Pattern(6, 8)) if method == "magnitude" else wanda(w, found.of(module).norms, "6:8")
            np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
    ss.pack_checkpoint(out, tmp_path / "packed")  # which prunes nothing, and refuses what breaks the pattern
    assert ss.prune_checkpoint(source, out, options, ss.Run(resume=True)).already_complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "packed", "s.safetensors"]


def test_killed_anywhere_it_goes_on(dense: Dense, tmp_path: Path) -> None:
    source, options = dense.source, dense.options
    ss.prune_checkpoint(source, whole := tmp_path / "whole", options)
    kills = 0
    for at in (1, 2, 3, 5, 8, 13, 21, 34, 55, 200):
        out = tmp_path / f"out{at}"
        if killed(lambda out=out: ss.prune_checkpoint(source, out, options), at):
            kills += 1
        ss.prune_checkpoint(source, out, options, ss.Run(resume=True))
        assert contents(out) == contents(whole)
    assert kills > 7
    assert not list(tmp_path.glob("out*.*"))


def test_scores_and_masks_made_elsewhere(tmp_path: Path) -> None:
    parts = {f"layers.0.{name}.weight": weights((12, 16), seed=i) for i, name in enumerate(("a_proj", "b_proj", "up_proj"))}
    source, file, out = write(tmp_path / "m.safetensors", parts), tmp_path / "scores.safetensors", tmp_path / "out.safetensors"
    names, rng = [*parts], np.random.default_rng(0)
    mask = drop_two(np.ones((12, 16), np.int8), Pattern(6, 8)).astype(np.bool_)
    mask[:, 0] = False
    given = {names[0]: rng.random((12, 16)), "layers.0.b_proj": mask, names[2]: mask.astype(np.float32)}
    report = ss.prune_checkpoint(source, out, ss.PruneOptions(scores=write(file, given)))
    made = ss.load(out)
    first, score = parts[names[0]], given[names[0]]
    wanted = reference.prune(first, Pattern(6, 8), np.where(first == 0, -1, score))
    np.testing.assert_array_equal(made[names[0]], wanted)
    for name in names[1:]:
        np.testing.assert_array_equal(made[name], parts[name] * mask)
    assert report.prune == "scores"
    out.unlink()
    for change, error, message in (
        ({names[0]: np.ones((12, 16), np.bool_)}, ss.PatternError, r"layers\.0\.a_proj\.weight: its mask leaves more than 6"),
        ({names[0]: np.full((12, 16), -1.0)}, OperandError, r"layers\.0\.a_proj\.weight: prune: score -1\.0 at row 0"),
        ({names[0]: np.ones((12, 15))}, OperandError, r"layers\.0\.a_proj\.weight: prune: scores of shape \(12, 15\)"),
        ({"layers.0.d_proj": mask}, OperandError, r"scores: 'layers\.0\.d_proj' is no module that is pruned"),
        ({"layers.0.a_proj": mask}, OperandError, r"scores: 'layers\.0\.a_proj' is there with \.weight and without"),
        ({names[0]: None}, OperandError, r"scores: have none for 'layers\.0\.a_proj'"),
    ):
        write(file, {name: a for name, a in {**given, **change}.items() if a is not None})
        with pytest.raises(error, match=f"^{message}"):
            ss.prune_checkpoint(source, out, ss.PruneOptions(scores=file))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "scores.safetensors"]


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for given, message in (
        ({}, "method: '' must be one of magnitude, wanda, sparsegpt"),
        ({"method": "random"}, "method: 'random' must be one of"),
        ({"method": "wanda"}, "method: wanda needs a calibration text, or statistics"),
        ({"method": "wanda", "calibration": "a", "statistics": "b"}, "method: wanda needs"),
        ({"method": "magnitude", "calibration": "a"}, "calibration: is of methods wanda and sparsegpt; leave it out"),
        ({"method": "magnitude", "scores": "a"}, "scores: take the place of method 'magnitude'"),
        ({"method": "wanda", "calibration": "a", "scheme": "int8"}, "scheme: is of method sparsegpt"),
        ({"method": "sparsegpt", "calibration": "a", "scheme": "int9"}, "scheme: 'int9' is not a packed type"),
        ({"method": "wanda", "calibration": "a", "damping": 0.1}, "damping: is of method sparsegpt; leave it out"),
        ({"method": "sparsegpt", "calibration": "a", "damping": "a"}, "damping: 'a' must be a share of the diagonal"),
        ({"method": "sparsegpt", "calibration": "a", "device": "tpu"}, "device: 'tpu' must be one of cpu, cuda"),
        ({"method": "sparsegpt", "calibration": "a", "window": 0}, "window: 0 must be a whole number of at least 1"),
        ({"method": "sparsegpt", "calibration": "a", "window": 1.5}, r"window: 1\.5 must be a whole number"),
        ({"method": "sparsegpt", "calibration": "a", "tokens": "300"}, "tokens: '300' must be a whole number"),
        ({"method": "sparsegpt", "calibration": "a", "tokens": 9}, "tokens: 9 must be at least one window of 2048"),
    ):
        with pytest.raises(OperandError, match=f"^{message}"):
            ss.PruneOptions(**given)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"^scheme: W4A8 has scales along k"):
        ss.PruneOptions(method="sparsegpt", calibration="a", scheme="W4A8")
    source = write(tmp_path / "m.safetensors", {"a.weight": np.ones((4, 16), np.float32)})
    file = tmp_path / "s.safetensors"
    Statistics({"a": "a"}, {"a": Moments.empty("a", 16, gram=True)}).save(file)
    with pytest.raises(OperandError, match=r"^max_shard_size: out\.safetensors is one file and is not split"):
        ss.prune_checkpoint(source, tmp_path / "out.safetensors", ss.PruneOptions(method="magnitude", max_shard_size=1000))
    with pytest.raises(OperandError, match=r"^'a': no token of the calibration text reaches it"):
        ss.prune_checkpoint(source, tmp_path / "out.safetensors", ss.PruneOptions(method="sparsegpt", statistics=file))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "s.safetensors"]


def test_options_of_another_kind_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "m.safetensors", {"a.weight": np.ones((4, 16), np.float32)})
    for call, message in (
        (lambda: ss.prune_checkpoint(source, tmp_path / "out", {}), r"options: dict must be slidesparse_nb\.PruneOptions"),  # type: ignore[arg-type]
        (lambda: ss.prune_checkpoint(source, tmp_path / "out", None, {}), r"run: dict must be slidesparse_nb\.Run"),  # type: ignore[arg-type]
        (lambda: ss.collect_statistics(source, tmp_path / "out", ss.Options()), "options: Options must be"),  # type: ignore[arg-type]
    ):
        with pytest.raises(OperandError, match=f"^{message}"):
            call()


def test_statistics_of_another_model_are_refused(dense: Dense, tmp_path: Path) -> None:
    source, parts, file, out = dense
    found, options = Statistics.load(file), ss.PruneOptions(method="wanda", statistics=file)
    report = ss.prune_checkpoint(source, out, options)
    assert any("does not say of which model its statistics are" in note for note in report.notes)
    found.model = {name: crc32(w) for name, w in parts.items()}
    found.save(file)
    assert not ss.prune_checkpoint(source, out, options, ss.Run(overwrite=True)).notes
    changed = next(name for name in parts if name.removesuffix(".weight") not in found.inputs)
    parts[changed] = parts[changed] + 1
    with pytest.raises(OperandError, match=f"^statistics: are of another model, whose '{changed}' holds other numbers"):
        ss.prune_checkpoint(folder(tmp_path / "other", parts), tmp_path / "x", options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "other", "out", "s.safetensors"]


@pytest.mark.parametrize("broken", ["cut", "zeros"])
def test_a_broken_part_costs_itself_alone(broken: str, dense: Dense, tmp_path: Path) -> None:
    source, out, options = dense.source, dense.out, dense.options
    ss.prune_checkpoint(source, whole := tmp_path / "whole", options)

    stop = interrupting(lambda phase, done, total: phase == "writing")
    with pytest.raises(KeyboardInterrupt, match="--resume continues"):
        ss.prune_checkpoint(source, out, options, ss.Run(progress=stop))
    made = sorted((tmp_path / "out.blocks").glob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in made}
    data = bytearray(made[1].read_bytes())
    data[-1000:-900] = bytes(100)
    made[1].write_bytes(data[:100] if broken == "cut" else data)
    with pytest.raises(OperandError, match="was started with other options"):  # which loses nothing
        ss.prune_checkpoint(source, out, replace(options, pattern="2:4"), ss.Run(resume=True))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        ss.prune_checkpoint(source, out, options, ss.Run(resume=True, progress=stop))
    assert [path for path in made if path.stat().st_mtime_ns != before[path]] == [made[1]]
    made[0].write_bytes(b"")
    report = ss.prune_checkpoint(source, out, options, ss.Run(resume=True))
    assert "1 block of the run before had been damaged, and had to be made again" in report.notes
    assert contents(out) == contents(whole)
    assert len(report.errors) == len(report.modules)


def test_a_full_disk_and_a_failed_resume_lose_nothing(dense: Dense, tmp_path: Path) -> None:
    source, out, options = dense.source, dense.out, dense.options
    for at in (1, 2, 3):
        with failing(at, lasting=True), pytest.raises(OSError, match=r"cannot be written .*; name another place"):
            ss.prune_checkpoint(source, out, options)
        assert not list(tmp_path.glob("out*"))
    with failing(40, lasting=True), pytest.raises(OSError, match=r"No space .*; what is done is kept in .*resume"):
        ss.prune_checkpoint(source, out, options)
    done = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out.blocks").glob("*.safetensors"))]
    assert done

    def fail(phase: str, done: int, total: int) -> None:
        raise OperandError("as when a model is gone")

    with pytest.raises(OperandError, match="as when a model is gone"):
        ss.prune_checkpoint(source, out, options, ss.Run(resume=True, progress=fail))
    after = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out.blocks").glob("*.safetensors"))]
    assert after[: len(done)] == done
    ss.prune_checkpoint(source, out, options, ss.Run(resume=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "s.safetensors"]


def test_values_beyond_float16_are_kept_for_pack_to_refuse(tmp_path: Path) -> None:
    w, file = weights((8, 16)) * np.float32(1e6), tmp_path / "s.safetensors"
    source, out = write(tmp_path / "m.safetensors", {"a.weight": w}), tmp_path / "out.safetensors"
    moments = Moments.empty("a", 16, gram=True)
    moments.add(inputs(100, 16))
    Statistics({"a": "a"}, {"a": moments}).save(file)
    ss.prune_checkpoint(source, out, ss.PruneOptions(method="sparsegpt", statistics=file, scheme="FP16"))
    with pytest.raises(UnsupportedError, match="overflows float16"):
        ss.pack_checkpoint(out, tmp_path / "packed.safetensors", ss.Options(scheme="FP16"))


def test_what_is_not_pruned(tmp_path: Path) -> None:
    eight = {"a.weight": np.ones((4, 16), np.int8), "a.weight_scale": np.ones((4, 1), np.float32)}
    bad = {"a.weight": np.full((4, 16), np.inf, np.float32)}
    for parts, message in (
        (eight, "already quantized to int8|is I8 with a scale"),
        (bad, r"a\.weight: w: inf at row 0, column 0"),
    ):
        source = write(tmp_path / "m.safetensors", parts)
        with pytest.raises(UnsupportedError, match=message):
            ss.prune_checkpoint(source, tmp_path / "out.safetensors", ss.PruneOptions(method="magnitude"))
        assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_patterns_in_another_tools_words(tmp_path: Path) -> None:
    source = folder(
        tmp_path / "in",
        config={
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "sparsity_config": {"format": "dense", "sparsity_structure": "2:8"},
            }
        },
    )
    (source / "recipe.yaml").write_text(
        'sparsity_stage:\n  SparseGPTModifier:\n    mask_structure: "2:10"\n  other:\n    mask_structure: 2:4\n'
    )
    for report in (
        ss.prune_checkpoint(source, tmp_path / "out", ss.PruneOptions(method="magnitude")),
        ss.pack_checkpoint(source, tmp_path / "packed"),
    ):
        told = [note for note in report.notes if "counts zeros" in note]
        assert [note.rpartition(", ")[2] for note in told] == ["6:8 here", "8:10 here"]
        assert "sparsity_structure '2:8' counts zeros, as llm-compressor does: 2 in 8" in told[0]


def test_the_command(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "in", tensors(prune=None)), tmp_path / "out"
    line = ["prune", source, "-o", out, "--method", "magnitude", "--pattern", "4:6"]
    done = slidesparse(*line, "-v")
    assert done.exit_code == 0, done.output
    assert "14 modules, 46,080 weights at 4:6 (2 zeros in 6) by magnitude; 4 left dense" in done.stdout
    assert "model.layers.1.mlp.gate: left dense (a router)" in done.stdout
    assert slidesparse("pack", out, "-o", tmp_path / "packed", "--pattern", "4:6").exit_code == 0
    assert slidesparse("pack", out, "-o", tmp_path / "other", "--pattern", "2:4").exit_code == 3
    again = slidesparse(*line)
    assert (again.exit_code, "--overwrite replaces it" in again.stderr) == (2, True)
    assert slidesparse(*line, "--overwrite", "--json").exit_code == 0
    assert "complete already" in slidesparse(*line, "--resume").stdout
    save = ["--save-statistics", tmp_path / "s"]
    for given in (["--method", "wanda"], [*save, "-o", out], ["--statistics", "none"], []):
        assert slidesparse("prune", source, *given).exit_code == 2
    damped = slidesparse(
        "prune", source, *save, "--method", "sparsegpt", "--calibration", source / "config.json", "--damping", 1
    )
    assert (damped.exit_code, "prunes nothing: leave out --damping" in damped.stderr) == (2, True)


def test_pack_says_which_command_prunes_by_wanda(tmp_path: Path) -> None:
    source = write(tmp_path / "m.safetensors", {"a.weight": np.ones((4, 16), np.float32)})
    result = slidesparse("pack", source, "--prune", "wanda")
    assert (result.exit_code, "run `slidesparse prune --method wanda`, and pack that" in result.stderr) == (2, True)
