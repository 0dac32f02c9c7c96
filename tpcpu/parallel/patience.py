"""Waiting from Python: at once when busy, asleep when idle.

Knows clocks and the scheduler; must not know what is waited for. Compiled code has its own wait.
"""

import os
import time
from collections.abc import Callable

# after this long without an answer the other side is idle, not busy
_BUSY_SECONDS = 2e-3
# a sleep is this share of the time waited so far, so that it delays an answer by no more than that share
_SLEEP_SHARE = 0.01
_LONGEST_SLEEP = 10e-3


class Patience:
    """Waits for a condition: spins for a moment, then yields the core, then sleeps in growing pieces.

    The answer is noticed within microseconds while the other side is busy, within a hundredth of the time waited (at
    most 10 ms) when it was idle; a long wait costs a few tenths of a percent of a core. With `crowded`, where
    processes outnumber cores, there is no spinning: it would hold up the one that is waited for.
    """

    def __init__(self, crowded: bool = False) -> None:
        """Choose the length of the spin."""
        self._spin_seconds = 0.0 if crowded else 200e-6

    def wait(self, done: Callable[[], bool]) -> None:
        """Return as soon as `done()` is true; signals are handled between its calls."""
        if done():
            return
        start = time.monotonic()
        while not done():
            waited = time.monotonic() - start
            if waited > _BUSY_SECONDS:
                time.sleep(min(waited * _SLEEP_SHARE, _LONGEST_SLEEP))
            elif waited > self._spin_seconds:
                os.sched_yield()
