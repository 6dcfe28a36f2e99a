"""A .gguf file of the llama, qwen2 or qwen3 architecture, read as the Hugging Face checkpoint that it was made of.

    "GGUF", version, number of tensors, number of metadata entries
    metadata    key, type, value: the architecture's sizes ("llama.block_count"), the tokenizer
    tensors     name, dimensions (fastest first), type, offset
    data        from the next multiple of general.alignment on

Names and rows of tensors become Hugging Face's, and the metadata becomes a config.json. Tensors of F32, F16 and BF16 keep
their type. Quantized ones are dequantized to float32 by the library `gguf`, a range of rows at a time. A Q4_1 weight is
scale * q + min with float16 scale and min: the product alone takes up to 15 significant bits; bfloat16 holds 8, float16 11.

A file is untrusted. A tensor, or metadata of the architecture, that is not listed here is refused, since it may change what the
model computes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import NUMPY_OF
from ..core.file_kind import mistaken
from ..errors import FormatError, UnsupportedError, shown
from .gguf_header import ELSEWHERE, Entry, read_header
from .safetensors import TensorFile, TensorInfo

# ---- architectures -----------------------------------------------------------------------------------------------

_LAYER = {
    "attn_q.weight": ("self_attn.q_proj.weight", ("q", "hidden")),
    "attn_k.weight": ("self_attn.k_proj.weight", ("kv", "hidden")),
    "attn_v.weight": ("self_attn.v_proj.weight", ("kv", "hidden")),
    "attn_output.weight": ("self_attn.o_proj.weight", ("hidden", "q")),
    "ffn_gate.weight": ("mlp.gate_proj.weight", ("inner", "hidden")),
    "ffn_up.weight": ("mlp.up_proj.weight", ("inner", "hidden")),
    "ffn_down.weight": ("mlp.down_proj.weight", ("hidden", "inner")),
    "attn_norm.weight": ("input_layernorm.weight", ("hidden",)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", ("hidden",)),
}
_BIASES = {f"attn_{p}.bias": (f"self_attn.{p}_proj.bias", ("q" if p == "q" else "kv",)) for p in "qkv"}
_QK_NORMS = {f"attn_{p}_norm.weight": (f"self_attn.{p}_norm.weight", ("head",)) for p in "qk"}
_MODEL = {
    "token_embd.weight": ("model.embed_tokens.weight", ("vocab", "hidden")),
    "output_norm.weight": ("model.norm.weight", ("hidden",)),
    "output.weight": ("lm_head.weight", ("vocab", "hidden")),
}
LAYERS = {"llama": _LAYER, "qwen2": _LAYER | _BIASES, "qwen3": _LAYER | _QK_NORMS}
"""Architecture -> tensor of a layer in GGUF -> its name in Hugging Face's layer, and its shape in words of `_sizes`."""
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
INTERLEAVED = {"attn_q.weight": "heads", "attn_k.weight": "kv_heads"}
"""Tensors of llama whose rows the conversion to GGUF permuted in each head, and their number of heads."""

_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "vocab_size",
}  # fmt: skip
"""Metadata of an architecture, after its name, that is understood."""


@dataclass
class _Metadata:
    """Metadata of a file whose architecture is supported."""

    values: dict[str, Any]
    path: object
    architecture: str = field(init=False)

    def __post_init__(self) -> None:
        self.architecture = self.values.get("general.architecture", "")
        if not isinstance(self.architecture, str) or self.architecture not in LAYERS:
            raise UnsupportedError(
                f"{self.path}: general.architecture is {shown(self.architecture)}, must be one of {', '.join(LAYERS)};"
                f" {ELSEWHERE}"
            )
        if self.values.get("general.type", "model") != "model":
            raise UnsupportedError(f"{self.path}: is an adapter or a part ({shown(self.values['general.type'])}) and no model")
        if (parts := self.values.get("split.count", 1)) not in (0, 1):
            raise UnsupportedError(
                f"{self.path}: is one of {shown(parts)} files; join them with llama-gguf-split --merge first"
            )
        own = {key.removeprefix(f"{self.architecture}.") for key in self.values if key.startswith(f"{self.architecture}.")}
        if unknown := sorted(own - _KEYS):
            raise UnsupportedError(
                f"{self.path}: metadata {shown(f'{self.architecture}.{unknown[0]}')} is unknown and may change what the model"
                f" computes; {ELSEWHERE}"
            )

    def number(self, key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        """A positive number of the architecture."""
        value: Any = self.values.get(f"{self.architecture}.{key}", default)
        if type(value) is not kind or not 0 < value < 1 << 31:
            raise FormatError(
                f"{self.path}: metadata {shown(f'{self.architecture}.{key}')} is {shown(value)}, must be one positive"
                f" {'integer' if kind is int else 'number'}; {ELSEWHERE}"
            )
        return _shortest(value) if kind is float else value

    def sizes(self, vocabulary: int) -> dict[str, int]:
        """The words in the shapes of `LAYERS` -> sizes."""
        hidden, heads = self.number("embedding_length", int), self.number("attention.head_count", int)
        kv_heads = self.number("attention.head_count_kv", int, heads)
        head = self.number("attention.key_length", int, hidden // heads)
        for key, wanted in {"attention.value_length": head, "rope.dimension_count": head, "vocab_size": vocabulary}.items():
            if (found := self.number(key, int, wanted)) != wanted:
                raise UnsupportedError(
                    f"{self.path}: metadata {shown(f'{self.architecture}.{key}')} is {found}, must be {wanted} beside the other"
                    f" sizes; {ELSEWHERE}"
                )
        if head % 2 or heads % kv_heads:
            raise FormatError(f"{self.path}: {heads} heads of {head} values over {kv_heads} key-value heads are impossible")
        return {
            "hidden": hidden, "inner": self.number("feed_forward_length", int), "vocab": vocabulary, "head": head,
            "heads": heads, "kv_heads": kv_heads, "q": heads * head, "kv": kv_heads * head,
        }  # fmt: skip

    def config(self, sizes: dict[str, int], *, tied: bool) -> dict[str, Any]:
        """The config.json of the model."""
        config = {
            "architectures": [CLASSES[self.architecture]],
            "model_type": self.architecture,
            "hidden_act": "silu",
            "hidden_size": sizes["hidden"],
            "intermediate_size": sizes["inner"],
            "num_hidden_layers": self.number("block_count", int),
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["kv_heads"],
            "head_dim": sizes["head"],
            "vocab_size": sizes["vocab"],
            "max_position_embeddings": self.number("context_length", int),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", float),
            "rope_theta": self.number("rope.freq_base", float, 10000.0),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": tied,
            "dtype": "float32",
        }
        for token in ("bos", "eos"):
            number = self.values.get(f"tokenizer.ggml.{token}_token_id")
            if isinstance(number, int) and number < sizes["vocab"]:
                config[f"{token}_token_id"] = number
        return config

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self.values.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise UnsupportedError(f"{self.path}: rope scaling {shown(kind)} must be none, linear or yarn; {ELSEWHERE}")
        scaling = {"rope_type": kind, "factor": self.number("rope.scaling.factor", float)}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self.number("rope.scaling.original_context_length", int)
        return scaling


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 in place of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# ---- tensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """How the file stores a tensor.

    Attributes:
        kind: its type, e.g. "Q4_1".
        start, row_bytes: its first byte in the file, and the bytes of a row.
        order: rows of the file in the order of Hugging Face's; None if that is the same.
        dequantize: rows of bytes [r, row_bytes] -> float32 [r, k]; None of types that are kept.
    """

    kind: str
    start: int
    row_bytes: int
    order: NDArray[np.intp] | None
    dequantize: Callable[[NDArray[np.uint8]], Any] | None


class GgufFile(TensorFile):
    """A GGUF file as the checkpoint that it was made of.

    Attributes:
        config: what its config.json would be.
        notes: what of it was dequantized.
        values: its metadata, among it the tokenizer ("tokenizer.ggml.tokens").

    Raises:
        FormatError: the file is broken.
        UnsupportedError: the library `gguf` is missing, or the file holds an architecture, a tensor or a setting that cannot be
            carried over.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.metadata = {"format": "pt"}
        self.values, found, begin = read_header(self.mapped, self.path)
        metadata = _Metadata(self.values, self.path)
        embedding = found.get("token_embd.weight")
        sizes = metadata.sizes(embedding.shape[0] if embedding is not None and embedding.shape else 1)
        self.config = metadata.config(sizes, tied="output.weight" not in found)
        self._stored: dict[str, _Stored] = {}
        self.tensors = {}
        kinds = _Kinds(self.path)
        for name, (entry, new, shape, heads) in self._named(found, metadata.architecture, sizes).items():
            code, stored = kinds.stored(name, entry, begin + entry.offset, self.mapped.size, heads)
            self._stored[new] = stored
            self.tensors[new] = TensorInfo(new, code, shape, 0, prod(shape) * NUMPY_OF[code].itemsize)
        counts = Counter(stored.kind for stored in self._stored.values() if stored.dequantize is not None)
        told = ", ".join(f"{kind} ({count} tensors)" if count > 1 else kind for kind, count in counts.most_common())
        self.notes = (
            *([f"dequantized from {told} to float32, in which sizes of the source are given"] if told else []),
            "the tokenizer is not written: take the model's own, or transformers' AutoTokenizer.from_pretrained(FOLDER,"
            f" gguf_file={shown(self.path.name)})",
        )

    def head_problem(self, head: bytes, size: int) -> str:
        if head[:4] == b"GGUF":
            return ""
        return mistaken(head, "GGUF file") or f"begins with {head[:4]!r}, must begin with b'GGUF'; is this a GGUF file?"

    def _named(
        self, found: dict[str, Entry], architecture: str, sizes: dict[str, int]
    ) -> dict[str, tuple[Entry, str, tuple[int, ...], int]]:
        """GGUF's name -> entry, Hugging Face's name and shape, and in how many heads its rows are permuted (0: in none)."""
        layer, layers = LAYERS[architecture], self.config["num_hidden_layers"]
        named: dict[str, tuple[Entry, str, tuple[int, ...], int]] = {}
        for name, entry in found.items():
            numbered = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", name)
            number, own = (int(numbered[1]), numbered[2]) if numbered else (0, name)
            table = layer if numbered else _MODEL
            if own not in table or number >= layers:
                raise UnsupportedError(f"{self.path}: tensor {shown(name)} is not one of {architecture}'s; {ELSEWHERE}")
            new, words = table[own]
            if entry.shape != (shape := tuple(sizes[word] for word in words)):
                raise FormatError(f"{self.path}: tensor {shown(name)} is {shown(list(entry.shape))}, must be {list(shape)}")
            heads = sizes[INTERLEAVED[own]] if architecture == "llama" and own in INTERLEAVED else 0
            named[name] = entry, f"model.layers.{number}.{new}" if numbered else new, shape, heads
        needed: Iterator[str] = (f"blk.{i}.{own}" for i in range(layers) for own in layer)
        for names in (iter(_MODEL.keys() - {"output.weight"}), needed):
            if (missing := next((name for name in names if name not in found), None)) is not None:
                raise FormatError(f"{self.path}: tensor {shown(missing)} is missing; download it again")
        return named

    def rows(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Rows first to last - 1 of a tensor, dequantized; a vector has one element a row."""
        info, stored = self.info(name), self._stored[name]
        count = info.shape[0] if len(info.shape) == 2 else 1
        table = self.mapped[stored.start : stored.start + count * stored.row_bytes].reshape(count, stored.row_bytes)
        if len(info.shape) == 1:
            return self._values(info, stored, table).reshape(-1)[first:last]
        return self._values(info, stored, table[first:last] if stored.order is None else table[stored.order[first:last]])

    def _values(self, info: TensorInfo, stored: _Stored, rows: NDArray[np.uint8]) -> NDArray[Any]:
        if stored.dequantize is None:
            kept: NDArray[Any] = np.ascontiguousarray(rows).view(NUMPY_OF[info.code])
            return kept if kept.flags.aligned else kept.copy()
        with np.errstate(all="ignore"):  # of scales that are NaN or infinite, which packing refuses by name
            values: NDArray[Any] = np.asarray(stored.dequantize(np.ascontiguousarray(rows)), np.float32)
        return values.reshape(len(rows), info.shape[-1])

    def array(self, name: str) -> NDArray[Any]:
        """A whole tensor, dequantized; read-only."""
        array = self.rows(name, 0, self.info(name).shape[0])
        array.flags.writeable = False
        return array

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the dequantized tensor."""
        info = self.info(name)
        row = info.nbytes // max(1, info.shape[0])
        stop = info.nbytes if stop is None else min(stop, info.nbytes)
        first = start // max(1, row)
        made = self.rows(name, first, -(-stop // max(1, row)))
        return made.reshape(-1).view(np.uint8)[start - first * row : stop - first * row]

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let go of the memory behind the rows of bytes [start, stop) of the dequantized tensor."""
        info, stored = self.info(name), self._stored[name]
        row = info.nbytes // info.shape[0]
        stored_row = stored.row_bytes if len(info.shape) == 2 else 0
        last = info.nbytes if stop is None else min(stop, info.nbytes)
        self._forget(stored.start + start // row * stored_row, stored.start + last // row * stored_row)


@dataclass
class _Kinds:
    """What the library `gguf` knows of types: names, block sizes, and how to dequantize."""

    path: object

    def __post_init__(self) -> None:
        try:
            import gguf
        except ImportError as error:
            raise UnsupportedError(
                f"{self.path}: to read GGUF files, the library gguf is needed ({error}); pip install gguf"
            ) from None
        self.gguf = gguf

    def stored(self, name: str, entry: Entry, start: int, size: int, heads: int) -> tuple[str, _Stored]:
        """The safetensors code that a tensor is read as, and how it is stored.

        Raises:
            FormatError: its bytes are not in the file. UnsupportedError: its type cannot be dequantized.
        """
        try:
            kind = self.gguf.GGMLQuantizationType(entry.kind)
            block, block_bytes = self.gguf.GGML_QUANT_SIZES[kind]
            if kept := kind.name in ("F32", "F16", "BF16"):
                code = kind.name
            else:
                code = "F32"
                self.gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise UnsupportedError(
                f"{self.path}: tensor {shown(name)} is of type {entry.kind}, which the library gguf cannot dequantize;"
                f" {ELSEWHERE}"
            ) from None
        if entry.shape[-1] % block:
            raise FormatError(f"{self.path}: tensor {shown(name)}: rows of {entry.shape[-1]} are no whole blocks of {block}")
        row_bytes = entry.shape[-1] // block * block_bytes
        if start + prod(entry.shape[:-1]) * row_bytes > size:
            raise FormatError(f"{self.path}: is truncated: tensor {shown(name)} ends past its {size} bytes; download it again")
        order = None
        if heads:  # the conversion stored rows (head, half, i) as (head, i, half)
            order = np.arange(entry.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return code, _Stored(
            kind.name, start, row_bytes, order, None if kept else lambda rows: self.gguf.dequantize(rows, kind)
        )
