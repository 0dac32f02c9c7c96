"""Which part of a whole a rank, or a thread, takes.

Knows only counts. Shares are contiguous, as even as they go, and may be empty; nothing is padded.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The integers from `start` up to, not including, `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __mul__(self, unit: int) -> "Range":
        """The same range counted in things of which `unit` make one of these."""
        return Range(self.start * unit, self.stop * unit)

    def __add__(self, offset: int) -> "Range":
        """The same range, moved up: where it lies behind `offset` others."""
        return Range(self.start + offset, self.stop + offset)

    def cover(self, unit: int, limit: int) -> "Range":
        """The smallest range of whole units that holds this one, not past `limit`; empty stays empty."""
        if not len(self):
            return Range(0, 0)
        return Range(self.start // unit * unit, min(-(-self.stop // unit) * unit, limit))

    def blocks(self, unit: int) -> "Range":
        """The indices of the units of `unit` that this range touches."""
        return Range(self.start // unit, -(-self.stop // unit)) if len(self) else Range(0, 0)


@dataclass(frozen=True)
class Share:
    """One rank of `size`."""

    rank: int = 0
    size: int = 1

    def split(self, count: int, unit: int = 1) -> Range:
        """This rank's part of `count` things that may only be parted at multiples of `unit`."""
        units = -(-count // unit)
        start, stop = (units * i // self.size * unit for i in (self.rank, self.rank + 1))
        return Range(min(start, count), min(stop, count))
