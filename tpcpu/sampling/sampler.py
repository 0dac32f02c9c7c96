"""Sampler: the next token of one request from candidate logits.

Knows neither ranks nor models: whoever holds the logits gives the candidates, all of them or as many of the largest
as `candidates_needed` says. A draw is the inverse of the cumulative distribution at one uniform number, tokens in
order of falling probability: a rounding difference in the logits then moves the boundaries a little, and turns the
choice only where the number falls on one. That number depends on the seed and the step alone, so neither company in
the batch nor a restart changes an answer.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpcpu.errors import TpcpuError
from tpcpu.sampling import filters
from tpcpu.sampling.filters import Ids, Logits
from tpcpu.sampling.params import SamplingParams


@dataclass(frozen=True)
class Sampled:
    """A chosen token. Everything but `id` only where the request asked for it."""

    id: int
    logprob: float | None = None
    """Natural log of the token's probability before penalties and filters."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(id, log probability) of the likeliest tokens, likeliest first."""
    top_logits: tuple[tuple[int, float], ...] = ()
    """(id, logit) of the largest logits as the model gave them, largest first."""


_FEW = 64
"""Candidates."""


class Sampler:
    """The state of one request: its seed, and `step`, the number of tokens chosen so far.

    `step` may be set: a request that is taken up again goes on as if nothing had happened.
    """

    head = 1024
    """How many of the likeliest tokens are put in order first. Changes the speed, never a choice."""

    def __init__(self, params: SamplingParams, vocabulary_size: int) -> None:
        """`vocabulary_size`: ids from here on are padding rows and are never chosen."""
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self.step = 0
        self._vocabulary_size = vocabulary_size
        self._only_the_largest = (
            params.greedy and not params.penalises and params.logprobs is None and not params.top_logits
        )

    @property
    def candidates_needed(self) -> int:
        """How many of the largest logits each rank must give: no padding rows, the lowest ids first where level.

        0: all of them, for penalties, log probabilities, and sampling that top-k does not bound.
        """
        params = self.params
        if params.penalises or params.logprobs is not None or not (params.greedy or params.top_k):
            return 0
        return max(1 if params.greedy else params.top_k, params.top_logits or 0)

    def sample(self, candidate_ids: Ids, candidate_logits: Logits, history: Sequence[int] = ()) -> Sampled:
        """Chooses the next token and counts the step.

        `candidate_ids` (candidates,) int64, distinct, in any order; `candidate_logits` (candidates,) float32;
        `history`: ids of the prompt and of the `step` tokens chosen so far, read only where penalties are asked for.
        Raises TpcpuError where a logit is NaN or infinite, which no answer may hide.
        """
        ids, logits = candidate_ids, candidate_logits
        if self._only_the_largest and ids.size <= _FEW:
            # Lists of a few are quicker than arrays, which a step with cold caches feels.
            numbers, values = ids.tolist(), logits.tolist()
            if numbers and max(numbers) < self._vocabulary_size and math.isfinite(sum(values)):
                self.step += 1
                largest = max(values)
                return Sampled(min(number for number, value in zip(numbers, values, strict=True) if value == largest))
        if ids.size and int(ids.max()) >= self._vocabulary_size:
            real = ids < self._vocabulary_size
            ids, logits = ids[real], logits[real]
        # one comparison finds NaN, +inf, and nothing but -inf
        if not (logits.size and np.isfinite(logits.max())):
            raise TpcpuError(
                f"step {self.step}: the logits are not finite numbers; expected finite ones: a weight or an activation "
                "is out of range (check the checkpoint with tpcpu inspect, compare with --exact)"
            )
        chosen = self._choose(ids, logits, history)
        self.step += 1
        return self._report(chosen, ids, logits)

    def _choose(self, ids: Ids, logits: Logits, history: Sequence[int]) -> int:
        params = self.params
        if params.penalises:
            logits = self._penalise(ids, logits, history)
        if params.greedy:
            return int(filters.descending(logits, ids, 1)[0][0])
        if params.top_k:
            ids, logits = filters.descending(logits, ids, params.top_k)
        total = float(filters.weights(logits, float(logits.max()), params.temperature).sum())
        # the likeliest tokens nearly always decide; all are put in order only where they do not
        for most in (self.head, 0):
            chosen = self._draw(*filters.descending(logits, ids, most), total, ids.size)
            if chosen is not None:
                return chosen
        raise AssertionError("all tokens together decide")

    def _draw(self, ids: Ids, logits: Logits, total: float, tokens: int) -> int | None:
        """The id that this step's number falls on, where these likeliest of all `tokens` decide it, else None.

        `total`: the weight of all. What the likeliest decide is what all together would, to the bit.
        """
        params = self.params
        weights = filters.weights(logits, float(logits[0]), params.temperature)
        kept = filters.keep_top_p(weights, params.top_p, total)
        kept = filters.keep_min_p(weights[:kept], params.min_p)
        filters_end = kept < ids.size
        decided = filters_end or ids.size == tokens
        if not decided and (params.top_p < 1 or params.min_p > 0):
            return None
        reached = np.cumsum(weights[:kept])
        mass = float(reached[-1]) if filters_end else total
        place = int(np.searchsorted(reached, self._uniform() * mass, side="right"))
        if place == kept and not decided:
            return None
        return int(ids[min(place, kept - 1)])

    def _penalise(self, ids: Ids, logits: Logits, history: Sequence[int]) -> Logits:
        params = self.params
        before = np.asarray(history, dtype=np.int64)
        assert before.size >= self.step, "the history holds the prompt and every token chosen so far"
        if params.repetition_penalty != 1:
            seen = np.bincount(before, minlength=self._vocabulary_size) > 0
            logits = filters.penalise_repetition(logits, seen[ids], params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            answer = before[before.size - self.step :]
            counts = np.bincount(answer, minlength=self._vocabulary_size)[ids]
            logits = filters.penalise_presence_and_frequency(
                logits, counts, params.presence_penalty, params.frequency_penalty
            )
        return logits

    def _uniform(self) -> float:
        """The number of this step, 0 <= u < 1: a counter-based generator, keyed by the seed, counting steps."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=self.step))
        return float(generator.random())

    def _report(self, chosen: int, ids: Ids, logits: Logits) -> Sampled:
        params = self.params
        wanted = min(max(params.logprobs or 0, params.top_logits or 0), ids.size)
        pairs: list[tuple[int, float]] = []
        if wanted:
            top_ids, top_values = filters.descending(logits, ids, wanted)
            pairs = list(zip(top_ids.tolist(), top_values.tolist(), strict=True))
        top_logits = tuple(pairs[: params.top_logits or 0])
        if params.logprobs is None:
            return Sampled(chosen, top_logits=top_logits)
        norm = filters.log_normaliser(logits)
        logprob = float(logits[np.argmax(ids == chosen)]) - norm
        top_logprobs = tuple((number, logit - norm) for number, logit in pairs[: params.logprobs])
        return Sampled(chosen, logprob, top_logprobs, top_logits)
