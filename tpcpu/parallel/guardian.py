"""A rank under watch: it starts or calls the witness of its host, shows that it is alive, and watches the witness.

Knows the witness's socket and the pulse; must not know MPI, by which ranks learn of one another's sockets. A rank
whose witness died or stopped ends, as nobody would see to it that the job comes to an end.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcpu.parallel.neighbours import addresses, listen
from tpcpu.parallel.processes import stat
from tpcpu.parallel.pulse import Pulse
from tpcpu.parallel.witness import SHARE

_PACKAGE_PARENT = Path(__file__).parents[2]
_WITNESS = "import sys; sys.path.insert(0, {!r}); from tpcpu.parallel import witness; witness.main()"

_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "SLURM_", "HYDRA", "MPI_LOCAL")

_SPEAK_SECONDS = 0.3
"""For the rank that says what is wrong; the launcher ends it with the first of the others."""


class Post:
    """Where the witness of this host will be found. Made by the host's first rank, before the ranks meet."""

    def __init__(self, host: str) -> None:
        self.offer: dict[str, Any] = {"name": f"tpcpu-{secrets.token_hex(16)}", "secret": secrets.token_hex(16)}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.offer['name']}")
        self._listener.listen(1024)
        self._others = listen()
        self.offer |= {"port": self._others.getsockname()[1], "addresses": addresses(host)}

    def start(
        self, hosts: Sequence[str], host_of: Sequence[int], offers: Sequence[dict[str, Any]], timeout: float
    ) -> "subprocess.Popen[bytes]":
        """Start it; `offers` are those of all hosts. The process returned ends soon: the witness is an orphan."""
        here = next(number for number, offer in enumerate(offers) if offer["name"] == self.offer["name"])
        ranks = [[rank for rank, host in enumerate(host_of) if host == number] for number in range(len(hosts))]
        others = [
            (number, hosts[number], ranks[number], offers[number]) for number in range(len(hosts)) if number != here
        ]
        config = {
            "name": hosts[here], "host": here, "ranks": len(ranks[here]), "timeout": timeout,
            "secret": offers[0]["secret"], "others": others,
        }  # fmt: skip
        descriptors = (self._listener.fileno(), self._others.fileno())
        code = _WITNESS.format(str(_PACKAGE_PARENT))
        # It is no rank: nobody is to take it for one by what a launcher has told this process.
        environ = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, *map(str, descriptors)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=descriptors,
            env=environ,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(config).encode())
        process.stdin.close()
        self._listener.close()
        self._others.close()
        return process


@dataclass(frozen=True)
class Watched:
    """The rank that is watched."""

    rank: int
    host: str
    speaks: bool
    """Whether it is the one that says that the witness is gone."""


class Guardian:
    """This rank's side of being watched. There is one in a process."""

    def __init__(self, watched: Watched, name: str, timeout: float, segments: Sequence[str]) -> None:
        """Call the witness at `name`, OSError if it is not on this host. `segments`: what this rank's MPI has named."""
        self.pulse = Pulse()
        self._watched, self._limit = watched, SHARE * timeout
        self._beat = min(0.5, self._limit / 6)
        self._leaving = False
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(f"\0{name}")
        hello = {
            "rank": watched.rank, "pid": os.getpid(), "segments": list(segments),
            "session": os.environ.get("PMIX_SERVER_TMPDIR", ""),
        }  # fmt: skip
        pidfd = os.pidfd_open(os.getpid())
        try:
            socket.send_fds(self._connection, [json.dumps(hello).encode()], [self.pulse.descriptor, pidfd])
        finally:
            os.close(pidfd)
        self._process = os.getpid()

    def start(self, starter: "subprocess.Popen[bytes] | None") -> None:
        """Begin to beat; `starter` is what started the witness, if this rank did."""
        threading.Thread(target=self._guard, args=(starter,), daemon=True, name="tpcpu-guardian").start()

    def goodbye(self) -> None:
        """This rank leaves its job, as all others do."""
        self._say(b"bye")

    def told(self) -> None:
        """This rank has said why the job ends, and ends it."""
        self._say(b"told")

    def _say(self, word: bytes) -> None:
        if os.getpid() == self._process:
            self._leaving = True
            with contextlib.suppress(OSError):
                self._connection.send(word)

    def _guard(self, starter: "subprocess.Popen[bytes] | None") -> None:
        if starter is not None:
            starter.wait()
        beats, changed, before = self.pulse.witness[1], time.monotonic(), time.monotonic()
        stopped = False
        while True:
            gone = select.select([self._connection], [], [], self._beat)[0]
            if self._leaving:
                return
            if gone:
                self._end("died")
            self.pulse.beat()
            now = time.monotonic()
            # who was stopped for a while has not seen what it should have
            if self.pulse.witness[1] != beats or now - before > self._beat + self._limit / 2:
                beats, changed = self.pulse.witness[1], now
            before = now
            if now - changed > self._limit:
                found = stat(self.pulse.witness[0])
                stopped = found is not None and found.is_stopped
                self._end("was stopped and does not go on" if stopped else "shows no life")

    def _end(self, what: str) -> None:
        witness = self.pulse.witness[0]
        if self._watched.speaks:
            line = f"the witness of {self._watched.host} (pid {witness}) {what}; rank {self._watched.rank} ends"
            sys.stderr.write(f"tpcpu: error: {line} {self.pulse.where()}\n")
            sys.stderr.flush()
        time.sleep(_SPEAK_SECONDS)
        if witness and what != "died":
            with contextlib.suppress(OSError):
                os.kill(witness, signal.SIGKILL)
        os._exit(1)


_guarded: list[Guardian] = []


def guardian() -> Guardian | None:
    """This process's, if it is a rank under watch."""
    return _guarded[0] if _guarded else None


def guard(one: Guardian) -> None:
    """From here on it is this process's."""
    _guarded.append(one)
