"""Memory by NUMA node: arenas in huge pages, and the proof of where their pages are.

Knows Linux' memory calls (through ctypes; no libnuma is needed); must not know what is stored, ranks or MPI. Pages are
placed by first touch: the thread that writes a page first decides its node, so an arena is handed out untouched.
"""

import ctypes
import errno
import mmap
import platform
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE = 2 << 20
"""Bytes of a huge page, and the alignment of every arena."""

# below this share of its pages on its own node, a rank reads noticeably slower than it should
LOCAL_ENOUGH = 0.99

# x86-64 and the common table that AArch64 and later architectures use
_MBIND, _MOVE_PAGES = (237, 279) if platform.machine() == "x86_64" else (235, 239)
_MPOL_PREFERRED = 1
_MPOL_LOCAL = 4
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


class Arena:
    """A run of private, zero, untouched memory: `nbytes` at `address`, aligned to a huge page.

    `numpy.asarray(arena)` is a uint8 view of all of it that keeps it alive; without such a view it is unmapped when
    the arena is dropped or closed.
    """

    def __init__(self, nbytes: int) -> None:
        """Map `nbytes`; raises MemoryError if the address space or an enforced limit does not hold them."""
        if nbytes < 0:
            raise ValueError(f"an arena cannot have {nbytes} bytes")
        # one huge page more than asked, so that an aligned start fits; the slack is never touched and costs nothing
        length = (nbytes // HUGE_PAGE + 2) * HUGE_PAGE
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = _libc.mmap(None, length, protection, flags, -1, 0)
        if base == _FAILED:
            raise MemoryError(f"cannot map {nbytes / 1e9:.2f} GB: {errno.errorcode[ctypes.get_errno()]}")
        self.nbytes = nbytes
        self.address: int = -(-base // HUGE_PAGE) * HUGE_PAGE
        # refused where the kernel has no huge pages: ordinary ones serve as well, only slower
        _libc.madvise(self.address, length - HUGE_PAGE, mmap.MADV_HUGEPAGE)
        # first touch decides anyway; said explicitly, the kernel's NUMA balancing leaves the pages where they are, and
        # does not hide them from time to time (page_nodes would not see them) to learn who reads them
        _mbind(self.address, length - HUGE_PAGE, _MPOL_LOCAL, 0, 0)
        self._finalizer = weakref.finalize(self, _libc.munmap, base, length)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What numpy needs to view the arena as (nbytes,) uint8."""
        if not self._finalizer.alive:
            raise ValueError("the arena is closed")
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def close(self) -> None:
        """Give the memory back at once; views of it must not be used any more."""
        self._finalizer()


def arena(nbytes: int) -> Arena:
    """Map `nbytes` of untouched memory for which huge pages are asked."""
    return Arena(nbytes)


def discard(values: NDArray[Any]) -> None:
    """Give back the whole pages inside `values`, contiguous and in private memory: they hold zeros from then on."""
    assert values.flags.c_contiguous
    start = -(-values.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (values.ctypes.data + values.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _libc.madvise(start, end - start, mmap.MADV_DONTNEED)


def prefer_node(address: int, nbytes: int, node: int) -> bool:
    """Ask that untouched pages of this range come from `node` whichever thread touches them; False if refused.

    Containers often forbid the call; first touch then decides alone.
    """
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << node % 64
    start, length = _page_range(address, nbytes)
    # the kernel reads one bit less than it is told
    return _mbind(start, length, _MPOL_PREFERRED, ctypes.addressof(mask), words * 64 + 1)


def page_nodes(address: int, nbytes: int, samples: int = 4096) -> NDArray[np.int32]:
    """The NUMA nodes of up to `samples` pages spread evenly over a range, untouched ones left out, int32.

    Where `move_pages` is forbidden or sees nothing, /proc/self/numa_maps answers for the mappings that the range lies
    in; a kernel that knows no NUMA has everything on node 0.
    """
    start, length = _page_range(address, nbytes)
    pages = length // mmap.PAGESIZE
    if pages == 0:
        return np.empty(0, np.int32)
    chosen = np.unique(np.linspace(0, pages - 1, min(samples, pages)).astype(np.int64))
    addresses = (start + chosen * mmap.PAGESIZE).astype(np.uint64)
    status = np.full(len(addresses), -errno.ENOENT, np.int32)
    arguments = (0, len(addresses), addresses.ctypes.data, 0, status.ctypes.data, 0)
    if int(_libc.syscall(_MOVE_PAGES, *map(ctypes.c_long, arguments))) == 0:
        present = status[status >= 0]
        if len(present):
            return present
    return _nodes_by_mapping(start, length, samples)


def locality(address: int, nbytes: int, node: int | Collection[int], samples: int = 4096) -> float:
    """The share, 0 to 1, of a range's touched pages that are on `node` (or one of several nodes).

    An empty range is wholly local; one of which nothing has been touched is not local at all.
    """
    if nbytes == 0:
        return 1.0
    nodes = page_nodes(address, nbytes, samples)
    wanted = [node] if isinstance(node, int) else list(node)
    return float(np.isin(nodes, wanted).mean()) if len(nodes) else 0.0


def describe_locality(rank: int, fraction: float, nbytes: int, nodes: Collection[int]) -> str:
    """The line for people, such as `rank 2: 99.9 % of 13.4 GB on node 2`; a warning under 99 %."""
    names = ", ".join(map(str, sorted(nodes)))
    # rounded down: 98.96 must not be shown as 99.0
    percent = int(fraction * 1000) / 10
    line = f"rank {rank}: {percent:.1f} % of {_size(nbytes)} on node{'s' if len(nodes) > 1 else ''} {names}"
    return line if fraction >= LOCAL_ENOUGH else f"warning: {line}; the rest is read through other sockets"


def _mbind(start: int, length: int, mode: int, mask: int, bits: int) -> bool:
    return int(_libc.syscall(_MBIND, *map(ctypes.c_long, (start, length, mode, mask, bits, 0)))) == 0


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 100_000_000 else f"{nbytes / 1e6:.1f} MB"


def _page_range(address: int, nbytes: int) -> tuple[int, int]:
    """The whole pages that hold a range, as start and length."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, end - start


def _nodes_by_mapping(start: int, length: int, samples: int, process: Path = Path("/proc/self")) -> NDArray[np.int32]:
    """As many entries per node as the overlapping mappings have pages there, scaled down to `samples`."""
    ends = {}
    for line in (process / "maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        ends[int(first, 16)] = int(last, 16)
    counts: dict[int, int] = {}
    try:
        lines = (process / "numa_maps").read_text().splitlines()
    except OSError:
        return np.zeros(min(samples, length // mmap.PAGESIZE), np.int32)
    for line in lines:
        words = line.split()
        begin = int(words[0], 16)
        if begin < start + length and ends.get(begin, begin) > start:
            for word in words[2:]:
                name, _, value = word.partition("=")
                if name[0] == "N" and name[1:].isdecimal():
                    counts[int(name[1:])] = counts.get(int(name[1:]), 0) + int(value)
    total = sum(counts.values())
    scale = min(1.0, samples / total) if total else 0.0
    nodes = sorted(counts)
    return np.repeat(np.array(nodes, np.int32), [max(1, round(counts[node] * scale)) for node in nodes])
