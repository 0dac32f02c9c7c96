"""Products of packed weights with the activations of one or more tokens: which thread computes which tiles.

Knows panels, spans and threads; the arithmetic is in `tiles.py`. Threads divide the panels for several tokens. For one
token they divide the spans of all panels: shares are then even whatever the shape, and who is through with its own
helps others with theirs. A panel that crosses from one thread to the next is joined by the thread that began it; the
others publish their sums first of all, so that it need hardly wait. The order of sums is that of a tile that has the
whole panel.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.memory import load_i64
from tpcpu.kernels.record import BLOCK, FLOATS
from tpcpu.kernels.shares import HELPED, take
from tpcpu.kernels.simd import vectors as v
from tpcpu.kernels.team import post, wait
from tpcpu.kernels.team_layout import ARRIVALS, LINE, PUBLISHED, SPINS
from tpcpu.kernels.tiles import PREFETCH, ROWS, part, tile, tile_of_one


@helper
def _segment_of(record, panel):
    """The segment that holds a panel of the product, and the panel's number in it."""
    segment = load_i64(record + 8 * R.SEGMENTS)
    count = load_i64(segment + 8 * R.S_PANELS)
    while panel >= count:
        panel -= count
        segment += 8 * R.SEGMENT_WORDS
        count = load_i64(segment + 8 * R.S_PANELS)
    return segment, panel


@helper
def _room(record, thread):
    """Where the sums of spans go of the panel that `thread` begins and does not end."""
    return load_i64(record + 8 * R.SCRATCH) + thread * load_i64(record + 8 * R.SCRATCH_STRIDE)


@helper
def _join(record, panel, spans, room):
    """Adds up the spans of a panel in order, as a tile does, and stores them with the bias."""
    segment, inside = _segment_of(record, panel)
    total = v.splat(float32(0.0))
    for span in range(spans):
        total = v.add(total, v.load(room + 4 * ROWS * span))
    row = inside * ROWS
    bias = load_i64(segment + 8 * R.S_BIAS)
    if bias:
        total = v.add(total, v.load(bias + 4 * row))
    v.store_first(load_i64(segment + 8 * R.S_OUT_ONE) + 4 * row, total, load_i64(segment + 8 * R.S_ROWS) - row)


@helper
def _spans(record):
    """Spans in a row of the product."""
    columns = load_i64(load_i64(record + 8 * R.SEGMENTS) + 8 * R.S_COLUMNS)
    return max((columns + BLOCK * R.SPAN - 1) // (BLOCK * R.SPAN), 1)


@helper
def _number(record):
    """What a thread publishes: larger with every product of every step."""
    return load_i64(load_i64(record + 8 * R.STEP) + 8 * R.RUN) + load_i64(record + 8 * R.NUMBER)


@helper
def _publish(record, thread):
    """Tells that the sums of spans of this thread lie where they belong."""
    team = load_i64(load_i64(record + 8 * R.STEP) + 8 * R.TEAM)
    post(team + ARRIVALS + thread * LINE + PUBLISHED, _number(record), team)


@helper
def _await_parts(record, thread, threads, units, stop):
    """Until the threads that have units before `stop` have published theirs. False if the team is aborted."""
    team = load_i64(load_i64(record + 8 * R.STEP) + 8 * R.TEAM)
    spins = load_i64(team + SPINS)
    other = thread + 1
    while other < threads and units * other // threads < stop:
        some = units * other // threads < units * (other + 1) // threads
        if some and wait(team + ARRIVALS + other * LINE + PUBLISHED, _number(record), team, spins):
            return False
        other += 1
    return True


@cache
def linear_of_one(form: int, exact: bool) -> Kernel:
    """The kernel for steps of one token and weights of a format.

    Its activations may lie in a private copy for every thread, row after row from `X_ONE`. Several panels side by side
    where chains of additions would be too long otherwise, or where weights are asked for ahead; one after another where
    the CPU's own prefetchers follow, which know one stream better than several.
    """
    floats = int(exact or form in FLOATS)
    wide = 4 if floats else 2 if PREFETCH else 1

    def linear(record, thread, threads):
        if load_i64(load_i64(record + 8 * R.COUNT)) == 0:
            return
        private = thread if load_i64(record + 8 * R.IS_PRIVATE) else 0
        panels = load_i64(record + 8 * R.PANELS)
        spans = _spans(record) if threads > 1 else 1
        units = panels * spans
        begin, end = units * thread // threads, units * (thread + 1) // threads
        first, stop = (begin + spans - 1) // spans, end // spans
        if begin < end and begin % spans != 0:
            # The rest of a panel, or some of it: its sums go to the thread that has its first span.
            panel = begin // spans
            owner = ((panel * spans + 1) * threads - 1) // units
            segment, inside = _segment_of(record, panel)
            last = min(end, (panel + 1) * spans) - panel * spans
            part(form, floats, record, segment, inside, private, begin % spans, last, _room(record, owner))
            _publish(record, thread)

        # Its begun panel before the whole ones: when these are done, so are the others' rests, which they do first.
        joins = begin < end and end % spans != 0 and first <= stop
        if joins:
            segment, inside = _segment_of(record, stop)
            part(form, floats, record, segment, inside, private, 0, end - stop * spans, _room(record, thread))

        team = load_i64(load_i64(record + 8 * R.STEP) + 8 * R.TEAM)
        helped, owner = 0, thread
        start, left = first, max(stop - first, 0)
        while True:
            if threads > 1:
                taken = take(team, threads, owner, _number(record), left, helped)
                if taken == 0:
                    helped += 1
                    if helped > min(HELPED, threads - 1):
                        break
                    owner = (thread + helped) % threads
                    start = (units * owner // threads + spans - 1) // spans
                    left = max(units * (owner + 1) // threads // spans - start, 0)
                    continue
                first = start + (taken >> 32)
                end_here = first + (taken & 0xFFFFFFFF)
            else:
                end_here = stop
            segment = load_i64(record + 8 * R.SEGMENTS)
            before = 0
            for _ in range(load_i64(record + 8 * R.SEGMENT_COUNT)):
                count = load_i64(segment + 8 * R.S_PANELS)
                panel, last = max(first - before, 0), min(end_here - before, count)
                if wide > 1:
                    while panel + wide <= last:
                        tile_of_one(wide, form, floats, record, segment, panel, private)
                        panel += wide
                while panel < last:
                    tile_of_one(1, form, floats, record, segment, panel, private)
                    panel += 1
                before += count
                segment += 8 * R.SEGMENT_WORDS
            if threads == 1:
                break

        if joins and _await_parts(record, thread, threads, units, (stop + 1) * spans):
            _join(record, stop, spans, _room(record, thread))

    return Kernel(linear, f"linear-of-one-{form}-{'exact' if floats else 'int8'}")


@cache
def linear(form: int, exact: bool) -> Kernel:
    """The kernel for steps of several tokens and weights of a format.

    A panel comes from memory once and stays in the cache while tiles of 8, 4, 2 and 1 tokens go through it.
    """
    floats = int(exact or form in FLOATS)
    beside = 2 if floats else 1
    tall = 4 if floats else 8

    def linear(record, thread, threads):
        tokens = load_i64(load_i64(record + 8 * R.COUNT))
        panels = load_i64(record + 8 * R.PANELS)
        first, stop = panels * thread // threads, panels * (thread + 1) // threads
        segment = load_i64(record + 8 * R.SEGMENTS)
        before = 0
        for _ in range(load_i64(record + 8 * R.SEGMENT_COUNT)):
            count = load_i64(segment + 8 * R.S_PANELS)
            panel, last = max(first - before, 0), min(stop - before, count)
            while panel < last:
                step = min(beside, last - panel)
                token = 0
                while token < tokens:
                    left = tokens - token
                    if step == beside and left >= tall:
                        tile(beside, tall, form, floats, record, segment, panel, token)
                        token += tall
                        continue
                    many = 4 if left >= 4 else 2 if left >= 2 else 1
                    for p in range(step):
                        if many == 4:
                            tile(1, 4, form, floats, record, segment, panel + p, token)
                        elif many == 2:
                            tile(1, 2, form, floats, record, segment, panel + p, token)
                        else:
                            tile(1, 1, form, floats, record, segment, panel + p, token)
                    token += many
                panel += step
            before += count
            segment += 8 * R.SEGMENT_WORDS

    return Kernel(linear, f"linear-{form}-{'exact' if floats else 'int8'}")
