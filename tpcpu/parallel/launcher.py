"""Starting ranks: the right `mpiexec`, its flags, and an end that leaves nothing behind.

Knows launchers and processes; must not import or start MPI, and does not know what the ranks will do.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tpcpu.errors import LaunchError
from tpcpu.parallel.announcement import INTEL, MPICH, OPEN_MPI, announced
from tpcpu.parallel.hostfile import Host
from tpcpu.parallel.keeper import FORWARDED

GRACE_SECONDS = 5.0
"""How long ranks may take to end by themselves after SIGTERM before they are killed."""

_PACKAGE_PARENT = Path(__file__).parents[2]
_KEEPER = "import sys; sys.path.insert(0, {!r}); from tpcpu.parallel import keeper; keeper.main()"


@dataclass(frozen=True)
class Mpiexec:
    """A launcher: where it is, and whose (one of the names in `announcement.py`, None if not known)."""

    path: Path
    kind: str | None


def in_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Was this process started by an MPI launcher or as a task of srun?"""
    return announced(environ) is not None


def find_mpiexec(environ: Mapping[str, str] = os.environ, executable: str = sys.executable) -> Mpiexec:
    """The environment's own `mpiexec`, beside `executable`, else the first on PATH; LaunchError if there is none.

    One that does not answer `--version` is passed over: the wheels of two MPIs overwrite each other's files.
    """
    beside = str(Path(executable).parent)
    failed = []
    for folder in dict.fromkeys([beside, *environ.get("PATH", os.defpath).split(os.pathsep)]):
        path = Path(folder or ".") / "mpiexec"
        if not os.access(path, os.X_OK) or path.is_dir():
            continue
        try:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            failed.append(str(path))
            continue
        if answer.returncode == 0:
            return Mpiexec(path, _kind(answer.stdout + answer.stderr))
        failed.append(str(path))
    broken = f" that works ({', '.join(failed)} does not answer --version)" if failed else ""
    raise LaunchError(
        f"there is no mpiexec{broken} beside {executable} or on PATH; pip install 'tpcpu[mpich]', or load your site's "
        "MPI module; one rank (--ranks 1) needs none"
    )


def command(ranks: int, argv: Sequence[str], mpiexec: Mpiexec | None = None, hosts: Sequence[Host] = ()) -> list[str]:
    """The command line that runs `argv` as `ranks` ranks, unbound: ranks pin their own threads (`topology.py`).

    On `hosts` in their order, each with the ranks that it holds; without any, here.
    """
    if ranks < 1:
        raise LaunchError(f"{ranks} ranks cannot be started; at least 1 is needed")
    mpiexec = mpiexec or find_mpiexec()
    flags: list[str] = []
    if mpiexec.kind == OPEN_MPI:
        flags = ["--bind-to", "none", "--oversubscribe"]
        if os.geteuid() == 0:
            flags.append("--allow-run-as-root")
    elif mpiexec.kind == MPICH:
        flags = ["-bind-to", "none"]
    elif mpiexec.kind == INTEL:
        flags = ["-genv", "I_MPI_PIN", "0"]
    if hosts:
        listed = ",".join(f"{host.name}:{host.ranks}" for host in hosts)
        flags += ["--host" if mpiexec.kind == OPEN_MPI else "-hosts", listed]
    return [str(mpiexec.path), *flags, "-n", str(ranks), *argv]


class Job:
    """Ranks that were started here. As a context manager it stops them on leaving.

    They also end when this object is dropped or this process dies, however it dies.
    """

    def __init__(self, arguments: Sequence[str], grace: float, options: Mapping[str, Any]) -> None:
        """Start the command line `arguments`; `options` are subprocess.Popen's."""
        self._folder = tempfile.mkdtemp(prefix="tpcpu-")
        self._grace = grace
        # the keeper holds the reading end: it reads end of file when we are gone
        reading, writing = os.pipe()
        self._lifeline = os.fdopen(writing, "wb", buffering=0)
        keeper = [sys.executable, "-I", "-c", _KEEPER.format(str(_PACKAGE_PARENT))]
        try:
            self.process: subprocess.Popen[Any] = subprocess.Popen(
                [*keeper, str(reading), str(grace), self._folder, *arguments],
                start_new_session=True,
                pass_fds=(reading,),
                **options,
            )
        except BaseException:
            self._lifeline.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            os.close(reading)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def poll(self) -> int | None:
        """The exit code once all ranks have ended, None before."""
        return self._ended(self.process.poll())

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of all ranks and return the launcher's exit code (128 + number after a signal)."""
        code = self._ended(self.process.wait(timeout))
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Pass a signal to the ranks; SIGTERM and SIGHUP also start the grace period, after which they are killed."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """End all ranks, at most `grace` and three seconds from now, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(self._grace + 3.0)
            except subprocess.TimeoutExpired:
                # the keeper itself is stuck: launcher and ranks die with it
                self.process.kill()
        return self.wait()

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Inside, the signals that this process receives go to the ranks instead. For the main thread only."""

        def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ended(self, code: int | None) -> int | None:
        if code is None:
            return None
        self._lifeline.close()
        # the keeper has removed it, unless it was killed
        shutil.rmtree(self._folder, ignore_errors=True)
        return code if code >= 0 else 128 - code


def start(ranks: int, argv: Sequence[str], *, grace: float = GRACE_SECONDS, **popen: Any) -> Job:
    """Start `argv` as `ranks` ranks and return at once; `popen` are subprocess.Popen's arguments (env, cwd, stdout…).

    Raises LaunchError if there is no `mpiexec`.
    """
    mpiexec = find_mpiexec(popen.get("env") or os.environ)
    return Job(command(ranks, argv, mpiexec), grace, popen)


def run(ranks: int, argv: Sequence[str], **popen: Any) -> int:
    """Start ranks, pass this process' signals on to them, and return their exit code. For the main thread only."""
    with start(ranks, argv, **popen) as job, job.forwarding():
        return job.wait()


def _kind(version: str) -> str | None:
    for words, kind in (("Open MPI", OPEN_MPI), ("OpenRTE", OPEN_MPI), ("Intel(R) MPI", INTEL), ("HYDRA", MPICH)):
        if words in version:
            return kind
    return None
