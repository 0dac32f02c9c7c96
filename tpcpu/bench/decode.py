"""One request, run and timed as `generate` runs it: prompt, then token after token, by greedy choice.

The whole path counts: the message to the other ranks, the program, the candidates, the choice. What `generate` adds
is text.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tpcpu.engine.cache import Sequence as Cached
from tpcpu.engine.engine import Engine
from tpcpu.program.batch import Batch
from tpcpu.sampling import Sampler, SamplingParams


class Request:
    """A prompt of random tokens, and what follows it. Only rank 0 calls its methods, while the others follow."""

    def __init__(self, engine: Engine, prompt_tokens: int, new_tokens: int) -> None:
        self._engine = engine
        self._new_tokens = new_tokens
        self._sampler = Sampler(SamplingParams(temperature=0, max_tokens=new_tokens + 1), engine.vocabulary)
        self.prompt = np.random.default_rng(0).integers(0, engine.vocabulary, prompt_tokens).tolist()
        self.ids: list[int] = []
        self._cached: Cached = engine.cache.begin()

    def prefill(self) -> float:
        """Seconds until the first token."""
        chunk = self._engine.chunk_tokens
        begin = time.perf_counter()
        for first in range(0, len(self.prompt), chunk):
            part = self.prompt[first : first + chunk]
            last = first + len(part) == len(self.prompt)
            self._step(part, [len(part) - 1] if last else [])
        return time.perf_counter() - begin

    def decode(self) -> float:
        """Seconds of all tokens after the first."""
        begin = time.perf_counter()
        for _ in range(self._new_tokens):
            self._step(self.ids[-1:], [0])
        return time.perf_counter() - begin

    def end(self) -> None:
        """Gives the cache back."""
        self._engine.cache.end(self._cached)

    def _step(self, tokens: Sequence[int], wanted: Sequence[int]) -> None:
        engine, cached = self._engine, self._cached
        position = len(cached.tokens)
        engine.cache.reserve(cached, position + len(tokens))
        candidates = self._sampler.candidates_needed
        batch = Batch.build(
            [(tokens, position, cached.state, cached.pages)], wanted, candidates=candidates,
            vocabulary=engine.vocabulary,
        )  # fmt: skip
        result = engine.step(batch)
        cached.tokens.extend(tokens)
        if not result:
            return
        (found,) = result
        # A rank that is measured alone may hold no row of the head.
        self.ids.append(self._sampler.sample(found.ids, found.logits).id if len(found.ids) else 0)


@contextmanager
def following(engine: Engine) -> Iterator[bool]:
    """Inside, rank 0 (which gets True) may step; the others have followed when they get here."""
    if not engine.communicator.is_root:
        engine.follow()
        yield False
        return
    try:
        yield True
    finally:
        engine.release()
