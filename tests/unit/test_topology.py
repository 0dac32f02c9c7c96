"""Topology over imitated /sys trees: sockets, sub-NUMA clusters, hyper-threads, control groups, launchers' masks."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tpcpu.parallel.limits import parse_cpu_list, read_limits
from tpcpu.parallel.topology import Topology


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def server(root: Path, sockets: int, nodes_per_socket: int, cores_per_node: int, threads: int = 1) -> int:
    """Imitate a server numbered as Linux numbers it: first threads of all cores first. Returns the number of CPUs."""
    cores = sockets * nodes_per_socket * cores_per_node
    cpus = cores * threads
    cpu_folder = root / "sys/devices/system/cpu"
    write(cpu_folder / "online", f"0-{cpus - 1}")
    for core in range(cores):
        siblings = ",".join(str(core + t * cores) for t in range(threads))
        for cpu in range(core, cpus, cores):
            topology = cpu_folder / f"cpu{cpu}/topology"
            write(topology / "core_cpus_list", siblings)
            write(topology / "physical_package_id", str(core // (nodes_per_socket * cores_per_node)))
    for node in range(sockets * nodes_per_socket):
        first, last = node * cores_per_node, (node + 1) * cores_per_node - 1
        ranges = ",".join(f"{first + t * cores}-{last + t * cores}" for t in range(threads))
        folder = root / f"sys/devices/system/node/node{node}"
        write(folder / "cpulist", ranges)
        write(folder / "meminfo", f"Node {node} MemTotal:       1048576 kB\nNode {node} MemFree:  9 kB")
    return cpus


def detect(root: Path, affinity: Iterable[int], **environ: str) -> Topology:
    return Topology.detect(root, frozenset(affinity), environ)


def test_this_machine() -> None:
    topology = Topology.detect()
    assert topology.cores
    assert topology.default_ranks() >= 1
    assert set(topology.cores_for(0, 1)) <= {cpu for core in topology.cores for cpu in core.cpus}
    assert "\n" not in topology.describe()


def test_four_sockets_with_clusters_and_hyper_threads(tmp_path: Path) -> None:
    cpus = server(tmp_path, sockets=4, nodes_per_socket=2, cores_per_node=3, threads=2)
    topology = detect(tmp_path, range(cpus))
    assert [len(socket.cores) for socket in topology.sockets] == [6, 6, 6, 6]
    assert [node.number for node in topology.nodes] == list(range(8))
    assert topology.sub_numa
    assert topology.default_ranks() == 8
    assert topology.node_memory == dict.fromkeys(range(8), 1 << 30)
    assert [topology.cores_for(rank, 8) for rank in (0, 1, 7)] == [[0, 1, 2], [3, 4, 5], [21, 22, 23]]
    # one rank per socket although the sockets are clustered: both of its nodes
    assert topology.cores_for(1, 4) == [6, 7, 8, 9, 10, 11]
    assert topology.nodes_of(topology.cores_for(1, 4)) == (2, 3)
    assert topology.cores_for(0, 1) == list(range(24))
    assert topology.describe() == "4 sockets, 8 NUMA nodes (sub-NUMA clustering), 24 cores with 2 threads each"


def test_uneven_rank_counts_cover_every_core_once(tmp_path: Path) -> None:
    cpus = server(tmp_path, sockets=2, nodes_per_socket=1, cores_per_node=8)
    topology = detect(tmp_path, range(cpus))
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        shares = [topology.cores_for(rank, size) for rank in range(size)]
        assert sorted(cpu for share in shares for cpu in share) == list(range(16)), size
        lengths = {len(share) for share in shares}
        assert max(lengths) - min(lengths) <= 1


def test_more_ranks_than_cores_share_them(tmp_path: Path) -> None:
    topology = detect(tmp_path, range(server(tmp_path, 1, 1, 2)))
    assert [topology.cores_for(rank, 4) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [len(topology.cores_for(rank, 5)) for rank in range(5)] == [1] * 5


def test_offline_cpus_and_a_socket_that_lost_cores(tmp_path: Path) -> None:
    cpus = server(tmp_path, sockets=2, nodes_per_socket=1, cores_per_node=4, threads=2)
    write(tmp_path / "sys/devices/system/cpu/online", "0-2,4-6,8-15")
    topology = detect(tmp_path, range(cpus))
    # core 3 lives on by its second thread
    assert topology.cores_for(0, 2) == [0, 1, 2, 11]
    write(tmp_path / "sys/devices/system/cpu/online", "0-1,4-7")
    topology = detect(tmp_path, range(cpus))
    assert topology.cores_for(0, 2) == [0, 1]
    assert topology.cores_for(1, 2) == [4, 5, 6, 7]


def test_missing_files_mean_one_plain_socket(tmp_path: Path) -> None:
    topology = detect(tmp_path, [0, 1, 2])
    assert (len(topology.sockets), len(topology.nodes), topology.default_ranks()) == (1, 1, 1)
    assert topology.cores_for(0, 1) == [0, 1, 2]
    assert topology.limits.cpus is topology.limits.memory is topology.limits.core_count is None


def test_socket_number_unknown(tmp_path: Path) -> None:
    server(tmp_path, 1, 1, 2)
    for cpu in range(2):
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", "-1")
    assert [socket.number for socket in detect(tmp_path, [0, 1]).sockets] == [0]


def test_virtual_machine_with_a_socket_per_cpu_is_one_place(tmp_path: Path) -> None:
    server(tmp_path, sockets=8, nodes_per_socket=1, cores_per_node=1)
    for node in range(1, 8):
        write(tmp_path / f"sys/devices/system/node/node{node}/cpulist", "")
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-7")
    topology = detect(tmp_path, range(8))
    assert len(topology.sockets) == 8
    assert topology.default_ranks() == 1


def test_memory_without_cores_is_no_home_for_a_rank(tmp_path: Path) -> None:
    cpus = server(tmp_path, 2, 1, 2)
    write(tmp_path / "sys/devices/system/node/node2/cpulist", "")
    write(tmp_path / "sys/devices/system/node/node2/meminfo", "Node 2 MemTotal: 1024 kB")
    topology = detect(tmp_path, range(cpus))
    assert topology.default_ranks() == 2
    assert topology.node_memory[2] == 1 << 20


class TestMasks:
    """What launchers and users do to the affinity mask."""

    def test_open_mpi_binds_two_ranks_to_one_core_each(self, tmp_path: Path) -> None:
        server(tmp_path, 2, 1, 4)
        masks = [{0}, {1}]
        for rank in range(2):
            topology = detect(tmp_path, masks[rank], OMPI_COMM_WORLD_SIZE="2")
            assert topology.cores_for(rank, 2, masks) == list(range(rank * 4, rank * 4 + 4))
            # without the others' masks the answer is the same
            assert topology.cores_for(rank, 2) == list(range(rank * 4, rank * 4 + 4))

    def test_open_mpi_binds_a_lone_rank(self, tmp_path: Path) -> None:
        server(tmp_path, 1, 1, 4)
        assert detect(tmp_path, {0}, OMPI_COMM_WORLD_SIZE="2").cores_for(0, 1) == [0, 1, 2, 3]
        assert detect(tmp_path, {0}).cores_for(0, 1) == [0]

    def test_widening_stays_inside_the_control_group(self, tmp_path: Path) -> None:
        server(tmp_path, 2, 1, 4)
        write(tmp_path / "proc/self/cgroup", "0::/job")
        write(tmp_path / "sys/fs/cgroup/job/cpuset.cpus.effective", "0-1,4-5")
        masks = [{0}, {1}]
        topology = detect(tmp_path, {0}, OMPI_COMM_WORLD_SIZE="2")
        assert [topology.cores_for(rank, 2, masks) for rank in range(2)] == [[0, 1], [4, 5]]

    def test_widening_respects_slurm(self, tmp_path: Path) -> None:
        server(tmp_path, 1, 1, 16)
        topology = detect(tmp_path, {0}, OMPI_COMM_WORLD_SIZE="2", SLURM_CPUS_ON_NODE="6")
        assert [topology.cores_for(rank, 2, [{0}, {1}]) for rank in range(2)] == [[0, 1, 2], [8, 9, 10]]

    def test_one_core_for_each_rank_from_slurm_is_not_widened(self, tmp_path: Path) -> None:
        """It used to move to other cores of the node, which may be another job's."""
        server(tmp_path, 1, 1, 16)
        topology = detect(tmp_path, {5}, SLURM_CPUS_ON_NODE="2")
        assert [topology.cores_for(rank, 2, [{5}, {6}]) for rank in range(2)] == [[5], [6]]

    def test_a_mask_for_all_is_the_users(self, tmp_path: Path) -> None:
        server(tmp_path, 1, 1, 8)
        topology = detect(tmp_path, {2, 3, 4, 5})
        assert topology.cores_for(1, 2, [{2, 3, 4, 5}] * 2) == [4, 5]
        assert detect(tmp_path, {6}).cores_for(1, 2, [{6}, {6}]) == [6]
        assert topology.describe() == "1 socket, 1 NUMA node, 8 cores, 4 usable here"

    def test_masks_of_their_own_are_kept(self, tmp_path: Path) -> None:
        server(tmp_path, 1, 1, 8)
        masks = [{0, 1, 2}, {4, 5}]
        assert detect(tmp_path, masks[1]).cores_for(1, 2, masks) == [4, 5]

    def test_overlapping_masks_are_divided(self, tmp_path: Path) -> None:
        server(tmp_path, 2, 1, 4)
        masks = [{0, 1, 2, 3}, {4, 5, 6, 7}, {0, 1, 2, 3}, {4, 5, 6, 7}]
        shares = [detect(tmp_path, masks[rank]).cores_for(rank, 4, masks) for rank in range(4)]
        assert shares == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def test_default_ranks_counts_usable_sockets_only(self, tmp_path: Path) -> None:
        server(tmp_path, 4, 1, 2)
        assert detect(tmp_path, {0, 1, 6}).default_ranks() == 2

    def test_rank_outside_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="outside"):
            detect(tmp_path, [0]).cores_for(2, 2)


class TestLimits:
    """cgroup v1 and v2, in a container and outside."""

    def test_version_2_takes_the_tightest_ancestor(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/outer/inner")
        groups = tmp_path / "sys/fs/cgroup"
        write(groups / "outer/cpu.max", "150000 100000")
        write(groups / "outer/inner/cpu.max", "max 100000")
        write(groups / "outer/inner/memory.max", "8000000")
        write(groups / "outer/memory.max", "4000000")
        limits = read_limits(tmp_path, {})
        assert (limits.cpu_quota, limits.memory, limits.core_count) == (1.5, 4_000_000, 1)

    def test_version_1(self, tmp_path: Path) -> None:
        lines = ["12:memory:/docker/abc", "4:cpu,cpuacct:/docker/abc", "3:cpuset:/docker/abc", "0::/"]
        write(tmp_path / "proc/self/cgroup", "\n".join(lines))
        groups = tmp_path / "sys/fs/cgroup"
        # inside a container the named group is not there: its files are at the mounted root
        write(groups / "memory/memory.limit_in_bytes", "1073741824")
        write(groups / "cpu,cpuacct/cpu.cfs_quota_us", "300000")
        write(groups / "cpu,cpuacct/cpu.cfs_period_us", "100000")
        write(groups / "cpuset/cpuset.cpus", "1-3")
        limits = read_limits(tmp_path, {})
        assert limits.memory == 1 << 30
        assert limits.cpu_quota == 3.0
        assert limits.cpus == {1, 2, 3}

    def test_version_1_without_limits(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "2:memory:/\n1:cpu:/")
        groups = tmp_path / "sys/fs/cgroup"
        write(groups / "memory/memory.limit_in_bytes", "9223372036854771712")
        write(groups / "cpu/cpu.cfs_quota_us", "-1")
        write(groups / "cpu/cpu.cfs_period_us", "100000")
        limits = read_limits(tmp_path, {"SLURM_CPUS_ON_NODE": ""})
        assert limits.memory is limits.cpu_quota is limits.core_count is None

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"SLURM_MEM_PER_NODE": "500"}, 500 << 20),
            ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "3"}, 300 << 20),
            ({"SLURM_MEM_PER_NODE": "0"}, 1 << 30),
            ({"SLURM_MEM_PER_NODE": "4000"}, 1 << 30),
            ({}, 1 << 30),
        ],
        ids=str,
    )
    def test_slurms_memory(self, tmp_path: Path, environ: dict[str, str], expected: int) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/")
        write(tmp_path / "sys/fs/cgroup/memory.max", str(1 << 30))
        assert read_limits(tmp_path, environ).memory == expected

    def test_quota_limits_threads(self, tmp_path: Path) -> None:
        cpus = server(tmp_path, 2, 1, 8)
        write(tmp_path / "proc/self/cgroup", "0::/")
        write(tmp_path / "sys/fs/cgroup/cpu.max", "400000 100000")
        write(tmp_path / "sys/fs/cgroup/memory.max", "1000000000")
        topology = detect(tmp_path, range(cpus))
        assert topology.cores_for(0, 2) == [0, 1]
        assert topology.cores_for(1, 2) == [8, 9]
        assert topology.describe().endswith("16 cores, 4 usable here, memory limited to 1.0 GB")

    @pytest.mark.parametrize(
        ("text", "expected"), [("0-2,5\n", {0, 1, 2, 5}), ("", set()), ("nonsense", set()), ("7", {7})]
    )
    def test_cpu_lists(self, text: str, expected: set[int]) -> None:
        assert parse_cpu_list(text) == expected
