"""Reading, writing and calling by address: what compiled code needs when everything is a 64-bit integer.

All of it is plain LLVM; loads and stores need no alignment unless they are atomic.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()


def pointer(builder, address, to):
    """The integer `address` as a pointer to the LLVM type `to`."""
    return builder.inttoptr(address, to.as_pointer())


def _loader(result, stored, widen=None):
    @intrinsic
    def load(typing_context, address):
        def emit(context, builder, signature, args):
            value = builder.load(pointer(builder, args[0], stored), align=1)
            return getattr(builder, widen)(value, I64) if widen else value

        return result(types.int64), emit

    return load


def _storer(value_type, stored, narrow=False):
    @intrinsic
    def store(typing_context, address, value):
        def emit(context, builder, signature, args):
            value = builder.trunc(args[1], stored) if narrow else args[1]
            builder.store(value, pointer(builder, args[0], stored), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value_type), emit

    return store


load_i64 = _loader(types.int64, I64)
load_i32 = _loader(types.int64, I32, "sext")
load_u16 = _loader(types.int64, I16, "zext")
load_u8 = _loader(types.int64, I8, "zext")
load_f32 = _loader(types.float32, F32)
store_i64 = _storer(types.int64, I64)
store_i32 = _storer(types.int64, I32, narrow=True)
store_u16 = _storer(types.int64, I16, narrow=True)
store_u8 = _storer(types.int64, I8, narrow=True)
store_f32 = _storer(types.float32, F32)


@intrinsic
def float_bits(typing_context, bits):
    """The float32 whose bits are the low half of an integer."""

    def emit(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), emit


@intrinsic
def bits_of(typing_context, x):
    """The bits of a float32, as a non-negative integer."""

    def emit(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], I32), I64)

    return types.int64(types.float32), emit


@intrinsic
def half_to_float(typing_context, bits):
    """The finite float16 whose bits are the low 16 of an integer, as float32."""

    def emit(context, builder, signature, args):
        return widen_half(builder, builder.trunc(args[0], I32))

    return types.float32(types.int64), emit


def widen_half(b, bits):
    """Emits the conversion of finite float16 bits, in an int32 or a vector of them, to float32.

    Exponent and fraction are moved to their places and the product with 2^112 mends the exponent's bias, subnormals
    included. (LLVM's own conversion calls a library function on CPUs without the instruction.)
    """
    vector = isinstance(bits.type, ir.VectorType)
    floats = ir.VectorType(F32, bits.type.count) if vector else F32

    def constant(of, value):
        return ir.Constant(of, [value] * of.count if vector else value)

    magnitude = b.shl(b.and_(bits, constant(bits.type, 0x7FFF)), constant(bits.type, 13))
    scaled = b.fmul(b.bitcast(magnitude, floats), constant(floats, 2.0**112))
    sign = b.shl(b.and_(bits, constant(bits.type, 0x8000)), constant(bits.type, 16))
    return b.bitcast(b.or_(b.bitcast(scaled, bits.type), sign), floats)


@intrinsic
def square_root(typing_context, x):
    def emit(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(F32, [F32]), "llvm.sqrt.f32")
        return builder.call(function, args)

    return types.float32(types.float32), emit


@intrinsic
def load_acquire(typing_context, address):
    def emit(context, builder, signature, args):
        return builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.int64), emit


@intrinsic
def exchange(typing_context, address, value):
    """Stores `value`, ordered before every later load (a plain release store is not), and gives the old one."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("xchg", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def fetch_add(typing_context, address, value):
    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def compare_exchange(typing_context, address, expected, value):
    """Stores `value` if the word is still `expected`; whether it was."""

    def emit(context, builder, signature, args):
        result = builder.cmpxchg(pointer(builder, args[0], I64), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), emit


@intrinsic
def pause(typing_context):
    """Tells the core that this is a spinning wait."""

    def emit(context, builder, signature, args):
        target = builder.module.triple
        name = "llvm.x86.sse2.pause" if target.startswith("x86_64") else None
        if name:
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def cycles(typing_context):
    """The core's cycle counter, which counts at one rate whatever the core does."""

    def emit(context, builder, signature, args):
        return builder.call(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, []), "llvm.readcyclecounter"), []
        )

    return types.int64(), emit


@intrinsic
def call_kernel(typing_context, function, record, thread, threads):
    """Calls a kernel by its address."""

    def emit(context, builder, signature, args):
        prototype = ir.FunctionType(ir.VoidType(), [I64] * 3)
        builder.call(pointer(builder, args[0], prototype), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic
def call_c(typing_context, function, a, b, c, d, e, f, g):
    """Calls a C function `int f(...)` of up to seven integers or pointers by its address; the result as int64."""

    def emit(context, builder, signature, args):
        prototype = ir.FunctionType(I32, [I64] * 7)
        return builder.sext(builder.call(pointer(builder, args[0], prototype), args[1:]), I64)

    return types.int64(*[types.int64] * 8), emit
