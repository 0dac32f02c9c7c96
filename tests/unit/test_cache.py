"""The cache's book-keeping: pages and states are given out once, and come back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcpu.engine.cache import Cache
from tpcpu.errors import UsageError
from tpcpu.models import read_config
from tpcpu.parallel.partition import Share
from tpcpu.program.kv_format import KV_FORMATS

YUAN = {
    "model_type": "yuan", "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 3, "vocab_size": 100,
}  # fmt: skip
PROGRAM = read_config(YUAN).program(Share())


def cache(program=PROGRAM, **settings):
    return Cache(program, **{"context": 100, "page_tokens": 16, "sequences": 3, "kv": KV_FORMATS["bf16"]} | settings)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 100)), max_size=40))
def test_no_page_belongs_to_two(steps):
    """Sequences grow, end (length 0) and begin again, in any order; what they hold is theirs alone."""
    made = cache()
    live = {}
    for number, length in steps:
        if length == 0 and number in live:
            made.end(live.pop(number))
        elif length:
            live.setdefault(number, made.begin() if number not in live else None)
            made.reserve(live[number], length)
            assert len(live[number].pages) >= -(-length // 16)
        pages = [page for sequence in live.values() for page in sequence.pages]
        assert len(set(pages)) == len(pages)
        assert len({sequence.state for sequence in live.values()}) == len(live)
        assert all(0 <= page < 3 * 7 for page in pages)


def test_every_sequence_can_have_the_whole_context():
    made = cache()
    for _ in range(2):
        sequences = [made.begin() for _ in range(3)]
        for sequence in sequences:
            made.reserve(sequence, 100)
        for sequence in sequences:
            made.end(sequence)


def test_reserving_less_keeps_what_there_is():
    made = cache()
    sequence = made.begin()
    made.reserve(sequence, 50)
    pages = list(sequence.pages)
    made.reserve(sequence, 3)
    assert sequence.pages == pages


@pytest.mark.parametrize(("kv", "row"), [("float32", 256), ("bf16", 128), ("int8", 64 + 4)])
def test_sizes(kv, row):
    made = cache(kv=KV_FORMATS[kv])
    page = 3 * 16 * row
    assert made.memory.page_bytes == [page] * 3
    states = (16 * 3 + 21) * 3 * 4 * (192 + 96)
    assert made.nbytes == 3 * 2 * 3 * 7 * page + states
    assert made.memory.max_positions == 256


def test_regions_do_not_overlap():
    made = cache()
    memory = made.memory
    regions = [(at, 21 * size) for at, size in zip(memory.keys, memory.page_bytes, strict=True)]
    regions += [(at, 21 * size) for at, size in zip(memory.values, memory.page_bytes, strict=True)]
    regions += [(at, 16 * 3 * size) for at, size in zip(memory.states, memory.state_bytes, strict=True)]
    regions += [(at, 21 * size) for at, size in zip(memory.page_states, memory.state_bytes, strict=True)]
    regions.sort()
    assert all(at + size <= following for (at, size), (following, _) in pairwise(regions))


@pytest.mark.parametrize("page_tokens", [0, -16, 8, 40])
def test_pages_are_whole_tiles(page_tokens):
    with pytest.raises(UsageError, match=f"--page-tokens {page_tokens} "):
        cache(page_tokens=page_tokens)


def test_a_rank_without_heads_keeps_nothing():
    made = cache(read_config(YUAN).program(Share(0, 7)))
    assert made.memory.page_bytes == [0] * 3
    sequence = made.begin()
    made.reserve(sequence, 100)
