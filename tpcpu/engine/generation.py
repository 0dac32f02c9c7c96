"""Answers on rank 0: one as it grows, or those to many prompts, and the loss of given tokens.

A thin user of the scheduler; knows nothing of ranks, which the engine drives.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tpcpu.engine.engine import Engine
from tpcpu.engine.requests import Chunk, Completion, Request
from tpcpu.engine.scheduler import Scheduler
from tpcpu.program.batch import Batch
from tpcpu.sampling import SamplingParams
from tpcpu.text import Tokenizer


class Generator:
    """Answers requests on rank 0; the other ranks follow. One of its methods runs at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self.scheduler = Scheduler(engine, tokenizer)

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        """Chunk after chunk; the last has the completion. Closing the iterator ends the answer after a step."""
        scheduler = self._idle_scheduler()
        request = scheduler.submit(prompt_ids, params)
        try:
            while not request.finished:
                for _, chunk in scheduler.step():
                    _raise_error(request)
                    yield chunk
        finally:
            scheduler.cancel(request)

    def complete(
        self, prompts: Sequence[tuple[Sequence[int], SamplingParams]], given_up: Callable[[], bool] = lambda: False
    ) -> list[Completion] | None:
        """The answers to all prompts, in their order. `given_up` is asked before every step; None if it was so."""
        scheduler = self._idle_scheduler()
        requests: list[Request] = []
        try:
            for prompt_ids, params in prompts:
                requests.append(scheduler.submit(prompt_ids, params))
            while scheduler.busy:
                if given_up():
                    return None
                for request, _ in scheduler.step():
                    _raise_error(request)
        finally:
            for request in requests:
                scheduler.cancel(request)
        return [request.completion for request in requests if request.completion is not None]

    def score(self, ids: Sequence[int]) -> list[float]:
        """The negative log likelihood in nats of every id but the first, given those before it."""
        self.scheduler.check_prompt(ids)
        losses: list[float] = []
        with self._idle_scheduler().reading(len(ids)) as sequence:
            for first in range(0, len(ids) - 1, self._engine.most_wanted):
                targets = ids[first + 1 : first + 1 + self._engine.most_wanted]
                feed = ids[first : first + len(targets)]
                # The whole vocabulary, as the model's own distribution has it: padding rows count in the sum.
                rows = self._engine.step(
                    Batch.build(
                        [(feed, first, sequence.state, sequence.pages)], range(len(feed)),
                        candidates=0, vocabulary=self._engine.vocabulary,
                    )
                )  # fmt: skip
                for row, target in zip(rows, targets, strict=True):
                    logits = row.logits.astype(np.float64)
                    peak = logits.max()
                    losses.append(float(peak + np.log(np.exp(logits - peak).sum()) - logits[target]))
        return losses

    def _idle_scheduler(self) -> Scheduler:
        """What an interrupt has left of an earlier request ends here."""
        if self.scheduler.busy:
            self.scheduler.abandon()
        return self.scheduler


def _raise_error(request: Request) -> None:
    if request.error is not None:
        raise request.error
