"""What the witness of a host keeps of each process that it watches: whether it lives, is stopped, and gets on.

Knows /proc's figures and the pulse of a rank; must not know what is to be done about a fault.
"""

import time
from dataclasses import dataclass, field

from tpcpu.parallel.processes import TICKS, Memory, Stat
from tpcpu.parallel.pulse import Pulse

_AT_REST = 0.01
"""Of a core: who uses less in the middle of an operation is not working at it."""


@dataclass
class Process:
    """A launcher; or a rank."""

    pid: int
    pidfd: int
    title: str
    alive: bool = True
    stopped: float | None = None
    """Since when it has been."""
    used: tuple[int, ...] = ()
    changed: float = field(default_factory=time.monotonic)
    """When it last showed life."""

    def see(self, stat: Stat, now: float, *, anew: bool) -> None:
        """Note what is seen of it now; `anew`, where nobody has looked for long, as if it had just begun."""
        if not self._is_stopped(stat):
            self.stopped = None
        elif self.stopped is None or anew:
            self.stopped = now
        life = self._life(stat)
        if life != self.used or anew:
            self.used, self.changed = life, now

    def _is_stopped(self, stat: Stat) -> bool:
        # ranks go on beside a launcher that somebody has stopped at a terminal, and who may bring it back
        return stat.is_stopped and not stat.is_in_background

    def _life(self, stat: Stat) -> tuple[int, ...]:
        """Changes while it lives."""
        return stat.used


@dataclass
class Rank(Process):
    """One that has called, with its pulse."""

    rank: int = 0
    pulse: Pulse = None  # type: ignore[assignment]
    segments: tuple[str, ...] = ()
    memory: Memory = None  # type: ignore[assignment]
    has_left: bool = False
    step: tuple[int, int] = (-1, 0)
    stepped: float = 0.0
    worked: int = 0
    """Ticks of work when the step became what it is, at `stepped`."""

    def see(self, stat: Stat, now: float, *, anew: bool) -> None:
        if self.pulse.step != self.step or anew:
            self.step, self.stepped, self.worked = self.pulse.step, now, stat.used[1]
        super().see(stat, now, anew=anew)

    def stands_still(self, now: float, seconds: float) -> bool:
        """Whether it has waited so long, in the same operation: for other ranks, or without work of its own."""
        if now - self.stepped <= seconds or not self.pulse.stepping:
            return False
        return self.pulse.exchanging or self.used[1] - self.worked < _AT_REST * (now - self.stepped) * TICKS

    def _is_stopped(self, stat: Stat) -> bool:
        return stat.is_stopped

    def _life(self, stat: Stat) -> tuple[int, ...]:
        return *stat.used, *self.pulse.life
