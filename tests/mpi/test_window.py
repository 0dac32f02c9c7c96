"""The window and its mail between real processes, at any number of ranks, more than cores among them."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from tpcpu.parallel import exchanges
from tpcpu.parallel.communicator import Communicator, connect
from tpcpu.parallel.exchanges import Exchanges
from tpcpu.parallel.mailbox import ARRAY_BYTES
from tpcpu.parallel.team import Team
from tpcpu.parallel.window import NEVER

pytestmark = [pytest.mark.mpi, pytest.mark.flavours]


@pytest.fixture(params=["even", "uneven"])
def team(request: pytest.FixtureRequest, communicator: Communicator) -> Iterator[Team]:
    """Two threads a rank, or one more on rank 0: more than there are cores, sooner or later."""
    made = Team([0] * (2 + (request.param == "uneven" and communicator.is_root)), pinned=False, crowded=True)
    yield made
    made.close()


def test_one_host_shares_memory(communicator: Communicator) -> None:
    assert communicator.all_reduce_kind == "window"


@pytest.mark.parametrize("two_shot", [None, 0, NEVER], ids=["measured", "two shots", "one shot"])
@pytest.mark.parametrize("width", [80, 160, 2048, 8192, 300_000])
def test_sums_have_the_bits_of_rank_order(
    communicator: Communicator, team: Team, width: int, two_shot: int | None
) -> None:
    if communicator.size == 1:
        return
    exchange = Exchanges(communicator.all_reduce(team), team, width, 6, two_shot)
    random = np.random.default_rng(communicator.rank)
    for _ in range(5):
        exchange.x[:] = random.standard_normal(width) * 10.0 ** random.integers(-3, 4, width)
        parts = communicator.all_gather(exchange.x)
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        exchange.out[:] = 0
        exchange.run()
        np.testing.assert_array_equal(exchange.out.view(np.uint32), total.view(np.uint32))


def test_ranks_that_come_late_are_waited_for(communicator: Communicator, team: Team) -> None:
    """Thousands of messages, each rank with pauses of its own, the sum of every walk looked at."""
    if communicator.size == 1:
        return
    exchange = Exchanges(communicator.all_reduce(team), team, 4096, 20)
    random = np.random.default_rng(communicator.rank)
    begin = time.monotonic()
    for number in range(100):
        exchange.x[:] = number + communicator.rank
        time.sleep(random.exponential(3e-4))
        exchange.run()
        total = communicator.size * number + sum(range(communicator.size))
        assert (exchange.out == total).all()
    assert time.monotonic() - begin < 60


def test_the_switch_is_a_size_or_never(communicator: Communicator, team: Team) -> None:
    if communicator.size == 1:
        return
    call = communicator.all_reduce(team)
    assert call.two_shot in (*exchanges.SIZES, NEVER)
    assert len(set(communicator.all_gather_object(call.two_shot))) == 1


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
def test_messages_of_any_size_one_after_another(communicator: Communicator, size: int) -> None:
    """Rank 0 does not wait for answers: what the others have not read yet must stay."""
    for number in range(20):
        if communicator.is_root:
            communicator.send_message(np.full(size, number, np.int32))
        else:
            if number % 7 == communicator.rank:
                time.sleep(0.003)
            message = np.zeros(size, np.int32)
            communicator.wait_message(message)
            assert (message == number).all()


@pytest.mark.parametrize("most", [1, ARRAY_BYTES, ARRAY_BYTES + 1])
def test_arrays_gathered_one_after_another(communicator: Communicator, most: int) -> None:
    """Small ones go through the window, large ones by MPI, and either may follow the other."""
    counts = [most if rank == communicator.size - 1 else rank for rank in range(communicator.size)]
    for number in range(10):
        if communicator.is_root and number % 3 == 0:
            time.sleep(0.002)
        parts = communicator.gather(np.full(counts[communicator.rank], communicator.rank + number, np.uint8), counts)
        if parts is not None:
            assert [len(part) for part in parts] == counts
            assert all((part == rank + number).all() for rank, part in enumerate(parts))


def test_without_shared_memory_sums_go_by_messages(
    communicator: Communicator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on rank 0 says why; everything else works as before."""
    if communicator.size == 1:
        return
    from tpcpu.parallel import mpi

    def none(*_: object) -> None:
        raise mpi.MPI.Exception(mpi.MPI.ERR_NO_MEM)

    monkeypatch.setattr(mpi, "_allocate_shared", none)
    other = connect()
    assert other.all_reduce_kind == "ordered"
    told = capsys.readouterr().err
    assert told.count("\n") == communicator.is_root
    assert ("share no memory" in told) == communicator.is_root
    message = np.zeros(5, np.int32)
    if other.is_root:
        other.send_message(message + 3)
    else:
        other.wait_message(message)
        assert message.tolist() == [3] * 5
    monkeypatch.undo()
    monkeypatch.setattr(mpi, "part_bytes", lambda _: 1 << 50)
    assert connect().all_reduce_kind == "ordered"
    assert ("MB free" in capsys.readouterr().err) == communicator.is_root
