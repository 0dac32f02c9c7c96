"""The layers of experts of Yuan 2.0-M32, whose router is an attention of the experts to one another.

Source: Wu et al., 2024 (arXiv 2405.17976) and the published Hugging Face code. Of an expert's `w1` the first half is
activated.
"""

from dataclasses import dataclass
from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models.heads import packed
from tpcpu.models.keys import MAX_WIDTH, Keys, shown
from tpcpu.models.mixtral import MAX_EXPERTS
from tpcpu.program.builder import Builder
from tpcpu.program.operations import BLOCK, Buffer, Expert, Kind


@dataclass(frozen=True)
class YuanExperts:
    count: int
    chosen: int
    """How many a token has."""
    size: int
    """Features of each."""
    normalised: bool
    """Whether the weights of a token's experts add up to 1."""


def read_experts(keys: Keys) -> YuanExperts | None:
    """What `moe_config` says; None where a model has no experts."""
    values: Any = keys.get("moe_config", {})
    if not isinstance(values, dict):
        raise ConfigError(f"config.json: moe_config is {shown(values)}; expected an object")
    if not keys.flag("use_moe", bool(values)):
        if values:
            raise ConfigError("config.json: use_moe is false, and there is a moe_config; expected no moe_config")
        return None
    inner = Keys(values, inside="moe_config.")
    count = inner.integer("moe_num_experts", maximum=MAX_EXPERTS)
    if not inner.flag("gated_linear_unit", True):
        raise ConfigError("config.json: moe_config.gated_linear_unit = False is not supported; only True is")
    made = YuanExperts(
        count=count,
        chosen=inner.integer("moe_top_k", maximum=count),
        size=inner.integer("ffn_hidden_size", maximum=MAX_WIDTH),
        normalised=inner.flag("norm_topk_prob", True),
    )
    inner.finish()
    return made


def layer(p: Builder, module: str, n: Buffer, experts: YuanExperts) -> Buffer:
    """This rank's part of a layer of experts: of every one it has some features."""
    size, features = experts.size, p.share.split(experts.size, BLOCK)
    router = {
        name: p.matrix(f"{module}.gate.{name}", (experts.count, n.width), kind=Kind.ROUTER)
        for name in ("query", "key", "value")
    }
    scores = p.expert_attention(*p.linear(n, **router))
    made = []
    for number in range(experts.count):
        expert = f"{module}.experts.{number}"
        both = packed(p, f"{expert}.w1", n.width, {"gate": (size, features), "up": (size, features)})
        down = p.matrix(f"{expert}.w2", (n.width, size), columns=features)
        made.append(Expert(both["gate"].weight, both["up"].weight, down.weight))
    return p.experts(n, scores, experts.chosen, made, features, size, normalised=experts.normalised)
