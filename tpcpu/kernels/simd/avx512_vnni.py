"""AVX-512 with VNNI (Cascade Lake and newer): `vpdpbusd` multiplies unsigned weights with signed activations."""

from llvmlite import ir

from tpcpu.kernels.memory import I8
from tpcpu.kernels.simd.avx512 import gather_f32, lookup, lookup_f32, table_f32
from tpcpu.kernels.simd.emit import intrinsic_call

__all__ = ["WEIGHT_BIAS", "dot4", "gather_f32", "lookup", "lookup_f32", "table_f32"]

WEIGHT_BIAS = 128


def dot4(b, sums, weights, x):
    bytes_ = ir.VectorType(I8, 64)
    args = [sums, b.bitcast(weights, bytes_), b.bitcast(x, bytes_)]
    return intrinsic_call(b, "llvm.x86.avx512.vpdpbusd.512", sums.type, args)
