"""The test bed itself: ranks on hosts that have names, shared memory and a network of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import environment
from tests.hosts import hosts, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
PROGRAM = """
from mpi4py import MPI
import os, socket
world = MPI.COMM_WORLD
local = world.Split_type(MPI.COMM_TYPE_SHARED)
shared = os.stat("/dev/shm").st_dev
found = world.gather((socket.gethostname(), MPI.Get_processor_name(), local.size, shared))
if world.rank == 0:
    import json
    print(json.dumps(found))
"""


def test_uneven_hosts_and_nothing_left(tmp_path):
    """Two ranks on the first host and one on the second; a link that is set down; all gone at the end."""
    with hosts(2, tmp_path) as bed:
        first, second = bed.names
        command = bed.command([2, 1], [sys.executable, "-c", PROGRAM], "mpich")
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert [rank[:3] for rank in found] == [[first, first, 2], [first, first, 2], [second, second, 1]]
        assert found[0][3] == found[1][3] != found[2][3]
        ping = bed.on(first, [sys.executable, "-c", CONNECT.format(second)])
        assert subprocess.run(ping, timeout=30, capture_output=True, check=False).stdout == b"refused\n"
        bed.link_down(second)
        assert subprocess.run(ping, timeout=30, capture_output=True, check=False).stdout == b"silent\n"
        bed.link_up(second)
        left = subprocess.Popen(bed.on(second, ["sleep", "600"]))
    assert left.wait(10) != 0
    there = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert not [name for name in bed.names if name in there or (Path("/run/netns") / name).exists()]
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


CONNECT = """
import socket
try:
    socket.create_connection(("{}", 9), 1)
except ConnectionRefusedError:
    print("refused")
except OSError:
    print("silent")
"""
