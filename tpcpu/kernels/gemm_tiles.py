"""Tiles of a matrix product: unpacked panels times tokens that lie side by side, one span of blocks at a time.

What a tile reads is the same for all formats: words of four bytes, one for every row of a panel (four int8 features, or
one float32), and the tokens' words: 16 of one token in a line, the lines of TALL tokens behind each other, so that all
that a tile reads is in a row. So there is one tile for int8 and one for float32, in as many sizes as a caller asks for;
`unpack` makes panels of each format. The order of sums is that of `tiles.py`: features of a block, blocks of a span,
spans, which are added up in the rows of the result.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpcpu.kernels import record as R
from tpcpu.kernels.memory import F32, I32
from tpcpu.kernels.record import BF16, BLOCK, F16, FLOAT32, INT8, MXFP4, NF4, NF4_SINGLE
from tpcpu.kernels.scales import ROWS, TOGETHER, CodedScales, half_sum, powers
from tpcpu.kernels.simd import emit as e
from tpcpu.kernels.simd import instructions as isa

LINE_WORDS = 16
"""Words of a token that lie together,"""
LINE = 4 * LINE_WORDS
"""a cache line."""

WORD_BYTES = 4 * ROWS
"""A word of every row of a panel: one register."""

WIDE, TALL = 2, 8
"""The most panels and tokens that a tile has; so many tokens lie side by side."""

TOKEN_SUMS = WIDE * WORD_BYTES
"""Bytes of the sums of a token in all panels of a tile."""

_ZERO = ir.Constant(e.F32V, [0.0] * ROWS)


def block_lines(floats: int) -> int:
    """Lines of a token's block of features."""
    return BLOCK // LINE_WORDS if floats else BLOCK // (4 * LINE_WORDS)


@intrinsic(prefer_literal=True)
def tile(typing_context, panels, tokens, floats, scaled, task, token):
    """Multiplies the panels of a task with `tokens` tokens from `token` on, all of which lie side by side.

    The first four arguments are constants; `scaled`: how many scales a block of weights has.
    """
    shape = [argument.literal_value for argument in (panels, tokens, floats, scaled)]

    def codegen(context, builder, signature, args):
        _emit_tile(builder, *shape, *args[4:])
        return context.get_dummy_value()

    return types.void(panels, tokens, floats, scaled, *[types.int64] * 2), codegen


def _emit_tile(b, panels, tokens, floats, scaled, task, token):
    def word(number):
        return e.load_word(b, task, number)

    weights, weights_stride, scales, scales_stride = (
        word(each) for each in (R.G_WEIGHTS, R.G_WEIGHTS_STRIDE, R.G_SCALES, R.G_SCALES_STRIDE)
    )
    # Those that lie side by side begin with `token - aside`.
    aside = b.and_(token, e.const(TALL - 1))
    at = b.add(b.mul(b.sub(token, aside), e.const(R.SPAN)), aside)
    lines_at = b.add(b.mul(b.sub(token, aside), e.const(R.SPAN * block_lines(floats))), aside)
    x = b.add(word(R.G_X), b.mul(lines_at, e.const(LINE)))
    x_scales, x_sums = (b.add(word(each), b.mul(at, e.const(4))) for each in (R.G_X_SCALES, R.G_X_SUMS))
    each = [(p, m) for p in range(panels) for m in range(tokens)]
    carry = b.add(word(R.G_CARRY), b.mul(token, e.const(TOKEN_SUMS)))
    carried = {at: e.offset(b, carry, WORD_BYTES * number) for number, at in enumerate(each)}
    span_sums = {at: cgutils.alloca_once(b, e.F32V) for at in each}
    for at in each:
        b.store(_ZERO, span_sums[at])
    with b.if_then(b.icmp_signed("!=", word(R.G_RESUMES), e.const(0))):
        for at in each:
            b.store(e.load(b, carried[at], e.F32V), span_sums[at])
    ends = b.icmp_signed("!=", word(R.G_ENDS), e.const(0))
    out, out_stride = word(R.G_OUT), word(R.G_OUT_STRIDE)
    with b.if_then(ends):
        # Results of a token lie far from the next one's, and what they are added to was written a span ago.
        for p, m in each:
            at = b.add(out, b.mul(e.offset(b, token, m), out_stride))
            e.prefetch(b, e.offset(b, at, WORD_BYTES * p))
    with cgutils.for_range(b, word(R.G_BLOCKS)) as block:
        scale_at = b.mul(block.index, e.const(4 * TALL))
        x_scales_at, x_sums_at = b.add(x_scales, scale_at), b.add(x_sums, scale_at)
        halves = max(scaled, 1)
        for half in range(halves):
            sums_at = b.add(x_sums_at, word(R.G_X_HALVES)) if half else x_sums_at
            sums = _block_sums(
                b, panels, tokens, floats, weights, weights_stride, x, sums_at, block.index, (half, halves)
            )
            for p in range(panels):
                if scaled:
                    at = b.add(scales, b.mul(scales_stride, e.const(p)))
                    number = e.offset(b, b.mul(block.index, e.const(halves)), half)
                    scale = e.load(b, b.add(at, b.mul(number, e.const(WORD_BYTES))), e.F32V)
                for m in range(tokens):
                    before, product = b.load(span_sums[p, m]), b.load(sums[p, m])
                    if not scaled:
                        after = b.fadd(before, product)
                    elif floats:
                        after = e.fma(b, scale, product, before)
                    else:
                        x_scale = e.splat(b, e.load(b, e.offset(b, x_scales_at, 4 * m), F32), e.F32V)
                        after = e.fma(b, b.fmul(scale, x_scale), e.to_float(b, product), before)
                    b.store(after, span_sums[p, m])
    with b.if_else(ends) as (whole, part):
        with whole:
            _add_to_results(b, {at: b.load(span_sums[at]) for at in each}, panels, tokens, task, token)
        with part:
            for at in each:
                e.store(b, b.load(span_sums[at]), carried[at])


def _block_sums(b, panels, tokens, floats, weights, weights_stride, x, x_sums, block, part):
    """One register for every panel and token: the products of a block, line after line of 16 words.

    `part` = (number, of how many) of a block's halves, where these have scales of their own; else (0, 1).
    """
    each = [(p, m) for p in range(panels) for m in range(tokens)]
    of = e.F32V if floats else e.I32V
    sums = {at: cgutils.alloca_once(b, of) for at in each}
    for p, m in each:
        start = _ZERO if floats else e.constants([0] * ROWS, I32)
        if not floats and isa.WEIGHT_BIAS:
            start = e.splat(b, e.load(b, e.offset(b, x_sums, 4 * m), I32), of)
        b.store(start, sums[p, m])
    lines, (half, halves) = block_lines(floats), part
    # A half is half of the lines, or of the words of the only one.
    some, words = (lines // halves, LINE_WORDS) if lines % halves == 0 else (lines, LINE_WORDS // halves)
    first_line, first_word = (half * some, 0) if lines % halves == 0 else (0, half * words)
    with cgutils.for_range(b, e.const(some)) as inner:
        line = b.add(e.offset(b, b.mul(block, e.const(lines)), first_line), inner.index)
        packed = b.add(weights, b.mul(line, e.const(LINE_WORDS * WORD_BYTES)))
        x_line = b.add(x, b.mul(line, e.const(TALL * LINE)))
        for word in range(first_word, first_word + words):
            places = [b.add(packed, b.mul(weights_stride, e.const(p))) for p in range(panels)]
            values = [e.load(b, e.offset(b, at, word * WORD_BYTES), e.F32V if floats else e.BYTEV) for at in places]
            for m in range(tokens):
                at = e.offset(b, x_line, LINE * m + 4 * word)
                other = e.splat(b, e.load(b, at, F32 if floats else I32), of)
                for p in range(panels):
                    before = b.load(sums[p, m])
                    multiply = e.fma if floats else _dot4
                    b.store(multiply(b, values[p], other, before), sums[p, m])
    return sums


def _dot4(b, weights, x, sums):
    return isa.dot4(b, sums, weights, x)


def _add_to_results(b, span_sums, panels, tokens, task, token):
    """Adds the sums of a span to what is there, and the bias behind the last one."""
    stride, rows, many, begins, bias = (
        e.load_word(b, task, each) for each in (R.G_OUT_STRIDE, R.G_ROWS, R.G_TOKENS, R.G_BEGINS, R.G_BIAS)
    )
    out = b.add(e.load_word(b, task, R.G_OUT), b.mul(token, stride))
    is_first, has_bias = (b.icmp_signed("!=", each, e.const(0)) for each in (begins, bias))
    added = [cgutils.alloca_once(b, e.F32V) for _ in range(panels)]
    for register in added:
        b.store(_ZERO, register)
    with b.if_then(has_bias):
        for p, register in enumerate(added):
            b.store(e.load(b, e.offset(b, bias, WORD_BYTES * p), e.F32V), register)
    for m in range(tokens):
        with b.if_then(b.icmp_signed("<", e.offset(b, token, m), many)):
            for p in range(panels):
                at = e.offset(b, b.add(out, b.mul(stride, e.const(m))), WORD_BYTES * p)
                left = b.sub(rows, e.const(ROWS * p))
                total = b.fadd(b.select(is_first, _ZERO, e.load_rows(b, at, left)), span_sums[p, m])
                e.store_rows(b, b.fadd(total, b.load(added[p])), at, left)


@intrinsic
def prefetch(typing_context, address):
    """Asks for a line, into the second-level cache."""

    def codegen(context, builder, signature, args):
        e.prefetch(builder, args[0], locality=2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


class _Unpacked:
    """What `CodedScales` reads of a tile, for one panel."""

    panels, prefetches = 1, False

    def __init__(self, b, segment, panel):
        self.b, self.segment, self.panel = b, segment, panel
        self.scales = e.load_word(b, segment, R.S_SCALES)


@intrinsic
def unpack_scales(typing_context, segment, panel, blocks, first, count, target):
    """The scales of blocks `first`.. of a panel of doubly quantised weights, as float32, `count` of its `blocks`.

    In fours: up to three more are written.
    """

    def codegen(context, b, signature, args):
        segment, panel, blocks, first, count, target = args
        scales = CodedScales(_Unpacked(b, segment, panel))
        fours = b.udiv(b.add(count, e.const(TOGETHER - 1)), e.const(TOGETHER))
        with cgutils.for_range(b, fours) as four:
            done = b.mul(four.index, e.const(TOGETHER))
            scales.decode(b.add(first, done), blocks)
            for j in range(TOGETHER):
                value = scales.load(0, blocks, first, e.const(j), 0)
                e.store(b, value, b.add(target, b.mul(e.offset(b, done, j), e.const(WORD_BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def unpack_powers(typing_context, source, count, target):
    """`count` times the powers of two that the rows of a panel have, from bytes to float32."""

    def codegen(context, b, signature, args):
        source, count, target = args
        with cgutils.for_range(b, count) as loop:
            value = powers(b, b.add(source, b.mul(loop.index, e.const(ROWS))))
            e.store(b, value, b.add(target, b.mul(loop.index, e.const(WORD_BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def sum_of_half(typing_context, address):
    """Minus the bias of the weights times the sum of the 32 int8 at an address."""

    def codegen(context, b, signature, args):
        return b.sext(half_sum(b, args[0]), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic(prefer_literal=True)
def unpack(typing_context, form, floats, table, source, features, target):
    """A panel's `features` from `source` on, as words for a tile; the first two arguments are constants.

    Zeros follow up to a whole block. Packed int8 for int8 activations is such words already.
    """
    form_, floats_ = form.literal_value, floats.literal_value

    def codegen(context, b, signature, args):
        table, source, features, target = args[2:]
        if form_ in (NF4, NF4_SINGLE, MXFP4):
            _unpack_nf4(b, floats_, table, source, features, target)
        elif form_ == INT8:
            _unpack_int8(b, source, features, target)
        else:
            _unpack_floats(b, {BF16: 16, F16: 17, FLOAT32: 32}[form_], source, features, target)
        return context.get_dummy_value()

    return types.void(form, floats, *[types.int64] * 4), codegen


def _unpack_nf4(b, floats, table, source, features, target):
    values = isa.table_f32(b, table) if floats else e.load(b, table, e.BYTEV)
    with cgutils.for_range(b, b.udiv(features, e.const(8))) as loop:
        stored = e.load(b, b.add(source, b.mul(loop.index, e.const(WORD_BYTES))), e.I32V)
        if floats:
            shifts = [8 * j + 4 * half for half in (0, 1) for j in range(4)]
            words = [isa.lookup_f32(b, values, b.lshr(stored, e.constants([each] * ROWS, I32))) for each in shifts]
        else:
            codes = b.bitcast(stored, e.BYTEV)
            words = [isa.lookup(b, values, part) for part in (e.low_bits(b, codes, 4), e.high_nibbles(b, codes))]
        at = b.add(target, b.mul(loop.index, e.const(len(words) * WORD_BYTES)))
        for j, word in enumerate(words):
            e.store(b, word, e.offset(b, at, j * WORD_BYTES))


def _unpack_int8(b, source, features, target):
    with cgutils.for_range(b, b.udiv(features, e.const(4))) as loop:
        stored = e.load(b, b.add(source, b.mul(loop.index, e.const(WORD_BYTES))), e.I32V)
        at = b.add(target, b.mul(loop.index, e.const(4 * WORD_BYTES)))
        for j in range(4):
            if isa.WEIGHT_BIAS:
                byte = e.low_bits(b, b.lshr(stored, e.constants([8 * j] * ROWS, I32)), 8)
                value = b.sub(byte, e.constants([isa.WEIGHT_BIAS] * ROWS, I32))
            else:
                value = b.ashr(b.shl(stored, e.constants([24 - 8 * j] * ROWS, I32)), e.constants([24] * ROWS, I32))
            e.store(b, e.to_float(b, value), e.offset(b, at, j * WORD_BYTES))


def _unpack_floats(b, bits, source, features, target):
    size = 4 if bits == 32 else 2
    with cgutils.for_range(b, features) as loop:
        value = e.load_floats(b, b.add(source, b.mul(loop.index, e.const(size * ROWS))), bits)
        e.store(b, value, b.add(target, b.mul(loop.index, e.const(WORD_BYTES))))
    whole = b.mul(b.udiv(e.offset(b, features, BLOCK - 1), e.const(BLOCK)), e.const(BLOCK))
    with cgutils.for_range(b, whole, features) as loop:
        e.store(b, ir.Constant(e.F32V, [0.0] * ROWS), b.add(target, b.mul(loop.index, e.const(WORD_BYTES))))
