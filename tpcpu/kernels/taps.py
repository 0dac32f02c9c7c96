"""The taps of a short convolution: a token's features beside those of the token before, which a sequence's state keeps.

Knows the state's layout: a ring of the last inputs of each sequence, so that drafted tokens can be taken back, and the
input at the last position of each page of the cache, so that a sequence can begin behind pages that another has
filled. The product with the taps' weights is a linear's.
"""

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.activations import copy, feature_share, finish_copy, word
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.memory import load_f32, load_i32, store_f32
from tpcpu.kernels.rounding import round_to_int8
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
BLOCK = R.BLOCK


@helper
def _position(record, token):
    return load_i32(word(word(record, R.STEP), R.POSITIONS) + 4 * token)


@helper
def _in_ring(record, token, position):
    """Where a sequence keeps its input at one of its last positions; reading one row leaves the others alone."""
    step = word(record, R.STEP)
    sequence = load_i32(word(step, R.SEQUENCES) + 4 * token)
    place = load_i32(word(step, R.STATES) + 4 * sequence)
    return word(record, R.STATE) + (R.RING * place + position % R.RING) * word(record, R.STATE_STRIDE)


@helper
def _of_page(record, token, position):
    """Where the input at the last position of a page is kept, for whichever sequence goes on behind that page."""
    step = word(record, R.STEP)
    sequence = load_i32(word(step, R.SEQUENCES) + 4 * token)
    pages = word(step, R.PAGES) + sequence * word(step, R.PAGES_STRIDE)
    page = load_i32(pages + 4 * (position // word(step, R.PAGE_TOKENS)))
    return word(record, R.STATE_PAGES) + page * word(record, R.STATE_STRIDE)


@helper
def _ends_page(record, position):
    return (position + 1) % word(word(record, R.STEP), R.PAGE_TOKENS) == 0


@helper
def _before(record, token, position):
    """Where the input at the position before is kept; before a sequence is what nobody reads."""
    if position > 0 and _ends_page(record, position - 1):
        return _of_page(record, token, position - 1)
    return _in_ring(record, token, position + R.RING - 1)


@helper
def _keep(x, row, first, last):
    for i in range(first, last):
        store_f32(row + 4 * i, load_f32(x + 4 * i))


@helper
def _interleave(before, x, out, first, last, at_start):
    """out_2i = before_i, zero at the start of a sequence; out_2i+1 = x_i."""
    whole = first + (last - first) // LANES * LANES
    for i in range(first, whole, LANES):
        earlier = v.splat(float32(0.0)) if at_start else v.load(before + 4 * i)
        v.store_pairs(out + 8 * i, earlier, v.load(x + 4 * i))
    for i in range(whole, last):
        store_f32(out + 8 * i, float32(0.0) if at_start else load_f32(before + 4 * i))
        store_f32(out + 8 * i + 4, load_f32(x + 4 * i))


@kernel("taps")
def taps(record, thread, threads):
    """Interleaves each token's features with those of the token before it, as a convolution's taps are stored.

    The token before a batch is in the state of the sequence, which keeps the last ones, or in that of the page before;
    before a sequence is zero. A thread takes the same features of every token.
    """
    step = word(record, R.STEP)
    tokens, width = word(step, R.TOKENS), word(record, R.WIDTH)
    blocks = (2 * width + BLOCK - 1) // BLOCK
    first = blocks * thread // threads * (BLOCK // 2)
    last = min(blocks * (thread + 1) // threads * (BLOCK // 2), width)
    for token in range(tokens):
        start = load_i32(word(step, R.FIRSTS) + 4 * token)
        position = _position(record, token)
        x = word(record, R.IN) + token * word(record, R.IN_STRIDE)
        out = word(record, R.OUT) + token * word(record, R.OUT_STRIDE)
        before = x - word(record, R.IN_STRIDE) if start < token else _before(record, token, position)
        _interleave(before, x, out, first, last, position == 0)
        later = token + R.RING
        if later >= tokens or load_i32(word(step, R.FIRSTS) + 4 * later) != start:
            _keep(x, _in_ring(record, token, position), first, last)
        if _ends_page(record, position):
            _keep(x, _of_page(record, token, position), first, last)
        if word(record, R.Q):
            round_to_int8(record, token, out, 2 * first, 2 * last)


@kernel("taps-one")
def taps_one(record, thread, threads):
    """As `taps`, for one token: every thread has the whole result; of the state it writes its slice."""
    width, position = word(record, R.WIDTH), _position(record, 0)
    own, x = copy(record, thread), word(record, R.IN)
    if word(record, R.IN_ROW):
        x = word(record, R.IN_ROW) + thread * word(record, R.IN_ROW_STRIDE)
    _interleave(_before(record, 0, position), x, own, 0, width, position == 0)
    first, last = feature_share(1, width, thread, threads)
    _keep(x, _in_ring(record, 0, position), first, last)
    if _ends_page(record, position):
        _keep(x, _of_page(record, 0, position), first, last)
    finish_copy(record, thread, 2 * width)
