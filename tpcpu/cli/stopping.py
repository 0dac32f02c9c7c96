"""Signals that ask a long command to end before its time, and to be run again.

Ctrl-C ends with 130 as everywhere. SIGTERM, SIGHUP and SIGUSR1 (a batch system's warning that time is nearly up) end
with `EXIT_STOPPED`: what is done is safe, and the same command goes on from there. Knows signals; not what is stopped.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tpcpu.errors import EXIT_STOPPED

_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(BaseException):
    """The process was asked to end by one of these signals."""


class Stop:
    """What was asked for so far. For the main thread only."""

    def __init__(self) -> None:
        self._number = 0
        self.has_raised = False
        """Whether something was broken off. What was being imported may have made another exception of it."""

    def asked(self) -> bool:
        """Whether a signal came."""
        return self._number != 0

    @property
    def exit_code(self) -> int:
        """What to end with then."""
        return 128 + self._number if self._number == signal.SIGINT else EXIT_STOPPED

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises: `Stopped`, or KeyboardInterrupt. For what may be broken off anywhere."""
        with _handled(self._raise, (*_STOPPING, signal.SIGINT)):
            yield

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, a signal is only noted, for a loop that asks; a second Ctrl-C raises KeyboardInterrupt."""
        with _handled(self._note, (*_STOPPING, signal.SIGINT)):
            yield

    @contextmanager
    def passing_on(self, send: Callable[[int], None]) -> Iterator[None]:
        """Inside, a signal is noted and sent on. For whoever waits for other processes to end."""

        def note_and_send(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self._number = self._number or number
            send(number)

        with _handled(note_and_send, (*_STOPPING, signal.SIGINT)):
            yield

    def _raise(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._number = self._number or number
        self.has_raised = True
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == self._number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = self._number or number


@contextmanager
def _handled(handler: object, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    # What is ignored, as under nohup, stays so.
    taken = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
