"""Memory that the ranks of a host share: where each rank's part lies, and what compiled code needs to find it.

Knows the layout of a part (`kernels/window_layout.py`) and addresses; must not know MPI, which gives the memory, nor
what is exchanged. A part holds numbers that others wait for, mail between the ranks (`mailbox.py`), and two halves for
partial sums (`kernels/exchange.py`).
"""

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import window_layout as layout
from tpcpu.parallel.communicator import AllReduce

HALF_BYTES = 512 * 1024
"""Of partial sums: containers have 64 MB of shared memory, for all ranks together."""
_ALL_HALVES = 16 * 1024 * 1024
_SMALLEST_HALF = 64 * 1024

NEVER = 1 << 62
"""No message has as many bytes."""


def half_bytes(ranks: int) -> int:
    """The size of a half for so many ranks on a host."""
    return max(_SMALLEST_HALF, min(HALF_BYTES, _ALL_HALVES // (2 * ranks) // 4096 * 4096))


def part_bytes(ranks: int) -> int:
    """The size of each rank's part."""
    return layout.DATA + 2 * half_bytes(ranks)


class Window:
    """The parts of all ranks, seen from one of them."""

    def __init__(self, rank: int, parts: Sequence[int], keep: object = None) -> None:
        """`parts`: their addresses in this process, by rank; `keep` lives as long as they are used.

        Touches this rank's part first: it must be called by a thread that runs where the rank does. All ranks have to
        have come this far before one uses the window.
        """
        self.rank, self.parts, self._keep = rank, tuple(parts), keep
        self.size = len(parts)
        self.half_bytes = half_bytes(self.size)
        ctypes.memset(parts[rank], 0, part_bytes(self.size))
        self._counters = _lines(2)

    def all_reduce(self, threads: Sequence[int], two_shot: int = NEVER) -> AllReduce:
        """What a compiled step needs where rank r has `threads[r]` threads."""
        table = np.zeros(layout.ENTRIES + layout.ENTRY_WORDS * self.size, np.int64)
        table[layout.RANKS], table[layout.RANK] = self.size, self.rank
        table[layout.COUNTERS], table[layout.HALF_BYTES] = self._counters.ctypes.data, self.half_bytes
        table[layout.ALIGNED] = len(set(threads)) == 1
        for rank, part in enumerate(self.parts):
            entry = table[layout.ENTRIES + layout.ENTRY_WORDS * rank :]
            entry[layout.PART], entry[layout.LINES] = part + layout.DATA, part + layout.SEQUENCES
            entry[layout.THREADS] = threads[rank]
        return AllReduce(
            "window", table=table.ctypes.data, own=self.parts[self.rank] + layout.DATA, half_bytes=self.half_bytes,
            two_shot=two_shot, keep=(self, table),
        )  # fmt: skip


def _lines(count: int) -> NDArray[np.int64]:
    """Zeroed cache lines."""
    raw = np.zeros((count + 1) * layout.LINE // 8, np.int64)
    skip = -(raw.ctypes.data // 8) % (layout.LINE // 8)
    return raw[skip : skip + count * layout.LINE // 8]
