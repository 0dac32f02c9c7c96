"""Architectures that transformers has no class for, in torch, after the authors' published formulas.

Each takes the config and the tensors of a folder and gives logits `(tokens, vocab)` of one text. Written apart from the
package: complex rotations, whole masks, no cache.
"""

import math

import torch
from torch.nn.functional import conv2d, linear, normalize, silu


def chatglm(config, t, ids):
    """The code of `THUDM/chatglm2-6b`, of `chatglm3-6b` and `chatglm3-6b-32k`, and of `glm-4-9b`."""
    heads, dim, groups = config["num_attention_heads"], config["kv_channels"], config["multi_query_group_num"]
    half = dim // 2

    def turn(x):
        """The first half of each head, neighbours as complex numbers."""
        pairs = torch.view_as_complex(x[..., :half].reshape(*x.shape[:-1], half // 2, 2).contiguous())
        rates = (10000.0 * config["rope_ratio"]) ** (-torch.arange(0, half, 2) / half)
        spin = torch.polar(torch.ones(()), torch.arange(len(x))[:, None] * rates)[:, None, :]
        return torch.cat([torch.view_as_real(pairs * spin).flatten(-2), x[..., half:]], -1)

    x = t["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{i}"
        n = _norm(x, t[f"{name}.input_layernorm.weight"], config["layernorm_epsilon"])
        packed = linear(
            n, t[f"{name}.self_attention.query_key_value.weight"], t[f"{name}.self_attention.query_key_value.bias"]
        )
        q, k, v = packed.split([heads * dim, groups * dim, groups * dim], -1)
        a = _attend(
            turn(q.unflatten(-1, (heads, dim))), turn(k.unflatten(-1, (groups, dim))), v.unflatten(-1, (groups, dim))
        )
        x = x + linear(a, t[f"{name}.self_attention.dense.weight"])
        n = _norm(x, t[f"{name}.post_attention_layernorm.weight"], config["layernorm_epsilon"])
        gate, up = linear(n, t[f"{name}.mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        x = x + linear(silu(gate) * up, t[f"{name}.mlp.dense_4h_to_h.weight"])
    x = _norm(x, t["transformer.encoder.final_layernorm.weight"], config["layernorm_epsilon"])
    return linear(x, t["transformer.output_layer.weight"])


def baichuan(config, t, ids):
    """The code of `baichuan-inc/Baichuan2-7B-Base` and, without `max_position_embeddings`, of the 13B."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    bias = None
    if "max_position_embeddings" not in config:
        places = torch.arange(len(ids))
        bias = torch.tensor(_slopes(heads))[:, None, None] * (places[None, None, :] - places[None, :, None])
    x = t["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        packed = linear(_norm(x, t[f"{name}.input_layernorm.weight"], eps), t[f"{name}.self_attn.W_pack.weight"])
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in packed.unflatten(-1, (3, -1)).unbind(-2))
        if bias is None:
            q, k = _turn_halves(q, 10000.0), _turn_halves(k, 10000.0)
        x = x + linear(_attend(q, k, v, bias), t[f"{name}.self_attn.o_proj.weight"])
        n = _norm(x, t[f"{name}.post_attention_layernorm.weight"], eps)
        gate, up = (linear(n, t[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        x = x + linear(silu(gate) * up, t[f"{name}.mlp.down_proj.weight"])
    return linear(_norm(x, t["model.norm.weight"], eps), normalize(t["lm_head.weight"]))


def yuan(config, t, ids):
    """The code of `IEITYuan/Yuan2-2B-hf` and `Yuan2-M32-hf`, angles in float32 as their servers have them."""
    heads, eps, experts = config["num_attention_heads"], config["rms_norm_eps"], config.get("moe_config")
    turned, base = config["hidden_size"] // heads, config.get("rope_theta", 10000.0)

    def turn(x):
        return torch.cat([_turn_halves(x[..., :turned], base), x[..., turned:]], -1)

    def filtered(x, name):
        inner = x.T[None, :, :, None]
        for conv in ("conv1", "conv2"):
            # Zeros on both sides, and what the zeros behind the text make is dropped.
            weight, bias = t[f"{name}.{conv}.weight"], t[f"{name}.{conv}.bias"]
            inner = conv2d(inner, weight, bias, padding=(1, 0))[:, :, : len(x)]
        return _norm(inner[0, :, :, 0].T + x, t[f"{name}.output_layernorm.weight"], 1e-6)

    def mixture(n, name):
        q, k, v = (linear(n, t[f"{name}.gate.{part}.weight"]) for part in ("query", "key", "value"))
        scores = ((q[:, :, None] @ k[:, None, :]).softmax(-1) @ v[:, :, None])[:, :, 0]
        weights, chosen = scores.softmax(-1).topk(experts["moe_top_k"])
        if experts["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        rows = []
        for token in range(len(n)):
            total = torch.zeros(n.shape[1])
            for weight, number in zip(weights[token], chosen[token].tolist(), strict=True):
                opened, other = linear(n[token], t[f"{name}.experts.{number}.w1.weight"]).chunk(2)
                total += weight * linear(silu(opened) * other, t[f"{name}.experts.{number}.w2.weight"])
            rows.append(total)
        return torch.stack(rows)

    x = t["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        attn, mlp = f"{name}.self_attn", f"{name}.mlp"
        n = _norm(x, t[f"{name}.input_layernorm.weight"], eps)
        v = linear(n, t[f"{attn}.v_proj.weight"]).unflatten(-1, (heads, -1))
        u = filtered(n, f"{attn}.lf_gate")
        both = torch.cat([linear(u, t[f"{attn}.{part}_proj.weight"]) for part in "qk"], -1)
        q, k = both.unflatten(-1, (heads, -1)).chunk(2, -1)
        x = x + linear(_attend(turn(q), turn(k), v), t[f"{attn}.o_proj.weight"])
        n = _norm(x, t[f"{name}.post_attention_layernorm.weight"], eps)
        if experts:
            x = x + mixture(n, mlp)
        else:
            gate, up = (linear(n, t[f"{mlp}.{part}_proj.weight"]) for part in ("gate", "up"))
            x = x + linear(gate * silu(up), t[f"{mlp}.down_proj.weight"])
    return linear(_norm(x, t["model.norm.weight"], eps), t["model.embed_tokens.weight"])


def qwen(config, t, ids):
    """The code of `Qwen/Qwen-7B`, within `seq_length`."""
    heads, eps = config["num_attention_heads"], config["layer_norm_epsilon"]
    x = t["transformer.wte.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        name = f"transformer.h.{i}"
        packed = linear(
            _norm(x, t[f"{name}.ln_1.weight"], eps), t[f"{name}.attn.c_attn.weight"], t[f"{name}.attn.c_attn.bias"]
        )
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in packed.split(config["hidden_size"], -1))
        base = config["rotary_emb_base"]
        x = x + linear(_attend(_turn_halves(q, base), _turn_halves(k, base), v), t[f"{name}.attn.c_proj.weight"])
        n = _norm(x, t[f"{name}.ln_2.weight"], eps)
        opened = linear(n, t[f"{name}.mlp.w1.weight"]) * silu(linear(n, t[f"{name}.mlp.w2.weight"]))
        x = x + linear(opened, t[f"{name}.mlp.c_proj.weight"])
    return linear(_norm(x, t["transformer.ln_f.weight"], eps), t["lm_head.weight"])


def _norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _attend(q, k, v, bias=None):
    """q (tokens, heads, dim), k and v (tokens, groups, dim), a bias (heads, tokens, tokens): (tokens, heads * dim)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def _turn_halves(x, base):
    """Dimension j with j + dim / 2, as one complex number."""
    dim = x.shape[-1]
    low, high = x.chunk(2, -1)
    rates = base ** (-torch.arange(0, dim, 2) / dim)
    spun = torch.complex(low, high) * torch.polar(torch.ones(()), torch.arange(len(x))[:, None] * rates)[:, None, :]
    return torch.cat([spun.real, spun.imag], -1)


def _slopes(heads):
    """Press et al.: a geometric series for powers of two; in between, what twice as many heads have at odd places."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (i + 1) / heads) for i in range(heads)]
    below = 2 ** int(math.log2(heads))
    return _slopes(below) + _slopes(2 * below)[::2][: heads - below]
