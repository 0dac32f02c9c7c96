"""The bundled models in plain torch, float32: what others make of a folder that we wrote.

4-bit weights are read by bitsandbytes. Llama is transformers' own module; Yuan 2.0, whose published module is not on
a package index, is written down from its formulas. Shares no code with tpcpu.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad, silu

torch.set_num_threads(1)  # beside other work on the same cores, waiting for a second thread costs more than it gains

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", STATE.removeprefix("."))


def losses(folder: Path, documents: Sequence[Sequence[int]]) -> list[float]:
    """The sum of negative log likelihoods in nats of each document's ids, without its first."""
    config = json.loads((folder / "config.json").read_text())
    forward = {"llama": llama, "yuan": yuan}[config["model_type"]](config, tensors(folder))
    result = []
    with torch.inference_mode():
        for ids in documents:
            logits = forward(torch.tensor(list(ids)))
            result.append(float(cross_entropy(logits[:-1].double(), torch.tensor(list(ids[1:])), reduction="sum")))
    return result


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder in float32, those in NF4 as bitsandbytes reads them."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    result = {}
    for name, tensor in stored.items():
        if name + STATE in stored:
            state = QuantState.from_dict({f"{name}.{p}": stored[f"{name}.{p}"] for p in PARTS}, torch.device("cpu"))
            state.dtype = torch.float32  # the values themselves, not rounded to the dtype that they came from
            result[name] = dequantize_4bit(tensor, state)
        elif not any(name.endswith(f".{part}") for part in PARTS):
            result[name] = tensor.float()
    return result


def llama(config: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Logits (tokens, vocabulary) of ids (tokens,): transformers' module with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**plain, attn_implementation="eager")).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    if config["tie_word_embeddings"]:
        model.tie_weights()
    return lambda ids: model(ids[None]).logits[0]


def yuan(config: dict[str, Any], weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Logits (tokens, vocabulary) of ids (tokens,): Yuan 2.0 (arXiv 2311.15786), plain causal attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim, eps = hidden // heads, config["rms_norm_eps"]
    frequency = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[name] * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)

    def convolution(x: Tensor, name: str) -> Tensor:
        """Two taps over the previous token and this one; zero before the first."""
        taps = weights[f"{name}.weight"][..., 0]
        before = pad(x, (0, 0, 1, 0))[:-1]
        return linear(before, taps[:, :, 0]) + linear(x, taps[:, :, 1]) + weights[f"{name}.bias"]

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequency
        cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        low, high = x.chunk(2, -1)
        return x * cosine + torch.cat((-high, low), -1) * sine

    def attention(x: Tensor, layer: str) -> Tensor:
        tokens = len(x)
        gate = f"{layer}.lf_gate"
        twice = convolution(convolution(x, f"{gate}.conv1"), f"{gate}.conv2")
        filtered = norm(twice + x, f"{gate}.output_layernorm.weight")
        both = torch.cat((weights[f"{layer}.q_proj.weight"], weights[f"{layer}.k_proj.weight"]))
        query, key = linear(filtered, both).view(tokens, heads, 2, dim).permute(2, 1, 0, 3)
        value = linear(x, weights[f"{layer}.v_proj.weight"]).view(tokens, heads, dim).transpose(0, 1)
        scores = rotated(query) @ rotated(key).transpose(1, 2) * dim**-0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
        return linear(mixed.transpose(0, 1).reshape(tokens, hidden), weights[f"{layer}.o_proj.weight"])

    def mlp(x: Tensor, layer: str) -> Tensor:
        gate, up = (linear(x, weights[f"{layer}.{name}.weight"]) for name in ("gate_proj", "up_proj"))
        return linear(gate * silu(up), weights[f"{layer}.down_proj.weight"])

    def forward(ids: Tensor) -> Tensor:
        x = weights["model.embed_tokens.weight"][ids]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + attention(norm(x, f"{layer}.input_layernorm.weight"), f"{layer}.self_attn")
            x = x + mlp(norm(x, f"{layer}.post_attention_layernorm.weight"), f"{layer}.mlp")
        return linear(norm(x, "model.norm.weight"), weights["model.embed_tokens.weight"])

    return forward
