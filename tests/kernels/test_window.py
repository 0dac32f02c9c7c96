"""Sums through the window, bit by bit: ranks here are teams of this process, each with its own view of one memory."""

import ctypes
import threading
import time

import numpy as np
import pytest

from tests.kernels.binding import same_bits
from tpcpu.kernels import exchange
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.team import Team, aligned
from tpcpu.parallel.window import NEVER, Window, part_bytes
from tpcpu.program.memory import stride_bytes

KERNELS = [exchange.exchange_one, exchange.exchange_many, exchange.meet]


class Ranks:
    """As many ranks as `threads` has entries, each with a team of so many threads."""

    def __init__(self, *threads):
        prepare(KERNELS)
        size = len(threads)
        self._memory = [aligned(part_bytes(size) // 8) for _ in threads]
        parts = [memory.ctypes.data for memory in self._memory]
        self.windows = [Window(rank, parts) for rank in range(size)]
        self.calls = [window.all_reduce(threads) for window in self.windows]
        self.teams = [Team(range(count), pinned=False, crowded=True) for count in threads]
        self.size = size

    def run(self, programs, delays=None):
        """Every rank walks its records; fails if that takes long."""

        def walk(rank):
            for record in programs[rank]:
                if delays is not None:
                    time.sleep(delays[rank].exponential(2e-4))
                self.teams[rank].run(record)

        threads = [threading.Thread(target=walk, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def close(self):
        for team in self.teams:
            team.close()


class Program:
    """Messages of one rank, of `tokens` tokens of `width` features each, and what they are added to."""

    def __init__(self, ranks, rank, width, tokens, messages, *, fused, two_shot=NEVER, direct=False):
        stride = stride_bytes(width)
        self._step = aligned(R.STEP_WORDS)
        self._step[R.TEAM], self._step[R.TOKENS] = ranks.teams[rank].address, tokens
        self._step[R.CLASS] = 0 if tokens == 1 else 2
        random = np.random.default_rng(100 * rank + width)
        shape = (messages, tokens, stride // 4)
        self.memory = {
            name: aligned(int(np.prod(shape)) // 2 + 8).view(np.float32)[: np.prod(shape)].reshape(shape)
            for name in ("x", "residual", "out")
        }
        self.x, self.residual, self.out = (self.memory[name][..., :width] for name in ("x", "residual", "out"))
        # Numbers of unlike sizes, which any other order of adding would show.
        self.x[:] = random.standard_normal(self.x.shape) * 10.0 ** random.integers(-3, 4, self.x.shape)
        same = np.random.default_rng(width)
        self.residual[:] = same.standard_normal(self.residual.shape)
        self.bias = aligned(width // 2 + 64).view(np.float32)
        self.bias[:width] = same.standard_normal(width)
        call = ranks.calls[rank]
        rows = messages + messages % 2
        self.records = np.zeros((rows, R.RECORD_WORDS), np.int64)
        for number, record in enumerate(self.records):
            kernel = exchange.exchange_one if tokens == 1 else exchange.exchange_many
            if number == messages:
                kernel = exchange.meet
            else:
                record[[R.IN, R.IN_STRIDE]] = self.memory["x"][number].ctypes.data, stride
                record[[R.OUT, R.OUT_STRIDE]] = self.memory["out"][number].ctypes.data, stride
                if fused:
                    record[[R.SECOND, R.SECOND_STRIDE]] = self.memory["residual"][number].ctypes.data, stride
                    record[R.BIAS] = self.bias.ctypes.data
            record[R.KERNELS : R.KERNELS + 3] = kernel.address
            record[R.BARRIER], record[R.STEP] = 7, self._step.ctypes.data
            half, place = call.place(number, stride)
            record[[R.WIDTH, R.HALF, R.PLACE, R.WINDOW, R.TWO_SHOT]] = width, half, place, call.table, two_shot
            record[R.DIRECT] = direct


def wanted(programs, fused):
    """The parts in rank order, in float32, and then the residual and the bias as `activations.add` adds them."""
    total = programs[0].x.copy()
    for program in programs[1:]:
        total = total + program.x
    if fused:
        total = (programs[0].residual + total) + programs[0].bias[: total.shape[-1]]
    return total


@pytest.fixture
def ranks(request):
    made = Ranks(*request.param)
    yield made
    made.close()


def sized(*teams):
    return pytest.mark.parametrize("ranks", teams, indirect=True, ids=["+".join(map(str, each)) for each in teams])


EVEN, UNEVEN = ((1, 1), (2, 2), (1, 1, 1), (2, 2, 2, 2)), ((1, 3), (2, 1, 4))


@sized(*EVEN, *UNEVEN)
@pytest.mark.parametrize("fused", [False, True], ids=["sum", "residual"])
@pytest.mark.parametrize(
    ("width", "tokens"),
    [(80, 1), (160, 1), (17, 1), (2048, 1), (8192, 1), (80, 2), (17, 7), (160, 64), (2048, 7), (2048, 64), (8192, 300)],
)
def test_sums_have_the_bits_of_rank_order(ranks, fused, width, tokens):
    messages = 3 if tokens * width < 100_000 else 1
    programs = [Program(ranks, rank, width, tokens, messages, fused=fused) for rank in range(ranks.size)]
    ranks.run([[program.records] for program in programs])
    for program in programs:
        assert same_bits(np.ascontiguousarray(program.out), np.ascontiguousarray(wanted(programs, fused)))
        # What lies behind the last feature stays zero: norms read whole registers.
        assert not program.memory["out"][..., width:].any()


@sized(*EVEN)
@pytest.mark.parametrize(("width", "tokens"), [(80, 2), (17, 7), (2048, 64), (8192, 300)])
def test_two_shots_have_the_bits_of_one(ranks, width, tokens):
    for fused in (False, True):
        programs = [Program(ranks, rank, width, tokens, 2, fused=fused, two_shot=0) for rank in range(ranks.size)]
        ranks.run([[program.records] for program in programs])
        for program in programs:
            assert same_bits(np.ascontiguousarray(program.out), np.ascontiguousarray(wanted(programs, fused)))


@sized((1, 1), (2, 2, 2), (1, 3), (3, 2, 1))
def test_thousands_of_rounds_with_delays(ranks):
    """Ranks that wait, sleep and run ahead of each other, in messages of all kinds: no half is overwritten early."""
    shapes = [(80, 1), (4096, 1), (80, 9), (2048, 70)]
    programs = [
        [Program(ranks, rank, *shape, messages, fused=False, two_shot=two_shot)
         for shape in shapes for messages in (1, 2, 3) for two_shot in (NEVER, 0)]
        for rank in range(ranks.size)
    ]  # fmt: skip
    sums = [wanted(each, False) for each in zip(*programs, strict=True)]
    delays = [np.random.default_rng(rank) for rank in range(ranks.size)]
    order = np.random.default_rng(5)
    for _ in range(40):
        chosen = order.integers(0, len(sums), 12)
        for each in programs:
            for number in chosen:
                each[number].out[:] = 0
        ranks.run([[each[number].records for number in chosen] for each in programs], delays)
        for each in programs:
            for number in chosen:
                assert same_bits(np.ascontiguousarray(each[number].out), np.ascontiguousarray(sums[number]))


def owner(panel, panels, spans, threads):
    """The thread of a product that joins a panel: the one that has its first span (`kernels/linear.py`)."""
    return ((panel * spans + 1) * threads - 1) // (panels * spans)


@sized((1, 1), (2, 2), (3, 1, 4))
@pytest.mark.parametrize("width", [17, 80, 2048])
def test_parts_that_products_write_straight_to_the_window(ranks, width):
    """Products here are Python functions that write the panels of a thread, late; no barrier follows them."""
    panels, rounds = -(-width // exchange.ROWS), 30
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    programs = [Program(ranks, rank, width, 1, 2, fused=True, direct=True) for rank in range(ranks.size)]
    sums, keep, steps = wanted(programs, True), [], []
    for rank, program in enumerate(programs):
        random = np.random.default_rng(rank)
        halves = np.ctypeslib.as_array(
            ctypes.cast(ranks.calls[rank].own, ctypes.POINTER(ctypes.c_float)), (ranks.calls[rank].half_bytes // 2,)
        )

        def produce(record, thread, threads, rank=rank, program=program, random=random, halves=halves):
            number = int(np.ctypeslib.as_array(ctypes.cast(record, ctypes.POINTER(ctypes.c_int64)), (32,))[R.PLACE])
            message, begin = number & 1, number >> 1
            spans = 1 + 4 * rank
            if random.random() < 0.3:
                time.sleep(2e-4)
            for panel in range(panels):
                if owner(panel, panels, spans, threads) == thread:
                    here = slice(panel * exchange.ROWS, min((panel + 1) * exchange.ROWS, width))
                    halves[begin // 4 + here.start : begin // 4 + here.stop] = program.x[message, 0, here]

        keep.append(kernel(produce))
        records = np.repeat(program.records, 2, axis=0)
        for message, record in enumerate(records[::2]):
            half, place = ranks.calls[rank].place(message, stride_bytes(width))
            record[R.KERNELS : R.KERNELS + 3] = ctypes.cast(keep[-1], ctypes.c_void_p).value
            record[R.BARRIER] = 0
            record[R.PLACE] = 2 * (half * ranks.calls[rank].half_bytes + place) + message
        # What is private must not be looked at.
        records[1::2, R.IN] = np.zeros(0).ctypes.data
        steps.append(records)
    for _ in range(rounds):
        for program in programs:
            program.out[:] = 0
        ranks.run([[records] for records in steps])
        for program in programs:
            assert same_bits(np.ascontiguousarray(program.out), np.ascontiguousarray(sums))


def test_whoever_may_own_a_panel_is_waited_for():
    """The rule of `exchange_one`, which does not know the spans of another rank's panels; one thread more at most."""
    for panels in (1, 5, 16, 128, 512):
        for threads in (1, 2, 3, 7, 56, 600):
            for panel in range(panels):
                earliest = panel * threads // panels
                latest = min((panel * threads + threads - 1) // panels, threads - 1)
                owners = {owner(panel, panels, spans, threads) for spans in (1, 2, 3, 8, 22)}
                assert earliest <= min(owners) <= max(owners) <= latest


def test_an_empty_share_still_counts(teams):
    """Three ranks through a whole bound program, one of them with parts of zero: nobody waits for ever."""
    del teams
    ranks = Ranks(1, 2, 1)
    programs = [Program(ranks, rank, 160, 1, 1, fused=False) for rank in range(3)]
    programs[1].x[:] = 0
    for _ in range(50):
        ranks.run([[program.records] for program in programs])
    for program in programs:
        assert same_bits(np.ascontiguousarray(program.out), np.ascontiguousarray(wanted(programs, False)))
    ranks.close()


def test_waiting_for_an_idle_rank_uses_no_processor_and_ends_on_abort():
    ranks = Ranks(1, 1)
    program = Program(ranks, 0, 160, 1, 2, fused=False)
    used = []

    def walk():
        begin = time.thread_time()
        ranks.teams[0].run(program.records)
        used.append(time.thread_time() - begin)

    waiting = threading.Thread(target=walk)
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive()
    ranks.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert used[0] < 0.02
