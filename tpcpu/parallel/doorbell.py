"""Waking an idle rank on the same host: a datagram socket that it sleeps at.

Knows abstract Unix sockets, which have no file to leave behind; knows nothing of MPI. The bell carries no message: it
says that it is worth looking, and how many messages there have been.
"""

import contextlib
import select
import socket
import weakref
from collections.abc import Iterable


class Doorbell:
    """A bell of this process, and the way to ring others'. Closed when it is dropped, or by `close`."""

    def __init__(self, name: str) -> None:
        """Hang up the bell `name`, which must be unique on this host (OSError otherwise)."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(f"\0{name}")
        except OSError:
            self._socket.close()
            raise
        self._finalizer = weakref.finalize(self, self._socket.close)
        self.count = 0
        """The largest count that this bell was rung with."""

    def ring(self, names: Iterable[str], count: int = 0) -> None:
        """Ring the bells `names`; one that is not there, or has been rung often enough, is no error."""
        for name in names:
            with contextlib.suppress(OSError):
                self._socket.sendto(count.to_bytes(8, "little"), f"\0{name}")

    def wait(self, seconds: float) -> bool:
        """Sleep until the bell rings or `seconds` have passed; True if it rang, however often."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            while True:
                self.count = max(self.count, int.from_bytes(self._socket.recv(8), "little"))
        return True

    def close(self) -> None:
        """Take the bell down."""
        self._finalizer()
