"""Shares are contiguous, cover everything once, are as even as they go, and may be empty."""

import pytest

from tpcpu.parallel.partition import Range, Share


def shares(count, size, unit=1):
    return [Share(rank, size).split(count, unit) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8, 13])
@pytest.mark.parametrize(("count", "unit"), [(0, 1), (1, 1), (7, 1), (64, 64), (172, 64), (1000, 64), (704, 32)])
def test_shares_tile_the_whole_and_part_only_at_units(count, unit, size):
    parts = shares(count, size, unit)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % unit == 0 or part.start == count for part in parts)
    units = [-(-len(part) // unit) for part in parts]
    assert max(units) - min(units) <= 1


def test_more_ranks_than_things_leaves_shares_empty():
    assert [len(part) for part in shares(2, 5)] == [0, 0, 1, 0, 1]


def test_cover_widens_to_whole_units_but_not_past_the_end():
    assert Range(40, 80).cover(64, 1000) == Range(0, 128)
    assert Range(128, 172).cover(64, 172) == Range(128, 172)
    assert Range(7, 7).cover(64, 1000) == Range(0, 0)


def test_blocks_are_the_units_touched():
    assert Range(40, 80).blocks(64) == Range(0, 2)
    assert Range(64, 128).blocks(64) == Range(1, 2)
    assert Range(5, 5).blocks(4) == Range(0, 0)


def test_a_range_counts_in_smaller_things():
    assert Range(2, 5) * 64 == Range(128, 320)
    assert len(Range(2, 5) * 64) == 192
