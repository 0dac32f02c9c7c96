"""What Linux tells about processes: whether one is stopped, what it has used, who started it, how it ended.

Knows /proc, pidfds and control groups; nothing of ranks.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_LAUNCHERS = ("mpiexec", "mpirun", "hydra", "prte", "prun", "orte", "orted", "srun")
_KEEPER = b"keeper.main()"

TICKS = os.sysconf("SC_CLK_TCK")
"""Of work in a second."""

_libc = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438  # on every architecture

# linux/pidfd.h: PIDFD_GET_INFO for the 64 bytes of the first version, and the bit of an exit status (since 6.15)
_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_INFO_EXIT = 1 << 3


@dataclass(frozen=True)
class Stat:
    """A moment of a process: its name, its state's letter, its parent, and page faults that read and ticks of work."""

    name: str
    state: str
    parent: int
    used: tuple[int, int]
    is_in_background: bool
    """Of a terminal: whoever sits there has sent it there, or has stopped it, and may bring it back."""

    @property
    def is_stopped(self) -> bool:
        """By a signal, or by a debugger."""
        return self.state in "Tt"


def stat(pid: int) -> Stat | None:
    """None where there is no such process."""
    try:
        # the name, in brackets, may hold blanks
        head, _, tail = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    except OSError:
        return None
    fields = tail.split()
    group, terminal, foreground = int(fields[2]), int(fields[4]), int(fields[5])
    return Stat(
        head.partition("(")[2], fields[0], int(fields[1]), (int(fields[9]), int(fields[11]) + int(fields[12])),
        terminal != 0 and group != foreground,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def tree(pid: int) -> set[int]:
    """All processes below one."""
    found: set[int] = set()
    new = [pid]
    while new:
        below = set(children(new.pop())) - found
        found |= below
        new += below
    return found


def launchers(pid: int) -> dict[int, str]:
    """The processes above `pid` up to the one that starts ranks, or to the keeper above that, with their names."""
    found: dict[int, str] = {}
    passed: dict[int, str] = {}
    while (now := stat(pid)) is not None and now.parent > 1:
        pid = now.parent
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            is_keeper = _KEEPER in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            break
        passed[pid] = "keeper" if is_keeper else name
        if is_keeper or name.startswith(_LAUNCHERS):
            found |= passed
            passed = {}
        if is_keeper:
            break
    return found


def standard_error(pid: int, pidfd: int) -> int | None:
    """A descriptor of another process's standard error, with which it can be written to when that process is gone."""
    found: int = _libc.syscall(_PIDFD_GETFD, pidfd, 2, 0)
    if found >= 0:
        return found
    # where one may not look into other processes; appending, as the place in a file is not shared then
    with contextlib.suppress(OSError):
        return os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY)
    return None


def open_files(pid: int, name: str) -> list[Path]:
    """Those of a process whose names begin with `name`."""
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            path = link.readlink()
            if path.name.startswith(name) and not path.name.endswith(" (deleted)"):
                found.append(path)
    return found


def user(connection: socket.socket) -> int:
    """Who is at the other end of a Unix socket."""
    _, found, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(found)


def ending(pid: int, pidfd: int) -> int | None:
    """How an ended process ended: its exit code, or minus a signal; None where the kernel does not tell (any more)."""
    with contextlib.suppress(OSError, IndexError):
        # its parent has not collected it yet
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] in "ZX":
            return os.waitstatus_to_exitcode(int(fields[49]))
    buffer = bytearray(64)
    struct.pack_into("Q", buffer, 0, _INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, buffer)
    except OSError:
        return None
    if not struct.unpack_from("Q", buffer)[0] & _INFO_EXIT:
        return None
    status: int = struct.unpack_from("i", buffer, 60)[0]
    return os.waitstatus_to_exitcode(status)


def describe_ending(code: int | None) -> str:
    """In words that follow a name."""
    if code is None:
        return "died"
    if code >= 0:
        return f"ended with exit code {code}, and without a word,"
    with contextlib.suppress(ValueError):
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"was killed by signal {-code}"


class Memory:
    """The memory limits that a process is under, and how often they have killed."""

    def __init__(self, pid: int) -> None:
        self._files = _limits(pid)
        self._kills = {path: _kills(path) for path, _ in self._files}

    def exceeded(self) -> str | None:
        """What has killed since this object was made, in words; None if nothing has."""
        for path, limit in self._files:
            if _kills(path) > self._kills[path]:
                return _describe(limit)
        return None


def _limits(pid: int) -> list[tuple[Path, Path]]:
    """Files with a line `oom_kill N`, and with the limit behind it: of the control group, then of the machine."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            names = (
                ("memory", "memory.oom_control", "memory.limit_in_bytes")
                if "memory" in controllers.split(",")
                else ("", "memory.events", "memory.max")
            )
            if controllers and not names[0]:
                continue
            base = Path("/sys/fs/cgroup", names[0])
            # in a container the group's own folder may be the root of what is seen
            for folder in (base / path.lstrip("/"), base, base / "unified" / path.lstrip("/")):
                if (folder / names[1]).exists():
                    found.append((folder / names[1], folder / names[2]))
                    break
    return [*found, (Path("/proc/vmstat"), Path("/proc/meminfo"))]


def _kills(path: Path) -> int:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _describe(limit: Path) -> str:
    try:
        text = limit.read_text().strip()
    except OSError:
        text = ""
    if limit.name == "meminfo" or not text.isdecimal() or int(text) >= 1 << 60:
        return "the machine has no more"
    return f"the limit of its control group is {int(text) >> 20} MB"
