"""Filling a weight's memory with random contents, in place of packing a real one.

Knows a region of `N_UNITS` panels and what its bytes must not be; nothing of formats. Threads divide the panels as
packing does, so each touches first what it will read. Words come from a counter, not from a running state: contents
are the same whatever the number of threads.
"""

from numba import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.memory import bits_of, float_bits, load_i64, store_f32, store_i64, store_u16


@helper
def _word(record, word):
    return load_i64(record + 8 * word)


@helper
def _share(record, thread, threads):
    """First and last byte, and the number of the first word, of this thread's panels; panels are whole words."""
    units, size = _word(record, R.N_UNITS), _word(record, R.N_UNIT_BYTES)
    begin, end = units * thread // threads * size, units * (thread + 1) // threads * size
    out = _word(record, R.N_OUT)
    return out + begin, out + end, begin // 8


@helper
def _random(seed, counter):
    """64 random bits: a multiplicative hash of the counter, mixed twice."""
    x = seed + counter * 0x1E3779B97F4A7C15
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * 0x3F58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * 0x14D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@helper
def _between(record, mantissa):
    """middle + spread * u, with u in [-1, 1) from 23 random bits."""
    middle, spread = float_bits(_word(record, R.N_MIDDLE)), float_bits(_word(record, R.N_SPREAD))
    return middle + spread * (float_bits(0x3F800000 | (mantissa & 0x7FFFFF)) * float32(2.0) - float32(3.0))


@kernel("fill-bytes")
def fill_bytes(record, thread, threads):
    """Random bytes, of which every word has the bits `N_KEPT`, and the bits `N_SET` set."""
    address, end, counter = _share(record, thread, threads)
    seed, kept, bits = _word(record, R.N_SEED), _word(record, R.N_KEPT), _word(record, R.N_SET)
    for i in range((end - address) // 8):
        store_i64(address + 8 * i, _random(seed, counter + i) & kept | bits)


@kernel("fill-float32")
def fill_float32(record, thread, threads):
    """float32 evenly between `N_MIDDLE` - `N_SPREAD` and `N_MIDDLE` + `N_SPREAD`."""
    address, end, counter = _share(record, thread, threads)
    seed = _word(record, R.N_SEED)
    for i in range((end - address) // 8):
        bits = _random(seed, counter + i)
        store_f32(address + 8 * i, _between(record, bits))
        store_f32(address + 8 * i + 4, _between(record, bits >> 32))


@kernel("fill-bf16")
def fill_bf16(record, thread, threads):
    """The same as bfloat16, cut off rather than rounded."""
    address, end, counter = _share(record, thread, threads)
    seed = _word(record, R.N_SEED)
    for i in range((end - address) // 8):
        bits = _random(seed, counter + i)
        for j in range(4):
            store_u16(address + 8 * i + 2 * j, bits_of(_between(record, bits >> (13 * j))) >> 16)
