"""Launchers: finding one, its flags, and that nothing survives a job, however it or its starter ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tpcpu.errors import LaunchError
from tpcpu.parallel import launcher
from tpcpu.parallel.announcement import INTEL, MPICH, OPEN_MPI
from tpcpu.parallel.segments import named_segments

PROJECT = Path(__file__).parents[2]


def fake_mpiexec(folder: Path, version: str, code: int = 0) -> Path:
    """An mpiexec that answers `--version` with this line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mpiexec"
    path.write_text(f"#!/bin/sh\necho '{version}'\nexit {code}\n")
    path.chmod(0o755)
    return path


class TestFinding:
    """Beside the interpreter first, then PATH."""

    @pytest.mark.parametrize(
        ("version", "kind"),
        [
            ("HYDRA build details:", MPICH),
            ("mpiexec (Open MPI) 5.0.11", OPEN_MPI),
            ("mpirun (Open MPI) 4.1.6", OPEN_MPI),
            ("Intel(R) MPI Library for Linux* OS, Version 2021.18.1", INTEL),
            ("something else", None),
        ],
    )
    def test_kinds(self, tmp_path: Path, version: str, kind: str | None) -> None:
        path = fake_mpiexec(tmp_path, version)
        assert launcher.find_mpiexec({"PATH": ""}, str(tmp_path / "python")) == launcher.Mpiexec(path, kind)

    def test_the_environments_own_comes_first(self, tmp_path: Path) -> None:
        own = fake_mpiexec(tmp_path / "own", "HYDRA")
        other = fake_mpiexec(tmp_path / "other", "mpiexec (Open MPI) 5")
        environ = {"PATH": f"/nowhere:{other.parent}"}
        assert launcher.find_mpiexec(environ, str(own.parent / "python")).path == own
        assert launcher.find_mpiexec(environ, "/nowhere/python").path == other

    def test_a_broken_one_is_passed_over(self, tmp_path: Path) -> None:
        broken = fake_mpiexec(tmp_path / "broken", "library not found", code=127)
        whole = fake_mpiexec(tmp_path / "whole", "HYDRA")
        environ = {"PATH": str(whole.parent)}
        assert launcher.find_mpiexec(environ, str(broken.parent / "python")).path == whole
        with pytest.raises(LaunchError, match="does not answer --version"):
            launcher.find_mpiexec({"PATH": ""}, str(broken.parent / "python"))

    def test_none(self) -> None:
        with pytest.raises(LaunchError, match=r"no mpiexec .* pip install 'tpcpu\[mpich\]'"):
            launcher.find_mpiexec({"PATH": "/nowhere"}, "/nowhere/python")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (MPICH, ["-bind-to", "none"]),
        (INTEL, ["-genv", "I_MPI_PIN", "0"]),
        (OPEN_MPI, ["--bind-to", "none", "--oversubscribe", "--allow-run-as-root"]),
        (None, []),
    ],
)
def test_flags(monkeypatch: pytest.MonkeyPatch, kind: str | None, flags: list[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mpiexec = launcher.Mpiexec(Path("/opt/mpiexec"), kind)
    assert launcher.command(3, ["python", "-V"], mpiexec) == ["/opt/mpiexec", *flags, "-n", "3", "python", "-V"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "--allow-run-as-root" not in launcher.command(3, ["python"], mpiexec)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(LaunchError, match="at least 1"):
        launcher.command(0, ["python"])


def have_mpiexec() -> bool:
    """Is there a real launcher?"""
    try:
        launcher.find_mpiexec()
    except LaunchError:
        return False
    return True


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Does the condition come true in time?"""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    """Does this process exist and is not just waiting to be collected?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ranks write their process number when they are ready; `connect` is what tpcpu's commands do first
SLEEPER = """
import os, signal, sys, time
from pathlib import Path
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "connect" in sys.argv:
    from tpcpu.parallel.communicator import connect
    communicator = connect()
    communicator.barrier()
Path(sys.argv[1], str(os.getpid())).touch()
print("TMPDIR", os.environ["TMPDIR"], flush=True)
time.sleep(120)
"""


@pytest.mark.skipif(not have_mpiexec(), reason="there is no mpiexec")
class TestJobs:
    """Real jobs of two ranks."""

    @pytest.fixture
    def ready(self, tmp_path: Path) -> Path:
        """The folder in which ranks report."""
        folder = tmp_path / "ready"
        folder.mkdir()
        return folder

    @pytest.fixture(autouse=True)
    def _nothing_left(self, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """After each job: no rank, no segment, no temporary folder."""
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        monkeypatch.setenv("TMPDIR", str(scratch))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("PYTHONPATH", str(PROJECT))
        before = named_segments()
        yield
        assert eventually(lambda: not any(is_running(int(path.name)) for path in ready.iterdir()))
        assert eventually(lambda: not list(scratch.iterdir())), list(scratch.iterdir())
        assert eventually(lambda: named_segments() <= before)

    def sleeper(self, ready: Path, *words: str) -> list[str]:
        return [sys.executable, "-c", SLEEPER, str(ready), *words]

    def ranks(self, ready: Path) -> list[int]:
        assert eventually(lambda: len(list(ready.iterdir())) == 2, 20)
        return [int(path.name) for path in ready.iterdir()]

    def test_output_and_exit_code(self) -> None:
        program = "import sys; print('answer'); sys.exit(3)"
        with launcher.start(2, [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as job:
            output, _ = job.process.communicate(timeout=30)
            assert job.wait() == 3
        assert output.count("answer") >= 1

    def test_a_private_temporary_folder(self, ready: Path) -> None:
        with launcher.start(2, self.sleeper(ready), stdout=subprocess.PIPE, text=True) as job:
            self.ranks(ready)
            line = job.process.stdout.readline()
            folder = Path(line.split()[1])
            assert folder.name.startswith("tpcpu-")
            assert folder.is_dir()
            assert job.poll() is None
        job.process.stdout.close()
        assert not folder.exists()

    def test_stop(self, ready: Path) -> None:
        with launcher.start(2, self.sleeper(ready, "connect"), stdout=subprocess.DEVNULL) as job:
            ranks = self.ranks(ready)
            started = time.monotonic()
            assert job.stop() != 0
            assert time.monotonic() - started < 2
            assert not any(map(is_running, ranks))

    def test_stop_ends_ranks_that_will_not(self, ready: Path) -> None:
        with launcher.start(2, self.sleeper(ready, "stubborn"), grace=0.5, stdout=subprocess.DEVNULL) as job:
            self.ranks(ready)
            started = time.monotonic()
            job.stop()
            assert time.monotonic() - started < 3

    def test_a_killed_rank_ends_the_job(self, ready: Path) -> None:
        with launcher.start(2, self.sleeper(ready, "connect"), stdout=subprocess.DEVNULL) as job:
            os.kill(self.ranks(ready)[0], signal.SIGKILL)
            assert job.wait(10) != 0

    def test_the_keeper_is_killed(self, ready: Path) -> None:
        with launcher.start(2, self.sleeper(ready, "connect"), stdout=subprocess.DEVNULL) as job:
            self.ranks(ready)
            job.process.kill()
            assert job.wait(10) == 128 + signal.SIGKILL

    def test_a_job_that_nobody_holds_ends(self, ready: Path) -> None:
        job = launcher.start(2, self.sleeper(ready), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = job.process
        self.ranks(ready)
        job._lifeline.close()
        assert process.wait(10) != 0

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_the_starter_ends(self, ready: Path, number: int) -> None:
        program = "import sys; from tpcpu.parallel import launcher; sys.exit(launcher.run(2, sys.argv[1:]))"
        arguments = [sys.executable, "-c", program, *self.sleeper(ready, "connect")]
        starter = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ranks = self.ranks(ready)
        starter.send_signal(number)
        assert starter.wait(10) != 0
        assert eventually(lambda: not any(map(is_running, ranks)))
