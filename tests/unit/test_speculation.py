"""Drafts: what followed the last time, found without reading the text again, and fewer where they are wrong."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpcpu.engine.speculation import LONGEST, SHORTEST, Drafter, Lookup


def naive(tokens: list[int], count: int) -> list[int]:
    """By reading the whole text."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        end = tokens[-length:]
        for place in range(len(tokens) - 1, length - 1, -1):
            if len(end) == length and tokens[place - length : place] == end:
                draft: list[int] = []
                for i in range(count):
                    draft.append((tokens + draft)[place + i])
                return draft
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_the_latest_place_of_the_longest_agreement(tokens, count):
    assert Lookup(tokens).propose(count) == naive(tokens, count)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_token_by_token_is_all_at_once(tokens, first):
    lookup = Lookup(tokens[:first])
    for token in tokens[first:]:
        lookup.push(token)
    assert lookup.propose(5) == Lookup(tokens).propose(5)


def test_a_token_costs_the_same_in_a_long_text():
    tokens = np.random.default_rng(0).integers(0, 5, 40_000).tolist()
    lookup = Lookup()
    seconds = []
    for part in range(4):
        begin = time.perf_counter()
        for token in tokens[10_000 * part : 10_000 * (part + 1)]:
            lookup.push(token)
            lookup.propose(4)
        seconds.append(time.perf_counter() - begin)
    # Reading it again would make the last quarter seven times as slow as the first.
    assert min(seconds[2:]) < 3 * seconds[0]


def play(drafter: Drafter, text: list[int], begin: int, most: int = 15) -> tuple[int, int]:
    """(steps, tokens drafted) until the text is out, as it goes on whatever is drafted."""
    at, steps, drafted = begin, 0, 0
    while at < len(text):
        draft = drafter.propose(min(most, len(text) - at - 1))
        accepted = 0
        while accepted < len(draft) and draft[accepted] == text[at + accepted]:
            accepted += 1
        if draft:
            drafter.verified(len(draft), accepted)
        for token in text[at : at + accepted + 1]:
            drafter.push(token)
        at += accepted + 1
        steps += 1
        drafted += len(draft)
    return steps, drafted


def test_drafts_grow_where_they_are_right():
    text = list(range(50)) * 6
    drafter = Drafter(7, text[:60])
    steps, drafted = play(drafter, text, 60)
    assert steps <= -(-240 // 8) + 4
    assert drafter.accepted == drafter.drafted == drafted


def test_drafts_stop_where_they_are_wrong_and_are_tried_again():
    """A text whose pairs come back, but never what followed them."""
    text = [token for number in range(400) for token in (1, 2, 100 + number, 1000 + number)]
    drafter = Drafter(7)
    steps, drafted = play(drafter, text, 0)
    assert steps == len(text) - drafter.accepted
    # 399 chances, the first few taken, then one after each pause.
    assert 3 <= drafted <= 30
    # And when the text begins to repeat itself, drafts come back.
    more = text[-200:] * 3
    steps, _ = play(drafter, more, 0)
    assert steps < 0.5 * len(more)


def test_no_more_than_asked_for():
    drafter = Drafter(3, [1, 2, 3, 4] * 5)
    for _ in range(20):
        draft = drafter.propose(15)
        assert 1 <= len(draft) <= 3
        drafter.verified(len(draft), len(draft))
    assert drafter.propose(0) == []
    assert len(drafter.propose(2)) == 2
