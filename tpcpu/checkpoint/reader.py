"""Reads runs of files in large requests, and nothing beside them.

Knows files and offsets; must not know what is in them.
"""

import os
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from tpcpu.errors import CheckpointError


class RunReader:
    """Opens files when they are first read from. Several threads may read at the same time."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = Lock()

    def read(self, file: Path, offset: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` with what lies at `offset`. Raises CheckpointError naming the file where that cannot be read."""
        done = 0
        try:
            number = self._number(file)
            while done < len(out):
                count = os.preadv(number, [out[done:].data], offset + done)
                if not count:
                    raise CheckpointError(f"{file}: became shorter while it was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Close the files."""
        for number in self._open.values():
            os.close(number)
        self._open.clear()

    def _number(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                # What lies behind a run is for another rank to read: the system is not to read ahead.
                with suppress(OSError):
                    os.posix_fadvise(self._open[file], 0, 0, os.POSIX_FADV_RANDOM)
            return self._open[file]
