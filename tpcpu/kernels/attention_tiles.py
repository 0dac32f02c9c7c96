"""The two products of attention, of one piece of the cache with a few query rows, on vector registers.

Their loops are unrolled over rows and registers while they are emitted: keys and values are read once for all rows of
the call. A tile is 16 positions of one key/value head: keys dimension by dimension, values position by position, both
16 * dim elements; of int8, 16 float32 scales follow. Tiles are named by a table of addresses, and what comes later in
the table is asked for in advance where a piece is read once only.

Each sum is a chain of its own, over dimensions or over positions in order: who shares a call changes no bits.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpcpu.kernels.kv_cache import SIZES, TILE
from tpcpu.kernels.memory import F32, I8, I64
from tpcpu.kernels.record import BF16, FLOAT32, INT8
from tpcpu.kernels.simd import emit as e

LANES = e.LANES
PIECE = 256
"""Positions whose scores lie behind each other, row by row."""

AHEAD = 8
"""Tiles between what is read and what is asked for. Tables go on for so many entries, and 4 more."""

_WIDE = LANES == 16
"""Whether there are 32 registers of 16 lanes; otherwise 16 of 8."""

MOST_ROWS = 8 if _WIDE else 4
"""The most rows of one call; others take 1, 2 or 4."""


def tiles_at_once(rows: int) -> int:
    """Tiles of keys side by side: as many sums as registers hold, and as hide the time of a multiply-add."""
    return min(4, 16 // rows) if _WIDE else 4 // rows


def vectors_at_once(rows: int) -> int:
    """Registers of a position's values side by side."""
    return min(4, 16 // rows) if _WIDE else 8 // rows


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


def _load(b, address, form):
    """A register of elements of the cache as float32; int8 in whole numbers."""
    if form == INT8:
        return e.to_float(b, b.sext(e.load(b, address, ir.VectorType(I8, LANES)), e.I32V))
    return e.load_floats(b, address, {BF16: 16, FLOAT32: 32}[form])


def _lines_ahead(b, form, next_at, pair, i):
    """Of which tiles to ask for a cache line at dimension 2 * pair + i: it holds one dimension, two, or four."""
    if form == FLOAT32 or len(next_at) == 1 or (form == BF16 and i == 0):
        return next_at if form == FLOAT32 or i == 0 else []
    if form == BF16 or i == 1:
        return []
    # Of int8, half of the tiles at every other pair; the others in between.
    odd = b.trunc(pair, ir.IntType(1))
    half = len(next_at) // 2
    return [b.select(odd, next_at[half + t], next_at[t]) for t in range(half)]


def _emit_scores(b, rows, form, packed, table, tiles, queries, query_bytes, dim, scale, out):
    size, at_once = SIZES[form], tiles_at_once(rows)
    per_tile = TILE // LANES
    # One row is read behind another, or dimension by dimension, the rows of the call together.
    row_at = [e.offset(b, queries, 4 * g) if packed else b.add(queries, b.mul(query_bytes, e.const(g)))
              for g in range(rows)]  # fmt: skip
    step = 4 * rows if packed else 4
    scale = e.splat(b, scale, e.F32V)
    blocks = b.udiv(b.add(tiles, e.const(at_once - 1)), e.const(at_once))
    with cgutils.for_range(b, blocks) as loop:
        first = b.mul(loop.index, e.const(at_once))
        keys_at = [_entry(b, table, first, t) for t in range(at_once)]
        next_at = [] if packed else [_entry(b, table, first, AHEAD + t) for t in range(at_once)]
        sums = [_registers(b, at_once * per_tile) for _ in range(rows)]
        # Rotation makes the number of dimensions even.
        with cgutils.for_range(b, b.udiv(dim, e.const(2))) as pair:
            for i in (0, 1):
                row = e.offset(b, b.mul(pair.index, e.const(2 * TILE * size)), i * TILE * size)
                for address in _lines_ahead(b, form, next_at, pair.index, i):
                    # Into the second-level cache: the first keeps too few requests in flight for a core's share of the
                    # memory.
                    e.prefetch(b, b.add(address, row), 2)
                keys = [
                    _load(b, e.offset(b, b.add(address, row), LANES * size * part), form)
                    for address in keys_at
                    for part in range(per_tile)
                ]
                for g in range(rows):
                    x = _splat_at(b, e.offset(b, e.offset(b, row_at[g], pair.index, 2 * step), step * i))
                    for register, key in zip(sums[g], keys, strict=True):
                        b.store(e.fma(b, x, key, b.load(register)), register)
        at = e.offset(b, out, first, 4 * TILE)
        for i in range(at_once * per_tile):
            if form == INT8:
                worth_at = e.offset(b, e.offset(b, keys_at[i // per_tile], dim, TILE), 4 * LANES * (i % per_tile))
                worth = e.load(b, worth_at, e.F32V)
            for g in range(rows):
                score = b.load(sums[g][i])
                if form == INT8:
                    score = b.fmul(score, worth)
                e.store(b, b.fmul(score, scale), e.offset(b, at, 4 * (g * PIECE + LANES * i)))


def positions_at_once(rows: int) -> int:
    """Positions side by side whose keys lie dimension behind dimension: as `tiles_at_once`."""
    return max(1, 16 // rows if _WIDE else 8 // rows)


def _emit_scores_by_position(b, rows, form, table, tiles, queries, query_bytes, dim, scale, out):
    size, at_once = SIZES[form], min(TILE, positions_at_once(rows))
    row_bytes = b.mul(dim, e.const(size))
    row_at = [b.add(queries, b.mul(query_bytes, e.const(g))) for g in range(rows)]
    scale = e.splat(b, scale, e.F32V)
    # Sums of each lane, of all rows and positions of a tile, before the lanes are added.
    lanes = cgutils.alloca_once(b, ir.ArrayType(e.F32V, rows * TILE))
    lanes_at = b.ptrtoint(lanes, I64)
    vector = 4 * LANES
    with cgutils.for_range(b, tiles) as loop:
        tile = _entry(b, table, loop.index)
        with cgutils.for_range(b, e.const(TILE // at_once)) as some:
            first = b.mul(some.index, e.const(at_once))
            sums = [_registers(b, at_once) for _ in range(rows)]
            keys_at = [b.add(tile, b.mul(e.offset(b, first, p), row_bytes)) for p in range(at_once)]
            with cgutils.for_range(b, b.udiv(dim, e.const(LANES))) as step:
                at, at_key = (b.mul(step.index, e.const(each * LANES)) for each in (4, size))
                keys = [_load(b, b.add(address, at_key), form) for address in keys_at]
                for g in range(rows):
                    x = e.load(b, b.add(row_at[g], at), e.F32V)
                    for register, key in zip(sums[g], keys, strict=True):
                        b.store(e.fma(b, x, key, b.load(register)), register)
            here = e.offset(b, lanes_at, first, vector)
            for g in range(rows):
                for p in range(at_once):
                    e.store(b, b.load(sums[g][p]), e.offset(b, here, (g * TILE + p) * vector))
        at = e.offset(b, out, loop.index, 4 * TILE)
        for part in range(TILE // LANES):
            if form == INT8:
                worth = e.load(b, e.offset(b, e.offset(b, tile, dim, TILE), 4 * LANES * part), e.F32V)
            for g in range(rows):
                place = e.offset(b, lanes_at, (g * TILE + part * LANES) * vector)
                score = e.sum_each(b, [e.load(b, e.offset(b, place, p * vector), e.F32V) for p in range(LANES)])
                if form == INT8:
                    score = b.fmul(score, worth)
                e.store(b, b.fmul(score, scale), e.offset(b, at, 4 * (g * PIECE + LANES * part)))


def _emit_values(b, rows, vectors, form, packed, table, count, weights, dim, column, sums_at, sums_bytes):
    size = SIZES[form]
    row_bytes, skipped = b.mul(dim, e.const(size)), b.mul(column, e.const(size))
    sums = [_registers(b, vectors) for _ in range(rows)]
    tiles = b.udiv(b.add(count, e.const(TILE - 1)), e.const(TILE))
    with cgutils.for_range(b, tiles) as loop:
        first = b.mul(loop.index, e.const(TILE))
        here = b.add(_entry(b, table, loop.index), skipped)
        ahead = None if packed else b.add(_entry(b, table, loop.index, AHEAD), skipped)
        left = b.sub(count, first)
        left = b.select(b.icmp_signed("<", left, e.const(TILE)), left, e.const(TILE))
        at = e.offset(b, weights, first, 4)
        with cgutils.for_range(b, left) as position:
            row = b.mul(position.index, row_bytes)
            if ahead is not None:
                for line in range(0, vectors * LANES * size, 64):
                    e.prefetch(b, e.offset(b, b.add(ahead, row), line), 2)
            values = [_load(b, e.offset(b, b.add(here, row), LANES * size * i), form) for i in range(vectors)]
            for g in range(rows):
                weight = _splat_at(b, e.offset(b, e.offset(b, at, position.index, 4), 4 * PIECE * g))
                for register, value in zip(sums[g], values, strict=True):
                    b.store(e.fma(b, weight, value, b.load(register)), register)
    for g in range(rows):
        out = e.offset(b, b.add(sums_at, b.mul(sums_bytes, e.const(g))), column, 4)
        for i, register in enumerate(sums[g]):
            e.store(b, b.load(register), e.offset(b, out, 4 * LANES * i))


@intrinsic(prefer_literal=True)
def scores(typing_context, rows, form, packed, table, tiles, queries, query_bytes, dim, scale, out):
    """out[g, position] = scale * (query g . key), for all positions of `tiles` tiles of keys; `dim` is even.

    `rows`, `form` and `packed` are constants. Queries lie row by row, `query_bytes` apart; packed, all rows of a
    dimension together. `out` has rows of `PIECE`; it is written up to a multiple of `tiles_at_once`.
    """
    shape = [argument.literal_value for argument in (rows, form, packed)]

    def codegen(context, builder, signature, args):
        _emit_scores(builder, *shape, *args[3:])
        return context.get_dummy_value()

    integers = [types.int64] * 5
    return types.void(rows, form, packed, *integers, types.float32, types.int64), codegen


@intrinsic(prefer_literal=True)
def scores_by_position(typing_context, rows, form, table, tiles, queries, query_bytes, dim, scale, out):
    """As `scores`, where tiles of keys lie position by position, and queries row by row.

    `rows` and `form` are constants; `dim` is a multiple of a register. Lanes are added in the tree of `emit.sum_each`.
    """
    shape = [argument.literal_value for argument in (rows, form)]

    def codegen(context, builder, signature, args):
        _emit_scores_by_position(builder, *shape, *args[2:])
        return context.get_dummy_value()

    return types.void(rows, form, *[types.int64] * 5, types.float32, types.int64), codegen


@intrinsic(prefer_literal=True)
def values(typing_context, rows, vectors, form, packed, table, count, weights, dim, column, sums, sums_bytes):
    """sums[g, column:] = the sum over `count` positions of weight g * value, for `vectors` registers of columns.

    `rows`, `vectors`, `form` and `packed` (nothing is asked for in advance) are constants. The last register may reach
    past the columns that there are: what is read there is memory of the cache, and what comes of it is no number that
    anybody looks at.
    """
    shape = [argument.literal_value for argument in (rows, vectors, form, packed)]

    def codegen(context, builder, signature, args):
        _emit_values(builder, *shape, *args[4:])
        return context.get_dummy_value()

    return types.void(rows, vectors, form, packed, *[types.int64] * 7), codegen
