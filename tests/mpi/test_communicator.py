"""The communicator at any number of ranks, one included: the same bodies run over MPI and over the lone rank."""

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tpcpu.errors import CheckpointError, ConfigError, RankError, TpcpuError
from tpcpu.parallel.communicator import AllReduce, AllReduceKind, Communicator, connect
from tpcpu.parallel.segments import mapped_segments
from tpcpu.parallel.team import Team

pytestmark = [pytest.mark.mpi, pytest.mark.flavours]

DTYPES = [np.float32, np.int32, np.uint8, np.int64, ml_dtypes.bfloat16]


def pattern(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray[Any, Any]:
    """Values that tell ranks apart and fit every dtype."""
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 50 + seed).astype(dtype)


def test_ranks_and_hosts(communicator: Communicator) -> None:
    ranks = communicator.all_gather_object(communicator.rank)
    assert ranks == list(range(communicator.size))
    assert communicator.is_root == (communicator.rank == 0)
    assert communicator.host_ranks == tuple(ranks)
    assert (communicator.host_rank, communicator.host_size) == (communicator.rank, communicator.size)
    assert communicator.hosts == (os.uname().nodename,)
    assert communicator.host == communicator.hosts[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (100_003,)])
def test_broadcast(communicator: Communicator, shape: tuple[int, ...], dtype: Any) -> None:
    array = pattern(shape, dtype, seed=communicator.rank)
    communicator.broadcast(array)
    np.testing.assert_array_equal(array, pattern(shape, dtype, seed=0))


def test_an_error_of_mpi_in_a_wait_is_another_ranks_end(communicator: Communicator, monkeypatch: Any) -> None:
    """MPICH has named a killed rank's peer as the one that failed; whose witness had been about to tell."""
    if communicator.size == 1:
        return
    from mpi4py import MPI

    class Broken:
        def Test(self) -> bool:  # noqa: N802  as mpi4py calls it
            raise MPI.Exception(MPI.ERR_OTHER)

    monkeypatch.setattr(communicator, "_fault_timeout", 0.0)
    monkeypatch.setattr("tpcpu.parallel.mpi._TELLING_SECONDS", 0.2)
    since = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {communicator.rank} on \S+ can no longer reach another rank: \S"):
        communicator._wait(Broken())  # type: ignore[attr-defined]
    assert time.monotonic() - since >= 0.2
    communicator.barrier()


def test_only_contiguous_arrays_are_sent(communicator: Communicator) -> None:
    if communicator.size > 1:
        with pytest.raises(ValueError, match="contiguous"):
            communicator.broadcast(np.zeros((4, 4))[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 0)])
def test_gather_uneven_and_empty_parts(communicator: Communicator, trailing: tuple[int, ...], dtype: Any) -> None:
    counts = [(rank * 7) % 4 for rank in range(communicator.size)]
    local = pattern((counts[communicator.rank], *trailing), dtype, seed=communicator.rank)
    gathered = communicator.gather(local, counts)
    if not communicator.is_root:
        assert gathered is None
        return
    assert gathered is not None
    assert len(gathered) == communicator.size
    for rank, part in enumerate(gathered):
        expected = pattern((counts[rank], *trailing), dtype, seed=rank)
        assert part.dtype == expected.dtype
        np.testing.assert_array_equal(part, expected)


def test_gather_refuses_counts_that_do_not_fit(communicator: Communicator) -> None:
    with pytest.raises(ValueError, match="counts"):
        communicator.gather(np.zeros(3), [2] * communicator.size)


@pytest.mark.parametrize("shape", [(0,), (2, 3), (8192,)])
def test_all_gather(communicator: Communicator, shape: tuple[int, ...]) -> None:
    stacked = communicator.all_gather(pattern(shape, np.float32, seed=communicator.rank))
    assert stacked.shape == (communicator.size, *shape)
    for rank in range(communicator.size):
        np.testing.assert_array_equal(stacked[rank], pattern(shape, np.float32, seed=rank))


def test_exchange_in_order_and_in_pieces(communicator: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of ranks in both directions: a small array, one longer than a message may be, and one of nothing."""
    if communicator.size > 1:
        from tpcpu.parallel import mpi

        monkeypatch.setattr(mpi, "MESSAGE_BYTES", 1000)
    own, others = communicator.rank, [rank for rank in range(communicator.size) if rank != communicator.rank]

    def arrays(sender: int, receiver: int) -> list[np.ndarray[Any, Any]]:
        few = pattern((3,), np.int64, seed=10 * sender + receiver)
        return [few, pattern((5, 401), np.uint8, seed=sender), np.zeros((0, 4), np.float32)]

    out = {rank: [np.zeros_like(array) for array in arrays(rank, own)] for rank in others}
    communicator.exchange(
        [(rank, array) for rank in others for array in arrays(own, rank)],
        [(rank, array) for rank in others for array in out[rank]],
    )
    for rank in others:
        for found, expected in zip(out[rank], arrays(rank, own), strict=True):
            np.testing.assert_array_equal(found, expected)
    communicator.exchange([], [])


def test_objects(communicator: Communicator) -> None:
    assert communicator.broadcast_object({"stop": [1, 2]} if communicator.is_root else None) == {"stop": [1, 2]}
    own = "é" * (1000 * communicator.rank)
    assert communicator.all_gather_object(own) == ["é" * (1000 * rank) for rank in range(communicator.size)]


class TestRaiseTogether:
    """Every rank raises the same, and the message tells whose problem it was."""

    def test_nothing_is_wrong(self, communicator: Communicator) -> None:
        communicator.raise_together(None)

    def test_one_rank_has_a_problem(self, communicator: Communicator) -> None:
        last = communicator.size - 1
        error = CheckpointError("model.safetensors is truncated") if communicator.rank == last else None
        with pytest.raises(CheckpointError) as raised:
            communicator.raise_together(error)
        where = f"rank {last} on {communicator.hosts[0]}: " if last else ""
        assert str(raised.value) == f"{where}model.safetensors is truncated"

    def test_all_ranks_have_the_same(self, communicator: Communicator) -> None:
        with pytest.raises(ConfigError) as raised:
            communicator.raise_together(ConfigError("hidden_size is missing"))
        assert str(raised.value) == "hidden_size is missing"

    def test_different_problems_are_all_told(self, communicator: Communicator) -> None:
        with pytest.raises(TpcpuError) as raised:
            communicator.raise_together(ConfigError(f"problem {communicator.rank % 2}"))
        message = str(raised.value)
        assert all(f"problem {rank % 2}" in message for rank in range(communicator.size))
        if communicator.size == 4:
            assert message == "ranks 0, 2: problem 0; ranks 1, 3: problem 1"

    def test_other_exceptions_become_rank_errors(self, communicator: Communicator) -> None:
        with pytest.raises(RankError, match="ZeroDivisionError: division by zero"):
            communicator.raise_together(ZeroDivisionError("division by zero") if communicator.is_root else None)


def test_message_after_idling_costs_next_to_no_cpu(communicator: Communicator) -> None:
    message = np.zeros(2000, np.int32)
    seconds = 1.0
    started = time.process_time()
    if communicator.is_root:
        time.sleep(seconds)
        communicator.send_message(message + 7)
        return
    communicator.wait_message(message)
    assert int(message.sum()) == 14_000
    assert time.process_time() - started < 0.02 * seconds


def test_messages_follow_each_other(communicator: Communicator) -> None:
    message = np.zeros(4, np.int64)
    for number in range(50):
        if communicator.is_root:
            communicator.send_message(np.full(4, number))
        else:
            communicator.wait_message(message)
            assert message.tolist() == [number] * 4


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team([0], pinned=False, crowded=True)
    yield made
    made.close()


def address_call(all_reduce: AllReduce, arguments: list[int]) -> int:
    """Call as compiled code does: by address, every argument a 64-bit integer."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * len(arguments))
    return int(prototype(all_reduce.function)(*arguments))


@pytest.mark.parametrize("count", [1, 8192, 65536])
def test_ordered_parts_by_address(communicator: Communicator, team: Team, count: int) -> None:
    ordered = connect("ordered").all_reduce(team)
    assert ordered.kind == "ordered"
    local = pattern((count,), np.float32, seed=communicator.rank)
    if communicator.size == 1:
        assert (ordered.function, ordered.handles) == (0, ())
        return
    parts = np.zeros((communicator.size, count), np.float32)
    datatype, comm = ordered.handles
    arguments = [local.ctypes.data, count, datatype, parts.ctypes.data, count, datatype, comm]
    assert address_call(ordered, arguments) == 0
    for rank in range(communicator.size):
        np.testing.assert_array_equal(parts[rank], pattern((count,), np.float32, seed=rank))


def test_sum_by_address(communicator: Communicator, team: Team) -> None:
    plain = connect("mpi").all_reduce(team)
    assert plain.kind == "mpi"
    if communicator.size == 1:
        assert plain.function == 0
        return
    local, total = pattern((8192,), np.float32, seed=communicator.rank), np.zeros(8192, np.float32)
    datatype, operation, comm = plain.handles
    assert address_call(plain, [local.ctypes.data, total.ctypes.data, 8192, datatype, operation, comm]) == 0
    parts = [pattern((8192,), np.float32, seed=rank) for rank in range(communicator.size)]
    np.testing.assert_array_equal(total, np.sum(parts, axis=0))


@pytest.mark.parametrize("kind", ["window", "ordered", "mpi"])
def test_numbers_fit_a_record(communicator: Communicator, team: Team, kind: AllReduceKind) -> None:
    del communicator
    call = connect(kind).all_reduce(team)
    np.array([*call.handles, call.function, call.table, call.own, call.half_bytes, call.two_shot], np.int64)


def test_no_segment_keeps_its_name(communicator: Communicator) -> None:
    if communicator.size == 1:
        return  # what is mapped then is not ours: the lone rank has not started MPI
    communicator.barrier()
    assert not [path for path in mapped_segments() if "mpich" in path or "sm_segment" in path or "ucx" in path]
    # and yet what they carry still arrives
    large = pattern((3_000_000,), np.float32, seed=communicator.rank)
    communicator.broadcast(large)
    np.testing.assert_array_equal(large, pattern((3_000_000,), np.float32, seed=0))
