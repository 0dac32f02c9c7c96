"""Mixtures of experts in Llama's frame, and Mixtral among them (`model_type` `mixtral`).

Source: Jiang et al., 2024 (arXiv 2401.04088); names and keys as published on Hugging Face. What other families have in
this frame, experts that all tokens share and layers without experts, is in the config.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models import llama
from tpcpu.models.keys import Keys
from tpcpu.models.llama import OPTIONAL_TENSORS, LlamaConfig, feed_forward
from tpcpu.parallel.partition import Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Buffer, Kind, Program

__all__ = ["OPTIONAL_TENSORS", "MixtureConfig", "from_dict", "program"]

MAX_EXPERTS = 2**12
"""Far beyond any model."""

TRAINING = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
"""Keys of what happens in training only."""


@dataclass(frozen=True)
class MixtureConfig(LlamaConfig):
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    """Whether the weights of a token's experts add up to 1."""
    expert_size: int
    shared_size: int
    """Features of the expert that all tokens have, behind a gate of its own; 0: there is none."""
    mixed: tuple[bool, ...]
    """By layer whether it has experts; others have a plain feed-forward layer."""
    module: str = "mlp"
    """What a layer calls its experts, and the activated, the other and the last matrix of one."""
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def read_experts(keys: Keys, names: tuple[str, ...], experts: int, chosen: int) -> tuple[int, int]:
    """How many experts there are, by the first of these keys that is there, and how many a token has."""
    given = {name: keys.integer(name, maximum=MAX_EXPERTS) for name in names if keys.get(name) is not None}
    if len(set(given.values())) > 1:
        named = " and ".join(f"{name} = {value}" for name, value in given.items())
        raise ConfigError(f"config.json: {named}; expected the same number")
    experts = next(iter(given.values()), experts)
    return experts, keys.integer("num_experts_per_tok", min(chosen, experts), maximum=experts)


def from_dict(config: dict[str, Any]) -> MixtureConfig:
    """Every layer has experts, and nothing else."""
    keys = Keys(config, ignored=TRAINING)
    frame = LlamaConfig.read(keys, kv_heads=8, positions=4096 * 32, eps=1e-5, theta=1e6)
    experts, chosen = read_experts(keys, ("num_local_experts", "num_experts"), 8, 2)
    window = keys.integer("sliding_window", 0, minimum=0)
    keys.finish()
    layers = frame.num_hidden_layers
    return MixtureConfig(
        **{**vars(frame), "windows": (window,) * layers},
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        expert_size=frame.intermediate_size,
        shared_size=0,
        mixed=(True,) * layers,
        module="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
    )


def program(config: MixtureConfig, share: Share) -> Program:
    def layer(p: Builder, n: Buffer) -> Buffer:
        if not config.mixed[p.layer]:
            return feed_forward(p, f"model.layers.{p.layer}.mlp", n, config.intermediate_size)
        return _mixture(p, config, n)

    return llama.program(config, share, layer)


def _mixture(p: Builder, config: MixtureConfig, n: Buffer) -> Buffer:
    """This rank's part of a layer of experts: of every one it has some features."""
    hidden, size, module = config.hidden_size, config.expert_size, f"model.layers.{p.layer}.{config.module}"
    features = p.share.split(size, BLOCK)
    router = p.matrix(f"{module}.gate", (config.num_experts, hidden), kind=Kind.ROUTER)
    if config.shared_size:
        gate = p.matrix(f"{module}.shared_expert_gate", (1, hidden), kind=Kind.ROUTER)
        scores, opened = p.linear(n, scores=router, gate=gate)
        shared = feed_forward(p, f"{module}.shared_expert", n, config.shared_size)
    else:
        (scores,) = p.linear(n, scores=router)
    gate_name, up_name, down_name = config.matrices
    experts = []
    for number in range(config.num_experts):
        expert = f"{module}.experts.{number}"
        names = f"{expert}.{gate_name}", f"{expert}.{up_name}", f"{expert}.{down_name}"
        experts.append(p.expert(names, hidden, features, size))
    y = p.experts(
        n, scores, config.num_experts_per_tok, experts, features, size, normalised=config.norm_topk_prob
    )  # fmt: skip
    return p.gated_add(y, shared, opened) if config.shared_size else y
