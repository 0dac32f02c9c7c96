"""The loop of a batch on rank 0: lines in, steps of the model, answers out, and the journal in time.

The scheduler always has a few requests waiting and never many, whatever the length of the input. Knows requests and the
store; neither flags nor ranks.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from tpcpu.batch import journal
from tpcpu.batch.answers import answer, encode
from tpcpu.batch.journal import Begun, Record
from tpcpu.batch.lines import Asked, BadLine, Id, parse
from tpcpu.batch.source import MOST_BYTES, Source
from tpcpu.batch.store import Store
from tpcpu.engine.requests import Request
from tpcpu.engine.scheduler import Scheduler
from tpcpu.errors import TpcpuError
from tpcpu.sampling import SamplingParams
from tpcpu.text import Tokenizer

COMMIT_SECONDS = 0.5
"""Between two writings of the journal: what a fault costs at most, and the time a slow disk has left."""

WAITING = 4
"""Requests that wait for their turn, so that none is missing when one ends."""

_REFILL_SECONDS = 0.02
"""Spent on lines between two steps; bad lines, and those answered before, may come in thousands."""


class Progress(Protocol):
    """Told how far the work is."""

    def show(self, done: int, total: int, tokens: int) -> None:
        """Lines done, of all there are, and tokens chosen in this run."""


@dataclass
class Outcome:
    """What came of a run. `stopped`: it was asked to end before the end."""

    answers: int = 0
    errors: int = 0
    """Lines in the files, those of earlier runs included."""
    resumed: int = 0
    """How many of both were there before, """
    continued: int = 0
    """and in how many answers this run took up in the middle."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    """Of the answers that this run finished, and tokens that it chose."""
    seconds: float = 0.0
    journal_seconds: float = 0.0
    """How long steps were held up by answers, errors and journal being written."""
    stopped: bool = False


@dataclass
class _Open:
    """A request that is not finished."""

    line: int
    asked: Asked
    request: Request
    written: int
    """How many of its tokens the journal has."""


class Runner:
    """One run. `stop` is asked after every step."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, source: Source, store: Store, defaults: SamplingParams,
        *, most: int, stop: Callable[[], bool], progress: Progress,
    ) -> None:  # fmt: skip
        """`most`: requests that the engine works on at a time."""
        self._scheduler, self._tokenizer, self._source, self._store = scheduler, tokenizer, source, store
        self._defaults, self._most, self._stop, self._progress = defaults, most, stop, progress
        self._lines: Iterator[tuple[int, bytes | None]] = iter(source)
        self._more = True
        self._ids: set[bytes] = set()
        """Digests of all ids so far."""
        self._open: dict[Request, _Open] = {}
        self._answers: list[bytes] = []
        self._problems: list[bytes] = []
        self._records: list[Record] = []
        self._committed = 0.0
        self.outcome = Outcome(resumed=store.answers + store.problems)

    def run(self) -> Outcome:
        """Until all lines are done, or `stop` says so. Raises OutputError and NoRoomError; what is safe stays so."""
        outcome, scheduler = self.outcome, self._scheduler
        began = self._committed = time.perf_counter()
        try:
            while not outcome.stopped and (self._refill() or scheduler.busy):
                if scheduler.busy:
                    for request, chunk in scheduler.step():
                        outcome.new_tokens += chunk.id is not None
                        if request.finished and request in self._open:
                            self._finish(request)
                self._commit_in_time()
                outcome.stopped = self._stop()
        finally:
            # Also when a step raised: what was finished before is finished.
            self._commit()
            outcome.answers, outcome.errors = self._store.answers, self._store.problems
            outcome.seconds = time.perf_counter() - began
        if outcome.stopped:
            scheduler.abandon()
        else:
            self._store.end()
        return outcome

    # Lines

    def _refill(self) -> bool:
        """Submits lines until enough wait; whether there is anything left to read."""
        scheduler = self._scheduler
        enough = self._most + WAITING
        until = time.perf_counter() + _REFILL_SECONDS
        while self._more and len(scheduler.running) + len(scheduler.waiting) < enough:
            found = next(self._lines, None)
            if found is None:
                self._more = False
                break
            self._take(*found)
            if time.perf_counter() > until:
                break
        return self._more

    def _take(self, number: int, raw: bytes | None) -> None:
        asked = BadLine(None, f"longer than {MOST_BYTES >> 20} MiB") if raw is None else parse(raw, self._defaults)
        if asked.id is not None:
            digest = hashlib.blake2b(json.dumps(asked.id).encode(), digest_size=16).digest()
            if digest in self._ids:
                asked = BadLine(asked.id, f"the id {asked.id!r} is that of an earlier line")
            self._ids.add(digest)
        if number in self._store.done:
            return
        if isinstance(asked, BadLine):
            self._refuse(number, asked.id, asked.message)
            return
        try:
            self._submit(number, asked)
        except TpcpuError as error:
            self._refuse(number, asked.id, str(error))

    def _submit(self, number: int, asked: Asked) -> None:
        begun = self._store.begun.pop(number, None)
        params = asked.params if begun is None else dataclasses.replace(asked.params, seed=begun.seed)
        answered = [] if begun is None else begun.answered
        request = self._scheduler.submit(self._tokenizer.prompt_ids(asked.prompt), params, answered)
        self._open[request] = _Open(number, asked, request, len(answered))
        if begun is None:
            self._records.append(journal.begun(number, request.sampler.seed))
        else:
            self.outcome.continued += bool(answered)
        if request.finished:
            self._finish(request)

    # What came of them

    def _finish(self, request: Request) -> None:
        entry = self._open.pop(request)
        if request.error is not None:
            self._refuse(entry.line, entry.asked.id, str(request.error))
            return
        completion = request.completion
        assert completion is not None
        self.outcome.prompt_tokens += len(completion.prompt_ids)
        told = answer(entry.line, entry.asked.id, entry.asked.url, completion, drawn=not request.sampler.params.greedy)
        self._answers.append(encode(told))

    def _refuse(self, number: int, name: Id | None, message: str) -> None:
        self._problems.append(encode({"line": number, "id": name, "error": message}))

    # Making it last

    def _commit_in_time(self) -> None:
        if time.perf_counter() - self._committed >= COMMIT_SECONDS:
            began = time.perf_counter()
            self._write()
            self.outcome.journal_seconds += time.perf_counter() - began
            done = self._store.answers + self._store.problems
            self._progress.show(done, self._source.lines, self.outcome.new_tokens)

    def _commit(self) -> None:
        """Everything that there is, on disk."""
        began = time.perf_counter()
        self._store.settle()
        self._write()
        self._store.settle()
        self.outcome.journal_seconds += time.perf_counter() - began

    def _write(self) -> None:
        self._committed = time.perf_counter()
        records = list(self._records)
        growing = [entry for entry in self._open.values() if not entry.request.finished]
        for entry in growing:
            tokens = entry.request.answered[entry.written :]
            if tokens:
                records.append(journal.chosen(entry.line, entry.written, tokens))
        if not (records or self._answers or self._problems):
            self._store.check()
            return
        if self._store.commit(self._answers, self._problems, records, self._begun):
            self._answers, self._problems, self._records = [], [], []
            for entry in growing:
                entry.written = len(entry.request.answered)

    def _begun(self) -> Mapping[int, Begun]:
        now = {
            entry.line: Begun(entry.request.sampler.seed, list(entry.request.answered))
            for entry in self._open.values()
            if not entry.request.finished
        }
        # What an earlier run began, and this one has not come to yet.
        return {**self._store.begun, **now}
