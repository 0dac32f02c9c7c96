"""Requests on rank 0: from a prompt's ids to tokens and text, one at a time, and the loss of given tokens.

Knows sequences, sampling and detokenising; nothing of ranks, which the engine drives.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpcpu.engine.cache import Sequence as Cached
from tpcpu.engine.engine import Candidates, Engine
from tpcpu.errors import PromptError
from tpcpu.program.batch import Batch
from tpcpu.sampling import Sampled, Sampler, SamplingParams
from tpcpu.text import Tokenizer


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


@dataclass
class _Answer:
    """An answer while it grows."""

    prompt_ids: list[int]
    sampler: Sampler
    began: float
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    first: float = 0.0

    def completion(self, reason: str) -> Completion:
        params, now = self.sampler.params, time.perf_counter()
        later = len(self.sampled) - 1
        return Completion(
            prompt_ids=self.prompt_ids,
            ids=self.ids,
            text="".join(self.text),
            finish_reason=reason,
            seed=self.sampler.seed,
            ttft_ms=1e3 * ((self.first or now) - self.began),
            decode_tokens_per_s=later / (now - self.first) if later > 0 else None,
            logprobs=None if params.logprobs is None else [_logprobs(sampled) for sampled in self.sampled],
            top_logits=None if params.top_logits is None else [list(sampled.top_logits) for sampled in self.sampled],
        )


def _logprobs(sampled: Sampled) -> dict[str, object]:
    return {"id": sampled.id, "logprob": sampled.logprob, "top": list(sampled.top_logprobs)}


class Generator:
    """Answers requests on rank 0; the other ranks follow. Keeps the last sequence for a prompt that continues it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._cached: Cached | None = None

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        """Chunk after chunk; the last has the completion. Closing the iterator ends the answer after a step."""
        engine, tokenizer = self._engine, self._tokenizer
        self.check(prompt_ids)
        answer = _Answer(list(prompt_ids), Sampler(params, tokenizer.size), time.perf_counter())
        detokenizer = tokenizer.detokenizer(params.stop)
        stops = frozenset[int]() if params.ignore_eos else tokenizer.stop_ids
        feed = self._continue(answer.prompt_ids)
        reason = "length"
        while len(answer.sampled) < params.max_tokens:
            (candidates,) = self._feed(feed, answer.sampler.candidates_needed)
            sampled = answer.sampler.sample(candidates.ids, candidates.logits, answer.prompt_ids + answer.ids)
            answer.first = answer.first or time.perf_counter()
            answer.sampled.append(sampled)
            if sampled.id in stops:
                answer.sampled.pop()
                reason = "stop"
                break
            answer.ids.append(sampled.id)
            text = detokenizer.push(sampled.id)
            answer.text.append(text)
            if detokenizer.stopped is not None:
                reason = "stop"
                yield Chunk(text, sampled.id)
                break
            yield Chunk(text, sampled.id)
            if len(answer.prompt_ids) + len(answer.ids) > engine.context:
                break
            feed = [sampled.id]
        rest = detokenizer.flush()
        answer.text.append(rest)
        yield Chunk(rest, completion=answer.completion(reason))

    def score(self, ids: Sequence[int]) -> list[float]:
        """The negative log likelihood in nats of every id but the first, given those before it."""
        self.check(ids)
        self._begin()
        losses: list[float] = []
        for first in range(0, len(ids) - 1, self._engine.most_wanted):
            targets = ids[first + 1 : first + 1 + self._engine.most_wanted]
            feed = ids[first : first + len(targets)]
            # The whole vocabulary, as the model's own distribution has it: padding rows count in the sum.
            rows = self._step(feed, range(len(feed)), 0, self._engine.vocabulary)
            for row, target in zip(rows, targets, strict=True):
                logits = row.logits.astype(np.float64)
                peak = logits.max()
                losses.append(float(peak + np.log(np.exp(logits - peak).sum()) - logits[target]))
        return losses

    def check(self, ids: Sequence[int]) -> None:
        """Raises PromptError for a prompt that leaves no room for an answer."""
        if len(ids) > self._engine.context:
            raise PromptError(
                f"prompt: {len(ids)} tokens are more than the context of {self._engine.context}; "
                f"shorten it, or raise --context where the model has more"
            )

    def _continue(self, prompt_ids: list[int]) -> list[int]:
        """The tokens of the prompt that the cache does not have."""
        known = self._cached.tokens if self._cached is not None else []
        if known and len(known) < len(prompt_ids) and prompt_ids[: len(known)] == known:
            return prompt_ids[len(known) :]
        self._begin()
        return prompt_ids

    def _begin(self) -> None:
        if self._cached is not None:
            self._engine.cache.end(self._cached)
        self._cached = self._engine.cache.begin()

    def _feed(self, tokens: Sequence[int], candidates: int) -> list[Candidates]:
        """Runs tokens chunk by chunk; the candidates after the last."""
        chunk = self._engine.chunk_tokens
        for first in range(0, len(tokens), chunk):
            part = tokens[first : first + chunk]
            last = first + len(part) == len(tokens)
            result = self._step(part, [len(part) - 1] if last else [], candidates)
        return result

    def _step(
        self, tokens: Sequence[int], wanted: Sequence[int], candidates: int, vocabulary: int | None = None
    ) -> list[Candidates]:
        sequence = self._cached
        assert sequence is not None
        position = len(sequence.tokens)
        self._engine.cache.reserve(sequence, position + len(tokens))
        # Noted before the step: after an interrupt in the middle the cache may hold any of them, and no prompt
        # can continue tokens that nobody knows.
        self._cached, kept = None, sequence
        try:
            result = self._engine.step(
                Batch.build(
                    [(tokens, position, sequence.state, sequence.pages)], wanted,
                    candidates=candidates, vocabulary=vocabulary or self._tokenizer.size,
                )
            )  # fmt: skip
        except BaseException:
            self._engine.cache.end(kept)
            raise
        kept.tokens.extend(tokens)
        self._cached = kept
        return result
