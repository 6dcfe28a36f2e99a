"""A folder of a tiny random Llama with a tokenizer of words, and a text for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 60
TEXT = " ".join(f"w{(i * i + 3 * i) % (WORDS - 2)}" for i in range(101))
"""101 tokens."""


def folder_of(path: Path, first: str = "<s>", bos: bool = False) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    words = {first: 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(WORDS - 2)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, unk_token="<unk>").save_pretrained(path)
    return path
