"""ChatGLM2, ChatGLM3, GLM-4: few key/value heads, and neighbours turned in the first half of each head (`chatglm`).

Source: Zeng et al., 2022 (arXiv 2210.02414) and the published code of `THUDM/chatglm2-6b`, `chatglm3-6b` and their
kinds for long texts, and `glm-4-9b`, whose names and keys are their own: `query_key_value` holds q, then k, then v;
`dense_h_to_4h` the gate, then what it opens.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models.heads import HeadSplit, packed
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Program
from tpcpu.program.rope import LinearScaling, Rope

OPTIONAL_TENSORS = (r"transformer\.rotary_pos_emb\.inv_freq",)
"""Stored and not needed: frequencies that are computed anew."""

SHARED_VOCABULARY = 65024
"""That of ChatGLM2 and ChatGLM3."""


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
    rope: Rope


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
    # Without it q, k and v would lie head by head.
    keys.require("multi_query_attention", True, default=False)
    heads = keys.integer("num_attention_heads", 32, maximum=MAX_HEADS)
    kv_heads = keys.integer("multi_query_group_num", 1)
    keys.divisible("num_attention_heads", heads, "multi_query_group_num", kv_heads)
    dim = keys.integer("kv_channels", 128, maximum=MAX_WIDTH // heads)
    keys.divisible("kv_channels", dim, "the rotated pairs of a half", 4)
    vocab = keys.integer("padded_vocab_size", SHARED_VOCABULARY)
    made = ChatglmConfig(
        hidden_size=keys.integer("hidden_size", 4096, maximum=MAX_WIDTH),
        ffn_hidden_size=keys.integer("ffn_hidden_size", 13696, maximum=MAX_WIDTH),
        num_hidden_layers=keys.integer("num_layers", 28, maximum=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        vocab_size=vocab,
        max_position_embeddings=keys.integer("seq_length", 2048),
        layernorm_epsilon=keys.number("layernorm_epsilon", 1e-5),
        add_qkv_bias=keys.flag("add_qkv_bias"),
        rope=_rope(keys, dim // 2, vocab),
    )
    # Written beside the keys above by some converters.
    keys.require("num_hidden_layers", made.num_hidden_layers)
    keys.require("vocab_size", made.vocab_size)
    keys.finish()
    return made


def _rope(keys: Keys, turned: int, vocab: int) -> Rope:
    """`rope_ratio` stretches the base, but in ChatGLM2 for long texts it is what positions are divided by."""
    ratio, name = keys.number("rope_ratio", 1.0), str(keys.get("_name_or_path", "")).lower()
    first, second = "chatglm2" in name, "chatglm3" in name
    if ratio != 1 and vocab == SHARED_VOCABULARY and first == second:
        raise ConfigError(
            f"config.json: rope_ratio is {ratio:g}: ChatGLM2 divides positions by it, ChatGLM3 multiplies the base; "
            f"expected _name_or_path to say which, chatglm2 or chatglm3, found {keys.get('_name_or_path')!r}"
        )
    if ratio != 1 and first:
        return Rope(10000.0, turned, LinearScaling(ratio), interleaved=True)
    return Rope(10000.0 * ratio, turned, interleaved=True)


def program(config: ChatglmConfig, share: Share) -> Program:
    hidden, dim, ffn, eps = config.hidden_size, config.head_dim, config.ffn_hidden_size, config.layernorm_epsilon
    heads = HeadSplit(share, config.num_attention_heads, config.num_key_value_heads, dim)
    features = share.split(ffn, BLOCK)

    p = Builder(share)
    x = p.embed("transformer.embedding.word_embeddings", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"transformer.encoder.layers.{p.layer}"
        attn, mlp = f"{layer}.self_attention", f"{layer}.mlp"

        n = p.rms_norm(x, f"{layer}.input_layernorm", eps)
        q, k, v = p.linear(n, **heads.packed(p, f"{attn}.query_key_value", hidden, config.add_qkv_bias))
        a = heads.attend(p, q, k, v, config.rope, dim**-0.5)
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
