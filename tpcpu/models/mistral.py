"""Mistral: Llama with a sliding window (`model_type` `mistral`).

Source: Jiang et al., 2023 (arXiv 2310.06825); names and keys as published on Hugging Face.
"""

from dataclasses import replace
from typing import Any

from tpcpu.models.keys import Keys
from tpcpu.models.llama import OPTIONAL_TENSORS, LlamaConfig, program

__all__ = ["OPTIONAL_TENSORS", "from_dict", "program"]


def from_dict(config: dict[str, Any]) -> LlamaConfig:
    """A token sees the last `sliding_window` positions, itself among them; null: all."""
    keys = Keys(config, ignored=("pretraining_tp",))
    for key in ("attention_bias", "mlp_bias"):
        keys.require(key, supported=False)
    made = LlamaConfig.read(keys, kv_heads=8, positions=4096 * 32)
    window = 0 if keys.nothing("sliding_window") else keys.integer("sliding_window", 4096)
    keys.finish()
    return replace(made, windows=(window,) * made.num_hidden_layers)
