"""Loops that only read memory: the ceiling for whatever multiplies weights from it.

Several ways to read, because no one way is the fastest on every machine: one, two or four streams a thread, plain or
with software prefetch to the first or the second cache. What is read is added up, so that nothing is left out.
"""

from functools import cache

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel
from tpcpu.kernels.memory import I8, I32, load_i64, pointer, store_i64
from tpcpu.kernels.simd import emit
from tpcpu.kernels.simd import vectors as v

UNIT = 256
"""Bytes that a stream takes at a time; what is behind the last whole unit is not read."""

PLAIN, FIRST, SECOND = -1, 3, 2
"""How to prefetch: not, or as LLVM numbers it to the first or the second cache."""

_STEP = 4 * v.LANES


def _make_prefetch(locality):
    @intrinsic
    def prefetch(typing_context, address):
        def emit_prefetch(context, builder, signature, args):
            arguments = [pointer(builder, args[0], I8), *(ir.Constant(I32, each) for each in (0, locality, 1))]
            emit.intrinsic_call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
            return context.get_dummy_value()

        return types.void(types.int64), emit_prefetch

    return prefetch


_prefetches = {locality: _make_prefetch(locality) for locality in (FIRST, SECOND)}


@intrinsic
def _add_unit(typing_context, total, address):
    """total + all int32 of the unit at `address`, lane by lane."""

    def emit_unit(context, builder, signature, args):
        parts = [emit.load(builder, emit.offset(builder, args[1], at), emit.I32V) for at in range(0, UNIT, _STEP)]
        while len(parts) > 1:
            parts = [builder.add(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
        return builder.add(args[0], parts[0])

    return v.integers(v.integers, types.int64), emit_unit


@cache
def read(streams: int, hint: int) -> Kernel:
    """The kernel that reads with 1, 2 or 4 streams a thread, and prefetches or not."""
    prefetch = _prefetches.get(hint, _prefetches[FIRST])
    fetches = int(hint != PLAIN)

    def read(record, thread, threads):
        source, distance = load_i64(record + 8 * R.M_SOURCE), load_i64(record + 8 * R.M_DISTANCE)
        units = load_i64(record + 8 * R.M_BYTES) // UNIT
        begin, end = units * thread // threads, units * (thread + 1) // threads
        length = (end - begin) // streams
        first = source + begin * UNIT
        second, third, fourth = first + length * UNIT, first + 2 * length * UNIT, first + 3 * length * UNIT
        a, b, c, d = v.zero_integers(), v.zero_integers(), v.zero_integers(), v.zero_integers()
        for _ in range(load_i64(record + 8 * R.M_PASSES)):
            for i in range(0, length * UNIT, UNIT):
                if fetches:
                    for line in range(0, UNIT, 64):
                        prefetch(first + i + distance + line)
                        if streams > 1:
                            prefetch(second + i + distance + line)
                        if streams > 2:
                            prefetch(third + i + distance + line)
                            prefetch(fourth + i + distance + line)
                a = _add_unit(a, first + i)
                if streams > 1:
                    b = _add_unit(b, second + i)
                if streams > 2:
                    c = _add_unit(c, third + i)
                    d = _add_unit(d, fourth + i)
            for i in range(streams * length * UNIT, (end - begin) * UNIT, UNIT):
                a = _add_unit(a, first + i)
        total = v.add_integers(v.add_integers(a, b), v.add_integers(c, d))
        store_i64(load_i64(record + 8 * R.M_SUMS) + 64 * thread, v.sum_lanes_integers(total))

    return Kernel(read, f"read-{streams}-{hint}")
