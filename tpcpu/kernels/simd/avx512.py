"""AVX-512 without VNNI (Skylake servers): signed weights, the signs of x moved onto them."""

from llvmlite import ir

from tpcpu.kernels.memory import F32, I8, I16, I32, pointer
from tpcpu.kernels.simd.emit import const, constants, intrinsic_call, load

WEIGHT_BIAS = 0


def lookup(b, table, index):
    return intrinsic_call(b, "llvm.x86.avx512.pshuf.b.512", table.type, [table, index])


def table_f32(b, address):
    return load(b, address, ir.VectorType(F32, 16))


def lookup_f32(b, table, index):
    # vpermps looks at the low four bits only.
    return intrinsic_call(b, "llvm.x86.avx512.permvar.sf.512", table.type, [table, index])


def gather_f32(b, address, index):
    floats, ones = ir.VectorType(F32, 16), constants([1] * 16, ir.IntType(1))
    args = [ir.Constant(floats, [0.0] * 16), pointer(b, address, I8), index, ones, const(4, I32)]
    return intrinsic_call(b, "llvm.x86.avx512.mask.gather.dps.512", floats, args)


def dot4(b, sums, weights, x):
    # |x| * (weight with the sign of x). Both stay within 127, so a pair of products stays within 16 bits.
    weights, x = (b.bitcast(v, ir.VectorType(I8, 64)) for v in (weights, x))
    zero = ir.Constant(x.type, [0] * 64)
    negative = b.icmp_signed("<", x, zero)
    signed = b.select(negative, b.sub(zero, weights), weights)
    size = b.select(negative, b.sub(zero, x), x)
    pairs = intrinsic_call(b, "llvm.x86.avx512.pmaddubs.w.512", ir.VectorType(I16, 32), [size, signed])
    ones = constants([1] * 32, I16)
    return b.add(sums, intrinsic_call(b, "llvm.x86.avx512.pmaddw.d.512", sums.type, [pairs, ones]))
