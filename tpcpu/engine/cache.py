"""The cache of sequences: pages of keys and values, and the last inputs of convolutions.

Memory is address space until a kernel of this rank writes it, and so on the rank's own node. Which page a sequence
gets is decided on rank 0 alone: the other ranks have the same number of pages, and see them in batches.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from tpcpu.engine.pages import START, Pages
from tpcpu.errors import UsageError
from tpcpu.kernels.record import RING
from tpcpu.parallel.numa import Arena, arena
from tpcpu.program.kv_format import KvFormat
from tpcpu.program.memory import CacheMemory
from tpcpu.program.operations import PIECE, Program

TILE = 16
"""Positions of keys that lie together; a page holds whole tiles."""


@dataclass(eq=False)
class Sequence:
    """Tokens that have gone through the model, and where the cache keeps what it knows of them."""

    state: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    named: int = 0
    """Pages whose contents other sequences may use."""


class Layout:
    """How large a page and a sequence's state are, for each layer of a rank. Raises UsageError for a bad page size."""

    def __init__(self, program: Program, page_tokens: int, kv: KvFormat) -> None:
        if page_tokens < TILE or page_tokens % TILE:
            raise UsageError(f"--page-tokens {page_tokens} is not a positive multiple of {TILE}")
        self.page_tokens, self.kv = page_tokens, kv
        self.page_bytes = [kv.page_bytes(shape, page_tokens) for shape in program.kv]
        self.sides = [shape.rows for shape in program.kv]
        """2: a page has keys and values; 1: keys, in which values lie."""
        self.state_bytes = [4 * (-(-width // 16) * 16) for width in program.states]

    @property
    def bytes_of_page(self) -> int:
        """Bytes of one page in all layers."""
        held = zip(self.page_bytes, self.sides, strict=True)
        return sum(size * sides for size, sides in held) + sum(self.state_bytes)


class Cache:
    """Room for `sequences` sequences of up to `context` positions each, and for `tokens` positions of them together.

    `tokens` is by default what all can need. Less is enough for one: what there is not, `reserve` refuses.
    """

    def __init__(
        self,
        program: Program,
        *,
        context: int,
        page_tokens: int,
        sequences: int,
        kv: KvFormat,
        tokens: int | None = None,
    ) -> None:
        layout = Layout(program, page_tokens, kv)
        self.context, self.page_tokens = context, page_tokens
        most = -(-context // page_tokens) * sequences
        count = most if tokens is None else max(-(-context // page_tokens), tokens // page_tokens)
        self._arenas: list[Arena] = []
        keys = [self._take(count * size) for size in layout.page_bytes]
        self.memory = CacheMemory(
            kv=kv,
            page_tokens=page_tokens,
            max_positions=-(-context // PIECE) * PIECE,
            keys=keys,
            # They may lie in keys.
            values=[
                self._take(count * size) if sides == 2 else key
                for size, sides, key in zip(layout.page_bytes, layout.sides, keys, strict=True)
            ],
            page_bytes=layout.page_bytes,
            states=[self._take(RING * sequences * size) for size in layout.state_bytes],
            page_states=[self._take(count * size) for size in layout.state_bytes],
            state_bytes=layout.state_bytes,
        )
        self.pages = Pages(count, page_tokens)
        self._live: dict[int, Sequence] = {}
        self._free_states = list(range(sequences - 1, -1, -1))
        self._states = sequences

    @property
    def nbytes(self) -> int:
        """Bytes when every page is in use."""
        return sum(memory.nbytes for memory in self._arenas)

    def _take(self, nbytes: int) -> int:
        self._arenas.append(arena(nbytes))
        return self._arenas[-1].address

    def begin(self, tokens: Tokens[int] = ()) -> Sequence:
        """A sequence that has as many of these tokens as the cache knows already, whole pages of them, not all."""
        sequence = Sequence(self._free_states.pop())
        self._live[sequence.state] = sequence
        if tokens:
            sequence.pages = self.pages.match(tokens)
            sequence.named = len(sequence.pages)
            sequence.tokens = list(tokens[: sequence.named * self.page_tokens])
        return sequence

    def reserve(self, sequence: Sequence, length: int) -> bool:
        """Pages for the first `length` positions: all of them or, where not enough are available, none."""
        assert length <= self.context, length
        more = -(-length // self.page_tokens) - len(sequence.pages)
        if more > self.pages.available:
            return False
        for _ in range(more):
            sequence.pages.append(self.pages.take())
        return True

    def extend(self, sequence: Sequence, tokens: Tokens[int]) -> None:
        """These tokens, behind those that the sequence has, have gone through the model and stay.

        Pages that they fill are known from now on, which may exchange them in the sequence for equal ones.
        """
        sequence.tokens += tokens
        size = self.page_tokens
        while len(sequence.tokens) >= (sequence.named + 1) * size:
            number = sequence.named
            before = sequence.pages[number - 1] if number else START
            whole = sequence.tokens[number * size : (number + 1) * size]
            sequence.pages[number] = self.pages.name(sequence.pages[number], before, whole)
            sequence.named += 1

    def end(self, sequence: Sequence) -> None:
        """Takes back what the sequence holds; it must not be used any more."""
        self.pages.release(sequence.pages)
        del self._live[sequence.state]
        self._free_states.append(sequence.state)
        sequence.pages, sequence.tokens = [], []

    def recover(self) -> None:
        """Ends all sequences, after an interrupt anywhere in the methods above; what is known stays known."""
        self.pages.recover()
        self._live = {}
        self._free_states = list(range(self._states - 1, -1, -1))

    def check(self) -> None:
        """Asserts that pages and states are in one place each."""
        self.pages.check([sequence.pages for sequence in self._live.values()])
        assert sorted([*self._free_states, *self._live]) == list(range(self._states)), "a state is in one place"
        for state, sequence in self._live.items():
            assert sequence.state == state
            assert sequence.named == len(sequence.tokens) // self.page_tokens <= len(sequence.pages)
