"""Baichuan and Baichuan2: packed q, k and v, ALiBi in the 13B, a normalised head in the second (`baichuan`).

Source: Yang et al., 2023 (arXiv 2309.10305) and the published code. Only the 7B's config has `max_position_embeddings`:
that is what tells rotary embedding from ALiBi (Press et al., arXiv 2108.12409). Only the first Baichuan has a
vocabulary of 64000: that is what tells its plain head from one whose rows are divided by their lengths.
"""

import math
from dataclasses import dataclass
from typing import Any

from tpcpu.models.heads import HeadSplit
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Program
from tpcpu.program.rope import Rope

OPTIONAL_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Stored by some writers and not needed: frequencies that are computed anew."""

FIRST_VOCABULARY = 64000


@dataclass(frozen=True)
class BaichuanConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    alibi: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def from_dict(config: dict[str, Any]) -> BaichuanConfig:
    # Of training, and ids that only the authors' prompts use.
    keys = Keys(
        config,
        ignored=(
            "_from_model_config",
            "gradient_checkpointing",
            "z_loss_weight",
            "user_token_id",
            "assistant_token_id",
        ),
    )
    keys.require("hidden_act", "silu")
    keys.require("tie_word_embeddings", False)
    hidden = keys.integer("hidden_size", maximum=MAX_WIDTH)
    heads = keys.integer("num_attention_heads", maximum=MAX_HEADS)
    dim = keys.divisible("hidden_size", hidden, "num_attention_heads", heads)
    keys.divisible("the head dimension", dim, "the rotated pair", 2)
    alibi = keys.get("max_position_embeddings") is None
    longest = keys.integer("model_max_length", 4096)
    made = BaichuanConfig(
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", maximum=MAX_WIDTH),
        num_hidden_layers=keys.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=heads,
        vocab_size=keys.integer("vocab_size"),
        max_position_embeddings=longest if alibi else keys.integer("max_position_embeddings"),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        alibi=alibi,
    )
    keys.finish()
    return made


def program(config: BaichuanConfig, share: Share) -> Program:
    hidden, dim, ffn, eps = config.hidden_size, config.head_dim, config.intermediate_size, config.rms_norm_eps
    heads = HeadSplit(share, config.num_attention_heads, config.num_attention_heads, dim)
    features = share.split(ffn, BLOCK)
    rope, slopes = Rope(10000.0, 0 if config.alibi else dim), alibi_slopes(heads.heads) if config.alibi else ()

    p = Builder(share)
    x = p.embed("model.embed_tokens", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"model.layers.{p.layer}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"

        n = p.rms_norm(x, f"{layer}.input_layernorm", eps)
        q, k, v = p.linear(n, **heads.packed(p, f"{attn}.W_pack", hidden))
        a = heads.attend(p, q, k, v, rope, dim**-0.5, slopes=slopes)
        (o,) = p.linear(a, o=p.matrix(f"{attn}.o_proj", (hidden, hidden), columns=heads.local * dim))
        x = p.add(x, p.all_reduce(o))

        n = p.rms_norm(x, f"{layer}.post_attention_layernorm", eps)
        gate, up = p.linear(
            n,
            gate=p.matrix(f"{mlp}.gate_proj", (ffn, hidden), rows=features),
            up=p.matrix(f"{mlp}.up_proj", (ffn, hidden), rows=features),
        )
        g = p.glu(gate, up, features, ffn)
        (d,) = p.linear(g, down=p.matrix(f"{mlp}.down_proj", (hidden, ffn), columns=features))
        x = p.add(x, p.all_reduce(d))
    p.layer = -1
    n = p.rms_norm(x, "model.norm", eps)
    p.logits(n, "lm_head", config.vocab_size, unit_rows=config.vocab_size != FIRST_VOCABULARY)
    return p.finish()


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Powers of 2^(-8 / n) for n heads, a power of two; others take every other one of twice as many for the rest."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / whole) for head in range(whole)]
    slopes += [2.0 ** (-4.0 * (head + 1) / whole) for head in range(0, 2 * (heads - whole), 2)]
    return tuple(slopes)
