"""Several hosts on one machine: network namespaces on a bridge, with an address, a name and a /dev/shm for each.

Knows `ip`, `unshare` and the flags with which each MPI's launcher is given a stand-in for ssh; nothing of tpcpu. Needs
root and iproute2. Names carry this process' number, so that runs beside one another do not meet.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.flavours import Flavour

# ssh's place: options, a host, a command. What it starts sees the host's own network, names, host name and /dev/shm.
_SCRIPT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c '
    hostname "$1" && mount --bind "{folder}/$1" /dev/shm && exec sh -c "$2"' sh "$host" "$*"
"""


def missing() -> str | None:
    """Why this machine can hold no such hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in ("ip", "unshare", "mount") if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


class Hosts:
    """Hosts that are up; `names` in order. Made by `hosts`."""

    def __init__(self, count: int, folder: Path) -> None:
        self._bridge = f"t{os.getpid()}"
        self._subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        self.names = [f"{self._bridge}h{number}" for number in range(1, count + 1)]
        self.script = folder / "enter-host"
        self._folder = folder / "shm"

    def up(self) -> None:
        self._folder.mkdir()
        self.script.write_text(_SCRIPT.format(folder=self._folder))
        self.script.chmod(0o755)
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        known = "".join(f"{self._subnet}.{number} {name}\n" for number, name in enumerate(self.names, 1))
        for number, name in enumerate(self.names, 1):
            etc = Path("/etc/netns") / name
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            shared = self._folder / name
            shared.mkdir()
            _run("mount", "-t", "tmpfs", "-o", "size=1g,mode=1777", "tmpfs", str(shared))
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}v", "master", self._bridge, "up")
            _ip("-n", name, "addr", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def on(self, name: str, argv: Sequence[str | Path]) -> list[str]:
        """The command line that runs `argv` on a host."""
        return [str(self.script), name, shlex.join(map(str, argv))]

    def inside(self, argv: Sequence[str | Path]) -> list[str]:
        """A program on the first host, whose mpiexec, whichever it is, reaches the others without being told how."""
        variables = [
            "HYDRA_LAUNCHER=ssh", f"HYDRA_LAUNCHER_EXEC={self.script}", f"PRTE_MCA_plm_ssh_agent={self.script}",
            "I_MPI_HYDRA_BOOTSTRAP=ssh", f"I_MPI_HYDRA_BOOTSTRAP_EXEC={self.script}",
        ]  # fmt: skip
        return self.on(self.names[0], ["env", *variables, *argv])

    def command(
        self,
        ranks_per_host: Sequence[int],
        argv: Sequence[str | Path],
        flavour: Flavour,
        mpiexec: str = "mpiexec",
        flags: Sequence[str] | None = None,
    ) -> list[str]:
        """mpiexec, started on the first host, with so many ranks on each of the first hosts.

        `flags` stand in for those by which Open MPI does not bind ranks, of which a host may have more than cores.
        """
        pairs = list(zip(self.names, ranks_per_host, strict=False))
        listed = ",".join(f"{name}:{ranks}" for name, ranks in pairs)
        unbound = ["--map-by", "slot", "--bind-to", "none"] if flavour == "openmpi" else []
        chosen = {
            "mpich": ["-launcher", "ssh", "-launcher-exec", str(self.script), "-hosts", listed],
            "openmpi": ["--allow-run-as-root", "--prtemca", "plm_ssh_agent", str(self.script), "--host", listed],
            "impi": ["-bootstrap", "ssh", "-bootstrap-exec", str(self.script), "-machine", self._machine_file(pairs)],
        }[flavour]
        chosen += unbound if flags is None else flags
        return self.on(self.names[0], [mpiexec, *chosen, "-n", str(sum(ranks_per_host)), *argv])

    def shared_files(self) -> list[str]:
        """What there is in the hosts' /dev/shm."""
        return [path.name for name in self.names for path in (self._folder / name).iterdir()]

    def link_down(self, name: str) -> None:
        """Nothing passes between this host and the others from here on."""
        _ip("link", "set", f"{name}v", "down")

    def link_up(self, name: str) -> None:
        """It passes again."""
        _ip("link", "set", f"{name}v", "up")

    def down(self) -> None:
        """Kill what runs on the hosts, and remove them: whatever of them there is."""
        for name in self.names:
            deadline = time.monotonic() + 10
            while (inside := _processes(name)) and time.monotonic() < deadline:
                for number in inside:
                    with suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
                time.sleep(0.02)
            for command in (
                ["ip", "link", "del", f"{name}v"],
                ["ip", "netns", "del", name],
                ["umount", "--lazy", str(self._folder / name)],
            ):
                subprocess.run(command, capture_output=True, check=False, timeout=30)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False, timeout=30)

    def _machine_file(self, pairs: Sequence[tuple[str, int]]) -> str:
        path = self.script.with_name("machines")
        path.write_text("".join(f"{name}:{ranks}\n" for name, ranks in pairs))
        return str(path)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """`count` hosts, gone at the end with all that runs on them; `folder` is for their files and must exist."""
    made = Hosts(count, folder)
    try:
        made.up()
        yield made
    finally:
        made.down()


def _processes(name: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False, timeout=30)
    return [int(word) for word in done.stdout.split()]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
