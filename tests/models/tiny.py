"""The bundled models and random ones, as the reference reads them: a model and its tensors by name."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it, which safetensors asks for)
import numpy as np
from safetensors import safe_open

from tpcpu.models import Model, read_config
from tpcpu.parallel.partition import Share
from tpcpu.program.formulas import MatrixValues
from tpcpu.program.operations import Kind, Weight
from tpcpu.program.reference import Reference

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True, eq=False)
class Tiny:
    model: Model
    tensors: dict[str, np.ndarray[Any, Any]]
    expected: dict[str, Any]

    def reference(self, size: int = 1, weights: Callable[[Weight], Any] | None = None, **settings: Any) -> Reference:
        """The reference over a world of `size` ranks, with the stored weights unless others are given."""
        programs = [self.model.program(Share(rank, size)) for rank in range(size)]
        return Reference(programs, weights or (lambda weight: self.tensors[weight.name]), **settings)


@cache
def load(name: str) -> Tiny:
    folder = DATA / name
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as stored:
            tensors |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    expected = json.loads(next(folder.glob("ref*.json")).read_text())
    return Tiny(read_config(json.loads((folder / "config.json").read_text())), tensors, expected)


def random_model(config: dict[str, Any], seed: int = 0) -> Tiny:
    """A model of any shape, its float32 weights random and scaled so that activations stay near 1."""
    random, model = np.random.default_rng(seed), read_config(config)
    tensors = {}
    for weight in model.program(Share()).weights:
        values = random.standard_normal(weight.full_shape, dtype=np.float32)
        if weight.kind is Kind.VECTOR:
            values = values * np.float32(0.2) + np.float32("norm" in weight.name)
        elif weight.kind is not Kind.EMBEDDING:
            values /= np.float32(weight.full_columns**0.5)
        tensors.setdefault(weight.name, values)
    return Tiny(model, tensors, {})


def int8_weights(tiny: Tiny) -> Callable[[Weight], Any]:
    """What multiplies as int8 with a scale for each 64, where rows allow it; the rest as it is."""

    def get(weight: Weight) -> Any:
        values = np.asarray(tiny.tensors[weight.name], np.float32)
        if weight.kind in (Kind.VECTOR, Kind.EMBEDDING) or weight.full_columns % 64:
            return values
        blocks = values.reshape(weight.full_rows, -1, 64)
        scales = np.abs(blocks).max(axis=2) / np.float32(127)
        steps = np.rint(blocks / np.where(scales == 0, np.float32(1), scales)[:, :, None]).astype(np.int8)
        return MatrixValues.int8(steps.reshape(weight.full_rows, -1), scales)

    return get
