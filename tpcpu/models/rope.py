"""Rotary position embedding as configs describe it: `rope_scaling` of older writers, `rope_parameters` of newer ones.

Every published key is read or refused. `program/rope.py` knows what the types do.
"""

import math
from dataclasses import dataclass
from typing import Any

from tpcpu.errors import ConfigError
from tpcpu.models.keys import MAX_INTEGER, Keys, shown
from tpcpu.program.rope import (
    DynamicScaling,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
    yarn_length,
)

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""What every family with rotary embedding may have."""


@dataclass(frozen=True)
class RopeReader:
    """What a family means where its config says nothing, and what it may say.

    head_dim: of a head. positions: the config's longest text. theta: the base. partial: there is a key for the part of
    a head that is turned. types: those of the family.
    """

    head_dim: int
    positions: int
    theta: float = 10000.0
    partial: bool = False
    types: tuple[str, ...] = TYPES

    def read(self, keys: Keys) -> tuple[Rope, int]:
        """What turns heads, and how long a text may be. Raises ConfigError."""
        theta, part = keys.number("rope_theta", self.theta), self._part(keys, 1.0)
        trained = keys.integer("original_max_position_embeddings", self.positions)
        given = [key for key in ("rope_scaling", "rope_parameters") if keys.get(key)]
        if len(given) == 2 and keys.get(given[0]) != keys.get(given[1]):
            raise ConfigError("config.json: rope_scaling and rope_parameters differ; expected one of them")
        if not given:
            return Rope(theta, self._turned(part)), self.positions
        return self.read_object(given[0], keys.get(given[0]), theta, part, trained)

    def read_object(
        self, key: str, values: Any, theta: float, part: float = 1.0, trained: int | None = None
    ) -> tuple[Rope, int]:
        """As `read`, from the object `values` at `key`; the others are what it means where it says nothing itself."""
        if not isinstance(values, dict):
            raise ConfigError(f"config.json: {key} is {shown(values)}; expected an object or null")
        # `finetuned` says how a model came to be.
        keys = Keys(values, ignored=("finetuned",), inside=f"{key}.")
        kind = keys.get("rope_type", keys.get("type", "default"))
        kind = "longrope" if kind == "su" else kind
        if kind not in self.types:
            raise ConfigError(
                f"config.json: {key} of type {shown(kind)} is not supported; only {', '.join(self.types)} are"
            )
        theta = keys.number("rope_theta", theta)
        dim = self._turned(self._part(keys, part))
        found: tuple[Scaling | None, float, int] = (None, 1.0, self.positions)
        if kind != "default":
            found = self._scaling(keys, kind, dim, keys.integer("original_max_position_embeddings", trained))
        keys.finish()
        scaling, length, longest = found
        return Rope(theta, dim, scaling, length), longest

    def _scaling(self, keys: Keys, kind: str, dim: int, trained: int) -> tuple[Scaling, float, int]:
        """The scaling, what turned heads are multiplied by, and the longest text; `trained`: the longest before it."""
        if kind == "longrope":
            # The authors go over to `long_factor`, for what was read before too, where a text grows beyond `trained`:
            # there is no such text here, so that a token's place in it never changes.
            keys.get("long_factor")
            factor = keys.number("factor", self.positions / trained)
            length = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 < trained else 1.0
            return FactorScaling(_factors(keys, dim)), keys.number("attention_factor", length), trained
        factor = keys.number("factor", self.positions / trained if kind == "yarn" else None)
        if kind == "linear":
            return LinearScaling(factor), 1.0, self._stretched(self.positions, factor)
        if kind == "dynamic":
            if dim < 4:
                raise ConfigError(f"config.json: rotary embedding of type dynamic needs heads of 4, found {dim}")
            return DynamicScaling(factor, self.positions), 1.0, self._stretched(self.positions, factor)
        if kind == "llama3":
            low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
            if high <= low:
                raise ConfigError(
                    f"config.json: {keys.inside}high_freq_factor is {high}; expected more than low_freq_factor, {low}"
                )
            return Llama3Scaling(factor, trained, low, high), 1.0, self.positions
        # A second scale says that the first is in the weights already; alone the first says nothing.
        scale, other = keys.number("mscale", 1.0), keys.number("mscale_all_dim", 0.0, zero=True)
        length = yarn_length(factor, scale) / yarn_length(factor, other) if other else yarn_length(factor)
        fast, slow = keys.number("beta_fast", 32.0), keys.number("beta_slow", 1.0)
        yarn = YarnScaling(factor, trained, fast, slow, keys.flag("truncate", True))
        return yarn, keys.number("attention_factor", length), self._stretched(trained, factor)

    def _stretched(self, positions: int, factor: float) -> int:
        return max(self.positions, int(min(positions * factor, MAX_INTEGER)))

    def _part(self, keys: Keys, part: float) -> float:
        """Keys that a family has no use for are left to be refused."""
        part = keys.number("partial_rotary_factor", part) if self.partial else part
        if part > 1:
            raise ConfigError(f"config.json: partial_rotary_factor is {part}; expected at most 1")
        return part

    def _turned(self, part: float) -> int:
        """Dimensions of a head that are turned."""
        dim = int(self.head_dim * part)
        if dim % 2 or not dim:
            raise ConfigError(f"config.json: {dim} of head_dim = {self.head_dim} are rotated; expected pairs of them")
        return dim


def _factors(keys: Keys, dim: int) -> tuple[float, ...]:
    values = keys.get("short_factor")
    numbers = isinstance(values, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 1e-6 < x < 1e6 for x in values
    )
    if not numbers or len(values) != dim // 2:
        raise ConfigError(
            f"config.json: short_factor is {shown(values)}; expected {dim // 2} positive numbers, one for each pair"
        )
    return tuple(float(x) for x in values)
