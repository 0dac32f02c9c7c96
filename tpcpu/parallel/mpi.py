"""Several ranks over MPI.

Knows MPI and the launcher's announcement; must not know what the messages mean. Importing it loads the MPI library and
starts nothing; `Mpi` starts MPI. All waiting from Python is in non-blocking calls and `Patience`, because MPI's own
blocking calls keep a core busy.
"""

import math
import os
import pickle
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tpcpu.errors import LaunchError, RankError
from tpcpu.parallel.announcement import Announcement
from tpcpu.parallel.communicator import AllReduce, AllReduceKind, Communicator, T, Wire, check_counts
from tpcpu.parallel.departure import Departure, begin
from tpcpu.parallel.doorbell import Doorbell
from tpcpu.parallel.exchanges import two_shot_bytes
from tpcpu.parallel.guardian import Guardian, Post, Watched, guard, guardian
from tpcpu.parallel.lifeline import die_with_parent, parent_name
from tpcpu.parallel.mailbox import ARRAY_BYTES, Mailbox
from tpcpu.parallel.mpi_library import MPI, MpiFunction, mpi_call, refuse_other_launcher, strangers
from tpcpu.parallel.patience import Patience
from tpcpu.parallel.segments import MPI_NAMES, mapped_segments, unlink_segments
from tpcpu.parallel.team import Team
from tpcpu.parallel.topology import Topology
from tpcpu.parallel.window import Window, part_bytes

_EXCHANGED = 1
"""The tag of messages between two ranks,"""
MESSAGE_BYTES = 1 << 30
"""and their length at most: MPI counts them in an int."""

_TELLING_SECONDS = 2.0
"""What a witness may take beyond the time in which it notices a fault."""


class Mpi(Communicator):
    """The ranks of MPI_COMM_WORLD, on a duplicate of it."""

    def __init__(self, announcement: Announcement, all_reduce: AllReduceKind, fault_timeout: float) -> None:
        """Start MPI where nobody has, and meet the other ranks. Collective; LaunchError if they are not there."""
        refuse_other_launcher(announcement)
        foreign = _foreign_segments()
        if parent_name() != "slurmstepd":  # which sees to its tasks itself
            die_with_parent()
        if not MPI.Is_initialized():
            # Of Open MPI's ways to make windows one complains where its network is missing; ours are of one host.
            os.environ.setdefault("OMPI_MCA_osc", "^ucx")
            MPI.Init_thread(MPI.THREAD_SERIALIZED)
        if MPI.COMM_WORLD.size == 1 and (announcement.size or 1) > 1:
            raise LaunchError(strangers(announcement))
        self._mpi = MPI.COMM_WORLD.Dup()
        self.rank = self._mpi.rank
        self.size = self._mpi.size
        self.all_reduce_kind = all_reduce
        self._patience = Patience()
        self._departure: Departure | None = None
        self._messages = 0
        self._fault_timeout = fault_timeout
        self._meet(fault_timeout, foreign)
        window = self._share_memory() if all_reduce == "window" else None
        if all_reduce == "window":
            self.all_reduce_kind = "ordered" if window is None else "window" if len(self.hosts) == 1 else "hosts"
        unlink_segments(mapped_segments() - foreign)
        crowded = self.host_size > len(Topology.detect().cores)
        self._patience = Patience(crowded)
        self._window = window
        self._mailbox = Mailbox(window, crowded, self._look) if window else None
        if window is None:
            self._hang_bells()
        self._departure = begin(MPI.COMM_WORLD.Dup, lambda rank: self._name([rank]), self.abort)
        self._departure.called = self._called
        if (guarded := guardian()) is not None:
            self._departure.goodbye = guarded.goodbye
            self._departure.where = guarded.pulse.where
            self.pulse = guarded.pulse

    def all_reduce(self, team: Team, wire: Wire = "float32") -> AllReduce:
        """The window, with the number of threads of every rank, or MPI's function with its handles, or both."""
        if self._window is None:
            name: MpiFunction = "MPI_Allreduce" if self.all_reduce_kind == "mpi" else "MPI_Allgather"
            return AllReduce(self.all_reduce_kind, *mpi_call(self._mpi, name))
        every: list[int] = self.all_gather(np.array([team.threads]))[:, 0].tolist()
        threads = [every[rank] for rank in self.host_ranks]
        call = self._window.all_reduce(threads)
        if self.host_size > 2 and len(set(threads)) == 1:
            found = np.array([two_shot_bytes(call, team, lambda: self._wait(self._host.Ibarrier()))])
            self._wait(self._host.Ibcast(_bytes(found), root=0))
            call = self._window.all_reduce(threads, int(found[0]))
        if len(self.hosts) == 1:
            return call
        function, handles = mpi_call(self._alike, "MPI_Allgather", wire)
        return replace(
            call, kind="hosts", function=function, handles=handles, hosts=len(self.hosts), slices=self._slices,
            slice=self.host_rank, wire=wire,
        )  # fmt: skip

    def broadcast(self, array: NDArray[Any]) -> None:
        """Overwrite `array` on every rank with rank 0's."""
        self._wait(self._mpi.Ibcast(_bytes(array), root=0))

    def gather(self, local: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]] | None:
        """The ranks' arrays on rank 0, as one buffer cut into views."""
        check_counts(local, counts, self.rank, self.size)
        row = local.dtype.itemsize * math.prod(local.shape[1:])
        lengths = [count * row for count in counts]
        if self._mailbox is not None and len(self.hosts) == 1 and max(lengths) <= ARRAY_BYTES:
            received = np.empty((sum(counts), *local.shape[1:]), local.dtype) if self.is_root else None
            self._mailbox.gather(_bytes(local), lengths, None if received is None else _bytes(received))
            return None if received is None else _split(received, counts)
        if not self.is_root:
            self._wait(self._mpi.Igatherv(_bytes(local), None, root=0))
            return None
        received = np.empty((sum(counts), *local.shape[1:]), local.dtype)
        self._wait(self._mpi.Igatherv(_bytes(local), [_bytes(received), lengths], root=0))
        return _split(received, counts)

    def all_gather(self, array: NDArray[Any]) -> NDArray[Any]:
        """The arrays of all ranks on a new first axis."""
        received = np.empty((self.size, *array.shape), array.dtype)
        self._wait(self._mpi.Iallgather(_bytes(array), _bytes(received)))
        return received

    def exchange(self, sends: Sequence[tuple[int, NDArray[Any]]], receives: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """Messages between pairs of ranks, which MPI does not let overtake one another; the large ones in pieces."""
        requests = [self._mpi.Irecv(piece, rank, _EXCHANGED) for rank, out in receives for piece in _messages(out)]
        requests += [self._mpi.Isend(piece, rank, _EXCHANGED) for rank, array in sends for piece in _messages(array)]
        self._wait_for(lambda: bool(MPI.Request.Testall(requests)))

    def barrier(self) -> None:
        """Return once every rank has come here."""
        self._wait(self._mpi.Ibarrier())

    def send_message(self, array: NDArray[Any]) -> None:
        """Rank 0's side of the broadcast that the others sleep in."""
        assert self.is_root
        assert self._departure is not None
        self._departure.look_before_sending()
        if self._mailbox is not None:
            request = self._leaders.Ibcast(_bytes(array), root=0) if len(self.hosts) > 1 else None
            self._mailbox.send(_bytes(array))
            if request is not None:
                self._wait(request)
            return
        request = self._mpi.Ibcast(_bytes(array), root=0)
        self._messages += 1
        self._bell.ring(self._sleepers, self._messages)
        self._wait(request)

    def wait_message(self, array: NDArray[Any]) -> None:
        """The others' side."""
        assert not self.is_root
        if self._mailbox is not None:
            if self.host_rank > 0:
                self._mailbox.take(_bytes(array))
                return
            # The first of another host passes it on.
            self._wait(self._leaders.Ibcast(_bytes(array), root=0))
            self._mailbox.send(_bytes(array))
            return
        self._wait(self._mpi.Ibcast(_bytes(array), root=0), self._bell if self._is_rung else None)
        self._messages += 1

    def broadcast_object(self, value: T | None) -> T:
        """Rank 0's `value`, pickled: its length first, then its bytes."""
        payload = np.frombuffer(pickle.dumps(value), np.uint8) if self.is_root else np.empty(0, np.uint8)
        length = np.array([payload.size])
        self.broadcast(length)
        if not self.is_root:
            payload = np.empty(int(length[0]), np.uint8)
        # rank 0's bytes are read only, which a broadcast does not ask: it writes nothing there
        self._wait(self._mpi.Ibcast(payload.copy() if self.is_root else payload, root=0))
        result: T = value if self.is_root and value is not None else pickle.loads(payload.tobytes())
        return result

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's `value`, pickled: all lengths first, then the bytes."""
        payload = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = self.all_gather(np.array([payload.size]))[:, 0]
        received = np.empty(int(lengths.sum()), np.uint8)
        self._wait(self._mpi.Iallgatherv(payload, [received, lengths.tolist()]))
        pieces = np.split(received, np.cumsum(lengths)[:-1])
        return [pickle.loads(piece.tobytes()) for piece in pieces]

    def abort(self, code: int) -> NoReturn:
        """MPI_Abort, after what was printed has been flushed."""
        if (guarded := guardian()) is not None:
            guarded.told()
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.Abort(code)
        raise AssertionError("MPI_Abort returned")

    def _wait(self, request: MPI.Request, bell: Doorbell | None = None) -> None:
        self._wait_for(request.Test, bell)

    def _wait_for(self, done: Callable[[], bool], bell: Doorbell | None = None) -> None:
        """Raises RankError where a rank has left that must have been waited for."""
        try:
            self._patience.wait(done, bell, None if self._departure is None else self._departure.look)
        except MPI.Exception as error:
            # MPI may notice that another rank is gone before the witness does, which names it and ends this one.
            if guardian() is not None:
                time.sleep(self._fault_timeout + _TELLING_SECONDS)
            reason = error.Get_error_string().splitlines()[-1]
            raise RankError(f"{self._name([self.rank])} can no longer reach another rank: {reason}") from None

    def _called(self, seconds: float) -> bool:
        """Sleep that long, or until the bell rings; True if rank 0 has sent a message that this rank did not take."""
        if self._mailbox is not None:
            time.sleep(seconds)
            return self.host_rank > 0 and self._mailbox.is_waiting
        if not self._is_rung:
            time.sleep(seconds)
            return False
        self._bell.wait(seconds)
        return self._bell.count > self._messages

    def _meet(self, fault_timeout: float, foreign: frozenset[str]) -> None:
        """Learn who is on which host: the first collective over all ranks, with which every host's segments exist."""
        self._host = _split_by_host(self._mpi)
        first = self._host.bcast(self.rank, root=0)
        post = Post(MPI.Get_processor_name()) if first == self.rank and guardian() is None else None
        met = self.all_gather_object((first, MPI.Get_processor_name(), post.offer if post is not None else {}))
        firsts = sorted({first for first, *_ in met})
        self.hosts = tuple(met[first][1] for first in firsts)
        self.host_of = tuple(firsts.index(first) for first, *_ in met)
        if guardian() is None:
            self._go_under_watch(post, [met[first][2] for first in firsts], fault_timeout, foreign)
        if len(self.hosts) > 1:
            self._slices = min(self.host_of.count(host) for host in range(len(self.hosts)))
            color = self.host_rank if self.host_rank < self._slices else MPI.UNDEFINED
            # With the ranks that have the same slice, in host order; and the first ranks of all hosts.
            self._alike = self._mpi.Split(color, self.host_of[self.rank])
            self._leaders = self._mpi.Split(0 if self.host_rank == 0 else MPI.UNDEFINED, self.rank)
        # the rank that comes last has mapped what there is to map: from here on no segment needs its name
        self.barrier()

    def _go_under_watch(
        self, post: Post | None, offers: list[dict[str, Any]], fault_timeout: float, foreign: frozenset[str]
    ) -> None:
        """Have the host's first rank start a witness, and call it. `post` and `offers`: where the hosts' will be."""
        starter = None if post is None else post.start(self.hosts, self.host_of, offers, fault_timeout)
        # Where the witness of a job's first host is gone, nobody but a rank there can say so.
        watched = Watched(self.rank, self.host, speaks=self.rank == 0)
        try:
            one = Guardian(
                watched, offers[self.host_of[self.rank]]["name"], fault_timeout, sorted(mapped_segments() - foreign)
            )
        except OSError as error:
            sys.stderr.write(
                f"tpcpu: note: {self._name([self.rank])} cannot call its host's witness ({error.strerror}), and is "
                f"not watched\n"
            )
            return
        one.start(starter)
        guard(one)

    def _hang_bells(self) -> None:
        """Give every rank a bell, and find out whom rank 0 can ring: its host's ranks, unless containers part them."""
        job = self.broadcast_object(secrets.token_hex(8) if self.is_root else None)
        names = [f"tpcpu-{job}-{rank}" for rank in range(self.size)]
        self._bell = Doorbell(names[self.rank])
        self.barrier()
        if self.is_root:
            self._bell.ring(names[1:])
        self.barrier()
        self._is_rung = self._bell.wait(0)
        rung = self.all_gather_object(self._is_rung)
        self._sleepers = [name for name, hears in zip(names, rung, strict=True) if hears]

    def _problems(self, problem: str | None) -> list[str]:
        """Those of all ranks."""
        return [each for each in self.all_gather_object(problem) if each]

    def _look(self) -> None:
        if self._departure is not None:
            self._departure.look()

    def _share_memory(self) -> Window | None:
        """The window of this host's ranks, if those of every host can share memory. Collective."""
        problem = _shortage(self.host_size) if self.host_rank == 0 else None
        problems = self._problems(problem)
        found: MPI.Win | None = None
        if not problems:
            try:
                found = _allocate_shared(self._host, part_bytes(self.host_size))
            except MPI.Exception as error:
                problem = f"MPI_Win_allocate_shared: {error.Get_error_string()}"
            problems = self._problems(problem)
        if problems or found is None:
            if self.is_root:
                sys.stderr.write(
                    f"tpcpu: note: ranks share no memory, and join their sums by messages: {problems[0]}\n"
                )
            return None
        parts = [found.Shared_query(rank)[0].address for rank in range(self.host_size)]
        window = Window(self.host_rank, parts, found)
        self.barrier()
        return window


def _split_by_host(comm: MPI.Intracomm) -> Any:
    """The ranks that can share memory with this one, in the order of their ranks: a communicator."""
    return comm.Split_type(MPI.COMM_TYPE_SHARED)


def _allocate_shared(comm: MPI.Intracomm, nbytes: int) -> MPI.Win:
    """Memory of each rank that all can reach, each rank's on pages of its own."""
    info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
    try:
        return MPI.Win.Allocate_shared(nbytes, 1, info, comm)
    finally:
        info.Free()


def _shortage(ranks: int) -> str | None:
    """What is said where shared memory has no room for the parts of so many ranks: touching them would be fatal."""
    needed = ranks * part_bytes(ranks)
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    free = found.f_bavail * found.f_frsize
    return f"/dev/shm has {free >> 20} MB free, {-(-needed >> 20)} MB are needed" if free < needed else None


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array's own memory as bytes, whatever its dtype (MPI knows no bfloat16)."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is to be sent, but it is not C-contiguous")
    return array.reshape(-1).view(np.uint8)


def _messages(array: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """The array's bytes in messages that MPI can count, one at least."""
    whole = _bytes(array)
    return [whole[at : at + MESSAGE_BYTES] for at in range(0, max(len(whole), 1), MESSAGE_BYTES)]


def _split(array: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]]:
    """Views of so many rows each."""
    ends = list(accumulate(counts, initial=0))
    return [array[begin:end] for begin, end in pairwise(ends)]


def _foreign_segments() -> frozenset[str]:
    """The named segments that are mapped now and are not MPI's."""
    mapped = mapped_segments()
    if not MPI.Is_initialized():
        return mapped
    return frozenset(path for path in mapped if not Path(path).name.startswith(MPI_NAMES))
