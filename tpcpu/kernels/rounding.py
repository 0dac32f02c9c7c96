"""Rounding activations to int8, one scale per block of 64: as many blocks at a time as a register has lanes.

Their maxima, and later the sums of what they were rounded to, are joined across registers instead of inside each, and
what is divided is divided for all of them at once.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import helper
from tpcpu.kernels.memory import F32, I32, load_i64, store_f32, store_i32
from tpcpu.kernels.simd import emit as e
from tpcpu.kernels.simd import instructions
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
BLOCK = R.BLOCK
SMALLEST = 1e-36
"""A block whose largest value is smaller counts as zero: 127 over it might overflow."""
WEIGHT_BIAS = instructions.WEIGHT_BIAS if instructions else 0


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _across(b, registers, join):
    """Lane i of the result: all lanes of register i, joined."""
    while len(registers) > 1:
        pairs = zip(registers[::2], registers[1::2], strict=True)
        registers = [
            join(*(b.shuffle_vector(x, y, e.constants(range(first, 2 * LANES, 2), I32)) for first in (0, 1)))
            for x, y in pairs
        ]
    return registers[0]


def _whole(b, array):
    return [b.load(b.gep(array, [e.const(0, I32), e.const(j, I32)])) for j in range(LANES)]


@intrinsic
def _round_blocks(typing_context, source, q, scales, sums):
    """LANES blocks of float32 at `source` to bytes, scales (float32) and sums (int32)."""

    def codegen(context, b, signature, args):
        source, q, scales, sums = args
        found = cgutils.alloca_once(b, ir.ArrayType(e.F32V, LANES))
        with cgutils.for_range(b, e.const(LANES)) as loop:
            at = e.offset(b, source, loop.index, 4 * BLOCK)
            largest = None
            for i in range(0, BLOCK, LANES):
                x = e.load(b, e.offset(b, at, 4 * i), e.F32V)
                x = e.intrinsic_call(b, f"llvm.fabs.v{LANES}f32", e.F32V, [x])
                largest = x if largest is None else _larger(b, largest, x)
            b.store(largest, b.gep(found, [e.const(0, I32), b.trunc(loop.index, I32)]))
        peaks = _across(b, _whole(b, found), lambda x, y: _larger(b, x, y))
        zero = ir.Constant(e.F32V, [0.0] * LANES)
        peaks = b.select(b.fcmp_ordered(">", peaks, e.splat(b, ir.Constant(F32, SMALLEST), e.F32V)), peaks, zero)
        full = ir.Constant(e.F32V, [127.0] * LANES)
        e.store(b, b.fdiv(peaks, full), scales)
        inverses = cgutils.alloca_once(b, e.F32V)
        b.store(b.select(b.fcmp_ordered(">", peaks, zero), b.fdiv(full, peaks), zero), inverses)
        inverse_at = b.ptrtoint(inverses, ir.IntType(64))
        totals = cgutils.alloca_once(b, ir.ArrayType(e.I32V, LANES))
        with cgutils.for_range(b, e.const(LANES)) as loop:
            at, out = e.offset(b, source, loop.index, 4 * BLOCK), e.offset(b, q, loop.index, BLOCK)
            factor = e.splat(b, e.load(b, e.offset(b, inverse_at, loop.index, 4), F32), e.F32V)
            total = None
            for i in range(0, BLOCK, LANES):
                x = b.fmul(e.load(b, e.offset(b, at, 4 * i), e.F32V), factor)
                x = b.fptosi(e.intrinsic_call(b, f"llvm.rint.v{LANES}f32", e.F32V, [x]), e.I32V)
                e.store(b, b.trunc(x, ir.VectorType(ir.IntType(8), LANES)), e.offset(b, out, i))
                total = x if total is None else b.add(total, x)
            b.store(total, b.gep(totals, [e.const(0, I32), b.trunc(loop.index, I32)]))
        if WEIGHT_BIAS:
            found = _across(b, _whole(b, totals), b.add)
            found = b.mul(found, e.constants([-WEIGHT_BIAS] * LANES, I32))
        else:
            found = e.constants([0] * LANES, I32)
        e.store(b, found, sums)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@helper
def _round_block(source, q, scale, bias):
    largest = v.absolute(v.load(source))
    for i in range(LANES, BLOCK, LANES):
        largest = v.maximum(largest, v.absolute(v.load(source + 4 * i)))
    peak = v.max_lanes(largest)
    peak = peak if peak > float32(SMALLEST) else float32(0.0)
    inverse = float32(127.0) / peak if peak > float32(0.0) else float32(0.0)
    factor = v.splat(inverse)
    total = v.zero_integers()
    for i in range(0, BLOCK, LANES):
        rounded = v.nearest(v.mul(v.load(source + 4 * i), factor))
        total = v.add_integers(total, rounded)
        v.store_i8(q + i, rounded)
    store_f32(scale, peak / float32(127.0))
    store_i32(bias, -WEIGHT_BIAS * v.sum_lanes_integers(total))


@helper
def round_to_int8(record, row, source, begin, end):
    """Rounds features `begin` to `end` at `source` to int8, one scale per block: the largest becomes 127."""
    q = load_i64(record + 8 * R.Q) + row * load_i64(record + 8 * R.Q_STRIDE)
    scales = load_i64(record + 8 * R.Q_SCALES) + row * load_i64(record + 8 * R.Q_SCALES_STRIDE)
    sums = load_i64(record + 8 * R.Q_SUMS) + row * load_i64(record + 8 * R.Q_SCALES_STRIDE)
    first = begin
    while first + LANES * BLOCK <= end:
        at = 4 * (first // BLOCK)
        _round_blocks(source + 4 * first, q + first, scales + at, sums + at)
        first += LANES * BLOCK
    while first < end:
        at = 4 * (first // BLOCK)
        _round_block(source + 4 * first, q + first, scales + at, sums + at)
        first += BLOCK
