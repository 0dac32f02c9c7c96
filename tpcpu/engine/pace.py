"""Which rank the others wait for, if one is slower than its peers: a busy core, a fallen memory or link speed.

Whoever is slow comes last to every exchange and waits for nobody, while all others wait for it. So no clock has to be
shared: each rank notes how long it waits in exchanges (`kernels/exchange.py`), and the one that waits least is slow by
as much as the others wait longer. What waiting is common to all, the message's own way, cancels out.

Knows numbers of ranks; must not know how they are brought together.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_SECONDS, SECONDS = 1.0, 5.0
"""From look to look: sooner for the first, as many answers take no longer."""

NOTICED = 0.15
"""Of a step: what the others wait for one rank, beyond what is explained by its larger share of the weights."""

_SAY_AGAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Slow:
    """A rank, its host, and the share of a step that the others wait for it."""

    rank: int
    host: str
    waited: float


def slowest(waited: Sequence[float], walked: Sequence[float], nbytes: Sequence[int]) -> tuple[int, float] | None:
    """The rank that the others wait for, and for what share of their steps; None where that is not worth a word.

    By rank: seconds, or cycles, of waiting in exchanges and of all work, and the bytes of weights that it reads.
    """
    shares = [wait / max(walk, 1e-9) for wait, walk in zip(waited, walked, strict=True)]
    rank = min(range(len(shares)), key=shares.__getitem__)
    others = [share for other, share in enumerate(shares) if other != rank]
    excess = statistics.median(others) - shares[rank]
    explained = max(1 - statistics.mean(nbytes) / nbytes[rank], 0.0) if nbytes[rank] else 0.0
    return (rank, excess) if excess > NOTICED + explained else None


class Pace:
    """What rank 0 keeps of it: when to look, and whom it has found."""

    def __init__(self, names: Sequence[str], nbytes: Sequence[int]) -> None:
        """`names`: the host of each rank; `nbytes`: its weights."""
        self.found: dict[int, Slow] = {}
        """By rank, with the largest share that was seen."""
        self._names, self._nbytes = names, nbytes
        self._next = FIRST_SECONDS
        self._worked = 0.0
        self._before = [(0, 0)] * len(names)
        self._said: dict[int, float] = {}

    def is_due(self, seconds: float) -> bool:
        """Whether it is time to look, after a step of so many seconds."""
        self._worked += seconds
        if self._worked < self._next:
            return False
        self._worked, self._next = 0.0, SECONDS
        return True

    def judge(self, counters: Sequence[tuple[int, int]]) -> str | None:
        """`counters`: cycles waited and cycles walked since the start, by rank. A line about a slow rank, if any."""
        waited = [now - before for (now, _), (before, _) in zip(counters, self._before, strict=True)]
        walked = [now - before for (_, now), (_, before) in zip(counters, self._before, strict=True)]
        self._before = list(counters)
        found = slowest(waited, walked, self._nbytes)
        if found is None:
            return None
        rank, share = found
        before = self.found.get(rank)
        self.found[rank] = Slow(rank, self._names[rank], round(max(share, before.waited if before else 0.0), 3))
        now = time.monotonic()
        if now - self._said.get(rank, -_SAY_AGAIN_SECONDS) < _SAY_AGAIN_SECONDS:
            return None
        self._said[rank] = now
        return f"rank {rank} on {self._names[rank]}: all-reduce waits {share:.0%} of the step for it"
