"""From a checkpoint to weights in memory: each rank reads, converts and packs what its program declares.

Tensor after tensor, in one order on all ranks. Knows the order, the memory and what is told of it; how values are come
by is in `supply`, what is made of them in `slicer`.
"""

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.parts import Needed
from tpcpu.engine.progress import Progress
from tpcpu.engine.slicer import Slicer
from tpcpu.engine.supply import Mapped, Shared, Supply
from tpcpu.errors import CheckpointError
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.numa import Arena, arena
from tpcpu.parallel.team import Team
from tpcpu.program.operations import Key, Kind, Weight
from tpcpu.program.products import Weights
from tpcpu.program.weights import Packed, Packer, Table, Vector, packing_kernels, padded

NOTICED_SECONDS = 0.5
"""Loading that took less is not worth a line."""


class Loader:
    """Loads the weights of one rank. Collective: all ranks load, each its own."""

    def __init__(
        self, checkpoint: Checkpoint, communicator: Communicator, team: Team, cpus: Iterable[int], progress: Progress,
        shared: bool = False,
    ) -> None:  # fmt: skip
        """`shared`: the ranks read the files together, each byte once; without, each what it needs."""
        self._checkpoint, self._communicator, self._team = checkpoint, communicator, team
        self._progress, self._shared = progress, shared
        self._cpus = set(cpus)
        self.nbytes = 0
        """Bytes of the checkpoint that this rank's weights are made of,"""
        self.seconds = 0.0
        """and how long they took, repacking and all."""

    def load(self, needed: Sequence[Needed]) -> tuple[Weights, Arena]:
        """The weights by name and kind, and the arena that holds the packed ones. Raises CheckpointError.

        `needed`: of all ranks where they read together, else of this one.
        """
        packed = [binding for binding, _ in needed if _is_packed(binding.weight)]
        # Before the reading begins, so that its speed is told truly.
        prepare(packing_kernels(binding.form for binding in packed), self._progress.say)
        memory = arena(sum(binding.packed_bytes for binding in packed))
        packer = Packer(self._team, memory)
        weights: dict[Key, Packed | Table | Vector] = {}
        total = sum(self._own_bytes(each) for each in needed)
        done, error = 0, None
        began = time.perf_counter()
        self._progress.advance(0, total)
        supply = self._supply(needed)
        try:
            # A thread inherits the affinity of the one that makes it, and this one may be pinned.
            with ThreadPoolExecutor(
                len(self._cpus), initializer=os.sched_setaffinity, initargs=(0, self._cpus)
            ) as pool:
                slicer = Slicer(self._checkpoint, self._communicator, supply, pool)
                for each in needed:
                    weight = each[0].weight
                    try:
                        weights[weight.key] = self._bind(each, slicer, packer)
                    except CheckpointError as problem:
                        # The others go on to their next exchange: this rank has to be there.
                        error = error or problem
                    for part in each[1].values():
                        supply.release(part)
                    done += self._own_bytes(each)
                    self._progress.advance(done, total)
        finally:
            unread = supply.close()
        self.nbytes, self.seconds = done, time.perf_counter() - began
        self._communicator.raise_together(unread or error)
        if self.seconds >= NOTICED_SECONDS:
            self._tell_speed(needed)
        return weights, memory

    def _supply(self, needed: Sequence[Needed]) -> Supply:
        if not self._shared:
            return Mapped(self._checkpoint, self._communicator)
        parts = [part for _, parts in needed for part in parts.values()]
        return Shared(self._checkpoint, self._communicator, parts, self._cpus)

    def _bind(self, needed: Needed, slicer: Slicer, packer: Packer) -> Packed | Table | Vector:
        binding, parts = needed
        match binding.weight.kind:
            case Kind.VECTOR:
                return padded(slicer.vector(binding, parts))
            case Kind.EMBEDDING:
                for part in parts.values():
                    slicer.check(part)
                # Rows are looked up where they lie.
                return Table(self._checkpoint.array(binding.weight.name), binding.form)
        return packer.pack(binding.weight, slicer.source(binding, parts))

    def _own_bytes(self, needed: Needed) -> int:
        return sum(part.need_bytes(self._communicator.rank) for part in needed[1].values())

    def _tell_speed(self, needed: Sequence[Needed]) -> None:
        nbytes, whom = self.nbytes, ""
        if self._shared:
            nbytes = sum(part.nbytes for _, parts in needed for part in parts.values())
            hosts = len(self._communicator.hosts)
            whom = f" once for {hosts} hosts" if hosts > 1 else " once"
        speed = nbytes / self.seconds / 1e9
        self._progress.say(f"read {nbytes / 1e9:.2f} GB{whom} in {self.seconds:.1f} s, {speed:.1f} GB/s")


def _is_packed(weight: Weight) -> bool:
    return weight.kind not in (Kind.VECTOR, Kind.EMBEDDING)
