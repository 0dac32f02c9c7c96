"""Rotary position embedding: by how much each position turns the pairs of a head, in the published variants.

A variant changes the frequencies, the length of what is turned, or both. Each position's angles depend on that
position alone, so that neither chunks nor company change a token. Knows no kernels and no configs.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class LinearScaling:
    """Positions count as 1 / factor of themselves."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """A larger base behind `positions`, as a text of just that length has it: each position is turned as it is where
    one token follows another."""

    factor: float
    positions: int


@dataclass(frozen=True)
class YarnScaling:
    """Slow pairs as under `LinearScaling`, fast ones as they are, those between by a ramp (Peng et al., 2309.00071).

    `fast` and `slow` bound the ramp, in turns within `positions`; whole pairs where `truncate`.
    """

    factor: float
    positions: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Scaling:
    """As `YarnScaling`, but the ramp is over wavelengths: `positions` / `low` to `positions` / `high`."""

    factor: float
    positions: int
    low: float
    high: float


@dataclass(frozen=True)
class FactorScaling:
    """Pair j counts positions as 1 / `factors[j]` of themselves."""

    factors: tuple[float, ...]


Scaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling | FactorScaling


@dataclass(frozen=True)
class Rope:
    """Turns pair j of the first `dim` dimensions of a head by position * theta^(-2j / dim), as `scaling` changes it.

    Pair j is dimensions j and j + dim / 2, or 2j and 2j + 1 where `interleaved`; what is turned is multiplied by
    `length` too. Dimensions behind `dim` stay; `dim` = 0 turns nothing.
    """

    theta: float
    dim: int
    scaling: Scaling | None = None
    length: float = 1.0
    interleaved: bool = False


def tables(rope: Rope, positions: Array, dtype: Any = np.float32) -> tuple[Array, Array]:
    """Cosines and sines times `length`, each (positions, dim / 2) of `dtype`; `positions` integers (positions,)."""
    real = np.dtype(dtype).type
    angles = positions.astype(dtype)[:, None] * _frequencies(rope, positions, dtype)
    return real(rope.length) * np.cos(angles), real(rope.length) * np.sin(angles)


def _frequencies(rope: Rope, positions: Array, dtype: Any) -> Array:
    """(dim / 2,), or (positions, dim / 2) where they differ by position."""
    real: Any = np.dtype(dtype).type
    exponents = np.arange(0, rope.dim, 2).astype(dtype) / real(max(rope.dim, 1))
    plain: Array = (real(1) / real(rope.theta) ** exponents).astype(dtype)
    found = plain
    match rope.scaling:
        case LinearScaling(factor=factor):
            found = plain / real(factor)
        case DynamicScaling(factor=factor, positions=limit):
            grown: Array = np.maximum(factor * np.maximum(positions + 1, limit) / limit - (factor - 1), 1)
            bases = rope.theta * grown ** (rope.dim / (rope.dim - 2))
            found = (1 / bases.astype(dtype)[:, None] ** exponents).astype(dtype)
        case YarnScaling() as yarn:
            kept = 1 - np.clip(_yarn_ramp(rope, yarn), 0, 1).astype(dtype)
            found = plain / real(yarn.factor) * (1 - kept) + plain * kept
        case Llama3Scaling(factor=factor, positions=limit, low=low, high=high):
            turns = limit * plain / real(2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1).astype(dtype)
            found = plain / real(factor) * (1 - kept) + plain * kept
        case FactorScaling(factors=factors):
            found = plain / np.array(factors, dtype)
    return found


def _yarn_ramp(rope: Rope, yarn: YarnScaling) -> Array:
    """How far each pair is from the last fast one, in parts of the way to the first slow one."""

    def pair(turns: float) -> float:
        """The pair that turns so often within the positions."""
        return rope.dim * math.log(yarn.positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(yarn.fast), pair(yarn.slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    ramp: Array = (np.arange(rope.dim // 2) - first) / (last - first if last != first else 0.001)
    return ramp


def yarn_length(factor: float, scale: float = 1.0) -> float:
    """What the authors multiply queries and keys by, for a text so many times longer."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
