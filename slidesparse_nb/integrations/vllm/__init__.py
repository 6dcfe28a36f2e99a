"""vLLM plugin: a packed folder is served as it is. `vllm serve model-6of8-int8`; its config.json picks the plugin.

The entry point "slidesparse" of the group "vllm.general_plugins" calls `register` in every process of vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method "slidesparse" known to vLLM; more than once does no harm."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "slidesparse" not in QUANTIZATION_METHODS:
        from .method import SlideSparseConfig

        register_quantization_config("slidesparse")(SlideSparseConfig)
