"""Products of packed weights with the activations of one or more tokens: which thread computes which tiles.

Knows panels, spans and threads; the arithmetic is in `tiles.py`. Threads divide the panels for many tokens. For one
token they divide the spans of all panels: shares are then even whatever the shape. A panel that crosses from one thread
to the next is joined by the thread that began it; the others publish their sums first of all, so that it need hardly
wait. The order of sums is that of a tile that has the whole panel.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.memory import load_i64
from tpcpu.kernels.record import BLOCK, FLOATS
from tpcpu.kernels.simd import vectors as v
from tpcpu.kernels.team import post, wait
from tpcpu.kernels.team_layout import ARRIVALS, LINE, PUBLISHED, SPINS
from tpcpu.kernels.tiles import ROWS, part, tile


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
    v.store_first(load_i64(segment + 8 * R.S_OUT) + 4 * row, total, load_i64(segment + 8 * R.S_ROWS) - row)


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


def _make(form, exact, wide, tall):
    """A kernel: `wide` panels for one token, one panel (two in exact arithmetic) for `tall` tokens at a time."""
    beside = 2 if exact else 1

    def linear(record, thread, threads):
        tokens = load_i64(load_i64(record + 8 * R.COUNT))
        panels = load_i64(record + 8 * R.PANELS)
        spans = _spans(record) if tokens == 1 and threads > 1 else 1
        units = panels * spans
        begin, end = units * thread // threads, units * (thread + 1) // threads
        first, stop = (begin + spans - 1) // spans, end // spans
        if begin < end and begin % spans != 0:
            # The rest of a panel, or some of it: its sums go to the thread that has its first span.
            panel = begin // spans
            owner = ((panel * spans + 1) * threads - 1) // units
            segment, inside = _segment_of(record, panel)
            last = min(end, (panel + 1) * spans) - panel * spans
            part(form, exact, record, segment, inside, begin % spans, last, _room(record, owner))
            _publish(record, thread)

        segment = load_i64(record + 8 * R.SEGMENTS)
        before = 0
        for _ in range(load_i64(record + 8 * R.SEGMENT_COUNT)):
            count = load_i64(segment + 8 * R.S_PANELS)
            last = min(stop - before, count)
            panel = max(first - before, 0)
            while panel < last:
                step = 1
                token = 0
                if tokens == 1 and panel + wide <= last:
                    step = wide
                    tile(wide, 1, form, exact, record, segment, panel, 0)
                    token = 1
                elif panel + beside <= last and tokens > 1:
                    step = beside
                    while token + tall <= tokens:
                        tile(beside, tall, form, exact, record, segment, panel, token)
                        token += tall
                while token < tokens:
                    for p in range(step):
                        tile(1, 1, form, exact, record, segment, panel + p, token)
                    token += 1
                panel += step
            before += count
            segment += 8 * R.SEGMENT_WORDS

        if begin < end and end % spans != 0 and first <= stop:
            segment, inside = _segment_of(record, stop)
            part(form, exact, record, segment, inside, 0, end - stop * spans, _room(record, thread))
            if _await_parts(record, thread, threads, units, (stop + 1) * spans):
                _join(record, stop, spans, _room(record, thread))

    return Kernel(linear, f"linear-{form}-{'exact' if exact else 'int8'}")


@cache
def linear(form: int, exact: bool) -> Kernel:
    """The kernel for weights of a format."""
    if exact or form in FLOATS:
        return _make(form, 1, wide=4, tall=4)
    return _make(form, 0, wide=2, tall=8)
