"""Emitting LLVM's vector operations: the ones that every CPU has, as short functions over a builder.

Used by the files of instruction sets, and by kernels whose tiles are unrolled while they are emitted.
"""

from llvmlite import ir
from numba.core import cgutils

from tpcpu.kernels.isa import selected
from tpcpu.kernels.memory import F32, I8, I16, I32, I64, pointer, widen_half

LANES = selected().lanes
F32V = ir.VectorType(F32, LANES)
I32V = ir.VectorType(I32, LANES)
BYTEV = ir.VectorType(I8, 4 * LANES)


def intrinsic_call(b, name, result, args):
    """Calls an intrinsic of LLVM by name."""
    prototype = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, prototype, name), args)


def const(value, of=I64):
    return ir.Constant(of, value)


def constants(values, of):
    """A vector of constants."""
    return ir.Constant(ir.VectorType(of, len(values)), list(values))


def offset(b, address, count, scale=1):
    """address + count * scale, for a Python or LLVM integer `count`."""
    if isinstance(count, int):
        return b.add(address, const(count * scale)) if count * scale else address
    return b.add(address, b.mul(count, const(scale)) if scale != 1 else count)


def load(b, address, of):
    return b.load(pointer(b, address, of), align=1)


def load_word(b, address, word):
    """The int64 at `word` words after `address`."""
    return load(b, offset(b, address, word, 8), I64)


def store(b, value, address):
    b.store(value, pointer(b, address, value.type), align=1)


def stream(b, value, address):
    """Stores past the caches, to an address aligned to the vector; `fence` before others may read it."""
    instruction = b.store(value, pointer(b, address, value.type), align=BYTEV.count)
    instruction.set_metadata("nontemporal", b.module.add_metadata([const(1, I32)]))


def prefetch(b, address, locality=3):
    """Asks for the line at `address`, any at all: 3 into the first-level cache, 2 into the second."""
    where = pointer(b, address, I8)
    intrinsic_call(b, "llvm.prefetch.p0", ir.VoidType(), [where, *(const(v, I32) for v in (0, locality, 1))])


def splat(b, scalar, of):
    vector = b.insert_element(ir.Constant(of, ir.Undefined), scalar, const(0, I32))
    zeros = ir.Constant(ir.VectorType(I32, of.count), [0] * of.count)
    return b.shuffle_vector(vector, ir.Constant(of, ir.Undefined), zeros)


def fma(b, x, y, z):
    """x * y + z, rounded once; twice where the instruction is not to be had."""
    if not selected().needs:
        return b.fadd(b.fmul(x, y), z)
    return intrinsic_call(b, f"llvm.fma.v{x.type.count}f32", x.type, [x, y, z])


def to_float(b, integers):
    return b.sitofp(integers, ir.VectorType(F32, integers.type.count))


def widen_bytes(b, address):
    """LANES unsigned bytes as int32."""
    return b.zext(load(b, address, ir.VectorType(I8, LANES)), I32V)


def load_floats(b, address, bits):
    """LANES stored values as float32: 32 is float32, 16 bfloat16, 17 float16."""
    if bits == 32:
        return load(b, address, F32V)
    halves = b.zext(load(b, address, ir.VectorType(I16, LANES)), I32V)
    if bits == 17:
        return widen_half(b, halves)
    return b.bitcast(b.shl(halves, ir.Constant(I32V, [16] * LANES)), F32V)


def low_bits(b, vector, bits):
    """Each element's lowest `bits`."""
    return b.and_(vector, ir.Constant(vector.type, [(1 << bits) - 1] * vector.type.count))


def high_nibbles(b, vector):
    """The high four bits of each byte, moved down."""
    words = ir.VectorType(I16, vector.type.count // 2)
    shifted = b.lshr(b.bitcast(vector, words), ir.Constant(words, [4] * words.count))
    return low_bits(b, b.bitcast(shifted, vector.type), 4)


def lanes_before(b, count):
    """A mask of the first `count` (an LLVM int64) of LANES lanes."""
    return b.icmp_signed("<", constants(range(LANES), I32), splat(b, b.trunc(count, I32), I32V))


def sum_each(b, vectors):
    """The sum over the lanes of each of as many vectors as there are lanes, as one vector: neighbours first."""
    while len(vectors) > 1:
        joined = []
        for x, y in zip(vectors[::2], vectors[1::2], strict=True):
            even, odd = (b.shuffle_vector(x, y, constants(range(each, 2 * x.type.count, 2), I32)) for each in (0, 1))
            joined.append(b.fadd(even, odd))
        vectors = joined
    return vectors[0]


def lanes_between(b, first, stop):
    """A mask of the lanes from `first` to `stop` (LLVM int64)."""
    return b.and_(lanes_before(b, stop), b.not_(lanes_before(b, first)))


def store_rows(b, vector, address, rows):
    """Stores the first `rows` (an LLVM int64) lanes."""
    store_lanes(b, vector, address, lanes_before(b, rows))


def store_lanes(b, vector, address, mask):
    """Stores the lanes of a mask."""
    of = vector.type
    prototype = ir.FunctionType(ir.VoidType(), [of, of.as_pointer(), I32, mask.type])
    name = f"llvm.masked.store.v{of.count}f32.p0"
    function = cgutils.get_or_insert_function(b.module, prototype, name)
    b.call(function, [vector, pointer(b, address, of), const(4, I32), mask])


def load_rows(b, address, rows):
    """The first `rows` (an LLVM int64) of LANES float32; zeros in the other lanes, which are not read."""
    return load_lanes(b, address, lanes_before(b, rows))


def load_lanes(b, address, mask):
    """The float32 of a mask's lanes; zeros in the others, which are not read."""
    prototype = ir.FunctionType(F32V, [F32V.as_pointer(), I32, mask.type, F32V])
    function = cgutils.get_or_insert_function(b.module, prototype, f"llvm.masked.load.v{LANES}f32.p0")
    return b.call(function, [pointer(b, address, F32V), const(4, I32), mask, ir.Constant(F32V, [0.0] * LANES)])
