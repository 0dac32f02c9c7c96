"""The key/value cache: where tiles of it lie, and what goes into it, keys and queries rotated.

Keys lie in tiles of 16 positions, dimension by dimension, so that a register holds one dimension of many positions;
values lie position by position. Both lie in pages, each with all heads of a rank. Knows nothing of attention.
"""

from functools import cache

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import Kernel, helper
from tpcpu.kernels.memory import bits_of, load_f32, load_i32, load_i64, store_f32, store_i64, store_u16
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
TILE = 16


@helper
def word(record, number):
    return load_i64(record + 8 * number)


@helper
def position(step, token):
    return load_i32(word(step, R.POSITIONS) + 4 * token)


@helper
def _page(record, step, token, number):
    """The bytes from the start of the pages to a page of a token's sequence."""
    row = load_i32(word(step, R.SEQUENCES) + 4 * token) * word(step, R.PAGES_STRIDE)
    return load_i32(word(step, R.PAGES) + row + 4 * number) * word(record, R.A_PAGE_BYTES)


@helper
def list_tiles(record, step, token, kv_head, first, count, start, table, half):
    """Writes the addresses of `count` tiles from position `first` on; `start`: the address of all keys or values."""
    dim, page_tokens = word(record, R.A_DIM), word(step, R.PAGE_TOKENS)
    size = 2 if half else 4
    number = first // page_tokens
    inside = first - number * page_tokens
    head = start + size * kv_head * page_tokens * dim
    page = _page(record, step, token, number)
    for i in range(count):
        if inside == page_tokens:
            number += 1
            inside = 0
            page = _page(record, step, token, number)
        store_i64(table + 8 * i, head + page + size * inside * dim)
        inside += TILE


@helper
def _rotated(record, source, position, i):
    """Dimensions i and i + dim / 2 of a head, rotated."""
    half = word(record, R.A_DIM) // 2
    cosine = load_f32(word(record, R.A_COS) + 4 * (position * half + i))
    sine = load_f32(word(record, R.A_SIN) + 4 * (position * half + i))
    low, high = load_f32(source + 4 * i), load_f32(source + 4 * (i + half))
    return low * cosine - high * sine, high * cosine + low * sine


@helper
def rotate(record, token, head, out):
    """Rotates a query head of a token."""
    source = word(record, R.A_Q) + token * word(record, R.A_Q_STRIDE)
    source += word(record, R.A_Q_FIRST) + head * word(record, R.A_Q_STEP)
    at = position(word(record, R.STEP), token)
    half = word(record, R.A_DIM) // 2
    cosines = word(record, R.A_COS) + 4 * at * half
    sines = word(record, R.A_SIN) + 4 * at * half
    whole = half // LANES * LANES
    for i in range(0, whole, LANES):
        cosine, sine = v.load(cosines + 4 * i), v.load(sines + 4 * i)
        low, high = v.load(source + 4 * i), v.load(source + 4 * (i + half))
        v.store(out + 4 * i, v.sub(v.mul(low, cosine), v.mul(high, sine)))
        v.store(out + 4 * (i + half), v.add(v.mul(high, cosine), v.mul(low, sine)))
    for i in range(whole, half):
        x, y = _rotated(record, source, at, i)
        store_f32(out + 4 * i, x)
        store_f32(out + 4 * (i + half), y)


@helper
def _store_element(address, x, half):
    if half:
        bits = bits_of(x)
        store_u16(address, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        store_f32(address, x)


@helper
def store_key(record, token, kv_head, half):
    """Rotates a key of a token into the cache."""
    size = 2 if half else 4
    step, dim = word(record, R.STEP), word(record, R.A_DIM)
    page_tokens, at = word(step, R.PAGE_TOKENS), position(step, token)
    inside = at % page_tokens
    source = word(record, R.A_K) + token * word(record, R.A_K_STRIDE)
    source += word(record, R.A_K_FIRST) + kv_head * word(record, R.A_K_STEP)
    out = word(record, R.A_KEYS) + _page(record, step, token, at // page_tokens)
    out += size * (kv_head * page_tokens * dim + inside // TILE * TILE * dim + inside % TILE)
    for i in range(dim // 2):
        low, high = _rotated(record, source, at, i)
        _store_element(out + size * TILE * i, low, half)
        _store_element(out + size * TILE * (i + dim // 2), high, half)


@helper
def store_value(record, token, kv_head, half):
    """Copies a value of a token into the cache."""
    size = 2 if half else 4
    step, dim = word(record, R.STEP), word(record, R.A_DIM)
    page_tokens, at = word(step, R.PAGE_TOKENS), position(step, token)
    source = word(record, R.A_V) + token * word(record, R.A_V_STRIDE)
    source += word(record, R.A_V_FIRST) + kv_head * word(record, R.A_V_STEP)
    out = word(record, R.A_VALUES) + _page(record, step, token, at // page_tokens)
    out += size * (kv_head * page_tokens + at % page_tokens) * dim
    whole = dim // LANES * LANES
    for i in range(0, whole, LANES):
        if half:
            v.store_bf16(out + size * i, v.load(source + 4 * i))
        else:
            v.store(out + size * i, v.load(source + 4 * i))
    for i in range(whole, dim):
        _store_element(out + size * i, load_f32(source + 4 * i), half)


@cache
def rope_and_store(half: int) -> Kernel:
    """Rotates queries to `A_ROTATED` and keys into the cache, and stores values; `half`: the cache holds bfloat16."""

    def rope_and_store(record, thread, threads):
        q_heads, kv_heads = word(record, R.A_Q_HEADS), word(record, R.A_KV_HEADS)
        heads = q_heads + 2 * kv_heads
        items = word(word(record, R.STEP), R.TOKENS) * heads
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            token, head = item // heads, item % heads
            if head < q_heads:
                out = word(record, R.A_ROTATED) + token * word(record, R.A_ROTATED_STRIDE)
                rotate(record, token, head, out + 4 * head * word(record, R.A_DIM))
            elif head < q_heads + kv_heads:
                store_key(record, token, head - q_heads, half)
            else:
                store_value(record, token, head - q_heads - kv_heads, half)

    return Kernel(rope_and_store, f"rope-and-store-{'bf16' if half else 'float32'}")
