"""Batches: what is built is read from the message, and the message is all there is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcpu.program.batch import Batch

ids = st.integers(0, 2**31 - 1)
parts = st.lists(
    st.tuples(st.lists(ids, min_size=1, max_size=9), st.integers(0, 5000), ids, st.lists(ids, max_size=5)),
    min_size=1, max_size=4,
)  # fmt: skip


@given(parts, st.data())
def test_the_message_holds_the_batch(parts, data):
    count = sum(len(tokens) for tokens, *_ in parts)
    wanted = data.draw(st.lists(st.integers(0, count - 1), max_size=count))
    candidates, vocabulary = data.draw(ids), data.draw(ids)
    built = Batch.build(parts, wanted, candidates=candidates, vocabulary=vocabulary)
    batch = Batch.read(built.message.copy())
    assert batch.message[0] == len(batch.message)
    assert (batch.candidates, batch.vocabulary) == (candidates, vocabulary)
    assert batch.wanted.tolist() == wanted
    at = 0
    for number, (tokens, position, state, pages) in enumerate(parts):
        here = slice(at, at + len(tokens))
        assert batch.tokens[here].tolist() == tokens
        assert batch.positions[here].tolist() == list(range(position, position + len(tokens)))
        assert set(batch.sequences[here]) == {number}
        assert set(batch.firsts[here]) == {at}
        assert batch.states[number] == state
        assert batch.pages[number].tolist() == pages + [0] * (batch.pages.shape[1] - len(pages))
        at += len(tokens)
    assert len(batch.tokens) == count


def test_arrays_are_views_of_the_message():
    batch = Batch.build([([1, 2], 0, 0, [3])], [1], candidates=0, vocabulary=9)
    batch.tokens[1] = 77
    assert 77 in batch.message
    for array in (
        batch.tokens,
        batch.positions,
        batch.sequences,
        batch.firsts,
        batch.wanted,
        batch.states,
        batch.pages,
    ):
        assert np.shares_memory(array, batch.message)
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


@pytest.mark.parametrize("count", [1, 200])
def test_a_longer_buffer_does_no_harm(count):
    """What is received may lie in a larger buffer than the message needs."""
    batch = Batch.build([(list(range(count)), 5, 1, [0, 1])], [0], candidates=0, vocabulary=9)
    received = np.full(len(batch.message) + 100, -1, np.int32)
    received[: len(batch.message)] = batch.message
    again = Batch.read(received)
    assert again.tokens.tolist() == list(range(count))
    assert again.pages.tolist() == [[0, 1]]


def test_the_next_batch_of_the_same_sequences():
    def build(tokens, positions):
        parts = [
            ([token], at, number, [4, 5]) for number, (token, at) in enumerate(zip(tokens, positions, strict=True))
        ]
        return Batch.build(parts, range(3), candidates=2, vocabulary=9)

    batch = build([1, 2, 3], [7, 20, 0])
    batch.advance([4, 5, 6])
    assert batch.message.tolist() == build([4, 5, 6], [8, 21, 1]).message.tolist()
