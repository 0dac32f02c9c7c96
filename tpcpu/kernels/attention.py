"""Attention over the key/value cache.

Positions are taken in pieces of 256: within a piece scores, their maximum and sums, then pieces are joined in order.
That order does not depend on who computes what, so neither do the bits.

The query heads of one key/value head are a group and go through its pieces together, so that the cache is read once.
They are known by slots: query heads in the order of their groups.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.attention_tiles import AHEAD, HEADS, PIECE, scores, values, vectors_at_once
from tpcpu.kernels.compile import Kernel, helper, named
from tpcpu.kernels.kv_cache import TILE, list_tiles, position, rotate, store_key, store_value, word
from tpcpu.kernels.memory import float_bits, load_f32, load_i32, load_i64, store_f32, store_i64
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
MASKED = float32(-3.0e38)
_TILES = PIECE // TILE
_ENTRIES_AHEAD = AHEAD + 4
_TABLE_BYTES = (8 * (2 * _TILES + _ENTRIES_AHEAD) + 63) // 64 * 64
_SCORES_BYTES = 4 * HEADS * PIECE


def row_floats(dim: int) -> int:
    """A query, or the weighted values of a head, in whole registers."""
    return (dim + TILE - 1) // TILE * TILE


def part_bytes(dim: int) -> int:
    """A row of sums: the weighted values, then the maximum and the sum of weights."""
    return 4 * ((dim + TILE - 1) // TILE * TILE + TILE)


def scratch_bytes(dim: int, heads: int) -> int:
    """What a thread needs: a table of tiles, scores, queries, and sums of a group's pieces, old and new."""
    nbytes = _TABLE_BYTES + _SCORES_BYTES + 4 * heads * row_floats(dim) + 2 * heads * part_bytes(dim)
    return (nbytes + 63) // 64 * 64


_row_floats, _part_bytes = helper(row_floats), helper(part_bytes)


@helper
def _scratch(record, thread):
    return word(record, R.A_SCRATCH) + word(record, R.A_SCRATCH_STRIDE) * thread


@helper
def _queries(record, thread):
    return _scratch(record, thread) + _TABLE_BYTES + _SCORES_BYTES


@helper
def _first_slot(record, kv_head):
    return load_i32(word(record, R.A_GROUPS) + 4 * kv_head)


@helper
def _head_of(record, slot):
    return load_i32(word(record, R.A_GROUPS) + 4 * (word(record, R.A_KV_HEADS) + 1 + slot))


@helper
def _pieces(step, token):
    return position(step, token) // PIECE + 1


@helper
def _part(record, token, slot, piece):
    """Where a piece's sums lie."""
    row = (token * word(record, R.A_Q_HEADS) + slot) * word(record, R.A_PART_TOKENS) + piece
    return word(record, R.A_PARTS) + _part_bytes(word(record, R.A_DIM)) * row


@helper
def _weigh(scores, count, part, dim):
    """Scores become weights, exp(score - maximum); the maximum and the sum of weights go to a row of sums."""
    last = (count - 1) // LANES * LANES
    v.store(scores + 4 * last, v.first_lanes(v.load(scores + 4 * last), count - last, MASKED))
    largest = v.splat(MASKED)
    for i in range(0, count, LANES):
        largest = v.maximum(largest, v.load(scores + 4 * i))
    peak = v.max_lanes(largest)
    total = v.splat(float32(0.0))
    for i in range(0, count, LANES):
        weights = v.exp(v.sub(v.load(scores + 4 * i), v.splat(peak)))
        weights = v.first_lanes(weights, count - i, float32(0.0))
        v.store(scores + 4 * i, weights)
        total = v.add(total, weights)
    store_f32(part + 4 * _row_floats(dim), peak)
    store_f32(part + 4 * _row_floats(dim) + 4, v.sum_lanes(total))


_CACHES = ("float32", "bf16")


@cache
def _heads(heads, half):
    """Makes the helper for `heads` query heads over the piece whose tiles a table names: keys first, then values."""
    at_once = vectors_at_once(heads)

    def attend(record, table, tiles, count, queries, weights, parts, part_step):
        dim = word(record, R.A_DIM)
        scale = float_bits(word(record, R.A_SCALE))
        scores(heads, half, table, tiles, queries, 4 * _row_floats(dim), dim, scale, weights)
        for g in range(heads):
            _weigh(weights + 4 * PIECE * g, count, parts + part_step * g, dim)
        store = table + 8 * tiles
        column = 0
        while column + at_once * LANES <= dim:
            values(heads, at_once, half, store, count, weights, dim, column, parts, part_step)
            column += at_once * LANES
        while column < dim:
            values(heads, 1, half, store, count, weights, dim, column, parts, part_step)
            column += LANES

    return helper(named(attend, f"attend-{heads}-heads-{_CACHES[half]}"))


@cache
def _piece(half):
    """Makes the helper for one piece of one group, whose queries lie in scratch by slot.

    Sums go to `parts`, slot by slot. `following`: which piece, times the key/value heads, plus which head this thread
    reads next: its keys are asked for.
    """
    four, two, one = _heads(4, half), _heads(2, half), _heads(1, half)

    def attend(record, token, kv_head, piece, following, thread, parts, part_step):
        step, kv_heads = word(record, R.STEP), word(record, R.A_KV_HEADS)
        dim, last = word(record, R.A_DIM), position(step, token)
        keys, store = word(record, R.A_KEYS), word(record, R.A_VALUES)
        begin = piece * PIECE
        count = min(last + 1, begin + PIECE) - begin
        tiles = (count + TILE - 1) // TILE
        table = _scratch(record, thread)
        list_tiles(record, step, token, kv_head, begin, tiles, keys, table, half)
        list_tiles(record, step, token, kv_head, begin, tiles, store, table + 8 * tiles, half)
        # Behind the table's end tiles are asked for, or multiplied for scores that nobody looks at: any will do.
        ahead = table + 16 * tiles
        begin = following // kv_heads * PIECE
        there = min(_ENTRIES_AHEAD, max(0, (last - begin + TILE) // TILE))
        list_tiles(record, step, token, following % kv_heads, begin, there, keys, ahead, half)
        for i in range(there, _ENTRIES_AHEAD):
            store_i64(ahead + 8 * i, load_i64(table))

        weights = table + _TABLE_BYTES
        slot, stop = _first_slot(record, kv_head), _first_slot(record, kv_head + 1)
        queries = _queries(record, thread) + 4 * _row_floats(dim) * slot
        while slot < stop:
            if slot + 4 <= stop:
                four(record, table, tiles, count, queries, weights, parts, part_step)
                done = 4
            elif slot + 2 <= stop:
                two(record, table, tiles, count, queries, weights, parts, part_step)
                done = 2
            else:
                one(record, table, tiles, count, queries, weights, parts, part_step)
                done = 1
            slot += done
            queries += 4 * _row_floats(dim) * done
            parts += part_step * done

    return helper(named(attend, f"attend-piece-{_CACHES[half]}"))


@helper
def _join(whole, part, dim):
    """Adds a piece's sums to those of the pieces before it."""
    at = 4 * _row_floats(dim)
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
def _finish(record, token, slot, whole):
    """out = the weighted values over the sum of weights."""
    dim = word(record, R.A_DIM)
    out = word(record, R.A_OUT) + token * word(record, R.A_OUT_STRIDE) + 4 * _head_of(record, slot) * dim
    total = v.splat(load_f32(whole + 4 * _row_floats(dim) + 4))
    whole_columns = dim // LANES * LANES
    for i in range(0, whole_columns, LANES):
        v.store(out + 4 * i, v.div(v.load(whole + 4 * i), total))
    if whole_columns < dim:
        last = v.div(v.load(whole + 4 * whole_columns), total)
        v.store_first(out + 4 * whole_columns, last, dim - whole_columns)


_piece_float32, _piece_bf16 = _piece(0), _piece(1)

# Kernels find these by their names: a compiled function that is part of a closure is compiled anew in every process.


# Who computes what


@helper
def _first_item(pieces, kv_heads, last_tiles, thread, threads):
    """The first item of a thread: items are pieces, each with all its heads, and weigh what they have of tiles."""
    whole = (pieces - 1) * kv_heads
    tiles = whole * _TILES + kv_heads * last_tiles
    first = tiles * thread // threads
    if first <= whole * _TILES:
        return (first + _TILES // 2) // _TILES
    return whole + (first - whole * _TILES + last_tiles // 2) // last_tiles


@cache
def attend_one(half: int) -> Kernel:
    """For one token, from its query, key and value as they were projected: each piece of each group by itself.

    Threads rotate what they need of the query for themselves, and whoever has the piece with the new position puts
    its key and value there first: nobody else reads them. `join_pieces` follows.
    """

    def attend_one(record, thread, threads):
        step, dim = word(record, R.STEP), word(record, R.A_DIM)
        kv_heads, last = word(record, R.A_KV_HEADS), position(step, 0)
        pieces, last_tiles = last // PIECE + 1, last % PIECE // TILE + 1
        begin = _first_item(pieces, kv_heads, last_tiles, thread, threads)
        end = _first_item(pieces, kv_heads, last_tiles, thread + 1, threads)
        for item in range(begin, end):
            piece, kv_head = item // kv_heads, item % kv_heads
            first, stop = _first_slot(record, kv_head), _first_slot(record, kv_head + 1)
            if item < begin + kv_heads:
                for slot in range(first, stop):
                    rotate(record, 0, _head_of(record, slot), _queries(record, thread) + 4 * _row_floats(dim) * slot)
            if piece == pieces - 1:
                store_key(record, 0, kv_head, half)
                store_value(record, 0, kv_head, half)
            part = _part(record, 0, first, piece)
            part_step = _part_bytes(dim) * word(record, R.A_PART_TOKENS)
            if half:
                _piece_bf16(record, 0, kv_head, piece, item + 1, thread, part, part_step)
            else:
                _piece_float32(record, 0, kv_head, piece, item + 1, thread, part, part_step)
            if pieces == 1:
                for slot in range(first, stop):
                    _finish(record, 0, slot, _part(record, 0, slot, 0))

    return Kernel(attend_one, f"attend-one-{'bf16' if half else 'float32'}")


@helper
def _fetch_queries(record, token, first, stop, thread):
    """Rotated queries of some slots, to where `_piece` wants them."""
    dim = word(record, R.A_DIM)
    rows = word(record, R.A_ROTATED) + token * word(record, R.A_ROTATED_STRIDE)
    for slot in range(first, stop):
        row = rows + 4 * _head_of(record, slot) * dim
        for i in range(0, dim, LANES):
            v.store(_queries(record, thread) + 4 * (_row_floats(dim) * slot + i), v.load(row + 4 * i))


@cache
def attend_few(half: int) -> Kernel:
    """For few tokens, after `rope_and_store`: each piece of each group by itself; `join_pieces` follows."""

    def attend_few(record, thread, threads):
        step, dim = word(record, R.STEP), word(record, R.A_DIM)
        kv_heads, most = word(record, R.A_KV_HEADS), word(step, R.PIECES)
        items = word(step, R.TOKENS) * most * kv_heads
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            token, inside = item // (most * kv_heads), item % (most * kv_heads)
            piece, kv_head = inside // kv_heads, inside % kv_heads
            if piece >= _pieces(step, token):
                continue
            first, stop = _first_slot(record, kv_head), _first_slot(record, kv_head + 1)
            _fetch_queries(record, token, first, stop, thread)
            part = _part(record, token, first, piece)
            part_step = _part_bytes(dim) * word(record, R.A_PART_TOKENS)
            if half:
                _piece_bf16(record, token, kv_head, piece, inside + 1, thread, part, part_step)
            else:
                _piece_float32(record, token, kv_head, piece, inside + 1, thread, part, part_step)
            if most == 1:
                for slot in range(first, stop):
                    _finish(record, token, slot, _part(record, token, slot, 0))

    return Kernel(attend_few, f"attend-few-{'bf16' if half else 'float32'}")


def _join_pieces(record, thread, threads):
    step = word(record, R.STEP)
    heads = word(record, R.A_Q_HEADS)
    items = word(step, R.TOKENS) * heads
    if word(step, R.PIECES) == 1:
        return
    for item in range(items * thread // threads, items * (thread + 1) // threads):
        token, slot = item // heads, item % heads
        whole = _part(record, token, slot, 0)
        for piece in range(1, _pieces(step, token)):
            _join(whole, _part(record, token, slot, piece), word(record, R.A_DIM))
        _finish(record, token, slot, whole)


join_pieces = Kernel(_join_pieces, "join-pieces")


@cache
def attend_whole(half: int) -> Kernel:
    """For many tokens, after `rope_and_store`: all pieces of a group one after another, joined as they come."""

    def attend_whole(record, thread, threads):
        step, dim = word(record, R.STEP), word(record, R.A_DIM)
        kv_heads, heads = word(record, R.A_KV_HEADS), word(record, R.A_Q_HEADS)
        items = word(step, R.TOKENS) * kv_heads
        row = _part_bytes(dim)
        wholes = _queries(record, thread) + 4 * _row_floats(dim) * heads
        parts = wholes + row * heads
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            token, kv_head = item // kv_heads, item % kv_heads
            first, stop = _first_slot(record, kv_head), _first_slot(record, kv_head + 1)
            _fetch_queries(record, token, first, stop, thread)
            if half:
                _piece_bf16(record, token, kv_head, 0, kv_heads + kv_head, thread, wholes, row)
            else:
                _piece_float32(record, token, kv_head, 0, kv_heads + kv_head, thread, wholes, row)
            for piece in range(1, _pieces(step, token)):
                if half:
                    _piece_bf16(record, token, kv_head, piece, (piece + 1) * kv_heads + kv_head, thread, parts, row)
                else:
                    _piece_float32(record, token, kv_head, piece, (piece + 1) * kv_heads + kv_head, thread, parts, row)
                for slot in range(first, stop):
                    _join(wholes + row * (slot - first), parts + row * (slot - first), dim)
            for slot in range(first, stop):
                _finish(record, token, slot, wholes + row * (slot - first))

    return Kernel(attend_whole, f"attend-whole-{'bf16' if half else 'float32'}")
