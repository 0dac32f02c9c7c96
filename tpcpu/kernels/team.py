"""The team: waiting, the barrier, the walker, and the loop that a worker never leaves.

A team is a block of int64 words, one fact per cache line, so that threads do not disturb each other. Every wait is
`wait_at`: it spins briefly, yields, sleeps on a futex, and looks at the abort word each time it looks at all. It waits
for words of other processes as well; then the number of sleepers lies beside the word, where they can see it.
"""

from numba import types

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.memory import (
    call_kernel,
    cycles,
    exchange,
    fetch_add,
    load_acquire,
    load_i64,
    pause,
    store_i64,
)
from tpcpu.kernels.team_layout import (
    ABORT,
    ARRIVALS,
    FUTEX_CALL,
    IDLE_SPINS,
    JOB,
    LINE,
    NOTE,
    PUBLISHED,
    RECORD_COUNT,
    RELEASE,
    SLEEPERS,
    SPINS,
    THREADS,
    TICKET,
    TIMEOUT,
    TRACE,
    WALKED,
    YIELDS,
)

_syscall = types.ExternalFunction(
    "syscall", types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64)
)
_sched_yield = types.ExternalFunction("sched_yield", types.int32())

_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_CHILDREN = 4
"""Threads whose arrival one waits for: the barrier is a tree, so that a socket does not fight over one line."""


ABORTED, TIRED = 1, 2
"""Why a wait ended before its time."""

_FOR_EVER = 1 << 62


@helper
def wait_at(address, target, team, spins, sleepers, sleeps):
    """Until the word at `address` is at least `target`: 0. `ABORTED` if the team is, `TIRED` after so many sleeps.

    `sleepers` is the address where those count themselves who sleep on the word, and perhaps on others.
    """
    looks = 0
    while load_acquire(address) < target:
        if load_acquire(team + ABORT) != 0:
            return ABORTED
        looks += 1
        if looks <= spins:
            pause()
        elif looks <= spins + load_i64(team + YIELDS):
            _sched_yield()
        elif sleeps == 0:
            return TIRED
        else:
            sleeps -= 1
            # Announced before the last look, so that whoever stores afterwards sees a sleeper and wakes it.
            fetch_add(sleepers, 1)
            seen = load_acquire(address)
            if seen < target and load_acquire(team + ABORT) == 0:
                _syscall(load_i64(team + FUTEX_CALL), address, _FUTEX_WAIT, seen & 0xFFFFFFFF, team + TIMEOUT, 0, 0)
            fetch_add(sleepers, -1)
    return 0


@helper
def post_at(address, value, team, sleepers):
    """Stores `value` and wakes whoever sleeps on it, in any process."""
    exchange(address, value)
    if load_acquire(sleepers) != 0:
        _syscall(load_i64(team + FUTEX_CALL), address, _FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)


@helper
def wait(address, target, team, spins):
    """Until a word of the team is at least `target`. Gives 0, or `ABORTED`."""
    return wait_at(address, target, team, spins, team + SLEEPERS, _FOR_EVER)


@helper
def post(address, value, team):
    """Stores a word of the team and wakes whoever sleeps on it."""
    post_at(address, value, team, team + SLEEPERS)


@helper
def _barrier(team, thread, threads, epoch):
    """Until all threads are here for the `epoch`-th time. Gives 1 if the team is aborted."""
    spins = load_i64(team + SPINS)
    for child in range(_CHILDREN * thread + 1, min(_CHILDREN * thread + _CHILDREN + 1, threads)):
        if wait(team + ARRIVALS + child * LINE, epoch, team, spins):
            return 1
    if thread == 0:
        post(team + RELEASE, epoch, team)
        return 0
    post(team + ARRIVALS + thread * LINE, epoch, team)
    return wait(team + RELEASE, epoch, team, spins)


@helper
def _walk(team, thread):
    """Runs the records of the job, in step with the other threads."""
    threads = load_i64(team + THREADS)
    record = load_i64(team + JOB)
    # Only this thread writes its line, and the release word only moves when all have arrived: both count epochs.
    epoch = load_acquire(team + RELEASE)
    note = load_i64(team + NOTE)
    for number in range(load_i64(team + RECORD_COUNT)):
        if thread == 0:
            store_i64(note, number)
        step = load_i64(record + 8 * R.STEP)
        chosen = load_i64(step + 8 * R.CLASS)
        call_kernel(load_i64(record + 8 * (R.KERNELS + chosen)), record, thread, threads)
        if threads > 1 and (load_i64(record + 8 * R.BARRIER) >> chosen) & 1:
            epoch += 1
            if _barrier(team, thread, threads, epoch):
                return
        record += 8 * R.RECORD_WORDS


@helper
def _walk_timed(team, thread, trace):
    """The same, and adds up the cycles of every kernel and of the wait after it."""
    threads = load_i64(team + THREADS)
    record, count = load_i64(team + JOB), load_i64(team + RECORD_COUNT)
    times = trace + 16 * count * thread
    epoch = load_acquire(team + RELEASE)
    note = load_i64(team + NOTE)
    for number in range(count):
        if thread == 0:
            store_i64(note, number)
        step = load_i64(record + 8 * R.STEP)
        chosen = load_i64(step + 8 * R.CLASS)
        begin = cycles()
        call_kernel(load_i64(record + 8 * (R.KERNELS + chosen)), record, thread, threads)
        done = cycles()
        if threads > 1 and (load_i64(record + 8 * R.BARRIER) >> chosen) & 1:
            epoch += 1
            if _barrier(team, thread, threads, epoch):
                return
        store_i64(times, load_i64(times) + done - begin)
        store_i64(times + 8, load_i64(times + 8) + cycles() - done)
        record += 8 * R.RECORD_WORDS
        times += 16


@helper
def _walk_job(team, thread):
    trace = load_i64(team + TRACE)
    if trace:
        _walk_timed(team, thread, trace)
    else:
        _walk(team, thread)


@kernel("team-run")
def run(team, records, count):
    """Walks the records as thread 0 together with the workers; returns when all are done, or on abort.

    The last record must end with a barrier.
    """
    store_i64(team + JOB, records)
    store_i64(team + RECORD_COUNT, count)
    note = load_i64(team + NOTE)
    store_i64(note + 8, load_i64(note + 8) + 1)
    begin = cycles()
    post(team + TICKET, load_acquire(team + TICKET) + 1, team)
    _walk_job(team, 0)
    store_i64(note, -1)
    store_i64(team + WALKED, load_i64(team + WALKED) + cycles() - begin)


@kernel("team-work")
def work(team, thread, ticket):
    """A worker's life: waits for the next ticket, walks, waits; returns when the team is aborted."""
    while True:
        ticket += 1
        if wait(team + TICKET, ticket, team, load_i64(team + IDLE_SPINS)):
            return
        _walk_job(team, thread)


@kernel("team-wake")
def wake(team, _unused, _also_unused):
    """Wakes every sleeper, after the abort word was set."""
    for word in (TICKET, RELEASE):
        _syscall(load_i64(team + FUTEX_CALL), team + word, _FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)
    for thread in range(load_i64(team + THREADS)):
        line = team + ARRIVALS + thread * LINE
        _syscall(load_i64(team + FUTEX_CALL), line, _FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)
        _syscall(load_i64(team + FUTEX_CALL), line + PUBLISHED, _FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)
