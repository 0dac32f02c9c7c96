"""DeepSeek-V2 and V3: multi-head latent attention, and mixtures with shared experts (`deepseek_v2`, `deepseek_v3`).

Source: DeepSeek-AI, 2024 (arXiv 2405.04434, 2412.19437); names and keys as published on Hugging Face.

The cache keeps what keys and values of all heads are made of: a latent vector, and one rotated key, 576 features of a
token in the published models. So keys are not made: a head's query is multiplied with its rows of `kv_b_proj` instead
(they are *absorbed*), attends over latent vectors as keys and as values, and its result goes through its other rows.
Heads are divided over ranks, and the cache, which has none, is on every rank. So are the projections that make queries
and latent vectors narrow: each rank computes them whole, because norms and the cache need all of what they give.
Divided, they would be joined by one more all-reduce a layer. Of V3 each rank reads 7.8 MB of them in NF4, of 85 MB a
layer on 4 ranks: at 250 GB/s three quarters of that are 23 us, about twice what an all-reduce in a host takes. On 16
ranks they are 7.8 of 30 MB, but there the messages go between hosts, and the wait is as long as what it would save.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models.heads import packed
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys, shown
from tpcpu.models.llama import feed_forward
from tpcpu.models.mixtral import MAX_EXPERTS, TRAINING
from tpcpu.models.rope import RopeReader
from tpcpu.parallel.partition import Range, Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Buffer, Heads, Kind, Program, Scoring
from tpcpu.program.rope import Rope, YarnScaling, yarn_length

NORM_EPS = 1e-6
"""Of the norms of narrow queries and latent vectors: fixed in the published code, whatever `rms_norm_eps` is."""


@dataclass(frozen=True)
class DeepseekConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    scale: float
    """Of scores: that of the heads that are not made, times what yarn adds for a longer text."""
    q_lora_rank: int
    """0: queries are made of activations at once."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    tie_word_embeddings: bool
    mixed: tuple[bool, ...]
    """By layer whether it has experts; others have a plain feed-forward layer."""
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_size: int
    """Features of the experts that all tokens have; 0: there are none."""
    scoring: Scoring
    corrected: bool
    """Whether something is added to scores where they are compared."""
    groups: tuple[int, int, int]
    """Of experts: how many, how many of them are kept, and by the sum of how many of their best experts."""
    norm_topk_prob: bool
    routed_scaling_factor: float
    predicting_layers: int
    """Layers behind the others that predict further tokens."""


def v2_from_dict(config: dict[str, Any]) -> DeepseekConfig:
    keys = _keys(config)
    method = keys.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"config.json: topk_method is {shown(method)}; expected greedy or group_limited_greedy")
    experts = keys.integer("n_routed_experts", maximum=MAX_EXPERTS)
    groups = (1, 1, 1)
    if method == "greedy":
        # Written beside it, for the other method.
        keys.get("n_group"), keys.get("topk_group")
    else:
        groups = _groups(keys, experts, best=1)
    keys.require("scoring_func", "softmax")
    # The authors scale weights that are not divided by their sum, and only those; transformers divides none.
    keys.require("norm_topk_prob", False)
    keys.require("mlp_bias", False)
    made = _read(keys, Scoring.SOFTMAX, groups, interleaved=True)
    keys.finish()
    return made


def v3_from_dict(config: dict[str, Any]) -> DeepseekConfig:
    keys = _keys(config)
    keys.require("topk_method", "noaux_tc")
    keys.require("scoring_func", "sigmoid")
    experts = keys.integer("n_routed_experts", maximum=MAX_EXPERTS)
    groups = _groups(keys, experts, best=2)
    made = _read(keys, Scoring.SIGMOID, groups, interleaved=keys.flag("rope_interleave", True))
    made = replace(
        made, corrected=True, norm_topk_prob=keys.flag("norm_topk_prob", True),
        predicting_layers=keys.integer("num_nextn_predict_layers", 0, minimum=0, maximum=MAX_LAYERS),
    )  # fmt: skip
    keys.finish()
    return made


def _keys(config: dict[str, Any]) -> Keys:
    return Keys(
        config,
        ignored=(
            *TRAINING, "aux_loss_alpha", "seq_aux",
            # How the authors divide a model over processes, and how they add.
            "ep_size", "pretraining_tp",
        ),
    )  # fmt: skip


def _groups(keys: Keys, experts: int, best: int) -> tuple[int, int, int]:
    groups = keys.integer("n_group", maximum=experts)
    size = keys.divisible("n_routed_experts", experts, "n_group", groups)
    kept = keys.integer("topk_group", maximum=groups)
    if size < best or kept * size < keys.integer("num_experts_per_tok"):
        raise ConfigError(
            f"config.json: topk_group = {kept} groups of {size} experts; expected groups of at least {best}, "
            f"and num_experts_per_tok = {keys.integer('num_experts_per_tok')} experts in them"
        )
    return groups, kept, best


def _read(keys: Keys, scoring: Scoring, groups: tuple[int, int, int], *, interleaved: bool) -> DeepseekConfig:
    """What both have in common; keys of only one are left to be read."""
    keys.require("hidden_act", "silu")
    heads = keys.integer("num_attention_heads", maximum=MAX_HEADS)
    keys.require("num_key_value_heads", heads)
    layers = keys.integer("num_hidden_layers", maximum=MAX_LAYERS)
    widest = MAX_WIDTH // heads
    nope, turned = (keys.integer(f"qk_{part}_head_dim", maximum=widest) for part in ("nope", "rope"))
    keys.divisible("qk_rope_head_dim", turned, "the rotated pair", 2)
    # What follows from the two: written by transformers.
    keys.require("head_dim", turned)
    keys.require("qk_head_dim", nope + turned)
    rope, positions = RopeReader(turned, keys.integer("max_position_embeddings")).read(keys)
    experts = keys.integer("n_routed_experts", maximum=MAX_EXPERTS)
    size = keys.integer("moe_intermediate_size", maximum=MAX_WIDTH)
    first, every = keys.integer("first_k_dense_replace", 0, minimum=0), keys.integer("moe_layer_freq", 1)
    return DeepseekConfig(
        hidden_size=keys.integer("hidden_size", maximum=MAX_WIDTH),
        intermediate_size=keys.integer("intermediate_size", maximum=MAX_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=keys.integer("vocab_size"),
        max_position_embeddings=positions,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=replace(rope, interleaved=interleaved),
        scale=(nope + turned) ** -0.5 * _stretch(keys, rope) ** 2,
        q_lora_rank=keys.integer("q_lora_rank", 0, minimum=0, maximum=MAX_WIDTH),
        kv_lora_rank=keys.integer("kv_lora_rank", maximum=widest),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=turned,
        v_head_dim=keys.integer("v_head_dim", maximum=widest),
        attention_bias=keys.flag("attention_bias"),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        mixed=tuple(layer >= first and layer % every == 0 for layer in range(layers)),
        n_routed_experts=experts,
        num_experts_per_tok=keys.integer("num_experts_per_tok", maximum=experts),
        moe_intermediate_size=size,
        shared_size=size * keys.integer("n_shared_experts", 0, minimum=0, maximum=MAX_WIDTH // size),
        scoring=scoring,
        corrected=False,
        groups=groups,
        norm_topk_prob=False,
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        predicting_layers=0,
    )


def _stretch(keys: Keys, rope: Rope) -> float:
    """What yarn multiplies queries and keys by beside the rotated part, which has it in `rope.length`."""
    if not isinstance(rope.scaling, YarnScaling):
        return 1.0
    values = keys.get("rope_scaling") or keys.get("rope_parameters")
    scale = Keys(values, inside="rope_scaling.").number("mscale_all_dim", 0.0, zero=True)
    return yarn_length(rope.scaling.factor, scale) if scale else 1.0


def optional_tensors(config: DeepseekConfig) -> Sequence[str]:
    """Frequencies that are computed anew, a head equal to a tied embedding, and the layers behind the last one, which
    guess further tokens: the next ones are drawn from what the model itself says of them."""
    behind = range(config.num_hidden_layers, config.num_hidden_layers + config.predicting_layers)
    guessing = [rf"model\.layers\.{layer}\..*" for layer in behind]
    return (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight", *guessing)


def program(config: DeepseekConfig, share: Share) -> Program:
    hidden, eps = config.hidden_size, config.rms_norm_eps

    p = Builder(share)
    x = p.embed("model.embed_tokens", config.vocab_size, hidden)
    for p.layer in range(config.num_hidden_layers):
        layer = f"model.layers.{p.layer}"
        n = p.rms_norm(x, f"{layer}.input_layernorm", eps)
        o = _attention(p, config, f"{layer}.self_attn", n)
        bias = p.vector(f"{layer}.self_attn.o_proj.bias", hidden) if config.attention_bias else None
        x = p.add(x, p.all_reduce(o), bias)
        n = p.rms_norm(x, f"{layer}.post_attention_layernorm", eps)
        mixed = config.mixed[p.layer]
        d = _mixture(p, config, n) if mixed else feed_forward(p, f"{layer}.mlp", n, config.intermediate_size)
        x = p.add(x, p.all_reduce(d))
    p.layer = -1
    n = p.rms_norm(x, "model.norm", eps)
    p.logits(n, "model.embed_tokens" if config.tie_word_embeddings else "lm_head", config.vocab_size)
    return p.finish()


def _attention(p: Builder, config: DeepseekConfig, attn: str, n: Buffer) -> Buffer:
    """This rank's part of multi-head latent attention."""
    hidden, rank, heads = config.hidden_size, config.kv_lora_rank, config.num_attention_heads
    nope, turned, wide, bias = (
        config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.attention_bias
    )  # fmt: skip
    local, dim, step = p.share.split(heads), nope + turned, nope + wide
    count, narrow = len(local), config.q_lora_rank
    parts = {"latent": (rank, Range(0, rank)), "rope": (turned, Range(0, turned))}
    down = packed(p, f"{attn}.kv_a_proj_with_mqa", hidden, parts, bias)
    if narrow:
        q, latent, k = p.linear(n, q_a=p.matrix(f"{attn}.q_a_proj", (narrow, hidden), bias=bias), **down)
        q = p.rms_norm(q, f"{attn}.q_a_layernorm", NORM_EPS)
        (q,) = p.linear(q, q=p.matrix(f"{attn}.q_b_proj", (heads * dim, narrow), rows=local * dim))
    else:
        q, latent, k = p.linear(n, q=p.matrix(f"{attn}.q_proj", (heads * dim, hidden), rows=local * dim), **down)
    latent = p.rms_norm(latent, f"{attn}.kv_a_layernorm", NORM_EPS)
    # Of each head the rows that would make keys, then those that would make values.
    up = p.matrix(f"{attn}.kv_b_proj", (heads * step, rank), rows=local * step).weight
    absorbed = p.linear_by_heads(Heads(q, count, nope, 0, dim), up, nope, 0, step, turned=True)
    rotated = p.rope_and_store_latent(
        Heads(absorbed, count, rank, 0, rank), Heads(q, count, turned, nope, dim),
        Heads(latent, 1, rank, 0, rank), Heads(k, 1, turned, 0, turned), config.rope,
    )  # fmt: skip
    a = p.attention(rotated, local, heads, (0,) * count, config.scale, value_dim=rank)
    v = p.linear_by_heads(
        Heads(a, count, rank, a.own.start, rank), up, wide, nope, step, covering=(local, heads)
    )  # fmt: skip
    (o,) = p.linear(v, o=p.matrix(f"{attn}.o_proj", (hidden, heads * wide), columns=local * wide))
    return o


def _mixture(p: Builder, config: DeepseekConfig, n: Buffer) -> Buffer:
    """This rank's part of a layer of experts: of every one it has some features."""
    hidden, size, module = config.hidden_size, config.moe_intermediate_size, f"model.layers.{p.layer}.mlp"
    count, features = config.n_routed_experts, p.share.split(config.moe_intermediate_size, BLOCK)
    (scores,) = p.linear(n, scores=p.matrix(f"{module}.gate", (count, hidden), kind=Kind.ROUTER))
    shared = feed_forward(p, f"{module}.shared_experts", n, config.shared_size) if config.shared_size else None
    experts = []
    for number in range(count):
        names = tuple(f"{module}.experts.{number}.{name}_proj" for name in ("gate", "up", "down"))
        experts.append(p.expert((names[0], names[1], names[2]), hidden, features, size))
    y = p.experts(
        n, scores, config.num_experts_per_tok, experts, features, size, normalised=config.norm_topk_prob,
        scoring=config.scoring, groups=config.groups, factor=config.routed_scaling_factor,
        correction=p.vector(f"{module}.gate.e_score_correction_bias", count) if config.corrected else None,
    )  # fmt: skip
    return p.add(y, shared) if shared else y
