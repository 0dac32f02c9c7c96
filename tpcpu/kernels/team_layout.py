"""Byte offsets in a team's block of memory: one fact per cache line. Imports nothing."""

LINE = 64

TICKET = 0 * LINE
"""Counts jobs; workers wait for the next."""
ABORT = 1 * LINE
"""Not 0: everybody leaves."""
SLEEPERS = 2 * LINE
"""Threads that sleep, or are about to, on any word of the team."""
RELEASE = 3 * LINE
"""The last barrier that all have passed."""
JOB = 4 * LINE
"""Address of the records to walk,"""
RECORD_COUNT = 4 * LINE + 8
"""how many,"""
TRACE = 4 * LINE + 16
"""and where their times are added up: for each thread and record the cycles in the kernel and those after it. Or 0."""
THREADS = 5 * LINE
"""What does not change: threads of the team,"""
SPINS = 5 * LINE + 8
"""looks before a barrier yields,"""
YIELDS = 5 * LINE + 16
"""yields before it sleeps,"""
IDLE_SPINS = 5 * LINE + 24
"""looks before a worker without a job yields,"""
FUTEX_CALL = 5 * LINE + 32
"""the number of the futex system call,"""
TIMEOUT = 5 * LINE + 40
"""its longest sleep: a timespec of two words,"""
NOTE = 5 * LINE + 56
"""and the address of two words that others may watch: the number of the record that thread 0 is at, -1 between two
walks, and how many walks there have been."""
WALKED = 6 * LINE
"""Cycles that thread 0 has spent in jobs,"""
WAITED = 6 * LINE + 8
"""and, of these, in waiting for other ranks to bring their part of a sum."""
ARRIVALS = 7 * LINE
"""From here one line a thread: the last barrier it has reached,"""
PUBLISHED = 8
"""and, so many bytes behind, the last product of which it has published its part."""

# Behind these, one line a thread: what is left of its share of a product, see `shares.py`.
