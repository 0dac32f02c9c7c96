"""Hosts of a test's own: network namespaces with host names, joined by a bridge. Needs root and iproute2."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def missing() -> str | None:
    """Why there can be none here."""
    if shutil.which("ip") is None:
        return "needs iproute2"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"tpcpu-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "needs the right to make network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Hosts:
    """So many hosts, `a`, `b` and so on, and how MPICH's mpiexec starts ranks on them."""

    def __init__(self, count: int, folder: Path) -> None:
        mark = secrets.token_hex(3)
        net = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
        self.bridge = f"tb{mark}"
        self.names = [f"host{'abcdefgh'[number]}" for number in range(count)]
        self.addresses = [f"{net}.{number + 1}" for number in range(count)]
        self._spaces = [f"tpcpu-{mark}-{number}" for number in range(count)]
        self._links = [f"tv{mark}{number}" for number in range(count)]
        self._launch = folder / "launch"
        cases = "".join(
            f"    {address}) space={space} name={name} ;;\n"
            for address, space, name in zip(self.addresses, self._spaces, self.names, strict=True)
        )
        self._launch.write_text(
            "#!/bin/bash\n# HOST COMMAND...: as ssh would, its options left out\n"
            'while [ "${1#-}" != "$1" ]; do shift; done\n'
            f"case $1 in\n{cases}esac\nshift\n"
            'exec ip netns exec "$space" unshare -u bash -c "hostname $name; exec $*"\n'
        )
        self._launch.chmod(0o755)

    def make(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")
        for space, link, address in zip(self._spaces, self._links, self.addresses, strict=True):
            _ip("netns", "add", space)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", link, "master", self.bridge, "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def remove(self) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        for link in (*self._links, self.bridge):
            subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)

    def mpiexec(self, per_host: list[int]) -> list[str]:
        """The command line on the first host, for so many ranks on each."""
        hosts = ",".join(f"{address}:{count}" for address, count in zip(self.addresses, per_host, strict=True))
        inside = ["ip", "netns", "exec", self._spaces[0], "unshare", "-u", "bash", "-c"]
        options = f"-launcher ssh -launcher-exec {self._launch} -localhost {self.addresses[0]} -hosts {hosts}"
        call = f'hostname {self.names[0]}; exec mpiexec {options} -n {sum(per_host)} "$@"'
        return [*inside, call, "mpiexec"]

    def inside(self, arguments: list[str]) -> list[str]:
        """A program on the first host, whose mpiexec starts ranks on the others without being told how."""
        variables = f"HYDRA_LAUNCHER=ssh HYDRA_LAUNCHER_EXEC={self._launch} HYDRA_LOCALHOST={self.addresses[0]}"
        call = f'hostname {self.names[0]}; exec env {variables} "$@"'
        return ["ip", "netns", "exec", self._spaces[0], "unshare", "-u", "bash", "-c", call, "program", *arguments]

    def cut(self, number: int) -> None:
        """Take the link of a host down."""
        _ip("link", "set", self._links[number], "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    made = Hosts(count, folder)
    try:
        made.make()
        yield made
    finally:
        made.remove()
