"""Messages between the ranks of a host, outside of compiled steps: rank 0's to all others, arrays of all to rank 0.

Knows the mail of the window's parts; must not know what is sent. Waiting is compiled: it spins while the other side is
busy, sleeps without using the processor when it is idle, and comes back to Python twenty times a second, and at every
signal, for Python's handlers to run. Numbers only grow: mail is overwritten when all who read it have counted it.
"""

import ctypes
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcpu.kernels import mailbox as compiled
from tpcpu.kernels import team_layout
from tpcpu.kernels import window_layout as layout
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.team import FUTEX_CALLS, SPINS_CROWDED, YIELDS, aligned
from tpcpu.parallel.window import Window

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)

_SPINS = 40_000
"""About a millisecond: longer than what lies between two steps."""
_SLEEP_NANOSECONDS = 50_000_000
_LOOK_SECONDS = 0.5
"""A wait this long may be for something that never comes."""

ARRAY_BYTES = 2 * layout.MAIL_BYTES
"""The largest array that a rank can hand in at once."""


class Mailbox:
    """This rank's side. All ranks make the same calls in the same order, rank 0 `send` where the others `take`."""

    def __init__(self, window: Window, crowded: bool, look: Callable[[], None]) -> None:
        """`crowded`: more ranks than cores. `look` is called now and then when a wait is long, and may raise."""
        prepare([compiled.wait_word, compiled.post_word])
        self._wait_word, self._post_word = _KERNEL(compiled.wait_word.address), _KERNEL(compiled.post_word.address)
        self._parts, self._rank, self._look = window.parts, window.rank, look
        self._spins = SPINS_CROWDED if crowded else _SPINS
        self._block = aligned(team_layout.ARRIVALS // 8)
        self._address: int = self._block.ctypes.data
        self._block[team_layout.YIELDS // 8] = YIELDS
        self._block[team_layout.FUTEX_CALL // 8] = FUTEX_CALLS[platform.machine()]
        self._block[team_layout.TIMEOUT // 8 + 1] = _SLEEP_NANOSECONDS
        self._mail = [_bytes_at(part + layout.MAIL, ARRAY_BYTES) for part in window.parts]
        self._ticket = _bytes_at(window.parts[0] + layout.TICKET, 8).view(np.int64)
        self._pieces = self._arrays = 0
        self._window = window

    def send(self, message: NDArray[np.uint8]) -> None:
        """Rank 0: a message for all others, who may still be reading the one before."""
        for piece, place in self._cut(message):
            for part in self._parts[1:]:
                self._wait(part + layout.TAKEN, self._pieces - 2)
            place[:] = piece
            self._post(self._parts[0] + layout.TICKET, self._pieces)

    def take(self, message: NDArray[np.uint8]) -> None:
        """The others: overwrites `message`, which is as long as rank 0's."""
        for piece, place in self._cut(message):
            self._wait(self._parts[0] + layout.TICKET, self._pieces)
            piece[:] = place
            self._post(self._parts[self._rank] + layout.TAKEN, self._pieces)

    @property
    def is_waiting(self) -> bool:
        """Whether rank 0 has sent what this rank has not taken."""
        return int(self._ticket[0]) > self._pieces

    def gather(self, local: NDArray[np.uint8], lengths: Sequence[int], received: NDArray[np.uint8] | None) -> None:
        """Brings arrays of at most `ARRAY_BYTES` each, behind one another, to rank 0's `received`."""
        self._arrays += 1
        if self._rank > 0:
            self._wait(self._parts[0] + layout.GATHERED, self._arrays - 1)
            self._mail[self._rank][: local.size] = local
            self._post(self._parts[self._rank] + layout.OFFERED, self._arrays)
            return
        assert received is not None
        received[: local.size] = local
        end = local.size
        for rank in range(1, len(lengths)):
            self._wait(self._parts[rank] + layout.OFFERED, self._arrays)
            begin, end = end, end + lengths[rank]
            received[begin:end] = self._mail[rank][: lengths[rank]]
        self._post(self._parts[0] + layout.GATHERED, self._arrays)

    def _cut(self, message: NDArray[np.uint8]) -> Any:
        """Pieces of a message and where in rank 0's mail they go; counts them."""
        for begin in range(0, max(message.size, 1), layout.MAIL_BYTES):
            piece = message[begin : begin + layout.MAIL_BYTES]
            self._pieces += 1
            first = (self._pieces & 1) * layout.MAIL_BYTES
            yield piece, self._mail[0][first : first + piece.size]

    def _wait(self, address: int, target: int) -> None:
        block = self._block
        block[team_layout.SPINS // 8] = self._spins
        self._wait_word(self._address, address, target)
        looked = time.monotonic() if block[compiled.RESULT // 8] else 0.0
        while block[compiled.RESULT // 8]:
            # Asleep by now: no more spinning.
            block[team_layout.SPINS // 8] = 0
            self._wait_word(self._address, address, target)
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                self._look()

    def _post(self, address: int, value: int) -> None:
        self._post_word(self._address, address, value)


def _bytes_at(address: int, count: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (count,))
