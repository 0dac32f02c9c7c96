"""Mixtures of experts of Qwen (`model_type` `qwen2_moe`, `qwen3_moe`): those of Mixtral's frame in Qwen2's and Qwen3's.

Source: Qwen1.5-MoE and Yang et al., 2024 (arXiv 2407.10671) and 2025 (2505.09388); names and keys as published on
Hugging Face. Qwen2's have an expert that all tokens share, behind a gate.
"""

from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models.keys import MAX_WIDTH, Keys, shown
from tpcpu.models.llama import OPTIONAL_TENSORS, LlamaConfig
from tpcpu.models.mixtral import TRAINING, MixtureConfig, program, read_experts

__all__ = ["OPTIONAL_TENSORS", "program", "qwen2_from_dict", "qwen3_from_dict"]


def qwen2_from_dict(config: dict[str, Any]) -> MixtureConfig:
    """Biases of q, k and v; a window, where there is one, in every other of the first layers."""
    keys = Keys(config, ignored=TRAINING)
    frame = LlamaConfig.read(keys, kv_heads=_kv_heads(keys, 16), positions=32768, qkv_bias=keys.flag("qkv_bias", True))
    first = keys.integer("max_window_layers", 28, minimum=0)
    wanted, window = keys.flag("use_sliding_window"), keys.integer("sliding_window", 4096, minimum=0)
    sliding = keys.sliding(frame.num_hidden_layers, lambda layer: wanted and layer < first and layer % 2 == 0)
    if any(sliding) and not (wanted and window):
        keys.require("layer_types", ["full_attention"] * frame.num_hidden_layers)
    windows = tuple(window if is_sliding else 0 for is_sliding in sliding)
    shared = keys.integer("shared_expert_intermediate_size", 5632, maximum=MAX_WIDTH)
    return _finish(keys, frame, windows, ("num_experts",), (60, 4), size=1408, shared=shared)


def qwen3_from_dict(config: dict[str, Any]) -> MixtureConfig:
    """Norms of the heads of q and k; a window, where there is one, in all layers."""
    # Written, and read by nobody: where a window begins in the dense models.
    keys = Keys(config, ignored=(*TRAINING, "max_window_layers"))
    bias = keys.flag("attention_bias")
    frame = LlamaConfig.read(
        keys, kv_heads=_kv_heads(keys, 4), positions=32768, qkv_bias=bias, o_bias=bias, head_norms=True
    )
    window = keys.integer("sliding_window", 4096, minimum=0)
    windows = (window if keys.flag("use_sliding_window") else 0,) * frame.num_hidden_layers
    return _finish(keys, frame, windows, ("num_experts", "num_local_experts"), (128, 8), size=768, shared=0)


def _kv_heads(keys: Keys, default: int) -> int | None:
    """null means as many as there are query heads."""
    return None if keys.nothing("num_key_value_heads") else default


def _finish(
    keys: Keys, frame: LlamaConfig, windows: tuple[int, ...], names: tuple[str, ...], defaults: tuple[int, int], *,
    size: int, shared: int,
) -> MixtureConfig:  # fmt: skip
    experts, chosen = read_experts(keys, names, *defaults)
    every, plain = keys.integer("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    if not isinstance(plain, list) or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in plain):
        raise ConfigError(f"config.json: mlp_only_layers is {shown(plain)}; expected a list of layers")
    made = MixtureConfig(
        **{**vars(frame), "windows": windows},
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=keys.flag("norm_topk_prob"),
        expert_size=keys.integer("moe_intermediate_size", size, maximum=MAX_WIDTH),
        shared_size=shared,
        mixed=tuple((layer + 1) % every == 0 and layer not in plain for layer in range(frame.num_hidden_layers)),
    )
    keys.finish()
    return made
