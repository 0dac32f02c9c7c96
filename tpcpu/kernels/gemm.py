"""Products of packed weights with the activations of many tokens: which thread unpacks and multiplies what.

A thread takes some panels, and where these are few for the number of threads, some of the tokens. Span after span it
lays the tokens' activations side by side, which then stay in its second-level cache while panels go by: each is
unpacked once for all tokens, into the first-level cache, and multiplied tile by tile. The order of sums is that of
`tiles.py`.

Arithmetic is in `gemm_tiles.py`. A unit that multiplies whole matrices (AMX) would come in there: as another `tile`,
with an `unpack` and a `_lay` that make what it reads; who computes what, here, stays as it is.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.gemm_tiles import LINE_WORDS, WORD_BYTES, tile, unpack, unpack_scales
from tpcpu.kernels.memory import call_kernel, float_bits, load_f32, load_i32, load_i64, store_f32, store_i32
from tpcpu.kernels.record import BLOCK, FLOAT32, FLOATS, INT8, NF4
from tpcpu.kernels.scales import ROWS
from tpcpu.kernels.simd import vectors as v

LEAST_TOKENS = 9
"""Fewer tokens go through the tiles of `linear.py`."""

BESIDE = 2
"""Panels of a tile, and"""
TALL, LOW = 8, 4
"""tokens of one."""

LINE = 4 * LINE_WORDS
_SIZES = {
    # Tokens that are laid side by side: as many as a second-level cache of 1 MB has room for beside two panels.
    0: (256, BLOCK * WORD_BYTES // 4),
    1: (128, BLOCK * WORD_BYTES),
}
"""For int8 and for float32: tokens, and bytes of an unpacked block of a panel."""


def scratch_bytes(exact: bool, form: int) -> int:
    """What a thread needs for products of a format; it holds nothing from one to the next."""
    floats = int(exact or form in FLOATS)
    tokens, block_bytes = _SIZES[floats]
    lines = R.SPAN * BLOCK // LINE_WORDS // (1 if floats else 4)
    return BESIDE * R.SPAN * (block_bytes + WORD_BYTES) + 2 * 4 * R.SPAN * (tokens + 16) + lines * LINE * (tokens + 17)


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
def _lay_int8(record, token, count, first, blocks, x, line, x_scales, x_sums, stride):
    """Blocks `first`.. of `count` tokens from `token` on, side by side; scales with the factor of the product."""
    factor = float_bits(load_i64(record + 8 * R.FACTOR))
    for m in range(count):
        source = load_i64(record + 8 * R.X) + (token + m) * load_i64(record + 8 * R.X_STRIDE) + BLOCK * first
        at = (token + m) * load_i64(record + 8 * R.X_SCALES_STRIDE) + 4 * first
        scales, sums = load_i64(record + 8 * R.X_SCALES) + at, load_i64(record + 8 * R.X_SUMS) + at
        for j in range(blocks):
            _copy_line(source + BLOCK * j, x + j * line + LINE * m)
            store_f32(x_scales + j * stride + 4 * m, load_f32(scales + 4 * j) * factor)
            store_i32(x_sums + j * stride + 4 * m, load_i32(sums + 4 * j))


@helper
def _lay_floats(record, token, count, first, features, x, line):
    """The same of float32; zeros follow up to a whole block."""
    lines = _ceil(features, BLOCK) * (BLOCK // LINE_WORDS)
    whole = features // LINE_WORDS
    for m in range(count):
        source = load_i64(record + 8 * R.X) + (token + m) * load_i64(record + 8 * R.X_STRIDE) + 4 * BLOCK * first
        for j in range(whole):
            _copy_line(source + LINE * j, x + j * line + LINE * m)
        for j in range(whole, lines):
            for i in range(LINE_WORDS):
                feature = LINE_WORDS * j + i
                value = load_f32(source + 4 * feature) if feature < features else float32(0.0)
                store_f32(x + j * line + LINE * m + 4 * i, value)


@cache
def gemm(form: int, exact: bool) -> Kernel:
    """The kernel for steps of many tokens and weights of a format."""
    floats = int(exact or form in FLOATS)
    scaled = int(form not in FLOATS)
    group, block_bytes = _SIZES[floats]
    in_place = form == INT8 and not floats
    stored_block = BLOCK * ROWS * 4 if form == FLOAT32 else BLOCK * ROWS * 2 if form in FLOATS else (
        BLOCK * ROWS if form == INT8 else BLOCK * ROWS // 2
    )
    stored_feature_bits = stored_block * 8 // BLOCK

    def linear(record, thread, threads):
        tokens = load_i64(load_i64(record + 8 * R.COUNT))
        if tokens < LEAST_TOKENS:
            call_kernel(load_i64(record + 8 * (R.KERNELS + 1)), record, thread, threads)
            return
        panels = load_i64(record + 8 * R.PANELS)
        segments = load_i64(record + 8 * R.SEGMENTS)
        columns = load_i64(segments + 8 * R.S_COLUMNS)
        blocks = _ceil(columns, BLOCK)
        spans = max(_ceil(blocks, R.SPAN), 1)

        parts = _token_parts(tokens, panels, threads)
        beside = threads // parts
        tiles = _ceil(tokens, TALL)
        first, stop = panels * (thread // parts) // beside, panels * (thread // parts + 1) // beside
        part = thread % parts
        begin, end = min(tiles * part // parts * TALL, tokens), min(tiles * (part + 1) // parts * TALL, tokens)

        unpacked = load_i64(record + 8 * R.ROOM) + thread * load_i64(record + 8 * R.ROOM_STRIDE)
        room_scales = unpacked + BESIDE * R.SPAN * block_bytes
        x_scales = room_scales + BESIDE * R.SPAN * WORD_BYTES
        stride = 4 * (group + 16)
        x_sums = x_scales + R.SPAN * stride
        x = x_sums + R.SPAN * stride
        line = LINE * (group + 17)

        for token in range(begin, end, group):
            many = min(group, end - token)
            for span in range(spans):
                block = span * R.SPAN
                count = min(R.SPAN, blocks - block)
                features = min(columns - block * BLOCK, R.SPAN * BLOCK)
                if floats:
                    _lay_floats(record, token, many, block, features, x, line)
                else:
                    _lay_int8(record, token, many, block, count, x, line, x_scales, x_sums, stride)

                segment, before = segments, 0
                for _ in range(load_i64(record + 8 * R.SEGMENT_COUNT)):
                    in_segment = load_i64(segment + 8 * R.S_PANELS)
                    panel, last = max(first - before, 0), min(stop - before, in_segment)
                    while panel < last:
                        step = min(BESIDE, last - panel)
                        values = load_i64(segment + 8 * R.S_VALUES) + panel * (columns * stored_feature_bits // 8)
                        values += block * stored_block
                        weights, weights_stride = unpacked, R.SPAN * block_bytes
                        if in_place:
                            weights, weights_stride = values, columns * stored_feature_bits // 8
                        else:
                            for p in range(step):
                                source = values + p * (columns * stored_feature_bits // 8)
                                target = unpacked + p * R.SPAN * block_bytes
                                unpack(form, floats, load_i64(record + 8 * R.TABLE), source, features, target)
                        scales, scales_stride = room_scales, R.SPAN * WORD_BYTES
                        if form == NF4:
                            for p in range(step):
                                target = room_scales + p * R.SPAN * WORD_BYTES
                                unpack_scales(segment, panel + p, blocks, block, count, target)
                        else:
                            scales_stride = blocks * WORD_BYTES
                            scales = load_i64(segment + 8 * R.S_SCALES) + panel * scales_stride + block * WORD_BYTES
                        row = panel * ROWS
                        rows = load_i64(segment + 8 * R.S_ROWS) - row
                        bias = 0
                        if span == spans - 1 and load_i64(segment + 8 * R.S_BIAS):
                            bias = load_i64(segment + 8 * R.S_BIAS) + 4 * row
                        out_stride = load_i64(segment + 8 * R.S_OUT_STRIDE)
                        out = load_i64(segment + 8 * R.S_OUT) + token * out_stride + 4 * row
                        begins = 1 if span == 0 else 0
                        m = 0
                        while m < many:
                            left = many - m
                            if step == BESIDE:
                                if left > LOW:
                                    tile(
                                        BESIDE, TALL, floats, scaled, weights, weights_stride, scales, scales_stride,
                                        x + LINE * m, line, x_scales + 4 * m, x_sums + 4 * m, stride, count,
                                        out + m * out_stride, out_stride, rows, left, begins, bias,
                                    )  # fmt: skip
                                    m += TALL
                                else:
                                    tile(
                                        BESIDE, LOW, floats, scaled, weights, weights_stride, scales, scales_stride,
                                        x + LINE * m, line, x_scales + 4 * m, x_sums + 4 * m, stride, count,
                                        out + m * out_stride, out_stride, rows, left, begins, bias,
                                    )  # fmt: skip
                                    m += LOW
                            else:
                                tile(
                                    1, TALL, floats, scaled, weights, weights_stride, scales, scales_stride,
                                    x + LINE * m, line, x_scales + 4 * m, x_sums + 4 * m, stride, count,
                                    out + m * out_stride, out_stride, rows, left, begins, bias,
                                )  # fmt: skip
                                m += TALL
                        panel += step
                    before += in_segment
                    segment += 8 * R.SEGMENT_WORDS

    return Kernel(linear, f"linear-of-many-{form}-{'exact' if floats else 'int8'}")
