"""What the outside allows this process: control groups, SLURM, its affinity mask.

Knows the files of cgroup v1 and v2 under /proc and /sys and SLURM's variables; knows nothing of sockets, ranks or MPI.
Every file may be missing: then nothing is limited.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# cgroup v1 writes "no limit" as the largest multiple of a page below 2^63
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class Limits:
    """What this process may use on this host; None where nothing limits it.

    `cpus` is the control group's cpuset, `cpu_quota` the cores' worth of time it grants, `memory` bytes; `slurm_cpus`
    is the number of CPUs that SLURM allocated to the job on this host (its step, where the process runs in one). Memory
    that SLURM granted counts also where no control group enforces it: SLURM may watch, and kill.
    """

    cpus: frozenset[int] | None = None
    cpu_quota: float | None = None
    memory: int | None = None
    slurm_cpus: int | None = None

    @property
    def core_count(self) -> int | None:
        """How many cores all ranks of this host may keep busy together."""
        counts = [count for count in (self.cpu_quota, self.slurm_cpus) if count is not None]
        return max(1, int(min(counts))) if counts else None


def read_limits(root: Path, environ: Mapping[str, str]) -> Limits:
    """Read the limits of this process below `root` (the file system's, or a test's imitation of it)."""
    return Limits(
        cpus=_cpuset(root),
        cpu_quota=min(_quotas(root), default=None),
        memory=min([*_memory_limits(root), *_slurm_memory(environ)], default=None),
        slurm_cpus=_slurm_cpus(environ),
    )


@dataclass(frozen=True, order=True)
class Room:
    """Bytes that may still be taken on this host, and whose limit that is: `SLURM leaves`, `the machine has free`."""

    nbytes: int
    limit: str


def available(root: Path = Path("/"), environ: Mapping[str, str] = os.environ, held: int = 0) -> Room | None:
    """What the job could still be given here, as the kernel, the control groups and SLURM see it; None if unknown.

    `held`: what its processes on this host hold already, which SLURM counts where no control group does.
    """
    found = [Room(granted - held, "SLURM (--mem) leaves") for granted in _slurm_memory(environ)]
    for folder, unified in _groups(root, "memory"):
        if (room := _group_room(folder, unified)) is not None:
            found.append(Room(room, "its control group leaves"))
    for line in (read_text(root / "proc" / "meminfo") or "").splitlines():
        words = line.split()
        if words[0] == "MemAvailable:" and words[1].isdecimal():
            found.append(Room(int(words[1]) * 1024, "it has free"))
    if not found:
        return None
    least = min(found)
    return Room(max(least.nbytes, 0), least.limit)


def held_bytes(root: Path = Path("/")) -> int:
    """Physical memory of this process, as SLURM counts it: shared and file pages too."""
    for line in (read_text(root / "proc" / "self" / "status") or "").splitlines():
        words = line.split()
        if words[0] == "VmRSS:":
            return int(words[1]) * 1024
    return 0


def parse_cpu_list(text: str) -> frozenset[int]:
    """The numbers of a kernel list such as `0-3,8,10-11`; text that is no list counts as empty."""
    numbers: set[int] = set()
    for piece in text.strip().split(","):
        first, _, last = piece.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def read_text(path: Path) -> str | None:
    """The stripped content of a small system file, or None if it is missing, unreadable or empty."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or None
    except OSError:
        return None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process' group and its ancestors, innermost first, each with: is it cgroup v2?

    Inside a container /proc names the group as the host sees it, which does not exist here: the ancestors that exist,
    down to the mounted root, then hold the container's own limits.
    """
    mounts = root / "sys" / "fs" / "cgroup"
    for line in (read_text(root / "proc" / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            tops = [mounts / "unified", mounts]
        elif controller in controllers.split(","):
            tops = [mounts / controllers, mounts / controller]
        else:
            continue
        top = next((top for top in tops if top.is_dir()), None)
        if top is None:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder, not controllers


def _cpuset(root: Path) -> frozenset[int] | None:
    for folder, unified in _groups(root, "cpuset"):
        names = ("cpuset.cpus.effective",) if unified else ("cpuset.effective_cpus", "cpuset.cpus")
        for name in names:
            cpus = parse_cpu_list(read_text(folder / name) or "")
            if cpus:
                return cpus
    return None


def _quotas(root: Path) -> Iterator[float]:
    for folder, unified in _groups(root, "cpu"):
        if unified:
            quota, _, period = (read_text(folder / "cpu.max") or "").partition(" ")
        else:
            quota = read_text(folder / "cpu.cfs_quota_us") or ""
            period = read_text(folder / "cpu.cfs_period_us") or ""
        # "max" and -1 both say: no quota
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    for folder, unified in _groups(root, "memory"):
        limit = read_text(folder / ("memory.max" if unified else "memory.limit_in_bytes")) or ""
        if limit.isdecimal() and int(limit) < UNLIMITED_BYTES:
            yield int(limit)


def _group_room(folder: Path, unified: bool) -> int | None:
    """What is left of a group's limit; file pages, which the kernel takes back where there is need, count as left."""
    limit = read_text(folder / ("memory.max" if unified else "memory.limit_in_bytes")) or ""
    usage = read_text(folder / ("memory.current" if unified else "memory.usage_in_bytes")) or ""
    if not (limit.isdecimal() and usage.isdecimal() and int(limit) < UNLIMITED_BYTES):
        return None
    total, files = "" if unified else "total_", 0
    for line in (read_text(folder / "memory.stat") or "").splitlines():
        words = line.split()
        if words[0] in (f"{total}inactive_file", f"{total}active_file") and words[1].isdecimal():
            files += int(words[1])
    return int(limit) - int(usage) + files


def _slurm_cpus(environ: Mapping[str, str]) -> int | None:
    count = environ.get("SLURM_CPUS_ON_NODE", "")
    return int(count) if count.isdecimal() and int(count) > 0 else None


def _slurm_memory(environ: Mapping[str, str]) -> Iterator[int]:
    """Bytes that the job has on this host; SLURM counts in units of 2^20 bytes, and 0 is all of the host's."""
    on_node, per_cpu = environ.get("SLURM_MEM_PER_NODE", ""), environ.get("SLURM_MEM_PER_CPU", "")
    if on_node.isdecimal() and int(on_node):
        yield int(on_node) << 20
    cpus = _slurm_cpus(environ)
    if per_cpu.isdecimal() and int(per_cpu) and cpus is not None:
        yield (int(per_cpu) << 20) * cpus
