"""Rotary embedding, the key/value cache, and attention over it.

Keys lie in tiles of 16 positions, dimension by dimension, so that a register holds one dimension of many positions;
values lie position by position. Positions are taken in pieces of 256: within a piece scores, their maximum and sums,
then pieces are joined in order. That order does not depend on who computes what, so neither do the bits.
"""

from functools import cache

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.memory import (
    bits_of,
    float_bits,
    load_f32,
    load_i32,
    load_i64,
    load_u16,
    store_f32,
    store_u16,
)
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
TILE = 16
PIECE = 256
MASKED = float32(-3.0e38)


@helper
def _word(record, word):
    return load_i64(record + 8 * word)


@helper
def _load_element(address, half):
    return float_bits(load_u16(address) << 16) if half else load_f32(address)


@helper
def _store_element(address, x, half):
    if half:
        bits = bits_of(x)
        store_u16(address, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        store_f32(address, x)


@helper
def _load_vector(address, half):
    return v.load_bf16(address) if half else v.load(address)


@helper
def _page(record, step, token, position):
    """The bytes from the start of the pages to the page that holds a position of a token's sequence."""
    row = load_i32(_word(step, R.SEQUENCES) + 4 * token) * _word(step, R.PAGES_STRIDE)
    page = load_i32(_word(step, R.PAGES) + row + 4 * (position // _word(step, R.PAGE_TOKENS)))
    return page * _word(record, R.A_PAGE_BYTES)


@helper
def _rotate(record, source, position, i):
    """Dimensions i and i + dim / 2 of a head, rotated."""
    half = _word(record, R.A_DIM) // 2
    cosine = load_f32(_word(record, R.A_COS) + 4 * (position * half + i))
    sine = load_f32(_word(record, R.A_SIN) + 4 * (position * half + i))
    low, high = load_f32(source + 4 * i), load_f32(source + 4 * (i + half))
    return low * cosine - high * sine, high * cosine + low * sine


@cache
def rope_and_store(half: int) -> Kernel:
    """Rotates queries to `A_OUT` and keys into the cache, and stores values; `half`: the cache holds bfloat16."""
    size = 2 if half else 4

    def rope_and_store(record, thread, threads):
        step = _word(record, R.STEP)
        tokens, dim, page_tokens = _word(step, R.TOKENS), _word(record, R.A_DIM), _word(step, R.PAGE_TOKENS)
        q_heads, kv_heads = _word(record, R.A_Q_HEADS), _word(record, R.A_KV_HEADS)
        heads = q_heads + 2 * kv_heads
        for item in range(tokens * heads * thread // threads, tokens * heads * (thread + 1) // threads):
            token, head = item // heads, item % heads
            position = load_i32(_word(step, R.POSITIONS) + 4 * token)
            if head < q_heads:
                source = _word(record, R.A_Q) + token * _word(record, R.A_Q_STRIDE)
                source += _word(record, R.A_Q_FIRST) + head * _word(record, R.A_Q_STEP)
                out = _word(record, R.A_OUT) + token * _word(record, R.A_OUT_STRIDE) + 4 * head * dim
                for i in range(dim // 2):
                    low, high = _rotate(record, source, position, i)
                    store_f32(out + 4 * i, low)
                    store_f32(out + 4 * (i + dim // 2), high)
                continue
            head -= q_heads
            page = _page(record, step, token, position)
            inside = position % page_tokens
            if head < kv_heads:
                source = _word(record, R.A_K) + token * _word(record, R.A_K_STRIDE)
                source += _word(record, R.A_K_FIRST) + head * _word(record, R.A_K_STEP)
                out = _word(record, R.A_KEYS) + page + size * head * page_tokens * dim
                out += size * (inside // TILE * TILE * dim + inside % TILE)
                for i in range(dim // 2):
                    low, high = _rotate(record, source, position, i)
                    _store_element(out + size * TILE * i, low, half)
                    _store_element(out + size * TILE * (i + dim // 2), high, half)
            else:
                head -= kv_heads
                source = _word(record, R.A_V) + token * _word(record, R.A_V_STRIDE)
                source += _word(record, R.A_V_FIRST) + head * _word(record, R.A_V_STEP)
                out = _word(record, R.A_VALUES) + page + size * (head * page_tokens + inside) * dim
                for i in range(dim):
                    _store_element(out + size * i, load_f32(source + 4 * i), half)

    return Kernel(rope_and_store, f"rope-and-store-{'bf16' if half else 'float32'}")


@helper
def _piece(record, token, head, piece, scores, part, half):
    """One piece of one head: writes the weighted values, the maximum and the sum of weights to `part`."""
    size = 2 if half else 4
    step = _word(record, R.STEP)
    dim, page_tokens = _word(record, R.A_DIM), _word(step, R.PAGE_TOKENS)
    kv_head = load_i32(_word(record, R.A_KV_OF) + 4 * head)
    begin = piece * PIECE
    end = min(load_i32(_word(step, R.POSITIONS) + 4 * token) + 1, begin + PIECE)
    q = _word(record, R.A_Q) + token * _word(record, R.A_Q_STRIDE) + 4 * head * dim
    scale = v.splat(float_bits(_word(record, R.A_SCALE)))

    for position in range(begin, end, TILE):
        inside = position % page_tokens
        tile = _word(record, R.A_KEYS) + _page(record, step, token, position)
        tile += size * (kv_head * page_tokens + inside) * dim
        for lane in range(0, TILE, LANES):
            total = v.splat(float32(0.0))
            for i in range(dim):
                keys = _load_vector(tile + size * (TILE * i + lane), half)
                total = v.fma(v.splat(load_f32(q + 4 * i)), keys, total)
            v.store(scores + 4 * (position - begin + lane), v.mul(total, scale))
    count = end - begin
    rounded = (count + TILE - 1) // TILE * TILE
    for i in range(count, rounded):
        store_f32(scores + 4 * i, MASKED)

    largest = v.splat(MASKED)
    for i in range(0, rounded, LANES):
        largest = v.maximum(largest, v.load(scores + 4 * i))
    peak = v.max_lanes(largest)
    for i in range(0, rounded, LANES):
        v.store(scores + 4 * i, v.exp(v.sub(v.load(scores + 4 * i), v.splat(peak))))
    for i in range(count, rounded):
        store_f32(scores + 4 * i, float32(0.0))
    total = v.splat(float32(0.0))
    for i in range(0, rounded, LANES):
        total = v.add(total, v.load(scores + 4 * i))

    for i in range(0, dim, LANES):
        store_zero = v.splat(float32(0.0))
        v.store(part + 4 * i, store_zero)
    position = begin
    while position < end:
        # Values of one page lie behind each other.
        inside = position % page_tokens
        run = min(end - position, page_tokens - inside)
        values = _word(record, R.A_VALUES) + _page(record, step, token, position)
        values += size * (kv_head * page_tokens + inside) * dim
        whole = dim // LANES * LANES
        for i in range(0, whole, LANES):
            sums = v.load(part + 4 * i)
            for j in range(run):
                weight = v.splat(load_f32(scores + 4 * (position - begin + j)))
                sums = v.fma(weight, _load_vector(values + size * (j * dim + i), half), sums)
            v.store(part + 4 * i, sums)
        for i in range(whole, dim):
            value = load_f32(part + 4 * i)
            for j in range(run):
                weight = load_f32(scores + 4 * (position - begin + j))
                value = weight * _load_element(values + size * (j * dim + i), half) + value
            store_f32(part + 4 * i, value)
        position += run
    store_f32(part + 4 * _rounded(dim), peak)
    store_f32(part + 4 * _rounded(dim) + 4, v.sum_lanes(total))


@helper
def _rounded(dim):
    return (dim + TILE - 1) // TILE * TILE


@helper
def _join(whole, part, dim):
    """Adds a piece's sums to those of the pieces before it."""
    at = 4 * _rounded(dim)
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
def _finish(record, token, head, whole):
    """out = the weighted values over the sum of weights."""
    dim = _word(record, R.A_DIM)
    out = _word(record, R.A_OUT) + token * _word(record, R.A_OUT_STRIDE) + 4 * head * dim
    total = load_f32(whole + 4 * _rounded(dim) + 4)
    for i in range(dim):
        store_f32(out + 4 * i, load_f32(whole + 4 * i) / total)


@helper
def _pieces(step, token):
    return load_i32(_word(step, R.POSITIONS) + 4 * token) // PIECE + 1


def scratch_bytes(dim: int) -> int:
    """What a thread needs: the scores of a piece, its sums, and the sums of the pieces before it."""
    return 4 * (PIECE + 2 * ((dim + TILE - 1) // TILE * TILE + TILE))


_scratch_bytes = helper(scratch_bytes)


@helper
def _scores(record, thread):
    return _word(record, R.A_SCRATCH) + _scratch_bytes(_word(record, R.A_DIM)) * thread


@helper
def _part(record, token, head, piece):
    """Where a piece's sums lie."""
    floats = _rounded(_word(record, R.A_DIM)) + TILE
    row = (token * _word(record, R.A_Q_HEADS) + head) * _word(record, R.A_PART_TOKENS) + piece
    return _word(record, R.A_PARTS) + 4 * floats * row


@cache
def attend_pieces(half: int) -> Kernel:
    """For few tokens: each piece of each head by itself; `join_pieces` follows."""

    def attend_pieces(record, thread, threads):
        step = _word(record, R.STEP)
        heads, most = _word(record, R.A_Q_HEADS), _word(step, R.PIECES)
        items = _word(step, R.TOKENS) * heads * most
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            token, head, piece = item // most // heads, item // most % heads, item % most
            if piece < _pieces(step, token):
                part = _part(record, token, head, piece)
                _piece(record, token, head, piece, _scores(record, thread), part, half)
                if most == 1:
                    _finish(record, token, head, part)

    return Kernel(attend_pieces, f"attend-pieces-{'bf16' if half else 'float32'}")


def _join_pieces(record, thread, threads):
    step = _word(record, R.STEP)
    heads = _word(record, R.A_Q_HEADS)
    items = _word(step, R.TOKENS) * heads
    if _word(step, R.PIECES) == 1:
        return
    for item in range(items * thread // threads, items * (thread + 1) // threads):
        token, head = item // heads, item % heads
        whole = _part(record, token, head, 0)
        for piece in range(1, _pieces(step, token)):
            _join(whole, _part(record, token, head, piece), _word(record, R.A_DIM))
        _finish(record, token, head, whole)


join_pieces = Kernel(_join_pieces, "join-pieces")


@cache
def attend_whole(half: int) -> Kernel:
    """For many tokens: all pieces of a head one after another, joined as they come."""

    def attend_whole(record, thread, threads):
        step = _word(record, R.STEP)
        heads, dim = _word(record, R.A_Q_HEADS), _word(record, R.A_DIM)
        items = _word(step, R.TOKENS) * heads
        scores = _scores(record, thread)
        whole, part = scores + 4 * PIECE, scores + 4 * PIECE + 4 * (_rounded(dim) + TILE)
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            token, head = item // heads, item % heads
            _piece(record, token, head, 0, scores, whole, half)
            for piece in range(1, _pieces(step, token)):
                _piece(record, token, head, piece, scores, part, half)
                _join(whole, part, dim)
            _finish(record, token, head, whole)

    return Kernel(attend_whole, f"attend-whole-{'bf16' if half else 'float32'}")
