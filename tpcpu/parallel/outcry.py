"""What a program that was started here writes to standard error: passed on to ours, its lines of error kept.

Knows bytes and one thread; must not know who writes. Whoever tells the errors in words of its own has them withheld, so
that each is read once.
"""

import contextlib
import os
import threading
from typing import IO

_ERROR = b"tpcpu: error: "
_STANDARD_ERROR = 2


class Outcry:
    """Reads a stream to its end in a thread of its own, and closes it."""

    def __init__(self, stream: IO[bytes] | None, *, withhold: bool = False) -> None:
        """Begin to read a process's standard error, a pipe; with `withhold` its lines of error are not passed on."""
        assert stream is not None
        self._stream, self._withhold = stream, withhold
        self._errors: list[str] = []
        self._held = b""
        self._is_inside = False
        """Whether part of the line that has begun was passed on."""
        self._thread = threading.Thread(target=self._read, daemon=True, name="tpcpu-outcry")
        self._thread.start()

    def errors(self, seconds: float = 2.0) -> list[str]:
        """What the lines of error said; waits so long at most for the writers to end. The lines are taken."""
        self._thread.join(seconds)
        taken, self._errors = self._errors, []
        return taken

    def _read(self) -> None:
        with self._stream:
            while piece := self._stream.read1(1 << 16):  # type: ignore[attr-defined]
                _pass_on(self._take(piece))
        if self._held:
            _pass_on(self._take(b"\n"))

    def _take(self, piece: bytes) -> bytes:
        """What is to be passed on of what has come: all but lines of error, and what may become one."""
        passed = b""
        *lines, rest = (self._held + piece).split(b"\n")
        for line in lines:
            is_error = not self._is_inside and line.startswith(_ERROR)
            if is_error:
                self._errors.append(line[len(_ERROR) :].decode(errors="replace"))
            if not (is_error and self._withhold):
                passed += line + b"\n"
            self._is_inside = False
        if rest and (self._is_inside or not (rest + _ERROR[len(rest) :]).startswith(_ERROR)):
            passed, rest, self._is_inside = passed + rest, b"", True
        self._held = rest
        return passed


def _pass_on(data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(_STANDARD_ERROR, data) :]
