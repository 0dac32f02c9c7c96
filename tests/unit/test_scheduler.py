"""Scheduling: every request gets the tokens that it would get alone, whatever runs beside it, and no page is lost."""

import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_engine import FakeEngine, Tokenizer, hashed
from tpcpu.engine.engine import Candidates
from tpcpu.engine.requests import Completion, Request
from tpcpu.engine.scheduler import Scheduler
from tpcpu.errors import PromptError, TpcpuError
from tpcpu.sampling import SamplingParams

VOCABULARY = 12
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
PARAMS = (
    GREEDY,
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=30, temperature=1.0, seed=5),
    SamplingParams(max_tokens=12, temperature=0.7, top_k=3, seed=6, logprobs=2, top_logits=3),
    SamplingParams(max_tokens=25, temperature=1.3, top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.2, seed=7),
    SamplingParams(max_tokens=30, stop=("ab", "ca"), top_logits=2),
)
PROMPTS = (
    (3,),
    (5, 6, 7, 8) * 6,
    tuple(range(1, 12)) * 3,
    (*range(1, 12), *range(1, 12), 4, 4, 4, 4),
    (*range(1, 12), *range(1, 12), *range(1, 11), 2, 2, 9),
    tuple(np.random.default_rng(1).integers(1, VOCABULARY, 80).tolist()),
    (*np.random.default_rng(1).integers(1, VOCABULARY, 64).tolist(), 1, 2, 3),
)


def scheduler(**options: Any) -> tuple[Scheduler, FakeEngine]:
    engine = FakeEngine(vocabulary=VOCABULARY, **options)
    return Scheduler(engine, Tokenizer(VOCABULARY)), engine  # type: ignore[arg-type]


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams, context: int) -> Completion:
    """The answer token by token, with no engine, cache or scheduler."""
    request = Request(prompt, params, Tokenizer(VOCABULARY), context, 0)  # type: ignore[arg-type]
    ids = np.arange(VOCABULARY)
    while not request.finished:
        request.take(Candidates(ids, hashed(request.tokens, VOCABULARY)))
    assert request.completion is not None
    return request.completion


def told(completion: Completion | None) -> Any:
    """What must not depend on company."""
    assert completion is not None
    return (
        completion.prompt_ids, completion.ids, completion.text, completion.finish_reason,
        completion.logprobs, completion.top_logits,
    )  # fmt: skip


def run(made: Scheduler) -> None:
    while made.busy:
        made.step()
        made.check()


operations = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(0, len(PARAMS) - 1)),
    st.tuples(st.just("step"), st.integers(1, 12), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(operations, max_size=25),
    st.sampled_from([16, 32, 48]),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 60),
    st.sampled_from([0, 1, 4, 15]),
)
def test_any_schedule_gives_every_request_its_own_answer(plan, page_tokens, chunk_tokens, max_batch, more, speculate):
    made, engine = scheduler(
        context=90, page_tokens=page_tokens, chunk_tokens=chunk_tokens, max_batch=max_batch, cache_tokens=96 + more,
        speculate=speculate,
    )  # fmt: skip
    requests: list[tuple[Request, Any]] = []
    chunks: Counter[Request] = Counter()

    def step() -> None:
        answering = [
            request for request in made.running
            if request.sequence is not None and len(request.tokens) - len(request.sequence.tokens) == 1
        ]  # fmt: skip
        before = {request: len(request.tokens) for request in answering}
        for request, chunk in made.step():
            chunks[request] += chunk.id is not None
        made.check()
        for request, length in before.items():
            # No answer stands still for a step, however long the prompts beside it are, unless it lost its pages.
            assert request.finished or len(request.tokens) > length or request in made.waiting

    for operation, number, other in plan:
        if operation == "submit":
            requests.append((made.submit(PROMPTS[number], PARAMS[other]), (PROMPTS[number], PARAMS[other])))
        elif operation == "cancel" and number < len(requests):
            made.cancel(requests[number][0])
            made.check()
        elif operation == "step":
            for _ in range(number):
                if made.busy:
                    step()
    for _ in range(4000):
        if not made.busy:
            break
        step()
    assert not made.busy, "every request ends"
    for request, (prompt, params) in requests:
        expected = alone(prompt, params, 90)
        completion = request.completion
        assert completion is not None
        if completion.finish_reason == "cancelled":
            assert completion.ids == expected.ids[: len(completion.ids)]
        else:
            assert told(completion) == told(expected)
            assert chunks[request] == len(expected.ids)
    assert engine.cache.pages.available == engine.cache.pages.count, "everything is given back"


def test_prompts_of_a_common_beginning_are_read_once():
    made, engine = scheduler(context=96, cache_tokens=400, chunk_tokens=64)
    first = made.submit(PROMPTS[5], GREEDY)
    run(made)
    read = sum(engine.fed)
    second = made.submit((*PROMPTS[5][:70], 1, 2), GREEDY)
    run(made)
    assert first.completion is not None
    # 4 whole pages of 16 are known; 8 tokens are read, and all but the last that are chosen.
    assert sum(engine.fed) - read == 8 + 19
    assert told(second.completion) == told(alone((*PROMPTS[5][:70], 1, 2), GREEDY, 96))


def test_the_next_turn_of_a_conversation_goes_on_behind_the_last_answer():
    made, engine = scheduler(context=96, cache_tokens=400, chunk_tokens=64)
    first = made.submit(PROMPTS[2], GREEDY)
    run(made)
    longer = (*first.tokens, 4, 5, 6)
    fed = sum(engine.fed)
    second = made.submit(longer, GREEDY)
    run(made)
    whole = (len(first.tokens) - 1) // 16 * 16
    assert whole == 48
    assert sum(engine.fed) - fed == len(longer) - whole + 19
    assert told(second.completion) == told(alone(longer, GREEDY, 96))


def test_requests_that_run_share_what_one_of_them_has_read():
    made, engine = scheduler(context=96, cache_tokens=400, chunk_tokens=40, max_batch=4)
    prompt = PROMPTS[5]
    requests = [made.submit((*prompt[:64], number), GREEDY) for number in range(1, 5)]
    for _ in range(3):
        made.step()
        made.check()
    used = {page for request in requests if request.sequence is not None for page in request.sequence.pages}
    run(made)
    # Each alone has 5 pages: 4 common ones and its own.
    assert len(used) <= 4 + len(requests) * 2
    assert sum(engine.fed) < 2 * 65 + 4 * 20


def test_a_long_prompt_is_read_beside_running_answers():
    made, engine = scheduler(context=96, cache_tokens=400, chunk_tokens=10)
    answer = made.submit((3, 4), GREEDY)
    made.step()
    made.submit(PROMPTS[5], GREEDY)
    lengths = []
    for _ in range(8):
        made.step()
        lengths.append(len(answer.tokens))
    assert lengths == list(range(lengths[0], lengths[0] + 8)), "a token a step"
    assert engine.fed[1:9] == [10] * 8


def test_first_come_first_served():
    made, _ = scheduler(context=96, cache_tokens=400, max_batch=2)
    requests = [made.submit((number, 1), GREEDY) for number in range(1, 6)]
    began: list[Request] = []
    while made.busy:
        for request, _ in made.step():
            if request not in began:
                began.append(request)
    assert began == requests


def test_the_youngest_makes_room_and_comes_back():
    """Two answers that grow to 3 pages each, in a cache of 4."""
    made, engine = scheduler(context=64, cache_tokens=64)
    long = SamplingParams(max_tokens=40, ignore_eos=True)
    old, young = (made.submit(prompt, long) for prompt in ((1, 2, 3), (4, 5, 6)))
    preempted = False
    while made.busy:
        made.step()
        made.check()
        assert old.finished or old in made.running
        preempted = preempted or young in made.waiting
    assert preempted
    for request, prompt in ((old, (1, 2, 3)), (young, (4, 5, 6))):
        assert told(request.completion) == told(alone(prompt, long, 64))
    # What it had is still known when it comes back, as far as nobody took it.
    assert sum(engine.fed) < 2 * 42 + 35


def test_requests_wait_for_pages():
    made, _ = scheduler(context=80, cache_tokens=80, max_batch=4)
    short = SamplingParams(max_tokens=3, ignore_eos=True)
    requests = [made.submit([number] * 60, short) for number in range(1, 5)]
    made.step()
    made.step()
    assert len(made.running) == 1
    run(made)
    for number, request in enumerate(requests, 1):
        assert told(request.completion) == told(alone((number,) * 60, short, 80))


def test_the_least_recently_used_beginnings_leave_first():
    made, engine = scheduler(context=64, cache_tokens=96, chunk_tokens=64)
    once = SamplingParams(max_tokens=1, ignore_eos=True)

    def read(*prompt: int) -> int:
        before = sum(engine.fed)
        made.submit(prompt, once)
        run(made)
        return sum(engine.fed) - before

    a, b, c = [[number] * 33 for number in (1, 2, 3)]  # two whole pages each, and one that ends with the request
    assert [read(*a), read(*b), read(*a)] == [33, 33, 1]
    # Six pages: two of each of a and b are known, two are free. c takes three, so the last page of b leaves.
    assert read(*c) == 33
    assert read(*a) == 1
    assert read(*b) > 1


def test_a_prompt_longer_than_the_context_is_refused():
    made, _ = scheduler(context=64, cache_tokens=64)
    with pytest.raises(PromptError, match="65 tokens are more than the context of 64"):
        made.submit([1] * 65, GREEDY)
    request = made.submit([1] * 64, GREEDY)
    run(made)
    assert request.completion is not None
    assert (len(request.completion.ids), request.completion.finish_reason) == (1, "length")


def test_cancelling_gives_everything_back():
    made, engine = scheduler(context=96, cache_tokens=200, chunk_tokens=20)
    requests = [made.submit(prompt, GREEDY) for prompt in PROMPTS[1:]]
    for number, request in enumerate(requests):
        made.step()
        made.check()
        made.cancel(request)
        made.cancel(request)
        made.check()
        assert request.completion is not None
        assert request.completion.finish_reason == "cancelled"
        assert number < len(requests)
    assert not made.busy
    assert engine.cache.pages.available == engine.cache.pages.count


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupted_step_leaves_the_cache_whole(at):
    made, engine = scheduler(context=96, cache_tokens=128, chunk_tokens=24, speculate=4)
    requests = [made.submit(prompt, GREEDY) for prompt in PROMPTS[1:4]]
    engine.interrupt_at = at
    with pytest.raises(KeyboardInterrupt):
        run(made)
    made.check()
    assert not made.busy
    assert all(request.finished for request in requests)
    again = [(made.submit(prompt, params), prompt, params) for prompt in PROMPTS for params in PARAMS[:3]]
    run(made)
    for request, prompt, params in again:
        assert told(request.completion) == told(alone(prompt, params, 96))


def test_an_interrupt_anywhere_in_the_book_keeping():
    """Ctrl-C may come between any two lines of it: here, after every 9th line of a run, one run after another."""

    def interrupted(after: int) -> bool:
        made, engine = scheduler(context=96, cache_tokens=112, chunk_tokens=40, speculate=3)
        lines = 0

        def trace(frame: Any, event: str, _argument: Any) -> Any:
            nonlocal lines
            if Path(frame.f_code.co_filename).name not in ("scheduler.py", "cache.py", "pages.py"):
                return None
            lines += event == "line"
            if lines == after:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        earlier = sys.gettrace()
        sys.settrace(trace)
        try:
            requests = [made.submit(prompt, PARAMS[2]) for prompt in PROMPTS[1:4]]
            while made.busy:
                made.step()
                if engine.steps == 7:
                    made.cancel(requests[1])
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(earlier)
        was_interrupted = lines >= after
        # Whatever was on its way goes on or is gone; what comes now is answered rightly.
        again = made.submit(PROMPTS[3], GREEDY)
        run(made)
        assert told(again.completion) == told(alone(PROMPTS[3], GREEDY, 96))
        assert engine.cache.pages.available == engine.cache.pages.count
        return was_interrupted

    after = 1
    while interrupted(after):
        after += 9
    assert after > 1000


def test_what_is_wrong_with_one_request_is_its_own():
    def logits(history: Any, vocabulary: int) -> Any:
        found = hashed(history, vocabulary)
        return found * np.float32("nan") if history[0] == 9 else found

    made, _ = scheduler(context=96, cache_tokens=200, logits=logits)
    wrong, right = made.submit((9, 9), GREEDY), made.submit((3, 4), GREEDY)
    run(made)
    assert isinstance(wrong.error, TpcpuError)
    assert told(right.completion) == told(alone((3, 4), GREEDY, 96))


def test_drafts_that_are_right_save_steps():
    def periodic(history: Any, vocabulary: int) -> Any:
        logits = np.zeros(vocabulary, np.float32)
        logits[history[-5] if len(history) >= 5 else history[-1]] = 9
        return logits

    params = SamplingParams(max_tokens=50, ignore_eos=True)
    steps, answers = [], []
    for speculate in (0, 7):
        made, engine = scheduler(context=96, cache_tokens=200, logits=periodic, speculate=speculate)
        request = made.submit([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], params)
        run(made)
        steps.append(engine.steps)
        answers.append(told(request.completion))
    assert answers[0] == answers[1]
    assert steps[0] == 50
    assert steps[1] < 13


def test_many_answers_share_the_drafts_of_a_step():
    """As many tokens as a step of few has room for, and none beside a prompt that is read."""

    def constant(history: Any, vocabulary: int) -> Any:
        return np.eye(vocabulary, dtype=np.float32)[history[-1]]

    made, engine = scheduler(context=96, cache_tokens=400, logits=constant, speculate=15, chunk_tokens=32, max_batch=4)
    for number in range(1, 4):
        made.submit([number] * 9, GREEDY)
    made.step()
    for _ in range(3):
        made.step()
    assert max(engine.fed[1:]) == 8
    reading = engine.steps
    made.submit(PROMPTS[5], GREEDY)
    made.step()
    assert engine.fed[reading] == 32
    run(made)
    assert max(engine.fed) == 32


def test_drafts_keep_the_distribution():
    """A vocabulary of 3 and a fixed distribution, with drafts that are often wrong: 3000 tokens of many seeds."""
    weights = np.array([0.5, 0.3, 0.2])
    engine = FakeEngine(
        context=640, cache_tokens=640, vocabulary=3, speculate=6, logits=lambda *_: np.log(weights).astype(np.float32)
    )
    made = Scheduler(engine, Tokenizer(3))  # type: ignore[arg-type]
    counts = np.zeros(3)
    pairs = np.zeros((3, 3))
    drafted = 0
    for seed in range(6):
        params = SamplingParams(max_tokens=500, temperature=1.0, seed=seed, ignore_eos=True)
        request = made.submit([0, 1, 2, 0, 1, 2], params)
        while made.busy:
            made.step()
        assert request.drafter is not None
        assert request.completion is not None
        drafted += request.drafter.drafted
        counts += np.bincount(request.completion.ids, minlength=3)
        np.add.at(pairs, (request.completion.ids[:-1], request.completion.ids[1:]), 1)
    assert drafted > 500
    total = counts.sum()
    # 2 degrees of freedom, and 8 for pairs: the 0.1 % points of chi squared.
    assert ((counts - total * weights) ** 2 / (total * weights)).sum() < 13.8
    expected = pairs.sum() * np.outer(weights, weights)
    assert ((pairs - expected) ** 2 / expected).sum() < 26.1
