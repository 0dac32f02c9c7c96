"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped gate (`gpt_oss`).

Source: OpenAI, 2025 (arXiv 2508.10925); names and keys as published on Hugging Face. Files hold the experts of a layer
stacked: in mxfp4 by the rows of their matrices, as transformers writes them by their columns; rows of gate and up, or
columns, alternate.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.checkpoint import Stack
from tpcpu.models import llama
from tpcpu.models.keys import Keys
from tpcpu.models.llama import OPTIONAL_TENSORS, LlamaConfig
from tpcpu.models.mixtral import TRAINING, read_experts
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Buffer, Clamp, Kind, Program

__all__ = ["OPTIONAL_TENSORS", "STACKS", "GptOssConfig", "from_dict", "program"]

_GATE_UP, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)


def _stack(stored: str, suffix: str, dims: int, *, turned: bool = False) -> tuple[Stack, Stack]:
    """Of gates and ups, and of downs."""
    names = {"gate_up_proj": _GATE_UP, "down_proj": _DOWN}
    gate_up, down = (
        Stack(f"{name}{stored}", tuple(f"{part}.{suffix}" for part in parts), dims, turned)
        for name, parts in names.items()
    )
    return gate_up, down


STACKS = (
    *_stack("", "weight", 3, turned=True),
    *_stack("_bias", "bias", 2),
    *_stack("_blocks", "weight", 4),
    *_stack("_scales", "weight.scales", 3),
)

_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What a config means that says nothing of it."""


@dataclass(frozen=True)
class GptOssConfig(LlamaConfig):
    num_experts: int
    num_experts_per_tok: int
    clamp: Clamp


def from_dict(config: dict[str, Any]) -> GptOssConfig:
    if config.get("rope_scaling") is None and config.get("rope_parameters") is None:
        config = {**config, "rope_parameters": _ROPE}
    # What the publisher's own code calls original_max_position_embeddings.
    keys = Keys(config, ignored=(*TRAINING, "initial_context_length"))
    bias = keys.flag("attention_bias", True)
    frame = LlamaConfig.read(
        keys, kv_heads=8, head_dim=64, positions=131072, eps=1e-5, theta=150000.0, qkv_bias=bias, o_bias=bias,
        sinks=True,
    )  # fmt: skip
    experts, chosen = read_experts(keys, ("num_local_experts", "num_experts"), 128, 4)
    # Its own name of the same.
    keys.require("experts_per_token", chosen)
    window = keys.integer("sliding_window", 128)
    sliding = keys.sliding(frame.num_hidden_layers, lambda layer: layer % 2 == 0)
    clamp = Clamp(keys.number("swiglu_limit", 7.0), keys.number("swiglu_alpha", 1.702))
    keys.finish()
    return GptOssConfig(
        **{**vars(frame), "windows": tuple(window if is_sliding else 0 for is_sliding in sliding)},
        num_experts=experts,
        num_experts_per_tok=chosen,
        clamp=clamp,
    )


def program(config: GptOssConfig, share: Share) -> Program:
    def experts(p: Builder, n: Buffer) -> Buffer:
        """This rank's part of a layer of experts: of every one it has some features."""
        hidden, size, mlp = config.hidden_size, config.intermediate_size, f"model.layers.{p.layer}.mlp"
        features = p.share.split(size, BLOCK)
        (scores,) = p.linear(
            n, scores=p.matrix(f"{mlp}.router", (config.num_experts, hidden), kind=Kind.ROUTER, bias=True)
        )
        made = []
        for number in range(config.num_experts):
            gate, up, down = (f"{mlp}.experts.{number}.{name}" for name in (*_GATE_UP, *_DOWN))
            made.append(p.expert((gate, up, down), hidden, features, size, bias=True))
        return p.experts(
            n, scores, config.num_experts_per_tok, made, features, size, normalised=True, clamp=config.clamp
        )

    return llama.program(config, share, experts)
