"""The two products of attention, of one piece of the cache with a few query heads, on vector registers.

Their loops are unrolled over heads and registers while they are emitted: keys and values are read once for all heads of
the call. A tile is 16 positions of one key/value head: keys dimension by dimension, values position by position, both
16 * dim elements. Tiles are named by a table of addresses, and what comes later in the table is asked for in advance.

Each sum is a chain of its own, over dimensions or over positions in order: who shares a call changes no bits.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpcpu.kernels.kv_cache import TILE
from tpcpu.kernels.memory import F32, I8, I32, I64, pointer
from tpcpu.kernels.simd import emit as e

LANES = e.LANES
PIECE = 256
"""Positions whose scores lie behind each other, head by head."""

HEADS = 4
"""The most query heads of one call; others take 1, 2 or 4."""
AHEAD = 8
"""Tiles between what is read and what is asked for. Tables go on for so many entries, and 4 more."""

_WIDE = LANES == 16
"""Whether there are 32 registers of 16 lanes; otherwise 16 of 8."""


def tiles_at_once(heads: int) -> int:
    """Tiles of keys side by side: as many sums as registers hold, and as hide the time of a multiply-add."""
    return 4 if _WIDE else 4 // heads


def vectors_at_once(heads: int) -> int:
    """Registers of a position's values side by side."""
    return 4 if _WIDE else 8 // heads


def _prefetch(b, address):
    """Into the second-level cache: the first keeps too few requests in flight for a core's share of the memory."""
    e.intrinsic_call(
        b, "llvm.prefetch.p0", ir.VoidType(), [pointer(b, address, I8), *(e.const(v, I32) for v in (0, 2, 1))]
    )


def _registers(b, count):
    zero = ir.Constant(e.F32V, [0.0] * LANES)
    made = [cgutils.alloca_once(b, e.F32V) for _ in range(count)]
    for register in made:
        b.store(zero, register)
    return made


def _entry(b, table, index, more=0):
    """Entry `index + more` of a table of addresses."""
    return e.load(b, e.offset(b, e.offset(b, table, index, 8), 8 * more), I64)


def _splat_at(b, address):
    return e.splat(b, e.load(b, address, F32), e.F32V)


def _emit_scores(b, heads, half, table, tiles, queries, query_bytes, dim, scale, out):
    size, at_once = (2 if half else 4), tiles_at_once(heads)
    per_tile = TILE // LANES
    rows = [b.add(queries, b.mul(query_bytes, e.const(g))) for g in range(heads)]
    scale = e.splat(b, scale, e.F32V)
    blocks = b.udiv(b.add(tiles, e.const(at_once - 1)), e.const(at_once))
    with cgutils.for_range(b, blocks) as loop:
        first = b.mul(loop.index, e.const(at_once))
        keys_at = [_entry(b, table, first, t) for t in range(at_once)]
        next_at = [_entry(b, table, first, AHEAD + t) for t in range(at_once)]
        sums = [_registers(b, at_once * per_tile) for _ in range(heads)]
        # Two dimensions of a tile of bfloat16 are one cache line; rotation makes their number even.
        with cgutils.for_range(b, b.udiv(dim, e.const(2))) as pair:
            for i in (0, 1):
                row = e.offset(b, b.mul(pair.index, e.const(2 * TILE * size)), i * TILE * size)
                if i == 0 or not half:
                    for address in next_at:
                        _prefetch(b, b.add(address, row))
                keys = [
                    e.load_floats(b, e.offset(b, b.add(address, row), LANES * size * part), 16 if half else 32)
                    for address in keys_at
                    for part in range(per_tile)
                ]
                for g in range(heads):
                    x = _splat_at(b, e.offset(b, e.offset(b, rows[g], pair.index, 8), 4 * i))
                    for register, key in zip(sums[g], keys, strict=True):
                        b.store(e.fma(b, x, key, b.load(register)), register)
        at = e.offset(b, out, first, 4 * TILE)
        for g in range(heads):
            for i, register in enumerate(sums[g]):
                e.store(b, b.fmul(b.load(register), scale), e.offset(b, at, 4 * (g * PIECE + LANES * i)))


def _emit_values(b, heads, vectors, half, table, count, weights, dim, column, sums_at, sums_bytes):
    size = 2 if half else 4
    row_bytes, skipped = b.mul(dim, e.const(size)), b.mul(column, e.const(size))
    sums = [_registers(b, vectors) for _ in range(heads)]
    tiles = b.udiv(b.add(count, e.const(TILE - 1)), e.const(TILE))
    with cgutils.for_range(b, tiles) as loop:
        first = b.mul(loop.index, e.const(TILE))
        here = b.add(_entry(b, table, loop.index), skipped)
        ahead = b.add(_entry(b, table, loop.index, AHEAD), skipped)
        left = b.sub(count, first)
        left = b.select(b.icmp_signed("<", left, e.const(TILE)), left, e.const(TILE))
        at = e.offset(b, weights, first, 4)
        with cgutils.for_range(b, left) as position:
            row = b.mul(position.index, row_bytes)
            for line in range(0, vectors * LANES * size, 64):
                _prefetch(b, e.offset(b, b.add(ahead, row), line))
            values = [
                e.load_floats(b, e.offset(b, b.add(here, row), LANES * size * i), 16 if half else 32)
                for i in range(vectors)
            ]
            for g in range(heads):
                weight = _splat_at(b, e.offset(b, e.offset(b, at, position.index, 4), 4 * PIECE * g))
                for register, value in zip(sums[g], values, strict=True):
                    b.store(e.fma(b, weight, value, b.load(register)), register)
    for g in range(heads):
        out = e.offset(b, b.add(sums_at, b.mul(sums_bytes, e.const(g))), column, 4)
        for i, register in enumerate(sums[g]):
            e.store(b, b.load(register), e.offset(b, out, 4 * LANES * i))


@intrinsic(prefer_literal=True)
def scores(typing_context, heads, half, table, tiles, queries, query_bytes, dim, scale, out):
    """out[g, position] = scale * (query g . key), for all positions of `tiles` tiles of keys; `dim` is even.

    `heads` and `half` are constants. `out` has rows of `PIECE`; it is written up to a multiple of `tiles_at_once`.
    """
    shape = [argument.literal_value for argument in (heads, half)]

    def codegen(context, builder, signature, args):
        _emit_scores(builder, *shape, *args[2:])
        return context.get_dummy_value()

    integers = [types.int64] * 5
    return types.void(heads, half, *integers, types.float32, types.int64), codegen


@intrinsic(prefer_literal=True)
def values(typing_context, heads, vectors, half, table, count, weights, dim, column, sums, sums_bytes):
    """sums[g, column:] = the sum over `count` positions of weight g * value, for `vectors` registers of columns.

    `heads`, `vectors` and `half` are constants. The last register may reach past the columns that there are: what is
    read there is memory of the cache, and what comes of it is no number that anybody looks at.
    """
    shape = [argument.literal_value for argument in (heads, vectors, half)]

    def codegen(context, builder, signature, args):
        _emit_values(builder, *shape, *args[3:])
        return context.get_dummy_value()

    return types.void(heads, vectors, half, *[types.int64] * 7), codegen
