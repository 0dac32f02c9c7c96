"""Schedules on real models: every request gets the tokens, and the bits of logits, that it gets alone token by token.

In everyday arithmetic too. The many schedules of `tests/unit/test_scheduler.py` run on a model without weights; here
fewer, with everything that computes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.tiny import DATA
from tpcpu.engine.engine import Candidates, Engine, Options
from tpcpu.engine.requests import Completion, Request
from tpcpu.engine.scheduler import Scheduler
from tpcpu.parallel.communicator import Solo
from tpcpu.program.batch import Batch
from tpcpu.sampling import SamplingParams
from tpcpu.text import Tokenizer, load_tokenizer

CONTEXT = 96
OPTIONS = (
    # page, cache, chunk, batch, drafts: pages that are too few for two, chunks that end anywhere.
    (16, 96, 7, 3, 0),
    (16, 112, 33, 4, 5),
    (32, 160, 64, 5, 15),
    (48, 96, 1, 2, 2),
)
CASES = [
    *(("yuan-tiny", False, number) for number in range(len(OPTIONS))),
    *(("llama-tiny", False, number) for number in (1, 2)),
    ("yuan-tiny", True, 1),
    ("llama-tiny", True, 0),
]
PARAMS = (
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=1.0, seed=3),
    SamplingParams(max_tokens=16, temperature=0.8, top_k=5, seed=4, logprobs=1, top_logits=3),
    SamplingParams(max_tokens=30, temperature=1.2, top_p=0.9, repetition_penalty=1.1, seed=5, stop=("the",)),
)


@dataclass
class Loaded:
    """An engine, and what its requests get alone."""

    engine: Engine
    tokenizer: Tokenizer
    prompts: list[list[int]]
    known: dict[tuple[int, int], tuple[Completion, list[Any]]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'exact' if case[1] else 'int8'}-{case[2]}")
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    name, exact, number = request.param
    page, cache_tokens, chunk, batch, drafts = OPTIONS[number]
    folder = DATA / name
    options = Options(
        format="nf4", exact=exact, context=CONTEXT, threads=2, chunk_tokens=chunk, page_tokens=page,
        cache_tokens=cache_tokens, max_batch=batch, speculate=drafts,
    )  # fmt: skip
    engine = Engine(folder, Solo(), options)
    tokenizer = load_tokenizer(folder, json.loads((folder / "config.json").read_text()))
    story = list(tokenizer.encode("Once upon a time, there was a little girl named Lily. She liked to play. " * 4))
    drawn = np.random.default_rng(0).integers(3, 500, 80).tolist()
    prompts = [story[:3], story[:70], [*story[:40], *drawn[:9]], drawn, [*drawn[:48], *story[:5]], drawn[:17] * 4]
    yield Loaded(engine, tokenizer, prompts, {})
    engine.close()


def alone(loaded: Loaded, prompt: int, params: int) -> tuple[Completion, list[Any]]:
    """The answer token by token in a sequence of its own, and all logits before each of its tokens."""
    if (prompt, params) not in loaded.known:
        engine, vocabulary = loaded.engine, loaded.tokenizer.size
        request = Request(loaded.prompts[prompt], PARAMS[params], loaded.tokenizer, CONTEXT, 0)
        sequence = engine.cache.begin()
        logits, at = [], 0
        while not request.finished:
            assert engine.cache.reserve(sequence, at + 1)
            part = request.tokens[at : at + 1], at, sequence.state, sequence.pages
            (row,) = engine.step(Batch.build([part], [0], candidates=0, vocabulary=vocabulary))
            at += 1
            if at == len(request.tokens):
                logits.append(row.logits.copy())
                request.take(row)
        engine.cache.end(sequence)
        assert request.completion is not None
        loaded.known[prompt, params] = request.completion, logits
    return loaded.known[prompt, params]


class Seen(Scheduler):
    """A scheduler that notes what its requests are given to choose from."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded.engine, loaded.tokenizer)
        self.rows: dict[Request, list[Candidates]] = {}

    def _take(self, request: Request, row: Candidates, events: list[Any]) -> int | None:
        self.rows.setdefault(request, []).append(Candidates(row.ids.copy(), row.logits.copy()))
        return super()._take(request, row, events)


operations = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 5), st.integers(0, len(PARAMS) - 1)),
    st.tuples(st.just("step"), st.integers(1, 9), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 5), st.just(0)),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(operations, min_size=4, max_size=14))
def test_any_schedule_gives_every_request_its_own_bits(loaded, plan):
    for _, prompt, params in (operation for operation in plan if operation[0] == "submit"):
        alone(loaded, prompt, params)
    scheduler = Seen(loaded)
    requests = []
    for operation, number, other in [*plan, ("step", 2000, 0)]:
        if operation == "submit":
            requests.append((scheduler.submit(loaded.prompts[number], PARAMS[other]), number, other))
        elif operation == "cancel" and number < len(requests):
            scheduler.cancel(requests[number][0])
            scheduler.check()
        elif operation == "step":
            for _ in range(number):
                if scheduler.busy:
                    scheduler.step()
                    scheduler.check()
    assert not scheduler.busy
    for request, prompt, params in requests:
        wanted, logits = alone(loaded, prompt, params)
        got = request.completion
        assert got is not None
        if got.finish_reason == "cancelled":
            assert got.ids == wanted.ids[: len(got.ids)]
        else:
            assert (got.ids, got.text, got.finish_reason) == (wanted.ids, wanted.text, wanted.finish_reason)
            assert (got.logprobs, got.top_logits) == (wanted.logprobs, wanted.top_logits)
        for row, expected in zip(scheduler.rows.get(request, []), logits, strict=False):
            assert (row.logits.view(np.uint32) == expected[row.ids].view(np.uint32)).all()
    pages = loaded.engine.cache.pages
    assert pages.available == pages.count
