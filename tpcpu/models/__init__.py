"""Architectures: one file each, from a published config to a program. No numba, no MPI, no threads here.

To add one, write its file (config, weight names, `program`) and name it in `ARCHITECTURES`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tpcpu.errors import ConfigError, LaunchError
from tpcpu.models import llama, mistral, yuan
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
    optional_tensors: tuple[str, ...]


ARCHITECTURES = {
    "llama": Architecture(llama.LlamaConfig.from_dict, llama.program, llama.OPTIONAL_TENSORS),
    "mistral": Architecture(mistral.from_dict, mistral.program, mistral.OPTIONAL_TENSORS),
    "yuan": Architecture(yuan.YuanConfig.from_dict, yuan.program, yuan.OPTIONAL_TENSORS),
}
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

    def is_optional(self, tensor: str) -> bool:
        """Whether a stored tensor that the program did not declare may be left unread."""
        return any(re.fullmatch(pattern, tensor) for pattern in self._architecture.optional_tensors)


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
