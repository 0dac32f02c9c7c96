"""Joining the ranks' parts inside a step: what is sent, and the order in which it is added."""

import numpy as np
import pytest

from tests.kernels.binding import Bound, FakeModel, FakeRanks, same_bits
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
