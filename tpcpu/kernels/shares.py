"""How threads share a product as it goes: each takes from the front of its own share, then from the back of others'.

A core gets now more, now less of the memory's bandwidth, so equal shares do not end together. Every thread has a word
that tells what nobody has taken of its share: the product's number, the first unit and the one behind the last, in 44,
10 and 10 bits. A unit is a panel, or some in a large share. Whoever comes first in a product, owner or helper, finds an
older number there and begins it anew. Takes are a quarter of what is left, so a share costs few of them and ends in
small ones.
"""

from tpcpu.kernels.compile import helper
from tpcpu.kernels.memory import compare_exchange, load_acquire
from tpcpu.kernels.team_layout import ARRIVALS, LINE

HELPED = 3
"""A thread looks at the shares of so many that follow it: each look at another core's line costs 0.1 us."""
_BITS = 10
_MOST = (1 << _BITS) - 1
_TAG_BITS = 64 - 2 * _BITS
_TAGS = (1 << _TAG_BITS) - 1
"""Years of products, so that of two numbers half of them apart or less the larger is the later one."""


@helper
def take(team, threads, owner, number, count, helps):
    """Some panels of the share of `owner`, which has `count` in all: the first << 32 | how many, or 0.

    `number`: the product's, larger than that of any before. `helps`: for another thread.
    """
    word = team + ARRIVALS + (threads + owner) * LINE
    unit = 1 + count // _MOST
    tag = number & _TAGS
    while True:
        seen = load_acquire(word)
        age = (tag - (seen >> 2 * _BITS)) & _TAGS
        if age > _TAGS >> 1:
            # Somebody is in a later product: nothing is left of this one.
            return 0
        first, last = (seen >> _BITS) & _MOST, seen & _MOST
        if age != 0:
            first, last = 0, (count + unit - 1) // unit
        left = last - first
        if left <= 0:
            return 0
        some = (left + 3) >> 2
        if helps:
            last -= some
            taken = last
        else:
            taken = first
            first += some
        if compare_exchange(word, seen, (tag << 2 * _BITS) | (first << _BITS) | last):
            return (taken * unit << 32) | min(some * unit, count - taken * unit)
