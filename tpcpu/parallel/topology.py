"""Sockets, NUMA nodes and physical cores of this host, and which of them a rank's threads should run on.

Knows /sys, the affinity mask and the limits of `limits.py`; must not know MPI, models or kernels. Binding is decided
here rather than by the launcher: Open MPI's `mpirun -n 2` leaves each rank a single core.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpcpu.parallel.limits import Limits, parse_cpu_list, read_limits, read_text


@dataclass(frozen=True)
class Core:
    """A physical core: its hardware threads (`cpus`, ascending), its socket and its NUMA node."""

    cpus: tuple[int, ...]
    socket: int
    node: int


@dataclass(frozen=True)
class Domain:
    """A socket, a NUMA node, or the part of a node that lies in one socket: a number and the physical cores in it."""

    number: int
    cores: tuple[Core, ...]


@dataclass(frozen=True)
class Topology:
    """This host's online cores, and what this process may use of them.

    `affinity` is the mask found at detection; a launcher may have narrowed it (see `cores_for`). `node_memory` gives
    each NUMA node's bytes, nodes without cores included. `launcher_binds` says that this process was started by a
    launcher that binds even a lone rank of a host to one core (Open MPI's).
    """

    cores: tuple[Core, ...]
    affinity: frozenset[int]
    limits: Limits = field(default_factory=Limits)
    node_memory: Mapping[int, int] = field(default_factory=dict)
    launcher_binds: bool = False

    @classmethod
    def detect(
        cls,
        root: Path = Path("/"),
        affinity: Collection[int] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> "Topology":
        """Read the topology below `root`; `affinity` stands in for the process' own mask (both are for tests).

        Files that are missing mean the simplest machine: one socket, one node, one thread per core.
        """
        mask = frozenset(os.sched_getaffinity(0) if affinity is None else affinity)
        cpu_folder = root / "sys" / "devices" / "system" / "cpu"
        online = parse_cpu_list(read_text(cpu_folder / "online") or "") or mask
        node_of, memory = _read_nodes(root / "sys" / "devices" / "system" / "node")
        cores = _read_cores(cpu_folder, online, node_of)
        binds = "OMPI_COMM_WORLD_SIZE" in environ
        return cls(cores, mask & online or online, read_limits(root, environ), memory, binds)

    @property
    def sockets(self) -> tuple[Domain, ...]:
        """The sockets with online cores, by number."""
        return _grouped(self.cores, [(core.socket,) for core in self.cores])

    @property
    def nodes(self) -> tuple[Domain, ...]:
        """The NUMA nodes with online cores, by number; memory without cores (CXL, flat HBM) is no home for a rank."""
        return _grouped(self.cores, [(core.node,) for core in self.cores])

    @property
    def sub_numa(self) -> bool:
        """True when sockets are divided into several NUMA nodes (Intel's SNC, AMD's NPS2 and NPS4)."""
        return len(self.nodes) > len(self.sockets)

    @property
    def allowed(self) -> frozenset[int]:
        """The CPUs that the control group leaves this process, whatever its affinity mask says now."""
        return self._online if self.limits.cpus is None else self._online & self.limits.cpus or self._online

    def default_ranks(self) -> int:
        """One rank per socket, per NUMA node under sub-NUMA clustering, of those that this process may use."""
        places = len(_places(self._usable(self.affinity & self.allowed or self.affinity)))
        return min(places, self.limits.core_count or places)

    def cores_for(self, host_rank: int, host_size: int, masks: Sequence[Collection[int]] | None = None) -> list[int]:
        """The CPUs that the threads of rank `host_rank` of `host_size` on this host should be pinned to, one per core.

        As many ranks as sockets (NUMA nodes, under sub-NUMA clustering) get one each; otherwise cores are divided
        evenly in the order of their places, and shared when there are more ranks than cores. `masks` are the affinity
        masks of this host's ranks in rank order: with them, ranks that the launcher put on cores of their own keep
        them, and ranks that share a mask divide it. A rank's own mask of a single core, where the host has more for
        each rank, is the launcher's doing and is widened, within the control group, SLURM's count and the CPU quota;
        a mask that all ranks share is the user's (`taskset`) and stays.
        """
        if not 0 <= host_rank < host_size:
            raise ValueError(f"host_rank {host_rank} is outside 0..{host_size - 1}")
        known = [frozenset(mask) & self._online for mask in (masks or [self.affinity] * host_size)]
        own = known[host_rank] or self.affinity
        equal = masks is not None and host_size > 1 and len(set(known)) == 1
        alone = masks is not None and all(own.isdisjoint(mask) for i, mask in enumerate(known) if i != host_rank)
        if not equal and self._narrowed(own, host_size):
            chosen = _divide(_places(self._usable(self.allowed)), host_rank, host_size)
        elif alone:
            chosen = self._usable(own)
        else:
            chosen = _divide(_places(self._usable(frozenset[int]().union(*known))), host_rank, host_size)
        return [core.cpus[0] for core in chosen[: self._share_of_limit(host_rank, host_size)]]

    def nodes_of(self, cpus: Collection[int]) -> tuple[int, ...]:
        """The NUMA nodes that hold these CPUs, ascending."""
        return tuple(sorted({core.node for core in self.cores if not set(core.cpus).isdisjoint(cpus)}))

    def describe(self) -> str:
        """One line for people: sockets, NUMA nodes, cores, and what limits them."""
        threads = max(len(core.cpus) for core in self.cores)
        parts = [_count(len(self.sockets), "socket"), _count(len(self.nodes), "NUMA node")]
        if self.sub_numa:
            parts[-1] += " (sub-NUMA clustering)"
        parts.append(_count(len(self.cores), "core") + (f" with {threads} threads each" if threads > 1 else ""))
        usable = len(self._usable(self.affinity & self.allowed or self.affinity))
        usable = min(usable, self.limits.core_count or usable)
        if usable < len(self.cores):
            parts.append(f"{usable} usable here")
        if self.limits.memory is not None and self.limits.memory < sum(self.node_memory.values()):
            parts.append(f"memory limited to {self.limits.memory / 1e9:.1f} GB")
        return ", ".join(parts)

    @property
    def _online(self) -> frozenset[int]:
        return frozenset(cpu for core in self.cores for cpu in core.cpus)

    def _usable(self, cpus: frozenset[int]) -> tuple[Core, ...]:
        """The cores with a hardware thread in `cpus`, reduced to those threads."""
        reduced = (Core(tuple(c for c in core.cpus if c in cpus), core.socket, core.node) for core in self.cores)
        return tuple(core for core in reduced if core.cpus)

    def _narrowed(self, mask: frozenset[int], host_size: int) -> bool:
        """Did a launcher leave this rank one core although several fall to each rank?"""
        if host_size == 1 and not self.launcher_binds:
            return False
        # Where SLURM granted no more than a core for each rank, others may have the rest.
        cores = min(len(self._usable(self.allowed)), self.limits.slurm_cpus or len(self.cores))
        return len(self._usable(mask)) == 1 and cores // host_size > 1

    def _share_of_limit(self, host_rank: int, host_size: int) -> int | None:
        count = self.limits.core_count
        if count is None:
            return None
        return max(1, (host_rank + 1) * count // host_size - host_rank * count // host_size)


def _divide(places: tuple[Domain, ...], host_rank: int, host_size: int) -> tuple[Core, ...]:
    """This rank's cores of all places: whole places where the counts fit, even cuts of the row of cores otherwise."""
    count = len(places)
    if host_size % count == 0:
        per_place = host_size // count
        cores = places[host_rank // per_place].cores
        return _cut(cores, host_rank % per_place, per_place)
    if count % host_size == 0:
        per_rank = count // host_size
        mine = places[host_rank * per_rank : (host_rank + 1) * per_rank]
        return tuple(core for place in mine for core in place.cores)
    return _cut(tuple(core for place in places for core in place.cores), host_rank, host_size)


def _cut(cores: tuple[Core, ...], part: int, parts: int) -> tuple[Core, ...]:
    first, last = part * len(cores) // parts, (part + 1) * len(cores) // parts
    return cores[first : max(last, first + 1)]


def _places(cores: tuple[Core, ...]) -> tuple[Domain, ...]:
    """Where a rank belongs: the part of a NUMA node that lies in one socket.

    A virtual machine often shows every CPU as a socket of its own, all in one node: such sockets are joined.
    """
    sockets = _grouped(cores, [(core.node, core.socket) for core in cores])
    if len(sockets) > 1 and all(len(socket.cores) == 1 for socket in sockets):
        return _grouped(cores, [(core.node,) for core in cores])
    return _grouped(cores, [(core.socket, core.node) for core in cores])


def _grouped(cores: tuple[Core, ...], keys: list[tuple[int, ...]]) -> tuple[Domain, ...]:
    members: dict[tuple[int, ...], list[Core]] = {}
    for key, core in sorted(zip(keys, cores, strict=True), key=lambda pair: (pair[0], pair[1].cpus)):
        members.setdefault(key, []).append(core)
    return tuple(Domain(key[0] if len(key) == 1 else i, tuple(group)) for i, (key, group) in enumerate(members.items()))


def _read_nodes(folder: Path) -> tuple[dict[int, int], dict[int, int]]:
    """CPU to NUMA node, and NUMA node to bytes of memory."""
    node_of: dict[int, int] = {}
    memory: dict[int, int] = {}
    for entry in folder.glob("node[0-9]*"):
        number = int(entry.name.removeprefix("node"))
        node_of.update(dict.fromkeys(parse_cpu_list(read_text(entry / "cpulist") or ""), number))
        for line in (read_text(entry / "meminfo") or "").splitlines():
            words = line.split()
            if len(words) >= 4 and words[2] == "MemTotal:":
                memory[number] = int(words[3]) * 1024
    return node_of, memory


def _read_cores(folder: Path, online: frozenset[int], node_of: Mapping[int, int]) -> tuple[Core, ...]:
    cores: dict[tuple[int, ...], Core] = {}
    for cpu in sorted(online):
        topology = folder / f"cpu{cpu}" / "topology"
        threads = read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list") or ""
        cpus = tuple(sorted(parse_cpu_list(threads) & online)) or (cpu,)
        package = read_text(topology / "physical_package_id") or ""
        # some machines answer -1: they do not know, and have one
        cores[cpus] = Core(cpus, int(package) if package.isdecimal() else 0, node_of.get(cpu, 0))
    return tuple(cores.values())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
