"""Phi-3, Phi-3.5 and Phi-4 mini: Llama whose projections are packed, and a part of each head turned (`phi3`).

Source: Abdin et al., 2024 (arXiv 2404.14219); names and keys as published on Hugging Face. Of `longrope` the factors
of short texts are used, and texts end where the authors change to the others (`original_max_position_embeddings`).
"""

from dataclasses import replace
from typing import Any

from tpcpu.models.heads import HeadSplit, packed
from tpcpu.models.keys import Keys
from tpcpu.models.llama import OPTIONAL_TENSORS, LlamaConfig
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Program

__all__ = ["OPTIONAL_TENSORS", "from_dict", "program"]


def from_dict(config: dict[str, Any]) -> LlamaConfig:
    """A sliding window, where there is one, in every layer; no biases."""
    keys = Keys(config)
    made = LlamaConfig.read(keys, positions=4096, eps=1e-5, types=("default", "longrope"), partial=True)
    window = keys.integer("sliding_window", 0, minimum=0)
    keys.finish()
    return replace(made, windows=(window,) * made.num_hidden_layers)


def program(config: LlamaConfig, share: Share) -> Program:
    hidden, dim, ffn, eps = config.hidden_size, config.head_dim, config.intermediate_size, config.rms_norm_eps
    heads = HeadSplit(share, config.num_attention_heads, config.num_key_value_heads, dim)
    features = share.split(ffn, BLOCK)

    p = Builder(share)
    x = p.embed("model.embed_tokens", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"model.layers.{p.layer}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"

        n = p.rms_norm(x, f"{layer}.input_layernorm", eps)
        q, k, v = p.linear(n, **heads.packed(p, f"{attn}.qkv_proj", hidden))
        a = heads.attend(p, q, k, v, config.rope, dim**-0.5, window=config.windows[p.layer])
        (o,) = p.linear(a, o=p.matrix(f"{attn}.o_proj", (hidden, heads.heads * dim), columns=heads.local * dim))
        x = p.add(x, p.all_reduce(o))

        n = p.rms_norm(x, f"{layer}.post_attention_layernorm", eps)
        both = {"gate": (ffn, features), "up": (ffn, features)}
        gate, up = p.linear(n, **packed(p, f"{mlp}.gate_up_proj", hidden, both))
        g = p.glu(gate, up, features, ffn)
        (d,) = p.linear(g, down=p.matrix(f"{mlp}.down_proj", (hidden, ffn), columns=features))
        x = p.add(x, p.all_reduce(d))
    p.layer = -1
    n = p.rms_norm(x, "model.norm", eps)
    p.logits(n, "model.embed_tokens" if config.tie_word_embeddings else "lm_head", config.vocab_size)
    return p.finish()
