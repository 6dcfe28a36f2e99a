"""Which tensors of a checkpoint are linear layers to be packed, of what type, and why the others are not.

The decisions are names, types and shapes; no weight is read. Parts that serving engines fuse into one matrix (q/k/v, gate/up)
are decided together: all are packed or none. Every tensor of two or more dimensions is packed, left dense or bad.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..checkpoint import Checkpoint
from ..checkpoint.safetensors import TensorInfo
from ..checkpoint.stacked import Stacked
from ..core import dtypes
from ..core.pattern import Pattern
from ..core.scheme import Scheme
from ..errors import OperandError, UnsupportedError, VerificationError, shown
from . import kinds
from .module import Module
from .sources import Source, read_source

SOURCE_CODES = ("F32", "F16", "BF16", "F8_E4M3", "I8")
QUANTIZED_CODES = ("F8_E4M3", "I8")
FLOAT_CODES = ("F32", "F16", "BF16", "F64")

PARTS = {"weight", "bias", "k_scale", "v_scale", "q_scale", "output_scale"}
"""Tensors X.* of a linear layer X that packing leaves as they are, beside its weight; the last four belong to a KV cache."""
APART = " (the tensor)"
"""After the name of a tensor X in a selection where X.weight, a module's, is beside it."""
QUANTIZED_PARTS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
"""Tensors of an 8-bit layer that packing replaces."""


@dataclass
class Selection:
    """What to pack, and for every other matrix the reason why not; names are modules X of `X.weight`, or whole tensor names.

    Attributes:
        modules: to be packed.
        left_dense: copied as they are by choice, and why.
        bad: those that ought to be packed but cannot be, and why: an error, or skipped if the user says so.
        notes: what a user should know.
        source: what the checkpoint says of itself.
    """

    modules: list[Module] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source: Source = field(default_factory=Source)

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Leave more modules dense, name -> why, and with them the modules that an engine fuses with them."""
        self.left_dense.update(reasons)
        self.keep_fused_together()

    def keep_fused_together(self) -> None:
        """Leave modules dense that engines fuse with one that is not packed."""
        apart = {key: name for name in (*self.left_dense, *self.bad) if (key := kinds.fused_key(name)) is not None}
        for module in self.modules:
            if (sibling := apart.get(kinds.fused_key(module.name) or "")) is not None:
                self.left_dense.setdefault(module.name, f"fused by engines with {shown(sibling)}, which stays dense")
        self.modules = [m for m in self.modules if m.name not in self.left_dense]


Matcher = Callable[[str], "str | None"]
"""From a module's name to the pattern that it matches."""


def matcher(patterns: Iterable[str], option: str, names: Iterable[str]) -> tuple[Matcher, list[str]]:
    """A function from a module's name to the first of `patterns` (exact, glob, or "re:" regular expression) that it matches.

    Returns:
        That function, and the patterns that match none of `names`.

    Raises:
        OperandError: a pattern is no regular expression.
    """
    exact: dict[str, str] = {}
    shapes: list[tuple[str, re.Pattern[str]]] = []
    for text in patterns:
        try:
            if text.startswith("re:"):
                shapes.append((text, re.compile(text[3:])))
                continue
        except re.error as error:
            raise OperandError(f"{option}: {text!r} is not a regular expression ({error})") from None
        name = text.removesuffix(".weight")
        exact.setdefault(name, text)
        if any(c in name for c in "*?["):
            shapes.append((text, re.compile(fnmatch.translate(name))))

    def match(name: str) -> str | None:
        return exact.get(name) or next((text for text, regex in shapes if regex.match(name)), None)

    names = set(names)
    found = {text for name, text in exact.items() if name in names}
    found |= {text for text, regex in shapes if any(regex.match(name) for name in names)}
    return match, [text for text in dict.fromkeys([*exact.values(), *(text for text, _ in shapes)]) if text not in found]


def select(
    checkpoint: Checkpoint,
    *,
    pattern: Pattern | None = None,
    scheme: str = "auto",
    targets: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
) -> Selection:
    """Decide what to pack.

    Args:
        pattern: to leave out weights that are narrower than one of its groups.
        scheme: "auto" (the source's type; float32 becomes bfloat16) or the name of a packed type.
        targets: pack only modules that match one of these; a module named exactly is packed whatever its kind.
        ignore: pack no module that matches one of these.

    Raises:
        OperandError: an unknown scheme, or a target that matches nothing.
        UnsupportedError: the checkpoint as a whole is of a kind that cannot be packed.
    """
    source = read_source(checkpoint)
    selection = Selection(notes=list(source.notes), source=source)
    tensors = {name: info for name, (info, _) in checkpoint.tensors.items()}
    shapes = checkpoint.shapes
    candidates = {name[:-7]: info for name, info in tensors.items() if name.endswith(".weight") and len(info.shape) == 2}
    stacks = {name.removesuffix(".weight") for name, info in tensors.items() if _is_stack(name, info, shapes, candidates)}
    roles = {name: kinds.not_linear(name, info.shape, source.vocabularies) for name, info in candidates.items()}
    targeted, astray = matcher(targets, "targets", [*candidates, *stacks])
    if astray:
        raise _no_target(astray[0], roles)
    ignored, unmet = matcher(ignore, "ignore", [*candidates, *stacks, *(name for name in tensors if len(shapes[name]) > 2)])
    selection.notes += [_unmatched(text, candidates) for text in unmet]
    wanted: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if module not in candidates or name == module:
            called = name if name not in candidates else name + APART
            if (by := ignored(name) or ignored(module)) is not None and _is_matrix(info):
                selection.left_dense[called] = f"ignored by {shown(by)}"
            elif module in stacks and {module, f"{module}.weight"} <= shapes.keys():
                selection.bad[called] = f"{shown(name)}: stacked experts beside another weight of that name; rename one of them"
            elif module in stacks:
                _stack(selection, info, scheme, pattern, "" if not targets or targeted(module) else "not among the targets")
            elif _is_matrix(info):
                selection.left_dense[called] = (
                    "not named .weight" if len(info.shape) == 2 else f"of {len(info.shape)} dimensions"
                )
        elif (by := ignored(module)) is not None:
            selection.left_dense[module] = f"ignored by {shown(by)}"
        elif targets and targeted(module) is None:
            selection.left_dense[module] = "not among the targets"
        elif roles[module] == "an embedding" or (roles[module] is not None and not {module, name} & {*targets}):
            selection.left_dense[module] = roles[module] or ""
        elif pattern is not None and info.shape[1] < pattern.group:
            selection.left_dense[module] = f"narrower than a group of {pattern}"
        else:
            wanted[module] = info
    _refuse_unmerged(tensors, ignored)
    _take(selection, wanted, checkpoint, scheme)
    before = len(selection.left_dense)
    selection.keep_fused_together()
    if (dragged := len(selection.left_dense) - before) and selection.modules:
        selection.notes.append(f"{dragged} layers stay dense because engines fuse them with one that does (-v lists them)")
    _one_type(selection)
    return selection


def _no_target(text: str, roles: Mapping[str, str | None]) -> OperandError:
    """The error to raise for a target that matches nothing."""
    example = next((name for name, role in roles.items() if role is None), "layers.0.mlp.up_proj")
    return OperandError(
        f"targets: {shown(text)} matches no two-dimensional weight; names look like {shown(example)} (exact, a glob"
        " such as '*_proj', or 're:...'; they are names of modules, not of classes)"
    )


def _unmatched(text: str, candidates: Collection[str]) -> str:
    """What to note of an entry of `ignore` that matches nothing; OperandError for the name of what would be a linear layer."""
    name = text.removesuffix(".weight")
    if not any(c in text for c in "*?[") and not text.startswith("re:") and kinds.not_linear(name, ()) is None:
        ends = {candidate.rpartition(".")[2]: candidate for candidate in reversed([*candidates])}
        close = difflib.get_close_matches(name.rpartition(".")[2], ends, 1)
        raise OperandError(
            f"ignore: {shown(text)} is the name of no matrix here{f', but {shown(ends[close[0]])} is' if close else ''};"
            " give a whole name, a glob such as '*q_proj', or 're:...'"
        )
    return f"--ignore {shown(text)} matches nothing here"


def _take(selection: Selection, wanted: Mapping[str, TensorInfo], checkpoint: Checkpoint, scheme: str) -> None:
    """Append the linear layers among modules that the user wants, or say why not."""
    source, tensors, shapes = selection.source, checkpoint.tensors, checkpoint.shapes
    eight = {name for name, info in wanted.items() if info.code in QUANTIZED_CODES and f"{name}.weight_scale" in tensors}
    quantized = source.quantized or 2 * len(eight) > len(wanted)
    children = _children(tensors, wanted)
    for module, info in wanted.items():
        if quantized and info.code in FLOAT_CODES and f"{module}.weight_scale" not in tensors:
            selection.left_dense[module] = f"not quantized in the source ({info.code})"
        elif module in eight and not quantized:
            selection.bad[module] = (
                f"{shown(info.name)}: is {info.code} with a scale among unquantized weights, and no config says so; dequantize"
                " it"
            )
        elif (entry := source.ignores(module)) is not None and info.code in QUANTIZED_CODES:
            selection.bad[module] = (
                f"{shown(info.name)}: is {info.code}, but the source's config ignores it ({shown(entry)}), so loaders would"
                " read it without its scale; mend that config"
            )
        elif (why := _misfit(module, info, children.get(module, []), shapes)) is not None:
            selection.bad[module] = why
        else:
            _add(selection, module, info, checkpoint, scheme)


def _is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor that is no `X.weight` of two dimensions is to be accounted for by name."""
    return len(info.shape) > 2 or (len(info.shape) == 2 and info.name.rpartition(".")[2] not in QUANTIZED_PARTS)


def _is_stack(name: str, info: TensorInfo, shapes: kinds.Shapes, candidates: Collection[str]) -> bool:
    """Whether a tensor holds the experts of a layer."""
    single = len(info.shape) == 2 and name.endswith(".weight") and name[:-7] in candidates
    readable = info.code in (*SOURCE_CODES, "F64") and _is_matrix(info)
    return not single and readable and kinds.stacked(name, info.shape, shapes)


def _stack(selection: Selection, info: TensorInfo, scheme: str, pattern: Pattern | None, left: str) -> None:
    """Append the experts of a layer, or say why not; `left`: why they stay dense by choice."""
    name, source = info.name.removesuffix(".weight"), selection.source
    if left or (source.quantized and info.code in FLOAT_CODES):
        selection.left_dense[info.name] = left or f"not quantized in the source ({info.code})"
        return
    if info.code not in FLOAT_CODES or info.code == "F64":
        selection.bad[info.name] = (
            f"{shown(info.name)}: stacked experts {list(info.shape)} of type {info.code} cannot be packed; convert them to one"
            " of F32, F16, BF16"
        )
        return
    packed_as = _stored_scheme(info.code, scheme)
    found = source.experts.of(info.name, info.shape, info.code, packed_as)
    if isinstance(found, str):
        selection.bad[info.name] = f"{shown(info.name)}: {found}"
    elif pattern is not None and found[1][-1] < pattern.group:
        selection.left_dense[info.name] = f"narrower than a group of {pattern}"
    else:
        selection.modules.append(Module(name, found[1], info.code, packed_as, None, (info.name,), found[0]))


def tensor_of(checkpoint: Checkpoint, name: str) -> str:
    """The tensor behind a name of a selection: a module's weight, or the tensor of that name."""
    tensors = checkpoint.tensors
    matrices = (each for each in (f"{name}.weight", name) if each in tensors and len(tensors[each][0].shape) >= 2)
    return next(matrices, name.removesuffix(APART))


def _refuse_unmerged(tensors: dict[str, TensorInfo], ignored: Matcher) -> None:
    """Refuse adapters beside the weights that they change, unless the user ignores them by name."""
    for name, info in tensors.items():
        if kinds.is_adapter(name) and ignored(name.removesuffix(".weight")) is None and len(info.shape) >= 2:
            raise UnsupportedError(
                f"{shown(name)}: an adapter that is not merged into the weights beside it; merge it first (in peft:"
                " merge_and_unload), or keep it dense with --ignore '*lora*'"
            )


def _children(tensors: Iterable[str], modules: Iterable[str]) -> dict[str, list[str]]:
    """Of every module X, the tensors whose names begin with X and a dot."""
    found: dict[str, list[str]] = {name: [] for name in modules}
    for name in tensors:
        at = name.rfind(".")
        while at > 0:
            if (parent := name[:at]) in found:
                found[parent].append(name)
            at = name.rfind(".", 0, at)
    return found


def _misfit(module: str, info: TensorInfo, children: list[str], shapes: kinds.Shapes) -> str | None:
    """Why a module is no plain linear layer: it has other tensors, or a bias that does not fit."""
    if info.code not in SOURCE_CODES:
        return f"{shown(info.name)}: {info.code} weights cannot be packed; convert them to one of {', '.join(SOURCE_CODES)}"
    known = PARTS | ({*QUANTIZED_PARTS, "weight_scale_inv"} if info.code in QUANTIZED_CODES else set())
    for name in children:
        part = name[len(module) + 1 :]
        if part == "weight_scale" and info.code not in QUANTIZED_CODES:
            return (
                f"{shown(name)}: a scale beside {info.code} values (a quantization that was calibrated and not applied); finish"
                " it, or remove the scale"
            )
        if part not in known:
            return f"{shown(name)}: belongs to the layer of {shown(info.name)}, and packing does not know what it does there"
    bias = shapes.get(f"{module}.bias")
    if bias is not None and bias != info.shape[:1]:
        return (
            f"{shown(f'{module}.bias')}: {list(bias)} does not fit {shown(info.name)} {list(info.shape)}, one value an output"
        )
    return None


def _add(selection: Selection, name: str, info: TensorInfo, checkpoint: Checkpoint, scheme: str) -> None:
    """Append one module, or say in `selection.bad` why it cannot be packed."""
    tensors, code = checkpoint.tensors, info.code
    shape = (info.shape[0], info.shape[1])
    packed_as = _stored_scheme(code, scheme)
    parts = QUANTIZED_PARTS if code in QUANTIZED_CODES else ()
    companions = tuple(f"{name}.{part}" for part in parts if f"{name}.{part}" in tensors)
    scale = None
    if code in QUANTIZED_CODES:
        scale = f"{name}.weight_scale"
        if (why := scale_problem(checkpoint, name, info)) is not None:
            selection.bad[name] = why
            return
        if packed_as.dtype is not (source := _stored_scheme(code, "auto").dtype):
            raise UnsupportedError(
                f"{shown(info.name)}: already quantized to {source}; it cannot become {packed_as}: use --scheme auto, or start"
                " from the unquantized model"
            )
    selection.modules.append(Module(name, shape, code, packed_as, scale, (info.name, *companions)))


def _stored_scheme(code: str, scheme: str) -> Scheme:
    """The scheme that weights of a source type are packed in."""
    if scheme != "auto":
        return Scheme.of(scheme)
    return Scheme.of(dtypes.BFLOAT16 if code == "F32" else next(t for t in dtypes.PACKED if t.safetensors == code))


def scale_problem(checkpoint: Checkpoint, name: str, info: TensorInfo) -> str | None:
    """Why the scales of an 8-bit module [n, k] are not one a row or one for all; None if they are."""
    tensors, rows, scale = checkpoint.tensors, info.shape[0], f"{name}.weight_scale"
    if f"{name}.weight_scale_inv" in tensors:
        return f"{shown(f'{name}.weight_scale_inv')}: block-wise scales are not supported; requantize per channel"
    if scale not in tensors:
        return f"{shown(info.name)}: {info.code} values without {shown(scale)}; only scales per channel or tensor can be packed"
    found = tensors[scale][0]
    if found.code not in (floats := ("F32", "F16", "BF16")):
        return f"{shown(scale)}: {found.code} must be of {', '.join(floats)}; requantize per channel"
    if found.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        return (
            f"{shown(scale)}: {found.code} {list(found.shape)} is neither per channel [{rows}, 1] nor per tensor [1];"
            " requantize per channel"
        )
    zero = f"{name}.weight_zero_point"
    if zero in tensors and checkpoint.array(zero).any():
        return f"{shown(zero)}: a zero point other than 0 cannot be packed; requantize symmetrically"
    return None


def named(checkpoint: Checkpoint, stored: Mapping[str, Scheme], stacked: Mapping[str, Stacked]) -> dict[str, Module]:
    """Modules by their exact names, whatever their role and their siblings, with the schemes they are stored in.

    Args:
        stored: by module. stacked: what the packed checkpoint says of the dense tensors of those that are experts.

    Raises:
        VerificationError: the weight of that name could not have been packed into that type.
        UnsupportedError: the checkpoint as a whole is of a kind that cannot be packed.
    """
    selection = Selection(source=read_source(checkpoint))
    for name, scheme in stored.items():
        if name in stacked:
            info = checkpoint.tensors[stacked[name].tensor][0]
            _stack(selection, info, scheme.name, None, "")
            if not selection.modules or selection.modules[-1].stacked != stacked[name]:
                reason = selection.bad.get(info.name) or f"{info.name}: the source's model type stores its experts otherwise"
                raise VerificationError(f"{reason} (it could not have been packed as {stacked[name].axes!r})")
            selection.modules[-1] = replace(selection.modules[-1], name=name)
            continue
        info = checkpoint.tensors[f"{name}.weight"][0]
        if info.code not in SOURCE_CODES or (info.code in QUANTIZED_CODES and info.code != scheme.dtype.safetensors):
            raise VerificationError(f"{name}.weight: {info.code} weights of the source could not have been packed as {scheme}")
        _add(selection, name, info, checkpoint, "auto" if info.code in QUANTIZED_CODES else scheme.name)
        if why := selection.bad.get(name):
            raise VerificationError(f"{why} (the source's weight of that name could not have been packed)")
    return {module.name: module for module in selection.modules}


def _one_type(selection: Selection) -> None:
    """All packed modules of a checkpoint share one type; say what fp32 became."""
    types = {str(m.scheme) for m in selection.modules}
    if len(types) > 1:
        raise UnsupportedError(
            f"weights of several types ({', '.join(sorted(types))}) in one checkpoint; choose one with --scheme"
        )
    if any(m.code == "F32" and m.scheme.dtype is dtypes.BFLOAT16 for m in selection.modules):
        selection.notes.append("float32 weights are stored as bfloat16 (8 bits of precision); --scheme FP16 keeps 11")
    static = any((group.get("input_activations") or {}).get("dynamic") is False for group in selection.source.groups.values())
    if static or any(part.endswith(".input_scale") for m in selection.modules for part in m.replaced):
        selection.notes.append(
            "static activation scales (input_scale) are dropped: activations are quantized per token at run time"
        )
