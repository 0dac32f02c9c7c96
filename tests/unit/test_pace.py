"""Which rank is slower than the others, from how long each has waited."""

import pytest

from tpcpu.engine import pace
from tpcpu.engine.pace import Pace, slowest

EVEN = [100, 100, 100, 100]


def test_the_rank_that_waits_least_is_slow_by_what_the_others_wait_longer():
    assert slowest([40, 42, 2, 41], [100, 100, 100, 100], EVEN) == (2, pytest.approx(0.39))
    assert slowest([2, 40], [100, 100], EVEN[:2]) == (0, pytest.approx(0.38))


def test_what_all_wait_for_is_nobodys():
    assert slowest([40, 42, 38, 41], [100] * 4, EVEN) is None


def test_a_larger_share_explains_its_time():
    """Of three ranks one reads 40 of 100 bytes, the mean 33: a sixth of its time is its share's."""
    assert slowest([20, 22, 1], [100] * 3, [28, 32, 40]) is None
    assert slowest([20, 22, 1], [100] * 3, [33, 33, 33]) == (2, pytest.approx(0.20))


def test_ranks_that_did_nothing_are_not_judged():
    assert slowest([0, 0], [0, 0], [0, 0]) is None


def test_looks_are_rare_and_count_what_happened_since(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    watched = Pace(["a", "a", "b"], [5, 5, 5])
    assert not watched.is_due(pace.FIRST_SECONDS / 2)
    assert watched.is_due(pace.FIRST_SECONDS / 2)
    assert not watched.is_due(pace.FIRST_SECONDS)
    assert watched.judge([(10, 100), (10, 100), (10, 100)]) is None
    assert watched.judge([(50, 200), (50, 200), (12, 200)]) == "rank 2 on b: all-reduce waits 38% of the step for it"
    # The same again is kept and not said, until a minute has passed.
    assert watched.judge([(100, 300), (100, 300), (13, 300)]) is None
    clock[0] += 61
    assert "49%" in (watched.judge([(150, 400), (150, 400), (14, 400)]) or "")
    (slow,) = watched.found.values()
    assert (slow.rank, slow.host, slow.waited) == (2, "b", 0.49)
