"""Weights that come from nowhere: random ones in the shapes of a config, for measuring without a checkpoint.

They have the memory of real ones, a physical page of its own for every byte, and standard deviations with which
activations stay near 1. What such a model says means nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tpcpu.engine.binding import FORMATS, FORMS, HEAD_FORMATS
from tpcpu.engine.progress import Progress
from tpcpu.errors import UsageError
from tpcpu.formats import mxfp4
from tpcpu.kernels import fill
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.models import Model
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.numa import Arena, arena
from tpcpu.parallel.team import Team
from tpcpu.program.cost import FLOAT_BYTES, Storage
from tpcpu.program.operations import Key, Kind, Program, RmsNorm, RopeAndStore, Weight
from tpcpu.program.operations import weights as read_by
from tpcpu.program.products import Weights
from tpcpu.program.weights import Draw, Noise, Packed, Packer, Table, Vector, packed_bytes, padded

_BIAS_DEVIATION = 0.02
_EMBEDDING_SPREAD = math.sqrt(3)
"""Evenly drawn to either side, it gives a standard deviation of 1."""


class FakeWeights:
    """The source of an engine that has only a config."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._storage = Storage()
        self._program: Program | None = None
        self._sizes: dict[Key, int] = {}
        self.loaded_bytes = self.packed_bytes = 0

    def open(self) -> dict[str, Any]:
        return self._config

    def bind(self, model: Model, program: Program, format: str | None, lm_head: str | None) -> None:  # noqa: A002, ARG002
        if format not in (None, *FORMATS):
            raise UsageError(f"--format {format} is unknown; the formats are {', '.join(FORMATS)}")
        if lm_head not in (None, *HEAD_FORMATS):
            raise UsageError(f"--lm-head {lm_head} is unknown; the formats of the head are {', '.join(HEAD_FORMATS)}")
        matrices = format or "nf4"
        self._storage = Storage(
            matrices=matrices,
            head=lm_head or (matrices if matrices in FLOAT_BYTES else "int8"),
            experts=mxfp4.METHOD if mxfp4.is_announced(self._config) else "",
        )
        self._program = program
        self._sizes = {
            weight.key: packed_bytes(len(weight.rows), len(weight.columns), self._form(weight))
            for weight in program.weights
            if weight.kind not in (Kind.VECTOR, Kind.EMBEDDING)
        }
        self.packed_bytes = sum(self._sizes.values())

    def _form(self, weight: Weight) -> int:
        return FORMS[self._storage.of(weight)]

    def load(
        self,
        communicator: Communicator,
        team: Team,
        cpus: Sequence[int],  # noqa: ARG002
        progress: Progress,
    ) -> tuple[Weights, Arena]:
        program = self._program
        assert program is not None
        prepare([fill.fill_bytes, fill.fill_float32, fill.fill_bf16], progress.say)
        norms = {
            each.name for op in program.operations if isinstance(op, RmsNorm | RopeAndStore) for each in read_by(op)
        }
        memory = arena(self.packed_bytes)
        packer = Packer(team, memory)
        weights: dict[Key, Packed | Table | Vector] = {}
        total = self.packed_bytes + sum(map(_table_bytes, program.weights))
        for number, weight in enumerate(program.weights):
            key = weight.key
            seed = (communicator.rank << 40) + (number << 34)
            match weight.kind:
                case Kind.VECTOR:
                    weights[key] = _vector(weight, weight.name in norms, number)
                case Kind.EMBEDDING:
                    weights[key] = _table(weight, team, seed)
                    self.loaded_bytes += _table_bytes(weight)
                case _:
                    deviation = 1 / math.sqrt(weight.full_columns)
                    weights[key] = packer.fill(weight, Noise(self._form(weight), deviation, seed))
                    self.loaded_bytes += self._sizes[key]
            progress.advance(self.loaded_bytes, total)
        packer.flush()
        return weights, memory

    def close(self) -> None:
        pass


def _vector(weight: Weight, norm: bool, seed: int) -> Vector:
    """Ones for a norm, small numbers for a bias; the same on every rank, of whatever rows it has."""
    if norm:
        return padded(np.ones(len(weight.rows), np.float32))
    whole = np.random.default_rng(seed).normal(0, _BIAS_DEVIATION, weight.full_rows)
    return padded(whole[weight.rows.start : weight.rows.stop])


def _table_bytes(weight: Weight) -> int:
    return 2 * weight.full_rows * weight.full_columns if weight.kind is Kind.EMBEDDING else 0


def _table(weight: Weight, team: Team, seed: int) -> Table:
    """bfloat16 rows, each rank's own: there is no file that the ranks of a host could map together."""
    nbytes = _table_bytes(weight)
    memory = arena(-(-nbytes // 8) * 8)
    draw = Draw(fill.fill_bf16, seed, spread=_EMBEDDING_SPREAD)
    team.run(draw.record(memory.address, memory.nbytes, memory.nbytes // 8))
    rows = np.asarray(memory)[:nbytes].view(np.uint16).reshape(weight.full_rows, weight.full_columns)
    return Table(rows, R.BF16)
