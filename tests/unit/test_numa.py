"""Arenas and the proof of locality, on this machine's own nodes; several nodes are seen in tests/numa."""

import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from tpcpu.parallel import numa


def node_of_this_thread() -> int:
    """The NUMA node of the CPU that this thread runs on."""
    cpu = min(os.sched_getaffinity(0))
    nodes = list(Path(f"/sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*"))
    return int(nodes[0].name.removeprefix("node")) if nodes else 0


def test_arena_is_aligned_zero_and_writable() -> None:
    memory = numa.arena(5_000_001)
    assert memory.address % numa.HUGE_PAGE == 0
    view = np.asarray(memory)
    assert view.shape == (5_000_001,)
    assert view.dtype == np.uint8
    assert not view.any()
    view[:] = 7
    assert int(view.sum(dtype=np.int64)) == 7 * 5_000_001


def test_a_view_keeps_the_memory() -> None:
    view = np.asarray(numa.arena(1 << 22)).view(np.float32)
    gc.collect()
    view[:] = 1.5
    assert float(view.sum()) == 1.5 * view.size


def test_close_gives_the_memory_back() -> None:
    def mapped() -> bool:
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in lines]
        return any(int(first, 16) <= memory.address < int(last, 16) for first, last in spans)

    memory = numa.arena(64 << 20)
    assert mapped()
    memory.close()
    assert not mapped()
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        np.asarray(memory)


def test_impossible_sizes() -> None:
    with pytest.raises(MemoryError, match="GB"):
        numa.arena(1 << 60)
    with pytest.raises(ValueError):
        numa.arena(-1)
    assert np.asarray(numa.arena(0)).size == 0


def test_only_touched_pages_count() -> None:
    memory = numa.arena(8 << 20)
    assert len(numa.page_nodes(memory.address, memory.nbytes)) == 0
    assert numa.locality(memory.address, memory.nbytes, 0) == 0.0
    assert numa.locality(memory.address, 0, 0) == 1.0
    np.asarray(memory)[: 4 << 20] = 1
    seen = numa.page_nodes(memory.address, memory.nbytes, samples=1 << 20)
    assert len(seen) == (4 << 20) // mmap.PAGESIZE


def test_touched_pages_are_local() -> None:
    memory = numa.arena(8 << 20)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        node = node_of_this_thread()
        np.asarray(memory)[:] = 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert numa.locality(memory.address, memory.nbytes, node) == 1.0
    assert numa.locality(memory.address, memory.nbytes, [node, 999]) == 1.0
    assert numa.locality(memory.address, memory.nbytes, 999) == 0.0
    assert set(numa.page_nodes(memory.address + 5, 1)) == {node}


def test_whole_pages_are_discarded_and_nothing_beside_them() -> None:
    values = np.full(8 * mmap.PAGESIZE, 7, np.uint8)
    first = -values.ctypes.data % mmap.PAGESIZE + mmap.PAGESIZE
    # From within a page to within another one: two pages lie between.
    numa.discard(values[first - 5 : first + 2 * mmap.PAGESIZE + 9])
    expected = np.full_like(values, 7)
    expected[first : first + 2 * mmap.PAGESIZE] = 0
    assert np.array_equal(values, expected)
    numa.discard(values[first + 1 : first + mmap.PAGESIZE])  # no whole page
    numa.discard(values[:0])
    assert np.array_equal(values, expected)


def test_prefer_node_answers() -> None:
    memory = numa.arena(4 << 20)
    node = node_of_this_thread()
    assert numa.prefer_node(memory.address, memory.nbytes, node) in (True, False)
    assert not numa.prefer_node(memory.address, memory.nbytes, 1000)


def test_numa_maps_stand_in(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(
        "7f0000000000-7f0000400000 rw-p 0 00:00 0\n7f0000400000-7f0000800000 rw-p 0 00:00 0\n"
    )
    (tmp_path / "numa_maps").write_text(
        "7f0000000000 default anon=1024 dirty=1024 N0=768 N2=256 kernelpagesize_kB=4\n"
        "7f0000400000 default anon=1024 N1=1024 kernelpagesize_kB=4\n"
    )
    nodes = numa._nodes_by_mapping(0x7F0000001000, 4096, 400, tmp_path)
    assert (np.count_nonzero(nodes == 0), np.count_nonzero(nodes == 2), len(nodes)) == (300, 100, 400)
    (tmp_path / "numa_maps").unlink()
    assert set(numa._nodes_by_mapping(0x7F0000001000, 4096, 400, tmp_path)) == {0}


def test_line_for_people() -> None:
    assert numa.describe_locality(2, 0.9995, 13_400_000_000, [2]) == "rank 2: 99.9 % of 13.4 GB on node 2"
    assert numa.describe_locality(0, 1.0, 67_108_864, [0, 1]) == "rank 0: 100.0 % of 67.1 MB on nodes 0, 1"
    assert numa.describe_locality(1, 0.98999, 13_400_000_000, [1]).startswith("warning: rank 1: 98.9 %")
