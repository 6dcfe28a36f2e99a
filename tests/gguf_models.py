"""Small GGUF files of random weights, written by the library's own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

HIDDEN, INNER, HEAD, HEADS, KV_HEADS, VOCABULARY = 64, 128, 32, 4, 2, 96
SIZES: dict[str, Any] = {
    "block_count": 2, "context_length": 256, "embedding_length": HIDDEN, "feed_forward_length": INNER,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD,
    "attention.value_length": HEAD, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 50000.0,
}  # fmt: skip
SHAPES = {
    "attn_q": (HEADS * HEAD, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN), "attn_v": (KV_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
}  # fmt: skip
KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32, Kind.Q5_1)


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's conversion stores them for llama: in each head, i of the first half beside i of the second."""
    halves = w.reshape(heads, 2, -1, w.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(w.shape)


def write(
    path: Path,
    architecture: str = "llama",
    change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda values, tensors: None,
) -> dict[str, np.ndarray]:
    """Write a model of random weights, of every type of KINDS; the weights by Hugging Face's names, dequantized by the library.

    change: called with the metadata of the architecture and the tensors (kind, array), to edit them.
    """
    random, expected = np.random.default_rng(3), dict[str, np.ndarray]()
    tensors: dict[str, tuple[Kind, np.ndarray]] = {}

    def add(name: str, hugging_face: str, shape: tuple[int, ...], kind: Kind, heads: int = 0) -> None:
        w = random.standard_normal(shape).astype(np.float32)
        stored = gguf.quantize(w, kind)
        expected[hugging_face] = gguf.dequantize(stored, kind).reshape(shape)
        tensors[name] = kind, gguf.quantize(permuted(w, heads), kind) if heads else stored

    add("token_embd.weight", "model.embed_tokens.weight", (VOCABULARY, HIDDEN), Kind.Q8_0)
    add("output_norm.weight", "model.norm.weight", (HIDDEN,), Kind.F32)
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}  # fmt: skip
    for i in range(2):
        for at, (part, new) in enumerate(parts.items()):
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part, 0) if architecture == "llama" else 0
            kind = KINDS[(at + i) % len(KINDS)]
            add(f"blk.{i}.{part}.weight", f"model.layers.{i}.{new}.weight", SHAPES[part], kind, heads)
            if architecture == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{i}.{part}.bias", f"model.layers.{i}.{new}.bias", SHAPES[part][:1], Kind.F32)
        for norm, new in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            add(f"blk.{i}.{norm}.weight", f"model.layers.{i}.{new}.weight", (HIDDEN,), Kind.F32)
        for part in "qk" if architecture == "qwen3" else ():
            add(f"blk.{i}.attn_{part}_norm.weight", f"model.layers.{i}.self_attn.{part}_norm.weight", (HEAD,), Kind.F32)
    values = dict(SIZES)
    change(values, tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        whole = key if "." in key and key.split(".")[0] in ("tokenizer", "split", "general") else f"{architecture}.{key}"
        add_value = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add_value.get(type(value), writer.add_array)(whole, value)
    for name, (kind, array) in tensors.items():
        raw = kind not in (Kind.F32, Kind.F16)
        writer.add_tensor(name, array, raw_dtype=kind if raw else None)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return expected
