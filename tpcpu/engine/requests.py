"""One request: a prompt, and its answer while it grows token by token.

Knows sampling and text; nothing of other requests, of steps, and of the cache's pages, which the scheduler gives it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tpcpu.engine.cache import Sequence as Cached
from tpcpu.engine.engine import Candidates
from tpcpu.engine.speculation import Drafter
from tpcpu.errors import TpcpuError
from tpcpu.sampling import Sampled, Sampler, SamplingParams


@dataclass(frozen=True)
class Completion:
    """An answer.

    `ids` are the tokens chosen, without the one that stopped; `text` is theirs, up to a stop string. `finish_reason`:
    stop (the model's end, or a stop string), length (`max_tokens`, or the context is full) or cancelled. `logprobs`
    and `top_logits` have an entry a token where they were asked for. Times: until the first token, and tokens a
    second after it.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str
    seed: int
    ttft_ms: float
    decode_tokens_per_s: float | None
    logprobs: list[dict[str, object]] | None = None
    top_logits: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class Chunk:
    """What one token added: its id and its text, which may be empty. The last one has the whole answer."""

    text: str
    id: int | None = None
    completion: Completion | None = None


class Detokenizing(Protocol):
    """What makes text of an answer, token by token: see `text.IncrementalDetokenizer`."""

    @property
    def stopped(self) -> str | None: ...
    def push(self, token_id: int, /) -> str: ...
    def flush(self) -> str: ...


class Tokens(Protocol):
    """What a request has to know of its tokens: see `text.Tokenizer`."""

    @property
    def size(self) -> int: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    def detokenizer(self, stop: Sequence[str], /) -> Detokenizing: ...


class Request:
    """`tokens` are those of prompt and answer. `sequence` is what the cache has of them while the request runs."""

    def __init__(
        self, prompt_ids: Sequence[int], params: SamplingParams, tokenizer: Tokens, context: int, speculate: int,
        answered: Sequence[Sampled] = (),
    ) -> None:  # fmt: skip
        """`speculate`: the most tokens that are drafted at a time. `answered`: what an earlier run chose, in order.

        With these it goes on as if nothing had happened, given the same params and seed. It may be finished at once.
        """
        self.tokens = list(prompt_ids)
        self.sequence: Cached | None = None
        self.sampler = Sampler(params, tokenizer.size)
        self.drafter = Drafter(speculate, self.tokens) if speculate else None
        self.completion: Completion | None = None
        self.error: TpcpuError | None = None
        """What ended the answer, where nothing regular did."""
        self._prompt_tokens = len(self.tokens)
        self._most_tokens = min(self._prompt_tokens + params.max_tokens, context + 1)
        self._stops = frozenset[int]() if params.ignore_eos else tokenizer.stop_ids
        self._detokenizer = tokenizer.detokenizer(params.stop)
        self._text: list[str] = []
        self._sampled: list[Sampled] = []
        self._began, self._first = time.perf_counter(), 0.0
        for sampled in answered:
            if self.finished:
                break
            self.sampler.step += 1
            self._add(sampled)

    @property
    def finished(self) -> bool:
        """Whether there will be no more tokens."""
        return self.completion is not None or self.error is not None

    @property
    def answered(self) -> Sequence[Sampled]:
        """The tokens chosen so far, with what the request asked for beside them."""
        return self._sampled

    @property
    def room(self) -> int:
        """Tokens that may be drafted: behind them there has to be one more."""
        return self._most_tokens - len(self.tokens) - 1

    def take(self, candidates: Candidates) -> list[Chunk]:
        """Chooses the next token, whose logits these are; what it adds, and the end of the answer if it is that.

        Raises TpcpuError for logits that are no numbers.
        """
        sampled = self.sampler.sample(candidates.ids, candidates.logits, self.tokens)
        if not self._first:
            self._first = time.perf_counter()
        if sampled.id in self._stops:
            return [self._finish("stop")]
        return self._add(sampled)

    def _add(self, sampled: Sampled) -> list[Chunk]:
        chosen = sampled.id
        self._sampled.append(sampled)
        self.tokens.append(chosen)
        text = self._detokenizer.push(chosen)
        self._text.append(text)
        chunk = Chunk(text, chosen)
        if self._detokenizer.stopped is not None:
            return [chunk, self._finish("stop")]
        if len(self.tokens) >= self._most_tokens:
            return [chunk, self._finish("length")]
        if self.drafter is not None:
            self.drafter.push(chosen)
        return [chunk]

    def cancel(self) -> None:
        """Ends the answer with what there is of it."""
        if not self.finished:
            self._finish("cancelled")

    def _finish(self, reason: str) -> Chunk:
        rest = self._detokenizer.flush()
        self._text.append(rest)
        params, now = self.sampler.params, time.perf_counter()
        later = len(self._sampled) - 1
        self.completion = Completion(
            prompt_ids=self.tokens[: self._prompt_tokens],
            ids=self.tokens[self._prompt_tokens :],
            text="".join(self._text),
            finish_reason=reason,
            seed=self.sampler.seed,
            ttft_ms=1e3 * ((self._first or now) - self._began),
            decode_tokens_per_s=later / (now - self._first) if later > 0 else None,
            logprobs=None if params.logprobs is None else [_logprobs(sampled) for sampled in self._sampled],
            top_logits=None if params.top_logits is None else [list(sampled.top_logits) for sampled in self._sampled],
        )
        return Chunk(rest, completion=self.completion)


def _logprobs(sampled: Sampled) -> dict[str, object]:
    return {"id": sampled.id, "logprob": sampled.logprob, "top": list(sampled.top_logprobs)}
