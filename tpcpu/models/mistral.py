"""Mistral: Llama with a sliding window (`model_type` `mistral`).

Source: Jiang et al., 2023 (arXiv 2310.06825); names and keys as published on Hugging Face.
"""

from dataclasses import replace
from typing import Any

from tpcpu.models.keys import Keys
from tpcpu.models.llama import OPTIONAL_TENSORS, LlamaConfig, program

__all__ = ["OPTIONAL_TENSORS", "from_dict", "program"]

_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}
"""Of keys that a writer left out, where they are not Llama's."""


def from_dict(config: dict[str, Any]) -> LlamaConfig:
    """A token sees the last `sliding_window` positions, itself among them; null: all."""
    rest = {**_DEFAULTS, **{key: value for key, value in config.items() if key != "sliding_window"}}
    for key in ("attention_bias", "mlp_bias"):
        Keys(config).require(key, supported=False)
    made = LlamaConfig.from_dict(rest)
    if config.get("sliding_window", 4096) is None:
        return made
    return replace(made, sliding_window=Keys(config).integer("sliding_window", 4096))
