"""One job per output: a lock file that names host and process of whoever holds it.

The lock is POSIX' (fcntl), which also works between hosts on NFS, and ends with the process however that ends. What
stands in the file is only for people. Knows files and processes; nothing of what is locked.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from tpcpu.checkpoint.durable import NO_LOCKS
from tpcpu.errors import OutputError

_PAUSE = 0.05


class Lock:
    """Held from creation until `release`. Another process of the same user may take over once this one is dead."""

    def __init__(self, path: Path, what: str, seconds: float) -> None:
        """Waits up to `seconds` for another holder to end. Raises OutputError that names it; OSError."""
        self._path = path
        deadline = time.monotonic() + seconds
        while not self._taken():
            if time.monotonic() >= deadline:
                holder = _read(path) or "another process"
                waited = f" (waited {seconds:g} s)" if seconds else ""
                raise OutputError(f"{what} is being written by {holder}{waited}; wait for its end, or end it")
            time.sleep(_PAUSE)

    def _taken(self) -> bool:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(self._file)
                    return False
            # Whoever held it may have removed the file that is locked now.
            if not _is_named(self._file, self._path):
                os.close(self._file)
                return False
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError:
            os.close(self._file)
            raise
        return True

    def release(self) -> None:
        """Removes the file, then lets go of it. May be called twice."""
        file, self._file = self._file, -1
        if file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(file)


def _is_named(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(path: Path) -> str:
    try:
        return path.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        return ""
