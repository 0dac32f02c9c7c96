"""Published configurations, as dictionaries: the sizes that the reference job and its peers have."""

_YUAN = {
    "model_type": "yuan", "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": 135040, "tie_word_embeddings": True,
    "causal_mask": True, "reset_attention_mask": True, "reset_position_ids": True, "use_flash_attention": True,
    "eod_token": 77185, "eod_token_id": 77185, "bos_token_id": 77185, "eos_token_id": 77185, "pad_token_id": 77185,
    "mask_token_id": 77185, "sep_token": 77187, "sep_token_id": 77185, "tokenizer_class": "YuanTokenizer",
    "torch_dtype": "bfloat16",
}  # fmt: skip

_DEEPSEEK_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip

_DEEPSEEK = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_layer_freq": 1, "ep_size": 1, "max_position_embeddings": 163840,
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False,
    "use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
}  # fmt: skip

_CHATGLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
    "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32, "original_rope": True,
    "post_layer_norm": True, "rmsnorm": True, "use_cache": True, "tie_word_embeddings": False,
}  # fmt: skip

PUBLISHED = {
    "yuan2-2b": _YUAN | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "max_position_embeddings": 8192,
    },
    "yuan2-51b": _YUAN | {
        "hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 42, "num_attention_heads": 64,
        "max_position_embeddings": 4096,
    },
    "yuan2-102b": _YUAN | {
        "hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 84, "num_attention_heads": 64,
        "max_position_embeddings": 4096,
    },
    "yuan2-m32": _YUAN | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16,
        "attention_projection_size": 4096, "max_position_embeddings": 4096, "reset_attention_mask": False,
        "use_moe": True, "output_router_logits": True,
        "moe_config": {
            "moe_num_experts": 32, "moe_top_k": 2, "norm_topk_prob": True, "gated_linear_unit": True,
            "ffn_hidden_size": 8192,
        },
    },
    "deepseek-v2-lite": _DEEPSEEK | {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1,
        "vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001,
        "rope_scaling": _DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-v3": _DEEPSEEK | {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "vocab_size": 129280,
        "bos_token_id": 0, "eos_token_id": 1, "rope_scaling": _DEEPSEEK_YARN,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "attention_bias": False, "tie_word_embeddings": False, "vocab_size": 151936, "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
        "experts_per_token": 4, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "attention_bias": True, "attention_dropout": 0.0, "sliding_window": 128, "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "initial_context_length": 4096,
        "max_position_embeddings": 131072, "vocab_size": 201088, "tie_word_embeddings": False,
        "output_router_logits": False, "router_aux_loss_coef": 0.9, "eos_token_id": 200002, "pad_token_id": 199999,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    },
    "chatglm3-6b": _CHATGLM | {
        "_name_or_path": "THUDM/chatglm3-6b", "layernorm_epsilon": 1e-5, "num_layers": 28, "padded_vocab_size": 65024,
        "seq_length": 32768, "torch_dtype": "float16", "eos_token_id": 2, "pad_token_id": 0,
    },
    "glm-4-9b": _CHATGLM | {
        "_name_or_path": "THUDM/glm-4-9b-chat", "classifier_dropout": None, "layernorm_epsilon": 1.5625e-07,
        "num_layers": 40, "num_hidden_layers": 40, "padded_vocab_size": 151552, "vocab_size": 151552, "rope_ratio": 500,
        "seq_length": 131072, "torch_dtype": "bfloat16", "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
    },
    "qwen-72b": {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.1, "bf16": True,
        "emb_dropout_prob": 0.1, "fp16": False, "fp32": False, "hidden_size": 8192, "initializer_range": 0.02,
        "intermediate_size": 49152, "kv_channels": 128, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 8192,
        "no_bias": True, "num_attention_heads": 64, "num_hidden_layers": 80, "onnx_safe": None,
        "padded_vocab_size": 152064, "params_dtype": "torch.bfloat16", "rope_theta": 1000000,
        "rotary_emb_base": 1000000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192,
        "softmax_in_fp32": False, "tie_word_embeddings": False, "tokenizer_type": "QWenTokenizer",
        "torch_dtype": "bfloat16", "use_cache": True, "use_cache_kernel": False, "use_cache_quantization": False,
        "use_dynamic_ntk": False, "use_flash_attn": False, "use_logn_attn": False, "vocab_size": 152064,
    },
    "baichuan2-13b": {
        "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "tokenizer_class": "BaichuanTokenizer",
        "_from_model_config": True, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 13696,
        "initializer_range": 0.02, "model_max_length": 4096, "num_attention_heads": 40, "num_hidden_layers": 40,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "gradient_checkpointing": [False], "z_loss_weight": 0, "torch_dtype": "bfloat16", "vocab_size": 125696,
    },
    "llama-1b": {
        "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 8192, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
