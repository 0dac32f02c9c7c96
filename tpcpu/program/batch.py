"""A batch: tokens of one or more sequences that go through the program together, as one int32 message.

Rank 0 builds it, every rank reads it where it lies. A header, then arrays one after another; see `Batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_LENGTH, _TOKENS, _WANTED, _SEQUENCES, _PAGES, _CANDIDATES, _VOCABULARY, _HEADER = range(8)


@dataclass(frozen=True)
class Batch:
    """Tokens of one sequence follow one another, in order of their positions.

    tokens      (tokens,) int32
    positions   (tokens,) of each in its sequence
    sequences   (tokens,) the row of its sequence in `states` and `pages`
    firsts      (tokens,) the index of the first token of its sequence in the batch
    wanted      (wanted,) indices of the tokens that need logits
    states      (sequences,) places in the convolution states
    pages       (sequences, pages) of the cache
    candidates  how many of the largest logits of each rank rank 0 needs; 0: all
    vocabulary  ids from here on are padding rows of the head, and no candidates
    """

    message: NDArray[np.int32]
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    firsts: NDArray[np.int32]
    wanted: NDArray[np.int32]
    states: NDArray[np.int32]
    pages: NDArray[np.int32]
    candidates: int
    vocabulary: int
    starts: tuple[int, ...]
    """Where each of the seven arrays begins in the message."""

    @classmethod
    def build(
        cls,
        parts: Sequence[tuple[Sequence[int], int, int, Sequence[int]]],
        wanted: Sequence[int],
        *,
        candidates: int,
        vocabulary: int,
    ) -> "Batch":
        """Each part: (tokens, position of the first, state, pages) of one sequence."""
        count = sum(len(tokens) for tokens, *_ in parts)
        row = max(len(pages) for *_, pages in parts)
        length = _HEADER + 4 * count + len(wanted) + len(parts) * (1 + row)
        flat: dict[str, list[int]] = {name: [] for name in ("tokens", "positions", "rows", "firsts", "states", "pages")}
        for i, (part, position, state, pages) in enumerate(parts):
            flat["firsts"] += [len(flat["tokens"])] * len(part)
            flat["tokens"] += part
            flat["positions"] += range(position, position + len(part))
            flat["rows"] += [i] * len(part)
            flat["states"].append(state)
            flat["pages"] += [*pages, *[0] * (row - len(pages))]
        header = [length, count, len(wanted), len(parts), row, candidates, vocabulary]
        # One list and one conversion: much quicker than array by array for the few tokens of most steps.
        before, after = ("tokens", "positions", "rows", "firsts"), ("states", "pages")
        words = [
            *header,
            *(n for name in before for n in flat[name]),
            *wanted,
            *(n for name in after for n in flat[name]),
        ]
        return cls.read(np.array(words, np.int32))

    def advance(self, tokens: Sequence[int]) -> None:
        """Makes this the next batch of the same sequences, one token of each: for steps with no more news than that."""
        self.tokens[:] = tokens
        np.add(self.positions, 1, out=self.positions)

    @classmethod
    def read(cls, message: NDArray[np.int32]) -> "Batch":
        """Views into a message that `build` made."""
        _, count, wanted, sequences, row, candidates, vocabulary = message[:_HEADER].tolist()
        sizes = (count, count, count, count, wanted, sequences, sequences * row)
        ends = list(accumulate(sizes, initial=_HEADER))
        tokens, positions, rows, firsts, chosen, states, pages = map(message.__getitem__, map(slice, ends, ends[1:]))
        pages.shape = sequences, row
        return cls(
            message, tokens, positions, rows, firsts, chosen, states, pages, candidates, vocabulary, tuple(ends[:-1])
        )
