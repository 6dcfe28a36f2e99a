"""What a source says of itself, gathered from every place where tools write it, and what of that forbids packing.

    config.json          at any depth: quantization_config, compression_config, quantization (text_config, thinker_config ...)
    files beside it      hf_quant_config.json, quantize_config.json, quant_config.json, params.json, adapter_config.json
    metadata of files    _quantization_metadata ...
    tensor names         qweight, weight_scale_inv, lora_A, weight_packed ... (foreign.py)

A statement that packing would lose or misread is refused with the name of what makes it. The rest of this package asks a
`Source` and never reads a config again.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.hf_folder import CONFIG, member, read_json
from ..checkpoint.packed_config import names_problem
from ..checkpoint.safetensors import open_regular
from ..errors import FormatError, UnsupportedError, shown
from . import kinds
from .bitnet import read_bitnet
from .experts import Experts
from .foreign import refuse_foreign, refuse_no_dense_model
from .quantization import NOTHING, understood

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
RECIPE = "recipe.yaml"
"""Where llm-compressor writes what it did."""
MASKS = {"mask_structure", "sparsity_structure"}
"""Keys of a pattern, zeros:total."""

TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose layers (Conv1D) store w as [k, n]: packing would group the wrong axis."""

TOKENS = re.compile(
    r"wte|shared|embed_in|embeddings?|embed|tok_emb|\w*(tok|token|word|vocab)s?_?embed\w*|embed_(tokens?|words?)\w*|tokens_embed"
)
"""Last parts of names of token embeddings, which have a row for every token."""


@dataclass(frozen=True)
class Source:
    """What a checkpoint says of itself.

    Attributes:
        model_types: where in config.json -> model type, for the model and those inside it.
        vocabularies: numbers of rows of embeddings and heads.
        quantized: whether some config says that weights are quantized (as compressed-tensors writes them).
        ignore: names (exact, or "re:" and a regular expression) that this config leaves unquantized.
        groups: its config groups, label -> group, checked by `quantization.understood`.
        experts: how its model type stores stacked experts.
        kv_cache_scheme: how engines store the KV cache, copied as it is; None if it says nothing.
        notes: what a user should know.
    """

    model_types: dict[str, str] = field(default_factory=dict)
    vocabularies: frozenset[int] = frozenset()
    quantized: bool = False
    ignore: tuple[str, ...] = ()
    groups: dict[str, Any] = field(default_factory=dict)
    experts: Experts = field(default_factory=Experts)
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
    shapes = checkpoint.shapes
    config: Mapping[str, Any] = checkpoint.config or {}
    refuse_no_dense_model(checkpoint)
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
    accepted = [(where, understood(where, value)) for where, value in statements]
    for where, value in accepted[1:]:
        if value != accepted[0][1]:
            raise UnsupportedError(
                f"{where} and {accepted[0][0]} say different things of the quantization; remove the one that is not true"
            )
    refuse_foreign(checkpoint)
    if (why := kinds.transposed(shapes)) is not None:
        raise UnsupportedError(f"{why}: weights stored as [k, n] cannot be packed along k; transpose them to [n, k] first")
    quantization = accepted[0][1] if accepted else {}
    notes = [*checkpoint.notes, *_missing_layers(config, shapes), *_pruned_elsewhere(checkpoint, config)]
    if (quantization.get("transform_config") or {}).get("config_groups"):
        notes.append("transform_config of the source's config.json is not carried over: it is merged into the weights")
    return Source(
        model_types=model_types,
        vocabularies=frozenset(_vocabularies(config, shapes)),
        quantized=bool(quantization.get("config_groups")),
        ignore=tuple(str(name) for name in quantization.get("ignore") or ()),
        groups=dict(quantization.get("config_groups") or {}),
        experts=Experts.read(dict(_objects(config))),
        kv_cache_scheme=quantization.get("kv_cache_scheme"),
        notes=tuple(notes),
    )


def open_source(path: Any) -> Checkpoint:
    """A checkpoint that is to be packed, of any format that is read: safetensors, GGUF, BitNet.

    Raises:
        As `Checkpoint.open` and `bitnet.read_bitnet`.
    """
    checkpoint = Checkpoint.open(path)
    return read_bitnet(checkpoint, frozenset(_vocabularies(checkpoint.config or {}, checkpoint.shapes)))


def read_packed_source(checkpoint: Checkpoint) -> Source:
    """What a packed checkpoint says of itself: the names that its config.json ignores, and its vocabularies.

    Raises:
        UnsupportedError: one of these names is no regular expression.
    """
    config: Mapping[str, Any] = checkpoint.config or {}
    quantization = config.get("quantization_config")
    ignore = quantization.get("ignore") if isinstance(quantization, Mapping) else None
    names = tuple(name for name in ignore if isinstance(name, str)) if isinstance(ignore, list) else ()
    if problem := names_problem("ignore", names):
        raise UnsupportedError(f"{CONFIG}: quantization_config.{problem}")
    return Source(
        model_types=_model_types(config),
        vocabularies=frozenset(_vocabularies(config, checkpoint.shapes)),
        ignore=names,
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


def _pruned_elsewhere(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    """A note on every pattern that llm-compressor states, since it counts zeros: its 2:8 is 6:8 here, its 2:4 the same."""
    found = [(f"{CONFIG}: {_path(at, key)}", str(value[key])) for at, value in _objects(config) for key in MASKS & value.keys()]
    if checkpoint.root is not None and (checkpoint.root / RECIPE).is_file():
        with open(open_regular(member(checkpoint.root, RECIPE)), encoding="utf-8", errors="replace") as file:
            found += [
                (f"{RECIPE}: mask_structure", text) for text in re.findall(r"mask_structure\W+(\d+:\d+)", file.read(1 << 20))
            ]
    for where, text in dict.fromkeys(found):
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        if match and 0 < int(match[1]) < int(match[2]) != 2 * int(match[1]):
            zeros, group = int(match[1]), int(match[2])
            yield f"{where} {text!r} counts zeros, as llm-compressor does: {zeros} in {group}, {group - zeros}:{group} here"


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
        count, rows = value.get("num_codebooks"), value.get("codebook_size")
        if type(count) is type(rows) is int and count * rows >= kinds.SMALLEST_VOCABULARY:
            yield count * rows  # codes of all codebooks in one table
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
