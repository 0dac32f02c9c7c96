"""Writing so that it is on disk: whole pieces, names that last, and what tells that there is no room.

Knows files; nothing of what stands in them.
"""

import errno
import os
from pathlib import Path

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a full disk, or of the user's part of it."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Error numbers of a file system that knows no locks."""


def write_all(file: int, data: bytes | memoryview, position: int) -> None:
    """All of it, at a place in an open file. Raises OSError."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def sync(path: Path) -> None:
    """A file's contents, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
