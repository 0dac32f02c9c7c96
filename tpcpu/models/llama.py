"""Llama: grouped-query attention and a gated feed-forward layer (`model_type` `llama`).

Source: Touvron et al., 2023 (arXiv 2302.13971, 2307.09288); names and keys as published on Hugging Face. What other
families have in this frame, biases of some projections, norms of heads and windows of some layers, is in the config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpcpu.models.heads import HeadSplit
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys
from tpcpu.models.rope import TYPES, RopeReader
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Buffer, Program
from tpcpu.program.rope import Rope

OPTIONAL_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")
"""Stored by some writers and not needed: frequencies that are computed anew, a head equal to a tied embedding."""

FeedForward = Callable[[Builder, Buffer], Buffer]
"""Adds what follows the second norm of a layer, whose result it is given; gives this rank's part of the sum."""


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
    """The longest text, with what `rope` makes longer."""
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    head_norms: bool
    """Whether each head of q and of k goes through a norm."""
    windows: tuple[int, ...]
    """By layer the positions that a token sees, its own included; 0: all."""
    sinks: bool
    """Whether each head has one score more than there are positions, `self_attn.sinks`."""

    @classmethod
    def read(
        cls, keys: Keys, *, kv_heads: int | None = None, head_dim: int = 0, positions: int = 2048, eps: float = 1e-6,
        theta: float = 10000.0, types: tuple[str, ...] = TYPES, partial: bool = False,
        qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False, head_norms: bool = False,
        sinks: bool = False,
    ) -> "LlamaConfig":  # fmt: skip
        """What this frame's families have in common, without windows; the arguments are what a family means where
        its config says nothing, and what it has."""
        keys.require("hidden_act", "silu")
        hidden = keys.integer("hidden_size", maximum=MAX_WIDTH)
        heads = keys.integer("num_attention_heads", maximum=MAX_HEADS)
        kv_heads = keys.integer("num_key_value_heads", heads if kv_heads is None else kv_heads)
        keys.divisible("num_attention_heads", heads, "num_key_value_heads", kv_heads)
        dim = keys.integer("head_dim", head_dim, minimum=0, maximum=MAX_WIDTH // heads) or keys.divisible(
            "hidden_size", hidden, "num_attention_heads", heads
        )
        keys.divisible("head_dim", dim, "the rotated pair", 2)
        layers = keys.integer("num_hidden_layers", maximum=MAX_LAYERS)
        positions = keys.integer("max_position_embeddings", positions)
        rope, positions = RopeReader(dim, positions, theta, partial=partial, types=types).read(keys)
        return cls(
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size", maximum=MAX_WIDTH),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            vocab_size=keys.integer("vocab_size"),
            max_position_embeddings=positions,
            rms_norm_eps=keys.number("rms_norm_eps", eps),
            rope=rope,
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=mlp_bias,
            head_norms=head_norms,
            windows=(0,) * layers,
            sinks=sinks,
        )


def from_dict(config: dict[str, Any]) -> LlamaConfig:
    # pretraining_tp only changes the order in which the original code adds.
    keys = Keys(config, ignored=("pretraining_tp",))
    bias = keys.flag("attention_bias")
    made = LlamaConfig.read(keys, qkv_bias=bias, o_bias=bias, mlp_bias=keys.flag("mlp_bias"))
    keys.finish()
    return made


def feed_forward(p: Builder, module: str, n: Buffer, size: int, *, bias: bool = False) -> Buffer:
    """This rank's part of a gated feed-forward layer of `size` features; `bias`: of gates and ups."""
    hidden, features = n.width, p.share.split(size, BLOCK)
    gate, up = p.linear(
        n,
        gate=p.matrix(f"{module}.gate_proj", (size, hidden), rows=features, bias=bias),
        up=p.matrix(f"{module}.up_proj", (size, hidden), rows=features, bias=bias),
    )
    g = p.glu(gate, up, features, size)
    (d,) = p.linear(g, down=p.matrix(f"{module}.down_proj", (hidden, size), columns=features))
    return d


def program(config: LlamaConfig, share: Share, layer_of: FeedForward | None = None) -> Program:
    """`layer_of`: what a family has in the place of the feed-forward layer."""
    hidden, dim, ffn, eps = config.hidden_size, config.head_dim, config.intermediate_size, config.rms_norm_eps
    heads = HeadSplit(share, config.num_attention_heads, config.num_key_value_heads, dim)
    q_rows, kv_rows, _ = heads.rows
    full_q, full_kv, _ = heads.full_rows

    p = Builder(share)
    x = p.embed("model.embed_tokens", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"model.layers.{p.layer}"

        attn, bias = f"{layer}.self_attn", config.qkv_bias
        n = p.rms_norm(x, f"{layer}.input_layernorm", eps)
        q, k, v = p.linear(
            n,
            q=p.matrix(f"{attn}.q_proj", (full_q, hidden), rows=q_rows, bias=bias),
            k=p.matrix(f"{attn}.k_proj", (full_kv, hidden), rows=kv_rows, bias=bias),
            v=p.matrix(f"{attn}.v_proj", (full_kv, hidden), rows=kv_rows, bias=bias),
        )
        norms = [p.vector(f"{attn}.{name}_norm.weight", dim) for name in "qk" if config.head_norms]
        a = heads.attend(
            p, q, k, v, config.rope, dim**-0.5, window=config.windows[p.layer], norms=norms, eps=eps,
            sinks=f"{attn}.sinks" if config.sinks else "",
        )  # fmt: skip
        (o,) = p.linear(a, o=p.matrix(f"{attn}.o_proj", (hidden, full_q), columns=q_rows))
        x = p.add(x, p.all_reduce(o), p.vector(f"{attn}.o_proj.bias", hidden) if config.o_bias else None)

        mlp, bias = f"{layer}.mlp", config.mlp_bias
        n = p.rms_norm(x, f"{layer}.post_attention_layernorm", eps)
        d = layer_of(p, n) if layer_of else feed_forward(p, mlp, n, ffn, bias=bias)
        x = p.add(x, p.all_reduce(d), p.vector(f"{mlp}.down_proj.bias", hidden) if bias else None)
    p.layer = -1
    n = p.rms_norm(x, "model.norm", eps)
    p.logits(n, "model.embed_tokens" if config.tie_word_embeddings else "lm_head", config.vocab_size)
    return p.finish()
