"""A model without weights, to schedule requests on: its logits are drawn from a hash of all tokens before.

It reads these from the pages that a batch names, as attention does, and writes them as a step does, so that a page
that is lost, shared wrongly or given out twice changes the answers. The convolutions' ring and the rows of pages are
there too. Nothing is compiled.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tpcpu.engine.cache import Cache
from tpcpu.engine.engine import Candidates
from tpcpu.kernels.record import RING
from tpcpu.models import read_config
from tpcpu.parallel.partition import Share
from tpcpu.program.kv_format import KV_FORMATS
from tpcpu.text.stop_strings import StopStrings

PROGRAM = read_config(
    {
        "model_type": "yuan", "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 3, "vocab_size": 100,
    }
).program(Share())  # fmt: skip

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def hashed(history: Sequence[int], vocabulary: int) -> Any:
    """Logits that depend on every token, with a liking for saying again what was said after the last two tokens."""
    seed = hashlib.blake2b(np.array(history, np.int32).tobytes(), digest_size=8).digest()
    logits = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(vocabulary)
    for i in range(len(history) - 2, 1, -1):
        if history[i - 2 : i] == history[-2:]:
            logits[history[i]] += 3
            break
    return logits.astype(np.float32)


class Detokenizer:
    """A letter for each token."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> str | None:
        return self._stop.found

    def push(self, token: int) -> str:
        return self._stop.push(LETTERS[token])

    def flush(self) -> str:
        return self._stop.flush()


class Tokenizer:
    """Letters; token 0 ends an answer."""

    stop_ids = frozenset({0})

    def __init__(self, size: int) -> None:
        self.size = size

    def detokenizer(self, stop: Sequence[str] = ()) -> Any:
        return Detokenizer(stop)


class FakeEngine:
    """As much of an engine as the scheduler sees."""

    def __init__(
        self, *, context: int = 96, cache_tokens: int = 96, page_tokens: int = 16, chunk_tokens: int = 32,
        max_batch: int = 4, speculate: int = 0, vocabulary: int = 12,
        logits: Callable[[Sequence[int], int], Any] = hashed,
    ) -> None:  # fmt: skip
        self.cache = Cache(
            PROGRAM,
            context=context,
            page_tokens=page_tokens,
            sequences=max_batch,
            kv=KV_FORMATS["bf16"],
            tokens=cache_tokens,
        )
        self.context, self.chunk_tokens, self.most_wanted = context, chunk_tokens, chunk_tokens
        self.max_batch, self.speculate, self.vocabulary = max_batch, speculate, vocabulary
        self.steps = 0
        self.fed: list[int] = []
        """Tokens of each step."""
        self.interrupt_at: int | None = None
        self._logits = logits
        self._held = np.full((self.cache.pages.count, page_tokens), -1)
        self._ring = np.full((max_batch, RING), -1)
        self._behind = np.full(self.cache.pages.count, -1)

    def step(self, batch: Any) -> list[Candidates]:
        """Runs a batch."""
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        size = self.cache.page_tokens
        assert 0 < len(batch.tokens) <= self.chunk_tokens
        assert len(batch.wanted) <= self.most_wanted
        self.fed.append(len(batch.tokens))
        places = [
            (row, position, batch.pages[row, position // size])
            for row, position in zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True)
        ]
        written = {(page, position % size) for _, position, page in places}
        assert len(written) == len(places), "no two tokens of a step have one place in the cache"
        for token, (_, position, page) in zip(batch.tokens.tolist(), places, strict=True):
            self._held[page, position % size] = token
        histories = [
            self._held[batch.pages[row, : position // size + 1]].reshape(-1)[: position + 1].tolist()
            for row, position, _ in places
        ]
        self._convolve(batch, places, histories)
        result = []
        for number in batch.wanted.tolist():
            logits = self._logits(histories[number], self.vocabulary)
            order = np.argsort(-logits, kind="stable")[: batch.candidates] if batch.candidates else slice(None)
            result.append(Candidates(np.arange(self.vocabulary)[order], logits[order]))
        return result

    def _convolve(self, batch: Any, places: Any, histories: Any) -> None:
        """Every token finds the one before it where a convolution looks for it."""
        size = self.cache.page_tokens
        for number, (row, position, _) in enumerate(places):
            if batch.firsts[number] == number and position:
                page = batch.pages[row, (position - 1) // size]
                in_ring = self._ring[batch.states[row], (position - 1) % RING]
                before = self._behind[page] if position % size == 0 else in_ring
                assert before == histories[number][-2], "the state holds the token before"
        for (row, position, page), history in zip(places, histories, strict=True):
            self._ring[batch.states[row], position % RING] = history[-1]
            if (position + 1) % size == 0:
                self._behind[page] = history[-1]
