"""The loops that set ceilings: they read every byte that they are said to read, and count what they compute."""

import time

import numpy as np
import pytest

from tpcpu.bench import ceilings
from tpcpu.bench.ceilings import LOOPS, Peaks, Reading
from tpcpu.kernels import bandwidth, peak
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.communicator import Solo
from tpcpu.parallel.numa import arena


def sums_of(team, loop, memory, nbytes, passes=1):
    sums = np.zeros((team.threads, 8), np.int64)
    team.run(ceilings.read_record(loop, memory.address, nbytes, passes, sums))
    return int(sums[:, 0].sum()) & 0xFFFFFFFF


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
@pytest.mark.parametrize("units", [1, 2, 7, 64, 1031])
def test_a_loop_reads_every_unit_once_a_pass(teams, loop, units):
    """Counts that streams and threads do not divide; what lies behind the last unit is left alone."""
    nbytes = units * bandwidth.UNIT
    memory = arena(nbytes + bandwidth.UNIT)
    words = np.asarray(memory).view(np.uint32)
    words[:] = np.random.default_rng(units).integers(0, 1 << 32, len(words), np.uint32)
    wanted = int(words[: nbytes // 4].sum(dtype=np.uint64))
    for team in teams:
        assert sums_of(team, loop, memory, nbytes) == wanted & 0xFFFFFFFF
        assert sums_of(team, loop, memory, nbytes, passes=3) == 3 * wanted & 0xFFFFFFFF
        assert sums_of(team, loop, memory, nbytes + bandwidth.UNIT - 1) == wanted & 0xFFFFFFFF


def test_there_are_plain_and_prefetching_loops_of_one_and_two_streams():
    assert {(loop.kernel, loop.distance > 0) for loop in LOOPS} >= {
        (bandwidth.read(streams, hint), hint != bandwidth.PLAIN)
        for streams in (1, 2)
        for hint in (bandwidth.PLAIN, bandwidth.FIRST, bandwidth.SECOND)
    }


def test_the_best_is_the_best_of_all_loops_and_sweeps(teams):
    memory = arena(1 << 20)
    np.asarray(memory)[:] = 1
    reading = Reading(memory, teams[1], Solo())
    for _ in range(2):
        reading.sweep()
    values = [value for of_loop in reading.gbs.values() for value in of_loop]
    assert len(values) == 2 * len(LOOPS)
    assert reading.best == max(values)
    assert reading.best == max(reading.best_of(0, 1), reading.best_of(1, 2))
    assert reading.steadiness == min(reading.best_of(0, 1), reading.best_of(1, 2)) / reading.best


def test_a_rank_without_weights_reads_nothing(teams):
    reading = Reading(arena(0), teams[0], Solo())
    reading.sweep()
    assert reading.best == 0


@pytest.mark.parametrize("kernel", [peak.dot4_rounds, peak.fma_rounds], ids=lambda kernel: kernel.name)
def test_rounds_are_not_optimised_away(teams, kernel):
    """Eight times the rounds take several times as long, and every thread leaves a result."""
    prepare([kernel])
    seconds = []
    sink = np.zeros((1, 8), np.int64)
    for rounds in (1 << 17, 1 << 20):
        best = 1.0
        for _ in range(5):
            begin = time.perf_counter()
            teams[0].run(ceilings.rounds_record(kernel, rounds, sink))
            best = min(best, time.perf_counter() - begin)
        seconds.append(best)
    assert sink[0, 0] != 0
    assert seconds[1] > 3 * seconds[0]


def test_int8_reaches_at_least_what_float32_does(teams):
    """Sixteen times the products in a register, or as many where there is no such instruction: never fewer."""
    peaks = Peaks(teams[0], Solo())
    peaks.look()
    assert peaks.int8_gops > 0.5 * peaks.fma_gflops > 0
