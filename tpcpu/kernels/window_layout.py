"""Byte offsets in a rank's part of the window, and in the table that compiled code finds the parts by.

One fact per cache line. A word that others wait for has, `WAITERS` behind it, the number of threads of any process
that sleep on it. Imports nothing.
"""

LINE = 64

WAITERS = 8
"""From a word that is waited for to the number of its sleepers."""

# A rank's part: control words, mail, then data.
TICKET = 0 * LINE
"""Rank 0: the last piece of a message that it has put into its mail."""
TAKEN = 1 * LINE
"""The last piece that this rank has taken from rank 0's mail."""
OFFERED = 2 * LINE
"""The last array that this rank has put into its mail for rank 0,"""
GATHERED = 3 * LINE
"""and, at rank 0, the last that it has taken from everybody's."""
SEQUENCES = 8 * LINE
"""From here one line a thread: the last exchange to which its part lies in the data,"""
MOST_THREADS = 1024 - 8
"""for so many threads."""
MAIL = SEQUENCES + MOST_THREADS * LINE
"""From rank 0 two pieces of messages, from the others an array."""
MAIL_BYTES = 32 * 1024
DATA = MAIL + 2 * MAIL_BYTES
"""Two halves for partial sums; a multiple of a page."""

# The table, in words: private to a process.
RANKS = 0
RANK = 1
"""This process's rank."""
COUNTERS = 2
"""Address of two lines, one for each half: the number of the exchange before the next one that begins there."""
HALF_BYTES = 3
ALIGNED = 4
"""1 if all ranks have as many threads."""
ENTRIES = 8
"""From here on for each rank:"""
PART = 0
"""the address of its data,"""
LINES = 1
"""of its threads' sequence lines,"""
THREADS = 2
"""and how many threads it has."""
ENTRY_WORDS = 4
