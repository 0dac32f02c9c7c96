"""Times one all-reduce of 32 KB (or BYTES) between the ranks of a host, through the window and by MPI_Allreduce.

    mpiexec -n 2 python tests/bench/all_reduce.py [--bytes 32768] [--threads 1]

Both are called from compiled code, from a private vector to a private sum. The two alternate; figures are medians of 9
with the fastest and the slowest, in microseconds, of rank 0. The last line is JSON.
"""

import argparse
import json
import statistics
import sys

import numpy as np

from tpcpu.parallel.communicator import connect
from tpcpu.parallel.exchanges import Exchanges
from tpcpu.parallel.mpi_library import library_name
from tpcpu.parallel.team import Team
from tpcpu.parallel.topology import Topology

RUNS, MESSAGES = 9, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=32768, metavar="BYTES", help="of a message (default: 32768)")
    parser.add_argument("--threads", type=int, default=None, metavar="T", help="of a rank (default: its cores)")
    args = parser.parse_args()
    window, plain = connect("window"), connect("mpi")
    topology = Topology.detect()
    masks = window.all_gather_object(sorted(topology.affinity))
    cpus = topology.cores_for(window.host_rank, window.host_size, masks)
    cpus = [cpus[i % len(cpus)] for i in range(args.threads or len(cpus))]
    everywhere = [cpu for each in window.all_gather_object(cpus) for cpu in each]
    crowded = len(set(everywhere)) < len(everywhere)
    team = Team(cpus, pinned=not crowded, crowded=crowded)
    ways = {
        "all_reduce_us": Exchanges(window.all_reduce(team), team, args.bytes // 4, MESSAGES),
        "mpi_all_reduce_us": Exchanges(plain.all_reduce(team), team, args.bytes // 4, MESSAGES),
    }
    random = np.random.default_rng(window.rank)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        way.x[:] = random.standard_normal(way.x.size)
        wanted = np.add.reduce(window.all_gather(way.x), axis=0, dtype=np.float32)
        way.run()
        np.testing.assert_allclose(way.out, wanted, rtol=1e-4, atol=1e-5)
        times[name].clear()
    for _ in range(RUNS):
        for name, way in ways.items():
            window.barrier()
            times[name].append(1e6 * way.run())
    if window.is_root:
        for name, values in times.items():
            print(
                f"{name:18} {statistics.median(values):7.2f}  ({min(values):.2f} to {max(values):.2f})", file=sys.stderr
            )
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratio = medians["all_reduce_us"] / medians["mpi_all_reduce_us"]
        result = {"bytes": args.bytes, "ranks": window.size, "threads_per_rank": len(cpus), "mpi": library_name()}
        print(json.dumps({**result, **medians, "ratio": ratio, "runs": times}))
    team.close()


if __name__ == "__main__":
    main()
