"""The key/value cache: where tiles of it lie, and what goes into it, keys and queries rotated.

Keys lie in tiles of 16 positions, dimension by dimension, so that a register holds one dimension of many positions;
values lie in tiles too, position by position. Both lie in pages, each with all heads of a rank. Elements are float32,
bfloat16, or int8 in steps of a float32 of each head and token, 16 of which end a tile. Knows nothing of attention.
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
    square_root,
    store_f32,
    store_i64,
    store_u8,
    store_u16,
)
from tpcpu.kernels.record import BF16, FLOAT32, INT8
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
TILE = 16

SIZES = {FLOAT32: 4, BF16: 2, INT8: 1}
"""Bytes of an element in the formats that the cache has."""
NAMES = {FLOAT32: "float32", BF16: "bf16", INT8: "int8"}

_SMALLEST = float32(1e-36)
"""A row that is smaller everywhere, so that 127 / largest might overflow, counts as zero."""
_WHOLE = float32(3 << 22)
"""What is added to a number below 2^21 ends in the nearest whole number, ties to even, in two's complement."""


@helper
def _size(form):
    return 4 if form == FLOAT32 else (2 if form == BF16 else 1)


@helper
def tile_bytes(dim, form):
    """A tile of keys or of values, the scales of int8 included."""
    return TILE * dim * _size(form) + (4 * TILE if form == INT8 else 0)


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
def _tile(record, token, kv_head, position, start, form):
    """The address of the tile with a position of a token's sequence; `start`: the address of all keys or values."""
    step, page_tokens = word(record, R.STEP), word(word(record, R.STEP), R.PAGE_TOKENS)
    number = position // page_tokens
    tile = (kv_head * page_tokens + position - number * page_tokens) // TILE
    return start + _page(record, step, token, number) + tile * tile_bytes(word(record, R.A_DIM), form)


@helper
def list_tiles(record, token, kv_head, first, count, start, table, form):
    """Writes the addresses of `count` tiles from position `first` on; `start`: the address of all keys or values."""
    page_tokens, nbytes = word(word(record, R.STEP), R.PAGE_TOKENS), tile_bytes(word(record, R.A_DIM), form)
    left, here = 0, 0
    for i in range(count):
        if left == 0:
            here = _tile(record, token, kv_head, first + TILE * i, start, form)
            left = page_tokens - (first + TILE * i) % page_tokens
        store_i64(table + 8 * i, here)
        here += nbytes
        left -= TILE


@helper
def _pair(record, i):
    """The dimensions that are pair i."""
    if word(record, R.A_INTERLEAVED):
        return 2 * i, 2 * i + 1
    return i, i + word(record, R.A_TURNED) // 2


@helper
def _norm_factor(record, source):
    """1 / sqrt(mean(x^2) + eps) of a head."""
    dim = word(record, R.A_DIM)
    whole = dim // LANES * LANES
    squares = v.splat(float32(0.0))
    for i in range(0, whole, LANES):
        x = v.load(source + 4 * i)
        squares = v.fma(x, x, squares)
    total = v.sum_lanes(squares)
    for i in range(whole, dim):
        total += load_f32(source + 4 * i) * load_f32(source + 4 * i)
    return float32(1.0) / square_root(total / float32(dim) + float_bits(word(record, R.A_EPS)))


@helper
def _normed(source, i, norm, factor):
    """Dimension i of a head, behind its norm where it has one."""
    x = load_f32(source + 4 * i)
    return load_f32(norm + 4 * i) * (x * factor) if norm else x


@helper
def _rotated(record, source, position, i, norm, factor):
    """The dimensions of pair i of a head, rotated."""
    half = word(record, R.A_TURNED) // 2
    one, other = _pair(record, i)
    cosine = load_f32(word(record, R.A_COS) + 4 * (position * half + i))
    sine = load_f32(word(record, R.A_SIN) + 4 * (position * half + i))
    low, high = _normed(source, one, norm, factor), _normed(source, other, norm, factor)
    return low * cosine - high * sine, high * cosine + low * sine


@helper
def _normalise(record, source, out):
    """A query head behind its norm."""
    dim, norm, factor = word(record, R.A_DIM), word(record, R.A_Q_NORM), _norm_factor(record, source)
    whole = dim // LANES * LANES
    for i in range(0, whole, LANES):
        v.store(out + 4 * i, v.mul(v.load(norm + 4 * i), v.mul(v.load(source + 4 * i), v.splat(factor))))
    for i in range(whole, dim):
        store_f32(out + 4 * i, _normed(source, i, norm, factor))


@helper
def rotate(record, token, head, out):
    """Rotates a query head of a token, behind its norm where it has one."""
    source = word(record, R.A_Q) + token * word(record, R.A_Q_STRIDE)
    source += word(record, R.A_Q_FIRST) + head * word(record, R.A_Q_STEP)
    at = position(word(record, R.STEP), token)
    half = word(record, R.A_TURNED) // 2
    if word(record, R.A_Q_NORM):
        _normalise(record, source, out)
        source = out
    else:
        for i in range(2 * half, word(record, R.A_DIM)):
            store_f32(out + 4 * i, load_f32(source + 4 * i))
    cosines = word(record, R.A_COS) + 4 * at * half
    sines = word(record, R.A_SIN) + 4 * at * half
    whole = 0 if word(record, R.A_INTERLEAVED) else half // LANES * LANES
    for i in range(0, whole, LANES):
        cosine, sine = v.load(cosines + 4 * i), v.load(sines + 4 * i)
        low, high = v.load(source + 4 * i), v.load(source + 4 * (i + half))
        v.store(out + 4 * i, v.sub(v.mul(low, cosine), v.mul(high, sine)))
        v.store(out + 4 * (i + half), v.add(v.mul(high, cosine), v.mul(low, sine)))
    for i in range(whole, half):
        one, other = _pair(record, i)
        x, y = _rotated(record, source, at, i, 0, float32(1.0))
        store_f32(out + 4 * one, x)
        store_f32(out + 4 * other, y)


@helper
def _store_element(address, x, form):
    """`x` as an element; of int8 a number of steps."""
    if form == FLOAT32:
        store_f32(address, x)
    elif form == BF16:
        bits = bits_of(x)
        store_u16(address, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        store_u8(address, bits_of(x + _WHOLE))


@helper
def store_key(record, token, kv_head, form):
    """Rotates a key of a token, behind its norm where it has one, into the cache."""
    size, dim, turned = _size(form), word(record, R.A_DIM), word(record, R.A_TURNED)
    at = position(word(record, R.STEP), token)
    source = word(record, R.A_K) + token * word(record, R.A_K_STRIDE)
    source += word(record, R.A_K_FIRST) + kv_head * word(record, R.A_K_STEP)
    norm = word(record, R.A_K_NORM)
    factor = _norm_factor(record, source) if norm else float32(1.0)
    tile = _tile(record, token, kv_head, at, word(record, R.A_KEYS), form)
    steps = float32(1.0)
    if form == INT8:
        largest = float32(0.0)
        for i in range(turned // 2):
            low, high = _rotated(record, source, at, i, norm, factor)
            largest = max(largest, max(abs(low), abs(high)))
        for i in range(turned, dim):
            largest = max(largest, abs(_normed(source, i, norm, factor)))
        steps = float32(127.0) / largest if largest > _SMALLEST else float32(0.0)
        worth = largest / float32(127.0) if largest > _SMALLEST else float32(0.0)
        store_f32(tile + TILE * dim + 4 * (at % TILE), worth)
    out = tile + size * (at % TILE)
    for i in range(turned // 2):
        low, high = _rotated(record, source, at, i, norm, factor)
        if form == INT8:
            low *= steps
            high *= steps
        one, other = _pair(record, i)
        _store_element(out + size * TILE * one, low, form)
        _store_element(out + size * TILE * other, high, form)
    for i in range(turned, dim):
        x = _normed(source, i, norm, factor)
        if form == INT8:
            x *= steps
        _store_element(out + size * TILE * i, x, form)


@helper
def store_value(record, token, kv_head, form):
    """Copies a value of a token into the cache."""
    at = position(word(record, R.STEP), token)
    source = word(record, R.A_V) + token * word(record, R.A_V_STRIDE)
    source += word(record, R.A_V_FIRST) + kv_head * word(record, R.A_V_STEP)
    tile = _tile(record, token, kv_head, at, word(record, R.A_VALUES), form)
    _store_row(source, tile, at, word(record, R.A_DIM), form)


@helper
def _store_row(source, tile, at, dim, form):
    """A row of `dim` float32 to the place in its tile of position `at`."""
    size = _size(form)
    out = tile + size * dim * (at % TILE)
    whole = dim // LANES * LANES
    steps = float32(1.0)
    if form == INT8:
        largest = float32(0.0)
        for i in range(dim):
            largest = max(largest, abs(load_f32(source + 4 * i)))
        steps = float32(127.0) / largest if largest > _SMALLEST else float32(0.0)
        worth = largest / float32(127.0) if largest > _SMALLEST else float32(0.0)
        store_f32(tile + TILE * dim + 4 * (at % TILE), worth)
    for i in range(0, whole, LANES):
        row = v.load(source + 4 * i)
        if form == FLOAT32:
            v.store(out + size * i, row)
        elif form == BF16:
            v.store_bf16(out + size * i, row)
        else:
            v.store_i8(out + size * i, v.nearest(v.mul(row, v.splat(steps))))
    for i in range(whole, dim):
        x = load_f32(source + 4 * i)
        if form == INT8:
            x *= steps
        _store_element(out + size * i, x, form)


# Values that lie in keys


@helper
def _latent_row(record, at, source, dim, turned, out):
    """`dim` features of a row, then what is rotated, then zeros: `A_DIM` float32."""
    half = word(record, R.A_TURNED) // 2
    whole = dim // LANES * LANES
    for i in range(0, whole, LANES):
        v.store(out + 4 * i, v.load(source + 4 * i))
    for i in range(whole, dim):
        store_f32(out + 4 * i, load_f32(source + 4 * i))
    for i in range(half):
        one, other = _pair(record, i)
        x, y = _rotated(record, turned, at, i, 0, float32(1.0))
        store_f32(out + 4 * (dim + one), x)
        store_f32(out + 4 * (dim + other), y)
    for i in range(dim + 2 * half, word(record, R.A_DIM)):
        store_f32(out + 4 * i, float32(0.0))


@cache
def store_latent(form: int) -> Kernel:
    """Puts queries together at `A_ROTATED`, and the one key, which holds the value, into the cache."""

    def store_latent(record, thread, threads):
        step, heads, dim = word(record, R.STEP), word(record, R.A_Q_HEADS), word(record, R.A_VALUE_DIM)
        items = word(step, R.TOKENS) * (heads + 1)
        room = word(record, R.A_SCRATCH) + thread * word(record, R.A_SCRATCH_STRIDE)
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            token, head = item // (heads + 1), item % (heads + 1) - 1
            at = position(step, token)
            if head < 0:
                source = word(record, R.A_K) + token * word(record, R.A_K_STRIDE) + word(record, R.A_K_FIRST)
                turned = word(record, R.A_K_TURNED) + token * word(record, R.A_K_TURNED_STRIDE)
                _latent_row(record, at, source, dim, turned, room)
                tile = _tile(record, token, 0, at, word(record, R.A_KEYS), form)
                _store_row(room, tile, at, word(record, R.A_DIM), form)
            else:
                source = word(record, R.A_Q) + token * word(record, R.A_Q_STRIDE)
                source += word(record, R.A_Q_FIRST) + head * word(record, R.A_Q_STEP)
                turned = word(record, R.A_Q_TURNED) + token * word(record, R.A_Q_TURNED_STRIDE)
                turned += head * word(record, R.A_Q_TURNED_STEP)
                out = word(record, R.A_ROTATED) + token * word(record, R.A_ROTATED_STRIDE)
                _latent_row(record, at, source, dim, turned, out + 4 * head * word(record, R.A_DIM))

    return Kernel(store_latent, f"store-latent-{NAMES[form]}")


@cache
def rope_and_store(form: int) -> Kernel:
    """Rotates queries to `A_ROTATED` and keys into the cache, and stores values."""

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
                store_key(record, token, head - q_heads, form)
            else:
                store_value(record, token, head - q_heads - kv_heads, form)

    return Kernel(rope_and_store, f"rope-and-store-{NAMES[form]}")
