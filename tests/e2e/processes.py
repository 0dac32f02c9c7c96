"""Programs in child processes with all that they start: found by a mark in their environment, and judged at the end."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.flavours import ALLOWED, CROWDED, LAUNCHER_VARIABLES, rank_in, variables_of
from tpcpu.parallel.segments import mapped_segments, named_segments

PROJECT = Path(__file__).parents[2]
SECONDS = 240  # the first program on a machine compiles the kernels


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher told it, and with the mpiexec beside this Python first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}
    return {**kept, **paths, **ALLOWED, **CROWDED, **more}


class Family:
    """A program and all the processes that come of it."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path, **options: object) -> None:
        self._mark = f"TPCPU_TEST_FAMILY={secrets.token_hex(8)}".encode()
        name, _, value = self._mark.decode().partition("=")
        self._segments = named_segments()
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments],
            env=environment(**{name: value, "TMPDIR": str(self.temporary)}),
            cwd=folder,
            start_new_session=True,
            encoding="utf-8",
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def members(self) -> dict[int, str]:
        """Living processes and their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # gone, or another user's
        return found

    def ranks(self) -> list[int]:
        """The processes that a launcher started, by rank."""
        ranks = {rank: number for number in self.members() if (rank := rank_in(variables_of(number))) is not None}
        return [ranks[rank] for rank in sorted(ranks)]

    def say_until(self, word: str) -> None:
        """Reads standard output until a line that begins with `word`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return
        raise AssertionError(f"the program ended before it said {word}: {self.process.communicate()[1]}")

    def end(self) -> tuple[int, str, str]:
        """Waits for the program; its exit code, what was left on standard output, and standard error."""
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err

    def assert_nothing_left(self, seconds: float = 10.0) -> None:
        """No process, no segment in shared memory, no temporary file, within so many seconds."""
        eventually(lambda: self.members() == {}, seconds, lambda: f"still there: {self.members()}")
        eventually(lambda: not self._new_segments(), seconds, lambda: f"in /dev/shm: {self._new_segments()}")
        eventually(lambda: not self._files(), seconds, lambda: f"temporary files: {self._files()}")

    def _new_segments(self) -> frozenset[str]:
        """Those of other programs, which still map theirs, are not ours: the processes of this one are gone."""
        new = named_segments() - self._segments
        return new.difference(*map(mapped_segments, Path("/proc").glob("[0-9]*"))) if new else new

    def _files(self) -> list[Path]:
        return list(self.temporary.iterdir())

    def kill(self) -> None:
        for number in self.members():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.communicate()


@contextmanager
def family(arguments: Sequence[str | Path], folder: Path, **options: object) -> Iterator[Family]:
    """A program that is killed with all its children if the test fails."""
    started = Family(arguments, folder, **options)
    try:
        yield started
    finally:
        started.kill()


def eventually(holds: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, told()
        time.sleep(0.02)
