"""Gemma 2 and the text model of Gemma 3: norms before and after, soft caps, windows in some layers (`gemma2`,
`gemma3_text`).

Source: Gemma Team, 2024 (arXiv 2408.00118) and 2025 (2503.19786); names and keys as published on Hugging Face. Norms
multiply by 1 + weight; embeddings are multiplied by the root of the hidden size. Gemma 3 has norms of the heads of q
and k instead of the cap of scores, and a base of its own for the layers with a window.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models.heads import HeadSplit
from tpcpu.models.keys import MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Keys, shown
from tpcpu.models.rope import RopeReader
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Activation, Program
from tpcpu.program.rope import Rope

OPTIONAL_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")
"""Stored by some writers and not needed: frequencies that are computed anew, a head equal to a tied embedding."""


@dataclass(frozen=True)
class GemmaConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    query_pre_attn_scalar: float
    attn_cap: float
    final_cap: float
    head_norms: bool
    windows: tuple[int, ...]
    """By layer the positions that a token sees, its own included; 0: all."""
    ropes: tuple[Rope, Rope]
    """Of layers that see everything, and of those with a window."""


def gemma2_from_dict(config: dict[str, Any]) -> GemmaConfig:
    """Every other layer has a window, the first among them; all turn alike."""
    keys = Keys(config, ignored=_IGNORED)
    layers = keys.integer("num_hidden_layers", 26, maximum=MAX_LAYERS)
    sliding = keys.sliding(layers, lambda layer: layer % 2 == 0)
    dim, positions = _head_dim(keys), keys.integer("max_position_embeddings", 8192)
    rope, positions = RopeReader(dim, positions).read(keys)
    return _read(keys, sliding, (rope, rope), positions, attn_cap=50.0, final_cap=30.0, head_norms=False)


def gemma3_from_dict(config: dict[str, Any]) -> GemmaConfig:
    """Of six layers five have a window; these turn with a base of their own, and never scaled."""
    keys = Keys(config, ignored=_IGNORED)
    layers = keys.integer("num_hidden_layers", 26, maximum=MAX_LAYERS)
    pattern = keys.integer("sliding_window_pattern", keys.integer("_sliding_window_pattern", 6))
    sliding = keys.sliding(layers, lambda layer: (layer + 1) % pattern != 0)
    dim, positions = _head_dim(keys), keys.integer("max_position_embeddings", 131072)
    if not isinstance(keys.get("rope_parameters", {}), dict):
        raise ConfigError(f"config.json: rope_parameters is {shown(keys.get('rope_parameters'))}; expected an object")
    bases = keys.number("rope_theta", 1e6), keys.number("rope_local_base_freq", 1e4)
    kinds = Keys(keys.get("rope_parameters", {}), inside="rope_parameters.")
    windowed, full, name = kinds.get("sliding_attention", {}), kinds.get("full_attention", {}), "rope_parameters"
    kinds.finish()
    if keys.get("rope_scaling") is not None:
        full, name = keys.get("rope_scaling"), "rope_scaling"
    local, _ = RopeReader(dim, positions, types=("default",)).read_object("rope_parameters", windowed, bases[1])
    rope, positions = RopeReader(dim, positions).read_object(name, full, bases[0], trained=positions)
    return _read(keys, sliding, (rope, local), positions, attn_cap=0.0, final_cap=0.0, head_norms=True)


# The kind of cache is the server's own; Gemma 2 configs name the activation twice, and only the other key is read.
_IGNORED = ("cache_implementation", "hidden_act")


def _head_dim(keys: Keys) -> int:
    heads = keys.integer("num_attention_heads", 8, maximum=MAX_HEADS)
    return keys.integer("head_dim", 256, maximum=MAX_WIDTH // heads)


def _read(
    keys: Keys, sliding: list[bool], ropes: tuple[Rope, Rope], positions: int, *, attn_cap: float, final_cap: float,
    head_norms: bool,
) -> GemmaConfig:  # fmt: skip
    """The rest; `attn_cap` and `final_cap` are meant where the config has no such key, null switches them off."""
    keys.require("hidden_activation", "gelu_pytorch_tanh")
    keys.require("attention_bias", False)
    keys.require("use_bidirectional_attention", False)
    heads, kv_heads = keys.integer("num_attention_heads", 8), keys.integer("num_key_value_heads", 4)
    keys.divisible("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    caps = {"attn_logit_softcapping": attn_cap, "final_logit_softcapping": final_cap}
    attn_cap, final_cap = (
        0.0 if keys.nothing(key) else keys.number(key, default, zero=True) for key, default in caps.items()
    )
    window = keys.integer("sliding_window", 4096)
    made = GemmaConfig(
        hidden_size=keys.integer("hidden_size", 2304, maximum=MAX_WIDTH),
        intermediate_size=keys.integer("intermediate_size", 9216, maximum=MAX_WIDTH),
        num_hidden_layers=len(sliding),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(keys),
        vocab_size=keys.integer("vocab_size"),
        max_position_embeddings=positions,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        query_pre_attn_scalar=keys.number("query_pre_attn_scalar", 256),
        attn_cap=attn_cap,
        final_cap=final_cap,
        head_norms=head_norms,
        windows=tuple(window if is_sliding else 0 for is_sliding in sliding),
        ropes=ropes,
    )
    keys.finish()
    return made


def program(config: GemmaConfig, share: Share) -> Program:
    hidden, dim, ffn, eps = config.hidden_size, config.head_dim, config.intermediate_size, config.rms_norm_eps
    heads = HeadSplit(share, config.num_attention_heads, config.num_key_value_heads, dim)
    q_rows, kv_rows, _ = heads.rows
    full_q, full_kv, _ = heads.full_rows
    features = share.split(ffn, BLOCK)

    p = Builder(share)
    x = p.embed("model.embed_tokens", config.vocab_size, hidden, hidden**0.5)
    for p.layer in range(config.num_hidden_layers):
        layer, window = f"model.layers.{p.layer}", config.windows[p.layer]
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"

        n = p.rms_norm(x, f"{layer}.input_layernorm", eps, plus=1)
        q, k, v = p.linear(
            n,
            q=p.matrix(f"{attn}.q_proj", (full_q, hidden), rows=q_rows),
            k=p.matrix(f"{attn}.k_proj", (full_kv, hidden), rows=kv_rows),
            v=p.matrix(f"{attn}.v_proj", (full_kv, hidden), rows=kv_rows),
        )
        norms = [p.vector(f"{attn}.{name}_norm.weight", dim, plus=1) for name in "qk" if config.head_norms]
        a = heads.attend(
            p, q, k, v, config.ropes[window > 0], config.query_pre_attn_scalar**-0.5, window=window,
            norms=norms, eps=eps, cap=config.attn_cap,
        )  # fmt: skip
        (o,) = p.linear(a, o=p.matrix(f"{attn}.o_proj", (hidden, full_q), columns=q_rows))
        x = p.add(x, p.rms_norm(p.all_reduce(o), f"{layer}.post_attention_layernorm", eps, plus=1))

        n = p.rms_norm(x, f"{layer}.pre_feedforward_layernorm", eps, plus=1)
        gate, up = p.linear(
            n,
            gate=p.matrix(f"{mlp}.gate_proj", (ffn, hidden), rows=features),
            up=p.matrix(f"{mlp}.up_proj", (ffn, hidden), rows=features),
        )
        g = p.glu(gate, up, features, ffn, Activation.GELU_TANH)
        (d,) = p.linear(g, down=p.matrix(f"{mlp}.down_proj", (hidden, ffn), columns=features))
        x = p.add(x, p.rms_norm(p.all_reduce(d), f"{layer}.post_feedforward_layernorm", eps, plus=1))
    p.layer = -1
    n = p.rms_norm(x, "model.norm", eps, plus=1)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    p.logits(n, head, config.vocab_size, cap=config.final_cap)
    return p.finish()
