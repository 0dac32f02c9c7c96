"""Joining the hosts from inside the step: what the ranks of a host have summed is exchanged with the other hosts.

The sum of a host, which each of its ranks holds (`exchange.py`), is cut into slices. Rank i of each host exchanges
slice i with the ranks i of the other hosts, by an MPI function that thread 0 calls; adds the hosts' sums in host order,
in float32; and gives the result to its own host through the window, where every rank takes all slices. So all ranks of
all hosts hold the same bits. Hosts may have unlike numbers of ranks: there are as many slices as the smallest has.

What travels as bf16 is rounded first, a host's own sum too, so that all add the same numbers.

**Why nobody overwrites what another still reads**: the numbers, halves and places are those of `exchange.py`. Within a
message every thread waits for all threads of the host before it reads a piece, and so before it writes the next but
one into the same half: they have read it when they post the piece between.

Knows the window's table and how a C function is called; must not know MPI beyond that.
"""

from tpcpu.kernels import record as R
from tpcpu.kernels import window_layout as W
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.exchange import (
    LANES,
    PIECE_BYTES,
    await_threads,
    begin_uses,
    deliver,
    entry,
    note_wait,
    place_of,
    post_use,
    word,
)
from tpcpu.kernels.memory import call_c, cycles, store_i64
from tpcpu.kernels.record import BLOCK
from tpcpu.kernels.simd import vectors as v


@helper
def _blocks(record):
    """Of the whole message: tokens, each of whole blocks, behind one another."""
    tokens = word(word(record, R.STEP), R.TOKENS)
    return tokens * ((word(record, R.WIDTH) + BLOCK - 1) // BLOCK)


@helper
def _bytes(record):
    """Of a number on the way."""
    return 2 if word(record, R.IS_ROUNDED) else 4


@kernel("round-slice")
def round_slice(record, thread, threads):
    """This rank's slice of the sums to bf16."""
    part, parts = word(record, R.SLICE), word(record, R.SLICES)
    if part < parts:
        blocks = _blocks(record)
        begin = blocks * part // parts
        count = blocks * (part + 1) // parts - begin
        first, last = begin + count * thread // threads, begin + count * (thread + 1) // threads
        sums, out = word(record, R.SUMS), word(record, R.ROUNDED)
        for i in range(first * BLOCK, last * BLOCK, LANES):
            v.store_bf16(out + 2 * i, v.load(sums + 4 * i))


@kernel("gather-slices")
def gather_slices(record, thread, _threads):
    """Sends this rank's slice to its like on the other hosts, and receives theirs, in host order."""
    part, parts = word(record, R.SLICE), word(record, R.SLICES)
    if thread == 0 and part < parts:
        blocks = _blocks(record)
        begin = blocks * part // parts
        count = (blocks * (part + 1) // parts - begin) * BLOCK
        if count:
            source = word(record, R.ROUNDED) if word(record, R.IS_ROUNDED) else word(record, R.SUMS)
            datatype, team = word(record, R.WIRE_DATATYPE), word(word(record, R.STEP), R.TEAM)
            began = cycles()
            status = call_c(
                word(record, R.WIRE_FUNCTION), source + _bytes(record) * BLOCK * begin, count, datatype,
                word(record, R.RECEIVED), count, datatype, word(record, R.WIRE_COMMUNICATOR),
            )  # fmt: skip
            note_wait(team, 0, began)
            store_i64(record + 8 * R.STATUS, status)


@helper
def _sum_hosts(record, begin, first, last, stop, out):
    """Adds up blocks `first` to `last` of all hosts, in host order; this rank's slice goes from `begin` to `stop`."""
    hosts, received = word(record, R.HOSTS), word(record, R.RECEIVED)
    rounded = word(record, R.IS_ROUNDED)
    size = _bytes(record)
    apart = size * BLOCK * (stop - begin)
    source = received + size * BLOCK * (first - begin)
    for i in range(0, (last - first) * BLOCK, LANES):
        at = source + size * i
        total = v.load_bf16(at) if rounded else v.load(at)
        for host in range(1, hosts):
            at = source + host * apart + size * i
            total = v.add(total, v.load_bf16(at) if rounded else v.load(at))
        v.store(out + 4 * i, total)


@kernel("share-slices")
def share_slices(record, thread, threads):
    """out = (residual + the sum of all hosts) + bias; every rank takes the slices of all ranks of its host.

    Of one token a thread writes the slice of features that is its own in all activations.
    """
    table, team = word(record, R.WINDOW), word(word(record, R.STEP), R.TEAM)
    half_bytes, blocks = word(table, W.HALF_BYTES), _blocks(record)
    pieces = (4 * BLOCK * blocks + min(half_bytes, PIECE_BYTES) - 1) // min(half_bytes, PIECE_BYTES) | 1
    piece = (blocks + pieces - 1) // pieces
    number = begin_uses(record, table, thread, pieces)
    place = place_of(record, table, piece)
    part, parts, rank = word(record, R.SLICE), word(record, R.SLICES), word(table, W.RANK)
    begin, stop = blocks * part // parts, blocks * (part + 1) // parts
    for use in range(pieces):
        at = ((word(record, R.HALF) + use) & 1) * half_bytes + place
        low = min(use * piece, blocks)
        high = min(low + piece, blocks)
        if part < parts:
            mine, count = max(low, begin), max(min(high, stop) - max(low, begin), 0)
            first, last = mine + count * thread // threads, mine + count * (thread + 1) // threads
            own = word(entry(table, rank), W.PART) + at
            _sum_hosts(record, begin, first, last, stop, own + 4 * BLOCK * (first - low))
        number += 1
        post_use(table, thread, number, team)
        began = cycles()
        for other in range(word(table, W.RANKS)):
            if not await_threads(table, other, 0, word(entry(table, other), W.THREADS) - 1, number, team):
                return
        note_wait(team, thread, began)
        first, last = low + (high - low) * thread // threads, low + (high - low) * (thread + 1) // threads
        for other in range(parts):
            theirs, until = max(first, blocks * other // parts), min(last, blocks * (other + 1) // parts)
            if theirs < until:
                deliver(record, word(entry(table, other), W.PART) + at, low, theirs, until)
