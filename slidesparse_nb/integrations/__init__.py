"""Packed models in other libraries: torch, transformers, vllm. Each module needs its library; none is imported by the core."""
