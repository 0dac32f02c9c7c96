"""Joining the ranks from inside the step, through the window that ranks of one host share.

Every rank puts its part into its own half of the window, posts a number, waits for those whose features it needs, and
adds all parts in rank order, in float32: all ranks hold the same bits. What is added next, residual and bias, is added
in the same pass, as `activations.add` does it. A message of many tokens goes in pieces.

**Numbers.** A use is one piece of a message in one half. Uses alternate between the halves, and every use posts
numbers above all before. The number before a message's first lies in the counter of the half that it begins with;
thread 0 writes the counter of the other half, which nobody reads before the barrier behind the message. Messages take
an odd number of uses, and a program that has an odd number of messages ends with `meet`, so every message of a program
always begins with the same half, at the same place: `linear` writes the parts of one token straight to the window.

**Places.** What costs most is to write a line that another core still holds. So messages take their halves' places in
turn: when a line is written again, the others' caches have mostly lost it.

**Why nobody overwrites what another still reads.** What is written for use u lies in the half of use u - 2. Between two
messages each rank has a barrier: whoever posts u - 1 has threads behind it that are done with u - 2, and who writes u
comes after the barrier behind u - 1, before which its threads have seen every rank post u - 1. Within a message
threads divide every piece alike. A thread that writes u has waited in u - 1 for just those threads whose shares meet
its own, and they are the ones that have read it in u - 2.

Knows the window's table; must not know MPI, nor who else waits for what.
"""

from tpcpu.kernels import record as R
from tpcpu.kernels import window_layout as W
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.isa import selected
from tpcpu.kernels.memory import cycles, load_i64, store_i64
from tpcpu.kernels.record import BLOCK
from tpcpu.kernels.shares import HELPED
from tpcpu.kernels.simd import vectors as v
from tpcpu.kernels.team import post_at, wait_at
from tpcpu.kernels.team_layout import SPINS, WAITED

LANES = v.LANES
ROWS = selected().panel_rows
PIECE_BYTES = 256 * 1024
"""A piece at most: what a core's second cache holds well."""
_FOR_EVER = 1 << 62


@helper
def word(record, number):
    return load_i64(record + 8 * number)


@helper
def entry(table, rank):
    return table + 8 * (W.ENTRIES + W.ENTRY_WORDS * rank)


@helper
def begin_uses(record, table, thread, uses):
    """The number before this message's first; sees to the next message's."""
    counters, half = word(table, W.COUNTERS), word(record, R.HALF)
    number = load_i64(counters + half * W.LINE)
    if thread == 0:
        store_i64(counters + (1 - half) * W.LINE, number + uses)
    return number


@helper
def post_use(table, thread, number, team):
    line = word(entry(table, word(table, W.RANK)), W.LINES) + thread * W.LINE
    post_at(line, number, team, line + W.WAITERS)


@helper
def note_wait(team, thread, begin):
    """For thread 0, which stands for its rank: how long it has waited for the others since `begin`."""
    if thread == 0:
        store_i64(team + WAITED, load_i64(team + WAITED) + cycles() - begin)


@helper
def await_threads(table, rank, first, last, number, team):
    """Until threads `first` to `last` of a rank have posted `number`. False if the team is aborted."""
    lines, spins = word(entry(table, rank), W.LINES), load_i64(team + SPINS)
    for thread in range(first, last + 1):
        line = lines + thread * W.LINE
        if wait_at(line, number, team, spins, line + W.WAITERS, _FOR_EVER):
            return False
    return True


@helper
def _copy(source, out, count):
    """`count` float32, a multiple of a block."""
    for i in range(0, 4 * count, 16 * LANES):
        a, b = v.load(source + i), v.load(source + i + 4 * LANES)
        c, d = v.load(source + i + 8 * LANES), v.load(source + i + 12 * LANES)
        v.store(out + i, a)
        v.store(out + i + 4 * LANES, b)
        v.store(out + i + 8 * LANES, c)
        v.store(out + i + 12 * LANES, d)


@helper
def _with(value, residual, bias, at):
    """The residual + value + bias, in this order, of those that are there."""
    if residual:
        value = v.add(v.load(residual + at), value)
    if bias:
        value = v.add(value, v.load(bias + at))
    return value


@helper
def _sum(table, at, own, count, residual, bias, out):
    """The parts of all ranks from `at` bytes after the beginning of their data, in rank order; then what is added.

    This rank's own is read at `own`. Writes `count` float32 and leaves what lies behind them.
    """
    ranks, me = word(table, W.RANKS), word(table, W.RANK)
    entries = entry(table, 0)
    first = own if me == 0 else load_i64(entries) + at
    whole = 4 * (count // (4 * LANES) * 4 * LANES)
    i = 0
    while i < whole:
        part = first + i
        a, b = v.load(part), v.load(part + 4 * LANES)
        c, d = v.load(part + 8 * LANES), v.load(part + 12 * LANES)
        for rank in range(1, ranks):
            part = (own if me == rank else load_i64(entries + 8 * W.ENTRY_WORDS * rank) + at) + i
            a, b = v.add(a, v.load(part)), v.add(b, v.load(part + 4 * LANES))
            c, d = v.add(c, v.load(part + 8 * LANES)), v.add(d, v.load(part + 12 * LANES))
        v.store(out + i, _with(a, residual, bias, i))
        v.store(out + i + 4 * LANES, _with(b, residual, bias, i + 4 * LANES))
        v.store(out + i + 8 * LANES, _with(c, residual, bias, i + 8 * LANES))
        v.store(out + i + 12 * LANES, _with(d, residual, bias, i + 12 * LANES))
        i += 16 * LANES
    while i < 4 * count:
        total = v.load(first + i)
        for rank in range(1, ranks):
            part = own if me == rank else load_i64(entries + 8 * W.ENTRY_WORDS * rank) + at
            total = v.add(total, v.load(part + i))
        v.store_first(out + i, _with(total, residual, bias, i), count - i // 4)
        i += 4 * LANES


# One token


@kernel("exchange-one")
def exchange_one(record, thread, threads):
    """out = (residual + the sum of all ranks' parts) + bias, for one token; every thread a slice of blocks.

    With `DIRECT` the parts are in the window already, each panel of rows written by the thread that has its first
    unit (see `linear.py`): thread u of T, where u / T <= (panel + 1 / spans) / panels; or by one of those that help
    it. How many spans the panels of another rank have is not known here, so this waits for whoever it might be.
    """
    table, team = word(record, R.WINDOW), word(word(record, R.STEP), R.TEAM)
    number = begin_uses(record, table, thread, 1) + 1
    width, rank = word(record, R.WIDTH), word(table, W.RANK)
    panels = (width + ROWS - 1) // ROWS
    at = word(record, R.HALF) * word(table, W.HALF_BYTES) + word(record, R.PLACE)
    if not word(record, R.DIRECT):
        own = word(entry(table, rank), W.PART) + at
        first, last = ROWS * (panels * thread // threads), ROWS * (panels * (thread + 1) // threads)
        for i in range(first, min(last, width), LANES):
            v.store_first(own + 4 * i, v.load(word(record, R.IN) + 4 * i), last - i)
    post_use(table, thread, number, team)

    blocks = (width + BLOCK - 1) // BLOCK
    first, last = blocks * thread // threads * BLOCK, min(blocks * (thread + 1) // threads * BLOCK, width)
    if first >= last:
        return
    began = cycles()
    for other in range(word(table, W.RANKS)):
        theirs = word(entry(table, other), W.THREADS)
        earliest = first // ROWS * theirs // panels
        latest = min(((last - 1) // ROWS * theirs + theirs - 1) // panels, theirs - 1)
        if not await_threads(table, other, max(earliest - HELPED, 0), latest, number, team):
            return
        # Helpers of the first threads are the last ones.
        wrapped = max(theirs - max(HELPED - earliest, 0), latest + 1)
        if not await_threads(table, other, wrapped, theirs - 1, number, team):
            return
    note_wait(team, thread, began)
    residual, bias = word(record, R.SECOND), word(record, R.BIAS)
    own = word(entry(table, rank), W.PART) + at if word(record, R.DIRECT) else word(record, R.IN)
    _sum(
        table, at + 4 * first, own + 4 * first, last - first,
        residual + 4 * first if residual else 0, bias + 4 * first if bias else 0, word(record, R.OUT) + 4 * first,
    )  # fmt: skip


# Many tokens


@helper
def _run(record, block, last):
    """The token of a block, its first feature, how many blocks of the token follow before `last`, their features."""
    width = word(record, R.WIDTH)
    row = (width + BLOCK - 1) // BLOCK
    token = block // row
    first = (block - token * row) * BLOCK
    blocks = min(last - block, row - (block - token * row))
    return token, first, blocks, min(blocks * BLOCK, width - first)


@helper
def _places(record, token, feature):
    """Where a feature of a token is in the residual and the bias, 0 for what is not there, and in the result."""
    residual, bias = word(record, R.SECOND), word(record, R.BIAS)
    if residual:
        residual += token * word(record, R.SECOND_STRIDE) + 4 * feature
    if bias:
        bias += 4 * feature
    return residual, bias, word(record, R.OUT) + token * word(record, R.OUT_STRIDE) + 4 * feature


@helper
def _fill(record, begin, first, last, half):
    """Copies blocks `first` to `last` of the message to where they belong in a half that begins with `begin`."""
    block = first
    while block < last:
        token, feature, blocks, _ = _run(record, block, last)
        source = word(record, R.IN) + token * word(record, R.IN_STRIDE) + 4 * feature
        _copy(source, half + 4 * BLOCK * (block - begin), blocks * BLOCK)
        block += blocks


@helper
def _collect(record, table, begin, first, last, at):
    """Adds up blocks `first` to `last` of the message, of a piece that begins with `begin` and at `at` in the data."""
    block = first
    while block < last:
        token, feature, blocks, count = _run(record, block, last)
        residual, bias, out = _places(record, token, feature)
        own = word(record, R.IN) + token * word(record, R.IN_STRIDE) + 4 * feature
        _sum(table, at + 4 * BLOCK * (block - begin), own, count, residual, bias, out)
        block += blocks


@helper
def deliver(record, part, begin, first, last):
    """As `_collect`, of sums that one rank has already."""
    block = first
    while block < last:
        token, feature, blocks, count = _run(record, block, last)
        residual, bias, out = _places(record, token, feature)
        source = part + 4 * BLOCK * (block - begin)
        for i in range(0, 4 * count, 4 * LANES):
            v.store_first(out + i, _with(v.load(source + i), residual, bias, i), count - i // 4)
        block += blocks


@helper
def place_of(record, table, piece):
    """Where in a half pieces of so many blocks begin: at the message's own place if there is room behind it."""
    place = word(record, R.PLACE)
    return place if place + 4 * BLOCK * piece <= word(table, W.HALF_BYTES) else 0


@helper
def _owner(block, blocks, threads):
    """The thread whose share of `blocks` a block is in."""
    return ((block + 1) * threads - 1) // blocks


@helper
def _in_one_shot(record, table, thread, number, team, begin, low, high, first, last, piece, at):
    """One piece, whatever the other ranks' threads; this one adds blocks `first` to `last` of a whole piece's."""
    began = cycles()
    for other in range(word(table, W.RANKS)):
        theirs = word(entry(table, other), W.THREADS)
        earliest, latest = _owner(first, piece, theirs), _owner(last - 1, piece, theirs)
        if not await_threads(table, other, earliest, latest, number, team):
            return False
    note_wait(team, thread, began)
    _collect(record, table, begin, low, high, at)
    return True


@helper
def _in_two_shots(record, table, thread, number, team, begin, low, high, at):
    """One piece where thread t needs only threads t: each rank adds a share of it and gives it to the others."""
    ranks, rank = word(table, W.RANKS), word(table, W.RANK)
    count = high - low
    began = cycles()
    for other in range(ranks):
        if not await_threads(table, other, thread, thread, number, team):
            return False
    note_wait(team, thread, began)
    mine, stop = low + count * rank // ranks, low + count * (rank + 1) // ranks
    place = at + 4 * BLOCK * (mine - begin)
    # To where this rank's own part lay, which nobody else reads.
    own = word(entry(table, rank), W.PART) + place
    _sum(table, place, own, (stop - mine) * BLOCK, 0, 0, own)
    post_use(table, thread, number + 1, team)
    for other in range(ranks):
        if not await_threads(table, other, thread, thread, number + 1, team):
            return False
        part = word(entry(table, other), W.PART) + at
        deliver(record, part, begin, low + count * other // ranks, low + count * (other + 1) // ranks)
    return True


@kernel("exchange-many")
def exchange_many(record, thread, threads):
    """out = (residual + the sum of all ranks' parts) + bias, for the tokens of the batch, piece by piece.

    In one shot every rank adds everything; in two, each adds its share and the others take the sums from it. The order
    of adding is the same.
    """
    step, table = word(record, R.STEP), word(record, R.WINDOW)
    team, half_bytes = word(step, R.TEAM), word(table, W.HALF_BYTES)
    blocks = word(step, R.TOKENS) * ((word(record, R.WIDTH) + BLOCK - 1) // BLOCK)
    # An odd number of pieces, all of one size but the last.
    pieces = (4 * BLOCK * blocks + min(half_bytes, PIECE_BYTES) - 1) // min(half_bytes, PIECE_BYTES) | 1
    piece = (blocks + pieces - 1) // pieces
    aligned = word(table, W.ALIGNED)
    two = aligned and 4 * BLOCK * blocks >= word(record, R.TWO_SHOT)
    posts = 2 if two else 1
    number = begin_uses(record, table, thread, pieces * posts)
    # The division is that of a whole piece, also where the last one is shorter.
    first, last = piece * thread // threads, piece * (thread + 1) // threads
    place = place_of(record, table, piece)
    for use in range(pieces):
        at = ((word(record, R.HALF) + use) & 1) * half_bytes + place
        begin = min(use * piece, blocks)
        low, high = min(begin + first, blocks), min(begin + last, blocks)
        _fill(record, begin, low, high, word(entry(table, word(table, W.RANK)), W.PART) + at)
        post_use(table, thread, number + 1, team)
        going = True
        if two:
            going = _in_two_shots(record, table, thread, number + 1, team, begin, low, high, at)
        elif first < last:
            going = _in_one_shot(record, table, thread, number + 1, team, begin, low, high, first, last, piece, at)
        if not going:
            return
        number += posts


@kernel("exchange-meet")
def meet(record, thread, _threads):
    """A use of a half without a message: makes their number in a program even."""
    table, team = word(record, R.WINDOW), word(word(record, R.STEP), R.TEAM)
    number = begin_uses(record, table, thread, 1) + 1
    if thread == 0:
        post_use(table, 0, number, team)
        for other in range(word(table, W.RANKS)):
            if not await_threads(table, other, 0, 0, number, team):
                return
