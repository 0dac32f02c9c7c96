"""Named shared-memory segments that an MPI library leaves under /dev/shm when its processes are killed.

Knows /proc/PID/maps and nothing of MPI. A segment that every process of the host has mapped needs its name no longer:
unlinked, it lives as long as its last process and vanishes with it.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_FOLDER = "/dev/shm/"


def mapped_segments(process: Path = Path("/proc/self")) -> frozenset[str]:
    """The paths of the named segments under /dev/shm that a process maps and that still have their name."""
    found = set()
    with contextlib.suppress(OSError):
        for line in (process / "maps").read_text().splitlines():
            # the path is the sixth column and may hold blanks; the kernel marks an unlinked one behind it
            columns = line.split(maxsplit=5)
            if len(columns) == 6 and columns[5].startswith(_FOLDER) and not columns[5].endswith(" (deleted)"):
                found.add(columns[5])
    return frozenset(found)


def unlink_segments(paths: Iterable[str]) -> None:
    """Take the names away; one that another process has removed already is no error."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
