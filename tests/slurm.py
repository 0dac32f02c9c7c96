"""A SLURM cluster on this machine, for tests: munged, slurmctld and slurmd with files, ports and keys of their own.

Knows Debian's slurm-wlm and munge, which `launch/test.sh` installs. Everything lies in one folder, which the caller
removes; the daemons are children of this process, are ended by their ids and end with it. Nothing is read from or
written to /etc or /var. Knows nothing of models and ranks.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tpcpu.parallel.lifeline import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_START_SECONDS = 60.0
_END_SECONDS = 10.0


class Cluster:
    """Daemons that run, and what a user does with them. `nodes` are the names of the nodes."""

    def __init__(self, folder: Path, nodes: int, cpus: int, memory: int) -> None:
        """Nodes of `cpus` CPUs and `memory` MB each; several share this machine's cores."""
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)] if nodes > 1 else [os.uname().nodename]
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._configure(cpus, memory)

    def _configure(self, cpus: int, memory: int) -> None:
        host = os.uname().nodename
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        ports = _free_ports(1 + len(self.nodes))
        several = len(self.nodes) > 1
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            f"SlurmUser={_user()}",
            f"SlurmdUser={_user()}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.folder}/munge/socket,cred_expire=5",  # how long a requeued job waits
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/affinity",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "JobAcctGatherType=jobacct_gather/linux",
            "JobAcctGatherFrequency=task=1",
            "MpiDefault=none",
            "ReturnToService=2",
            "MinJobAge=600",
            "KillWait=30",
            "SchedulerParameters=sched_interval=1,bf_interval=1",
            "MailProg=/bin/true",
        ]
        for name, port in zip(self.nodes, ports[1:], strict=True):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            lines.append(
                f"NodeName={name} {where} CPUs={cpus} Sockets=1 CoresPerSocket={cpus} RealMemory={memory} State=UNKNOWN"
            )
        lines.append(f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES DefMemPerNode={memory} State=UP")
        if several:
            lines.append("SlurmdParameters=config_overrides")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """All daemons; returns when every node is idle."""
        munge = self.folder / "munge"
        files = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        self._start(
            "munged", "--foreground", "--force", *(f"--{file}={munge / file.removesuffix('-file')}" for file in files)
        )
        self._until(lambda: (munge / "socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        self._until(lambda: self.command("sinfo", "-h", "-o", "%t %D").strip() == f"idle {len(self.nodes)}", "slurmd")

    def stop(self) -> None:
        """Cancels what runs, ends the daemons and what they started."""
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:
            with suppress(subprocess.SubprocessError, AssertionError):
                self.command("scancel", "--user", _user())
                self._until(lambda: not self.command("squeue", "-h"), "scancel")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # A step's own daemon outlives slurmd on purpose.
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Every process whose environment names this cluster."""
        mark, found = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def command(self, *arguments: str | Path, environ: Mapping[str, str] | None = None, seconds: float = 120) -> str:
        """What one of SLURM's programs prints; an AssertionError with its error if it fails."""
        done = self.attempt(*arguments, environ=environ, seconds=seconds)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(
        self, *arguments: str | Path, environ: Mapping[str, str] | None = None, seconds: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """The same, whatever comes of it."""
        return subprocess.run(
            [str(argument) for argument in arguments],
            env={**(environ or {"HOME": str(self.folder)}), **self.environ, **_path(environ)},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def submit(self, *arguments: str | Path, environ: Mapping[str, str]) -> str:
        """The number of a job that `sbatch` has accepted."""
        return self.command("sbatch", "--parsable", *arguments, environ=environ).strip().partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = re.findall(r"(\w+(?:/\w+)?)=(\S*)", self.command("scontrol", "show", "job", job))
        return dict(reversed(words))

    def wait(self, job: str, states: Sequence[str] = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"),
             seconds: float = 150) -> dict[str, str]:  # fmt: skip
        """The job, once it is in one of these states."""
        deadline = time.monotonic() + seconds
        while (shown := self.show(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {shown['JobState']} ({shown.get('Reason')})"
            time.sleep(0.1)
        return shown

    def _start(self, *arguments: str) -> None:
        log = (self.folder / f"{arguments[0]}-{len(self._daemons)}.out").open("wb")
        environ = {"PATH": PATH, **self.environ}
        with log:
            self._daemons.append(
                subprocess.Popen(
                    arguments,
                    env=environ,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,  # also when a time limit ends the tests
                )
            )

    def _until(self, holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with suppress(AssertionError):
                if holds():
                    return
            dead = [d.args for d in self._daemons if d.poll() is not None]
            assert not dead, f"{what}: {dead}\n{self.logs()}"
            assert time.monotonic() < deadline, f"{what}: not ready\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The ends of all logs, for the message of a failed test."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"-- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


@contextmanager
def cluster(folder: Path, nodes: int = 1, cpus: int = 2, memory: int = 4000) -> Iterator[Cluster]:
    """A running cluster, gone afterwards with all that it started."""
    made = Cluster(folder, nodes, cpus, memory)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def missing() -> list[str]:
    """The programs that this needs and that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def _path(environ: Mapping[str, str] | None) -> dict[str, str]:
    return {"PATH": f"{environ['PATH']}:{PATH}"} if environ and "PATH" in environ else {}


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
