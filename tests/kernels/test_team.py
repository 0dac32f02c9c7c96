"""The team: barriers with more threads than cores, sleeping, waking, ending. Records here call Python functions."""

import ctypes
import os
import threading
import time

import numpy as np
import pytest

from tpcpu.kernels import record as R
from tpcpu.kernels import team_layout
from tpcpu.parallel.team import SLEEP_SECONDS, Team, aligned

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class Job:
    """Records that call `function(number of the record, thread, threads)`."""

    def __init__(self, function, count=1, barriers=None):
        self._step = aligned(R.STEP_WORDS)
        self._call = KERNEL(lambda record, thread, threads: function(self.number(record), thread, threads))
        self.records = np.zeros((count, R.RECORD_WORDS), np.int64)
        self.records[:, R.KERNELS : R.KERNELS + 3] = ctypes.cast(self._call, ctypes.c_void_p).value
        self.records[:, R.BARRIER] = 0b111 if barriers is None else 0b111 * np.asarray(barriers)
        self.records[:, R.STEP] = self._step.ctypes.data

    def number(self, record):
        return (record - self.records.ctypes.data) // self.records.strides[0]


@pytest.fixture
def team(request):
    made = Team(range(request.param), pinned=False, crowded=request.param > 2)
    yield made
    made.close()


def sized(*threads):
    return pytest.mark.parametrize("team", threads, indirect=True, ids=[f"{count}-threads" for count in threads])


def asleep(team):
    """Whether all workers sleep; gives them two seconds to get there."""
    end = time.monotonic() + 2
    while team._words[team_layout.SLEEPERS // 8] < team.threads - 1:
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


@sized(1, 2, 3, 6, 24, 64)
def test_nobody_passes_a_barrier_early(team):
    """Every thread runs every record once, and none starts on one before all have done the one before."""
    done = []
    job = Job(lambda number, thread, threads: done.append((number, thread, threads)), count=12)
    for _ in range(3):
        done.clear()
        team.run(job.records)
        assert [number for number, *_ in done] == sorted(number for number, *_ in done)
        assert sorted(done) == [(n, t, team.threads) for n in range(12) for t in range(team.threads)]


@sized(3)
def test_without_a_barrier_threads_run_on(team):
    """A thread goes through records that end without a barrier while another is still in the first."""
    first_may_end = threading.Event()
    done = []

    def work(number, thread, _):
        if thread == 1 and number == 0:
            assert first_may_end.wait(10)
        if thread == 2 and number == 1:
            first_may_end.set()
        done.append((number, thread))

    team.run(Job(work, count=3, barriers=[0, 0, 1]).records)
    assert done.index((1, 2)) < done.index((0, 1))
    assert len(done) == 9


@sized(2, 9)
def test_a_thousand_posts_wake_everyone(team):
    """After pauses around the moment at which workers go from looking to sleeping, where a wake-up could get lost.

    A sleeper that nobody wakes looks again after a second, so a lost wake-up is a step of about that long.
    """
    count = [0] * team.threads

    def work(_number, thread, _threads):
        count[thread] += 1

    job = Job(work)
    pauses = np.random.default_rng(1).uniform(0, 1e-3, 1000)
    slowest = 0.0
    for pause in pauses:
        end = time.perf_counter() + pause
        while time.perf_counter() < end:
            pass
        begin = time.perf_counter()
        team.run(job.records)
        slowest = max(slowest, time.perf_counter() - begin)
    assert count == [1000] * team.threads
    assert slowest < 0.8 * SLEEP_SECONDS


def cpu_seconds(thread):
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


@sized(2, 6)
def test_idle_threads_use_no_cpu(team):
    team.run(Job(lambda *_: None).records)
    assert asleep(team)
    before = [cpu_seconds(worker) for worker in team._workers]
    time.sleep(1)
    used = [cpu_seconds(worker) - start for worker, start in zip(team._workers, before, strict=True)]
    assert max(used) < 0.005


def test_the_clock_of_a_busy_thread_runs():
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            pass

    worker = threading.Thread(target=spin)
    worker.start()
    before = cpu_seconds(worker)
    time.sleep(0.2)
    used = cpu_seconds(worker) - before
    stop.set()
    worker.join()
    assert used > 0.02


@sized(7)
def test_closing_wakes_sleepers(team):
    assert asleep(team)
    begin = time.monotonic()
    team.close()
    assert time.monotonic() - begin < 0.8 * SLEEP_SECONDS
    assert not any(worker.is_alive() for worker in team._workers)
    team.close()


@sized(5)
def test_an_abort_ends_a_step_that_waits(team):
    """One thread does not come to the barrier: whoever waits there, asleep by now, leaves when the team is closed."""
    stuck, go = threading.Event(), threading.Event()

    def work(_number, thread, _threads):
        if thread == 3:
            stuck.set()
            go.wait(20)

    ended = []
    job = Job(work)
    caller = threading.Thread(target=lambda: ended.append(team.run(job.records)))
    caller.start()
    assert stuck.wait(10)
    time.sleep(0.1)
    assert not ended
    closer = threading.Thread(target=team.close)
    begin = time.monotonic()
    closer.start()
    caller.join(10)
    assert ended
    assert time.monotonic() - begin < 0.8 * SLEEP_SECONDS
    go.set()
    closer.join(10)
    assert not any(worker.is_alive() for worker in team._workers)


def test_teams_come_and_go():
    """Fifty teams leave no thread, here or in the kernel's list, and no change of affinity."""
    before, affinity = set(os.listdir("/proc/self/task")), os.sched_getaffinity(0)
    alive = threading.active_count()
    cpu = min(affinity)
    for number in range(50):
        team = Team([cpu] * 4, pinned=number % 2 == 0, crowded=True)
        if number % 3:
            team.run(Job(lambda *_: None).records)
        team.close()
    assert threading.active_count() == alive
    end = time.monotonic() + 2
    while (left := set(os.listdir("/proc/self/task")) - before) and time.monotonic() < end:
        time.sleep(0.01)  # a joined thread leaves the kernel's list a moment later
    assert not left
    assert os.sched_getaffinity(0) == affinity


def test_threads_are_pinned_one_to_a_cpu():
    affinity = sorted(os.sched_getaffinity(0))
    team = Team(affinity, pinned=True)
    where = {}
    job = Job(lambda _number, thread, _threads: where.__setitem__(thread, os.sched_getaffinity(0)))
    team.run(job.records)
    team.close()
    assert where == {thread: {cpu} for thread, cpu in enumerate(affinity)}
    assert os.sched_getaffinity(0) == set(affinity)
