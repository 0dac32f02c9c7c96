"""What a line of a batch may ask for, and what is said of one that cannot be answered."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcpu.batch.answers import answer, encode
from tpcpu.batch.lines import Asked, BadLine, parse
from tpcpu.engine.requests import Completion
from tpcpu.sampling import SamplingParams

DEFAULTS = SamplingParams(max_tokens=7, temperature=0.5, seed=3)
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}}
PLAIN = {"id": "a", "prompt": "Hi"}


def read(entry: object) -> Asked | BadLine:
    raw = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return parse(raw, DEFAULTS)


def params(**keys: Any) -> SamplingParams:
    found = read(PLAIN | keys)
    assert isinstance(found, Asked), found
    return found.params


@pytest.mark.parametrize("name", ["a", "", "é", 0, -5, 10**30])
@pytest.mark.parametrize("prompt", ["Hi", "", [1, 2], []])
def test_plain_lines(name, prompt):
    """An empty prompt is the tokenizer's to refuse: one that adds tokens of its own answers it."""
    assert read({"id": name, "prompt": prompt}) == Asked(name, prompt, DEFAULTS)


def test_a_conversation():
    assert read({"id": 1, "messages": MESSAGES}) == Asked(1, MESSAGES, DEFAULTS)
    assert read(CHAT) == Asked("a", MESSAGES, DEFAULTS, "/v1/chat/completions")
    text = CHAT | {"url": "/v1/completions", "body": {"prompt": "Hi", "top_p": 0.5}}
    wanted = SamplingParams(max_tokens=7, temperature=0.5, seed=3, top_p=0.5)
    assert read(text) == Asked("a", "Hi", wanted, "/v1/completions")


def test_sampling_is_the_commands_where_the_line_says_nothing():
    assert params(temperature=None, seed=None) == DEFAULTS
    found = params(temperature=0, max_completion_tokens=2, stop="x", top_k=4, min_p=0.1, ignore_eos=True)
    wanted = {"max_tokens": 2, "temperature": 0, "seed": 3, "stop": ("x",), "top_k": 4, "min_p": 0.1}
    assert found == SamplingParams(**wanted, ignore_eos=True)
    found = params(repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2.0)
    assert (found.repetition_penalty, found.presence_penalty, found.frequency_penalty) == (1.5, -1, 2.0)


def test_what_asks_for_nothing_special_is_taken():
    idle = {"n": 1, "stream": False, "logit_bias": {}, "tools": [], "tool_choice": "none", "suffix": None}
    assert params(**idle, model="m", user="u", metadata={"a": 1}, response_format={"type": "text"}) == DEFAULTS


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 5}, 5), ({"logprobs": 3}, 3), ({"logprobs": 0}, 0),
        ({"logprobs": False}, None), ({"logprobs": None}, None),
    ],
)  # fmt: skip
def test_both_ways_to_ask_for_log_probabilities(keys, number):
    assert params(**keys).logprobs == number


@pytest.mark.parametrize(
    ("entry", "name", "words"),
    [
        (b"", None, "not JSON: Expecting value at character 1"),
        (b'{"id": "a", "prompt": "Hi"', None, "not JSON"),
        (b'{"id": "a", "prompt": "Hi"} {}', None, "not JSON: Extra data at character 29"),
        (b'{"id": "a", "prompt": "\xff"}', None, "not UTF-8 at byte 23"),
        (b'{"id": "a", "prompt": "Hi", "top_p": NaN}', None, "NaN is no number"),
        (b'{"id": "a", "id": "b", "prompt": "Hi"}', None, "the key 'id' stands twice"),
        (b'{"id": "a", "prompt": "Hi", "metadata": {"k": 1, "k": 2}}', None, "the key 'k' stands twice"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", None, "not usable JSON"),
        ([PLAIN], None, "found a list, expected a JSON object"),
        ("Hi", None, "found a string, expected a JSON object"),
        ({"prompt": "Hi"}, None, "id: missing"),
        ({"id": 1.5, "prompt": "Hi"}, None, "id: found a number"),
        ({"id": True, "prompt": "Hi"}, None, "id: found true or false"),
        (b'{"id": "\\ud800", "prompt": "Hi"}', None, "id"),
        (b'{"id": "a", "prompt": "\\ud800"}', "a", "prompt"),
        ({"id": "a"}, "a", "expected one of prompt and messages, found neither"),
        (PLAIN | {"messages": MESSAGES}, "a", "found both"),
        ({"id": "a", "prompt": 5}, "a", "prompt: found a number"),
        ({"id": "a", "prompt": None}, "a", "prompt: found nothing"),
        ({"id": "a", "prompt": ["Hi", "you"]}, "a", "expected one prompt a line"),
        ({"id": "a", "prompt": [[1], [2]]}, "a", "expected one prompt a line"),
        ({"id": "a", "prompt": MESSAGES}, "a", "a conversation is messages"),
        ({"id": "a", "messages": []}, "a", "at least one"),
        ({"id": "a", "messages": ["Hi"]}, "a", "'role' and 'content'"),
        (PLAIN | {"temprature": 1}, "a", "the key 'temprature' is not known; is temperature meant?"),
        (PLAIN | {"zzz": 1}, "a", "the key 'zzz' is not known"),
        (PLAIN | {"temperature": "hot"}, "a", "temperature"),
        (PLAIN | {"temperature": -1}, "a", "temperature"),
        (PLAIN | {"max_tokens": 0}, "a", "max_tokens"),
        (PLAIN | {"top_p": 0}, "a", "top_p"),
        (PLAIN | {"top_k": 1.5}, "a", "top_k"),
        (PLAIN | {"seed": "1"}, "a", "seed"),
        (PLAIN | {"stop": [""]}, "a", "stop"),
        (PLAIN | {"ignore_eos": 1}, "a", "ignore_eos"),
        (PLAIN | {"max_tokens": 3, "max_completion_tokens": 3}, "a", "found both max_tokens and"),
        (PLAIN | {"n": 2}, "a", "n: 2 is not supported, expected 1 or nothing"),
        (PLAIN | {"n": True}, "a", "n: true is not supported"),
        (PLAIN | {"stream": True}, "a", "stream: true is not supported"),
        (PLAIN | {"logit_bias": {"5": -100}}, "a", "logit_bias"),
        (PLAIN | {"response_format": {"type": "json_object"}}, "a", "response_format"),
        (PLAIN | {"top_logprobs": 2}, "a", "needs logprobs true"),
        (PLAIN | {"logprobs": 21}, "a", "logprobs: found 21, expected a whole number from 0 to 20"),
        (PLAIN | {"logprobs": True, "top_logprobs": -1}, "a", "top_logprobs: found -1"),
        (CHAT | {"method": "GET"}, "a", "method: found 'GET', expected 'POST'"),
        (CHAT | {"url": "/v1/embeddings"}, "a", "url: found '/v1/embeddings', expected"),
        (CHAT | {"url": ["/v1/completions"]}, "a", "url: found"),
        (CHAT | {"body": None}, "a", "body: found nothing"),
        (CHAT | {"body": {"prompt": "Hi"}}, "a", "/v1/chat/completions takes messages"),
        (CHAT | {"body": {"messages": MESSAGES, "id": "b"}}, "a", "the key 'id' is not known"),
        (CHAT | {"id": "b"}, "a", "the key 'id' is not known"),
        ({key: value for key, value in CHAT.items() if key != "custom_id"}, None, "custom_id: missing"),
        ({"id": "a", "body": {"prompt": "Hi"}}, None, "custom_id: missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(entry, name, words):
    found = read(entry)
    assert isinstance(found, BadLine)
    assert found.id == name
    assert words in found.message


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "id", "prompt", "messages", "custom_id", "method", "url", "body", "max_tokens", "temperature", "stop", "seed",
    "logprobs", "top_logprobs", "n", "tools", "response_format", "logit_bias", "max_completion_tokens", "ignore_eos",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=6) | values)
def test_no_line_is_too_strange(entry):
    """Whatever stands there is asked for or refused: it stops nothing."""
    found = read(entry)
    assert isinstance(found, Asked) or found.message


@given(st.binary(max_size=40))
def test_no_bytes_are_too_strange(raw):
    assert isinstance(parse(raw, DEFAULTS), Asked | BadLine)


def completion(**more: Any) -> Completion:
    return Completion([1, 2, 3], [4, 5], "Há", "length", 9, ttft_ms=1.0, decode_tokens_per_s=2.0, **more)


def test_an_answer_has_the_form_of_its_line():
    plain = {"id": "a", "text": "Há", "ids": [4, 5], "finish_reason": "length", "prompt_tokens": 3, "line": 8}
    assert answer(8, "a", None, completion(), drawn=False) == plain
    assert answer(8, "a", None, completion(), drawn=True) == plain | {"seed": 9}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    for url, kind, said in (
        ("/v1/chat/completions", "chat.completion", {"message": {"role": "assistant", "content": "Há"}}),
        ("/v1/completions", "text_completion", {"text": "Há"}),
    ):
        found = answer(8, "a", url, completion(), drawn=False)
        choice = {"index": 0, **said, "finish_reason": "length"}
        body = {"object": kind, "choices": [choice], "usage": usage}
        response = {"status_code": 200, "request_id": "line-8", "body": body}
        assert found == plain | {"custom_id": "a", "response": response, "error": None}
        assert encode(found).isascii()
