"""`linear.py` for CPUs without the instructions it needs: panels of one row, in the published layouts.

A row is decoded into scratch memory by a table of pairs, then multiplied by loops that LLVM vectorises for whatever
the CPU has. The order of sums is this file's own: bits differ between instruction sets, never within one.
"""

from functools import cache

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.memory import (
    I8,
    I16,
    I32,
    float_bits,
    half_to_float,
    load_f32,
    load_i64,
    load_u8,
    load_u16,
    store_f32,
    store_i64,
    store_u16,
)
from tpcpu.kernels.record import BF16, BLOCK, FLOAT32, FLOATS, INT8, MXFP4, NF4, SPAN
from tpcpu.kernels.simd import emit
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
HALF = BLOCK // R.HALVES
"""Weights of MXFP4 that share a scale."""


@helper
def _word(record, word):
    return load_i64(record + 8 * word)


@intrinsic(prefer_literal=True)
def _dot_bytes(typing_context, x, y, count):
    """The sum of `count`, a constant, products of signed bytes."""
    many = count.literal_value

    def codegen(context, builder, signature, args):
        wide = ir.VectorType(I16, many)
        x, y = (builder.sext(emit.load(builder, at, ir.VectorType(I8, many)), wide) for at in args[:2])
        products = builder.sext(builder.mul(x, y), ir.VectorType(I32, many))
        total = emit.intrinsic_call(builder, f"llvm.vector.reduce.add.v{many}i32", I32, [products])
        return builder.sext(total, ir.IntType(64))

    return types.int64(types.int64, types.int64, count), codegen


@helper
def _float_value(address, form):
    if form == FLOAT32:
        return load_f32(address)
    return float_bits(load_u16(address) << 16) if form == BF16 else half_to_float(load_u16(address))


@helper
def decode(record, segment, row, target, form, exact):
    """A row as int8 or, in exact arithmetic and for float weights, as float32."""
    columns = _word(segment, R.S_COLUMNS)
    table = _word(record, R.TABLE)
    values = _word(segment, R.S_VALUES)
    if form in FLOATS:
        size = 4 if form == FLOAT32 else 2
        for k in range(columns):
            store_f32(target + 4 * k, _float_value(values + size * (row * columns + k), form))
    elif form == INT8:
        for k in range(columns):
            byte = load_u8(values + row * columns + k)
            store_f32(target + 4 * k, float32(byte - 256 if byte > 127 else byte))
    else:
        source = values + row * (columns // 2)
        for i in range(columns // 2):
            pair = load_u8(source + i)
            if exact:
                store_i64(target + 8 * i, load_i64(table + 8 * pair))
            else:
                store_u16(target + 2 * i, load_u16(table + 2 * pair))


@helper
def power(segment, row, half):
    """The scale of a half of a block: 2^(n - 127)."""
    halves = _word(segment, R.S_COLUMNS) // HALF
    return float_bits(max(load_u8(_word(segment, R.S_SCALES) + row * halves + half) << 23, 1 << 22))


@helper
def scale(segment, row, block, form):
    blocks = _word(segment, R.S_COLUMNS) // BLOCK
    scales = _word(segment, R.S_SCALES)
    if form != NF4:
        return load_f32(scales + 4 * (row * blocks + block))
    code = load_f32(_word(segment, R.S_CODE) + 4 * load_u8(scales + row * blocks + block))
    number = row * _word(segment, R.S_FULL_BLOCKS) + _word(segment, R.S_FIRST_BLOCK) + block
    group = load_f32(_word(segment, R.S_GROUPS) + 4 * (number >> 8))
    return code * group + float_bits(_word(segment, R.S_OFFSET))


@helper
def float_block(weights, x, count):
    """The sum of `count` products."""
    total = v.splat(float32(0.0))
    whole = count // LANES * LANES
    for k in range(0, whole, LANES):
        total = v.fma(v.load(weights + 4 * k), v.load(x + 4 * k), total)
    result = v.sum_lanes(total)
    for k in range(whole, count):
        result += load_f32(weights + 4 * k) * load_f32(x + 4 * k)
    return result


@helper
def _row(record, segment, row, x, token, decoded, form, exact):
    """One row times row `token` of the activations at `x`: blocks in order inside spans, spans in order."""
    columns = _word(segment, R.S_COLUMNS)
    x += token * _word(record, R.X_STRIDE)
    x_scales = _word(record, R.X_SCALES) + token * _word(record, R.X_SCALES_STRIDE)
    factor = float_bits(_word(record, R.FACTOR))
    blocks = (columns + BLOCK - 1) // BLOCK
    total = float32(0.0)
    for first in range(0, blocks, SPAN):
        span = float32(0.0)
        for block in range(first, min(first + SPAN, blocks)):
            at = block * BLOCK
            if form in FLOATS:
                span += float_block(decoded + 4 * at, x + 4 * at, min(columns - at, BLOCK))
            elif form == MXFP4:
                for half in range(R.HALVES):
                    here = at + HALF * half
                    if exact:
                        product = float_block(decoded + 4 * here, x + 4 * here, HALF)
                    else:
                        product = float32(_dot_bytes(decoded + here, x + here, HALF))
                        product *= load_f32(x_scales + 4 * block) * factor
                    span += power(segment, row, R.HALVES * block + half) * product
            elif exact:
                span += scale(segment, row, block, form) * float_block(decoded + 4 * at, x + 4 * at, BLOCK)
            else:
                product = float32(_dot_bytes(decoded + at, x + at, BLOCK))
                span += scale(segment, row, block, form) * (load_f32(x_scales + 4 * block) * factor) * product
        total += span
    return total


def _make(form: int, exact: int, one: int) -> Kernel:
    """`one`: for steps of one token, of which every thread may have a copy."""

    def linear(record, thread, threads):
        tokens = load_i64(_word(record, R.COUNT))
        panels = _word(record, R.PANELS)
        begin = panels * thread // threads
        end = panels * (thread + 1) // threads
        scratch = _word(record, R.SCRATCH) + thread * _word(record, R.SCRATCH_STRIDE)
        segment = _word(record, R.SEGMENTS)
        x = _word(record, R.X_ONE if one else R.X)
        first = thread if one and _word(record, R.IS_PRIVATE) else 0
        for _ in range(_word(record, R.SEGMENT_COUNT)):
            rows = _word(segment, R.S_ROWS)
            row_of_one = first + (_word(segment, R.S_ROW_ONE) if one else 0)
            for row in range(max(begin, 0), min(end, rows)):
                decoded = scratch
                if form == INT8 and not exact:
                    decoded = _word(segment, R.S_VALUES) + row * _word(segment, R.S_COLUMNS)
                else:
                    decode(record, segment, row, decoded, form, exact)
                bias = _word(segment, R.S_BIAS)
                for token in range(tokens):
                    value = _row(record, segment, row, x, row_of_one + token, decoded, form, exact)
                    if bias:
                        value += load_f32(bias + 4 * row)
                    out = _word(segment, R.S_OUT_ONE if one else R.S_OUT) + token * _word(segment, R.S_OUT_STRIDE)
                    store_f32(out + 4 * row, value)
            begin -= rows
            end -= rows
            segment += 8 * R.SEGMENT_WORDS

    return Kernel(linear, f"linear-plain-{form}-{'exact' if exact else 'int8'}{'-of-one' if one else ''}")


@cache
def linear_of_one(form: int, exact: bool) -> Kernel:
    """The kernel for steps of one token and weights of a format."""
    return _make(form, 1 if exact or form in FLOATS else 0, 1)


@cache
def linear(form: int, exact: bool) -> Kernel:
    """The kernel for steps of several tokens and weights of a format."""
    return _make(form, 1 if exact or form in FLOATS else 0, 0)
