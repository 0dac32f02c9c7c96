"""What this machine could do at best: reading the weights' own memory, and multiplying in registers.

All threads of all ranks at the same time: they begin at one moment, have as much to do, and the last to be done counts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import bandwidth, peak
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, prepare
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.numa import Arena
from tpcpu.parallel.team import Team

WINDOW = 1 << 30
"""Bytes that a rank reads at a time, beyond every cache; the next measurement reads the next ones."""

SECONDS = 0.06
"""What one measurement takes about: long beside the microseconds that the ranks begin apart."""

_START_SECONDS = 3e-3

STEADY = 0.9

_ROUNDS = 1 << 21


@dataclass(frozen=True)
class Loop:
    """One way to read."""

    name: str
    kernel: Kernel
    distance: int


_WAYS = (("plain", bandwidth.PLAIN, 0), ("prefetch 2 KB", bandwidth.FIRST, 2048),
         ("prefetch 4 KB", bandwidth.FIRST, 4096), ("prefetch 12 KB to L2", bandwidth.SECOND, 12288))  # fmt: skip

LOOPS = tuple(
    Loop(f"{streams} stream{'s' if streams > 1 else ''}, {name}", bandwidth.read(streams, hint), distance)
    for streams in (1, 2, 4)
    for name, hint, distance in _WAYS
)


def read_record(loop: Loop, address: int, nbytes: int, passes: int, sums: NDArray[np.int64]) -> NDArray[np.int64]:
    """The record of one loop; `sums` (threads, 8) int64 receives what the threads have added up."""
    words = {R.M_SOURCE: address, R.M_BYTES: nbytes, R.M_PASSES: passes, R.M_DISTANCE: loop.distance}
    return _record(loop.kernel, {**words, R.M_SUMS: sums.ctypes.data})


class Reading:
    """The read bandwidth of the memory of all ranks' weights."""

    def __init__(self, memory: Arena, team: Team, communicator: Communicator) -> None:
        self._memory, self._team, self._communicator = memory, team, communicator
        self._sums = np.zeros((team.threads, 8), np.int64)
        least = min((each for each in communicator.all_gather_object(memory.nbytes) if each), default=0)
        self._bytes = min(memory.nbytes, least, WINDOW) // bandwidth.UNIT * bandwidth.UNIT
        self._at = 0
        self.gbs: dict[str, list[float]] = {loop.name: [] for loop in LOOPS}
        """Every value, by the loop's name."""
        prepare([loop.kernel for loop in LOOPS])
        self._passes = 1
        self._measure(LOOPS[0])  # wakes threads and caches
        self._passes = max(1, round(SECONDS / self._measure(LOOPS[0])[1]))

    @property
    def best(self) -> float:
        """GB/s of the best loop in its best measurement."""
        return max(max(values) for values in self.gbs.values())

    def best_of(self, first: int, last: int) -> float:
        """The best in some of the sweeps."""
        return max(max(values[first:last]) for values in self.gbs.values())

    @property
    def steadiness(self) -> float:
        """The worst sweep's best, in parts of the best sweep's: under `STEADY` the machine is another than it was."""
        sweeps = range(len(self.gbs[LOOPS[0].name]))
        bests = [self.best_of(sweep, sweep + 1) for sweep in sweeps]
        return min(bests) / max(bests)

    def sweep(self) -> None:
        """Every loop once more."""
        for loop in LOOPS:
            self.gbs[loop.name].append(self._measure(loop)[0])

    def _measure(self, loop: Loop) -> tuple[float, float]:
        """GB/s over all ranks, and the seconds that it took."""
        if self._at + self._bytes > self._memory.nbytes:
            self._at = 0
        record = read_record(loop, self._memory.address + self._at, self._bytes, self._passes, self._sums)
        self._at += self._bytes
        nbytes, seconds = together(self._communicator, self._team, record, self._bytes * self._passes)
        return nbytes / seconds / 1e9, seconds


def together(communicator: Communicator, team: Team, record: NDArray[np.int64], amount: float) -> tuple[float, float]:
    """Walks one record on all ranks at once: their amounts added up, and the slowest one's seconds. Collective."""
    begin = start_together(communicator)
    team.run(record)
    measured = communicator.all_gather_object((amount, time.perf_counter() - begin))
    return sum(each for each, _ in measured), max(seconds for _, seconds in measured)


def start_together(communicator: Communicator) -> float:
    """Returns at the same moment on all ranks of a host, whose clocks are one; that moment. Collective.

    Ranks leave a barrier up to two milliseconds apart.
    """
    if communicator.size == 1:
        return time.perf_counter()
    clocks = communicator.all_gather_object(time.perf_counter())
    moment = max(clocks[rank] for rank in communicator.host_ranks) + _START_SECONDS
    while (now := time.perf_counter()) < moment:
        pass
    return now


class Peaks:
    """GOPS of int8 products and GFLOPS of float32 fma in registers, over all threads of all ranks."""

    def __init__(self, team: Team, communicator: Communicator) -> None:
        prepare([peak.dot4_rounds, peak.fma_rounds])
        self._team, self._communicator = team, communicator
        self.int8_gops = self.fma_gflops = 0.0
        """The best so far."""

    def look(self) -> None:
        """Once more. Collective."""
        for _ in range(5):
            self.int8_gops = max(self.int8_gops, self._rate(peak.dot4_rounds, peak.DOT4_OPERATIONS))
            self.fma_gflops = max(self.fma_gflops, self._rate(peak.fma_rounds, peak.FMA_OPERATIONS))

    def _rate(self, kernel: Kernel, operations: int) -> float:
        sink = np.zeros((self._team.threads, 8), np.int64)
        record = rounds_record(kernel, _ROUNDS, sink)
        amount = operations * _ROUNDS * self._team.threads
        total, seconds = together(self._communicator, self._team, record, amount)
        return total / seconds / 1e9


def rounds_record(kernel: Kernel, rounds: int, sink: NDArray[np.int64]) -> NDArray[np.int64]:
    """The record of a loop in registers; `sink` (threads, 8) int64 receives a result that nobody needs."""
    return _record(kernel, {R.O_ROUNDS: rounds, R.O_SINK: sink.ctypes.data})


_IDLE_STEP = np.zeros(R.STEP_WORDS, np.int64)


def _record(kernel: Kernel, words: dict[int, int]) -> NDArray[np.int64]:
    record = np.zeros((1, R.RECORD_WORDS), np.int64)
    record[0, R.KERNELS : R.KERNELS + 3] = kernel.address
    record[0, R.BARRIER], record[0, R.STEP] = 0b111, _IDLE_STEP.ctypes.data
    for word, value in words.items():
        record[0, word] = value
    return record


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and what the values reach to either side."""
    return f"{float(np.median(values)):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
