"""The cache of sequences: pages of keys and values, and the last inputs of convolutions.

Pages are taken as a sequence grows and come back when it ends; memory is touched when it is written.
"""

from dataclasses import dataclass, field

from tpcpu.errors import UsageError
from tpcpu.parallel.numa import Arena, arena
from tpcpu.program.kv_format import KvFormat
from tpcpu.program.memory import CacheMemory
from tpcpu.program.operations import PIECE, Program

TILE = 16
"""Positions of keys that lie together; a page holds whole tiles."""


@dataclass
class Sequence:
    """Tokens that have gone through the model, and where the cache keeps what it knows of them."""

    state: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class Cache:
    """Room for `sequences` sequences of up to `context` positions each."""

    def __init__(self, program: Program, *, context: int, page_tokens: int, sequences: int, kv: KvFormat) -> None:
        if page_tokens < TILE or page_tokens % TILE:
            raise UsageError(f"--page-tokens {page_tokens} is not a positive multiple of {TILE}")
        self.context, self.page_tokens = context, page_tokens
        self.pages_per_sequence = -(-context // page_tokens)
        pages = self.pages_per_sequence * sequences
        self._arenas: list[Arena] = []
        page_bytes = [kv.page_bytes(shape, page_tokens) for shape in program.kv]
        state_bytes = [4 * (-(-width // 16) * 16) for width in program.states]
        self.memory = CacheMemory(
            kv=kv,
            page_tokens=page_tokens,
            max_positions=-(-context // PIECE) * PIECE,
            keys=[self._take(pages * size) for size in page_bytes],
            values=[self._take(pages * size) for size in page_bytes],
            page_bytes=page_bytes,
            # Two rows a sequence, see `kernels/activations.py`.
            states=[self._take(2 * sequences * size) for size in state_bytes],
            state_bytes=state_bytes,
        )
        self._free_pages = list(reversed(range(pages)))
        self._free_states = list(reversed(range(sequences)))

    @property
    def nbytes(self) -> int:
        """Bytes when every page is in use."""
        return sum(memory.nbytes for memory in self._arenas)

    def _take(self, nbytes: int) -> int:
        self._arenas.append(arena(nbytes))
        return self._arenas[-1].address

    def begin(self) -> Sequence:
        """A sequence without tokens."""
        return Sequence(self._free_states.pop())

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Pages for the first `length` positions."""
        assert length <= self.context, length
        while len(sequence.pages) * self.page_tokens < length:
            sequence.pages.append(self._free_pages.pop())

    def end(self, sequence: Sequence) -> None:
        """Takes back what the sequence holds; it must not be used any more."""
        self._free_pages.extend(reversed(sequence.pages))
        self._free_states.append(sequence.state)
        sequence.pages, sequence.tokens = [], []
