"""The first Qwen: packed q, k and v with a bias, names of its own (`qwen`).

Source: Bai et al., 2023 (arXiv 2309.16609) and the published code: `w2` is the activated half of the feed-forward
layer. Dynamic NTK and log-n attention begin behind `seq_length`: with them texts end there.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models.heads import HeadSplit
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Program
from tpcpu.program.rope import Rope

OPTIONAL_TENSORS = (r"transformer\.rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.(masked_)?bias")
"""Stored by some writers and not needed: frequencies that are computed anew, and masks."""


@dataclass(frozen=True)
class QwenConfig:
    hidden_size: int
    intermediate_size: int
    """Of the gate, which is half of what the config says."""
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    rotary_emb_base: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def from_dict(config: dict[str, Any]) -> QwenConfig:
    # How and in which precision the authors compute the same, and what their tokenizer is called.
    keys = Keys(
        config,
        ignored=(
            "attn_dropout_prob", "bf16", "emb_dropout_prob", "fp16", "fp32", "onnx_safe", "softmax_in_fp32",
            "use_flash_attn", "use_cache_kernel", "bias_dropout_fusion", "params_dtype", "tokenizer_type",
        ),
    )  # fmt: skip
    for key, value in (
        ("no_bias", True), ("scale_attn_weights", True), ("tie_word_embeddings", False), ("rotary_pct", 1.0),
        ("position_embedding_type", "rope"), ("use_cache_quantization", False),
    ):  # fmt: skip
        keys.require(key, value)
    hidden = keys.integer("hidden_size", 4096, maximum=MAX_WIDTH)
    heads = keys.integer("num_attention_heads", 32, maximum=MAX_HEADS)
    dim = keys.divisible("hidden_size", hidden, "num_attention_heads", heads)
    keys.divisible("the head dimension", dim, "the rotated pair", 2)
    if keys.integer("kv_channels", 128) != dim:
        raise ConfigError(
            f"config.json: kv_channels is {keys.integer('kv_channels', 128)}; heads of {hidden} have {dim}"
        )
    # Both flags are on in the published code where a config does not say.
    longest, trained = keys.integer("max_position_embeddings", 8192), keys.integer("seq_length", 2048)
    changes = [keys.flag(key, True) for key in ("use_dynamic_ntk", "use_logn_attn")]
    made = QwenConfig(
        hidden_size=hidden,
        intermediate_size=keys.divisible(
            "intermediate_size", keys.integer("intermediate_size", 22016, maximum=MAX_WIDTH), "its halves", 2
        ),
        num_hidden_layers=keys.integer("num_hidden_layers", 32, maximum=MAX_LAYERS),
        num_attention_heads=heads,
        vocab_size=keys.integer("vocab_size", 151936),
        max_position_embeddings=min(longest, trained) if any(changes) else longest,
        layer_norm_epsilon=keys.number("layer_norm_epsilon", 1e-6),
        rotary_emb_base=keys.number("rotary_emb_base", 10000.0),
    )
    # Written beside the keys above in some published configs.
    keys.require("rope_theta", made.rotary_emb_base)
    keys.require("padded_vocab_size", made.vocab_size)
    keys.finish()
    return made


def program(config: QwenConfig, share: Share) -> Program:
    hidden, dim, ffn, eps = config.hidden_size, config.head_dim, config.intermediate_size, config.layer_norm_epsilon
    heads = HeadSplit(share, config.num_attention_heads, config.num_attention_heads, dim)
    features = share.split(ffn, BLOCK)

    p = Builder(share)
    x = p.embed("transformer.wte", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"transformer.h.{p.layer}"
        attn, mlp = f"{layer}.attn", f"{layer}.mlp"

        n = p.rms_norm(x, f"{layer}.ln_1", eps)
        q, k, v = p.linear(n, **heads.packed(p, f"{attn}.c_attn", hidden, bias=True))
        a = heads.attend(p, q, k, v, Rope(config.rotary_emb_base, dim), dim**-0.5)
        (o,) = p.linear(a, o=p.matrix(f"{attn}.c_proj", (hidden, hidden), columns=heads.local * dim))
        x = p.add(x, p.all_reduce(o))

        n = p.rms_norm(x, f"{layer}.ln_2", eps)
        w1, w2 = p.linear(
            n,
            w1=p.matrix(f"{mlp}.w1", (ffn, hidden), rows=features),
            w2=p.matrix(f"{mlp}.w2", (ffn, hidden), rows=features),
        )
        g = p.glu(w2, w1, features, ffn)
        (d,) = p.linear(g, down=p.matrix(f"{mlp}.c_proj", (hidden, ffn), columns=features))
        x = p.add(x, p.all_reduce(d))
    p.layer = -1
    n = p.rms_norm(x, "transformer.ln_f", eps)
    p.logits(n, "lm_head", config.vocab_size)
    return p.finish()
