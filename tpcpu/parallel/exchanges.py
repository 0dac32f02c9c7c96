"""Messages one after another, from a private vector to a private sum: to measure what joining the ranks costs.

Knows how an exchange is recorded; must not know models. What a step sends is recorded by `program/compiled.py`.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import exchange, messages
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.communicator import AllReduce
from tpcpu.parallel.team import Team, aligned
from tpcpu.parallel.window import NEVER

_ROOM = 64
"""float32 behind a vector that kernels may read."""

SIZES = [1 << power for power in range(14, 20)]
"""Of messages that are tried."""
_MESSAGES, _TIMES = 4, 5


class Exchanges:
    """`count` sums over all ranks, an even number, of one vector of `width` float32; all in one walk of the team."""

    def __init__(self, call: AllReduce, team: Team, width: int, count: int, two_shot: int | None = None) -> None:
        """`two_shot` as in `AllReduce`, which it overrides."""
        assert count % 2 == 0
        self.count, self._call, self._team = count, call, team
        self._memory = aligned(width + _ROOM).view(np.float32)
        self.x: NDArray[np.float32] = self._memory[:width]
        """What this rank gives,"""
        self.out: NDArray[np.float32] = self._memory[width + _ROOM : 2 * width + _ROOM]
        """and what it has after `run`."""
        self._step = aligned(R.STEP_WORDS)
        self._step[R.TEAM], self._step[R.TOKENS], self._step[R.CLASS] = team.address, 1, 2
        kernel = exchange.exchange_many if call.kind == "window" else messages.mpi_all_reduce
        prepare([kernel])
        self._records = np.zeros((count, R.RECORD_WORDS), np.int64)
        for message, record in enumerate(self._records):
            record[R.KERNELS : R.KERNELS + 3] = kernel.address
            record[R.BARRIER], record[R.STEP] = 7, self._step.ctypes.data
            words = self._window(message) if call.kind == "window" else self._mpi()
            for word, value in words.items():
                record[word] = value
            if call.kind == "window" and two_shot is not None:
                record[R.TWO_SHOT] = two_shot

    def _window(self, message: int) -> dict[int, int]:
        half, place = self._call.place(message, 4 * self.x.size)
        return {
            R.IN: self.x.ctypes.data, R.OUT: self.out.ctypes.data, R.WIDTH: self.x.size, R.HALF: half, R.PLACE: place,
            R.WINDOW: self._call.table, R.TWO_SHOT: self._call.two_shot,
        }  # fmt: skip

    def _mpi(self) -> dict[int, int]:
        datatype, operation, communicator = self._call.handles
        return {
            R.SEND: self.x.ctypes.data, R.RECEIVE: self.out.ctypes.data, R.ROW_FLOATS: self.x.size,
            R.FUNCTION: self._call.function, R.DATATYPE: datatype, R.OPERATION: operation,
            R.COMMUNICATOR: communicator,
        }  # fmt: skip

    def run(self) -> float:
        """Exchanges; the seconds of one message. Collective."""
        begin = time.perf_counter()
        self._team.run(self._records)
        return (time.perf_counter() - begin) / self.count


def two_shot_bytes(call: AllReduce, team: Team, barrier: Callable[[], None]) -> int:
    """From which size on messages are faster in two shots, as this rank sees it; a few ms. Collective.

    Every rank must have as many threads.
    """
    one, two = (_seconds(call, team, shots, barrier) for shots in (NEVER, 0))
    last = max((i for i in range(len(SIZES)) if one[i] <= two[i]), default=-1)
    return SIZES[last + 1] if last + 1 < len(SIZES) else NEVER


def _seconds(call: AllReduce, team: Team, two_shot: int, barrier: Callable[[], None]) -> Sequence[float]:
    """The shortest time of a message of each size."""
    found = []
    for size in SIZES:
        exchanges = Exchanges(call, team, size // 4, _MESSAGES, two_shot)
        times = []
        for _ in range(_TIMES):
            barrier()
            times.append(exchanges.run())
        found.append(min(times))
    return found
