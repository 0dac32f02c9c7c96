"""numba types for vector registers, and a dozen operations on them, named after what they compute.

A kernel written with these is written once for every instruction set: `LANES` float32 values a register, in sums
always added lane by lane and then in one fixed tree, so that a result never depends on who else is computing.
Addresses are int64 and need no alignment.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from tpcpu.kernels.compile import helper
from tpcpu.kernels.memory import I8, I16, I32
from tpcpu.kernels.simd import emit, instructions

LANES = emit.LANES


class _Vector(types.Type):
    def __init__(self, name):
        super().__init__(name=f"{name}x{LANES}")


class _Float32(_Vector):
    pass


class _Int32(_Vector):
    pass


@register_model(_Float32)
class _Float32Model(models.PrimitiveModel):
    def __init__(self, manager, of):
        super().__init__(manager, of, emit.F32V)


@register_model(_Int32)
class _Int32Model(models.PrimitiveModel):
    def __init__(self, manager, of):
        super().__init__(manager, of, emit.I32V)


floats = _Float32("float32")
integers = _Int32("int32")


def _operation(result, *arguments):
    """Turns `emit(builder, *values)` into an intrinsic of this signature."""

    def make(emit_values):
        def typer(typing_context, *args):
            def codegen(context, builder, signature, values):
                value = emit_values(builder, *values)
                return context.get_dummy_value() if value is None else value

            return result(*arguments), codegen

        # numba wants named parameters: one typer per number of arguments.
        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        scope = {"typer": typer}
        exec(f"def named(typing_context, {names}): return typer(typing_context, {names})", scope)
        scope["named"].__name__ = emit_values.__name__
        scope["named"].__qualname__ = emit_values.__name__
        scope["named"].__module__ = __name__
        return intrinsic(scope["named"])

    return make


@_operation(floats, types.float32)
def splat(b, x):
    return emit.splat(b, x, emit.F32V)


@_operation(floats, types.int64)
def load(b, address):
    return emit.load(b, address, emit.F32V)


@_operation(floats, types.int64)
def load_bf16(b, address):
    return emit.load_floats(b, address, 16)


@_operation(floats, types.int64)
def load_f16(b, address):
    return emit.load_floats(b, address, 17)


@_operation(types.void, types.int64, floats)
def store(b, address, x):
    emit.store(b, x, address)


@_operation(types.void, types.int64, floats, floats)
def store_pairs(b, address, x, y):
    """The lanes of x and y in turn, to two registers' memory."""
    for half in range(2):
        lanes = [half * LANES // 2 + i // 2 + LANES * (i % 2) for i in range(LANES)]
        emit.store(b, b.shuffle_vector(x, y, emit.constants(lanes, I32)), emit.offset(b, address, 4 * LANES * half))


@_operation(types.void, types.int64, floats, types.int64)
def store_first(b, address, x, count):
    """Stores the first `count` lanes, all if there are no more."""
    emit.store_rows(b, x, address, count)


@_operation(types.void, types.int64, floats, types.int64, types.int64)
def store_between(b, address, x, first, stop):
    """Stores the lanes from `first` to `stop`, which may lie outside."""
    emit.store_lanes(b, x, address, emit.lanes_between(b, first, stop))


@_operation(floats, types.int64, types.int64, types.int64)
def load_between(b, address, first, stop):
    """The lanes from `first` to `stop`, which may lie outside; zeros in the others, which are not read."""
    return emit.load_lanes(b, address, emit.lanes_between(b, first, stop))


@_operation(types.void, types.int64, floats)
def store_bf16(b, address, x):
    """Rounded to the nearest, ties to even."""
    bits = b.bitcast(x, emit.I32V)
    odd = emit.low_bits(b, b.lshr(bits, emit.constants([16] * LANES, I32)), 1)
    bits = b.add(bits, b.add(odd, emit.constants([0x7FFF] * LANES, I32)))
    high = b.lshr(bits, emit.constants([16] * LANES, I32))
    emit.store(b, b.trunc(high, ir.VectorType(I16, LANES)), address)


@_operation(types.void, types.int64, integers)
def store_i8(b, address, x):
    """The low byte of each lane."""
    emit.store(b, b.trunc(x, ir.VectorType(I8, LANES)), address)


@_operation(floats, floats, floats)
def add(b, x, y):
    return b.fadd(x, y)


@_operation(floats, floats, floats)
def sub(b, x, y):
    return b.fsub(x, y)


@_operation(floats, floats, floats)
def mul(b, x, y):
    return b.fmul(x, y)


@_operation(floats, floats, floats)
def div(b, x, y):
    return b.fdiv(x, y)


@_operation(floats, floats, floats, floats)
def fma(b, x, y, z):
    return emit.fma(b, x, y, z)


@_operation(floats, floats, floats)
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_operation(floats, floats, floats)
def minimum(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@_operation(floats, floats, types.int64, types.float32)
def first_lanes(b, x, count, fill):
    """The first `count` lanes, all if there are no more; `fill` in the others."""
    return b.select(emit.lanes_before(b, count), x, emit.splat(b, fill, emit.F32V))


@_operation(floats, floats, types.int64, types.float32)
def after_lanes(b, x, count, fill):
    """`fill` in the first `count` lanes, all if there are no more; x in the others."""
    return b.select(emit.lanes_before(b, count), emit.splat(b, fill, emit.F32V), x)


@_operation(floats, floats)
def absolute(b, x):
    return emit.intrinsic_call(b, f"llvm.fabs.v{LANES}f32", x.type, [x])


@_operation(integers, floats)
def nearest(b, x):
    """The nearest integer, ties to even."""
    return b.fptosi(emit.intrinsic_call(b, f"llvm.rint.v{LANES}f32", x.type, [x]), emit.I32V)


@_operation(floats, integers)
def to_float(b, x):
    return b.sitofp(x, emit.F32V)


@_operation(integers, integers, integers)
def add_integers(b, x, y):
    return b.add(x, y)


@_operation(integers, types.int64)
def splat_integers(b, x):
    """The low 32 bits of x in every lane."""
    return emit.splat(b, b.trunc(x, I32), emit.I32V)


@_operation(integers, integers, integers, integers)
def dot4(b, sums, weights, x):
    """Adds to each lane the sum of four products of bytes; where no instruction does, of two products of int16."""
    if instructions:
        return instructions.dot4(b, sums, weights, x)
    pairs = ir.VectorType(ir.IntType(16), 2 * LANES)
    weights, x = b.bitcast(weights, pairs), b.bitcast(x, pairs)
    products = []
    for first in (0, 1):
        chosen = emit.constants(range(first, 2 * LANES, 2), I32)
        undefined = ir.Constant(pairs, ir.Undefined)
        wide = [b.sext(b.shuffle_vector(each, undefined, chosen), emit.I32V) for each in (weights, x)]
        products.append(b.mul(*wide))
    return b.add(sums, b.add(*products))


@_operation(integers)
def zero_integers(b):
    return emit.constants([0] * LANES, I32)


def _halves(b, x, join):
    """Joins the upper half with the lower one until one element is left."""
    while x.type.count > 1:
        half = x.type.count // 2
        undefined = ir.Constant(x.type, ir.Undefined)
        low = b.shuffle_vector(x, undefined, emit.constants(range(half), I32))
        high = b.shuffle_vector(x, undefined, emit.constants(range(half, 2 * half), I32))
        x = join(low, high)
    return b.extract_element(x, emit.const(0, I32))


@_operation(types.float32, floats)
def first_lane(b, x):
    return b.extract_element(x, emit.const(0, I32))


@_operation(types.float32, floats)
def sum_lanes(b, x):
    return _halves(b, x, b.fadd)


@_operation(types.float32, floats)
def max_lanes(b, x):
    return _halves(b, x, lambda low, high: b.select(b.fcmp_ordered(">", low, high), low, high))


@_operation(types.int64, integers)
def sum_lanes_integers(b, x):
    return b.sext(_halves(b, x, b.add), ir.IntType(64))


@_operation(floats, floats, integers)
def scale_by_power(b, x, exponent):
    """x * 2^exponent for exponents in [-126, 127]."""
    bits = b.shl(b.add(exponent, emit.constants([127] * LANES, I32)), emit.constants([23] * LANES, I32))
    return b.fmul(x, b.bitcast(bits, emit.F32V))


@helper
def exp(x):
    """e^x within 2 units in the last place, for x held between -87.3 and 88; NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts; e^r by a polynomial (Cephes' expf coefficients).
    """
    # In this order: where x is NaN, a comparison fails, and gives what comes second.
    x = minimum(splat(types.float32(88.0)), maximum(splat(types.float32(-87.33654)), x))
    n = nearest(mul(x, splat(types.float32(1.44269504))))
    k = to_float(n)
    r = fma(k, splat(types.float32(-0.693359375)), x)
    r = fma(k, splat(types.float32(2.12194440e-4)), r)
    p = splat(types.float32(1.9875691500e-4))
    p = fma(p, r, splat(types.float32(1.3981999507e-3)))
    p = fma(p, r, splat(types.float32(8.3334519073e-3)))
    p = fma(p, r, splat(types.float32(4.1665795894e-2)))
    p = fma(p, r, splat(types.float32(1.6666665459e-1)))
    p = fma(p, r, splat(types.float32(5.0000001201e-1)))
    p = fma(mul(p, r), r, add(r, splat(types.float32(1.0))))
    return scale_by_power(p, n)


@helper
def tanh(x):
    """1 - 2 / (e^2x + 1), within 1e-7: what is near zero keeps fewer digits."""
    one, two = splat(types.float32(1.0)), splat(types.float32(2.0))
    return sub(one, div(two, add(exp(mul(two, x)), one)))
