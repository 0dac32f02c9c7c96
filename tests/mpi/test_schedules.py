"""Schedules on every rank of a job: rank 0 decides alone, and every request gets the bits that it gets alone.

The same bodies run on a lone rank.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpcpu import LLM, SamplingParams
from tpcpu.engine.engine import Engine, Options
from tpcpu.engine.requests import Request
from tpcpu.engine.scheduler import Scheduler
from tpcpu.parallel.communicator import Communicator
from tpcpu.program.batch import Batch
from tpcpu.text import Tokenizer, load_tokenizer

pytestmark = pytest.mark.mpi

DATA = Path(__file__).parents[1] / "data"
CONTEXT = 96
PARAMS = (
    SamplingParams(max_tokens=30, ignore_eos=True, top_logits=4),
    SamplingParams(max_tokens=40, temperature=1.0, seed=3),
    SamplingParams(max_tokens=12, temperature=0.8, top_k=5, seed=4, logprobs=1, ignore_eos=True),
)
CASES = [
    # page, cache, chunk, batch, drafts
    ("yuan-tiny", Options(format="nf4", chunk_tokens=7, page_tokens=16, cache_tokens=96, max_batch=3)),
    ("yuan-tiny", Options(chunk_tokens=33, page_tokens=32, cache_tokens=160, max_batch=4, speculate=6, exact=True)),
    ("llama-tiny", Options(format="nf4", chunk_tokens=40, page_tokens=16, cache_tokens=112, max_batch=4, speculate=15)),
]


@pytest.fixture(scope="module", params=CASES, ids=["yuan tight", "yuan exact drafts", "llama drafts"])
def engine(request: pytest.FixtureRequest, communicator: Communicator) -> Iterator[Engine]:
    """A trained model with a cache that is too small for what the tests ask of it."""
    name, options = request.param
    options = Options(**{**vars(options), "context": CONTEXT, "threads": 1})
    engine = Engine(DATA / name, communicator, options)
    yield engine
    engine.close()


def token_by_token(engine: Engine, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> Request:
    """The answer alone."""
    request = Request(prompt, params, tokenizer, CONTEXT, 0)
    sequence = engine.cache.begin()
    at = 0
    while not request.finished:
        engine.cache.reserve(sequence, at + 1)
        part = request.tokens[at : at + 1], at, sequence.state, sequence.pages
        (row,) = engine.step(Batch.build([part], [0], candidates=0, vocabulary=tokenizer.size))
        at += 1
        if at == len(request.tokens):
            request.take(row)
    engine.cache.end(sequence)
    return request


def told(request: Request) -> Any:
    completion = request.completion
    assert completion is not None
    return completion.ids, completion.text, completion.finish_reason, completion.logprobs, completion.top_logits


def schedule(engine: Engine) -> int:
    """Rank 0: requests that come, go, wait and lose their pages; how often they lost them."""
    folder = engine.checkpoint.path
    tokenizer = load_tokenizer(folder, json.loads((folder / "config.json").read_text()))
    story = list(tokenizer.encode("Once upon a time, there was a little girl named Lily. She liked to play. " * 4))
    drawn = np.random.default_rng(0).integers(3, 500, 60).tolist()
    prompts = [story[:40], drawn[:20], [*story[:40], 7, 8], story[:60], drawn[:9] * 5, [*drawn[:20], *story[:20]]]
    wanted = {
        (i, j): told(token_by_token(engine, tokenizer, prompt, params))
        for i, prompt in enumerate(prompts)
        for j, params in enumerate(PARAMS)
    }
    made = Scheduler(engine, tokenizer)
    requests: dict[Request, tuple[int, int]] = {}
    lost, steps = 0, 0
    order = np.random.default_rng(1).permutation(len(wanted)).tolist()
    cancelled = []
    while made.busy or order:
        if steps % 3 == 0 and order:
            pair = divmod(order.pop(), len(PARAMS))
            requests[made.submit(prompts[pair[0]], PARAMS[pair[1]])] = pair
            if len(order) % 5 == 2:
                cancelled.append(next(request for request in requests if not request.finished))
                made.cancel(cancelled[-1])
        if made.busy:
            before = set(made.running)
            made.step()
            made.check()
            lost += len(before & set(made.waiting))
        steps += 1
    for request, pair in requests.items():
        if request not in cancelled:
            assert told(request) == wanted[pair]
    return lost


def test_every_request_gets_its_own_answer(engine: Engine, communicator: Communicator) -> None:
    lost = 0
    if communicator.is_root:
        try:
            lost = schedule(engine)
        finally:
            engine.release()
    else:
        engine.follow()
    assert communicator.broadcast_object(lost) > 0, "the schedule is one in which pages run out"


def test_all_ranks_have_room_for_as_much(engine: Engine, communicator: Communicator) -> None:
    counts = communicator.all_gather_object((engine.cache.pages.count, engine.context, engine.chunk_tokens))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("speculate", [0, 5])
def test_every_rank_gets_the_answers_to_many_prompts(communicator: Communicator, speculate: int) -> None:
    cases = json.loads((DATA / "yuan-tiny" / "reference.json").read_text())["cases"]
    params = [SamplingParams(max_tokens=8 + 4 * number, ignore_eos=True) for number in range(len(cases))]
    with LLM(DATA / "yuan-tiny", exact=True, speculate=speculate, max_batch=3, cache_tokens=640) as llm:
        answers = llm.generate([case["prompt_ids"] for case in cases], params)
    for answer, case, each in zip(answers, cases, params, strict=True):
        assert answer.ids == case["greedy_ids"][: each.max_tokens]
    assert (
        communicator.all_gather_object([answer.ids for answer in answers])
        == [[answer.ids for answer in answers]] * communicator.size
    )
