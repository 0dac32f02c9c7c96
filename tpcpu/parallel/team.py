"""The threads of a rank: one per core, pinned, created once, parked in compiled code between steps.

The caller is thread 0. Workers never return to Python; `close` sets the abort word and wakes them. They are daemons,
because the interpreter joins other threads before `atexit` gets to run `close`.
"""

import atexit
import ctypes
import os
import platform
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import team as compiled
from tpcpu.kernels import team_layout as layout
from tpcpu.kernels.compile import prepare

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)

FUTEX_CALLS = {"x86_64": 202, "AMD64": 202, "aarch64": 98}

SPINS, SPINS_CROWDED = 2000, 200
"""Looks before yielding; few when threads outnumber cores, so that those with work get to run."""
YIELDS = 20
IDLE_SPINS = 20_000
"""About 0.2 ms: longer than what lies between two steps, far shorter than a person's pause."""
SLEEP_SECONDS = 1
"""A sleeper looks again after this long even if nobody woke it."""


def aligned(words: int) -> NDArray[np.int64]:
    """Zeroed int64 words that begin a cache line."""
    raw = np.zeros(words + 8, np.int64)
    skip = -(raw.ctypes.data // 8) % 8
    return raw[skip : skip + words]


class Team:
    """`len(cpus)` threads, thread t on CPU `cpus[t]`; without `pinned` they run wherever the system likes.

    `run` is not reentrant: one caller at a time. The caller belongs to the team while it runs and no longer: what it
    does in between, and the threads that it starts, are its own affair.
    """

    def __init__(
        self, cpus: Sequence[int], *, pinned: bool = True, crowded: bool = False, note: int | None = None
    ) -> None:
        """`note`: the address of two words in which others watch the team at work (see `team_layout.NOTE`)."""
        prepare([compiled.run, compiled.work, compiled.wake])
        self.threads = len(cpus)
        self._run = _KERNEL(compiled.run.address)
        self._wake = _KERNEL(compiled.wake.address)
        self._words = aligned((layout.ARRIVALS + 2 * layout.LINE * self.threads) // 8)
        self.address: int = self._words.ctypes.data
        """Where compiled code finds it."""
        self._set(layout.THREADS, self.threads)
        self._set(layout.SPINS, SPINS_CROWDED if crowded else SPINS)
        self._set(layout.YIELDS, YIELDS)
        self._set(layout.IDLE_SPINS, SPINS_CROWDED if crowded else IDLE_SPINS)
        self._set(layout.FUTEX_CALL, FUTEX_CALLS[platform.machine()])
        self._set(layout.TIMEOUT, SLEEP_SECONDS)
        self._unwatched = aligned(layout.LINE // 8)
        self._set(layout.NOTE, note or self._unwatched.ctypes.data)
        self._place = {cpus[0]} if pinned else None
        self._numbers = 0
        self._workers = [
            threading.Thread(target=self._work, args=(t, {cpu} if pinned else None), daemon=True, name=f"tpcpu-{t}")
            for t, cpu in enumerate(cpus[1:], start=1)
        ]
        for worker in self._workers:
            worker.start()
        atexit.register(_close, weakref.ref(self))

    @property
    def waited(self) -> tuple[int, int]:
        """Cycles that thread 0 has waited for other ranks so far, and those of all its walks."""
        return int(self._words[layout.WAITED // 8]), int(self._words[layout.WALKED // 8])

    def run(self, records: NDArray[np.int64]) -> None:
        """Walks the records (count, RECORD_WORDS); the last must end with a barrier."""
        self.walk(records.ctypes.data, len(records))

    def number(self, count: int) -> int:
        """The number before `count` new ones, larger than any that this team has given out."""
        self._numbers += count
        return self._numbers - count

    def walk(self, address: int, count: int) -> None:
        """As `run`, for records that lie at `address`: one call into compiled code, with the caller on its CPU."""
        # Written out, and not `with self.placed()`: no Python runs between here and compiled code, step after step.
        before = os.sched_getaffinity(0) if self._place is not None else None
        if before is None or self._place is None or before == self._place:
            self._run(self.address, address, count)
            return
        os.sched_setaffinity(0, self._place)
        try:
            self._run(self.address, address, count)
        finally:
            os.sched_setaffinity(0, before)

    @contextmanager
    def timed(self, records: int) -> Iterator[NDArray[np.int64]]:
        """Inside, every walk of `records` records adds to (threads, records, 2) int64: cycles in kernels, and after.

        What a thread waits for the others is after the kernel. Nothing else may be walked meanwhile.
        """
        # Kept beyond: a worker may still note its last wait when the walk is over.
        self._times = times = np.zeros((self.threads, records, 2), np.int64)
        self._set(layout.TRACE, times.ctypes.data)
        try:
            yield times
        finally:
            self._set(layout.TRACE, 0)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Inside, the calling thread is on its CPU; for callers that do nothing but run. About 5 us, next to nothing
        when nested."""
        before = os.sched_getaffinity(0) if self._place is not None else None
        if before == self._place:
            yield
            return
        assert before is not None
        assert self._place is not None
        os.sched_setaffinity(0, self._place)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def close(self) -> None:
        """Ends the workers; they are gone when this returns. May be called twice."""
        if self._words[layout.ABORT // 8]:
            return
        self._set(layout.ABORT, 1)
        self._wake(self.address, 0, 0)
        for worker in self._workers:
            worker.join(5 * SLEEP_SECONDS)

    def _work(self, thread: int, cpus: set[int] | None) -> None:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
        _KERNEL(compiled.work.address)(self.address, thread, 0)

    def _set(self, offset: int, value: int) -> None:
        self._words[offset // 8] = value


def _close(reference: "weakref.ref[Team]") -> None:
    team = reference()
    if team is not None:
        team.close()
