"""What holds for sampling whatever the logits are."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpcpu.sampling import Sampled, Sampler, SamplingParams, filters

# few distinct values, so that level logits are common
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 30.0, float("-inf")]),
    st.floats(width=32, min_value=-1e4, max_value=1e4),
)
some_logits = (
    st.lists(values, min_size=1, max_size=60)
    .map(lambda numbers: np.array(numbers, np.float32))
    .filter(lambda logits: np.isfinite(logits.max()))
)
temperatures = st.floats(min_value=0.01, max_value=100)
params = st.fixed_dictionaries(
    {"temperature": st.just(0.0) | temperatures, "seed": st.integers(0, 2**64 - 1)},
    optional={
        "top_k": st.integers(0, 80),
        "top_p": st.floats(min_value=1e-6, max_value=1),
        "min_p": st.floats(min_value=0, max_value=1),
        "repetition_penalty": st.floats(min_value=0.1, max_value=10),
        "presence_penalty": st.floats(min_value=-2, max_value=2),
        "frequency_penalty": st.floats(min_value=-2, max_value=2),
        "logprobs": st.integers(0, 5),
    },
)


@given(some_logits, st.data())
def test_the_order_is_by_logit_then_by_id(logits: np.ndarray, data: st.DataObject) -> None:
    ids = np.array(data.draw(st.permutations(range(logits.size))))
    most = data.draw(st.integers(0, logits.size + 3))
    found, ordered = filters.descending(logits, ids, most)
    expected = sorted(range(logits.size), key=lambda place: (-logits[place], ids[place]))[: most or None]
    assert found.tolist() == ids[expected].tolist()
    np.testing.assert_array_equal(ordered, logits[expected])


@given(some_logits, temperatures, st.floats(min_value=5e-324, max_value=1), st.floats(0, 1))
def test_no_filter_removes_the_best_token(logits: np.ndarray, temperature: float, p: float, min_p: float) -> None:
    _, ordered = filters.descending(logits, np.arange(logits.size))
    weights = filters.weights(ordered, float(ordered[0]), temperature)
    assert weights[0] == 1
    assert np.all(np.diff(weights) <= 0)
    total = float(weights.sum())
    kept = filters.keep_top_p(weights, p, total)
    assert 1 <= kept <= weights.size
    assert weights[: kept - 1].sum() <= p * total * (1 + 1e-12)  # no smaller head reaches p
    assert kept == weights.size or weights[:kept].sum() >= p * total * (1 - 1e-12)
    kept = filters.keep_min_p(weights, min_p)
    assert np.all(weights[:kept] >= min_p)
    assert np.all(weights[kept:] < min_p)
    assert kept >= 1


@given(some_logits, params, st.integers(1, 8))
def test_the_likeliest_tokens_decide_as_all_would(logits: np.ndarray, chosen: dict[str, Any], head: int) -> None:
    ids = np.arange(logits.size)
    short, whole = (Sampler(SamplingParams(**chosen), logits.size) for _ in range(2))
    short.head, whole.head = head, 0
    answer: list[int] = []
    for _ in range(4):
        answer.append(whole.sample(ids, logits, answer).id)
        assert short.sample(ids, logits, answer[:-1]).id == answer[-1]


@given(some_logits, params, st.lists(st.integers(0, 59), max_size=30))
def test_the_same_seed_draws_the_same_tokens(logits: np.ndarray, chosen: dict[str, Any], history: list[int]) -> None:
    ids = np.arange(logits.size)
    prompt = [number for number in history if number < logits.size]
    answers = []
    for _ in range(2):
        sampler = Sampler(SamplingParams(**chosen), logits.size)
        answer: list[Sampled] = []
        for _ in range(4):
            answer.append(sampler.sample(ids, logits, [*prompt, *(sampled.id for sampled in answer)]))
        answers.append(answer)
    assert answers[0] == answers[1]
    assert all(np.isfinite(logits[sampled.id]) for sampled in answers[0])


@given(some_logits, params, st.data())
def test_as_many_candidates_as_needed_choose_like_all(
    logits: np.ndarray, chosen: dict[str, Any], data: st.DataObject
) -> None:
    """Ranks give their largest logits only, in any division of the vocabulary: the choice is that of all logits."""
    sampler = Sampler(SamplingParams(**chosen), logits.size)
    ids = np.arange(logits.size)
    cut = data.draw(st.integers(0, logits.size))
    shares = [
        filters.descending(logits[part], ids[part], sampler.candidates_needed)
        for part in (slice(0, cut), slice(cut, None))
        if logits[part].size
    ]
    candidates = np.concatenate([share[0] for share in shares]), np.concatenate([share[1] for share in shares])
    whole = Sampler(SamplingParams(**chosen), logits.size)
    assert sampler.sample(*candidates).id == whole.sample(ids, logits).id


@given(some_logits)
def test_log_probabilities_sum_to_one(logits: np.ndarray) -> None:
    sampled = Sampler(SamplingParams(logprobs=100), logits.size).sample(np.arange(logits.size), logits)
    assert abs(sum(np.exp(value) for _, value in sampled.top_logprobs) - 1) < 1e-9
    assert sampled.top_logprobs[0] == (sampled.id, sampled.logprob)
