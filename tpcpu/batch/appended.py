"""A file that only grows, by whole lines that are on disk when `append` returns.

Knows bytes, and how a file ends that was being written when the power went. What the lines say is for others.
"""

import os
from pathlib import Path

from tpcpu.checkpoint.durable import sync, write_all


class Appended:
    """An open file; `size` bytes of it are on disk, and nothing more is in it after `append` raised."""

    def __init__(self, path: Path) -> None:
        """Makes the file where there is none. Raises OSError."""
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.size = os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        """Writes and syncs. Raises OSError; the file is then as it was before."""
        try:
            write_all(self._file, data, self.size)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.size += len(data)

    def cut(self, size: int) -> None:
        """Takes away what stands behind `size` bytes."""
        if os.fstat(self._file).st_size != size:
            os.ftruncate(self._file, size)
            os.fsync(self._file)
        self.size = size

    def close(self) -> None:
        """Lets go of the file. May be called twice."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def replace(path: Path, data: bytes) -> None:
    """The file `path` holds `data`, or what it held before, at any moment. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync(path.parent)
