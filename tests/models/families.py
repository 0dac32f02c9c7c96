"""One small random model of every family, made and saved by transformers where it has a class, and what it must give.

A family is its config; everything else is the same for all. Weights are scaled so that every part of a model is heard
in its logits: as transformers makes them, most of them are not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 131

_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 172, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_MIXTURE = _SHAPE | {"moe_intermediate_size": 140, "num_experts_per_tok": 3}
_LATENT = _SHAPE | {
    "num_key_value_heads": 6, "num_hidden_layers": 3, "kv_lora_rank": 40, "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12, "v_head_dim": 28, "moe_intermediate_size": 76, "n_routed_experts": 9,
    "n_shared_experts": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
_LATENT_YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 256,
    "mscale": 0.8, "mscale_all_dim": 0.8, "beta_fast": 4, "beta_slow": 1,
}  # fmt: skip
_GEMMA = _SHAPE | {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 9}
_GPT_OSS = _SHAPE | {
    "num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 24, "sliding_window": 9, "swiglu_limit": 1.5,
    "swiglu_alpha": 2.5, "intermediate_size": 140,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "truncate": False, "beta_fast": 3.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
_BAICHUAN = {
    "model_type": "baichuan", "vocab_size": VOCAB, "hidden_size": 144, "intermediate_size": 172, "rms_norm_eps": 1e-6,
    "num_hidden_layers": 2, "num_attention_heads": 6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_YUAN = {
    "model_type": "yuan", "vocab_size": VOCAB, "hidden_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": True, "causal_mask": True, "use_flash_attention": True, "reset_attention_mask": True,
    "reset_position_ids": True, "use_loss_mask": False,
}  # fmt: skip


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return _SHAPE | {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


@dataclass(frozen=True)
class Family:
    """`config`: what config.json says. `published`: the function of `published.py`, if it is not transformers'.

    `mxfp4`: stacks of experts are stored in that format, as their publisher has them.
    """

    model_type: str
    config: dict[str, Any]
    published: str = ""
    mxfp4: bool = False


_SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

FAMILIES = {
    "llama": Family("llama", _SHAPE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear": Family("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": Family("llama", _rope("dynamic", factor=4.0)),
    "llama-yarn": Family("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama3": Family(
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral": Family("mistral", _SHAPE | {"head_dim": 24, "sliding_window": 9}),
    "qwen2": Family("qwen2", _SHAPE | _SOME_WINDOWS),
    "qwen3": Family("qwen3", _SHAPE | _SOME_WINDOWS | {"head_dim": 24}),
    "mixtral": Family("mixtral", _SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 24}),
    "qwen2_moe": Family(
        "qwen2_moe",
        _MIXTURE
        | _SOME_WINDOWS
        | {"shared_expert_intermediate_size": 76, "num_experts": 5, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        _MIXTURE
        | {
            "num_experts": 6, "head_dim": 24, "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1],
            "use_sliding_window": True, "sliding_window": 9,
        },
    ),
    "gpt_oss": Family("gpt_oss", _GPT_OSS),
    "gpt_oss-mxfp4": Family("gpt_oss", _GPT_OSS | {"hidden_size": 128, "intermediate_size": 320}, mxfp4=True),
    "deepseek_v2-lite": Family("deepseek_v2", _LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v2": Family(
        "deepseek_v2",
        _LATENT
        | {
            "q_lora_rank": 36, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
            "attention_bias": True, "rope_parameters": _LATENT_YARN,
        },
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        _LATENT
        | {
            "q_lora_rank": 36, "n_group": 3, "topk_group": 2, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
            "rope_parameters": _LATENT_YARN | {"mscale": 1.0},
        },
    ),
    "phi3": Family(
        "phi3",
        _SHAPE
        | {
            "max_position_embeddings": 256, "original_max_position_embeddings": 128, "sliding_window": 30,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0], "long_factor": [4.0] * 6,
            },
        },
    ),
    "gemma2": Family("gemma2", _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": Family(
        "gemma3_text",
        _GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            },
        },
    ),
    "chatglm": Family(
        "chatglm",
        {
            "model_type": "chatglm", "padded_vocab_size": VOCAB, "hidden_size": 96, "ffn_hidden_size": 172,
            "num_layers": 2, "num_attention_heads": 6, "multi_query_attention": True, "multi_query_group_num": 2,
            "kv_channels": 24,
            "seq_length": 128, "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False,
            "rmsnorm": True,
            "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False,
            "rope_ratio": 50.0,
            "original_rope": True, "apply_query_key_layer_scaling": True, "bias_dropout_fusion": True,
            "attention_softmax_in_fp32": True, "fp32_residual_connection": False,
        },
        "chatglm",
    ),
    "yuan": Family("yuan", _YUAN | {"intermediate_size": 172}, "yuan"),
    "yuan-m32": Family(
        "yuan",
        _YUAN
        | {
            "attention_projection_size": 144, "use_moe": True, "output_router_logits": True, "rope_theta": 40890.0,
            "moe_config": {
                "moe_num_experts": 7, "moe_top_k": 2, "norm_topk_prob": True, "gated_linear_unit": True,
                "ffn_hidden_size": 140,
            },
        },
        "yuan",
    ),
    "baichuan2-7b": Family("baichuan", _BAICHUAN | {"max_position_embeddings": 128}, "baichuan"),
    "baichuan2-13b": Family("baichuan", _BAICHUAN | {"model_max_length": 128}, "baichuan"),
    "qwen": Family(
        "qwen",
        {
            "model_type": "qwen", "vocab_size": VOCAB, "hidden_size": 144, "intermediate_size": 344, "kv_channels": 24,
            "num_hidden_layers": 2, "num_attention_heads": 6, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
            "rope_theta": 10000, "padded_vocab_size": VOCAB, "params_dtype": "torch.bfloat16",
            "rotary_pct": 1.0, "seq_length": 128, "max_position_embeddings": 256, "no_bias": True,
            "scale_attn_weights": True, "use_dynamic_ntk": True, "use_logn_attn": True,
            "use_flash_attn": "auto", "bf16": True, "tie_word_embeddings": False,
        },
        "qwen",
    ),
}  # fmt: skip
"""By what a test calls them."""


@dataclass(frozen=True)
class Made:
    """A saved model, and who knows its logits: (tokens, vocab) float32 of a text."""

    folder: Path
    logits: Callable[[list[int]], Any]


def make(name: str, folder: Path) -> Made:
    """Saves the model in bfloat16, and computes in float32 what its folder says."""
    return make_family(FAMILIES[name], folder)


def make_family(family: Family, folder: Path) -> Made:
    """As `make`, of any family."""
    import torch

    torch.manual_seed(5)
    made = _by_transformers(family, folder) if not family.published else _by_us(family, folder)

    def logits(ids: list[int]) -> Any:
        with torch.no_grad():
            return made(torch.tensor(ids)).float().numpy()

    return Made(folder, logits)


def _scaled(name: str, values: Any, norms_from_zero: bool) -> Any:
    """Random values of a parameter, near what a trained one does to activations."""
    import torch

    random = torch.randn(values.shape)
    if "norm" in name or ".ln_" in name:
        return random / 5 + (0 if norms_from_zero else 1)
    if values.dim() == 1:
        return random / 5
    return random if "embed" in name or "wte" in name else random * values.shape[1] ** -0.5


def _by_transformers(family: Family, folder: Path) -> Callable[[Any], Any]:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family.model_type, **family.config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        stored = model.state_dict()
        buffers = [(name, values) for name, values in model.named_buffers() if name in stored]
        for name, values in [*model.named_parameters(), *buffers]:
            values.copy_(_scaled(name, values, "gemma" in family.model_type))
    model.to(torch.bfloat16).save_pretrained(folder)
    if family.mxfp4:
        store_mxfp4(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return lambda ids: read(ids[None], use_cache=False).logits[0]


def store_mxfp4(folder: Path) -> None:
    """Stacks of experts, which transformers writes turned, become random ones of about their size in mxfp4.

    In blocks (experts, rows, columns / 32, 16), two values to a byte, and scales (experts, rows, columns / 32).
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = experts, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 124, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


def _by_us(family: Family, folder: Path) -> Callable[[Any], Any]:
    """The tensors that the program declares; a wrong shape among them would not fit the authors' formulas."""
    import torch
    from safetensors.torch import save_file

    from tests.models import published
    from tpcpu.models import read_config
    from tpcpu.parallel.partition import Share

    shapes = {weight.name: weight.full_shape for weight in read_config(family.config).program(Share()).weights}
    tensors = {name: _scaled(name, torch.empty(shape), False).bfloat16() for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.config | {"torch_dtype": "bfloat16"}))
    floats = {name: values.float() for name, values in tensors.items()}
    return lambda ids: getattr(published, family.published)(family.config, floats, ids)


def text(count: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, count)]
