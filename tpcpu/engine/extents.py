"""Who reads what of a checkpoint that the ranks of a job read together: runs of a file, each by one rank.

A run is at least `LEAST_BYTES` long where its file has as much, because a shared file system answers a large request
in nearly the time of a small one: so it may hold several small tensors, or one and the beginning of the next. It is
cut between rows, so that whoever reads a row holds all of it. Knows places and sizes; reads nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpcpu.engine.parts import Part
from tpcpu.parallel.partition import Range

LEAST_BYTES = 4 << 20
USUAL_BYTES = 8 << 20

_SKIPPED_BYTES = 64 << 10
"""So little between two tensors is read along: what describes them, mostly."""

Place = Callable[[str], tuple[Path, int] | None]
"""The file of a tensor and where in it the tensor begins; None where it has to be read as a whole by other means."""

Neighbours = Callable[[str], str]
"""The same for all tensors that are read as a whole and that lie between one another: one rank reads them."""


@dataclass(eq=False)
class Extent:
    """A run of a file; without `file` it is the part of its only segment."""

    file: Path | None
    offset: int
    nbytes: int = 0
    segments: list["Segment"] = field(default_factory=list)
    reader: int = -1

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(eq=False)
class Segment:
    """Rows of a part, `at` bytes behind the beginning of an extent."""

    part: Part
    rows: Range
    extent: Extent
    at: int

    @property
    def reader(self) -> int:
        return self.extent.reader

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.part.row_bytes


class Plan:
    """The same on every rank: extents in the order of their first use, which the ranks read in turn."""

    def __init__(self, parts: Sequence[Part], place: Place, size: int, neighbours: Neighbours = str) -> None:
        """`parts` in the order in which they will be used, each once; those of one tensor share what is read of it."""
        self.extents: list[Extent] = []
        # By identity: several weights may be parts of one tensor.
        self._of: dict[int, list[Segment]] = {id(part): [] for part in parts}
        placed: list[tuple[Path, int, Part]] = []
        firsts: dict[tuple[str, int, int], Part] = {}
        again: list[tuple[Part, Part]] = []
        for part in parts:
            first = firsts.setdefault((part.name, part.rows, part.row_bytes), part)
            if first is not part:
                again.append((part, first))
                continue
            where = place(part.name) if part.nbytes else None
            if where is not None:
                placed.append((*where, part))
            elif part.nbytes:
                self._append(Extent(None, 0), part, Range(0, part.rows))
        run: list[Extent] = []
        for file, offset, part in sorted(placed, key=lambda each: each[:2]):
            if run and (run[-1].file != file or not 0 <= offset - run[-1].end <= _SKIPPED_BYTES):
                self._end(run)
            if not run:
                run.append(Extent(file, offset))
            self._cut(run, part, offset)
        self._end(run)
        for part, first in again:
            for same in self._of[id(first)]:
                self._append(same.extent, part, same.rows, same.at)
        # All ranks go through the parts together. As they read in turn, all of them read all the time.
        readers: dict[str, int] = {}
        for part in parts:
            for segment in self._of[id(part)]:
                if segment.extent.reader < 0:
                    turn = len(self.extents) % size
                    if segment.extent.file is None:
                        turn = readers.setdefault(neighbours(part.name), turn)
                    segment.extent.reader = turn
                    self.extents.append(segment.extent)

    def segments(self, part: Part) -> list[Segment]:
        """The rows of a part, in order."""
        return self._of[id(part)]

    def _append(self, extent: Extent, part: Part, rows: Range, at: int = 0) -> None:
        segment = Segment(part, rows, extent, at)
        extent.segments.append(segment)
        extent.nbytes = max(extent.nbytes, at + segment.nbytes)
        self._of[id(part)].append(segment)

    def _cut(self, run: list[Extent], part: Part, offset: int) -> None:
        """Adds a part that begins at or soon behind the end of a run, to its last extent and to new ones."""
        row = 0
        while row < part.rows:
            at = offset + row * part.row_bytes
            if run[-1].nbytes >= USUAL_BYTES:
                run.append(Extent(run[-1].file, at))
            room = USUAL_BYTES - (at - run[-1].offset)
            count = min(max(-(-room // part.row_bytes), 1), part.rows - row)
            self._append(run[-1], part, Range(row, row + count), at - run[-1].offset)
            row += count

    def _end(self, run: list[Extent]) -> None:
        """Joins a last extent that is short to the one before it."""
        if len(run) > 1 and run[-1].nbytes < LEAST_BYTES:
            last, before = run[-1], run[-2]
            for segment in last.segments:
                segment.extent, segment.at = before, segment.at + last.offset - before.offset
            before.segments += last.segments
            before.nbytes = last.end - before.offset
        run.clear()
