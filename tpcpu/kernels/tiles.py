"""Tiles: a few panels of packed weights times a few tokens, on vector registers.

The inner loops of a tile are unrolled while they are emitted; what an instruction set does differently is behind
`simd.instructions`. Every tile adds in the same order: features of a block, blocks of a span, spans. So a token's
result has the same bits in any company. Weights are (see `pack.py`):

    nf4     64 features of 16 rows: 8 groups of 8 features; a row's 4 bytes hold features 0..3 in their low halves and
            4..7 in their high halves
    int8    16 groups of 4 features, a row's 4 bytes together, plus WEIGHT_BIAS
    floats  feature by feature, the rows of a panel together
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpcpu.kernels import record as R
from tpcpu.kernels.isa import prefetches, selected
from tpcpu.kernels.memory import F32, I32
from tpcpu.kernels.record import BF16, BLOCK, F16, FLOAT32, INT8, MXFP4, NF4, NF4_SINGLE
from tpcpu.kernels.scales import TOGETHER, CodedScales, PowerScales, StoredScales, half_sum
from tpcpu.kernels.simd import emit as e
from tpcpu.kernels.simd import instructions as isa

ROWS = selected().panel_rows
AHEAD = 4096
"""Bytes that a tile asks for ahead of its reading: far enough for memory, near enough for the first-level cache."""
PREFETCH = AHEAD if prefetches() else 0
"""The same for one token; several are bound by arithmetic, on every CPU."""


class _Operands:
    """What a tile reads of the record and the segment, and the addresses of its panels and tokens."""

    def __init__(self, b, panels, tokens, record, segment, panel, token, private, one=False, spans=None):
        self.b, self.panels, self.tokens, self.panel = b, panels, tokens, panel
        self.spans = spans
        """(first, last, room) for a part of a panel, whose sums of spans go to `room` one by one; None for all."""
        self.segment = segment
        self.columns = e.load_word(b, segment, R.S_COLUMNS)
        self.values = e.load_word(b, segment, R.S_VALUES)
        self.scales = e.load_word(b, segment, R.S_SCALES)
        self.table = e.load_word(b, record, R.TABLE)
        self.factor = b.bitcast(b.trunc(e.load_word(b, record, R.FACTOR), I32), F32)
        stride = e.load_word(b, record, R.X_STRIDE)
        scales_stride = e.load_word(b, record, R.X_SCALES_STRIDE)
        # A private copy of one token is as many rows on as its thread has before it, of which the caller tells.
        row = b.add(token, private)
        if one:
            row = b.add(row, e.load_word(b, segment, R.S_ROW_ONE))
        first = e.load_word(b, record, R.X_ONE if one else R.X)
        self.x, self.x_scales, self.x_sums = (
            [b.add(start, b.mul(e.offset(b, row, m), step)) for m in range(tokens)]
            for start, step in (
                (first, stride),
                (e.load_word(b, record, R.X_SCALES), scales_stride),
                (e.load_word(b, record, R.X_SUMS), scales_stride),
            )
        )
        self.token = token
        self.out = R.S_OUT_ONE if one else R.S_OUT
        self.prefetches = bool(PREFETCH) if tokens == 1 else tokens >= 4

    def each(self):
        return [(p, m) for p in range(self.panels) for m in range(self.tokens)]

    def new(self, vector):
        """One register for every panel and token of the tile."""
        return {at: cgutils.alloca_once(self.b, vector) for at in self.each()}

    def fill(self, registers, value):
        for register in registers.values():
            self.b.store(value, register)


def _splat_bytes(b, address):
    """Four bytes, repeated over a register."""
    return e.splat(b, e.load(b, address, I32), e.I32V)


def _ahead(o, packed, block, blocks, block_bytes):
    """For each panel the address to ask for when `packed`, its block, is read: behind its end, that of its successor.

    Panels that a tile takes side by side lie one after another, so the next one of each is as many panels on.
    """
    b = o.b
    far = e.offset(b, block, -(-AHEAD // block_bytes))
    skipped = b.mul(blocks, e.const((o.panels - 1) * block_bytes))
    jump = b.select(b.icmp_signed("<", far, blocks), e.const(AHEAD), b.add(skipped, e.const(AHEAD)))
    return [b.add(address, jump) for address in packed]


def _part(half, groups):
    """The groups of a block, or of one half of it: `half` is (number, halves)."""
    number, halves = half
    return range(groups * number // halves, groups * (number + 1) // halves)


def _integer_products(o, sums, packed, ahead, x_at, nf4, table, half):
    """Adds a block's products of bytes to `sums`, some for each panel and token: integers add up alike in any order.

    `packed[p]`: address of the block; `ahead[p]`: what to prefetch with it; `x_at`: its first feature; `half`: see
    `_part`.
    """
    b = o.b
    groups, features = (8, 8) if nf4 else (16, 4)
    for g in _part(half, groups):
        weights = []
        for p in range(o.panels):
            if ahead:
                e.prefetch(b, e.offset(b, ahead[p], g * 4 * ROWS))
            stored = e.load(b, e.offset(b, packed[p], g * 4 * ROWS), e.BYTEV)
            if nf4:
                parts = (e.low_bits(b, stored, 4), e.high_nibbles(b, stored))
                weights.append([isa.lookup(b, table, part) for part in parts])
            else:
                weights.append([stored])
        for m in range(o.tokens):
            for four in range(len(weights[0])):
                x = _splat_bytes(b, e.offset(b, e.offset(b, o.x[m], x_at), features * g + 4 * four))
                for p in range(o.panels):
                    register = sums[p, m][(g * len(weights[p]) + four) % len(sums[p, m])]
                    b.store(isa.dot4(b, b.load(register), weights[p][four], x), register)


def _float_products(o, sums, packed, ahead, x_at, nf4, table, half):
    """As `_integer_products`, with float32 activations and one sum: feature after feature."""
    b = o.b
    groups = 8 if nf4 else 16
    for g in _part(half, groups):
        stored = [e.load(b, e.offset(b, packed[p], g * 4 * ROWS), e.I32V) for p in range(o.panels)]
        if ahead:
            for p in range(o.panels):
                e.prefetch(b, e.offset(b, ahead[p], g * 4 * ROWS))
        shifts = [8 * j + 4 * high for high in (0, 1) for j in range(4)] if nf4 else [8 * j for j in range(4)]
        for j, shift in enumerate(shifts):
            values = []
            for p in range(o.panels):
                if nf4:
                    moved = b.lshr(stored[p], e.constants([shift] * ROWS, I32))
                    values.append(isa.lookup_f32(b, table, moved))
                elif isa.WEIGHT_BIAS:
                    byte = e.low_bits(b, b.lshr(stored[p], e.constants([shift] * ROWS, I32)), 8)
                    values.append(e.to_float(b, b.sub(byte, e.constants([isa.WEIGHT_BIAS] * ROWS, I32))))
                else:
                    top = b.shl(stored[p], e.constants([24 - shift] * ROWS, I32))
                    values.append(e.to_float(b, b.ashr(top, e.constants([24] * ROWS, I32))))
            feature = len(shifts) * g + j
            for m in range(o.tokens):
                x = e.load(b, e.offset(b, e.offset(b, o.x[m], x_at, 4), 4 * feature), F32)
                x = e.splat(b, x, e.F32V)
                for p in range(o.panels):
                    b.store(e.fma(b, values[p], x, b.load(sums[p, m])), sums[p, m])


def _accumulate(o, blocks, one_block, scales=None):
    """Runs `one_block(block, inside, span_sums)` over all blocks; stores the joined sums, with the bias, to the output.

    `inside`: the block's place among those whose scales are decoded together. Of a part of a panel, only its spans,
    whose sums are stored one by one for whoever joins them.
    """
    b = o.b
    zero = ir.Constant(e.F32V, [0.0] * ROWS)
    totals, span_sums = o.new(e.F32V), o.new(e.F32V)
    o.fill(totals, zero)
    span, together = e.const(R.SPAN), e.const(TOGETHER)
    spans = b.udiv(b.add(blocks, e.const(R.SPAN - 1)), span)
    begin, end, room = o.spans or (e.const(0), spans, None)
    with cgutils.for_range(b, end, begin) as outer:
        o.fill(span_sums, zero)
        first = b.mul(outer.index, span)
        in_span = _smaller(b, b.sub(blocks, first), span)
        with cgutils.for_range(b, b.udiv(b.add(in_span, e.const(TOGETHER - 1)), together)) as four:
            done = b.mul(four.index, together)
            base = b.add(first, done)
            if scales is not None:
                scales.decode(base, blocks)
            with cgutils.for_range(b, _smaller(b, b.sub(in_span, done), together)) as inner:
                one_block(b.add(base, inner.index), inner.index, span_sums)
        for at in o.each():
            if room is None:
                b.store(b.fadd(b.load(totals[at]), b.load(span_sums[at])), totals[at])
            else:
                e.store(b, b.load(span_sums[at]), e.offset(b, room, outer.index, 4 * ROWS))
    if room is None:
        _store(o, totals)


def _smaller(b, x, y):
    return b.select(b.icmp_signed("<", x, y), x, y)


def _store(o, totals):
    b = o.b
    out, stride, bias, rows = (e.load_word(b, o.segment, word) for word in (o.out, R.S_OUT_STRIDE, R.S_BIAS, R.S_ROWS))
    has_bias = b.icmp_signed("!=", bias, e.const(0))
    for p in range(o.panels):
        row = b.mul(e.offset(b, o.panel, p), e.const(ROWS))
        added = cgutils.alloca_once(b, e.F32V)
        b.store(ir.Constant(e.F32V, [0.0] * ROWS), added)
        with b.if_then(has_bias):
            b.store(e.load(b, e.offset(b, bias, row, 4), e.F32V), added)
        for m in range(o.tokens):
            at = b.add(e.offset(b, out, row, 4), b.mul(e.offset(b, o.token, m), stride))
            e.store_rows(b, b.fadd(b.load(totals[p, m]), b.load(added)), at, b.sub(rows, row))


_SCALES = {NF4: CodedScales, NF4_SINGLE: StoredScales, INT8: StoredScales, MXFP4: PowerScales}


def _starts(o, m, block, x_at, halves):
    """What the sums of integers of token m begin with, by halves of a block: what undoes the bias of the weights."""
    b = o.b
    if not isa.WEIGHT_BIAS:
        return [e.constants([0] * ROWS, I32)] * halves
    whole = e.load(b, e.offset(b, o.x_sums[m], block, 4), I32)
    if halves == 1:
        return [e.splat(b, whole, e.I32V)]
    first = half_sum(b, e.offset(b, o.x[m], x_at))
    return [e.splat(b, first, e.I32V), e.splat(b, b.sub(whole, first), e.I32V)]


def _quantised_tile(o, form, exact):
    """4-bit or int8 weights; int8 activations with a scale per block, or float32 ones."""
    b, nf4 = o.b, form != INT8
    scales, halves = _SCALES[form](o), R.HALVES if form == MXFP4 else 1
    blocks = b.udiv(o.columns, e.const(BLOCK))
    block_bytes = BLOCK * ROWS // (2 if nf4 else 1)
    if not nf4:
        table = None
    elif exact:
        table = isa.table_f32(b, o.table)
    else:
        table = e.load(b, o.table, e.BYTEV)
    # A second sum hides the latency of the product, where there are no other tokens to do that.
    chains = 1 if o.panels * o.tokens >= 8 else 2
    sums = o.new(e.F32V) if exact else {at: [cgutils.alloca_once(b, e.I32V) for _ in range(chains)] for at in o.each()}

    def one_block(block, inside, span_sums):
        packed = [
            e.offset(b, o.values, b.add(b.mul(e.offset(b, o.panel, p), blocks), block), block_bytes)
            for p in range(o.panels)
        ]
        ahead = _ahead(o, packed, block, blocks, block_bytes) if o.prefetches else []
        x_at = b.mul(block, e.const(BLOCK))
        starts = [] if exact else [_starts(o, m, block, x_at, halves) for m in range(o.tokens)]
        for half in range(halves):
            one_half(block, inside, span_sums, packed, ahead, x_at, starts, half)

    def one_half(block, inside, span_sums, packed, ahead, x_at, starts, half):
        """Of a block in halves with scales of their own; else all of it."""
        if exact:
            o.fill(sums, ir.Constant(e.F32V, [0.0] * ROWS))
            _float_products(o, sums, packed, ahead, x_at, nf4, table, (half, halves))
        else:
            zero = e.constants([0] * ROWS, I32)
            for p, m in o.each():
                for register, value in zip(sums[p, m], (starts[m][half], zero), strict=False):
                    b.store(value, register)
            _integer_products(o, sums, packed, ahead, x_at, nf4, table, (half, halves))
        for p in range(o.panels):
            scale = scales.load(p, blocks, block, inside, half)
            for m in range(o.tokens):
                register = span_sums[p, m]
                if exact:
                    value, product = scale, b.load(sums[p, m])
                else:
                    x_scale = b.fmul(e.load(b, e.offset(b, o.x_scales[m], block, 4), F32), o.factor)
                    value = b.fmul(scale, e.splat(b, x_scale, e.F32V))
                    parts = [b.load(part) for part in sums[p, m]]
                    product = e.to_float(b, b.add(*parts) if len(parts) > 1 else parts[0])
                b.store(e.fma(b, value, product, b.load(register)), register)

    _accumulate(o, blocks, one_block, scales)


def _float_tile(o, bits):
    """bfloat16 (16), float16 (17) or float32 (32) weights and float32 activations; any number of columns."""
    b = o.b
    size = 4 if bits == 32 else 2
    blocks = b.udiv(b.add(o.columns, e.const(BLOCK - 1)), e.const(BLOCK))
    panels = [e.offset(b, o.values, b.mul(e.offset(b, o.panel, p), o.columns), ROWS * size) for p in range(o.panels)]

    sums = o.new(e.F32V)

    def one_block(block, _inside, span_sums):
        o.fill(sums, ir.Constant(e.F32V, [0.0] * ROWS))
        first = b.mul(block, e.const(BLOCK))
        left = b.sub(o.columns, first)
        with cgutils.for_range(b, b.select(b.icmp_signed("<", left, e.const(BLOCK)), left, e.const(BLOCK))) as loop:
            k = b.add(first, loop.index)
            values = []
            for p in range(o.panels):
                at = e.offset(b, panels[p], k, ROWS * size)
                if o.prefetches:
                    e.prefetch(b, e.offset(b, at, AHEAD))
                values.append(e.load_floats(b, at, bits))
            for m in range(o.tokens):
                x = e.splat(b, e.load(b, e.offset(b, o.x[m], k, 4), F32), e.F32V)
                for p in range(o.panels):
                    b.store(e.fma(b, values[p], x, b.load(sums[p, m])), sums[p, m])
        for at in o.each():
            b.store(b.fadd(b.load(span_sums[at]), b.load(sums[at])), span_sums[at])

    _accumulate(o, blocks, one_block)


def _emit_tile(b, panels, tokens, form, exact, addresses, one, spans=None):
    o = _Operands(b, panels, tokens, *addresses, one=one, spans=spans)
    if form in _SCALES:
        _quantised_tile(o, form, exact)
    else:
        _float_tile(o, {BF16: 16, F16: 17, FLOAT32: 32}[form])


@intrinsic(prefer_literal=True)
def tile(typing_context, panels, tokens, form, exact, record, segment, panel, token):
    """Panels `panel`.. times tokens `token`.. of a segment; the first four arguments are constants."""
    shape = [argument.literal_value for argument in (panels, tokens, form, exact)]

    def codegen(context, builder, signature, args):
        _emit_tile(builder, *shape, (*args[4:], e.const(0)), one=False)
        return context.get_dummy_value()

    return types.void(panels, tokens, form, exact, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def tile_of_one(typing_context, panels, form, exact, record, segment, panel, private):
    """Panels `panel`.. times the only token, whose activations are row `private` of `X_ONE`, to `S_OUT_ONE`."""
    shape = [argument.literal_value for argument in (form, exact)]
    panels_ = panels.literal_value

    def codegen(context, builder, signature, args):
        _emit_tile(builder, panels_, 1, *shape, (*args[3:6], e.const(0), args[6]), one=True)
        return context.get_dummy_value()

    return types.void(panels, form, exact, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def part(typing_context, form, exact, record, segment, panel, private, first, last, room):
    """Spans `first` to `last` of one panel times the only token: their sums to `room`, one by one."""
    shape = [argument.literal_value for argument in (form, exact)]

    def codegen(context, builder, signature, args):
        addresses = (*args[2:5], e.const(0), args[5])
        _emit_tile(builder, 1, 1, *shape, addresses, one=True, spans=args[6:])
        return context.get_dummy_value()

    return types.void(form, exact, *[types.int64] * 7), codegen
