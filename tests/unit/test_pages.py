"""Pages of the cache: found again by the tokens in them, shared, and given up in order of their last use."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tpcpu.engine.pages import START, Pages


def fill(pages: Pages, tokens: list[int]) -> list[int]:
    """A sequence of these tokens, all of whose whole pages are known."""
    held = pages.match(tokens)
    size = pages.page_tokens
    while len(held) * size < len(tokens):
        held.append(pages.take())
    for number in range(len(tokens) // size):
        before = held[number - 1] if number else START
        held[number] = pages.name(held[number], before, tokens[number * size : (number + 1) * size])
    return held


def test_a_beginning_is_found_in_whole_pages_and_never_all_of_it():
    pages = Pages(8, 4)
    held = fill(pages, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 8]) == held[:1]
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 8, 0]) == held[:2]
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 0, 0]) == held[:1]
    assert pages.match([2, 2, 3, 4, 5, 6, 7, 8, 9]) == []
    # The second page is nobody's without the first one before it.
    assert pages.match([5, 6, 7, 8, 9]) == []
    assert [pages.users[page] for page in held] == [4, 2, 1]


def test_tokens_are_compared_and_not_their_hashes():
    """-1 and -2 have the same hash in Python, and so have their tuples."""
    pages = Pages(4, 2)
    assert hash((-1, 3)) == hash((-2, 3))
    fill(pages, [-1, 3])
    assert pages.match([-2, 3, 5]) == []


def test_what_two_have_filled_at_the_same_time_becomes_one():
    pages = Pages(8, 4)
    one, other = pages.take(), pages.take()
    assert pages.name(one, START, [1, 2, 3, 4]) == one
    assert pages.name(other, START, [1, 2, 3, 4]) == one
    assert (pages.users[one], pages.users[other]) == (2, 0)
    pages.check([[one], [one]])
    assert pages.available == 7


def test_the_least_recently_used_leaves_first_and_what_follows_before_what_it_follows():
    pages = Pages(6, 2)
    a, b = fill(pages, [1, 1, 1, 1]), fill(pages, [2, 2, 2, 2, 2, 2])
    pages.release(a)
    pages.release(b)
    assert pages.available == 6
    taken = [pages.take() for _ in range(5)]
    # One was free; then a from behind, then b from behind.
    assert taken[1:] == [a[1], a[0], b[2], b[1]]
    assert pages.match([2, 2, 2]) == b[:1]
    pages.check([taken, b[:1]])


def test_use_makes_young():
    pages = Pages(4, 2)
    a, b = fill(pages, [1, 1, 1, 1]), fill(pages, [2, 2, 2, 2])
    pages.release(a)
    pages.release(b)
    pages.release(pages.match([1, 1, 1, 1, 1]))
    assert [pages.take(), pages.take()] == [b[1], b[0]]


def test_a_page_in_use_is_never_given_up():
    pages = Pages(3, 2)
    held = fill(pages, [1, 1, 1, 1, 1, 1])
    pages.release(pages.match([1, 1, 1]))
    assert pages.available == 0
    pages.release(held[2:])
    assert pages.take() == held[2]


steps = st.lists(
    st.tuples(st.sampled_from(["fill", "release", "recover"]), st.integers(0, 8), st.integers(0, 15)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_no_page_is_lost_or_used_twice(plan):
    """Sequences of two tokens only, so that most begin alike."""
    pages = Pages(12, 2)
    live: list[list[int]] = []
    contents: dict[int, tuple[int, ...]] = {}
    for operation, length, number in plan:
        tokens = [number >> i & 1 for i in range(4)] * 2
        tokens = tokens[:length]
        if operation == "fill" and -(-length // 2) <= pages.available:
            found = pages.match(tokens)
            for place, page in enumerate(found):
                assert contents[page] == tuple(tokens[: 2 * place + 2]), "what is found is what was written"
            pages.release(found)
            held = fill(pages, tokens)
            for place, page in enumerate(held[: length // 2]):
                contents[page] = tuple(tokens[: 2 * place + 2])
            live.append(held)
        elif operation == "release" and live:
            pages.release(live.pop(number % len(live)))
        elif operation == "recover":
            pages.recover()
            live = []
        pages.check(live)
    for held in live:
        pages.release(held)
    pages.check([])
    assert pages.available == 12
