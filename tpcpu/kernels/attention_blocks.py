"""What a thread does in one go: a piece of one token with a group of query heads, a block, a piece of a block.

A block is a group of query heads for some tokens of a sequence that follow one another: its rows share every tile that
is read. A piece of one token waits for memory and asks for what comes next; a piece of a block is bound by arithmetic.
Who computes which is not known here.
"""

from functools import cache

from tpcpu.kernels import record as R
from tpcpu.kernels.attention_pieces import (
    BLOCK_ROWS,
    ENTRIES_AHEAD,
    add_rows,
    adjust,
    clear,
    copy_part,
    finish,
    first_seen,
    first_slot,
    join,
    part_bytes_of,
    part_of,
    parts_of,
    pieces_of,
    queries_of,
    query_row,
    row_floats_of,
    score_rows,
    table_of,
    weigh,
    weights_of,
    wholes_of,
)
from tpcpu.kernels.attention_tiles import LANES, MOST_ROWS, PIECE
from tpcpu.kernels.compile import helper, named
from tpcpu.kernels.kv_cache import NAMES, TILE, list_tiles, position, word
from tpcpu.kernels.memory import load_f32, load_i32, load_i64, store_f32, store_i64
from tpcpu.kernels.record import BF16, FLOAT32, INT8
from tpcpu.kernels.simd import vectors as v


def _name(form, shared):
    return f"{NAMES[form]}-shared" if shared else NAMES[form]


# One token, piece by piece


@cache
def _heads(heads, form, shared):
    """Makes the helper for so many query heads of a token over the piece whose tiles a table names."""
    # What has just been read as keys is not asked for again.
    score, add = score_rows(heads, form, False, shared), add_rows(heads, form, shared)

    def attend(record, table, tiles, start, count, slot, own, queries, parts, part_step):
        dim, weights = word(record, R.A_VALUE_DIM), weights_of(table)
        score(record, table, tiles, queries)
        for g in range(heads):
            adjust(record, weights + 4 * PIECE * g, slot + g, own, count)
            weigh(weights + 4 * PIECE * g, start, count, count, parts + part_step * g, dim)
        add(record, table, tiles, count, parts, part_step)

    return helper(named(attend, f"attend-{heads}-heads-{_name(form, shared)}"))


@cache
def _piece(form, shared):
    """Makes the helper for one piece of one group, whose queries lie in scratch by slot.

    `shared`: all groups read one key, in which values lie. Sums go to `parts`, slot by slot. `following`: which piece,
    times the key/value heads, plus which head this thread reads next: its keys are asked for.
    """
    # With more rows side by side what is read once is used more often: worth it where there are many heads to a key.
    many = MOST_ROWS if shared else 4
    most, four, two, one = (_heads(rows, form, shared) for rows in (many, 4, 2, 1))

    def attend(record, token, kv_head, piece, following, thread, parts, part_step):
        step, kv_heads = word(record, R.STEP), word(record, R.A_KV_HEADS)
        dim, last = word(record, R.A_DIM), position(step, token)
        keys, store = word(record, R.A_KEYS), word(record, R.A_VALUES)
        begin, held = piece * PIECE, 0 if shared else kv_head
        own = last - begin
        start, count = max(0, first_seen(record, last) - begin), min(last + 1, begin + PIECE) - begin
        tiles = (count + TILE - 1) // TILE
        table = table_of(record, thread)
        list_tiles(record, token, held, begin, tiles, keys, table, form)
        list_tiles(record, token, held, begin, tiles, store, table + 8 * tiles, form)
        # Behind the table's end tiles are asked for, or multiplied for scores that nobody looks at: any will do.
        ahead = table + 16 * tiles
        begin = following // kv_heads * PIECE
        there = min(ENTRIES_AHEAD, max(0, (last - begin + TILE) // TILE))
        list_tiles(record, token, 0 if shared else following % kv_heads, begin, there, keys, ahead, form)
        for i in range(there, ENTRIES_AHEAD):
            store_i64(ahead + 8 * i, load_i64(table))

        slot, stop = first_slot(record, kv_head), first_slot(record, kv_head + 1)
        queries = queries_of(table) + 4 * row_floats_of(dim) * slot
        while slot < stop:
            if many > 4 and slot + many <= stop:
                most(record, table, tiles, start, count, slot, own, queries, parts, part_step)
                done = many
            elif slot + 4 <= stop:
                four(record, table, tiles, start, count, slot, own, queries, parts, part_step)
                done = 4
            elif slot + 2 <= stop:
                two(record, table, tiles, start, count, slot, own, queries, parts, part_step)
                done = 2
            else:
                one(record, table, tiles, start, count, slot, own, queries, parts, part_step)
                done = 1
            slot += done
            queries += 4 * row_floats_of(dim) * done
            parts += part_step * done

    return helper(named(attend, f"attend-piece-{_name(form, shared)}"))


@helper
def fetch_queries(record, token, first, stop, thread):
    """Rotated queries of some slots, to where `_piece` wants them."""
    dim, queries = word(record, R.A_DIM), queries_of(table_of(record, thread))
    for slot in range(first, stop):
        for i in range(0, dim, LANES):
            v.store(queries + 4 * (row_floats_of(dim) * slot + i), v.load(query_row(record, token, slot) + 4 * i))


# Blocks, piece by piece


@helper
def block_end(record, token, group):
    """The token behind the block that begins with a token."""
    step = word(record, R.STEP)
    rows, end = word(step, R.SEQUENCES), token + 1
    most = min(word(step, R.TOKENS), token + max(1, BLOCK_ROWS // group))
    while end < most and load_i32(rows + 4 * end) == load_i32(rows + 4 * token):
        end += 1
    return end


@helper
def _at_once(row, rows):
    """How many rows of a block go through a piece's tiles together, from a row on; the last may be none."""
    left = rows - row
    return 2 if left <= 2 else (4 if left <= 4 else MOST_ROWS)


@helper
def pack_queries(record, token, tokens, first, group, thread):
    """Rotated queries of a block, dimension by dimension of the rows that go together."""
    dim, out = word(record, R.A_DIM), queries_of(table_of(record, thread))
    row, rows = 0, tokens * group
    while row < rows:
        several = _at_once(row, rows)
        for g in range(several):
            each = min(row + g, rows - 1)
            source = query_row(record, token + each // group, first + each % group)
            for i in range(dim):
                store_f32(out + 4 * (dim * row + several * i + g), load_f32(source + 4 * i))
        row += several


@helper
def copy_queries(record, token, tokens, first, group, thread):
    """Rotated queries of a block, row by row."""
    dim, out = word(record, R.A_DIM), queries_of(table_of(record, thread))
    for row in range(tokens * group):
        source = query_row(record, token + row // group, first + row % group)
        for i in range(0, dim, LANES):
            v.store(out + 4 * (dim * row + i), v.load(source + 4 * i))


@cache
def _block_piece(form, shared):
    """Makes the helper for one piece of a block, whose queries are packed in scratch.

    Sums are joined with those of the pieces before in scratch, or, if `apart`, kept for `join_pieces`.
    """
    score_most, score_four, score_two = (score_rows(rows, form, True, shared) for rows in (MOST_ROWS, 4, 2))
    add_most, add_four, add_two = (add_rows(rows, form, True) for rows in (MOST_ROWS, 4, 2))

    def attend(record, token, tokens, kv_head, piece, thread, apart):
        dim, at = word(record, R.A_VALUE_DIM), position(word(record, R.STEP), token)
        query_bytes, held = 4 * word(record, R.A_DIM), 0 if shared else kv_head
        first, group = first_slot(record, kv_head), first_slot(record, kv_head + 1) - first_slot(record, kv_head)
        begin, row_bytes, rows = piece * PIECE, part_bytes_of(dim), tokens * group
        table = table_of(record, thread)
        tiles = (min(at + tokens, begin + PIECE) - begin + TILE - 1) // TILE
        list_tiles(record, token, held, begin, tiles, word(record, R.A_KEYS), table, form)
        list_tiles(record, token, held, begin, tiles, word(record, R.A_VALUES), table + 8 * tiles, form)
        for i in range(2 * tiles, 2 * tiles + 4):
            # Multiplied for scores that nobody looks at.
            store_i64(table + 8 * i, load_i64(table))
        weights, wholes, parts = weights_of(table), wholes_of(record, table), parts_of(record, table)
        row = 0
        while row < rows:
            several = _at_once(row, rows)
            here = min(several, rows - row)
            # What the last row sees, the others see or are kept from seeing.
            count = min(at + (row + here - 1) // group + 1, begin + PIECE) - begin
            if count <= 0 or first_seen(record, at + row // group) >= begin + PIECE:
                row += several
                continue
            queries, seen = queries_of(table) + query_bytes * row, (count + TILE - 1) // TILE
            if several == MOST_ROWS:
                score_most(record, table, seen, queries)
            elif several == 4:
                score_four(record, table, seen, queries)
            else:
                score_two(record, table, seen, queries)
            for g in range(here):
                own = at + (row + g) // group
                start, stop = max(0, first_seen(record, own) - begin), min(own + 1, begin + PIECE) - begin
                if start < stop:
                    slot = first + (row + g) % group
                    adjust(record, weights + 4 * PIECE * g, slot, own - begin, stop)
                    weigh(weights + 4 * PIECE * g, start, stop, count, parts + row_bytes * g, dim)
                else:
                    clear(weights + 4 * PIECE * g, 0, count)
            if several == MOST_ROWS:
                add_most(record, table, tiles, count, parts, row_bytes)
            elif several == 4:
                add_four(record, table, tiles, count, parts, row_bytes)
            else:
                add_two(record, table, tiles, count, parts, row_bytes)
            for g in range(here):
                own = at + (row + g) // group
                begins = first_seen(record, own) // PIECE
                part, whole = parts + row_bytes * g, wholes + row_bytes * (row + g)
                if begins <= piece <= own // PIECE:
                    if apart:
                        slot = first + (row + g) % group
                        copy_part(part_of(record, token + (row + g) // group, slot, piece), part, dim)
                    elif piece == begins:
                        copy_part(whole, part, dim)
                    else:
                        join(whole, part, dim)
            row += several

    return helper(named(attend, f"attend-block-piece-{_name(form, shared)}"))


@cache
def _block(form, shared):
    """Makes the helper for a block, the tokens from `token` to `end`: all its pieces, joined as they come."""
    one_piece, block_piece = _piece(form, shared), _block_piece(form, shared)

    def attend(record, token, end, kv_head, thread):
        kv_heads, dim = word(record, R.A_KV_HEADS), word(record, R.A_VALUE_DIM)
        first, stop = first_slot(record, kv_head), first_slot(record, kv_head + 1)
        group, row, table = stop - first, part_bytes_of(dim), table_of(record, thread)
        wholes, parts = wholes_of(record, table), parts_of(record, table)
        begin = first_seen(record, position(word(record, R.STEP), token)) // PIECE
        if end > token + 1:
            if shared:
                copy_queries(record, token, end - token, first, group, thread)
            else:
                pack_queries(record, token, end - token, first, group, thread)
            for piece in range(begin, pieces_of(record, end - 1)):
                block_piece(record, token, end - token, kv_head, piece, thread, False)
        else:
            fetch_queries(record, token, first, stop, thread)
            for piece in range(begin, pieces_of(record, token)):
                sums, following = wholes if piece == begin else parts, (piece + 1) * kv_heads + kv_head
                one_piece(record, token, kv_head, piece, following, thread, sums, row)
                if piece > begin:
                    for slot in range(group):
                        join(wholes + row * slot, parts + row * slot, dim)
        for i in range((end - token) * group):
            finish(record, token + i // group, first + i % group, wholes + row * i)

    return helper(named(attend, f"attend-block-{_name(form, shared)}"))


@cache
def _apart(form, shared):
    """Makes the helper for a piece of a block, whose sums are kept for `join_pieces`. `fetched`: queries are there."""
    one_piece, block_piece = _piece(form, shared), _block_piece(form, shared)

    def attend(record, token, end, kv_head, piece, fetched, thread):
        kv_heads, row = word(record, R.A_KV_HEADS), part_bytes_of(word(record, R.A_VALUE_DIM))
        first, stop = first_slot(record, kv_head), first_slot(record, kv_head + 1)
        if end > token + 1:
            if not fetched:
                if shared:
                    copy_queries(record, token, end - token, first, stop - first, thread)
                else:
                    pack_queries(record, token, end - token, first, stop - first, thread)
            block_piece(record, token, end - token, kv_head, piece, thread, True)
        else:
            if not fetched:
                fetch_queries(record, token, first, stop, thread)
            sums, following = part_of(record, token, first, piece), (piece + 1) * kv_heads + kv_head
            one_piece(record, token, kv_head, piece, following, thread, sums, row * word(record, R.A_PART_TOKENS))

    return helper(named(attend, f"attend-apart-{_name(form, shared)}"))


# Kernels find these by their names: a compiled function that is part of a closure is compiled anew in every process.

piece_float32, piece_bf16, piece_int8 = (_piece(form, False) for form in (FLOAT32, BF16, INT8))
block_float32, block_bf16, block_int8 = (_block(form, False) for form in (FLOAT32, BF16, INT8))
apart_float32, apart_bf16, apart_int8 = (_apart(form, False) for form in (FLOAT32, BF16, INT8))

shared_piece_float32, shared_piece_bf16, shared_piece_int8 = (_piece(form, True) for form in (FLOAT32, BF16, INT8))
shared_block_float32, shared_block_bf16, shared_block_int8 = (_block(form, True) for form in (FLOAT32, BF16, INT8))
shared_apart_float32, shared_apart_bf16, shared_apart_int8 = (_apart(form, True) for form in (FLOAT32, BF16, INT8))
