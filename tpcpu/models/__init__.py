"""Architectures: one file each, from a published config to a program. No numba, no MPI, no threads here.

To add one, write its file (config, weight names, `program`) and name it in `ARCHITECTURES`: see README.md here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tpcpu.checkpoint import Stack
from tpcpu.errors import ConfigError, LaunchError
from tpcpu.models import (
    baichuan,
    chatglm,
    deepseek,
    gemma,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen,
    qwen2,
    qwen_moe,
    yuan,
)
from tpcpu.models.keys import shown
from tpcpu.parallel.partition import Share
from tpcpu.program.operations import Kind, Program


class ModelConfig(Protocol):
    """What every architecture's config has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...


@dataclass(frozen=True)
class Architecture:
    """What one file of this folder offers."""

    read: Callable[[dict[str, Any]], ModelConfig]
    program: Callable[[Any, Share], Program]
    optional_tensors: tuple[str, ...] | Callable[[Any], Sequence[str]]
    """Patterns of stored tensors that nobody needs, or what gives them for a config."""
    models: str
    """Which published models this is,"""
    supported: str
    """and what of them, for the tables of the documentation."""
    stacks: tuple[Stack, ...] = ()
    """Tensors of all experts that files may hold."""


_ROPE = "rotary embedding `default`, `linear`, `dynamic`, `yarn`, `llama3`"

ARCHITECTURES = {
    "baichuan": Architecture(
        baichuan.from_dict, baichuan.program, baichuan.OPTIONAL_TENSORS,
        "Baichuan2 7B, 13B", "packed q, k, v; ALiBi of the 13B; normalised head",
    ),
    "chatglm": Architecture(
        chatglm.from_dict, chatglm.program, chatglm.OPTIONAL_TENSORS,
        "ChatGLM2, ChatGLM3, GLM-4 9B", "half of each head rotated in neighbours; packed q, k, v; `rope_ratio`",
    ),
    "deepseek_v2": Architecture(
        deepseek.v2_from_dict, deepseek.program, deepseek.optional_tensors,
        "DeepSeek-V2, V2-Lite, V2.5",
        "latent attention with its small cache; mixture of experts, some of them shared; rotary embedding as Llama",
    ),
    "deepseek_v3": Architecture(
        deepseek.v3_from_dict, deepseek.program, deepseek.optional_tensors,
        "DeepSeek-V3, R1", "as V2, with corrected sigmoid scores; layers that guess further tokens are left out",
    ),
    "gemma2": Architecture(
        gemma.gemma2_from_dict, gemma.program, gemma.OPTIONAL_TENSORS,
        "Gemma 2", "caps of scores and logits, norms before and after, windows of every other layer",
    ),
    "gemma3_text": Architecture(
        gemma.gemma3_from_dict, gemma.program, gemma.OPTIONAL_TENSORS,
        "Gemma 3, text", "norms of heads, local and global layers with a rotary base each",
    ),
    "gpt_oss": Architecture(
        gpt_oss.from_dict, gpt_oss.program, gpt_oss.OPTIONAL_TENSORS,
        "gpt-oss 20b, 120b",
        "mixture of experts with biases and clamped gates; attention sinks; windows of some layers",
        gpt_oss.STACKS,
    ),
    "llama": Architecture(
        llama.from_dict, llama.program, llama.OPTIONAL_TENSORS,
        "Llama 2, 3.x and alike", f"grouped-query attention, biases, tied or own head; {_ROPE}",
    ),
    "mistral": Architecture(
        mistral.from_dict, mistral.program, mistral.OPTIONAL_TENSORS,
        "Mistral", "sliding window; rotary embedding as Llama",
    ),
    "mixtral": Architecture(
        mixtral.from_dict, mixtral.program, mixtral.OPTIONAL_TENSORS,
        "Mixtral", "mixture of experts; rotary embedding as Llama",
    ),
    "phi3": Architecture(
        phi3.from_dict, phi3.program, phi3.OPTIONAL_TENSORS,
        "Phi-3, Phi-3.5, Phi-4 mini",
        "packed projections, partly rotated heads; `longrope` up to `original_max_position_embeddings`",
    ),
    "qwen": Architecture(
        qwen.from_dict, qwen.program, qwen.OPTIONAL_TENSORS,
        "Qwen (the first)", "packed q, k, v with bias; with dynamic NTK or log-n attention up to `seq_length`",
    ),
    "qwen2": Architecture(
        qwen2.qwen2_from_dict, qwen2.program, qwen2.OPTIONAL_TENSORS,
        "Qwen2, Qwen2.5", "biases of q, k, v; windows of some layers; rotary embedding as Llama",
    ),
    "qwen2_moe": Architecture(
        qwen_moe.qwen2_from_dict, qwen_moe.program, qwen_moe.OPTIONAL_TENSORS,
        "Qwen1.5-MoE, Qwen2-MoE", "mixture of experts, one of them shared behind a gate; else as Qwen2",
    ),
    "qwen3": Architecture(
        qwen2.qwen3_from_dict, qwen2.program, qwen2.OPTIONAL_TENSORS,
        "Qwen3, dense", "norms of heads; windows of some layers; rotary embedding as Llama",
    ),
    "qwen3_moe": Architecture(
        qwen_moe.qwen3_from_dict, qwen_moe.program, qwen_moe.OPTIONAL_TENSORS,
        "Qwen3-MoE", "mixture of experts; else as Qwen3",
    ),
    "yuan": Architecture(
        yuan.YuanConfig.from_dict, yuan.program, yuan.OPTIONAL_TENSORS,
        "Yuan 2.0 2B, 51B, 102B, M32",
        "localised filtering convolutions; M32's experts behind an attention router; its tokenizer's rules",
    ),
}  # fmt: skip
"""By the `model_type` of config.json."""

PANEL_ROWS = 16
"""Rows that a kernel multiplies together: the smallest share of a weight that is worth a rank."""


class Model:
    """An architecture with its sizes: builds programs and tells which stored tensors it does not need."""

    def __init__(self, model_type: str, config: ModelConfig) -> None:
        self.model_type = model_type
        self.config = config
        self._architecture = ARCHITECTURES[model_type]

    def program(self, share: Share) -> Program:
        """The program of one rank. Raises LaunchError for more ranks than the model has parts."""
        if share.size > self.max_ranks:
            raise LaunchError(
                f"{share.size} ranks are more than the {self.max_ranks} panels of {PANEL_ROWS} rows "
                f"in the model's widest weight; 1 to {self.max_ranks} ranks work"
            )
        return self._architecture.program(self.config, share)

    @cached_property
    def max_ranks(self) -> int:
        """Ranks beyond this would hold nothing of any weight."""
        whole = self._architecture.program(self.config, Share())
        widest = max(each.full_rows for each in whole.weights if each.kind.multiplies or each.kind is Kind.HEAD)
        return -(-widest // PANEL_ROWS)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Tensors of all experts that files of this model may hold, see `Checkpoint.take_apart`."""
        return self._architecture.stacks

    @cached_property
    def _optional(self) -> list[re.Pattern[str]]:
        found = self._architecture.optional_tensors
        return [re.compile(pattern) for pattern in (found(self.config) if callable(found) else found)]

    def is_optional(self, tensor: str) -> bool:
        """Whether a stored tensor that the program did not declare may be left unread."""
        return any(pattern.fullmatch(tensor) for pattern in self._optional)


def read_config(config: dict[str, Any]) -> Model:
    """The model that a `config.json` describes. Raises ConfigError."""
    if not isinstance(config, dict):
        raise ConfigError(f"config.json: found {shown(config)}; expected an object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(
            f"config.json: model_type {shown(model_type)} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return Model(model_type, ARCHITECTURES[model_type].read(config))


def multiplying(model: Model) -> set[str]:
    """Names of the tensors that a quantiser turns into 4 or 8 bits."""
    return {weight.name for weight in model.program(Share()).weights if weight.kind.multiplies}


def table() -> str:
    """The architectures as the documentation shows them, in Markdown."""
    rows = [f"| `{name}` | {each.models} | {each.supported} |" for name, each in sorted(ARCHITECTURES.items())]
    return "\n".join(["| `model_type` | models | what is supported |", "|---|---|---|", *rows])
