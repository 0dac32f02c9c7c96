"""Products in which every head multiplies rows of its own of one weight, as they are or turned.

A head's rows need not begin where panels do: a panel is multiplied for every head that has rows in it. Threads divide
pairs: of a head and a panel, or, turned, of a head and a block of columns. Each pair is unpacked once, for all tokens,
as float32, and multiplies activations in float32. Sums are chains of fixed length, joined in a fixed tree, whoever
computes them and for however many tokens.
"""

from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.activations import word
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.gemm_tiles import WORD_BYTES, prefetch, unpack, unpack_powers, unpack_scales
from tpcpu.kernels.memory import F32, I32
from tpcpu.kernels.record import BF16, BLOCK, F16, FLOAT32, FLOATS, HALVES, INT8, MXFP4, NF4, NF4_SINGLE, SPAN
from tpcpu.kernels.scales import ROWS, TOGETHER
from tpcpu.kernels.simd import emit as e
from tpcpu.kernels.simd import instructions as isa
from tpcpu.kernels.simd import vectors as v

CHAINS = 8
"""Sums of a block that do not wait for one another."""

GROUP = 32
"""Tokens that go through a block together; it is unpacked anew for the next ones."""

_BLOCK_BYTES = BLOCK * WORD_BYTES
"""A block of a panel, unpacked."""

_LINE = 64


def room_bytes(rows: int, columns: int) -> int:
    """What a thread needs for heads of so many rows of a weight: scales; sums, or factors of rows; unpacked blocks."""
    panels, blocks = (rows + 2 * ROWS - 2) // ROWS, (columns + BLOCK - 1) // BLOCK
    scales = max(panels * SPAN, blocks + TOGETHER)
    return (scales + max(panels, GROUP)) * WORD_BYTES + panels * _BLOCK_BYTES


@helper
def _rooms(record, thread, blocks, panels):
    """A thread's memory: for scales, for sums or factors, for unpacked blocks."""
    scales = word(record, R.ROOM) + thread * word(record, R.ROOM_STRIDE)
    sums = scales + max(panels * SPAN, blocks + TOGETHER) * WORD_BYTES
    return scales, sums, sums + max(panels, GROUP) * WORD_BYTES


@helper
def _panels_of(record, head):
    """The first panel with rows of a head, and the one behind the last."""
    first = word(record, R.H_FIRST) + head * word(record, R.H_STEP)
    return first // ROWS, (first + word(record, R.H_ROWS) + ROWS - 1) // ROWS


@helper
def _most_panels(record):
    return (word(record, R.H_ROWS) + 2 * ROWS - 2) // ROWS


@helper
def _head(record, head, token):
    """Activations of a head."""
    return word(record, R.X) + token * word(record, R.X_STRIDE) + head * word(record, R.H_X_STEP)


@helper
def _result(record, head, token):
    return word(record, R.H_OUT) + token * word(record, R.H_OUT_STRIDE) + head * word(record, R.H_OUT_STEP)


@intrinsic
def _block_sum(typing_context, weights, x):
    """One register: the sum over a block's features of weight times x, where each feature has a register of rows."""

    def codegen(context, b, signature, args):
        weights, x = args
        sums = [cgutils.alloca_once(b, e.F32V) for _ in range(CHAINS)]
        for register in sums:
            b.store(ir.Constant(e.F32V, [0.0] * e.LANES), register)
        with cgutils.for_range(b, e.const(BLOCK // CHAINS)) as loop:
            at, x_at = e.offset(b, weights, loop.index, CHAINS * WORD_BYTES), e.offset(b, x, loop.index, 4 * CHAINS)
            for i, register in enumerate(sums):
                value = e.load(b, e.offset(b, at, i * WORD_BYTES), e.F32V)
                other = e.splat(b, e.load(b, e.offset(b, x_at, 4 * i), F32), e.F32V)
                b.store(e.fma(b, value, other, b.load(register)), register)
        return _tree(b, [b.load(register) for register in sums])

    return v.floats(types.int64, types.int64), codegen


def _tree(b, values):
    """Their sum, in pairs."""
    while len(values) > 1:
        values = [b.fadd(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@intrinsic
def _turned_sums(typing_context, weights, factors, panels):
    """A register of as many columns: the sum over the rows of `panels` of weight times the row's factor."""

    def codegen(context, b, signature, args):
        weights, factors, panels = args
        sums = [cgutils.alloca_once(b, e.F32V) for _ in range(e.LANES)]
        for register in sums:
            b.store(ir.Constant(e.F32V, [0.0] * e.LANES), register)
        with cgutils.for_range(b, panels) as loop:
            factor = e.load(b, e.offset(b, factors, loop.index, WORD_BYTES), e.F32V)
            at = e.offset(b, weights, loop.index, _BLOCK_BYTES)
            for i, register in enumerate(sums):
                value = e.load(b, e.offset(b, at, i * WORD_BYTES), e.F32V)
                b.store(e.fma(b, value, factor, b.load(register)), register)
        return e.sum_each(b, [b.load(register) for register in sums])

    return v.floats(types.int64, types.int64, types.int64), codegen


# Of one token nothing is unpacked to memory: the same sums of what is decoded on the way.

_GROUP = 8
"""Features of a word of NF4 codes."""


def _decoded(b, table, address):
    """The values of eight features, a register of rows each."""
    stored = e.load(b, address, e.I32V)
    shifts = [8 * j + 4 * half for half in (0, 1) for j in range(4)]
    return [isa.lookup_f32(b, table, b.lshr(stored, e.constants([each] * ROWS, I32))) for each in shifts]


@intrinsic
def _block_sum_nf4(typing_context, source, table, x):
    """As `_block_sum`, of a packed block."""

    def codegen(context, b, signature, args):
        source, table, x = args
        values = isa.table_f32(b, table)
        sums = [cgutils.alloca_once(b, e.F32V) for _ in range(CHAINS)]
        for register in sums:
            b.store(ir.Constant(e.F32V, [0.0] * e.LANES), register)
        with cgutils.for_range(b, e.const(BLOCK // _GROUP)) as loop:
            words = _decoded(b, values, e.offset(b, source, loop.index, WORD_BYTES))
            x_at = e.offset(b, x, loop.index, 4 * _GROUP)
            for i, (word, register) in enumerate(zip(words, sums, strict=True)):
                other = e.splat(b, e.load(b, e.offset(b, x_at, 4 * i), F32), e.F32V)
                b.store(e.fma(b, word, other, b.load(register)), register)
        return _tree(b, [b.load(register) for register in sums])

    return v.floats(types.int64, types.int64, types.int64), codegen


@intrinsic
def _turned_sums_nf4(typing_context, source, panel_bytes, table, factors, panels):
    """As `_turned_sums`, of packed blocks, `panel_bytes` from panel to panel."""

    def codegen(context, b, signature, args):
        source, panel_bytes, table, factors, panels = args
        values = isa.table_f32(b, table)
        sums = [cgutils.alloca_once(b, e.F32V) for _ in range(e.LANES)]
        for register in sums:
            b.store(ir.Constant(e.F32V, [0.0] * e.LANES), register)
        with cgutils.for_range(b, panels) as loop:
            factor = e.load(b, e.offset(b, factors, loop.index, WORD_BYTES), e.F32V)
            at = b.add(source, b.mul(loop.index, panel_bytes))
            for first in range(0, e.LANES, _GROUP):
                words = _decoded(b, values, e.offset(b, at, first // _GROUP * WORD_BYTES))
                for word, register in zip(words, sums[first : first + _GROUP], strict=True):
                    b.store(e.fma(b, word, factor, b.load(register)), register)
        return e.sum_each(b, [b.load(register) for register in sums])

    return v.floats(*[types.int64] * 5), codegen


@helper
def _multiply_by_powers(segment, block, room, weights):
    """Gives an unpacked block, of this number among all of a segment, the scales of its halves: exact, as they are
    powers of two."""
    unpack_powers(word(segment, R.S_SCALES) + block * HALVES * ROWS, HALVES, room)
    for i in range(BLOCK):
        at = weights + i * WORD_BYTES
        v.store(at, v.mul(v.load(at), v.load(room + i * HALVES // BLOCK * WORD_BYTES)))


@helper
def _ask(address, nbytes):
    for i in range(0, nbytes, _LINE):
        prefetch(address + i)


def _stored_bits(form: int) -> int:
    """Bits of a packed weight."""
    return {FLOAT32: 32, BF16: 16, F16: 16, INT8: 8}.get(form, 4)


@cache
def by_heads(form: int) -> Kernel:
    """out_h = x_h @ w_h.T for weights of a format."""
    bits, scaled, in_place = _stored_bits(form), form not in (*FLOATS, MXFP4), form in (NF4, NF4_SINGLE)

    def by_heads(record, thread, threads):
        segment, tokens = word(record, R.SEGMENTS), word(word(record, R.COUNT), 0)
        columns, rows = word(segment, R.S_COLUMNS), word(record, R.H_ROWS)
        blocks, panel_bytes = (columns + BLOCK - 1) // BLOCK, columns * ROWS * bits // 8
        block_bytes, most = BLOCK * ROWS * bits // 8, _most_panels(record)
        items = word(record, R.H_HEADS) * most
        scales, sums, weights = _rooms(record, thread, blocks, most)
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            head = item // most
            begin, end = _panels_of(record, head)
            panel = begin + item % most
            if panel >= end:
                continue
            source = word(segment, R.S_VALUES) + panel * panel_bytes
            from_scales = scales
            if form == NF4:
                unpack_scales(segment, panel, blocks, 0, blocks, scales)
            elif scaled:
                from_scales = word(segment, R.S_SCALES) + panel * blocks * WORD_BYTES
            # Lanes are rows; which of them are this head's.
            row = panel * ROWS - (word(record, R.H_FIRST) + head * word(record, R.H_STEP))
            for token in range(0, tokens, GROUP):
                many = min(GROUP, tokens - token)
                for block in range(blocks):
                    features = min(columns - block * BLOCK, BLOCK)
                    at = source + block * block_bytes
                    if not in_place or many > 1:
                        unpack(form, 1, word(record, R.TABLE), at, features, weights)
                    if form == MXFP4:
                        _multiply_by_powers(segment, panel * blocks + block, scales, weights)
                    _ask(at + panel_bytes, block_bytes)
                    for i in range(many):
                        total = v.load(sums + i * WORD_BYTES) if block else v.splat(float32(0.0))
                        x = _head(record, head, token + i) + 4 * BLOCK * block
                        if in_place and many == 1:
                            product = _block_sum_nf4(at, word(record, R.TABLE), x)
                        else:
                            product = _block_sum(weights, x)
                        if scaled:
                            total = v.fma(v.load(from_scales + block * WORD_BYTES), product, total)
                        else:
                            total = v.add(total, product)
                        v.store(sums + i * WORD_BYTES, total)
                for i in range(many):
                    out = _result(record, head, token + i) + 4 * row
                    v.store_between(out, v.load(sums + i * WORD_BYTES), -row, rows - row)

    return Kernel(by_heads, f"linear-by-heads-{form}")


@cache
def turned_by_heads(form: int) -> Kernel:
    """out_h = x_h @ w_h for weights of a format."""
    bits, scaled, in_place = _stored_bits(form), form not in (*FLOATS, MXFP4), form in (NF4, NF4_SINGLE)
    block_bytes = BLOCK * ROWS * bits // 8

    def turned_by_heads(record, thread, threads):
        segment, tokens = word(record, R.SEGMENTS), word(word(record, R.COUNT), 0)
        columns, rows = word(segment, R.S_COLUMNS), word(record, R.H_ROWS)
        blocks, panel_bytes = (columns + BLOCK - 1) // BLOCK, columns * ROWS * bits // 8
        most = _most_panels(record)
        items = word(record, R.H_HEADS) * blocks
        scales, factors, weights = _rooms(record, thread, blocks, most)
        first_item = items * thread // threads
        for item in range(first_item, items * (thread + 1) // threads):
            head, block = item // blocks, item % blocks
            begin, end = _panels_of(record, head)
            features = min(columns - block * BLOCK, BLOCK)
            if form == NF4 and (item == first_item or block % SPAN == 0):
                span = block // SPAN * SPAN
                for panel in range(begin, end):
                    at = scales + (panel - begin) * SPAN * WORD_BYTES
                    unpack_scales(segment, panel, blocks, span, min(SPAN, blocks - span), at)
            for panel in range(begin, end):
                source = word(segment, R.S_VALUES) + panel * panel_bytes + block * block_bytes
                unpacked = weights + (panel - begin) * _BLOCK_BYTES
                if not in_place or tokens > 1:
                    unpack(form, 1, word(record, R.TABLE), source, features, unpacked)
                if form == MXFP4:
                    _multiply_by_powers(segment, panel * blocks + block, scales, unpacked)
                _ask(source + block_bytes, block_bytes)
                if form != NF4 and scaled:
                    at = scales + ((panel - begin) * SPAN + block % SPAN) * WORD_BYTES
                    v.store(at, v.load(word(segment, R.S_SCALES) + (panel * blocks + block) * WORD_BYTES))
            first = begin * ROWS - (word(record, R.H_FIRST) + head * word(record, R.H_STEP))
            for token in range(tokens):
                x, out = _head(record, head, token), _result(record, head, token) + 4 * BLOCK * block
                for panel in range(end - begin):
                    # Rows of other heads count for nothing.
                    row = first + ROWS * panel
                    factor = v.load_between(x + 4 * row, -row, rows - row)
                    if scaled:
                        factor = v.mul(factor, v.load(scales + (panel * SPAN + block % SPAN) * WORD_BYTES))
                    v.store(factors + panel * WORD_BYTES, factor)
                for column in range(0, features, ROWS):
                    if in_place and tokens == 1:
                        source = word(segment, R.S_VALUES) + begin * panel_bytes + block * block_bytes
                        source += column // _GROUP * WORD_BYTES
                        sums = _turned_sums_nf4(source, panel_bytes, word(record, R.TABLE), factors, end - begin)
                    else:
                        sums = _turned_sums(weights + column * WORD_BYTES, factors, end - begin)
                    v.store_first(out + 4 * column, sums, features - column)

    return Kernel(turned_by_heads, f"linear-turned-by-heads-{form}")
