"""Yuan 2.0: Llama's frame with localized filtering before queries and keys (`model_type` `yuan`).

Source: Wu et al., 2023 (arXiv 2311.15786) and the published Hugging Face checkpoints, whose names mislead:
`q_proj` and `k_proj` stacked hold, head after head, the rows of q and then those of k; and the activated half of the
feed-forward layer is called `up_proj`. Attention is plain causal, as in the authors' own servers, whatever
`use_flash_attention` and `reset_*` say. Filtered values feed queries and keys; values see the unfiltered input.
M32 has layers of experts, and heads wider than what is rotated of them.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.models import yuan_experts
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys
from tpcpu.parallel.partition import Range, Share
from tpcpu.program.builder import Builder, Matrix
from tpcpu.program.operations import BLOCK, Buffer, Heads, Kind, Program
from tpcpu.program.rope import Rope

OPTIONAL_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")
"""Stored by some writers and not needed: frequencies that are computed anew, a head equal to a tied embedding."""

LF_NORM_EPS = 1e-6
"""Fixed in the published code, not read from the config."""

ROPE_THETA = 10000.0
"""The published configs have no key for it. M32's authors have this in their code, and 40890 in the scripts that tuned
and measured it for long texts: a folder's config says `"rope_theta": 40890` for those."""


@dataclass(frozen=True)
class YuanConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    attention_size: int
    """Features of all heads together."""
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    experts: yuan_experts.YuanExperts | None

    @property
    def head_dim(self) -> int:
        return self.attention_size // self.num_attention_heads

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are rotated, its first."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "YuanConfig":
        keys = Keys(
            config,
            ignored=(
                # Masks of training, and of the eager path that plain causal attention replaces.
                "causal_mask", "reset_attention_mask", "reset_position_ids", "use_flash_attention", "use_loss_mask",
                # Token ids, which the tokenizer's files decide.
                "eod_token", "eod_token_id", "mask_token_id", "model_max_length", "sep_token",
                # Of training.
                "output_router_logits", "router_aux_loss_coef",
            ),
        )  # fmt: skip
        keys.require("hidden_act", "silu")
        keys.require("use_shareqk", False)
        hidden = keys.integer("hidden_size", maximum=MAX_WIDTH)
        heads = keys.integer("num_attention_heads", maximum=MAX_HEADS)
        rotated = keys.divisible("hidden_size", hidden, "num_attention_heads", heads)
        keys.divisible("the head dimension", rotated, "the rotated pair", 2)
        attention = keys.integer("attention_projection_size", hidden, minimum=hidden, maximum=MAX_WIDTH)
        keys.divisible("attention_projection_size", attention, "num_attention_heads", heads)
        experts = yuan_experts.read_experts(keys)
        # Experts have a size of their own, and there is nothing beside them.
        keys.get("intermediate_size")
        intermediate = 0 if experts else keys.integer("intermediate_size", maximum=MAX_WIDTH)
        keys.divisible("hidden_size", hidden, "the halving of the first convolution", 2)
        made = cls(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=keys.integer("num_hidden_layers", maximum=MAX_LAYERS),
            num_attention_heads=heads,
            attention_size=attention,
            vocab_size=keys.integer("vocab_size"),
            max_position_embeddings=keys.integer("max_position_embeddings", 4096),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=keys.rope_theta(ROPE_THETA),
            tie_word_embeddings=keys.flag("tie_word_embeddings", True),
            experts=experts,
        )
        keys.finish()
        return made


def program(config: YuanConfig, share: Share) -> Program:
    hidden, heads, dim, attention = (
        config.hidden_size, config.num_attention_heads, config.head_dim, config.attention_size,
    )  # fmt: skip
    local = share.split(heads)
    kv_of = tuple(range(len(local)))
    channels = share.split(hidden // 2, BLOCK // 2)

    p = Builder(share)
    x = p.embed("model.embed_tokens", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"model.layers.{p.layer}"
        attn = f"{layer}.self_attn"

        n = p.rms_norm(x, f"{layer}.input_layernorm", config.rms_norm_eps)
        lfa = f"{attn}.lf_gate"
        conv1 = p.matrix(f"{lfa}.conv1", (hidden // 2, hidden, 2, 1), rows=channels, bias=True, kind=Kind.CONV)
        conv2 = p.matrix(f"{lfa}.conv2", (hidden, hidden // 2, 2, 1), columns=channels * 2, kind=Kind.CONV)
        # Values first, while threads have n at hand.
        (v,) = p.linear(n, v=p.matrix(f"{attn}.v_proj", (attention, hidden), rows=local * dim))
        y = p.short_conv(n, conv1, covering=(channels, hidden // 2))
        z = p.all_reduce(p.short_conv(y, conv2))
        filtered = p.rms_norm(
            p.add(n, z, p.vector(f"{lfa}.conv2.bias", hidden)), f"{lfa}.output_layernorm", LF_NORM_EPS
        )

        (qk,) = p.linear(filtered, qk=_stacked(p, attn, (attention, hidden), local * (2 * dim)))
        q = p.rope_and_store(
            Heads(qk, len(local), dim, 0, 2 * dim),
            Heads(qk, len(local), dim, dim, 2 * dim),
            Heads(v, len(local), dim, 0, dim),
            Rope(config.rope_theta, config.rotated),
        )
        a = p.attention(q, local, heads, kv_of, dim**-0.5)
        (o,) = p.linear(a, o=p.matrix(f"{attn}.o_proj", (hidden, attention), columns=local * dim))
        x = p.add(x, p.all_reduce(o))

        n = p.rms_norm(x, f"{layer}.post_attention_layernorm", config.rms_norm_eps)
        mlp = f"{layer}.mlp"
        d = (
            yuan_experts.layer(p, mlp, n, config.experts)
            if config.experts
            else _feed_forward(p, mlp, n, config.intermediate_size)
        )
        x = p.add(x, p.all_reduce(d))
    p.layer = -1
    n = p.rms_norm(x, "model.norm", config.rms_norm_eps)
    p.logits(n, "model.embed_tokens" if config.tie_word_embeddings else "lm_head", config.vocab_size)
    return p.finish()


def _feed_forward(p: Builder, mlp: str, n: Buffer, size: int) -> Buffer:
    """This rank's part of a gated feed-forward layer of `size` features."""
    hidden, features = n.width, p.share.split(size, BLOCK)
    gate, up = p.linear(
        n,
        gate=p.matrix(f"{mlp}.gate_proj", (size, hidden), rows=features),
        up=p.matrix(f"{mlp}.up_proj", (size, hidden), rows=features),
    )
    g = p.glu(up, gate, features, size)
    (d,) = p.linear(g, down=p.matrix(f"{mlp}.down_proj", (hidden, size), columns=features))
    return d


def _stacked(p: Builder, attn: str, full: tuple[int, int], rows: Range) -> list[Matrix]:
    """Rows `rows` of `q_proj` stacked on `k_proj`, each of shape `full`; what a rank does not need is left out."""
    half = full[0]
    upper = Range(min(rows.start, half), min(rows.stop, half))
    lower = Range(max(rows.start, half) - half, max(rows.stop, half) - half)
    return [p.matrix(f"{attn}.{name}", full, rows=part) for name, part in (("q_proj", upper), ("k_proj", lower))]
