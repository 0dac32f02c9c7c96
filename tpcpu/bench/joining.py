"""What joining a vector over the ranks costs: through shared memory, with messages between hosts, and by MPI's own way.

Both are called from compiled code, from a private vector to a private sum, the two in turn. Collective.
"""

import statistics

import numpy as np

from tpcpu.errors import UsageError
from tpcpu.parallel.communicator import Communicator, connect
from tpcpu.parallel.exchanges import Exchanges
from tpcpu.parallel.team import Team

BATCHES = 9

_MESSAGES, _LEAST_MESSAGES = 2000, 20
_BATCH_BYTES = 128 << 20


def all_reduce_times(communicator: Communicator, team: Team, nbytes: int) -> dict[str, list[float]]:
    """Microseconds of one message of `nbytes`, batch by batch, as rank 0 sees them. Raises UsageError."""
    if communicator.size == 1:
        raise UsageError(f"--all-reduce {nbytes} measures what joins ranks; it needs --ranks 2 or more")
    window = communicator.all_reduce(team)
    if window.kind not in ("window", "hosts"):
        raise UsageError(
            f"--all-reduce {nbytes} compares shared memory with MPI_Allreduce, but these ranks share no memory; "
            f"let the ranks of each host share /dev/shm"
        )
    count = max(min(_MESSAGES, _BATCH_BYTES // nbytes), _LEAST_MESSAGES) // 2 * 2
    plain = connect("mpi")
    ways = {
        "all_reduce_us": Exchanges(window, team, nbytes // 4, count),
        "mpi_all_reduce_us": Exchanges(plain.all_reduce(team), team, nbytes // 4, count),
    }
    for way in ways.values():
        way.x[:] = np.random.default_rng(communicator.rank).standard_normal(way.x.size)
        way.run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(BATCHES):
        for name, way in ways.items():
            communicator.barrier()
            times[name].append(1e6 * way.run())
    ours, theirs = (way.out for way in ways.values())
    assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    return communicator.broadcast_object(times)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Of the batches of each way."""
    return {name: statistics.median(values) for name, values in times.items()}
