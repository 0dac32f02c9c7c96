"""How a rank comes by its regions of the stored tensors: from its own copy of the files, or from one that all share.

`Mapped`: each rank takes its region from the mapped files; what several ranks of a host need is in memory once, and
read from the disk once. `Shared`: each rank reads runs of the files (`extents.py`) and passes the others what they
need of it: each byte is read by one rank of the job. An input-split weight would otherwise be read whole by every
host, as a few hundred bytes of every row are everywhere. The values are the same in both ways.

Knows places, sizes and ranks. Must not know formats.
"""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.reader import RunReader
from tpcpu.engine.extents import Extent, Plan, Segment
from tpcpu.engine.parts import Part
from tpcpu.errors import CheckpointError
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.numa import HUGE_PAGE, arena, discard
from tpcpu.parallel.partition import Range, Share

Look = Callable[[Range, NDArray[Any]], None]
"""Is shown rows, by their numbers, as (rows, columns) of the part's dtype; must not raise, as others wait."""

_AHEAD = 6
"""Extents that a rank reads, or has read, before they are asked for."""

_READERS = 3
"""Threads that read: a network file system answers several requests at a time."""


class Supply(ABC):
    """Gives parts, one after another. All ranks ask for the same in the same order."""

    @abstractmethod
    def fetch(self, part: Part, look: Look | None = None) -> NDArray[Any]:
        """This rank's region of a part, (rows, columns), to be read only. Collective.

        `look` is shown the rows that this rank sees whole: together the ranks see every row once.
        """

    @abstractmethod
    def seen(self, part: Part) -> list[tuple[int, Range]]:
        """Which rank sees which rows, the same list on all ranks."""

    @abstractmethod
    def is_mapped(self, part: Part) -> bool:
        """Whether what `fetch` gives are a file's pages, which can be dropped and come back."""

    @abstractmethod
    def release(self, part: Part, rows: Range | None = None) -> None:
        """Give back the file's pages that these rows, or all of a part, may lie in; they are read again if need be."""

    @abstractmethod
    def use_up(self, part: Part, rows: Range, values: NDArray[Any]) -> None:
        """Give back the memory of `values`, these rows of what `fetch` gave: nobody looks at them again."""

    @abstractmethod
    def close(self) -> CheckpointError | None:
        """Ends reading; what went wrong with it on this rank, whose regions and those of others are then worthless."""


class Mapped(Supply):
    """From this host's files."""

    def __init__(self, checkpoint: Checkpoint, communicator: Communicator) -> None:
        self._checkpoint, self._communicator = checkpoint, communicator
        checkpoint.expect_scattered_reads(False)

    def fetch(self, part: Part, look: Look | None = None) -> NDArray[Any]:
        whole = self._checkpoint.array(part.name)
        if whole.dtype != part.dtype or whole.shape != (part.rows, part.columns) or whole.strides[1] != whole.itemsize:
            # Of values that do not lie together, in rows at least, this is a copy.
            whole = np.ascontiguousarray(whole).reshape(-1).view(part.dtype).reshape(part.rows, part.columns)
        if look is not None and whole.size:
            rows = Share(self._communicator.rank, self._communicator.size).split(part.rows)
            look(rows, whole[rows.start : rows.stop])
        need = part.need(self._communicator.rank)
        return whole[need.rows.start : need.rows.stop, need.columns.start : need.columns.stop]

    def seen(self, part: Part) -> list[tuple[int, Range]]:
        size = self._communicator.size
        return [(rank, Share(rank, size).split(part.rows)) for rank in range(size)]

    def is_mapped(self, part: Part) -> bool:
        return self._checkpoint.is_mapped(part.name)

    def release(self, part: Part, rows: Range | None = None) -> None:
        rows = Range(0, part.rows) if rows is None else rows
        self._checkpoint.release(part.name, rows.start * part.row_bytes, rows.stop * part.row_bytes)

    def use_up(self, part: Part, rows: Range, values: NDArray[Any]) -> None:  # noqa: ARG002
        self.release(part, rows)

    def close(self) -> CheckpointError | None:
        return None


class Shared(Supply):
    """From the ranks that read it. Takes extents ahead of their use, a bounded number of them."""

    def __init__(
        self, checkpoint: Checkpoint, communicator: Communicator, parts: Sequence[Part], cpus: Iterable[int]
    ) -> None:
        """`parts` in the order in which all ranks will fetch them, each once; `cpus`: for the threads that read."""
        self._checkpoint, self._communicator = checkpoint, communicator
        self._plan = Plan(parts, checkpoint.place, communicator.size, checkpoint.neighbours)
        self._reader = RunReader()
        self._unread = deque(extent for extent in self._plan.extents if extent.reader == communicator.rank)
        self._left = {extent: len(extent.segments) for extent in self._unread}
        self._coming: dict[Extent, Future[NDArray[np.uint8]]] = {}
        self._here: dict[Extent, NDArray[np.uint8]] = {}
        self._spare: list[NDArray[np.uint8]] = []
        self._error: CheckpointError | None = None
        self._pool = ThreadPoolExecutor(_READERS, initializer=os.sched_setaffinity, initargs=(0, set(cpus)))
        self._read_ahead()

    def fetch(self, part: Part, look: Look | None = None) -> NDArray[Any]:
        need = part.need(self._communicator.rank)
        item = part.dtype.itemsize
        out = _memory(part.need_bytes(self._communicator.rank)).reshape(len(need.rows), len(need.columns) * item)
        for segments in _rounds(self._plan.segments(part)):
            self._pass_on(part, segments, out, look)
        return out.view(part.dtype)

    def seen(self, part: Part) -> list[tuple[int, Range]]:
        return [(segment.reader, segment.rows) for segment in self._plan.segments(part)]

    def is_mapped(self, part: Part) -> bool:  # noqa: ARG002
        return False

    def release(self, part: Part, rows: Range | None = None) -> None:
        pass

    def use_up(self, part: Part, rows: Range, values: NDArray[Any]) -> None:  # noqa: ARG002
        discard(values)

    def close(self) -> CheckpointError | None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()
        # Rows of the embedding are looked up here from now on.
        self._checkpoint.expect_scattered_reads(False)
        return self._error

    def _pass_on(self, part: Part, segments: list[Segment], out: NDArray[np.uint8], look: Look | None) -> None:
        """At most one extent of each rank: to everyone what it needs of it."""
        own, item = self._communicator.rank, part.dtype.itemsize
        sends: list[tuple[int, NDArray[Any]]] = []
        receives: list[tuple[int, NDArray[Any]]] = []
        used: list[Extent] = []
        for segment in segments:
            if segment.reader != own:
                common = _common(segment.rows, part.need(own).rows)
                if len(common) and out.size:
                    first = part.need(own).rows.start
                    receives.append((segment.reader, out[common.start - first : common.stop - first]))
                continue
            data = self._take(segment.extent)[segment.at : segment.at + segment.nbytes]
            used.append(segment.extent)
            rows = data.reshape(len(segment.rows), part.row_bytes)
            for rank, need in part.needs.items():
                common = _common(segment.rows, need.rows)
                if need.is_empty or not len(common):
                    continue
                first = segment.rows.start
                cut = rows[common.start - first : common.stop - first]
                cut = cut[:, need.columns.start * item : need.columns.stop * item]
                if rank == own:
                    out[common.start - need.rows.start : common.stop - need.rows.start] = cut
                else:
                    sends.append((rank, np.ascontiguousarray(cut)))
            if look is not None:
                look(segment.rows, rows.view(part.dtype))
        self._communicator.exchange(sends, receives)
        for extent in used:
            self._give_back(extent)

    def _take(self, extent: Extent) -> NDArray[np.uint8]:
        if extent not in self._here:
            while extent not in self._coming:  # others before it were read ahead and are used later
                self._read_next()
            try:
                self._here[extent] = self._coming.pop(extent).result()
            except CheckpointError as problem:
                # The others wait for this: they get zeros, and hear of the reason once all is done.
                self._error = self._error or problem
                self._here[extent] = np.zeros(extent.nbytes, np.uint8)
            self._read_ahead()
        return self._here[extent]

    def _give_back(self, extent: Extent) -> None:
        self._left[extent] -= 1
        if not self._left[extent]:
            room = self._here.pop(extent)
            if extent.file is not None:  # else it is what the checkpoint gave, not to be written to
                self._spare.append(room)
            del self._spare[: -_AHEAD if self._unread else None]

    def _read_ahead(self) -> None:
        # What has to be turned is as large as its tensor: not before it is asked for.
        while self._unread and len(self._coming) < _AHEAD and self._unread[0].file is not None:
            self._read_next()

    def _read_next(self) -> None:
        extent = self._unread.popleft()
        if extent.file is None:
            self._coming[extent] = self._pool.submit(self._turn, extent)
            return
        room = next((spare for spare in self._spare if len(spare) >= extent.nbytes), None)
        if room is None:
            room = _memory(extent.nbytes)
        else:
            self._spare = [spare for spare in self._spare if spare is not room]
        self._coming[extent] = self._pool.submit(self._read, extent.file, extent, room)

    def _read(self, file: Path, extent: Extent, room: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self._reader.read(file, extent.offset, room[: extent.nbytes])
        return room

    def _turn(self, extent: Extent) -> NDArray[np.uint8]:
        """Values that do not lie together in their file: whoever reads them turns all of them."""
        return np.ascontiguousarray(self._checkpoint.array(extent.segments[0].part.name)).reshape(-1).view(np.uint8)


def _memory(nbytes: int) -> NDArray[np.uint8]:
    """A mapping of its own where it is large: that is the system's again once nobody holds it."""
    return np.asarray(arena(nbytes)) if nbytes >= HUGE_PAGE else np.empty(nbytes, np.uint8)


def _rounds(segments: list[Segment]) -> Iterable[list[Segment]]:
    """In order, as many at a time as have readers of their own: no rank holds more than one extent for them."""
    together: list[Segment] = []
    for segment in segments:
        if any(other.reader == segment.reader for other in together):
            yield together
            together = []
        together.append(segment)
    if together:
        yield together


def _common(one: Range, other: Range) -> Range:
    start = max(one.start, other.start)
    return Range(start, max(start, min(one.stop, other.stop)))
