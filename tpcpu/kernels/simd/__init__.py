"""Vector registers for kernels: `vectors` for whole kernels, and the instructions that differ between CPUs.

`instructions` is one file per instruction set behind the same names, chosen once per process:

    lookup(b, table, index)         bytes of a 16-entry table by the low four bits of each index
    lookup_f32(b, table, index)     floats of a 16-entry table (the value that `table_f32` loaded)
    table_f32(b, address)           16 floats in registers
    gather_f32(b, address, index)   floats at address + 4 * index
    dot4(b, sums, weights, x)       adds to each int32 lane the sum of four products of bytes; x is signed
    WEIGHT_BIAS                     what is added to a signed weight before `dot4` sees it: 128 or 0

The generic set has none of these: its kernels are plain loops that LLVM vectorises.
"""

from tpcpu.kernels import isa

if isa.selected().name == "avx512_vnni":
    from tpcpu.kernels.simd import avx512_vnni as instructions
elif isa.selected().name == "avx512":
    from tpcpu.kernels.simd import avx512 as instructions
elif isa.selected().name == "avx2":
    from tpcpu.kernels.simd import avx2 as instructions
else:
    instructions = None

__all__ = ["instructions"]
