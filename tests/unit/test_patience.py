"""Waiting and bells: prompt when busy, asleep when idle."""

import secrets
import threading
import time

import pytest

from tpcpu.parallel.doorbell import Doorbell
from tpcpu.parallel.patience import Patience


def name() -> str:
    """A bell's name that nobody else has."""
    return f"tpcpu-test-{secrets.token_hex(8)}"


def test_what_is_done_is_not_waited_for() -> None:
    Patience().wait(lambda: True)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("seconds", [0.0005, 0.05])
def test_waiting_ends_soon_after_the_event(crowded: bool, seconds: float) -> None:
    event = time.monotonic() + seconds
    Patience(crowded).wait(lambda: time.monotonic() >= event)
    assert time.monotonic() - event < 0.25


def test_waiting_at_a_bell_is_free_and_prompt() -> None:
    bell, other = Doorbell(name()), Doorbell(own := name())
    done = threading.Event()

    def finish() -> None:
        done.set()
        bell.ring([own])

    timer = threading.Timer(0.6, finish)
    timer.start()
    started, used = time.monotonic(), time.thread_time()
    Patience().wait(done.is_set, other)
    assert time.thread_time() - used < 0.03
    assert 0.5 < time.monotonic() - started < 2
    timer.join()
    bell.close()
    other.close()


def test_a_ring_before_its_message_does_not_put_to_sleep_for_long() -> None:
    bell = Doorbell(own := name())
    event = time.monotonic() + 0.3
    timer = threading.Timer(0.29, bell.ring, [[own]])
    timer.start()
    Patience().wait(lambda: time.monotonic() >= event, bell)
    assert time.monotonic() - event < 0.5
    timer.join()
    bell.close()


def test_bells() -> None:
    bell = Doorbell(own := name())
    assert not bell.wait(0)
    for _ in range(50):
        bell.ring([own, "tpcpu-test-nobody"])
    assert bell.wait(0)
    assert not bell.wait(0)
    with pytest.raises(OSError, match="in use"):
        Doorbell(own)
    bell.close()
    Doorbell(own).close()
