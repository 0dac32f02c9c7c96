"""How a rank leaves its job: it says so, and no other rank waits for it for ever.

MPI ends when all ranks end it together, so a rank whose script raised or ran out earlier than the others' would hang in
there, and they in the call that it never makes. Here a leaving rank tells the others and waits, asleep, until all
leave. One that fails, and sees the others go on, ends them all; one that waits for a rank that has left fails.

Knows the end of a Python program (hooks, atexit) and messages between ranks; must not know what ranks do before.
"""

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from tpcpu.errors import RankError, TpcpuError

if TYPE_CHECKING:
    from types import TracebackType

    from mpi4py import MPI

FAILED_SECONDS = 2.0
"""How long a failed rank waits for the others to fail too, as they do over a user's mistake."""

GONE_SECONDS = 2.0
"""How long a rank goes on waiting for what one that has left may have sent before."""

_LONGEST_PAUSE = 0.1
_ENDED = b"ended"
_WORDS = 4096
"""Bytes of a rank's last words at most."""
_SAME_CALLS = "all ranks have to make the same calls, in the same order"


class Departure:
    """The end of this process as a rank. There is one in a process, whatever communicators it makes."""

    called: Callable[[float], bool]
    """Sleeps so many seconds at most; True if rank 0 has sent something that this rank never took."""
    goodbye: Callable[[], None] = staticmethod(lambda: None)
    """Called when this rank leaves together with all others."""
    where: Callable[[], str] = staticmethod(lambda: "")
    """What this rank was doing last, such as `in layer 3 all_reduce`."""

    def __init__(self, comm: "MPI.Comm", name: Callable[[int], str], abort: Callable[[int], NoReturn]) -> None:
        """`comm` is for departures alone; `name` such as `rank 1 on node7`; `abort` ends all ranks."""
        self._comm, self._name, self._abort = comm, name, abort
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._left: dict[int, bytes] = {}
        self._seen = 0.0
        self._sent: list[MPI.Request] = []
        self._broken = self._failed = False
        self._hook, self._thread_hook = sys.excepthook, threading.excepthook
        sys.excepthook = self._uncaught
        threading.excepthook = self._uncaught_in_thread
        atexit.register(self._end)

    def look(self) -> None:
        """For a rank that has waited for a while: raises RankError if one that it may be waiting for has left."""
        self._receive()
        if self._left and time.monotonic() - self._seen > GONE_SECONDS:
            self._broken = True
            names = ", ".join(self._name(rank) for rank in sorted(self._left))
            raise RankError(f"{names} ended, but {self._name(self._comm.rank)} works on; {_SAME_CALLS}")

    def look_before_sending(self) -> None:
        """For rank 0, which would go on into a step that others have to share."""
        self._receive()
        if self._left:
            self._seen = 0.0
            self.look()

    def fail(self) -> None:
        """See the function of that name."""
        self._failed = True

    def _leave(self, words: bytes, seconds: float) -> bool:
        """Tells the others, and waits for them to leave too; False if they do not within `seconds`, or work on."""
        if not self._sent:
            message = np.frombuffer(words[:_WORDS], np.uint8).copy()
            others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
            self._sent = [self._comm.Isend(message, rank) for rank in others]
        deadline, pause = time.monotonic() + seconds, 1e-3
        while not self._all_left():
            if time.monotonic() > deadline:
                return False
            if self.called(pause):
                return False
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _all_left(self) -> bool:
        self._receive()
        return len(self._left) == len(self._sent) and all(request.Test() for request in self._sent)

    def _receive(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            words = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self._comm.Recv(words, status.source)
            self._left[status.source] = words.tobytes()
            self._seen = self._seen or time.monotonic()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
        """In the place of sys.excepthook: says whose traceback it is, and lets no rank wait for this one."""
        if self._is_over():
            self._hook(kind, error, trace)
            return
        words = f"{kind.__name__}: {error}".encode(errors="replace")[:_WORDS]
        # What was raised on all ranks is told by rank 0.
        late = self._comm.rank > 0 and isinstance(error, TpcpuError) and not self._broken
        if not late:
            self._tell(kind, error, trace)
        together = not self._broken and self._leave(words, FAILED_SECONDS)
        if late and self._left.get(0) != words:
            self._tell(kind, error, trace)
        if not together:
            self._abort(1)

    def _tell(self, kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
        sys.stdout.flush()
        if self._hook is not sys.__excepthook__:
            sys.stderr.write(f"{self._name(self._comm.rank)}:\n")
            self._hook(kind, error, trace)
        else:
            # In one piece: other ranks may be writing too.
            lines = traceback.format_exception(kind, error, trace)
            sys.stderr.write(f"{self._name(self._comm.rank)}:\n{''.join(lines)}")
        if not isinstance(error, TpcpuError):
            what = "".join(traceback.format_exception_only(kind, error)).splitlines()[0]
            sys.stderr.write(f"tpcpu: error: {self._name(self._comm.rank)} raised {what} {self.where()}\n")
        sys.stderr.flush()

    def _uncaught_in_thread(self, args: threading.ExceptHookArgs) -> None:
        """A thread that ends does not end the rank, unless it is the one that speaks to the others."""
        if args.thread is not None and args.thread.ident == self._thread and args.exc_value is not None:
            self._uncaught(args.exc_type, args.exc_value, args.exc_traceback)
        else:
            self._thread_hook(args)

    def _end(self) -> None:
        """At the end of the program, before MPI's own."""
        if self._is_over():
            self.goodbye()
            return
        try:
            if self._broken:
                self._abort(1)
            if self._leave(_ENDED, FAILED_SECONDS if self._failed else float("inf")):
                self.goodbye()
                return
        except KeyboardInterrupt:
            self._abort(130)
        if not self._failed:
            sys.stderr.write(f"tpcpu: error: {self._name(self._comm.rank)} ended, but rank 0 works on; {_SAME_CALLS}\n")
        self._abort(1)

    def _is_over(self) -> bool:
        """Whether there is nothing to leave: MPI has ended, or this is a copy of the process that was a rank."""
        from mpi4py import MPI

        return os.getpid() != self._process or MPI.Is_finalized()


_begun: list[Departure] = []


def begin(comm: "Callable[[], MPI.Comm]", name: Callable[[int], str], abort: Callable[[int], NoReturn]) -> Departure:
    """This process's departure; the arguments are used by the first call, which makes it. Collective."""
    if not _begun:
        _begun.append(Departure(comm(), name, abort))
    return _begun[0]


def fail() -> None:
    """This program will end with an exit code that is not 0: if the others do not end too, end them."""
    for departure in _begun:
        departure.fail()
