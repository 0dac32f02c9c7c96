"""Joining the ranks' parts inside a step: what is sent, and the order in which it is added."""

import threading

import numpy as np
import pytest

from tests.kernels.binding import Bound, FakeModel, FakeRanks, same_bits
from tests.kernels.test_window import Ranks
from tpcpu.parallel.partition import Share


def program(size, width):
    """The sum over all ranks of an embedding's rows; rank 0 sees the first part of it through its head."""
    model = FakeModel(share=Share(0, size))
    x = model.inputs(model.normal(64, width) * np.float32(100))
    return model, model.result(model.all_reduce(x))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("width", [64, 100, 17])
def test_parts_are_added_in_rank_order(teams, size, width):
    """Sums of numbers of unlike sizes, which any other order of adding would show."""
    model, made = program(size, width)
    factors = np.float32([1, -1e6, 1e6, 3e-5, 7])
    ranks = FakeRanks(size, lambda number, values: values * factors[number])
    x = model.tensors["inputs0.weight"].stored
    wanted = x.copy()
    for number in range(1, size):
        wanted += x * factors[number]
    rows = len(range(*slice(width // size).indices(width)))
    for team in teams:
        bound = Bound(made, model.tensors, team, exact=True, all_reduce=ranks.ordered)
        for count in (1, 2, 7, 64):
            got = bound.run((range(count), 0, 0))
            assert same_bits(got, np.ascontiguousarray(wanted[:count, :rows]))
            # A message has the batch's tokens, padding of a row included, and no more.
            assert ranks.calls.pop() == count * (-(-width // 64) * 64 + 64)
    assert not ranks.calls


def test_plain_mpi_all_reduce(teams):
    model, made = program(3, 100)
    ranks = FakeRanks(3, lambda number, values: values * np.float32(number + 1))
    x = model.tensors["inputs0.weight"].stored
    for team in teams:
        bound = Bound(made, model.tensors, team, exact=True, all_reduce=ranks.mpi)
        got = bound.run((range(9), 0, 0))
        assert got == pytest.approx((6 * x)[:9, :33], rel=1e-6)
    assert len(ranks.calls) == len(teams)


@pytest.mark.parametrize("messages", [1, 2, 3])
@pytest.mark.parametrize("threads", [(1, 1), (2, 1, 3)], ids=["1+1", "2+1+3"])
def test_programs_joined_by_a_window(threads, messages):
    """Steps of one, few and many tokens in a row, whose programs have even and odd numbers of messages."""
    ranks, size, width = Ranks(*threads), len(threads), 100
    models = [FakeModel(seed=rank, share=Share(rank, size)) for rank in range(size)]
    parts, programs = [], []
    for model in models:
        parts.append(model.normal(64, width) * np.float32(100))
        x = model.inputs(parts[-1])
        for _ in range(messages):
            x = model.all_reduce(x)
        programs.append(model.result(x))
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    for _ in range(messages - 1):
        total = sum((total for _ in range(size - 1)), total.copy())
    bound = [
        Bound(program, model.tensors, team, exact=True, all_reduce=call)
        for program, model, team, call in zip(programs, models, ranks.teams, ranks.calls, strict=True)
    ]
    counts = [1, 1, 2, 64, 1, 7, 64, 64, 1] * 5
    failed = []

    def steps(rank):
        rows = models[rank].share.split(width)
        for count in counts:
            got = bound[rank].run((range(count), 0, 0))
            if not same_bits(got, np.ascontiguousarray(total[:count, rows.start : rows.stop])):
                failed.append((rank, count))

    workers = [threading.Thread(target=steps, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert failed == []
    ranks.close()
