"""The walk that notes times: the same work as the other, and where the time went."""

import ctypes
import time

import numpy as np
import pytest

from tests.shared import DATA
from tpcpu.bench.measure import hertz
from tpcpu.bench.requests import Requests
from tpcpu.bench.times import CLASSES, class_of, label_of, shares, table
from tpcpu.engine.engine import Engine, Options
from tpcpu.kernels import record as R
from tpcpu.parallel.communicator import Solo
from tpcpu.parallel.team import aligned

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def records(function, count):
    """Records that call `function(number, thread)`, with what has to live as long."""
    step = aligned(R.STEP_WORDS)
    made = np.zeros((count, R.RECORD_WORDS), np.int64)
    call = KERNEL(lambda record, thread, _: function((record - made.ctypes.data) // made.strides[0], thread))
    made[:, R.KERNELS : R.KERNELS + 3] = ctypes.cast(call, ctypes.c_void_p).value
    made[:, R.BARRIER], made[:, R.STEP] = 7, step.ctypes.data
    return made, (step, call)


def test_time_is_the_kernels_or_the_waits(teams):
    """Thread 0 sleeps in the second record: its own kernel's time, and the wait of the others after theirs."""
    for team in teams:
        cycles_per_second = hertz(team)
        made, kept = records(lambda number, thread: time.sleep(0.05 if (number, thread) == (1, 0) else 0), 3)
        with team.timed(3) as cycles:
            begin = time.perf_counter()
            team.run(made)
            wall = time.perf_counter() - begin
        assert kept
        seconds = cycles / cycles_per_second
        assert seconds.shape == (team.threads, 3, 2)
        assert (seconds >= 0).all()
        assert seconds[0].sum() <= 1.05 * wall
        assert 0.045 < seconds[0, 1, 0] < 1.05 * wall
        for other in range(1, team.threads):
            assert seconds[other, 1, 1] > 0.03
            assert seconds[other, 1, 0] < 0.03


def test_times_add_up_over_walks_and_stop_afterwards(teams):
    made, kept = records(lambda *_: time.sleep(0.002), 3)
    with teams[1].timed(3) as cycles:
        teams[1].run(made)
        once = cycles.copy()
        teams[1].run(made)
    twice = cycles.copy()
    teams[1].run(made)
    assert kept
    # A walk is over for its caller when all threads have met behind the last record, which the others note afterwards.
    assert (twice[:, :-1, 0] > once[:, :-1, 0]).all()
    assert (twice[0, :, 0] > once[0, :, 0]).all()
    assert np.array_equal(cycles[:, :-1], twice[:, :-1])


@pytest.fixture(scope="module", params=["yuan-tiny", "llama-tiny"])
def engine(request):
    made = Engine(DATA / request.param, Solo(), Options(format="nf4", threads=2))
    yield made
    made.close()


def test_a_timed_answer_is_the_same_answer(engine):
    prompt, new = [3, 14, 15, 92, 65], 6
    plain = Requests(engine, [prompt], new)
    plain.prefill()
    plain.decode()
    timed = Requests(engine, [prompt], new)
    timed.prefill()
    with engine.team.timed(len(engine.stages)) as cycles:
        rate = timed.decode()
    assert timed.ids == plain.ids
    assert len(timed.ids[0]) == 7
    noted = cycles / hertz(engine.team) / new
    step = 1 / rate
    times = shares(engine.stages, noted, step)
    assert tuple(times) == CLASSES
    assert all(value >= 0 for value in times.values())
    assert sum(times.values()) == pytest.approx(step, rel=0.05)
    assert times["all_reduce"] == 0
    assert times["linear"] > 0
    assert times["attention"] > 0
    assert (times["conv"] > 0) == (engine.model.model_type == "yuan")


def test_every_record_has_a_class_and_a_name(engine):
    """The head is linear, the products of short convolutions are conv, what rounds for either is other."""
    found = {(label_of(*each), class_of(*each)) for each in engine.stages}
    assert {kind for _, kind in found} <= set(CLASSES)
    linear = {label for label, kind in found if kind == "linear"}
    assert any("o_proj" in label for label in linear)
    assert any("gate_proj + up_proj" in label for label in linear)
    assert any("embed_tokens" in label or "lm_head" in label for label in linear)
    conv = {label for label, kind in found if kind == "conv"}
    wanted = {"self_attn.lf_gate.conv1", "self_attn.lf_gate.conv2"} if engine.model.model_type == "yuan" else set()
    assert conv == wanted
    rows = table(engine.stages, np.ones((2, len(engine.stages), 2)), {0: 5})
    assert sum(row.calls for row in rows) == len(engine.stages)
    assert sum(row.inside for row in rows) == pytest.approx(1e6 * len(engine.stages))
    assert rows[0].nbytes == 5
