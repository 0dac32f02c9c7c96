"""Attention over the key/value cache: who computes what.

One token's pieces are divided over the threads, each with all its heads; so are the pieces of few tokens, block by
block. Of many tokens blocks are divided, each with all its pieces. `attention_blocks.py` says what a block is.
"""

from functools import cache

from tpcpu.kernels import record as R
from tpcpu.kernels.attention_blocks import (
    apart_bf16,
    apart_float32,
    apart_int8,
    block_bf16,
    block_end,
    block_float32,
    block_int8,
    fetch_queries,
    piece_bf16,
    piece_float32,
    piece_int8,
    shared_apart_bf16,
    shared_apart_float32,
    shared_apart_int8,
    shared_block_bf16,
    shared_block_float32,
    shared_block_int8,
    shared_piece_bf16,
    shared_piece_float32,
    shared_piece_int8,
)
from tpcpu.kernels.attention_pieces import (
    TILES,
    finish,
    first_seen,
    first_slot,
    head_of,
    join,
    part_bytes_of,
    part_of,
    pieces_of,
    queries_of,
    row_floats_of,
    table_of,
)
from tpcpu.kernels.attention_tiles import MOST_ROWS, PIECE
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.kv_cache import NAMES, TILE, position, rotate, store_key, store_value, word
from tpcpu.kernels.record import BF16, INT8

SHARED = "-shared"
"""Ends the names of kernels in which all groups read one key, and values are its first dimensions."""


@helper
def _first_item(pieces, kv_heads, last_tiles, thread, threads):
    """The first item of a thread: items are pieces, each with all its heads, and weigh what they have of tiles."""
    whole = (pieces - 1) * kv_heads
    tiles = whole * TILES + kv_heads * last_tiles
    first = tiles * thread // threads
    if first <= whole * TILES:
        return (first + TILES // 2) // TILES
    return whole + (first - whole * TILES + last_tiles // 2) // last_tiles


@cache
def attend_one(form: int, shared: bool) -> Kernel:
    """For one token, from its query, key and value as they were projected: each piece of each group by itself.

    Threads rotate what they need of the query for themselves, and whoever has the piece with the new position puts
    its key and value there first: nobody else reads them. Where all groups share a key, that is done before, by
    `store_latent`. `join_pieces` follows.
    """

    def attend_one(record, thread, threads):
        step, dim = word(record, R.STEP), word(record, R.A_DIM)
        kv_heads, last = word(record, R.A_KV_HEADS), position(step, 0)
        before = first_seen(record, last) // PIECE
        pieces, last_tiles = last // PIECE + 1, last % PIECE // TILE + 1
        begin = _first_item(pieces - before, kv_heads, last_tiles, thread, threads)
        end = _first_item(pieces - before, kv_heads, last_tiles, thread + 1, threads)
        queries = queries_of(table_of(record, thread))
        part_step = part_bytes_of(word(record, R.A_VALUE_DIM)) * word(record, R.A_PART_TOKENS)
        for item in range(begin, end):
            piece, kv_head = before + item // kv_heads, item % kv_heads
            first, stop = first_slot(record, kv_head), first_slot(record, kv_head + 1)
            if shared and item < begin + kv_heads:
                fetch_queries(record, 0, first, stop, thread)
            elif item < begin + kv_heads:
                for slot in range(first, stop):
                    rotate(record, 0, head_of(record, slot), queries + 4 * row_floats_of(dim) * slot)
            if not shared and piece == pieces - 1:
                store_key(record, 0, kv_head, form)
                store_value(record, 0, kv_head, form)
            part, following = part_of(record, 0, first, piece), before * kv_heads + item + 1
            if shared:
                if form == INT8:
                    shared_piece_int8(record, 0, kv_head, piece, following, thread, part, part_step)
                elif form == BF16:
                    shared_piece_bf16(record, 0, kv_head, piece, following, thread, part, part_step)
                else:
                    shared_piece_float32(record, 0, kv_head, piece, following, thread, part, part_step)
            elif form == INT8:
                piece_int8(record, 0, kv_head, piece, following, thread, part, part_step)
            elif form == BF16:
                piece_bf16(record, 0, kv_head, piece, following, thread, part, part_step)
            else:
                piece_float32(record, 0, kv_head, piece, following, thread, part, part_step)
            if pieces == 1:
                for slot in range(first, stop):
                    finish(record, 0, slot, part_of(record, 0, slot, 0))

    return Kernel(attend_one, f"attend-one-{NAMES[form]}{SHARED if shared else ''}")


@cache
def attend_few(form: int, shared: bool) -> Kernel:
    """For few tokens, after `rope_and_store`: each piece of each block by itself; `join_pieces` follows."""

    def attend_few(record, thread, threads):
        step = word(record, R.STEP)
        kv_heads, tokens = word(record, R.A_KV_HEADS), word(step, R.TOKENS)
        # Once to add up what there is to do, once to do one's share of it; a piece costs its tiles times its rows.
        total = 0
        for doing in range(2):
            share_begin, share_end = total * thread // threads, total * (thread + 1) // threads
            total = 0
            for kv_head in range(kv_heads):
                first, stop = first_slot(record, kv_head), first_slot(record, kv_head + 1)
                token = 0
                while token < tokens and first < stop:
                    end = block_end(record, token, stop - first)
                    last = position(step, end - 1)
                    cost, fetched = max(MOST_ROWS, (end - token) * (stop - first)), False
                    for piece in range(first_seen(record, position(step, token)) // PIECE, last // PIECE + 1):
                        tiles = min(TILES, last // TILE + 1 - piece * TILES)
                        middle = total + cost * tiles // 2
                        total += cost * tiles
                        if not doing or middle < share_begin or middle >= share_end:
                            continue
                        if shared:
                            if form == INT8:
                                shared_apart_int8(record, token, end, kv_head, piece, fetched, thread)
                            elif form == BF16:
                                shared_apart_bf16(record, token, end, kv_head, piece, fetched, thread)
                            else:
                                shared_apart_float32(record, token, end, kv_head, piece, fetched, thread)
                        elif form == INT8:
                            apart_int8(record, token, end, kv_head, piece, fetched, thread)
                        elif form == BF16:
                            apart_bf16(record, token, end, kv_head, piece, fetched, thread)
                        else:
                            apart_float32(record, token, end, kv_head, piece, fetched, thread)
                        fetched = True
                        if word(step, R.PIECES) == 1:
                            for each in range(token, end):
                                for slot in range(first, stop):
                                    finish(record, each, slot, part_of(record, each, slot, 0))
                    token = end

    return Kernel(attend_few, f"attend-few-{NAMES[form]}{SHARED if shared else ''}")


def _join_pieces(record, thread, threads):
    step = word(record, R.STEP)
    heads = word(record, R.A_Q_HEADS)
    items = word(step, R.TOKENS) * heads
    if word(step, R.PIECES) == 1:
        return
    for item in range(items * thread // threads, items * (thread + 1) // threads):
        token, slot = item // heads, item % heads
        first = first_seen(record, position(step, token)) // PIECE
        whole = part_of(record, token, slot, first)
        for piece in range(first + 1, pieces_of(record, token)):
            join(whole, part_of(record, token, slot, piece), word(record, R.A_VALUE_DIM))
        finish(record, token, slot, whole)


join_pieces = Kernel(_join_pieces, "join-pieces")


@helper
def _block_cost(record, token, end, group):
    """A block's work: positions that a token sees, times its rows; few rows wait for memory, as if they were more."""
    step, seen = word(record, R.STEP), 0
    for each in range(token, end):
        at = position(step, each)
        seen += at + 1 - first_seen(record, at)
    return max(MOST_ROWS, group * (end - token)) * seen // (end - token)


@cache
def attend_many(form: int, shared: bool) -> Kernel:
    """For many tokens, after `rope_and_store`: all pieces of a block one after another, joined as they come."""

    def attend_many(record, thread, threads):
        kv_heads, tokens = word(record, R.A_KV_HEADS), word(word(record, R.STEP), R.TOKENS)
        # Once to add up what there is to do, once to do one's share of it.
        total = 0
        for doing in range(2):
            share_begin, share_end = total * thread // threads, total * (thread + 1) // threads
            total = 0
            for kv_head in range(kv_heads):
                group, token = first_slot(record, kv_head + 1) - first_slot(record, kv_head), 0
                while token < tokens and group:
                    end = block_end(record, token, group)
                    cost = _block_cost(record, token, end, group)
                    middle = total + cost // 2
                    total += cost
                    if not doing or middle < share_begin or middle >= share_end:
                        pass
                    elif shared:
                        if form == INT8:
                            shared_block_int8(record, token, end, kv_head, thread)
                        elif form == BF16:
                            shared_block_bf16(record, token, end, kv_head, thread)
                        else:
                            shared_block_float32(record, token, end, kv_head, thread)
                    elif form == INT8:
                        block_int8(record, token, end, kv_head, thread)
                    elif form == BF16:
                        block_bf16(record, token, end, kv_head, thread)
                    else:
                        block_float32(record, token, end, kv_head, thread)
                    token = end

    return Kernel(attend_many, f"attend-many-{NAMES[form]}{SHARED if shared else ''}")
