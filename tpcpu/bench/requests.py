"""Requests, run and timed by the scheduler that answers people: prompts, then token after token, by greedy choice.

The whole path counts: planning, the message to the other ranks, the program, the candidates, the choice. What
`generate` adds is text. Only rank 0 runs requests, while the others follow.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tpcpu.engine.engine import Engine
from tpcpu.engine.requests import Request
from tpcpu.engine.scheduler import Scheduler
from tpcpu.sampling import Sampled, Sampler, SamplingParams
from tpcpu.sampling.filters import Ids, Logits


class NoText:
    """Stands for a tokenizer, and for its detokenizer, where tokens are numbers and no more."""

    stop_ids = frozenset[int]()
    stopped: str | None = None

    def __init__(self, size: int) -> None:
        self.size = size

    def detokenizer(self, _stop: Sequence[str] = ()) -> "NoText":
        return self

    def push(self, _token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Replayed(Sampler):
    """Chooses the tokens of a text, whatever the model makes of them."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        super().__init__(SamplingParams(temperature=0), size)
        self._tokens = tokens

    def sample(self, _ids: Ids, _logits: Logits, history: Sequence[int] = ()) -> Sampled:
        return Sampled(self._tokens[len(history)])


class Requests:
    """Requests that are worked on together, all of one length: `new_tokens` more than the first one of each."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, replay: Sequence[int] | None = None
    ) -> None:
        """`replay`: the tokens of prompt and answer, whatever the model would choose."""
        self._scheduler = Scheduler(engine, NoText(engine.vocabulary))
        params = SamplingParams(temperature=0, max_tokens=new_tokens + 1)
        self._requests: list[Request] = [self._scheduler.submit(prompt, params) for prompt in prompts]
        self._prompt_tokens = len(prompts[0])
        self.steps = 0
        """Of the tokens behind the first one of each."""
        if replay is not None:
            for request in self._requests:
                request.sampler = Replayed(replay, engine.vocabulary)

    @property
    def ids(self) -> list[list[int]]:
        """The answers so far."""
        return [request.tokens[self._prompt_tokens :] for request in self._requests]

    @property
    def drafted(self) -> int:
        """Tokens that were drafted,"""
        return sum(request.drafter.drafted for request in self._requests if request.drafter is not None)

    @property
    def accepted(self) -> int:
        """and those of them that were right."""
        return sum(request.drafter.accepted for request in self._requests if request.drafter is not None)

    def prefill(self) -> float:
        """Seconds until each has its first token."""
        begin, last = time.perf_counter(), self._requests[-1]
        prompt = len(last.tokens)
        while len(last.tokens) == prompt:
            self._step()
        return time.perf_counter() - begin

    def decode(self) -> float:
        """Tokens a second from then on, of all together."""
        before = self._tokens()
        self.steps = 0
        begin = time.perf_counter()
        while self._scheduler.busy:
            self._step()
        return (self._tokens() - before) / (time.perf_counter() - begin)

    def _step(self) -> None:
        self.steps += 1
        for request, _ in self._scheduler.step():
            if request.error is not None:
                raise request.error

    def _tokens(self) -> int:
        return sum(len(request.tokens) for request in self._requests)


class Prompts:
    """Prompts that no request has had before, so that none finds its beginning in the cache."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self._given = vocabulary, 0

    def random(self, count: int, tokens: int) -> list[list[int]]:
        """`count` prompts of random tokens."""
        return [[self._first(), *self._rest(tokens - 1)] for _ in range(count)]

    def beginning(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Another one that begins with as many tokens of a prompt."""
        return [*prompt[:tokens], self._first(), *self._rest(len(prompt) - tokens - 1)]

    def replayed(self, text: Sequence[int], tokens: int) -> list[int]:
        """The beginning of a text, but for its first token."""
        return [self._first(), *text[1:tokens]]

    def _first(self) -> int:
        self._given += 1
        return self._given % self._vocabulary

    def _rest(self, tokens: int) -> list[int]:
        drawn = np.random.default_rng(self._given).integers(0, self._vocabulary, max(tokens, 0))
        return [int(token) for token in drawn]


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
