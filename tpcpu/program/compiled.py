"""The fast reader of a program: records for kernels, walked by a team of threads in one compiled call.

Binds a program to memory once; afterwards a step writes a dozen words and enters compiled code. Nothing is allocated
and no Python runs between operations.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.communicator import AllReduce as AllReduceCall
from tpcpu.parallel.team import Team, aligned
from tpcpu.program.attending import FEW_TOKENS
from tpcpu.program.batch import Batch
from tpcpu.program.binder import Binder
from tpcpu.program.memory import CacheMemory
from tpcpu.program.operations import PIECE, Logits, Program
from tpcpu.program.products import Weights


class Compiled:
    """A program bound to weights, a cache and a team.

    `tokens` is the largest batch and `wanted` the most logits of one. In `exact` arithmetic activations stay float32.
    `all_reduce` says how parts are joined; it is not used by a world of one rank.
    """

    def __init__(
        self, program: Program, weights: Weights, cache: CacheMemory, team: Team, *,
        all_reduce: AllReduceCall | None = None, exact: bool = False, tokens: int, wanted: int,
        join: bool = True, report: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.program = program
        self.tokens, self.wanted = tokens, wanted
        self._cache, self._team = cache, team
        self._step = aligned(R.STEP_WORDS)
        self._step[R.TEAM] = team.address
        binder = Binder(
            program, weights, cache, step=self._step.ctypes.data, threads=team.threads, all_reduce=all_reduce,
            exact=exact, tokens=tokens, wanted=wanted, join=join,
        )  # fmt: skip
        self._keep = binder, weights
        self._buffers = binder.buffers
        self.stages = binder.records.stages
        """For each record the stage that it is of, and its kernel for one token."""
        prepare(binder.records.kernels, report)
        self._array = binder.records.array()
        self._walk = (self._array.ctypes.data, len(self._array))
        rows = len(next(op for op in program.operations if isinstance(op, Logits)).weight.rows)
        place = binder.logits
        memory = np.ctypeslib.as_array(_pointer(place.address), (wanted * place.stride // 4,))
        self.logits: NDArray[np.float32] = memory.reshape(wanted, -1)[:, :rows]

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Runs the batch; gives (wanted, local vocabulary) float32, valid until the next run."""
        step = self._step
        count = len(batch.tokens)
        assert 0 < count <= self.tokens, count
        assert len(batch.wanted) <= self.wanted
        which = 0 if count == 1 else 1 if count <= FEW_TOKENS else 2
        message = batch.message.ctypes.data
        # In the order of the words, TOKENS to RUN: one assignment, as each costs as much as a small kernel.
        step[: R.RUN + 1] = (
            count, len(batch.wanted), which, *(message + 4 * start for start in batch.starts),
            4 * batch.pages.shape[1], self._cache.page_tokens, max(batch.positions.tolist()) // PIECE + 1,
            self._team.number(len(self._array)),
        )  # fmt: skip
        self._team.walk(*self._walk)
        return self.logits[: len(batch.wanted)]


def _pointer(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
