"""The language model of the examples against transformers: logits and greedy continuations of a tiny random llama."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from language_model import LanguageModel, continuation
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_logits_and_continuations(kv_heads: int) -> None:
    torch.manual_seed(kv_heads)
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 300}
    theta, epsilon = 20000.0, 1e-4
    config = LlamaConfig(
        **sizes,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        rms_norm_eps=epsilon,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = LanguageModel(weights, heads=6, kv_heads=kv_heads, epsilon=epsilon, theta=theta)
    tokens = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
        said = theirs.generate(tokens[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    np.testing.assert_allclose(ours(tokens.numpy()), expected, atol=1e-4 * np.abs(expected).max())
    assert continuation(ours, tokens[0].tolist(), 12) == said[0, 40:].tolist()
