"""ChatGLM2 and ChatGLM3: few key/value heads, and neighbours turned in the first half of each head (`chatglm`).

Source: Zeng et al., 2022 (arXiv 2210.02414) and the published code of `THUDM/chatglm2-6b` and `chatglm3-6b`, whose
names and keys are their own: `query_key_value` holds q, then k, then v; `dense_h_to_4h` the gate, then what it opens.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.models.heads import HeadSplit, packed
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Program
from tpcpu.program.rope import Rope

OPTIONAL_TENSORS = (r"transformer\.rotary_pos_emb\.inv_freq",)
"""Stored and not needed: frequencies that are computed anew."""


@dataclass(frozen=True)
class ChatglmConfig:
    hidden_size: int
    ffn_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    add_qkv_bias: bool


def from_dict(config: dict[str, Any]) -> ChatglmConfig:
    keys = Keys(
        config,
        ignored=(
            # How and in which precision the authors compute the same.
            "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion",
            "fp32_residual_connection", "original_rope",
        ),
    )  # fmt: skip
    for key, value in (
        ("rmsnorm", True), ("post_layer_norm", True), ("apply_residual_connection_post_layernorm", False),
        ("add_bias_linear", False), ("tie_word_embeddings", False), ("interleaved_qkv", False),
    ):  # fmt: skip
        keys.require(key, value)
    # ChatGLM2 divides positions by it, ChatGLM3 multiplies the base: the config does not say which.
    keys.require("rope_ratio", 1)
    heads = keys.integer("num_attention_heads", 32, maximum=MAX_HEADS)
    kv_heads = keys.integer("multi_query_group_num", 1) if keys.flag("multi_query_attention") else heads
    keys.get("multi_query_group_num")
    keys.divisible("num_attention_heads", heads, "multi_query_group_num", kv_heads)
    dim = keys.integer("kv_channels", 128, maximum=MAX_WIDTH // heads)
    keys.divisible("kv_channels", dim, "the rotated pairs of a half", 4)
    made = ChatglmConfig(
        hidden_size=keys.integer("hidden_size", 4096, maximum=MAX_WIDTH),
        ffn_hidden_size=keys.integer("ffn_hidden_size", 13696, maximum=MAX_WIDTH),
        num_hidden_layers=keys.integer("num_layers", 28, maximum=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        vocab_size=keys.integer("padded_vocab_size", 65024),
        max_position_embeddings=keys.integer("seq_length", 2048),
        layernorm_epsilon=keys.number("layernorm_epsilon", 1e-5),
        add_qkv_bias=keys.flag("add_qkv_bias"),
    )
    # Written beside the keys above by some converters.
    keys.require("num_hidden_layers", made.num_hidden_layers)
    keys.require("vocab_size", made.vocab_size)
    keys.finish()
    return made


def program(config: ChatglmConfig, share: Share) -> Program:
    hidden, dim, ffn, eps = config.hidden_size, config.head_dim, config.ffn_hidden_size, config.layernorm_epsilon
    heads = HeadSplit(share, config.num_attention_heads, config.num_key_value_heads, dim)
    features = share.split(ffn, BLOCK)
    rope = Rope(10000.0, dim // 2, interleaved=True)

    p = Builder(share)
    x = p.embed("transformer.embedding.word_embeddings", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"transformer.encoder.layers.{p.layer}"
        attn, mlp = f"{layer}.self_attention", f"{layer}.mlp"

        n = p.rms_norm(x, f"{layer}.input_layernorm", eps)
        q, k, v = p.linear(n, **heads.packed(p, f"{attn}.query_key_value", hidden, config.add_qkv_bias))
        a = heads.attend(p, q, k, v, rope, dim**-0.5)
        (o,) = p.linear(a, o=p.matrix(f"{attn}.dense", (hidden, heads.heads * dim), columns=heads.local * dim))
        x = p.add(x, p.all_reduce(o))

        n = p.rms_norm(x, f"{layer}.post_attention_layernorm", eps)
        both = {"gate": (ffn, features), "up": (ffn, features)}
        gate, up = p.linear(n, **packed(p, f"{mlp}.dense_h_to_4h", hidden, both))
        g = p.glu(gate, up, features, ffn)
        (d,) = p.linear(g, down=p.matrix(f"{mlp}.dense_4h_to_h", (hidden, ffn), columns=features))
        x = p.add(x, p.all_reduce(d))
    p.layer = -1
    n = p.rms_norm(x, "transformer.encoder.final_layernorm", eps)
    p.logits(n, "transformer.output_layer", config.vocab_size)
    return p.finish()
