"""Tiles of a matrix product: unpacked panels times tokens that lie side by side, one span of blocks at a time.

What a tile reads is the same for all formats: words of four bytes, one for every row of a panel (four int8 features, or
one float32), and the tokens' words, 16 of one token together in a line and the lines of all tokens behind each other.
So there is one tile for int8 and one for float32, in as many sizes as a caller asks for; `unpack` makes panels of each
format. The order of sums is that of `tiles.py`: features of a block, blocks of a span, spans, which are added up in the
rows of the result.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpcpu.kernels import record as R
from tpcpu.kernels.memory import F32, I32
from tpcpu.kernels.record import BF16, BLOCK, F16, FLOAT32, INT8, NF4, NF4_SINGLE
from tpcpu.kernels.scales import ROWS, TOGETHER, CodedScales
from tpcpu.kernels.simd import emit as e
from tpcpu.kernels.simd import instructions as isa

LINE_WORDS = 16
"""Words of a token that lie together: a cache line."""

WORD_BYTES = 4 * ROWS
"""A word of every row of a panel: one register."""


@intrinsic(prefer_literal=True)
def tile(
    typing_context, panels, tokens, floats, scaled, weights, weights_stride, scales, scales_stride,
    x, line_stride, x_scales, x_sums, x_scales_stride, blocks, out, out_stride, rows, count, begins, bias,
):  # fmt: skip
    """Adds a span's products of `panels` panels and `tokens` tokens, of which `count` are stored, to their results.

    The first four arguments are constants; `scaled`: weights have a scale per block. `weights`, `scales`: the first
    block in the first panel, and the bytes from panel to panel. `x`, `x_scales`, `x_sums`: the first block of the first
    token, and the bytes from line to line, or from block to block. `rows`: how many follow from the first panel's
    first on. `begins`: whether the span is the first; `bias`: the address of the rows' bias if it is the last.
    """
    shape = [argument.literal_value for argument in (panels, tokens, floats, scaled)]

    def codegen(context, builder, signature, args):
        _emit_tile(builder, *shape, *args[4:])
        return context.get_dummy_value()

    return types.void(panels, tokens, floats, scaled, *[types.int64] * 16), codegen


def _emit_tile(
    b, panels, tokens, floats, scaled, weights, weights_stride, scales, scales_stride,
    x, line_stride, x_scales, x_sums, x_scales_stride, blocks, out, out_stride, rows, count, begins, bias,
):  # fmt: skip
    each = [(p, m) for p in range(panels) for m in range(tokens)]
    lines = BLOCK // LINE_WORDS if floats else BLOCK // (4 * LINE_WORDS)
    zero = ir.Constant(e.F32V, [0.0] * ROWS)
    span_sums = {at: cgutils.alloca_once(b, e.F32V) for at in each}
    sums = {at: cgutils.alloca_once(b, e.F32V if floats else e.I32V) for at in each}
    for at in each:
        b.store(zero, span_sums[at])
    with cgutils.for_range(b, blocks) as block:
        scales_at = b.mul(block.index, x_scales_stride)
        for p, m in each:
            start = zero if floats else e.constants([0] * ROWS, I32)
            if not floats and isa.WEIGHT_BIAS:
                start = e.splat(b, e.load(b, e.offset(b, b.add(x_sums, scales_at), 4 * m), I32), e.I32V)
            b.store(start, sums[p, m])
        with cgutils.for_range(b, e.const(lines)) as inner:
            line = b.add(b.mul(block.index, e.const(lines)), inner.index)
            packed = b.add(weights, b.mul(line, e.const(LINE_WORDS * WORD_BYTES)))
            x_line = b.add(x, b.mul(line, line_stride))
            for word in range(LINE_WORDS):
                values = [
                    e.load(b, e.offset(b, b.add(packed, b.mul(weights_stride, e.const(p))), word * WORD_BYTES),
                           e.F32V if floats else e.BYTEV)
                    for p in range(panels)
                ]  # fmt: skip
                for m in range(tokens):
                    at = e.offset(b, x_line, 4 * (LINE_WORDS * m + word))
                    other = e.splat(b, e.load(b, at, F32 if floats else I32), e.F32V if floats else e.I32V)
                    for p in range(panels):
                        before = b.load(sums[p, m])
                        if floats:
                            after = e.fma(b, values[p], other, before)
                        else:
                            after = isa.dot4(b, before, values[p], other)
                        b.store(after, sums[p, m])
        for p in range(panels):
            if scaled:
                at = b.add(scales, b.mul(scales_stride, e.const(p)))
                scale = e.load(b, b.add(at, b.mul(block.index, e.const(WORD_BYTES))), e.F32V)
            for m in range(tokens):
                before, product = b.load(span_sums[p, m]), b.load(sums[p, m])
                if not scaled:
                    after = b.fadd(before, product)
                elif floats:
                    after = e.fma(b, scale, product, before)
                else:
                    x_scale = e.load(b, e.offset(b, b.add(x_scales, scales_at), 4 * m), F32)
                    value = b.fmul(scale, e.splat(b, x_scale, e.F32V))
                    after = e.fma(b, value, e.to_float(b, product), before)
                b.store(after, span_sums[p, m])
    _store(b, {at: b.load(span_sums[at]) for at in each}, panels, out, out_stride, rows, count, begins, bias)


def _store(b, span_sums, panels, out, out_stride, rows, count, begins, bias):
    """Adds the sums of a span to what is there, and the bias behind the last one."""
    is_first = b.icmp_signed("!=", begins, e.const(0))
    has_bias = b.icmp_signed("!=", bias, e.const(0))
    zero = ir.Constant(e.F32V, [0.0] * ROWS)
    for p in range(panels):
        added = cgutils.alloca_once(b, e.F32V)
        b.store(zero, added)
        with b.if_then(has_bias):
            b.store(e.load(b, e.offset(b, bias, 4 * ROWS * p), e.F32V), added)
        for m in range(len(span_sums) // panels):
            with b.if_then(b.icmp_signed("<", e.const(m), count)):
                at = e.offset(b, b.add(out, b.mul(out_stride, e.const(m))), 4 * ROWS * p)
                left = b.sub(rows, e.const(ROWS * p))
                total = b.fadd(b.select(is_first, zero, e.load_rows(b, at, left)), span_sums[p, m])
                e.store_rows(b, b.fadd(total, b.load(added)), at, left)


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
                value = scales.load(0, blocks, first, e.const(j))
                e.store(b, value, b.add(target, b.mul(e.offset(b, done, j), e.const(WORD_BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic(prefer_literal=True)
def unpack(typing_context, form, floats, table, source, features, target):
    """A panel's `features` from `source` on, as words for a tile; the first two arguments are constants.

    Zeros follow up to a whole block. Packed int8 for int8 activations is such words already.
    """
    form_, floats_ = form.literal_value, floats.literal_value

    def codegen(context, b, signature, args):
        table, source, features, target = args[2:]
        if form_ in (NF4, NF4_SINGLE):
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
