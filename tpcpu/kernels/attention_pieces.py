"""Softmax over the pieces of a sequence: a piece's sums, and how they join those of the pieces before.

Within a piece of 256 positions scores, their maximum and sums; then pieces are joined in order. That order does not
depend on who computes what, so neither do the bits. Knows a thread's scratch; not who computes what.

A row is one query head of one token. The query heads of one key/value head are a group, known by slots: query heads in
the order of their groups. What a row sees of a piece, from `start` to `count`, is cut out of its scores and weights;
others of the same call may see more.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.attention_tiles import (
    AHEAD,
    LANES,
    MOST_ROWS,
    PIECE,
    scores,
    scores_by_position,
    values,
    vectors_at_once,
)
from tpcpu.kernels.compile import helper, named
from tpcpu.kernels.kv_cache import NAMES, TILE, position, word
from tpcpu.kernels.memory import float_bits, load_f32, load_i32, load_i64, store_f32
from tpcpu.kernels.record import INT8
from tpcpu.kernels.simd import vectors as v

MASKED = float32(-3.0e38)
TILES = PIECE // TILE
ENTRIES_AHEAD = AHEAD + 4
_TABLE_BYTES = (8 * (2 * TILES + ENTRIES_AHEAD) + 63) // 64 * 64
_SCORES_BYTES = 4 * MOST_ROWS * PIECE

BLOCK_ROWS = 64
"""Rows that go through the pieces together: so many tokens of a sequence that the rows of a group are no more."""


def row_floats(dim: int) -> int:
    """A query, or the weighted values of a head, in whole registers."""
    return (dim + TILE - 1) // TILE * TILE


def part_bytes(dim: int) -> int:
    """A row of sums: the weighted values, then the maximum and the sum of weights."""
    return 4 * ((dim + TILE - 1) // TILE * TILE + TILE)


def scratch_bytes(dim: int, value_dim: int, heads: int) -> int:
    """What a thread needs: a table of tiles, scores, queries, and sums, of the pieces so far and of the newest."""
    rows = max(heads, BLOCK_ROWS)
    nbytes = _TABLE_BYTES + _SCORES_BYTES + 4 * rows * row_floats(dim) + 2 * rows * part_bytes(value_dim)
    return (nbytes + 63) // 64 * 64


row_floats_of, part_bytes_of = helper(row_floats), helper(part_bytes)


@helper
def table_of(record, thread):
    """A thread's scratch: tiles of keys, then of values, then what is to be asked for."""
    return word(record, R.A_SCRATCH) + word(record, R.A_SCRATCH_STRIDE) * thread


@helper
def weights_of(table):
    return table + _TABLE_BYTES


@helper
def queries_of(table):
    return table + _TABLE_BYTES + _SCORES_BYTES


@helper
def wholes_of(record, table):
    """Sums of all pieces so far, row by row; those of the newest piece follow."""
    rows = max(word(record, R.A_Q_HEADS), BLOCK_ROWS)
    return queries_of(table) + 4 * row_floats_of(word(record, R.A_DIM)) * rows


@helper
def parts_of(record, table):
    rows = max(word(record, R.A_Q_HEADS), BLOCK_ROWS)
    return wholes_of(record, table) + part_bytes_of(word(record, R.A_VALUE_DIM)) * rows


@helper
def first_slot(record, kv_head):
    return load_i32(word(record, R.A_GROUPS) + 4 * kv_head)


@helper
def head_of(record, slot):
    return load_i32(word(record, R.A_GROUPS) + 4 * (word(record, R.A_KV_HEADS) + 1 + slot))


@helper
def first_seen(record, at):
    """The first position that a token at position `at` sees."""
    window = word(record, R.A_WINDOW)
    return max(0, at + 1 - window) if window else 0


@helper
def part_of(record, token, slot, piece):
    """Where a piece's sums lie that are joined later, perhaps by another thread."""
    row = (token * word(record, R.A_Q_HEADS) + slot) * word(record, R.A_PART_TOKENS) + piece
    return word(record, R.A_PARTS) + part_bytes_of(word(record, R.A_VALUE_DIM)) * row


@helper
def query_row(record, token, slot):
    """The rotated query of a token, where `rope_and_store` left it."""
    at = word(record, R.A_ROTATED) + token * word(record, R.A_ROTATED_STRIDE)
    return at + 4 * head_of(record, slot) * word(record, R.A_DIM)


@helper
def adjust(record, scores, slot, own, count):
    """Caps the scores of a row, and takes from each what its distance costs; `own`: the row's position in the piece."""
    cap, slopes = float_bits(word(record, R.A_CAP)), word(record, R.A_SLOPES)
    if cap:
        height, inverse = v.splat(cap), v.splat(float32(1.0) / cap)
        for i in range(0, count, LANES):
            v.store(scores + 4 * i, v.mul(height, v.tanh(v.mul(v.load(scores + 4 * i), inverse))))
    if slopes:
        slope = v.splat(load_f32(slopes + 4 * (PIECE + head_of(record, slot))))
        for i in range(0, count, LANES):
            back = v.sub(v.splat(float32(own)), v.load(slopes + 4 * i))
            v.store(scores + 4 * i, v.sub(v.load(scores + 4 * i), v.mul(slope, back)))


@helper
def _weight(scores, i, start, count, peak):
    """exp(score - peak) of the lanes from position i on, 0 before `start` and from `count` on."""
    weights = v.exp(v.sub(v.load(scores + 4 * i), v.splat(peak)))
    weights = v.after_lanes(v.first_lanes(weights, count - i, float32(0.0)), start - i, float32(0.0))
    v.store(scores + 4 * i, weights)
    return weights


@helper
def weigh(scores, start, count, stop, part, dim):
    """Scores become weights, exp(score - maximum), 0 outside `start` to `count`; there is at least one inside.

    The maximum and the sum of weights go to a row of sums. Weights are written up to `stop`.
    """
    first, last = start // LANES * LANES, (count - 1) // LANES * LANES
    v.store(scores + 4 * first, v.after_lanes(v.load(scores + 4 * first), start - first, MASKED))
    v.store(scores + 4 * last, v.first_lanes(v.load(scores + 4 * last), count - last, MASKED))
    largest = v.splat(MASKED)
    for i in range(first, count, LANES):
        largest = v.maximum(largest, v.load(scores + 4 * i))
    peak = v.max_lanes(largest)
    total = _weight(scores, first, start, count, peak)
    for i in range(first + LANES, last, LANES):
        weights = v.exp(v.sub(v.load(scores + 4 * i), v.splat(peak)))
        v.store(scores + 4 * i, weights)
        total = v.add(total, weights)
    if first < last:
        total = v.add(total, _weight(scores, last, start, count, peak))
    store_f32(part + 4 * row_floats_of(dim), peak)
    store_f32(part + 4 * row_floats_of(dim) + 4, v.sum_lanes(total))
    clear(scores, 0, first)
    clear(scores, last + LANES, stop)


@helper
def clear(weights, first, stop):
    """Nothing is seen from `first`, a multiple of a register, up to `stop`."""
    for i in range(first, stop, LANES):
        v.store(weights + 4 * i, v.splat(float32(0.0)))


@helper
def _fold(weights, count, table, dim):
    """Weights of int8 values are what their steps are worth, too; behind `count` there is no such thing."""
    for i in range(0, count, LANES):
        worth = v.load(load_i64(table + 8 * (i // TILE)) + TILE * dim + 4 * (i % TILE))
        scaled = v.first_lanes(v.mul(v.load(weights + 4 * i), worth), count - i, float32(0.0))
        v.store(weights + 4 * i, scaled)


@cache
def score_rows(rows: int, form: int, packed: bool, shared: bool):
    """Makes the helper for the scores of so many rows over the piece whose tiles a table names.

    `shared`: values are the first dimensions of keys, whose tiles are position by position; queries lie row by row.
    """

    def score(record, table, tiles, queries):
        dim = word(record, R.A_DIM)
        scale = float_bits(word(record, R.A_SCALE))
        if shared:
            scores_by_position(rows, form, table, tiles, queries, 4 * dim, dim, scale, weights_of(table))
        else:
            scores(rows, form, packed, table, tiles, queries, 4 * row_floats_of(dim), dim, scale, weights_of(table))

    name = f"score-{rows}-rows-{NAMES[form]}{'-packed' if packed else ''}{'-shared' if shared else ''}"
    return helper(named(score, name))


@cache
def add_rows(rows: int, form: int, packed: bool):
    """Makes the helper for the weighted values of so many rows, up to position `count` of the piece."""
    at_once = vectors_at_once(rows)

    def add(record, table, tiles, count, parts, part_step):
        dim, last, weights = word(record, R.A_DIM), word(record, R.A_VALUE_DIM), weights_of(table)
        store = table + 8 * tiles
        if form == INT8:
            for g in range(rows):
                _fold(weights + 4 * PIECE * g, count, store, dim)
        column = 0
        while column + at_once * LANES <= last:
            values(rows, at_once, form, packed, store, count, weights, dim, column, parts, part_step)
            column += at_once * LANES
        while column < last:
            values(rows, 1, form, packed, store, count, weights, dim, column, parts, part_step)
            column += LANES

    return helper(named(add, f"add-{rows}-rows-{NAMES[form]}{'-packed' if packed else ''}"))


@helper
def copy_part(out, part, dim):
    """The first piece's sums are those of all pieces so far."""
    for i in range(0, row_floats_of(dim) + TILE, LANES):
        v.store(out + 4 * i, v.load(part + 4 * i))


@helper
def join(whole, part, dim):
    """Adds a piece's sums to those of the pieces before it."""
    at = 4 * row_floats_of(dim)
    peak, other = load_f32(whole + at), load_f32(part + at)
    largest = max(peak, other)
    keep = v.exp(v.splat(peak - largest))
    take = v.exp(v.splat(other - largest))
    for i in range(0, dim, LANES):
        kept = v.mul(v.load(whole + 4 * i), keep)
        v.store(whole + 4 * i, v.fma(v.load(part + 4 * i), take, kept))
    total = load_f32(whole + at + 4) * v.first_lane(keep) + load_f32(part + at + 4) * v.first_lane(take)
    store_f32(whole + at, largest)
    store_f32(whole + at + 4, total)


@helper
def _with_sink(whole, sink, total, dim):
    """The sum of weights with that of a score that has no value; the other weights become what they are beside it."""
    peak = load_f32(whole + 4 * row_floats_of(dim))
    largest = max(peak, sink)
    keep = v.exp(v.splat(peak - largest))
    for i in range(0, dim, LANES):
        v.store(whole + 4 * i, v.mul(v.load(whole + 4 * i), keep))
    return v.fma(total, keep, v.exp(v.splat(sink - largest)))


@helper
def finish(record, token, slot, whole):
    """out = the weighted values over the sum of weights, to which a sink adds its own."""
    dim = word(record, R.A_VALUE_DIM)
    out = word(record, R.A_OUT) + token * word(record, R.A_OUT_STRIDE) + 4 * head_of(record, slot) * dim
    total = v.splat(load_f32(whole + 4 * row_floats_of(dim) + 4))
    sinks = word(record, R.A_SINKS)
    if sinks:
        total = _with_sink(whole, load_f32(sinks + 4 * head_of(record, slot)), total, dim)
    whole_columns = dim // LANES * LANES
    for i in range(0, whole_columns, LANES):
        v.store(out + 4 * i, v.div(v.load(whole + 4 * i), total))
    if whole_columns < dim:
        last = v.div(v.load(whole + 4 * whole_columns), total)
        v.store_first(out + 4 * whole_columns, last, dim - whole_columns)


@helper
def pieces_of(record, token):
    """Pieces up to a token's position."""
    return position(word(record, R.STEP), token) // PIECE + 1
