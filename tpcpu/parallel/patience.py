"""Waiting from Python: at once when busy, asleep when idle.

Knows clocks and the scheduler; must not know what is waited for. Compiled code has its own wait.
"""

import os
import time
from collections.abc import Callable

from tpcpu.parallel.doorbell import Doorbell

# after this long without an answer the other side is idle, not busy
_BUSY_SECONDS = 2e-3
# a wait this long may be for something that never comes
_LOOK_SECONDS = 0.5
# without a bell, a sleep is this share of the time waited so far, so that it delays an answer by no more than that
_SLEEP_SHARE = 0.01
_LONGEST_SLEEP = 10e-3
# with one, sleeps only guard against a ring that came before what it announced
_LONGEST_SLEEP_AT_BELL = 1.0


class Patience:
    """Waits for a condition: spins for a moment, then yields the core, then sleeps in growing pieces.

    The answer is noticed within microseconds while the other side is busy. When it was idle: within a tenth of a
    millisecond where it rings the bell, and at no cost; without one within a hundredth of the time waited (at most
    10 ms), for less than a hundredth of a core. With `crowded`, where processes outnumber cores, there is no spinning:
    it would hold up the one that is waited for.
    """

    def __init__(self, crowded: bool = False) -> None:
        """Choose the length of the spin."""
        self._spin_seconds = 0.0 if crowded else 200e-6

    def wait(
        self, done: Callable[[], bool], bell: Doorbell | None = None, look: Callable[[], None] | None = None
    ) -> None:
        """Return as soon as `done()` is true, asleep at `bell` if there is one; signals are handled meanwhile.

        `look` is called now and then when it takes long, and ends the wait by raising.
        """
        if done():
            return
        start = looked = time.monotonic()
        while not done():
            now = time.monotonic()
            waited = now - start
            if look is not None and now - looked > _LOOK_SECONDS:
                looked = now
                look()
            if waited <= self._spin_seconds:
                continue
            if waited <= _BUSY_SECONDS:
                os.sched_yield()
            elif bell is None:
                time.sleep(min(waited * _SLEEP_SHARE, _LONGEST_SLEEP))
            elif bell.wait(min(waited, _LONGEST_SLEEP_AT_BELL)):
                # what was announced may be a moment behind the ring: look closely again
                start = time.monotonic()
