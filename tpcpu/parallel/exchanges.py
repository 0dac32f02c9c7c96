"""Partial sums from one rank's memory to the sums in every rank's: how an exchange is recorded.

One place for what steps do (`program/binder.py`) and for measuring what joining the ranks costs. Knows the ways to join
ranks; must not know models.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import exchange, hosts, messages
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, prepare
from tpcpu.parallel.communicator import AllReduce
from tpcpu.parallel.team import Team, aligned
from tpcpu.parallel.window import NEVER

_ROOM = 64
"""float32 behind a vector that kernels may read."""

SIZES = [1 << power for power in range(14, 20)]
"""Of messages that are tried."""
_MESSAGES, _TIMES = 4, 5

Recorded = tuple[Sequence[Kernel], dict[int, int]]
"""The kernels of the three classes of token counts, and their operands."""


@dataclass(frozen=True)
class HostsRoom:
    """Addresses of memory that an exchange between hosts needs; see `kernels/record.py`."""

    sums: int
    rounded: int
    received: int

    @staticmethod
    def sizes(call: AllReduce, nbytes: int) -> tuple[int, int, int]:
        """Bytes of each, for messages of `nbytes`, tokens of whole blocks."""
        return nbytes, nbytes // 2 if call.wire == "bf16" else 0, call.hosts * nbytes


def messages_of(call: AllReduce) -> int:
    """How often an exchange uses the window: once, and between hosts once more."""
    return 2 if call.kind == "hosts" else 1


def exchange_records(
    call: AllReduce, number: int, row_bytes: int, words: Mapping[int, int], room: Callable[[], HostsRoom]
) -> Iterator[Recorded]:
    """The records of a program's exchange `number` through the window, between which threads have to wait.

    `row_bytes`: of a token's part in the window. `words`: input, output, width, what is added.
    """
    fits = row_bytes <= call.half_bytes
    first = exchange.exchange_one if fits else exchange.exchange_many
    inside = [first, exchange.exchange_many, exchange.exchange_many]
    window = {R.WINDOW: call.table, R.TWO_SHOT: call.two_shot}
    half, place = call.place(number * messages_of(call), row_bytes)
    if call.kind == "window":
        yield inside, {**words, **window, R.HALF: half, R.PLACE: place}
        return
    memory, width = room(), words[R.WIDTH]
    row = -(-width // R.BLOCK) * R.BLOCK * 4
    read = {word: words[word] for word in (R.IN, R.IN_STRIDE, R.DIRECT) if word in words}
    yield inside, {
        **read, **window, R.OUT: memory.sums, R.OUT_STRIDE: row, R.WIDTH: width, R.HALF: half, R.PLACE: place,
    }  # fmt: skip
    rounded = call.wire == "bf16"
    datatype, communicator = call.handles
    wire = {
        R.WIDTH: width, R.SLICE: call.slice, R.SLICES: call.slices, R.HOSTS: call.hosts, R.SUMS: memory.sums,
        R.ROUNDED: memory.rounded, R.IS_ROUNDED: int(rounded), R.RECEIVED: memory.received,
        R.WIRE_FUNCTION: call.function, R.WIRE_DATATYPE: datatype, R.WIRE_COMMUNICATOR: communicator,
    }  # fmt: skip
    if rounded:
        yield [hosts.round_slice] * 3, wire
    yield [hosts.gather_slices] * 3, wire
    half, place = call.place(number * messages_of(call) + 1, row_bytes)
    added = {word: words[word] for word in (R.OUT, R.OUT_STRIDE, R.SECOND, R.SECOND_STRIDE, R.BIAS) if word in words}
    yield [hosts.share_slices] * 3, {**wire, **window, **added, R.HALF: half, R.PLACE: place}


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
        self._room: list[NDArray[np.int64]] = []
        recorded = [each for message in range(count) for each in self._record(message)]
        prepare({kernel for kernels, _ in recorded for kernel in kernels})
        self._records = np.zeros((len(recorded), R.RECORD_WORDS), np.int64)
        for record, (kernels, words) in zip(self._records, recorded, strict=True):
            record[R.KERNELS : R.KERNELS + 3] = [kernel.address for kernel in kernels]
            record[R.BARRIER], record[R.STEP] = 7, self._step.ctypes.data
            for word, value in words.items():
                record[word] = value
            if R.TWO_SHOT in words and two_shot is not None:
                record[R.TWO_SHOT] = two_shot

    def _record(self, message: int) -> Iterator[Recorded]:
        call, x, out = self._call, self.x.ctypes.data, self.out.ctypes.data
        if call.kind in ("window", "hosts"):
            words = {R.IN: x, R.OUT: out, R.WIDTH: self.x.size}
            yield from exchange_records(call, message, 4 * self.x.size, words, self._hosts_room)
            return
        datatype, operation, communicator = call.handles
        yield [messages.mpi_all_reduce] * 3, {
            R.SEND: x, R.RECEIVE: out, R.ROW_FLOATS: self.x.size, R.FUNCTION: call.function,
            R.DATATYPE: datatype, R.OPERATION: operation, R.COMMUNICATOR: communicator,
        }  # fmt: skip

    def _hosts_room(self) -> HostsRoom:
        if not self._room:
            nbytes = 4 * (self.x.size + _ROOM)
            self._room = [aligned(size // 8 + 8) for size in HostsRoom.sizes(self._call, nbytes)]
        return HostsRoom(*(memory.ctypes.data for memory in self._room))

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
