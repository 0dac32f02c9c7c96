"""Loops that stay in registers: how many operations a second the multiplying instructions reach by themselves.

A tile of sums as a GEMM's inner loop has it, and nothing that loads or stores: the ceiling for prefill.
"""

from numba import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import kernel
from tpcpu.kernels.memory import load_i64, store_f32, store_i64
from tpcpu.kernels.simd import instructions
from tpcpu.kernels.simd import vectors as v

DOT4_OPERATIONS = 8 * (8 if instructions else 4) * v.LANES
"""Additions and multiplications of one round of `dot4_rounds`."""

FMA_OPERATIONS = 12 * 2 * v.LANES
"""The same of `fma_rounds`."""


@kernel("peak-dot4")
def dot4_rounds(record, thread, _threads):
    """2 x 4 sums. The weights change from round to round, so that no part of a product can be kept."""
    w0, w1, step = v.splat_integers(0x41424344), v.splat_integers(0x21222324), v.splat_integers(0x01010101)
    x0, x1 = v.splat_integers(0x01FF02FE), v.splat_integers(0x03FD04FC)
    x2, x3 = v.splat_integers(0x05FB06FA), v.splat_integers(0x07F908F8)
    s00, s01, s02, s03 = v.splat_integers(0), v.splat_integers(1), v.splat_integers(2), v.splat_integers(3)
    s10, s11, s12, s13 = v.splat_integers(4), v.splat_integers(5), v.splat_integers(6), v.splat_integers(7)
    for _ in range(load_i64(record + 8 * R.O_ROUNDS)):
        s00, s01, s02, s03 = v.dot4(s00, w0, x0), v.dot4(s01, w0, x1), v.dot4(s02, w0, x2), v.dot4(s03, w0, x3)
        s10, s11, s12, s13 = v.dot4(s10, w1, x0), v.dot4(s11, w1, x1), v.dot4(s12, w1, x2), v.dot4(s13, w1, x3)
        w0, w1 = v.add_integers(w0, step), v.add_integers(w1, step)
    s00, s02 = v.add_integers(s00, s01), v.add_integers(s02, s03)
    s10, s12 = v.add_integers(s10, s11), v.add_integers(s12, s13)
    total = v.add_integers(v.add_integers(s00, s02), v.add_integers(s10, s12))
    store_i64(load_i64(record + 8 * R.O_SINK) + 64 * thread, v.sum_lanes_integers(total))


@kernel("peak-fma")
def fma_rounds(record, thread, _threads):
    """12 sums: latency times the instructions that may begin in a cycle, with something to spare."""
    x, y = v.splat(float32(0.75)), v.splat(float32(0.125))
    a, b, c, d = v.splat(float32(1.0)), v.splat(float32(2.0)), v.splat(float32(3.0)), v.splat(float32(4.0))
    e, f, g, h = v.splat(float32(5.0)), v.splat(float32(6.0)), v.splat(float32(7.0)), v.splat(float32(8.0))
    i, j, k, m = v.splat(float32(9.0)), v.splat(float32(10.0)), v.splat(float32(11.0)), v.splat(float32(12.0))
    for _ in range(load_i64(record + 8 * R.O_ROUNDS)):
        a, b, c, d = v.fma(a, x, y), v.fma(b, x, y), v.fma(c, x, y), v.fma(d, x, y)
        e, f, g, h = v.fma(e, x, y), v.fma(f, x, y), v.fma(g, x, y), v.fma(h, x, y)
        i, j, k, m = v.fma(i, x, y), v.fma(j, x, y), v.fma(k, x, y), v.fma(m, x, y)
    total = v.add(v.add(v.add(a, b), v.add(c, d)), v.add(v.add(e, f), v.add(g, h)))
    total = v.add(total, v.add(v.add(i, j), v.add(k, m)))
    store_f32(load_i64(record + 8 * R.O_SINK) + 64 * thread, v.sum_lanes(total))
