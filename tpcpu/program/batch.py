"""A batch: tokens of one or more sequences that go through the program together, as one int32 message.

Rank 0 builds it, every rank reads it where it lies. A header, then arrays one after another; see `Batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
        message = np.zeros(length, np.int32)
        message[:_HEADER] = (length, count, len(wanted), len(parts), row, candidates, vocabulary)
        batch = cls.read(message)
        at = 0
        for i, (tokens, position, state, pages) in enumerate(parts):
            here = slice(at, at + len(tokens))
            batch.tokens[here] = tokens
            batch.positions[here] = range(position, position + len(tokens))
            batch.sequences[here] = i
            batch.firsts[here] = at
            batch.states[i] = state
            batch.pages[i, : len(pages)] = pages
            at += len(tokens)
        batch.wanted[:] = wanted
        return batch

    @classmethod
    def read(cls, message: NDArray[np.int32]) -> "Batch":
        """Views into a message that `build` made."""
        count, wanted, sequences, row = (int(message[i]) for i in (_TOKENS, _WANTED, _SEQUENCES, _PAGES))
        sizes = (count, count, count, count, wanted, sequences, sequences * row)
        ends = np.cumsum((_HEADER, *sizes))
        tokens, positions, rows, firsts, chosen, states, pages = (
            message[end - size : end] for end, size in zip(ends[1:].tolist(), sizes, strict=True)
        )
        return cls(
            message, tokens, positions, rows, firsts, chosen, states, pages.reshape(sequences, row),
            candidates=int(message[_CANDIDATES]), vocabulary=int(message[_VOCABULARY]),
        )  # fmt: skip
