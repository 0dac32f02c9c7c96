"""What an MPI library and its launcher leave when they are killed: segments under /dev/shm, and a file under /tmp.

Knows /proc and names, and nothing of MPI. A segment that every process of the host has mapped needs its name no longer:
unlinked, it lives as long as its last process and vanishes with it.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from tpcpu.parallel.processes import open_files

_FOLDER = "/dev/shm/"


# how MPICH, Open MPI and UCX name theirs; Intel MPI unlinks its own
MPI_NAMES = ("mpich_shm_", "sm_segment.", "vader_segment.", "ucx_shm_")


HYDRA_FILE = "hydra_hwloc_xmlfile_"
"""Begins the name of what MPICH's launcher writes under /tmp, keeps open, and removes when it ends by itself."""


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


def named_segments() -> frozenset[str]:
    """This user's segments whose names are those of an MPI library."""
    found = set()
    with contextlib.suppress(OSError), os.scandir(_FOLDER) as entries:
        for entry in entries:
            if entry.name.startswith(MPI_NAMES) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.add(entry.path)
    return frozenset(found)


def launchers_files() -> frozenset[str]:
    """This user's files of MPICH's launcher."""
    found = set()
    for path in Path("/tmp").glob(f"{HYDRA_FILE}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                found.add(str(path))
    return frozenset(found)


def used_files(process: Path) -> frozenset[str]:
    """Segments and launchers' files that a process has in use."""
    return mapped_segments(process) | {str(path) for path in open_files(int(process.name), HYDRA_FILE)}


def unlink_orphans(older: frozenset[str]) -> frozenset[str]:
    """Unlink MPI segments and launchers' files that no process uses, except those in `older`; returns their paths.

    A job that is starting maps its segment right after creating it, so only what is unused twice, a moment apart,
    is an orphan.
    """
    orphans = (named_segments() | launchers_files()) - older
    for pause in (0.0, 0.05):
        if orphans:
            time.sleep(pause)
            orphans -= frozenset[str]().union(*map(used_files, Path("/proc").glob("[0-9]*")))
    unlink_segments(orphans)
    return orphans
