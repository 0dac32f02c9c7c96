"""Qwen2, Qwen2.5 and Qwen3, dense: Llama with biases of q, k and v, or norms of their heads (`qwen2`, `qwen3`).

Source: Yang et al., 2024 (arXiv 2407.10671, 2412.15115) and 2025 (2505.09388); names and keys as published on Hugging
Face.
"""

from dataclasses import replace
from typing import Any

from tpcpu.models.keys import Keys
from tpcpu.models.llama import OPTIONAL_TENSORS, LlamaConfig, program

__all__ = ["OPTIONAL_TENSORS", "program", "qwen2_from_dict", "qwen3_from_dict"]


def qwen2_from_dict(config: dict[str, Any]) -> LlamaConfig:
    """Biases of q, k and v, which the config has no key for."""
    keys = Keys(config)
    return _windows(keys, LlamaConfig.read(keys, kv_heads=_kv_heads(keys), positions=32768, qkv_bias=True))


def qwen3_from_dict(config: dict[str, Any]) -> LlamaConfig:
    """Norms of the heads of q and k; `attention_bias` is off in the published models."""
    keys = Keys(config)
    bias = keys.flag("attention_bias")
    made = LlamaConfig.read(
        keys, kv_heads=_kv_heads(keys), head_dim=128, positions=32768, qkv_bias=bias, o_bias=bias, head_norms=True
    )
    return _windows(keys, made)


def _kv_heads(keys: Keys) -> int | None:
    """null means as many as there are query heads."""
    return None if keys.nothing("num_key_value_heads") else 32


def _windows(keys: Keys, config: LlamaConfig) -> LlamaConfig:
    """A sliding window in the layers from `max_window_layers` on, or in those that `layer_types` names."""
    first = keys.integer("max_window_layers", 28, minimum=0)
    keys.get("sliding_window")
    wanted = keys.flag("use_sliding_window") and not keys.nothing("sliding_window")
    size = keys.integer("sliding_window", 4096) if wanted else 0
    sliding = keys.sliding(config.num_hidden_layers, lambda layer: wanted and layer >= first)
    keys.finish()
    if any(sliding) and not size:
        keys.require("layer_types", ["full_attention"] * config.num_hidden_layers)
    return replace(config, windows=tuple(size if is_sliding else 0 for is_sliding in sliding))
