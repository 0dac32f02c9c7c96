"""Threads take every panel of a product once, whoever owns it, product after product."""

import random
import threading

import pytest
from numba import njit

from tpcpu.kernels.shares import HELPED, take
from tpcpu.kernels.team_layout import ARRIVALS, LINE
from tpcpu.parallel.team import aligned


@njit(nogil=True)
def take_one(team, threads, owner, number, count, helps):
    return take(team, threads, owner, number, count, helps)


def unpacked(taken):
    return range(taken >> 32, (taken >> 32) + (taken & 0xFFFFFFFF))


def words(threads):
    return aligned((ARRIVALS + 2 * LINE * threads) // 8)


def through(team, threads, thread, number, counts):
    """What one thread takes of a product: (owner, panel), its own share first."""
    found, pauses = [], random.Random(thread + number)
    for helped in range(min(HELPED, threads - 1) + 1):
        owner = (thread + helped) % threads
        while taken := take_one(team, threads, owner, number, counts[owner], helped):
            found += [(owner, panel) for panel in unpacked(taken)]
            if pauses.random() < 0.2:
                threading.Event().wait(1e-4)
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_panel_is_taken_once(threads):
    memory = words(threads)
    draws = random.Random(threads)
    sizes = [[draws.choice([0, 1, 2, 7, 40, 333, 1022, 1023, 5000]) for _ in range(threads)] for _ in range(40)]
    found = [[] for _ in sizes]

    def work(thread):
        # No barrier between products: some are still in one when others are in the next.
        for number, counts in enumerate(sizes):
            found[number] += through(memory.ctypes.data, threads, thread, number + 1, counts)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for counts, taken in zip(sizes, found, strict=True):
        assert sorted(taken) == [(owner, panel) for owner in range(threads) for panel in range(counts[owner])]


def test_an_owner_takes_from_the_front_and_helpers_from_the_back():
    memory = words(2)
    team = memory.ctypes.data
    assert list(unpacked(take_one(team, 2, 1, 7, 100, 0))) == list(range(25))
    assert list(unpacked(take_one(team, 2, 1, 7, 100, 1))) == list(range(81, 100))
    assert list(unpacked(take_one(team, 2, 1, 7, 100, 0))) == list(range(25, 39))


def test_a_helper_may_be_there_before_the_owner():
    memory = words(2)
    team = memory.ctypes.data
    assert list(unpacked(take_one(team, 2, 1, 3, 4, 1))) == [3]
    assert list(unpacked(take_one(team, 2, 1, 3, 4, 0))) == [0]


def test_a_late_helper_finds_nothing_of_an_earlier_product():
    memory = words(2)
    team = memory.ctypes.data
    assert take_one(team, 2, 1, 9, 50, 0)
    assert take_one(team, 2, 1, 8, 50, 1) == 0
    assert list(unpacked(take_one(team, 2, 1, 9, 50, 0))) == list(range(13, 23))


def test_numbers_may_go_on_for_ever():
    """They are kept in 44 bits."""
    memory = words(2)
    team = memory.ctypes.data
    for number in (2**42, 2**43, 2**43 + 2**42, 2**44 - 1, 2**44, 2**44 + 1):
        assert len(unpacked(take_one(team, 2, 0, number, 8, 0))) == 2
        assert len(unpacked(take_one(team, 2, 0, number, 8, 1))) == 2
