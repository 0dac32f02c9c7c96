"""A command that is started again when a fault ended it, on the hosts that are left.

Knows processes, exit codes and hosts; must not know what the command does. Every run is under a keeper
(`keeper.py`), so that nothing of it is left when the next begins.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from tpcpu.errors import EXIT_STOPPED
from tpcpu.parallel import launcher
from tpcpu.parallel.hostfile import Host
from tpcpu.parallel.keeper import FORWARDED, end_descendants
from tpcpu.parallel.lifeline import adopt_orphans
from tpcpu.parallel.outcry import Outcry
from tpcpu.parallel.processes import stat, tree
from tpcpu.parallel.segments import launchers_files, named_segments, unlink_orphans

_FINAL = (0, 2, EXIT_STOPPED, 130)
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LOOK_SECONDS = 0.2
_PROBE_SECONDS = 20.0


@dataclass(frozen=True)
class Policy:
    """How often a command is started again, after how long a stopped one is ended, and where it runs."""

    restarts: int
    fault_timeout: float
    grace: float = 60.0
    ranks: int | None = None
    hosts: tuple[Host, ...] = ()
    """Empty: the command line starts its own ranks, if any."""


@dataclass
class Run:
    """One of the command."""

    code: int
    seconds: float
    error: str | None
    """The last line of error that it wrote."""


@dataclass
class Outcome:
    """What came of it."""

    code: int = 1
    runs: list[Run] = field(default_factory=list)
    seconds_lost: float = 0.0
    """Between runs."""

    @property
    def restarts(self) -> int:
        return max(len(self.runs) - 1, 0)


class Supervisor:
    """Runs one command to its end. For the main thread only."""

    def __init__(self, command: Sequence[str], policy: Policy, log: Callable[[str], None]) -> None:
        """`log` is called with each line of the log."""
        self._command, self._policy, self._log = list(command), policy, log
        self._hosts = list(policy.hosts)
        self._job: launcher.Job | None = None
        self._asked: int | None = None

    def run(self) -> Outcome:
        """Until it ends for good, or has been started again often enough."""
        adopt_orphans()
        outcome = Outcome()
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            while self._once(outcome):
                pass
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        restarts = f"{outcome.restarts} restart{'' if outcome.restarts == 1 else 's'}"
        self._log(f"done with exit code {outcome.code}: {restarts}, {outcome.seconds_lost:.1f} s between runs")
        return outcome

    def _once(self, outcome: Outcome) -> bool:
        """One run and what is decided after it; whether there is to be another."""
        arguments, where = self._arguments()
        self._log(f"start {len(outcome.runs) + 1}{where}: {' '.join(self._command)}")
        run = self._watch(arguments)
        outcome.runs.append(run)
        outcome.code = run.code
        self._log(
            f"ended with exit code {run.code} after {run.seconds:.1f} s" + (f": {run.error}" if run.error else "")
        )
        if run.code in _FINAL or self._asked is not None:
            return False
        if outcome.restarts >= self._policy.restarts:
            self._log(f"given up: it was started again {outcome.restarts} times, which is the limit (--restarts)")
            return False
        begin = time.monotonic()
        pause = min(_FIRST_PAUSE * 2**outcome.restarts, _LONGEST_PAUSE)
        self._log(f"starts again in {pause:.1f} s ({outcome.restarts + 1} of {self._policy.restarts})")
        goes_on = self._pause(pause) and self._find_hosts()
        outcome.seconds_lost += time.monotonic() - begin
        return goes_on

    def _arguments(self) -> tuple[list[str], str]:
        """The command line of the next run, and what the log says of where it runs."""
        if not self._hosts:
            return self._command, ""
        held = sum(host.ranks for host in self._hosts)
        ranks = min(self._policy.ranks or held, held)
        names = ", ".join(host.name for host in self._hosts)
        return launcher.command(ranks, self._command, hosts=self._hosts), f" with {ranks} ranks on {names}"

    def _watch(self, arguments: list[str]) -> Run:
        begin = time.monotonic()
        older = named_segments() | launchers_files()
        job = self._job = launcher.Job(
            arguments, self._policy.grace, {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        )
        outcry = Outcry(job.process.stderr)
        stopped: dict[int, float] = {}
        looked = begin
        while (code := job.poll()) is None:
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() - looked > self._policy.fault_timeout / 10:
                looked = time.monotonic()
                self._end_stopped(job, stopped, looked)
        self._job = None
        end_descendants()
        if code:
            # what a keeper that was killed could not take away, and what came into its folder after its end
            unlink_orphans(older)
            job.poll()
        errors = outcry.errors()
        return Run(code, time.monotonic() - begin, errors[-1] if errors else None)

    def _end_stopped(self, job: launcher.Job, stopped: dict[int, float], now: float) -> None:
        """Kill the whole run if one of its processes has been stopped for longer than the ranks take to notice."""
        below = tree(os.getpid())
        for pid in [pid for pid in stopped if pid not in below]:
            del stopped[pid]
        for pid in below:
            found = stat(pid)
            if found is None or not found.is_stopped:
                stopped.pop(pid, None)
            elif now - stopped.setdefault(pid, now) > self._policy.fault_timeout:
                self._log(f"process {pid} ({found.name}) is stopped and does not go on: all of this run is killed")
                job.process.kill()
                job.process.wait()
                return

    def _find_hosts(self) -> bool:
        """Leave out the hosts on which nothing can be started now; whether there are any."""
        if not self._policy.hosts:
            return True
        answers: dict[str, bool] = {}

        def probe(host: Host) -> None:
            answers[host.name] = _answers(host)

        probes = [threading.Thread(target=probe, args=(host,), daemon=True) for host in self._policy.hosts]
        for each in probes:
            each.start()
        for each in probes:
            each.join(_PROBE_SECONDS + launcher.GRACE_SECONDS)
        self._hosts = [host for host in self._policy.hosts if answers.get(host.name)]
        for host in self._policy.hosts:
            if host not in self._hosts:
                self._log(f"host {host.name} does not answer, and is left out")
        if not self._hosts:
            self._log("given up: no host answers")
        return bool(self._hosts) and self._asked is None

    def _pause(self, seconds: float) -> bool:
        """Wait; False if asked to end meanwhile."""
        deadline = time.monotonic() + seconds
        while self._asked is None and time.monotonic() < deadline:
            time.sleep(min(_LOOK_SECONDS, max(deadline - time.monotonic(), 0.0)))
        return self._asked is None

    def _forward(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number in _ASKING:
            self._asked = number
        if self._job is not None:
            self._job.send_signal(number)


def _answers(host: Host) -> bool:
    """Whether a rank can be started there."""
    arguments = launcher.command(1, ["true"], hosts=[host])
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with launcher.Job(arguments, 1.0, quiet) as job:
        try:
            return job.wait(_PROBE_SECONDS) == 0
        except subprocess.TimeoutExpired:
            return False
