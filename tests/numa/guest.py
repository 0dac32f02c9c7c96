"""What each rank proves inside the four-socket machine; run there by `mpiexec -n 4`, started by test_locality.py.

A check takes the rank's communicator and topology and returns facts as a dictionary; rank 0 gathers them and prints
one line of JSON behind MARK: for each check, a list of the ranks' facts. The host's test judges them.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tpcpu.engine.engine import Options
from tpcpu.engine.local import Local
from tpcpu.parallel import numa
from tpcpu.parallel.communicator import Communicator, connect
from tpcpu.parallel.topology import Topology
from tpcpu.sampling import SamplingParams

MARK = "FACTS "
ARENA_BYTES = 64 << 20
TOKENS = 8

Facts = dict[str, Any]


def seen_topology(communicator: Communicator, topology: Topology) -> Facts:
    """What this rank takes the machine for, and the cores it would use."""
    masks = communicator.all_gather_object(sorted(topology.affinity))
    cpus = topology.cores_for(communicator.host_rank, communicator.host_size, masks)
    return {
        "sockets": len(topology.sockets),
        "nodes": len(topology.nodes),
        "default_ranks": topology.default_ranks(),
        "description": topology.describe(),
        "cpus": cpus,
        "own_nodes": list(topology.nodes_of(cpus)),
    }


def touched_arena(communicator: Communicator, topology: Topology) -> Facts:
    """An arena written by threads on this rank's cores, each its slice, and where its pages came to be."""
    cpus = topology.cores_for(communicator.host_rank, communicator.host_size)
    memory = numa.arena(ARENA_BYTES)
    view = np.asarray(memory)

    def touch(thread: int) -> None:
        os.sched_setaffinity(0, {cpus[thread]})
        view[thread * ARENA_BYTES // len(cpus) : (thread + 1) * ARENA_BYTES // len(cpus)] = 1

    threads = [threading.Thread(target=touch, args=(thread,)) for thread in range(len(cpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    nodes = topology.nodes_of(cpus)
    elsewhere = [node.number for node in topology.nodes if node.number not in nodes]
    fraction = numa.locality(memory.address, memory.nbytes, nodes)
    return {
        "local": fraction,
        "elsewhere": numa.locality(memory.address, memory.nbytes, elsewhere),
        "samples": len(numa.page_nodes(memory.address, memory.nbytes, samples=1000)),
        "line": numa.describe_locality(communicator.rank, fraction, memory.nbytes, nodes),
    }


def preferred_node(communicator: Communicator, topology: Topology) -> Facts:
    """Pages asked from the next rank's node, touched from here: prefer_node must win over first touch."""
    node = topology.nodes[(communicator.rank + 1) % len(topology.nodes)].number
    memory = numa.arena(4 << 20)
    accepted = numa.prefer_node(memory.address, memory.nbytes, node)
    np.asarray(memory)[:] = 1
    return {"accepted": accepted, "local": numa.locality(memory.address, memory.nbytes, node)}


class Said:
    """What loading told, as a terminal would show it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """One line about what happens now."""
        self.lines.append(line)

    def advance(self, done: int, total: int) -> None:
        """Nothing is shown of bytes."""


def loaded_models(communicator: Communicator, topology: Topology) -> Facts:  # noqa: ARG001
    """The models of the folders in GUEST_MODELS: where each rank's weights came to be, and what they answer."""
    facts = {}
    for folder in os.environ["GUEST_MODELS"].split(":"):
        said, begun = Said(), time.monotonic()
        model = Local(folder, Options(format="nf4"), communicator, said)
        loaded = time.monotonic()
        chunks = list(model.stream(list(range(5, 15)), SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
        engine = model._engine
        facts[folder] = {
            "local": engine.locality,
            "bytes": engine.arena.nbytes,
            "cpus": engine.cpus,
            "said": said.lines,
            "ids": chunks[-1].completion.ids if chunks[-1].completion is not None else [],
            "seconds": [round(loaded - begun, 1), round(time.monotonic() - loaded, 1)],
        }
        model.close()
    return facts


CHECKS: dict[str, Callable[[Communicator, Topology], Facts]] = {
    "topology": seen_topology,
    "arena": touched_arena,
    "preferred": preferred_node,
    "models": loaded_models,
}


def main() -> None:
    """Run the checks named on the command line (all, if none is)."""
    communicator = connect()
    topology = Topology.detect()
    facts = {
        name: communicator.all_gather_object(CHECKS[name](communicator, topology)) for name in sys.argv[1:] or CHECKS
    }
    if communicator.is_root:
        print(MARK + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
