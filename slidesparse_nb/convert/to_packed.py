"""A dense checkpoint -> a packed one (or, with format="dense", a pruned and quantized one)."""

from __future__ import annotations

import os
from collections.abc import Callable

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.hf_folder import OTHER_WEIGHTS
from ..checkpoint.safetensors import checked_path
from ..core import prune as pruning
from ..core.scheme import Scheme
from ..core.untrusted_json import frozen, uncollected
from ..errors import PatternError, UnsupportedError, shown
from .bitnet import BitnetFile
from .config_json import is_renamed
from .kinds import in_block
from .module import Module
from .options import Options, Report, Run, instance_of
from .rows import SKIP, Broken, Maker
from .run import Conversion, output_target
from .select import APART, Selection, select
from .sources import open_source


def pack_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    run: Run | None = None,
    *,
    dry_run: bool = False,
) -> Report:
    """Pack a checkpoint: a .safetensors file, a Hugging Face folder, an index file, or a .gguf file.

    Args:
        source: what to read; nothing there is changed.
        out: a folder, or one .safetensors file if `source` is one; by default beside the source, named after pattern and type.
        options: what to make. run: how to work.
        dry_run: return the plan and write nothing.

    Raises:
        OperandError: wrong arguments, or `out` exists.
        PatternError: weights break the pattern (naming tensor, row, group and how many).
        FormatError, UnsupportedError: the source is broken, or of a kind that cannot be packed.
        VerificationError: what was written is not what was meant.
        OSError: reading or writing failed; what is done is kept for `resume`. In every other case nothing is left behind.
    """
    options, run = instance_of("options", options, Options), instance_of("run", run, Run)
    source = checked_path(source, "source")
    with open_source(source) as checkpoint:
        with uncollected():
            selection = select(
                checkpoint, pattern=options.pattern, scheme=options.scheme, targets=options.targets, ignore=options.ignore
            )
        refused = {} if options.skip_bad else selection.bad
        if refused and not dry_run:
            raise UnsupportedError(f"{next(iter(refused.values()))}, {SKIP}")
        maker = Maker(checkpoint, options)
        for module in selection.modules if pruning.takes_statistics(options.prune) else ():
            for matrix in module.matrices():
                maker.pruning(matrix)
        skipped = _settle_bad(checkpoint, selection, options, run)
        scheme = selection.modules[0].scheme
        target, single = output_target(source, checkpoint, out, _label(options, scheme))
        form = options.pattern, scheme, options.format
        conversion = Conversion(source, checkpoint, selection.source, target, single, selection.modules, *form)
        with uncollected():
            conversion.plan(maker.item, refused, options.max_shard_size)
        notes = [
            *selection.notes,
            *([] if single else _companion_notes(checkpoint)),
            *_config_notes(checkpoint, selection, options, scheme),
            *_ternary_notes(maker, selection.modules, run),
        ]
        report = conversion.report(prune=options.prune, left_dense=selection.left_dense, skipped=skipped, notes=notes)
        report.dry_run = dry_run
        if dry_run:
            if not options.skip_bad:  # then they are among the skipped
                report.refused = refused | maker.check_all(selection.modules, run)
                report.unsupported = sorted(refused)
            if os.path.lexists(target) and not (run.overwrite or run.resume):
                report.notes.append(f"{target} exists: a run needs --overwrite, --resume or another place")
            _count_bytes(report, selection, checkpoint, single)
        else:
            facts = {"options": options.facts(), "version": __version__}
            maker.warm_up(selection.modules[0])

            def prove(written: Checkpoint, add: Callable[[int], None]) -> None:
                maker.prove(written, selection.modules, run, add)

            try:
                with frozen():
                    conversion.carry_out(facts, run, report, "packing", prove)
            except Broken as error:
                raise maker.explain(error) from None
            _count_bytes(report, selection, checkpoint, single)
        return report


def _count_bytes(report: Report, selection: Selection, checkpoint: Checkpoint, single: bool) -> None:
    """Where every byte of the source goes, and the bytes of the files that go along."""
    refused = set(report.refused)
    packed = {name for m in selection.modules if m.name not in refused for name in m.replaced}
    for name, (info, _) in checkpoint.tensors.items():
        owners = {name, name.removesuffix(".weight"), name.rpartition(".")[0], name + APART}
        if name in packed:
            report.packed_bytes += info.nbytes
        elif owners & refused:
            report.refused_bytes += info.nbytes
        elif owners & {*selection.left_dense, *report.skipped}:
            report.dense_bytes += info.nbytes
        else:
            report.other_bytes += info.nbytes
    if checkpoint.root is not None and not single:
        report.copied_bytes = sum((checkpoint.root / name).stat().st_size for name in checkpoint.companions)


def _label(options: Options, scheme: Scheme) -> str:
    """ "6of8-int8": what a default output name says."""
    kind = {"float8_e4m3fn": "fp8", "bfloat16": "bf16", "float16": "fp16"}.get(str(scheme), str(scheme).lower())
    return f"{options.pattern.nnz}of{options.pattern.group}-{kind}{'-dense' * (options.format == 'dense')}"


def _companion_notes(checkpoint: Checkpoint) -> list[str]:
    """Which files do not go along, and why; and which weights go along unpacked."""
    reasons: dict[str, list[str]] = {}
    for name, why in checkpoint.left_behind.items():
        reasons.setdefault(why, []).append(name)
    notes = [f"not copied ({why}): {_listed(names)}" for why, names in reasons.items()]
    extra = [name for name in checkpoint.companions if _holds_weights(checkpoint, name)]
    return notes + ([f"copied as they are, not packed: {_listed(extra)}"] if extra else [])


def _config_notes(checkpoint: Checkpoint, selection: Selection, options: Options, scheme: Scheme) -> list[str]:
    """What of the source's config is lost, or what to check where a loader knows dense layers by their names alone."""
    if selection.source.kv_cache_scheme and (options.format != "dense" or not scheme.scaled):
        return ["kv_cache_scheme of the source's config.json is not carried over; its scale tensors are"]
    layers = [name for name in selection.left_dense if in_block(name) and f"{name}.weight" in checkpoint.tensors]
    if options.format != "dense" or not scheme.scaled or not layers or not is_renamed(checkpoint, selection.source):
        return []
    return [
        f"{shown(layers[0])} and {len(layers) - 1} other layers of blocks stay dense; loaders know them by name (`ignore` of"
        " config.json) and may rename this model's modules: compare its logits once"
    ]


def _ternary_notes(maker: Maker, modules: list[Module], run: Run) -> list[str]:
    """Of a BitNet model: in what share of groups weights that are not zero must go."""
    if not any(isinstance(file, BitnetFile) for file in maker.checkpoint.files):
        return []
    over, groups = maker.over(modules, run)
    pattern = maker.options.pattern
    lost = "weights go there, the others stay as they are" if over else "nothing is lost"
    return [f"{over:,} of {groups:,} groups ({over / max(1, groups):.1%}) have more than {pattern.nnz} non-zeros: {lost}"]


def _holds_weights(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a file that goes along is of weights, by its name or by its size; a tokenizer takes up to 40 MB."""
    assert checkpoint.root is not None
    return name.lower().endswith((".safetensors", *OTHER_WEIGHTS)) or (checkpoint.root / name).stat().st_size > 50_000_000


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names[:8])) + f" and {len(names) - 8} more" * (len(names) > 8)


def _settle_bad(checkpoint: Checkpoint, selection: Selection, options: Options, run: Run) -> dict[str, str]:
    """With `skip_bad`, leave modules dense that cannot be packed: name -> why. Fail where none is left.

    Raises:
        PatternError: nothing is left to pack, since all modules break the pattern. UnsupportedError: nothing is left otherwise.
    """
    skipped, broken = dict[str, str](), dict[str, str]()
    if options.skip_bad:
        broken = Maker(checkpoint, options).check_all(selection.modules, run)
        skipped = selection.bad | broken
        selection.drop(broken)
    for name in skipped:
        selection.left_dense.pop(name, None)
    if not selection.modules:
        if broken and len(broken) == len(skipped):
            raise PatternError(
                f"nothing to pack: all {len(broken)} modules break {options.pattern.described}, the first:"
                f" {next(iter(broken.values()))}; prune with --prune magnitude"
            )
        reasons = [*selection.bad.values(), *(f"{shown(name)}: {why}" for name, why in selection.left_dense.items())]
        reasons.sort(key=lambda reason: "fused by engines" not in reason)  # the one that a user may not expect
        together = "; name all that engines fuse, as in --targets '*[qkv]_proj'" if "fused by" in "".join(reasons[:1]) else ""
        raise UnsupportedError(
            "nothing to pack: no two-dimensional .weight tensor qualifies"
            + (f" ({'; '.join(reasons[:3])}{'; ...' * (len(reasons) > 3)}){together}" if reasons else "")
        )
    return skipped
