"""Waiting and posting for Python, on words that several processes share.

Kernels by their signature only: (block, address, value), where `block` is laid out as a team and says how to wait.
Knows words and nothing of what they count.
"""

from tpcpu.kernels.compile import kernel
from tpcpu.kernels.memory import load_i64, store_i64
from tpcpu.kernels.team import post_at, wait_at
from tpcpu.kernels.team_layout import JOB, SPINS
from tpcpu.kernels.window_layout import WAITERS

RESULT = JOB
"""Where in the block the outcome of a wait is: 0, or why it ended early."""


@kernel("mailbox-wait")
def wait_word(block, address, target):
    """Until the word at `address` is at least `target`, or one sleep is over, which a signal ends as well."""
    result = wait_at(address, target, block, load_i64(block + SPINS), address + WAITERS, 1)
    store_i64(block + RESULT, result)


@kernel("mailbox-post")
def post_word(block, address, value):
    """Stores `value` at `address` and wakes whoever sleeps on it."""
    post_at(address, value, block, address + WAITERS)
