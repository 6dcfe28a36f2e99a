"""What a source says of itself, gathered from every place where tools write it, and what of that forbids packing.

    config.json          at any depth: quantization_config, compression_config, quantization (text_config, thinker_config ...)
    files beside it      hf_quant_config.json, quantize_config.json, quant_config.json, params.json, adapter_config.json
    metadata of files    _quantization_metadata ...
    tensor names         qweight, weight_scale_inv, lora_A, weight_packed ...

A statement that packing would lose or misread is refused with the name of what makes it. The rest of this package asks a
`Source` and never reads a config again.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import FormatError, UnsupportedError, shown
from ..model_folder import CONFIG, member, read_json
from . import kinds

STATEMENTS = (
    "quantization_config", "compression_config", "quantization", "quant_config", "quantize_config", "sparsity_config",
    "transform_config", "compression", "quantization_bit", "weight_bits", "w_bit", "load_in_8bit", "load_in_4bit",
)  # fmt: skip
"""Keys under which tools write how weights are stored."""
SIGNATURES = {
    "quant_method", "quant_algo", "config_groups", "load_in_8bit", "load_in_4bit", "w_bit", "qformat_weight", "quant_type",
    "bits", "wbits", "weight_bits", "group_size", "q_group_size", "zero_point", "kv_cache_quant_algo", "weight_block_size",
}  # fmt: skip
"""Keys that an object which describes a quantization has, whatever its own key is."""
SIDE_FILES = re.compile(r".*quant.*\.json|params\.json", re.IGNORECASE)
KNOWN_SIDE_FILES = re.compile(r"(hf_)?quant(ization|ize)?_config\.json", re.IGNORECASE)
ADAPTER_FILE = "adapter_config.json"

TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose layers (Conv1D) store w as [k, n]: packing would group the wrong axis."""

FOREIGN = (
    (re.compile(r"qweight|qzeros|g_idx|weight_g_idx"), "GPTQ or AWQ"),
    (re.compile(r"SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state.*|weight_format"), "bitsandbytes"),
    (re.compile(r"qscale_weight|qscale_act"), "Mistral's FP8"),
    (re.compile(r"scale_weight|scaled_fp8"), "scaled FP8"),
    (re.compile(r"pre_quant_scale|weight_scale_2|weight_quantizer|input_quantizer"), "ModelOpt"),
    (re.compile(r"compressed|bitmask|row_offsets"), "a sparse format of compressed-tensors"),
    (re.compile(r"weight_global_scale|input_global_scale"), "NVFP4"),
    (re.compile(r"W_q|qmap"), "HQQ"),
    (re.compile(r"Qidxs|SU|SV"), "QuIP#"),
    (re.compile(r"suh|svh|trellis"), "EXL3"),
    (re.compile(r"q_weight|q_scale_max|q_groups|q_perm|q_invperm"), "EXL2"),
    (re.compile(r"_?weight_qdata"), "torchao"),
    (re.compile(r"weight_scales|weight_blocks|.*_proj_blocks|.*_proj_scales"), "a block format such as MXFP4"),
    (re.compile(r"_data|_scale|_zeropoint|_shift"), "quanto"),
)  # fmt: skip
"""Last parts of tensor names -> the tool whose loader alone can read such weights."""
AMBIGUOUS = {"_data", "_scale"}
"""Of these, the ones that mean it only where they take the place of a module's weight."""
SCALES = re.compile(r"(?<!logit_)scale|zeros|zero_point|absmax|centroid|codebook")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
"""Types of quantized values; 64-bit integers are indices."""

TOKENS = re.compile(
    r"wte|shared|embed_in|embeddings?|embed|tok_emb|\w*(tok|token|word|vocab)s?_?embed\w*|embed_(tokens?|words?)\w*|tokens_embed"
)
"""Last parts of names of token embeddings, which have a row for every token."""

KNOWN_CONFIG = {
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "global_compression_ratio",
    "sparsity_config", "transform_config", "version", "packed_modules_mapping", "provider", "run_compressed", "dequantize",
}  # fmt: skip
KNOWN_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
KNOWN_WEIGHTS = {
    "num_bits", "type", "symmetric", "strategy", "dynamic", "group_size", "block_structure", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
WEIGHT_LOCATIONS = {"weight_input", "weight_output"}
"""Where a transform is merged into the weights; anywhere else it acts on activations."""


@dataclass(frozen=True)
class Source:
    """What a checkpoint says of itself.

    Attributes:
        model_types: where in config.json -> model type, for the model and those inside it.
        vocabularies: numbers of rows of embeddings and heads.
        quantized: whether some config says that weights are quantized (as compressed-tensors writes them).
        ignore: names (exact, or "re:" and a regular expression) that this config leaves unquantized.
        groups: its config groups, label -> group, checked by `_understood`.
        kv_cache_scheme: how engines store the KV cache, copied as it is; None if it says nothing.
        notes: what a user should know.
    """

    model_types: dict[str, str] = field(default_factory=dict)
    vocabularies: frozenset[int] = frozenset()
    quantized: bool = False
    ignore: tuple[str, ...] = ()
    groups: dict[str, Any] = field(default_factory=dict)
    kv_cache_scheme: Any = None
    notes: tuple[str, ...] = ()

    def ignores(self, module: str) -> str | None:
        """The entry of `ignore` that leaves a module unquantized."""
        exact, expressions = self._ignore
        return module if module in exact else next((text for text, regex in expressions if regex.match(module)), None)

    @cached_property
    def _ignore(self) -> tuple[set[str], list[tuple[str, re.Pattern[str]]]]:
        expressions = [(text, re.compile(text[3:])) for text in self.ignore if text.startswith("re:")]
        return set(self.ignore), expressions

    def group_of(self, module: str) -> Any:
        """The config group that describes a module: one that names it goes before one for all linear layers."""
        found = None
        for group in self.groups.values():
            for target in group.get("targets") or ["Linear"]:
                if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                    return group
                if target == "Linear":
                    found = found or group
        return found


def read_source(checkpoint: Checkpoint) -> Source:
    """Gather what a checkpoint says of itself.

    Raises:
        UnsupportedError: it says something that cannot be packed; the message names what said it.
        FormatError: a file beside the weights is broken.
    """
    shapes = {name: info.shape for name, (info, _) in checkpoint.tensors.items()}
    config: Mapping[str, Any] = checkpoint.config or {}
    _refuse_packed(shapes)
    _refuse_adapters(checkpoint, shapes)
    _refuse_ungathered(shapes)
    model_types = _model_types(config)
    for at, kind in model_types.items():
        if kind in TRANSPOSED:
            raise UnsupportedError(
                f"{CONFIG}: {_path(at, 'model_type')} {kind!r} stores Conv1D weights as [k, n], which packing cannot"
                " read; transpose them to [n, k], and pack them as one .safetensors file without this config"
            )
    statements = [(f"{CONFIG}: {at}", value) for at, value in _statements(config)]
    statements += [
        (f"__metadata__: {shown(key)}", value) for key, value in checkpoint.metadata.items() if "quant" in key.lower()
    ]
    for name, value in _side_files(checkpoint):
        if name != "params.json" and SIGNATURES & value.keys() and _describes(name, value):
            statements.append((name, value))
        else:
            statements += [(f"{name}: {at}", inner) for at, inner in _statements(value)]
    understood = [(where, _understood(where, value)) for where, value in statements]
    for where, value in understood[1:]:
        if value != understood[0][1]:
            raise UnsupportedError(
                f"{where} and {understood[0][0]} say different things of the quantization; remove the one that is not true"
            )
    _refuse_foreign(checkpoint)
    if (why := kinds.transposed(shapes)) is not None:
        raise UnsupportedError(f"{why}: weights stored as [k, n] cannot be packed along k; transpose them to [n, k] first")
    quantization = understood[0][1] if understood else {}
    notes = list(_missing_layers(config, shapes))
    if (quantization.get("transform_config") or {}).get("config_groups"):
        notes.append("transform_config of the source's config.json is not carried over: it is merged into the weights")
    return Source(
        model_types=model_types,
        vocabularies=frozenset(_vocabularies(config, shapes)),
        quantized=bool(quantization.get("config_groups")),
        ignore=tuple(str(name) for name in quantization.get("ignore") or ()),
        groups=dict(quantization.get("config_groups") or {}),
        kv_cache_scheme=quantization.get("kv_cache_scheme"),
        notes=tuple(notes),
    )


def read_packed_source(checkpoint: Checkpoint) -> Source:
    """What a packed checkpoint says of itself: the names that its config.json ignores, and its vocabularies."""
    config: Mapping[str, Any] = checkpoint.config or {}
    shapes = {name: info.shape for name, (info, _) in checkpoint.tensors.items()}
    quantization = config.get("quantization_config")
    ignore = quantization.get("ignore") if isinstance(quantization, Mapping) else None
    return Source(
        model_types=_model_types(config),
        vocabularies=frozenset(_vocabularies(config, shapes)),
        ignore=tuple(name for name in ignore if isinstance(name, str)) if isinstance(ignore, list) else (),
    )


def _model_types(config: Mapping[str, Any]) -> dict[str, str]:
    return {at: value["model_type"] for at, value in _objects(config) if isinstance(value.get("model_type"), str)}


def _missing_layers(config: Mapping[str, Any], shapes: kinds.Shapes) -> Iterator[str]:
    """A note where config.json has more layers than the weights."""
    told = [value["num_hidden_layers"] for _, value in _objects(config) if isinstance(value.get("num_hidden_layers"), int)]
    numbers: dict[str, set[int]] = {}
    for name in shapes:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if kinds.is_number(part)), 0)
        if at:
            numbers.setdefault(".".join(parts[:at]), set()).add(int(parts[at]))
    layers = max(numbers.values(), key=len, default=set())
    if layers and (gap := next((i for i in range(min(layers), max(layers)) if i not in layers), None)) is not None:
        yield f"the weights have layers {min(layers)} to {max(layers)}, but none of number {gap}: is the checkpoint whole?"
    if told and max(told) > len(layers):
        yield f"{CONFIG} says {max(told)} layers, the weights have {len(layers)}: is the checkpoint whole?"


def without_statements(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config.json in which nothing, at any depth, says how weights are stored."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items() if not (key in STATEMENTS and _describes(key, inner))}
        return value

    return {key: value for key, value in clean(config).items() if key != "slidesparse"}


# ---- where statements are --------------------------------------------------------------------------------------------


def _path(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _objects(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object of a config with its place, the config itself ("") first."""
    waiting: deque[tuple[str, Any]] = deque([("", config)])
    while waiting:
        at, value = waiting.popleft()
        if isinstance(value, Mapping):
            yield at, value
            waiting += [(_path(at, str(key)), inner) for key, inner in value.items() if isinstance(inner, (Mapping, list))]
        elif isinstance(value, list):
            waiting += [(f"{at}[{i}]", inner) for i, inner in enumerate(value) if isinstance(inner, Mapping)]


NOTHING: tuple[Any, ...] = (None, False, {}, [], "")
"""Values that say nothing."""


def _describes(key: str, value: Any) -> bool:
    """Whether an entry of a config says something of how weights are stored; "quantization" may be a part of a model, too."""
    if isinstance(value, Mapping):
        if all(inner in NOTHING for inner in value.values()):
            return False
        return key not in ("quantization", "compression") or bool(SIGNATURES & value.keys())
    return value not in NOTHING


def _statements(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every statement in a config with its place; not those inside another."""
    inside: list[str] = []
    for at, value in _objects(config):
        if any(at == place or at.startswith(f"{place}.") for place in inside):
            continue
        for key, inner in value.items():
            signed = isinstance(inner, Mapping) and {"quant_method", "quant_algo", "config_groups"} & inner.keys()
            if (key in STATEMENTS or signed) and _describes(str(key), inner):
                inside.append(_path(at, str(key)))
                yield inside[-1], inner


def _side_files(checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The files beside config.json that say how weights are stored."""
    root = checkpoint.root
    for name in sorted(path.name for path in root.iterdir()) if root is not None else ():
        if not SIDE_FILES.fullmatch(name) or name.startswith(".") or root is None:
            continue
        try:
            yield name, read_json(member(root, name), strict=False)
        except FormatError:
            if KNOWN_SIDE_FILES.fullmatch(name):
                raise  # another is a log, or a part of the model


def _vocabularies(config: Mapping[str, Any], shapes: kinds.Shapes) -> Iterator[int]:
    """Numbers of rows that embeddings and heads have: as configs say, and as the embeddings are."""
    for _, value in _objects(config):
        for key, size in value.items():
            if isinstance(size, int) and not isinstance(size, bool):
                if "vocab" in str(key) and size >= kinds.SMALLEST_VOCABULARY:
                    yield size
                vocabulary = value.get("vocab_size")
                if key == "embedding_size" and isinstance(vocabulary, int) and 0 <= size - vocabulary < 1024:
                    yield size  # with its padding; elsewhere it is the embedding's width
    for name, shape in shapes.items():
        parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
        if len(shape) == 2 and shape[0] >= 1000 and parts and TOKENS.fullmatch(parts[-1]):
            yield shape[0]


# ---- what is refused -------------------------------------------------------------------------------------------------


def _refuse_packed(shapes: kinds.Shapes) -> None:
    """Refuse a checkpoint that is packed already, by this tool or another."""
    packed = any(name.endswith(".weight_packed") for name in shapes)
    stray = next((name for name in shapes if name.endswith((".weight_meta", ".weight_shape"))), None)
    if packed and stray is not None and any(name.endswith(".weight_meta") for name in shapes):
        raise UnsupportedError("this checkpoint is packed already; `slidesparse show --unpack OUT` writes it back dense")
    if packed:
        raise UnsupportedError("this checkpoint holds another tool's packed weights; start from the unquantized model")
    if stray is not None:
        raise UnsupportedError(
            f"{shown(stray)}: a packed checkpoint could not be told from one of another tool; rename this tensor"
        )


def _refuse_adapters(checkpoint: Checkpoint, shapes: kinds.Shapes) -> None:
    """Refuse an adapter in place of a model, and one that loaders would add to it."""
    if checkpoint.root is not None and (checkpoint.root / ADAPTER_FILE).exists():
        what = (
            "the folder holds an adapter and no model"
            if checkpoint.config is None
            else "loaders add its adapter to the weights"
        )
        raise UnsupportedError(
            f"{ADAPTER_FILE}: {what}; merge the adapter into the model first (in peft: merge_and_unload), and pack that, or"
            " take the adapter's files out of the folder to pack the model alone"
        )
    weights = [name for name in shapes if len(shapes[name]) >= 2]
    if weights and all(kinds.is_adapter(name) for name in weights):
        raise UnsupportedError(
            f"{shown(weights[0])}: the checkpoint is an adapter and no model; merge it into its model first (in peft:"
            " merge_and_unload), and pack that"
        )


def _refuse_ungathered(shapes: kinds.Shapes) -> None:
    """Refuse a checkpoint whose weights were left on other processes: their places are empty."""
    empty = next((name for name, shape in shapes.items() if shape == (0,) and name.endswith(".weight")), None)
    if empty is not None:
        raise UnsupportedError(
            f"{shown(empty)}: is empty ([0]), as a trainer (ZeRO-3) leaves weights that it did not gather; gather and save"
            " again"
        )


def _refuse_foreign(checkpoint: Checkpoint) -> None:
    """Refuse weights that only another tool's loader can read."""
    shapes = {name: info.shape for name, (info, _) in checkpoint.tensors.items()}
    scales: dict[str, str] = {}
    for name in shapes:
        parent, _, last = name.rpartition(".")
        if SCALES.search(last):
            scales.setdefault(parent, last)
    for name, (info, _) in checkpoint.tensors.items():
        parent, _, last = name.rpartition(".")
        tools = _tools(last) + (_tools("quant_state") if parent.endswith(".quant_state") else ())
        if last in AMBIGUOUS and not _in_place_of_weight(name, last, shapes):
            tools = ()
        integers = last != "weight" and not SCALES.search(last) and info.code in INTEGERS and len(info.shape) >= 2
        if not tools and integers and parent in scales:
            tools = (f"a tool that stores integers beside {shown(scales[parent])}",)
        if tools:
            raise UnsupportedError(
                f"{shown(name)}: {info.code} {list(info.shape)} is written by {tools[0]}, which packing cannot read; start from"
                " a checkpoint with plain weights"
            )


@lru_cache(maxsize=1 << 12)
def _tools(last: str) -> tuple[str, ...]:
    """The tools that write tensors with this last part of a name."""
    return tuple(tool for pattern, tool in FOREIGN if pattern.fullmatch(last))


def _in_place_of_weight(name: str, hit: str, shapes: kinds.Shapes) -> bool:
    """Whether a tensor with an ambiguous last part takes the place of a matrix: X.weight_v without X.weight."""
    head = name[: name.rindex(hit)].rstrip(".")
    module = head.removesuffix(".weight").removesuffix(".parametrizations")
    return len(shapes[name]) == 2 and min(shapes[name]) > 1 and f"{module}.weight" not in shapes


def _understood(where: str, quantization: Any) -> dict[str, Any]:
    """A statement, once it is known to be of a kind that packing keeps: compressed-tensors' symmetric 8-bit weights.

    Raises:
        UnsupportedError: it is anything else.
    """
    if not isinstance(quantization, Mapping):
        raise UnsupportedError(f"{where} is {shown(quantization)}, not an object")
    method = quantization.get("quant_method", quantization.get("quant_algo"))
    if method != "compressed-tensors":
        said = "says" if method is None else f"says method {shown(method)}, which is not supported"
        raise UnsupportedError(
            f"{where} {said} {shown(dict(quantization)) if method is None else ''}".rstrip()
            + "; only compressed-tensors FP8 and INT8 W8A8 checkpoints, or unquantized ones, can be packed"
        )
    _known(where, quantization, KNOWN_CONFIG)
    sparsity = quantization.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"{where}.sparsity_config says {shown(sparsity)}; decompress the weights first")
    _refuse_transform(f"{where}.transform_config", quantization.get("transform_config") or {})
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise UnsupportedError(f"{where}.config_groups is {shown(groups)}, not an object")
    for label, group in groups.items():
        _refuse_group(f"{where}.config_groups.{label}" if len(label) < 100 else f"{where}.config_groups", group)
    ignore = quantization.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise UnsupportedError(f"{where}.ignore is {shown(ignore)}, must be a list of names")
    for name in ignore:
        _regular(f"{where}.ignore", name)
    return dict(quantization)


def _regular(where: str, name: str) -> None:
    try:
        re.compile(name[3:] if name.startswith("re:") else "")
    except re.error as error:
        raise UnsupportedError(f"{where}: {shown(name)} is no regular expression ({error})") from None


def _known(where: str, value: Mapping[str, Any], known: set[str]) -> None:
    """Refuse an entry that this program does not know, unless it says nothing."""
    for key, inner in value.items():
        if key not in known and inner not in NOTHING:
            raise UnsupportedError(
                f"{where} has {shown(key)}: {shown(inner)}, which packing might lose; remove it if it says nothing"
            )


def _refuse_transform(where: str, transform: Any) -> None:
    """Refuse transforms that act on activations: the packed weights alone would not compute the layer."""
    groups = transform.get("config_groups", {}) if isinstance(transform, Mapping) else None
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise UnsupportedError(f"{where} is {shown(transform)}; only transforms that are merged into the weights can be packed")
    for label, group in groups.items():
        applied = group.get("apply") or [{}]
        for use in applied if isinstance(applied, list) else [{}]:
            location = use.get("location") if isinstance(use, Mapping) else None
            if location not in WEIGHT_LOCATIONS:
                raise UnsupportedError(
                    f"{where}.config_groups.{label} acts on activations at run time (location {shown(location)}), which packed"
                    " weights do not; start from a model without online rotations"
                )


def _refuse_group(where: str, group: Any) -> None:
    """One config group must be symmetric 8-bit weights, per channel or tensor, with 8-bit activations."""
    group = group if isinstance(group, Mapping) else {}
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs or {}, Mapping):
        raise UnsupportedError(f"{where}: weights and input_activations must be objects")
    _known(where, group, KNOWN_GROUP)
    targets = group.get("targets")
    if targets is not None and (not isinstance(targets, list) or not all(isinstance(name, str) for name in targets)):
        raise UnsupportedError(f"{where}: targets is {shown(targets)}, must be a list of names")
    for name in targets or ():
        _regular(f"{where}.targets", name)
    if group.get("output_activations"):
        raise UnsupportedError(f"{where}: output_activations are quantized, which packed weights do not; leave them out")
    facts = {"num_bits": (8,), "type": ("int", "float"), "strategy": ("channel", "tensor"), "symmetric": (True,)}
    for key, allowed in facts.items():
        if weights.get(key, allowed[0]) not in allowed:
            raise UnsupportedError(
                f"{where} (of {shown(targets)}): weights.{key} = {shown(weights[key])}; only"
                f" {' or '.join(map(repr, allowed))} can be packed"
            )
    if not weights and (inputs or targets):
        raise UnsupportedError(f"{where}: quantizes something else than weights ({shown(targets)}), which packing would lose")
    if not inputs:
        raise UnsupportedError(
            f"{where}: weight-only quantization is not supported; 8-bit packed weights run with 8-bit activations"
        )
    if inputs.get("num_bits", 8) != 8 or inputs.get("symmetric", True) is not True:
        raise UnsupportedError(f"{where}: input_activations must be symmetric 8-bit, to run as per-token quantization")
    if inputs.get("type", weights.get("type")) != weights.get("type", inputs.get("type")):
        raise UnsupportedError(
            f"{where}: input_activations of type {shown(inputs['type'])} beside weights of type {shown(weights.get('type'))};"
            " the two must agree"
        )
    if inputs.get("strategy", "token") not in ("token", "tensor"):
        raise UnsupportedError(
            f"{where}: input_activations.strategy = {shown(inputs['strategy'])}; only 'token' or 'tensor' can be run per token"
        )
    for name, value in (("weights", weights), ("input_activations", inputs)):
        _known(f"{where}.{name}", value, KNOWN_WEIGHTS)
