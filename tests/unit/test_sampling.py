"""Sampling parameters, filters and the sampler, on logits small enough to check by hand."""

import math
from typing import Any

import numpy as np
import pytest

from tpcpu.errors import SamplingError, TpcpuError
from tpcpu.sampling import Sampler, SamplingParams, filters

LOGITS = np.array([1.0, 3.0, 3.0, -2.0, 0.5], np.float32)
IDS = np.arange(5)


def sampler(vocabulary_size: int = 5, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), vocabulary_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 1.5, True, "8", None)),
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, False, "1", None)),
        *(("top_k", value) for value in (-1, 2.0, True, None)),
        *(("top_p", value) for value in (0, -0.5, 1.01, math.nan, True)),
        *(("min_p", value) for value in (-0.1, 1.1, math.inf)),
        *(("repetition_penalty", value) for value in (0, -1, math.nan, 1e9)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, math.nan)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, math.inf)),
        *(("seed", value) for value in (-1, 2**64, 1.0, True)),
        *(("stop", value) for value in ("", ["a", ""], [1], 7, None, ["\udcff"])),
        *(("ignore_eos", value) for value in (1, None, "yes")),
        *(("logprobs", value) for value in (-1, True, 1.5)),
        *(("top_logits", value) for value in (0, -1, True)),
    ],
)
def test_impossible_values_are_refused_by_name_and_range(field: str, value: object) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: ")
    assert "expected" in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_the_ends_of_every_range_are_accepted() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=0.01, seed=0)
    SamplingParams(min_p=1, repetition_penalty=100, presence_penalty=-2, frequency_penalty=2, seed=2**64 - 1)
    SamplingParams(top_p=5e-324, temperature=1e300, logprobs=0, top_logits=1, seed=np.int64(3))


def test_one_stop_string_and_a_list_become_a_tuple() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_params_can_be_keys_and_cannot_be_changed() -> None:
    assert hash(SamplingParams(temperature=1)) == hash(SamplingParams(temperature=1.0))
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        ({}, 1),
        ({"temperature": 1.0, "top_k": 1}, 1),
        ({"temperature": 0.7, "top_k": 40}, 40),
        ({"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1}, 40),
        ({"top_p": 0.9}, 1),
        ({"temperature": 0.7}, 0),
        ({"temperature": 0.7, "top_p": 0.9}, 0),
        ({"temperature": 0.7, "min_p": 0.1}, 0),
        ({"repetition_penalty": 1.1}, 0),
        ({"presence_penalty": 0.1, "temperature": 1.0, "top_k": 3}, 0),
        ({"frequency_penalty": 0.1}, 0),
        ({"logprobs": 0}, 0),
        ({"top_logits": 20}, 20),
        ({"top_logits": 20, "temperature": 1.0, "top_k": 5}, 20),
    ],
)
def test_candidates_needed(params: dict[str, Any], needed: int) -> None:
    assert sampler(**params).candidates_needed == needed


def test_greedy_takes_the_best_and_of_level_ones_the_lowest_id() -> None:
    assert sampler().sample(IDS, LOGITS).id == 1
    shuffled = np.array([4, 2, 0, 1, 3])
    assert sampler().sample(shuffled, LOGITS[shuffled]).id == 1
    zeros = np.array([0.0, -0.0], np.float32)
    assert sampler().sample(np.array([1, 0]), zeros).id == 0
    assert sampler(temperature=2.0, top_k=1).sample(IDS, LOGITS).id == 1


def test_padding_rows_are_never_chosen() -> None:
    logits = np.array([0, 1, 100], np.float32)
    assert sampler(2).sample(np.arange(3), logits).id == 1
    reported = sampler(2, logprobs=2, top_logits=2).sample(np.arange(3), logits)
    assert [number for number, _ in reported.top_logits] == [1, 0]
    assert math.isclose(reported.logprob or 0, -math.log1p(math.exp(-1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_stop_the_answer(bad: float) -> None:
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(TpcpuError, match="not finite"):
        sampler().sample(IDS, logits)
    with pytest.raises(TpcpuError, match="not finite"):
        sampler().sample(IDS, np.full(5, -np.inf, np.float32))


def test_log_probabilities_are_of_the_raw_logits() -> None:
    chosen = sampler(logprobs=2, top_logits=3, repetition_penalty=2.0).sample(IDS, LOGITS, [1, 2])
    assert chosen.id == 1  # 1.5 after the penalty, still before 1.0
    norm = math.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert math.isclose(chosen.logprob or 0, 3 - norm)
    assert [number for number, _ in chosen.top_logprobs] == [1, 2]
    assert chosen.top_logits == ((1, 3.0), (2, 3.0), (0, 1.0))


def test_repetition_counts_the_prompt_and_presence_and_frequency_only_the_answer() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    ids = np.arange(3)
    assert sampler(3, repetition_penalty=1.5).sample(ids, logits, [0]).id == 1
    for penalty in ("presence_penalty", "frequency_penalty"):
        one = sampler(3, **{penalty: 0.5})
        assert one.sample(ids, logits, [0]).id == 0
        assert one.sample(ids, logits, [0, 0]).id == 1


def test_frequency_counts_how_often_and_presence_only_whether() -> None:
    logits = np.array([2.0, 1.0], np.float32)
    for penalty, expected in (("frequency_penalty", 1), ("presence_penalty", 0)):
        one = sampler(2, **{penalty: 0.4})
        one.step = 3
        assert one.sample(np.arange(2), logits, [0, 0, 0]).id == expected


def test_a_taken_up_request_draws_what_it_would_have_drawn() -> None:
    params = {"temperature": 1.0, "seed": 11}
    whole = sampler(**params)
    ids = [whole.sample(IDS, LOGITS).id for _ in range(20)]
    again = sampler(**params)
    again.step = 12
    assert [again.sample(IDS, LOGITS).id for _ in range(8)] == ids[12:]
    assert len(set(ids)) > 1


def test_a_seed_is_drawn_where_none_is_given_and_repeats_the_answer() -> None:
    first = sampler(temperature=1.0)
    ids = [first.sample(IDS, LOGITS).id for _ in range(20)]
    again = sampler(temperature=1.0, seed=first.seed)
    assert [again.sample(IDS, LOGITS).id for _ in range(20)] == ids
    assert len({sampler().seed for _ in range(5)}) > 1


def test_draws_follow_the_probabilities() -> None:
    """2,000 draws against the softmax: five standard deviations, with a fixed seed."""
    one = sampler(temperature=1.5, seed=5)
    counts = np.bincount([one.sample(IDS, LOGITS).id for _ in range(2000)], minlength=5)
    expected = np.exp(LOGITS / 1.5)
    expected /= expected.sum()
    assert np.all(np.abs(counts - 2000 * expected) < 5 * np.sqrt(2000 * expected))


def test_the_smallest_temperature_neither_overflows_nor_leaves_the_best() -> None:
    assert sampler(temperature=5e-324, seed=1).sample(IDS, LOGITS).id in (1, 2)
    assert sampler(temperature=1e300, seed=1).sample(IDS, LOGITS).id in range(5)


def test_a_token_that_the_model_excludes_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0, -np.inf], np.float32)
    one = sampler(3, temperature=100.0, seed=2)
    assert {one.sample(np.arange(3), logits).id for _ in range(50)} == {1}


def test_a_vocabulary_of_level_logits_is_kept_in_the_order_of_ids() -> None:
    ids, logits = filters.descending(np.zeros(100, np.float32), np.arange(100)[::-1], 7)
    assert ids.tolist() == list(range(7))
    assert logits.tolist() == [0.0] * 7
