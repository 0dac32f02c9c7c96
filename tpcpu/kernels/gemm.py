"""Products of packed weights with the activations of many tokens: which thread unpacks and multiplies what.

A thread takes some panels, and where these are few for the number of threads, some of the tokens. Span after span it
lays the tokens' activations side by side, which then stay in its second-level cache while panels go by. Of two panels
at a time it unpacks, once for all tokens, as many blocks as leave half of the first-level cache to activations and
sums, and multiplies them tile by tile. The order of sums is that of `tiles.py`.

Arithmetic is in `gemm_tiles.py`. A unit that multiplies whole matrices (AMX) would come in there: as another `tile`,
with an `unpack` and a `_lay` that make what it reads; who computes what, here, stays as it is.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.gemm_tiles import (
    LINE,
    LINE_WORDS,
    TALL,
    TOKEN_SUMS,
    WIDE,
    WORD_BYTES,
    block_lines,
    prefetch,
    sum_of_half,
    tile,
    unpack,
    unpack_powers,
    unpack_scales,
)
from tpcpu.kernels.memory import call_kernel, float_bits, load_f32, load_i32, load_i64, store_f32, store_i32, store_i64
from tpcpu.kernels.record import BLOCK, FLOAT32, FLOATS, INT8, MXFP4, NF4, SPAN
from tpcpu.kernels.scales import ROWS
from tpcpu.kernels.simd import vectors as v

LEAST_TOKENS = 48
"""Fewer tokens go through the tiles of `linear.py`, which unpack in registers for 8 tokens at a time.

Measured on AMD Zen 4, 2 threads, 5632 x 2048 in NF4, GOPS there and here: 24 tokens 732 and 653, 32: 731 and 689,
40: 689 and 666, 48: 635 and 685, 64: 704 and 743, 128: 623 and 699. In float32 24: 162 and 136, 32: 160 and 155,
64: 162 and 182.
"""

LOW = 4
MANY = TALL if v.LANES == 16 else LOW
"""Tokens of a tile: LOW at the end, and where 16 registers have to do. On AMD Zen 4 tiles of 2 panels x 6 and 8 tokens
and 3 x 4 were the fastest, alike within noise, of those and 2 x 7, 10 and 12 and 1 x 12, 13 and 14."""

UNIT_LINES = 8
"""Lines of each token that are multiplied at a time: 8 KB of a panel of 16 rows."""

GROUP = (256, 128)
"""Tokens that are laid side by side, as int8 and as float32: a second-level cache of 1 MB has room for them."""

UNIT = UNIT_LINES * LINE_WORDS * WORD_BYTES
"""Bytes of a panel that are unpacked at a time."""
SCALES = SPAN * WORD_BYTES
"""Bytes of the scales of a panel's span, one for each block."""


def room_bytes(exact: bool, form: int) -> int:
    """What a thread needs for products of a format; it holds nothing from one to the next."""
    floats, halves = int(exact or form in FLOATS), _scales_of_block(form)
    x = SPAN * (4 + 4 * halves + block_lines(floats) * LINE)
    return 8 * R.TASK_WORDS + WIDE * (UNIT + SCALES * halves) + GROUP[floats] * (TOKEN_SUMS + x)


def _scales_of_block(form: int) -> int:
    """How many scales a block has, where it has any."""
    return R.HALVES if form == MXFP4 else 1


@helper
def _ceil(count, unit):
    return (count + unit - 1) // unit


@helper
def _token_parts(tokens, panels, threads):
    """Into how many parts threads divide the tokens; each part has as many threads, which divide the panels.

    What a thread does is tiles, and unpacking its panels, which is as much as 8 tokens are; laying all tokens side by
    side is as much as an eighth of a panel.
    """
    best, least = 1, 1 << 62
    for parts in range(1, threads + 1):
        if threads % parts == 0:
            some = _ceil(_ceil(tokens, TALL), parts) * TALL
            work = 8 * _ceil(panels, threads // parts) * (some + 8) + some
            if work < least:
                best, least = parts, work
    return best


@helper
def _copy_line(source, target):
    for i in range(0, LINE_WORDS, v.LANES):
        v.store(target + 4 * i, v.load(source + 4 * i))


@helper
def _lay_int8(record, token, count, first, blocks, x, x_scales, x_sums, halves):
    """Blocks `first`.. of `count` tokens from `token` on, side by side; scales with the factor of the product.

    With `halves` there are sums of both halves of a block, those of the second so many bytes behind the first.
    """
    factor = float_bits(load_i64(record + 8 * R.FACTOR))
    for m in range(count):
        source = load_i64(record + 8 * R.X) + (token + m) * load_i64(record + 8 * R.X_STRIDE) + BLOCK * first
        at = (token + m) * load_i64(record + 8 * R.X_SCALES_STRIDE) + 4 * first
        scales, sums = load_i64(record + 8 * R.X_SCALES) + at, load_i64(record + 8 * R.X_SUMS) + at
        place = m // TALL * (SPAN * TALL) + m % TALL
        for j in range(blocks):
            _copy_line(source + BLOCK * j, x + LINE * (place + TALL * j))
            store_f32(x_scales + 4 * (place + TALL * j), load_f32(scales + 4 * j) * factor)
            at = x_sums + 4 * (place + TALL * j)
            if halves:
                half = sum_of_half(source + BLOCK * j)
                store_i32(at, half)
                store_i32(at + halves, load_i32(sums + 4 * j) - half)
            else:
                store_i32(at, load_i32(sums + 4 * j))


@helper
def _lay_floats(record, token, count, first, features, x):
    """The same of float32; zeros follow up to a whole block."""
    whole = features // LINE_WORDS
    lines = _ceil(features, BLOCK) * (BLOCK // LINE_WORDS)
    for m in range(count):
        source = load_i64(record + 8 * R.X) + (token + m) * load_i64(record + 8 * R.X_STRIDE) + 4 * BLOCK * first
        target = x + LINE * (m // TALL * (SPAN * BLOCK // LINE_WORDS * TALL) + m % TALL)
        for j in range(whole):
            _copy_line(source + LINE * j, target + LINE * TALL * j)
        for feature in range(LINE_WORDS * whole, LINE_WORDS * lines):
            value = load_f32(source + 4 * feature) if feature < features else float32(0.0)
            j, i = feature // LINE_WORDS, feature % LINE_WORDS
            store_f32(target + LINE * TALL * j + 4 * i, value)


def _stored_bits(form: int) -> int:
    """Bits of a packed weight."""
    if form in FLOATS:
        return 32 if form == FLOAT32 else 16
    return 8 if form == INT8 else 4


@helper
def _set(task, word, value):
    store_i64(task + 8 * word, value)


@helper
def _set_results(task, segment, panel, token, is_first, is_last):
    """Where the results of a panel and of the tokens from `token` on belong, in the first or the last span."""
    row = panel * ROWS
    stride, bias = load_i64(segment + 8 * R.S_OUT_STRIDE), load_i64(segment + 8 * R.S_BIAS)
    _set(task, R.G_OUT, load_i64(segment + 8 * R.S_OUT) + token * stride + 4 * row)
    _set(task, R.G_OUT_STRIDE, stride)
    _set(task, R.G_ROWS, load_i64(segment + 8 * R.S_ROWS) - row)
    _set(task, R.G_BEGINS, 1 if is_first else 0)
    _set(task, R.G_BIAS, bias + 4 * row if is_last and bias else 0)


@cache
def gemm(form: int, exact: bool) -> Kernel:
    """The kernel for steps of many tokens and weights of a format."""
    floats, of_block = int(exact or form in FLOATS), _scales_of_block(form)
    scaled = 0 if form in FLOATS else of_block
    in_place = form == INT8 and not floats
    bits, lines, group = _stored_bits(form), block_lines(floats), GROUP[floats]
    unit, block_bytes = UNIT_LINES // lines, BLOCK * ROWS * bits // 8
    panel_scales, sums_bytes = SCALES * of_block, group * SPAN * 4
    halves = sums_bytes if of_block == R.HALVES else 0

    def linear(record, thread, threads):
        tokens = load_i64(load_i64(record + 8 * R.COUNT))
        if tokens < LEAST_TOKENS:
            call_kernel(load_i64(record + 8 * (R.KERNELS + 1)), record, thread, threads)
            return
        panels, segments = load_i64(record + 8 * R.PANELS), load_i64(record + 8 * R.SEGMENTS)
        columns, table = load_i64(segments + 8 * R.S_COLUMNS), load_i64(record + 8 * R.TABLE)
        blocks = _ceil(columns, BLOCK)
        panel_bytes = columns * ROWS * bits // 8

        parts = _token_parts(tokens, panels, threads)
        part, place, places = thread % parts, thread // parts, threads // parts
        first, stop = panels * place // places, panels * (place + 1) // places
        tiles = _ceil(tokens, TALL)
        begin, end = tiles * part // parts * TALL, min(tiles * (part + 1) // parts * TALL, tokens)

        task = load_i64(record + 8 * R.ROOM) + thread * load_i64(record + 8 * R.ROOM_STRIDE)
        unpacked = task + 8 * R.TASK_WORDS
        scales = unpacked + WIDE * UNIT
        x_scales = scales + WIDE * panel_scales
        x_sums = x_scales + sums_bytes
        carry = x_sums + sums_bytes * of_block
        x = carry + group * TOKEN_SUMS
        _set(task, R.G_CARRY, carry)
        _set(task, R.G_X_HALVES, halves)

        for token in range(begin, end, group):
            many = min(group, end - token)
            _set(task, R.G_TOKENS, many)
            for span in range(0, max(blocks, 1), SPAN):
                in_span = min(SPAN, blocks - span)
                if floats:
                    _lay_floats(record, token, many, span, min(columns - span * BLOCK, SPAN * BLOCK), x)
                else:
                    _lay_int8(record, token, many, span, in_span, x, x_scales, x_sums, halves)
                segment, before = segments, 0
                for _ in range(load_i64(record + 8 * R.SEGMENT_COUNT)):
                    count = load_i64(segment + 8 * R.S_PANELS)
                    panel, last = max(first - before, 0), min(stop - before, count)
                    while panel < last:
                        beside = min(WIDE, last - panel)
                        _set_results(task, segment, panel, token, span == 0, span + SPAN >= blocks)
                        if form == NF4:
                            for p in range(beside):
                                unpack_scales(segment, panel + p, blocks, span, in_span, scales + p * panel_scales)
                            from_scales, scales_stride = scales, panel_scales
                        elif form == MXFP4:
                            for p in range(beside):
                                stored = load_i64(segment + 8 * R.S_SCALES) + of_block * ROWS * (
                                    (panel + p) * blocks + span
                                )
                                unpack_powers(stored, of_block * in_span, scales + p * panel_scales)
                            from_scales, scales_stride = scales, panel_scales
                        else:
                            scales_stride = blocks * WORD_BYTES
                            from_scales = load_i64(segment + 8 * R.S_SCALES) + panel * scales_stride
                            from_scales += span * WORD_BYTES
                        _set(task, R.G_SCALES_STRIDE, scales_stride)
                        for block in range(0, max(in_span, 1), unit):
                            at = (span + block) * BLOCK
                            source = (
                                load_i64(segment + 8 * R.S_VALUES) + panel * panel_bytes + at // BLOCK * block_bytes
                            )
                            if in_place:
                                _set(task, R.G_WEIGHTS, source)
                                _set(task, R.G_WEIGHTS_STRIDE, panel_bytes)
                            else:
                                for p in range(beside):
                                    features = min(columns - at, unit * BLOCK)
                                    unpack(form, floats, table, source + p * panel_bytes, features, unpacked + p * UNIT)
                                _set(task, R.G_WEIGHTS, unpacked)
                                _set(task, R.G_WEIGHTS_STRIDE, UNIT)
                            _set(task, R.G_SCALES, from_scales + block * of_block * WORD_BYTES)
                            _set(task, R.G_BLOCKS, min(unit, in_span - block))
                            _set(task, R.G_X, x + block * lines * TALL * LINE)
                            _set(task, R.G_X_SCALES, x_scales + block * TALL * 4)
                            _set(task, R.G_X_SUMS, x_sums + block * TALL * 4)
                            _set(task, R.G_RESUMES, block)
                            _set(task, R.G_ENDS, 1 if block + unit >= in_span else 0)
                            # Meanwhile what is unpacked next comes near: of these panels, or of those after them.
                            following = source + unit * block_bytes
                            if block + unit >= in_span:
                                following = source - block * block_bytes + beside * panel_bytes
                            for m in range(0, many, MANY):
                                ask = unit * block_bytes * beside // LINE
                                for i in range(ask * m // many, ask * (m + MANY) // many):
                                    of_panel = i % beside * panel_bytes
                                    prefetch(following + of_panel + i // beside * LINE)
                                if beside < WIDE:
                                    tile(1, MANY, floats, scaled, task, m)
                                elif many - m > LOW:
                                    tile(WIDE, MANY, floats, scaled, task, m)
                                else:
                                    tile(WIDE, LOW, floats, scaled, task, m)
                        panel += beside
                    before += count
                    segment += 8 * R.SEGMENT_WORDS

    return Kernel(linear, f"linear-of-many-{form}-{'exact' if floats else 'int8'}")
