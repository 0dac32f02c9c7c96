"""AVX2 with fused multiply-add (Haswell and newer, AMD from Zen 1): signed weights, the signs of x moved onto them."""

from llvmlite import ir

from tpcpu.kernels.memory import F32, I8, I16, I32, pointer
from tpcpu.kernels.simd.emit import const, constants, intrinsic_call, load, offset

WEIGHT_BIAS = 0


def lookup(b, table, index):
    return intrinsic_call(b, "llvm.x86.avx2.pshuf.b", table.type, [table, index])


def table_f32(b, address):
    eight = ir.VectorType(F32, 8)
    return load(b, address, eight), load(b, offset(b, address, 32), eight)


def lookup_f32(b, table, index):
    # vpermps looks at the low three bits; the fourth, shifted to the sign, chooses the half.
    halves = [intrinsic_call(b, "llvm.x86.avx2.permps", half.type, [half, index]) for half in table]
    upper = b.icmp_signed("<", b.shl(index, constants([28] * 8, I32)), constants([0] * 8, I32))
    return b.select(upper, halves[1], halves[0])


def gather_f32(b, address, index):
    floats, ones = ir.VectorType(F32, 8), b.bitcast(constants([-1] * 8, I32), ir.VectorType(F32, 8))
    args = [ir.Constant(floats, [0.0] * 8), pointer(b, address, I8), index, ones, const(4, I8)]
    return intrinsic_call(b, "llvm.x86.avx2.gather.d.ps.256", floats, args)


def dot4(b, sums, weights, x):
    # |x| * (weight with the sign of x). Both stay within 127, so a pair of products stays within 16 bits.
    weights, x = (b.bitcast(v, ir.VectorType(I8, 32)) for v in (weights, x))
    signed = intrinsic_call(b, "llvm.x86.avx2.psign.b", x.type, [weights, x])
    size = intrinsic_call(b, "llvm.x86.avx2.psign.b", x.type, [x, x])
    pairs = intrinsic_call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), [size, signed])
    ones = constants([1] * 16, I16)
    return b.add(sums, intrinsic_call(b, "llvm.x86.avx2.pmadd.wd", sums.type, [pairs, ones]))
