"""How ranks speak to each other: one interface, a lone rank that needs no MPI, and the choice between the two.

Knows the launcher's environment and what a rank must be able to do; must not know models, kernels or what the messages
mean. MPI itself is in `mpi.py`, which is imported only where there are several ranks. Communicators are passed as
arguments; nothing here is global.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from tpcpu.errors import LaunchError, RankError, TpcpuError, UsageError
from tpcpu.parallel.announcement import announced

if TYPE_CHECKING:
    from tpcpu.parallel.pulse import Pulse
    from tpcpu.parallel.team import Team

AllReduceKind = Literal["window", "hosts", "ordered", "mpi"]
Wire = Literal["float32", "bf16"]
"""What sums travel as between hosts."""
T = TypeVar("T")


@dataclass(frozen=True)
class AllReduce:
    """What a compiled step needs to join partial sums.

    `window`: memory that all ranks share, in which each finds the others' parts and adds them in rank order: all ranks
    hold the same bits. `hosts`: the same inside each host; then an MPI function, by its address and its handles as
    64-bit integers, exchanges the hosts' sums, which are added in host order: MPI_Allgather with (datatype,
    communicator). `ordered`: where ranks of a host share no memory, MPI_Allgather of all parts; the caller adds them in
    rank order. `mpi`: MPI_Allreduce with (float datatype, sum operation, communicator), in whatever order MPI takes.
    `local`: nothing is sent, and each rank takes its own part for the sum, to measure the time of all the rest. A lone
    rank has nothing to do. Only the thread that connected may call the function.
    """

    kind: AllReduceKind | Literal["local"]
    function: int = 0
    handles: tuple[int, ...] = ()
    table: int = 0
    """Address of the window's table (`kernels/window_layout.py`),"""
    own: int = 0
    """of this rank's two halves for partial sums,"""
    half_bytes: int = 0
    """and their size."""
    two_shot: int = 0
    """Bytes of a message from which on the ranks divide the adding."""
    hosts: int = 1
    """How many there are,"""
    slices: int = 1
    """in how many slices their sums are exchanged,"""
    slice: int = 0
    """which of them is this rank's (none if it is not below `slices`),"""
    wire: Wire = "float32"
    """and what it travels as."""
    keep: object = None
    """What lives as long as the addresses are used."""

    def place(self, message: int, nbytes: int) -> tuple[int, int]:
        """The half of the window, and the place in it, of a program's message: they are taken in turn."""
        places = max(self.half_bytes // nbytes, 1)
        return message & 1, (message >> 1) % places * nbytes


class Communicator(ABC):
    """The ranks of one job, seen from one of them.

    Every method that is not marked otherwise is collective: all ranks call it in the same order, with arrays of equal
    shape and dtype where an array is sent, from the thread that connected. Arrays must be C-contiguous. Waiting is
    patient (`patience.py`): a rank that waits for a busy one answers in microseconds, one that waits for an idle one
    uses next to no CPU.
    """

    rank: int
    size: int
    hosts: tuple[str, ...]
    """Names of the hosts, in the order of their first ranks."""
    host_of: tuple[int, ...]
    """For each rank, the index of its host in `hosts`."""
    pulse: "Pulse | None" = None
    """What this rank shows to the witness of its host, where there is one."""
    all_reduce_kind: AllReduceKind
    """How partial sums are joined: what was asked for, or what works here."""

    @property
    def host_ranks(self) -> tuple[int, ...]:
        """The ranks on this rank's host, ascending. Not collective."""
        return tuple(rank for rank in range(self.size) if self.host_of[rank] == self.host_of[self.rank])

    @property
    def host_rank(self) -> int:
        """This rank's place among those of its host. Not collective."""
        return self.host_ranks.index(self.rank)

    @property
    def host_size(self) -> int:
        """The number of ranks on this host. Not collective."""
        return len(self.host_ranks)

    @property
    def host(self) -> str:
        """The name of this rank's host. Not collective."""
        return self.hosts[self.host_of[self.rank]]

    @property
    def is_root(self) -> bool:
        """True on rank 0. Not collective."""
        return self.rank == 0

    @abstractmethod
    def all_reduce(self, team: "Team", wire: Wire = "float32") -> AllReduce:
        """What steps need that `team` walks, to join partial sums; `wire`: what they are between hosts."""

    @abstractmethod
    def broadcast(self, array: NDArray[Any]) -> None:
        """Overwrite `array` on every rank with rank 0's."""

    @abstractmethod
    def gather(self, local: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]] | None:
        """Bring the ranks' arrays, (counts[rank], ...) each, to rank 0: a list there, None elsewhere.

        All ranks give the same `counts`, the same dtype and the same trailing axes; a count may be 0.
        """

    @abstractmethod
    def all_gather(self, array: NDArray[Any]) -> NDArray[Any]:
        """The arrays of all ranks, of one shape and dtype, stacked on a new first axis: (size, *array.shape)."""

    @abstractmethod
    def exchange(self, sends: Sequence[tuple[int, NDArray[Any]]], receives: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """Send arrays to other ranks, and overwrite arrays with what others send; returns when all may be reused.

        Each array stands with the other rank. What one rank sends to another arrives in the order in which it is sent:
        both name equal sizes in the same order. Arrays may be of any size. Ranks with nothing to send and to receive
        need not call it.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has come here."""

    @abstractmethod
    def send_message(self, array: NDArray[Any]) -> None:
        """Rank 0's side of a message to all others, who are in `wait_message`. Returns when `array` may be reused."""

    @abstractmethod
    def wait_message(self, array: NDArray[Any]) -> None:
        """The others' side: sleep until rank 0 sends, and overwrite `array` with the message."""

    @abstractmethod
    def broadcast_object(self, value: T | None) -> T:
        """Rank 0's `value` on every rank, pickled: for small things on the way to the work, not for the work."""

    @abstractmethod
    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, pickled: for small things."""

    @abstractmethod
    def abort(self, code: int) -> NoReturn:
        """End every rank now, with exit code `code` where the launcher passes it on. Not collective."""

    def raise_together(self, error: Exception | None) -> None:
        """Raise the same exception on every rank if any rank brings an `error`; its message names the ranks.

        A problem that all ranks share is told once, without naming them. tpcpu's own exceptions keep their type (rank
        0's, or the lowest rank's, where they differ); anything else becomes a RankError. The rank's own exception, if
        it has one, is the cause.
        """
        found = self.all_gather_object(None if error is None else _Problem.of(error))
        problems = {rank: problem for rank, problem in enumerate(found) if problem is not None}
        if not problems:
            return
        if self.size == 1 and isinstance(error, TpcpuError):
            raise error
        ranks_of: dict[str, list[int]] = {}
        for rank, problem in problems.items():
            ranks_of.setdefault(problem.message, []).append(rank)
        if len(problems) == self.size and len(ranks_of) == 1:
            message = next(iter(ranks_of))
        else:
            message = "; ".join(f"{self._name(ranks)}: {text}" for text, ranks in ranks_of.items())
        raise next(iter(problems.values())).kind(message) from error

    def _name(self, ranks: Sequence[int]) -> str:
        """Such as `rank 2 on node7`, `ranks 0, 3`, `ranks 0, 1, 2 and 13 more`."""
        if len(ranks) == 1:
            return f"rank {ranks[0]} on {self.hosts[self.host_of[ranks[0]]]}"
        shown = list(ranks) if len(ranks) <= 8 else list(ranks)[:3]
        more = len(ranks) - len(shown)
        return f"ranks {', '.join(map(str, shown))}" + (f" and {more} more" if more else "")


class Solo(Communicator):
    """A lone rank: nothing is sent, MPI is never loaded, and no launcher is needed."""

    def __init__(self, all_reduce: AllReduceKind = "window") -> None:
        """Make the communicator of size 1."""
        self.rank = 0
        self.size = 1
        self.hosts = (os.uname().nodename,)
        self.host_of = (0,)
        self.all_reduce_kind = all_reduce

    def all_reduce(self, team: "Team", wire: Wire = "float32") -> AllReduce:  # noqa: ARG002
        """Nothing is to be joined."""
        return AllReduce(self.all_reduce_kind)

    def broadcast(self, array: NDArray[Any]) -> None:
        """Leave `array` as it is."""

    def gather(self, local: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]] | None:
        """A list of a copy of `local`."""
        check_counts(local, counts, 0, 1)
        return [local.copy()]

    def all_gather(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of `array` with a first axis of 1."""
        return array[np.newaxis].copy()

    def exchange(self, sends: Sequence[tuple[int, NDArray[Any]]], receives: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """There is nobody to exchange with."""
        assert not sends
        assert not receives

    def barrier(self) -> None:
        """Return at once."""

    def send_message(self, array: NDArray[Any]) -> None:
        """Nobody listens."""

    def wait_message(self, array: NDArray[Any]) -> None:  # noqa: ARG002
        """A lone rank is rank 0, which never waits."""
        raise AssertionError("rank 0 sends messages and does not wait for them")

    def broadcast_object(self, value: T | None) -> T:
        """The value itself."""
        assert value is not None
        return value

    def all_gather_object(self, value: T) -> list[T]:
        """The value in a list."""
        return [value]

    def abort(self, code: int) -> NoReturn:
        """End the process now."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


DEFAULT_FAULT_TIMEOUT = 10.0
"""Seconds in which a lost or stopped rank becomes an error."""


def connect(
    all_reduce: AllReduceKind = "window",
    environ: Mapping[str, str] = os.environ,
    fault_timeout: float = DEFAULT_FAULT_TIMEOUT,
) -> Communicator:
    """Join the ranks that the launcher announced, or be a lone rank where it announced none. Collective.

    `all_reduce` says how partial sums are joined (see `AllReduce`). Raises LaunchError if the launcher announced
    several processes but the MPI library does not find them, or if there is no MPI library. `fault_timeout`: seconds
    in which a lost or stopped rank becomes an error; what the first call says holds for the process.
    """
    check_connection(all_reduce, fault_timeout)
    announcement = announced(environ)
    if announcement is None or announcement.size == 1:
        return Solo(all_reduce)
    try:
        from tpcpu.parallel.mpi import Mpi
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{announcement.launcher} started {announcement.size or 'several'} processes, but mpi4py finds no MPI "
            f"library ({str(error).splitlines()[0]}); pip install 'tpcpu[mpich]', or load your site's MPI module"
        ) from error
    return Mpi(announcement, all_reduce, fault_timeout)


def check_connection(all_reduce: str, fault_timeout: float, wire: str = "float32") -> None:
    """Raises UsageError for what no ranks could be joined with; `hosts` is what `window` becomes on several."""
    if all_reduce not in get_args(AllReduceKind) or all_reduce == "hosts":
        raise UsageError(f"all-reduce {all_reduce!r} is not known; 'window' and 'mpi' are")
    if wire not in get_args(Wire):
        raise UsageError(f"wire {wire!r} is not known; {' and '.join(map(repr, get_args(Wire)))} are")
    if not fault_timeout >= 1:
        raise UsageError(f"fault-timeout {fault_timeout}: expected a number of seconds, at least 1")


def check_counts(local: NDArray[Any], counts: Sequence[int], rank: int, size: int) -> None:
    """Refuse counts that do not describe the ranks' arrays (ValueError)."""
    if len(counts) != size or local.ndim == 0 or local.shape[0] != counts[rank]:
        raise ValueError(f"rank {rank} gathers an array of shape {local.shape}, but counts are {list(counts)}")


@dataclass(frozen=True)
class _Problem:
    """An exception in a form that every rank can read."""

    kind: type[TpcpuError]
    message: str

    @classmethod
    def of(cls, error: Exception) -> "_Problem":
        if isinstance(error, TpcpuError):
            return cls(type(error), str(error))
        return cls(RankError, f"{type(error).__name__}: {error}")
