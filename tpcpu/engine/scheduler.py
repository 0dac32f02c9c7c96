"""Continuous batching on rank 0: which tokens of which requests go through the model together in the next step.

Plain Python over lists of requests, to be used from one thread: `submit`, `step`, `cancel`. First come, first served:
a step has one token (and perhaps drafts) of every answer that has begun, and beside them as many tokens of prompts as
fit a chunk, the earliest request's first. Knows neither ranks nor kernels; the engine runs the batch.

A request gets pages for its whole prompt when it is admitted, and further ones as its answer grows. Where there are
none left, the youngest that runs goes back to waiting, and is read again later; what the cache still knows then, of
its own or of others, is not read again. A request of at most `context` tokens always fits once it is alone.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tpcpu.engine.cache import Sequence as Cached
from tpcpu.engine.engine import Candidates, Engine
from tpcpu.engine.requests import Chunk, Request, Tokens
from tpcpu.errors import PromptError, TpcpuError
from tpcpu.program.attending import FEW_TOKENS
from tpcpu.program.batch import Batch
from tpcpu.sampling import Sampled, SamplingParams

Work = tuple[Request, Sequence[int], int]
"""A request, the tokens of it in a step, and behind how many of these, the last ones, a token may be chosen."""

Event = tuple[Request, Chunk]


class Scheduler:
    """Requests that wait and requests that run, each list in the order of arrival: whatever runs came before."""

    def __init__(self, engine: Engine, tokenizer: Tokens) -> None:
        self._engine, self._tokenizer, self._cache = engine, tokenizer, engine.cache
        self._most = min(engine.max_batch, engine.chunk_tokens, engine.most_wanted)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._blocked_since = -1
        """The cache's count of releases when the first that waits found too few pages."""
        self._steady: Batch | None = None
        """The last batch, if the next one has a token each of the same requests,"""
        self._steady_steps = 0
        """which holds for so many steps, until one of them needs a page."""
        self._inside = False

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._running or self._waiting)

    @property
    def running(self) -> Sequence[Request]:
        """What runs, in the order of arrival."""
        return self._running

    @property
    def waiting(self) -> Sequence[Request]:
        """What waits, in the order of arrival, that which was sent back to waiting included."""
        return self._waiting

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises PromptError for a prompt that leaves no room for an answer."""
        if len(ids) > self._engine.context:
            raise PromptError(
                f"prompt: {len(ids)} tokens are more than the context of {self._engine.context}; "
                f"shorten it, or raise --context where the model has more"
            )

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, answered: Sequence[Sampled] = ()) -> Request:
        """A request that steps from now on work on, when its turn comes. Raises PromptError.

        `answered`: tokens of the answer that are known from an earlier run; they may have finished it.
        """
        self._tidy()
        self.check_prompt(prompt_ids)
        engine = self._engine
        request = Request(prompt_ids, params, self._tokenizer, engine.context, engine.speculate, answered)
        if not request.finished:
            self._waiting.append(request)
            self._steady = None
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request, finished or not; what it held is free at once."""
        self._tidy()
        request.cancel()
        self._steady = None
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._running:
            self._inside = True
            self._retire(request)
            self._inside = False

    def abandon(self) -> None:
        """Cancels all requests. Afterwards the cache is whole, whatever was interrupted."""
        self._inside = True
        for request in [*self._running, *self._waiting]:
            request.cancel()
            request.sequence = None
        self._running.clear()
        self._waiting.clear()
        self._steady = None
        self._cache.recover()
        self._inside = False

    def _tidy(self) -> None:
        """After an interrupt outside of a step, or in the tidying up behind one, all begins anew."""
        if self._inside:
            self.abandon()

    def step(self) -> list[Event]:
        """One step of the model; for each token chosen in it what it adds to its answer, in order.

        Where it raises, all requests are cancelled. What is wrong with one alone is in its `error`; its chunk is empty.
        """
        self._inside = True
        try:
            events = self._go_on() if self._steady_steps and self._steady is not None else self._plan_and_run()
        except BaseException:
            self.abandon()
            raise
        self._inside = False
        return events

    @contextmanager
    def reading(self, length: int) -> Iterator[Cached]:
        """A sequence with room for `length` positions that belongs to no request, while there are none."""
        self._tidy()
        assert not self.busy
        self._inside = True
        try:
            sequence = self._cache.begin()
            fits = self._cache.reserve(sequence, length)
            assert fits, "the cache holds a whole context"
            yield sequence
            self._cache.end(sequence)
        except BaseException:
            self.abandon()
            raise
        self._inside = False

    # Planning

    def _go_on(self) -> list[Event]:
        """A token each of the same requests as before."""
        batch, running = self._steady, self._running
        assert batch is not None
        if self._engine.speculate and (drafts := self._drafts(running)):
            return self._run([_answer(request, drafts) for request in running])
        self._steady_steps -= 1
        last = [request.tokens[-1] for request in running]
        batch.advance(last)
        events: list[Event] = []
        for request, token, row in zip(running[:], last, self._engine.step(batch), strict=True):
            assert request.sequence is not None
            self._cache.extend(request.sequence, (token,))
            self._take(request, row, events)
            if request.finished:
                self._retire(request)
        return events

    def _plan_and_run(self) -> list[Event]:
        self._room_for_answers()
        answering = [request for request in self._running if _missing(request) == 1]
        budget = self._engine.chunk_tokens - len(answering)
        work: list[Work] = []
        reading = [request for request in self._running if _missing(request) > 1]
        for request in reading:
            budget -= self._read(request, budget, work)
        while budget and (admitted := self._admit()) is not None:
            budget -= self._read(admitted, budget, work)
        drafts = {} if work or not self._engine.speculate else self._drafts(answering)
        return self._run([*(_answer(request, drafts) for request in answering), *work])

    def _room_for_answers(self) -> None:
        """A place in the cache for the last token of every answer; the youngest requests make room for older ones."""
        for request in list(self._running):
            while request.sequence is not None and not self._cache.reserve(request.sequence, len(request.tokens)):
                self._preempt(self._running[-1])

    def _preempt(self, request: Request) -> None:
        assert request.sequence is not None
        self._running.remove(request)
        self._cache.end(request.sequence)
        request.sequence = None
        self._waiting.appendleft(request)

    def _read(self, request: Request, budget: int, work: list[Work]) -> int:
        """Plans tokens of a prompt; how many."""
        assert request.sequence is not None
        first = len(request.sequence.tokens)
        part = request.tokens[first : first + budget]
        if part:
            work.append((request, part, int(first + len(part) == len(request.tokens))))
        return len(part)

    def _admit(self) -> Request | None:
        """Lets the first that waits run, if there are pages for all its tokens and one for each answer to grow."""
        cache, pages = self._cache, self._cache.pages
        if not self._waiting or len(self._running) >= self._most or pages.releases == self._blocked_since:
            return None
        request = self._waiting[0]
        sequence = cache.begin(request.tokens)
        needed = -(-len(request.tokens) // cache.page_tokens) - len(sequence.pages)
        if needed + len(self._running) > pages.available and self._running:
            cache.end(sequence)
            self._blocked_since = pages.releases
            return None
        fits = cache.reserve(sequence, len(request.tokens))
        assert fits, "the cache holds a whole context"
        request.sequence = sequence
        self._running.append(self._waiting.popleft())
        return request

    def _drafts(self, answering: Sequence[Request]) -> dict[Request, list[int]]:
        """Tokens that may follow, for as many answers as a step of few tokens has room for."""
        found: dict[Request, list[int]] = {}
        alone = len(answering) == 1
        spare = min(self._engine.chunk_tokens, self._engine.most_wanted if alone else FEW_TOKENS) - len(answering)
        for request in answering:
            assert request.sequence is not None
            assert request.drafter is not None
            draft = request.drafter.propose(min(spare, request.room)) if spare > 0 else []
            while draft and not self._cache.reserve(request.sequence, len(request.tokens) + len(draft)):
                draft.pop()
            if draft:
                found[request] = draft
                spare -= len(draft)
        return found

    # Running

    def _run(self, work: Sequence[Work]) -> list[Event]:
        assert work, "what is busy has something to do"
        parts: list[tuple[Sequence[int], int, int, Sequence[int]]] = []
        wanted: list[int] = []
        needs: list[int] = []
        at = 0
        for request, tokens, choices in work:
            sequence = request.sequence
            assert sequence is not None
            parts.append((tokens, len(sequence.tokens), sequence.state, sequence.pages))
            at += len(tokens)
            wanted += range(at - choices, at)
            if choices:
                needs.append(request.sampler.candidates_needed)
        # As many as any of them needs; 0 is all. A choice does not depend on candidates that it does not need.
        candidates = max(needs, default=1) if all(needs) else 0
        batch = Batch.build(parts, wanted, candidates=candidates, vocabulary=self._tokenizer.size)
        rows = self._engine.step(batch)
        events: list[Event] = []
        at = 0
        for request, tokens, choices in work:
            self._note(request, tokens, rows[at : at + choices], events)
            at += choices
        self._steady = None
        if at == len(self._running) == len(batch.tokens):
            self._stay(batch)
        return events

    def _note(self, request: Request, tokens: Sequence[int], rows: Sequence[Candidates], events: list[Event]) -> None:
        """What has come of a request's tokens: how many of them stay, what was chosen, and whether it is finished."""
        assert request.sequence is not None
        kept = len(tokens) - len(rows)
        for row in rows:
            kept += 1
            chosen = self._take(request, row, events)
            # The next of the tokens is a draft; it stays if it is what was chosen.
            if request.finished or kept == len(tokens) or tokens[kept] != chosen:
                break
        if len(rows) > 1:
            assert request.drafter is not None
            request.drafter.verified(len(rows) - 1, kept - 1)
        self._cache.extend(request.sequence, tokens[:kept])
        if request.finished:
            self._retire(request)

    def _take(self, request: Request, row: Candidates, events: list[Event]) -> int | None:
        try:
            chunks = request.take(row)
        except TpcpuError as error:
            request.error = error
            events.append((request, Chunk("")))
            return None
        for chunk in chunks:
            events.append((request, chunk))
        return chunks[0].id

    def _stay(self, batch: Batch) -> None:
        """The next steps are like this one, as long as nothing happens and nobody needs a page."""
        self._steady = batch
        size = self._cache.page_tokens
        self._steady_steps = min(
            len(request.sequence.pages) * size - len(request.tokens) + 1
            for request in self._running
            if request.sequence is not None
        )

    def _retire(self, request: Request) -> None:
        assert request.sequence is not None
        self._steady = None
        self._running.remove(request)
        self._cache.end(request.sequence)
        request.sequence = None

    def check(self) -> None:
        """Asserts that requests, pages and states are in one place each, between steps."""
        self._cache.check()
        assert not self._inside
        assert len(self._running) <= self._most
        for request in self._waiting:
            assert request.sequence is None, "what waits holds nothing"
            assert not request.finished
        for request in self._running:
            assert request.sequence is not None
            assert not request.finished
            known = request.sequence.tokens
            assert len(known) < len(request.tokens), "there is something to do"
            assert known == request.tokens[: len(known)], "the cache knows the request's own tokens"
            assert len(request.sequence.pages) * self._cache.page_tokens >= len(known)


def _missing(request: Request) -> int:
    """Tokens that have not gone through the model."""
    assert request.sequence is not None
    return len(request.tokens) - len(request.sequence.tokens)


def _answer(request: Request, drafts: Mapping[Request, Sequence[int]]) -> Work:
    """The last token of an answer, and what is drafted behind it."""
    tokens = [request.tokens[-1], *drafts.get(request, ())]
    return request, tokens, len(tokens)
