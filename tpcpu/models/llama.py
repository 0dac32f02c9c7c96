"""Llama: grouped-query attention and a gated feed-forward layer (`model_type` `llama`).

Source: Touvron et al., 2023 (arXiv 2302.13971, 2307.09288); names and keys as published on Hugging Face.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Heads, Program, Rope

OPTIONAL_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")
"""Stored by some writers and not needed: frequencies that are computed anew, a head equal to a tied embedding."""


@dataclass(frozen=True)
class LlamaConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    sliding_window: int = 0
    """Positions that a token sees, its own included; 0: all."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "LlamaConfig":
        # pretraining_tp only changes the order in which the original code adds.
        keys = Keys(config, ignored=("pretraining_tp",))
        keys.require("hidden_act", "silu")
        hidden = keys.integer("hidden_size", maximum=MAX_WIDTH)
        heads = keys.integer("num_attention_heads", maximum=MAX_HEADS)
        kv_heads = keys.integer("num_key_value_heads", heads)
        keys.divisible("num_attention_heads", heads, "num_key_value_heads", kv_heads)
        head_dim = keys.integer("head_dim", 0, minimum=0, maximum=MAX_WIDTH // heads) or keys.divisible(
            "hidden_size", hidden, "num_attention_heads", heads
        )
        keys.divisible("head_dim", head_dim, "the rotated pair", 2)
        made = cls(
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size", maximum=MAX_WIDTH),
            num_hidden_layers=keys.integer("num_hidden_layers", maximum=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=keys.integer("vocab_size"),
            max_position_embeddings=keys.integer("max_position_embeddings", 2048),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=keys.rope_theta(10000.0),
            attention_bias=keys.flag("attention_bias"),
            mlp_bias=keys.flag("mlp_bias"),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
        )
        keys.finish()
        return made


def program(config: LlamaConfig, share: Share) -> Program:
    hidden, heads, kv_heads, dim = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    group = heads // kv_heads
    local = share.split(heads)
    local_kv = local.blocks(group)
    kv_of = tuple(head // group - local_kv.start for head in range(local.start, local.stop))
    ffn = config.intermediate_size
    features = share.split(ffn, BLOCK)

    p = Builder(share)
    x = p.embed("model.embed_tokens", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"model.layers.{p.layer}"

        attn, bias = f"{layer}.self_attn", config.attention_bias
        n = p.rms_norm(x, f"{layer}.input_layernorm", config.rms_norm_eps)
        q, k, v = p.linear(
            n,
            q=p.matrix(f"{attn}.q_proj", (heads * dim, hidden), rows=local * dim, bias=bias),
            k=p.matrix(f"{attn}.k_proj", (kv_heads * dim, hidden), rows=local_kv * dim, bias=bias),
            v=p.matrix(f"{attn}.v_proj", (kv_heads * dim, hidden), rows=local_kv * dim, bias=bias),
        )
        q = p.rope_and_store(
            Heads(q, len(local), dim, 0, dim),
            Heads(k, len(local_kv), dim, 0, dim),
            Heads(v, len(local_kv), dim, 0, dim),
            Rope(config.rope_theta, dim),
        )
        a = p.attention(q, local, heads, kv_of, dim**-0.5, config.sliding_window)
        (o,) = p.linear(a, o=p.matrix(f"{attn}.o_proj", (hidden, heads * dim), columns=local * dim))
        x = p.add(x, p.all_reduce(o), p.vector(f"{attn}.o_proj.bias", hidden) if bias else None)

        mlp, bias = f"{layer}.mlp", config.mlp_bias
        n = p.rms_norm(x, f"{layer}.post_attention_layernorm", config.rms_norm_eps)
        gate, up = p.linear(
            n,
            gate=p.matrix(f"{mlp}.gate_proj", (ffn, hidden), rows=features, bias=bias),
            up=p.matrix(f"{mlp}.up_proj", (ffn, hidden), rows=features, bias=bias),
        )
        g = p.glu(gate, up, features, ffn)
        (d,) = p.linear(g, down=p.matrix(f"{mlp}.down_proj", (hidden, ffn), columns=features))
        x = p.add(x, p.all_reduce(d), p.vector(f"{mlp}.down_proj.bias", hidden) if bias else None)
    p.layer = -1
    n = p.rms_norm(x, "model.norm", config.rms_norm_eps)
    p.logits(n, "model.embed_tokens" if config.tie_word_embeddings else "lm_head", config.vocab_size)
    return p.finish()
