"""What a rank shows of itself to the witness of its host: a block of memory that both map.

Knows the layout of the block and nothing of what the words are used for. Compiled code stores the number of the
operation that it is in, with a plain store; the rest is written from Python. Imports no numpy: the witness has to
start at once.
"""

import ctypes
import json
import mmap
import os
from collections.abc import Collection, Sequence

STARTING, LOADING, WORKING = range(3)
"""Phases of a rank: only in `WORKING` does the number of an operation have a name."""

_PHASES = ("while it started", "while it loaded the model", "between two steps")

_NOTE = 0
"""Of the line that compiled code writes: the number of the operation that is run, -1 between two runs, and how many
runs there have been."""
_BEAT, _PHASE, _WITNESS_BEAT, _WITNESS, _NAMES_BYTES, _MODELS = range(8, 14)
_NAMES = 4096
_BYTES = 1 << 20


class Pulse:
    """The block, on either side."""

    def __init__(self, descriptor: int | None = None) -> None:
        """A new one, or the one that `descriptor` stands for."""
        self.descriptor = os.memfd_create("tpcpu-pulse") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, _BYTES)
        self._memory = mmap.mmap(self.descriptor, _BYTES)
        self._words = memoryview(self._memory)[:_NAMES].cast("q")
        if descriptor is None:
            self._words[_NOTE] = -1
        self._names: list[str] = []
        self._exchanges: frozenset[int] = frozenset()
        self._models = 0

    @property
    def note(self) -> int:
        """The address that compiled code writes to (see `team_layout.NOTE`)."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    # The rank's side

    def beat(self) -> None:
        """The rank is alive."""
        self._words[_BEAT] += 1

    def phase(self, phase: int) -> None:
        """What the rank does from here on."""
        self._words[_PHASE] = phase

    def work(self, names: Sequence[str], exchanges: Collection[int]) -> None:
        """From here on every run is a step; `exchanges` are the operations that wait for other ranks."""
        text = json.dumps([list(names), sorted(exchanges)]).encode()
        if len(text) > _BYTES - _NAMES:
            text = b"[[], []]"
        self._memory[_NAMES : _NAMES + len(text)] = text
        self._words[_NAMES_BYTES] = len(text)
        self._words[_MODELS] += 1
        self.phase(WORKING)

    @property
    def witness(self) -> tuple[int, int]:
        """Process and beats of the witness."""
        return self._words[_WITNESS], self._words[_WITNESS_BEAT]

    # The witness's side

    def witness_beats(self) -> None:
        """The witness is alive."""
        self._words[_WITNESS] = os.getpid()
        self._words[_WITNESS_BEAT] += 1

    @property
    def life(self) -> tuple[int, ...]:
        """Changes while the rank lives."""
        return self._words[_BEAT], self._words[_NOTE], self._words[_NOTE + 1]

    @property
    def step(self) -> tuple[int, int]:
        """Operation and run."""
        return self._words[_NOTE], self._words[_NOTE + 1]

    @property
    def stepping(self) -> bool:
        """Whether the rank is in an operation of a step."""
        return self._words[_PHASE] == WORKING and self._words[_NOTE] >= 0

    @property
    def exchanging(self) -> bool:
        """Whether that operation waits for other ranks."""
        if not self.stepping:
            return False
        self._read_names()
        return self._words[_NOTE] in self._exchanges

    def where(self) -> str:
        """Where the rank is, such as `in layer 3 all_reduce` or `while it loaded the model`."""
        phase, number = self._words[_PHASE], self._words[_NOTE]
        if phase != WORKING or number < 0:
            return _PHASES[phase]
        self._read_names()
        return f"in {self._names[number]}" if number < len(self._names) else "in a step"

    def _read_names(self) -> None:
        if self._models != self._words[_MODELS]:
            self._models, length = self._words[_MODELS], self._words[_NAMES_BYTES]
            names, exchanges = json.loads(self._memory[_NAMES : _NAMES + length])
            self._names, self._exchanges = names, frozenset(exchanges)
