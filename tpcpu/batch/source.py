"""The input file: surveyed once, then read line by line, however many lines it has.

Knows bytes and lines, and notices when the file is not what it was. What a line says is for `lines`.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tpcpu.errors import OutputError, UsageError

MOST_BYTES = 64 << 20
"""Of one line."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Source:
    """Numbered lines of a file. `digest` is of all its bytes; `lines` counts those that hold something."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError for what is no readable file."""
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115  kept open: the name may come to mean another file
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise UsageError(f"--input {path}: is no regular file; a restart could not read it again")
            self.lines = sum(1 for _ in self._read())
        except OSError as error:
            raise UsageError(f"--input {path}: cannot be read: {error.strerror}") from None
        self.digest = self._digest

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """(number, line), from 1, without blank ones; None where it is too long. Raises OutputError for another file.

        That the file has changed shows at its end.
        """
        yield from self._read()
        if self._digest != self.digest:
            raise OutputError(
                f"--input {self.path}: changed while it was being read, so the answers belong to neither version; "
                "run again with --restart"
            )

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def _read(self) -> Iterator[tuple[int, bytes | None]]:
        digest = hashlib.sha256()
        self._file.seek(0)
        number = 0
        while line := self._file.readline(MOST_BYTES):
            number += 1
            digest.update(line)
            fits = True
            while not line.endswith(b"\n") and (line_rest := self._file.readline(MOST_BYTES)):
                fits = False
                digest.update(line_rest)
                line = line_rest
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not fits or line.strip():
                yield number, line if fits else None
        self._digest = digest.hexdigest()
