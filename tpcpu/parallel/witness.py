"""The witness of a host: sees which of its ranks dies, stops or is stuck, says so in one line, and ends the others.

A launcher kills the survivors of a rank within milliseconds, before they can speak, and leaves a stopped rank alone for
ever. So this process, which no launcher knows, watches: ranks and the launchers above them through pidfds and /proc,
the operation that a rank is in through its pulse, the other hosts through their witnesses. Started by `guardian.py`;
knows processes and words, must not know MPI or models, and imports no numpy: it has to be there at once.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tpcpu.parallel import processes
from tpcpu.parallel.neighbours import Message, Neighbour, Neighbours
from tpcpu.parallel.pulse import Pulse
from tpcpu.parallel.segments import HYDRA_FILE, MPI_NAMES, mapped_segments, unlink_segments
from tpcpu.parallel.watched import Process, Rank

SHARE = 0.6
"""Of the time allowed for a fault to become an error: after so much of it a silent process counts as lost."""

_MOMENT = 0.1
"""What happens within it may have one cause, which came first."""
_BETWEEN_HOSTS = 0.3
"""The same where news of the cause may come from another host."""
_TOLD_SECONDS = 2.0
"""How long ranks may take to end after one of them has said what is wrong."""
_JOIN_SECONDS = 60.0
_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""MPICH's description of the machine, which its launcher holds open, and removes when it ends."""


@dataclass
class _Fault:
    """When it came to be, in this host's time, and how it is told; nothing is told of what was asked for."""

    time: float
    text: str
    process: Process | None = None


class Witness:
    """Of the ranks of one host."""

    def __init__(self, config: Message, listener: socket.socket, others: socket.socket) -> None:
        self._name, self._host, self._expected = config["name"], config["host"], config["ranks"]
        self._limit = SHARE * config["timeout"]
        self._beat = min(1.0, self._limit / 6)
        self._selector = selectors.DefaultSelector()
        self._ranks: dict[int, Rank] = {}
        self._launchers: dict[int, Process] = {}
        self._launcher_errors: list[int] = []
        self._faults: list[_Fault] = []
        self._deadline = float("inf")
        self._told = False
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._join(listener))
        hosts = [Neighbour(*each) for each in config["others"]]
        self._neighbours = Neighbours(self._host, config["secret"], others, hosts, self._selector, self._hear)
        self._hydra: set[Path] = set()
        self._sessions: set[Path] = set()

    def run(self) -> None:
        """Until all ranks have left or there was a fault."""
        began = looked = time.monotonic()
        while not self._is_done(began):
            now = time.monotonic()
            if now >= self._deadline:
                break
            wait = max(0.0, min(looked + self._beat, self._deadline) - now)
            for key, _ in self._selector.select(wait):
                key.data()
            now = time.monotonic()
            if now - looked >= self._beat:
                # a host that stood still as a whole has not seen what it should have
                self._look(now, stood_still=now - looked > self._beat + self._limit / 2)
                looked = now
        if self._faults or self._told:
            self._end()
        self._neighbours.send({"bye": True})

    def _is_done(self, began: float) -> bool:
        if len(self._ranks) < self._expected:
            return time.monotonic() - began > _JOIN_SECONDS and not any(r.alive for r in self._ranks.values())
        if self._faults:
            return False
        return all(rank.has_left or not rank.alive for rank in self._ranks.values())

    # Who is watched

    def _join(self, listener: socket.socket) -> None:
        """A rank calls, with its pulse and itself as descriptors."""
        connection, _ = listener.accept()
        if processes.user(connection) != os.getuid():
            connection.close()  # the socket's name can be read, and called, by all users of the host
            return
        text, (memory, pidfd), _, _ = socket.recv_fds(connection, 1 << 16, 2)
        hello = json.loads(text)
        pid, number = hello["pid"], hello["rank"]
        pulse = Pulse(memory)
        pulse.witness_beats()
        title = f"rank {number} on {self._name} (pid {pid})"
        rank = Rank(
            pid, pidfd, title, rank=number, pulse=pulse, segments=tuple(hello["segments"]),
            memory=processes.Memory(pid),
        )  # fmt: skip
        self._ranks[number] = rank
        self._sessions.add(Path(hello["session"]))
        self._watch(rank)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._listen(rank, connection))
        for launcher, name in processes.launchers(pid).items():
            if launcher not in self._launchers:
                with contextlib.suppress(OSError):
                    what = f"the launcher {name} on {self._name} (pid {launcher})"
                    self._launchers[launcher] = Process(launcher, os.pidfd_open(launcher), what)
                    self._watch(self._launchers[launcher])
                    self._hydra.update(processes.open_files(launcher, HYDRA_FILE))
                    place = processes.standard_error(launcher, self._launchers[launcher].pidfd)
                    # the one that was started first is the one that somebody reads
                    self._launcher_errors[:0] = [] if place is None else [place]

    def _watch(self, process: Process) -> None:
        self._selector.register(process.pidfd, selectors.EVENT_READ, lambda: self._ended(process))

    def _listen(self, rank: Rank, connection: socket.socket) -> None:
        """What a rank says: that it leaves, or that it has said itself why the job ends."""
        try:
            word = connection.recv(16)
        except OSError:
            word = b""
        if word == b"bye":
            rank.has_left = True
        elif word == b"told":
            rank.has_left = True
            self._end_told()
            self._neighbours.send({"told": True})
        else:
            self._selector.unregister(connection)
            connection.close()

    def _ended(self, process: Process) -> None:
        self._selector.unregister(process.pidfd)
        process.alive = False
        if isinstance(process, Rank):
            if not process.has_left:
                self._fault(time.monotonic(), f"{process.title} died {process.pulse.where()}", process)
        elif not all(rank.has_left for rank in self._ranks.values()):
            self._fault(time.monotonic(), f"{process.title} died ({self._wheres(self._living())})", process)
        if self._told and not any(rank.alive for rank in self._ranks.values()):
            self._deadline = 0.0

    # What is wrong

    def _fault(self, when: float, text: str, process: Process | None = None) -> None:
        if self._told:
            return
        first = not self._faults
        self._faults.append(_Fault(when, text, process))
        if first:
            self._deadline = time.monotonic() + (_BETWEEN_HOSTS if self._neighbours.others else _MOMENT)
        self._neighbours.send({"fault": text, "when": when})

    def _end_told(self) -> None:
        if not self._told:
            self._told = True
            self._deadline = time.monotonic() + _TOLD_SECONDS
            # There is nothing more to say. While it is open the launcher waits for the end of what the rank writes that
            # it was inherited from, and may take a rank that it has killed for the first to end.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)

    def _hear(self, other: Neighbour, message: Message | None) -> None:
        if message is None:
            if not other.has_left:
                self._fault(time.monotonic(), f"{other.title} is lost: its witness died")
        elif "fault" in message:
            self._fault(message["when"] + other.ahead, message["fault"])
        elif "told" in message:
            self._end_told()
        elif "bye" in message:
            other.has_left = True
        else:
            other.news = message

    def _look(self, now: float, *, stood_still: bool) -> None:
        """About once a second: who has stopped, who shows no life, whom nothing is heard of."""
        ranks = self._living()
        for rank in self._ranks.values():
            rank.pulse.witness_beats()
        for process in [*ranks, *(each for each in self._launchers.values() if each.alive)]:
            self._look_at(process, now, stood_still)
        stuck = bool(ranks) and all(rank.stands_still(now, self._limit) for rank in ranks)
        self._neighbours.send({"stuck": stuck})
        others = [each for each in self._neighbours.others.values() if not each.has_left]
        for other in others:
            if stood_still and other.connection is not None:
                other.heard = now
            elif other.connection is not None and now - other.heard > self._limit:
                self._fault(other.heard, f"{other.title} does not answer, while {self._wheres(ranks)}")
        if stuck and all(each.news.get("stuck") for each in others) and not stood_still:
            self._fault(now, f"no rank gets on: {self._wheres(ranks)} for {self._limit:.1f} s")

    def _look_at(self, process: Process, now: float, stood_still: bool) -> None:
        stat = processes.stat(process.pid)
        if stat is None:
            return
        process.see(stat, now, anew=stood_still)
        where = f" {process.pulse.where()}" if isinstance(process, Rank) else ""
        if process.stopped is not None:
            if now - process.stopped > self._limit - self._beat:
                beside = where or f" ({self._wheres(self._living())})"
                self._fault(process.stopped, f"{process.title} was stopped{beside} and does not go on", process)
        elif where and now - process.changed > self._limit:
            self._fault(process.changed, f"{process.title} shows no life{where}", process)

    def _living(self) -> list[Rank]:
        return [rank for _, rank in sorted(self._ranks.items()) if rank.alive and not rank.has_left]

    def _wheres(self, ranks: list[Rank]) -> str:
        return ", ".join(f"rank {rank.rank} {rank.pulse.where()}" for rank in ranks[:3])

    # The end

    def _end(self) -> None:
        """Tell what came first, end what is left of the job on this host, and take away what it leaves behind."""
        first = min(self._faults, key=self._weight, default=None)
        if first is not None and (text := self._words(first)) and self._is_speaker():
            self._say(f"tpcpu: error: {text}\n")
        segments: set[str] = set()
        for rank in self._ranks.values():
            segments |= {*rank.segments, *mapped_segments(Path(f"/proc/{rank.pid}"))}
        stopped = [each for each in self._launchers.values() if each.stopped is not None]
        for process in [*self._ranks.values(), *stopped]:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
        unlink_segments(path for path in segments if Path(path).name.startswith(MPI_NAMES))
        self._remove_files(stopped)

    def _say(self, line: str) -> None:
        """On standard error, or on the launcher's where the launcher will not pass on any more what is written here."""
        places = [2]
        if any(not each.alive or each.stopped is not None for each in self._launchers.values()):
            places = [*self._launcher_errors, 2]
        for place in places:
            with contextlib.suppress(OSError):
                os.write(place, line.encode())
                return

    def _words(self, fault: _Fault) -> str:
        """The fault, with how its process ended, where that is known; nothing where it ended by request."""
        process = fault.process
        if process is None or process.alive:
            return fault.text
        code = self._ending(process)
        if code is not None and -code in _ASKED:
            return ""
        told = processes.describe_ending(code)
        if isinstance(process, Rank) and (limit := process.memory.exceeded()):
            told = f"was killed for want of memory: {limit};"
        return fault.text.replace(f"{process.title} died", f"{process.title} {told}", 1)

    def _weight(self, fault: _Fault) -> tuple[bool, float]:
        """What came first; but a launcher that ends by itself does so over the end of another process.

        Or by SIGPIPE: Intel MPI's proxy ends so, and at times before its mpiexec, whose end it is over, has ended.
        """
        is_launcher = fault.process is not None and not isinstance(fault.process, Rank) and not fault.process.alive
        code = self._ending(fault.process) if is_launcher and fault.process is not None else None
        return is_launcher and (code is None or code >= 0 or -code == signal.SIGPIPE), fault.time

    def _ending(self, process: Process) -> int | None:
        """How it ended, which is known once its parent has collected it."""
        deadline = time.monotonic() + _MOMENT
        while (code := processes.ending(process.pid, process.pidfd)) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return code

    def _is_speaker(self) -> bool:
        """One line a job: the witness of rank 0's host tells it, unless it cannot be reached."""
        root = self._neighbours.others.get(0)
        return root is None or root.connection is None or time.monotonic() - root.heard > self._limit / 2

    def _remove_files(self, stopped: list[Process]) -> None:
        """What a launcher removes at its end, if it came to none."""
        dead = [each for each in self._launchers.values() if not each.alive or each in stopped]
        if not dead:
            return
        for path in self._hydra:
            path.unlink(missing_ok=True)
        for each in dead:
            # Open MPI's launchers put their number into the name of the folder that they share with their ranks.
            for folder in self._sessions:
                if folder.name.endswith(f".{each.pid}"):
                    shutil.rmtree(folder, ignore_errors=True)
        temporary = Path(os.environ.get("TMPDIR", ""))
        if temporary.name.startswith("tpcpu-") and any("keeper" in each.title for each in dead):
            time.sleep(_MOMENT)
            shutil.rmtree(temporary, ignore_errors=True)


def main() -> NoReturn:
    """`LISTENER OTHERS` as descriptors, the rest on standard input."""
    # An orphan at once: not a child that a rank would have to collect, nor one of the launcher's group.
    if os.fork():
        os._exit(0)
    os.chdir("/")
    for number in (*_ASKED, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    config: dict[str, Any] = json.load(sys.stdin)
    sys.stdin.close()
    listener, others = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    Witness(config, listener, others).run()
    sys.stderr.flush()
    # without waiting for threads that call other hosts
    os._exit(0)
