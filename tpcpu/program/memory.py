"""Memory of a compiled program: buffers that are reused, and records that name their addresses.

Knows when a buffer is last read; nothing of kernels' arithmetic.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel
from tpcpu.parallel.numa import Arena, arena
from tpcpu.program.kv_format import KvFormat
from tpcpu.program.lowering import Stage
from tpcpu.program.operations import BLOCK, Buffer


@dataclass
class CacheMemory:
    """Where the cache of all sequences lies: what operations on it need to know, by layer or number of state.

    Keys of a page: heads x tiles of 16 positions x dim x 16; values: heads x tiles x 16 x dim; of int8, the 16 scales
    of a tile lie behind it. States: `RING` rows of float32 a sequence, by position modulo `RING`; states of pages: one
    row a page.
    """

    kv: KvFormat
    page_tokens: int
    max_positions: int
    keys: Sequence[int]
    values: Sequence[int]
    page_bytes: Sequence[int]
    states: Sequence[int]
    page_states: Sequence[int]
    state_bytes: Sequence[int]


@dataclass(frozen=True)
class Place:
    """A buffer's memory: tokens lie `stride` bytes apart, the rank's own features begin at `own`."""

    address: int
    stride: int
    own: int


def stride_bytes(width: int) -> int:
    """From token to token: whole blocks, and one more so that kernels may read and write whole registers."""
    return 4 * (-(-width // BLOCK) * BLOCK + BLOCK)


class Buffers:
    """Gives every buffer memory for as long as it is needed.

    Memory is passed on only between buffers of one width and one place of their own features: what lies outside
    these is never written and has to stay zero.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.last_use: Mapping[str, int] = {}
        """The last stage that reads a buffer, by name; to be set before there are any."""
        self._places: dict[str, Place] = {}
        self._free: dict[tuple[int, int, int], list[Place]] = {}
        self._busy: list[tuple[int, tuple[int, int, int], Place]] = []
        self._arenas: list[Arena] = []
        self.nbytes = 0

    def __getitem__(self, buffer: Buffer) -> Place:
        return self._places[buffer.name]

    def new(self, buffer: Buffer) -> Place:
        """Memory for a buffer that is written now."""
        kind = (buffer.width, buffer.own.start, buffer.own.stop)
        free = self._free.setdefault(kind, [])
        place = free.pop() if free else self._allocate(buffer)
        self._places[buffer.name] = place
        self._busy.append((self.last_use.get(buffer.name, -1), kind, place))
        return place

    def alias(self, buffer: Buffer, of: Buffer) -> None:
        """The same memory under another name; `last_use` of `of` covers both."""
        self._places[buffer.name] = self._places[of.name]

    def release(self, stage: int) -> None:
        """Takes back what no stage from this one on reads. Threads must have met since the stages before."""
        for entry in [entry for entry in self._busy if entry[0] < stage]:
            self._busy.remove(entry)
            self._free[entry[1]].append(entry[2])

    def _allocate(self, buffer: Buffer) -> Place:
        stride = stride_bytes(buffer.width)
        address = self.take(self._tokens * stride)
        return Place(address, stride, address + 4 * buffer.own.start)

    def take(self, nbytes: int) -> int:
        """Zeroed memory that is never passed on; its address is a multiple of 64."""
        nbytes = -(-max(nbytes, 64) // 64) * 64
        self.nbytes += nbytes
        self._arenas.append(arena(nbytes))
        return self._arenas[-1].address


_ONE, _SEVERAL = 0b001, 0b110
"""Bits of a record's barrier, by class of token counts."""


@dataclass
class Records:
    """The records of a program while they are written."""

    step: int
    kernels: set[Kernel] = field(default_factory=set)
    stage: Stage = field(default_factory=lambda: Stage(()))
    """What is being lowered,"""
    stages: list[tuple[Stage, Kernel]] = field(default_factory=list)
    """and for each record: what it came of, and its kernel for one token."""
    _rows: list[tuple[Sequence[Kernel], dict[int, int], dict[int, Kernel]]] = field(default_factory=list)

    def add(
        self, kernels: Kernel | Sequence[Kernel], words: Mapping[int, int], *, apart: bool = True,
        calls: Mapping[int, Kernel] | None = None,
    ) -> None:  # fmt: skip
        """One record: a kernel, or one for each class of token counts, and its operands by word.

        `calls`: operands that are the addresses of kernels. In steps of several tokens threads wait for one another
        after it, unless what follows is not `apart`.
        """
        each = [kernels] * 3 if isinstance(kernels, Kernel) else kernels
        called = dict(calls or {})
        self.kernels.update(each, called.values())
        self.stages.append((self.stage, each[0]))
        self._rows.append((each, {R.BARRIER: _SEVERAL if apart else 0, R.STEP: self.step, **words}, called))

    def wait(self) -> None:
        """In steps of one token, too, threads wait for one another after the last record."""
        if self._rows:
            self._rows[-1][1][R.BARRIER] |= _ONE

    @property
    def count(self) -> int:
        """Records so far."""
        return len(self._rows)

    def array(self) -> NDArray[np.int64]:
        """(records, RECORD_WORDS) int64; the kernels must have been prepared."""
        array = np.zeros((len(self._rows), R.RECORD_WORDS), np.int64)
        for row, (kernels, words, called) in zip(array, self._rows, strict=True):
            row[R.KERNELS : R.KERNELS + 3] = [kernel.address for kernel in kernels]
            for word, value in (words | {word: kernel.address for word, kernel in called.items()}).items():
                row[word] = value
        return array


def last_uses(reads: Sequence[Iterable[Buffer]], aliases: Mapping[str, str]) -> dict[str, int]:
    """For each buffer's name the last stage that reads it; `aliases` name the buffer whose memory they are."""
    last: dict[str, int] = {}
    for stage, buffers in enumerate(reads):
        for buffer in buffers:
            name = buffer.name
            last[name] = stage
            while name in aliases:
                name = aliases[name]
                last[name] = stage
    return last
