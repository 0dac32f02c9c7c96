"""What happens to activations between products: embedding, norms, gates, taps, and rounding to int8.

A thread takes whole tokens when there are enough, else a slice of blocks of 64 features of each token. A norm's sum is
computed by every thread that needs it, in one order: that is cheaper than meeting twice.
"""

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.memory import (
    float_bits,
    half_to_float,
    load_f32,
    load_i32,
    load_i64,
    load_u16,
    square_root,
    store_f32,
    store_i32,
)
from tpcpu.kernels.simd import instructions
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
BLOCK = R.BLOCK
SMALLEST = float32(1e-36)
WEIGHT_BIAS = instructions.WEIGHT_BIAS if instructions else 0


@helper
def _word(record, word):
    return load_i64(record + 8 * word)


@helper
def _tokens(record):
    return _word(_word(record, R.STEP), R.TOKENS)


@helper
def _token_share(tokens, thread, threads):
    """The tokens that this thread goes through: its part, or all of them when there are fewer than threads."""
    if tokens >= threads:
        return tokens * thread // threads, tokens * (thread + 1) // threads
    return 0, tokens


@helper
def _feature_share(tokens, width, thread, threads):
    """The features that this thread writes of each of its tokens, in whole blocks."""
    if tokens >= threads:
        return 0, width
    blocks = (width + BLOCK - 1) // BLOCK
    return blocks * thread // threads * BLOCK, min(blocks * (thread + 1) // threads * BLOCK, width)


@helper
def _quantise(record, token, source, begin, end):
    """Rounds features `begin` to `end` of a token to int8, one scale per block: the largest becomes 127."""
    q = _word(record, R.Q) + token * _word(record, R.Q_STRIDE)
    scales = _word(record, R.Q_SCALES) + token * _word(record, R.Q_SCALES_STRIDE)
    sums = _word(record, R.Q_SUMS) + token * _word(record, R.Q_SCALES_STRIDE)
    for first in range(begin, end, BLOCK):
        largest = v.absolute(v.load(source + 4 * first))
        for i in range(first + LANES, first + BLOCK, LANES):
            largest = v.maximum(largest, v.absolute(v.load(source + 4 * i)))
        peak = v.max_lanes(largest)
        # A block so small that 127 / peak would overflow counts as zero.
        peak = peak if peak > SMALLEST else float32(0.0)
        inverse = float32(127.0) / peak if peak > float32(0.0) else float32(0.0)
        factor = v.splat(inverse)
        total = v.zero_integers()
        for i in range(first, first + BLOCK, LANES):
            rounded = v.nearest(v.mul(v.load(source + 4 * i), factor))
            total = v.add_integers(total, rounded)
            v.store_i8(q + i, rounded)
        block = first // BLOCK
        store_f32(scales + 4 * block, peak / float32(127.0))
        store_i32(sums + 4 * block, -WEIGHT_BIAS * v.sum_lanes_integers(total))


@kernel("nothing")
def nothing(_record, _thread, _threads):
    """For a class of token counts in which an operation has no second part."""


@kernel("embed")
def embed(record, thread, threads):
    """out = the stored row of each token, as float32."""
    begin, end = _token_share(_tokens(record), thread, threads)
    first, last = _feature_share(_tokens(record), _word(record, R.WIDTH), thread, threads)
    ids = _word(_word(record, R.STEP), R.TOKEN_IDS)
    element = _word(record, R.ELEMENT)
    for token in range(begin, end):
        row = _word(record, R.IN) + load_i32(ids + 4 * token) * _word(record, R.IN_STRIDE)
        out = _word(record, R.OUT) + token * _word(record, R.OUT_STRIDE)
        whole = first + (last - first) // LANES * LANES
        for i in range(first, whole, LANES):
            if element == R.FLOAT32:
                v.store(out + 4 * i, v.load(row + 4 * i))
            elif element == R.BF16:
                v.store(out + 4 * i, v.load_bf16(row + 2 * i))
            else:
                v.store(out + 4 * i, v.load_f16(row + 2 * i))
        # One by one at the end of a row: behind the last row the file may end.
        for i in range(whole, last):
            if element == R.FLOAT32:
                store_f32(out + 4 * i, load_f32(row + 4 * i))
            elif element == R.BF16:
                store_f32(out + 4 * i, float_bits(load_u16(row + 2 * i) << 16))
            else:
                store_f32(out + 4 * i, half_to_float(load_u16(row + 2 * i)))


@kernel("select")
def select(record, thread, threads):
    """Copies the rows of the tokens that need logits, and rounds them to int8 where asked."""
    step = _word(record, R.STEP)
    wanted, ids = _word(step, R.WANTED), _word(step, R.WANTED_IDS)
    width = _word(record, R.WIDTH)
    begin, end = _token_share(wanted, thread, threads)
    first, last = _feature_share(wanted, width, thread, threads)
    for i in range(begin, end):
        source = _word(record, R.IN) + load_i32(ids + 4 * i) * _word(record, R.IN_STRIDE)
        out = _word(record, R.OUT) + i * _word(record, R.OUT_STRIDE)
        for k in range(first, last, LANES):
            v.store(out + 4 * k, v.load(source + 4 * k))
        if _word(record, R.Q):
            _quantise(record, i, out, first, last)


@kernel("quantise")
def quantise(record, thread, threads):
    """Rounds activations to int8."""
    tokens = _tokens(record)
    begin, end = _token_share(tokens, thread, threads)
    first, last = _feature_share(tokens, _word(record, R.WIDTH), thread, threads)
    for token in range(begin, end):
        _quantise(record, token, _word(record, R.IN) + token * _word(record, R.IN_STRIDE), first, last)


@helper
def _add_row(record, token, begin, end):
    """total = x + y + bias for some features of a token."""
    x = _word(record, R.IN) + token * _word(record, R.IN_STRIDE)
    y = _word(record, R.SECOND) + token * _word(record, R.SECOND_STRIDE)
    total = _word(record, R.TOTAL) + token * _word(record, R.TOTAL_STRIDE)
    bias = _word(record, R.BIAS)
    for i in range(begin, end, LANES):
        value = v.add(v.load(x + 4 * i), v.load(y + 4 * i))
        if bias:
            value = v.add(value, v.load(bias + 4 * i))
        v.store(total + 4 * i, value)


@kernel("add")
def add(record, thread, threads):
    """total = x + y + bias"""
    tokens = _tokens(record)
    begin, end = _token_share(tokens, thread, threads)
    first, last = _feature_share(tokens, _word(record, R.WIDTH), thread, threads)
    for token in range(begin, end):
        _add_row(record, token, first, last)


@helper
def _squared(x, y, bias, i):
    """x, or x + y + bias, at features i and following."""
    value = v.load(x + 4 * i)
    if y:
        value = v.add(value, v.load(y + 4 * i))
        if bias:
            value = v.add(value, v.load(bias + 4 * i))
    return value


@kernel("rms-norm")
def rms_norm(record, thread, threads):
    """out = weight * x / sqrt(mean(x^2) + eps), where x may be the sum of two inputs and a bias, kept as `TOTAL`.

    The result is rounded to int8 as well where asked.
    """
    tokens, width = _tokens(record), _word(record, R.WIDTH)
    begin, end = _token_share(tokens, thread, threads)
    first, last = _feature_share(tokens, width, thread, threads)
    weight, bias = _word(record, R.WEIGHT), _word(record, R.BIAS)
    eps = float_bits(_word(record, R.EPS))
    for token in range(begin, end):
        x = _word(record, R.IN) + token * _word(record, R.IN_STRIDE)
        y = _word(record, R.SECOND)
        if y:
            y += token * _word(record, R.SECOND_STRIDE)
        out = _word(record, R.OUT) + token * _word(record, R.OUT_STRIDE)
        # Two sums hide the latency of the addition; what lies behind the last feature is zero.
        even = v.splat(float32(0.0))
        odd = even
        for i in range(0, width, 2 * LANES):
            value = _squared(x, y, bias, i)
            even = v.fma(value, value, even)
            value = _squared(x, y, bias, i + LANES)
            odd = v.fma(value, value, odd)
        mean = v.sum_lanes(v.add(even, odd)) / float32(width)
        factor = v.splat(float32(1.0) / square_root(mean + eps))
        for i in range(first, last, LANES):
            value = _squared(x, y, bias, i)
            if y:
                v.store(_word(record, R.TOTAL) + token * _word(record, R.TOTAL_STRIDE) + 4 * i, value)
            v.store(out + 4 * i, v.mul(v.load(weight + 4 * i), v.mul(value, factor)))
        if _word(record, R.Q):
            _quantise(record, token, out, first, last)


@kernel("glu")
def glu(record, thread, threads):
    """out = silu(x) * y. The features may lie anywhere inside the blocks of `out` that cover them."""
    tokens, width = _tokens(record), _word(record, R.WIDTH)
    begin, end = _token_share(tokens, thread, threads)
    first, last = _feature_share(tokens, width, thread, threads)
    one = v.splat(float32(1.0))
    zero = v.splat(float32(0.0))
    for token in range(begin, end):
        x = _word(record, R.IN) + token * _word(record, R.IN_STRIDE)
        y = _word(record, R.SECOND) + token * _word(record, R.SECOND_STRIDE)
        out = _word(record, R.OUT) + token * _word(record, R.OUT_STRIDE)
        for i in range(first, last, LANES):
            gate = v.load(x + 4 * i)
            silu = v.div(gate, v.add(one, v.exp(v.sub(zero, gate))))
            v.store(out + 4 * i, v.mul(silu, v.load(y + 4 * i)))


@kernel("taps")
def taps(record, thread, threads):
    """Interleaves each token's features with those of the token before it, as a convolution's taps are stored.

    The token before a batch is in the state of the sequence, which keeps the last one; before a sequence is zero.
    A thread takes the same features of every token, so that it reads a state before it writes it.
    """
    step = _word(record, R.STEP)
    tokens, width = _word(step, R.TOKENS), _word(record, R.WIDTH)
    blocks = (2 * width + BLOCK - 1) // BLOCK
    first = blocks * thread // threads * (BLOCK // 2)
    last = min(blocks * (thread + 1) // threads * (BLOCK // 2), width)
    for token in range(tokens):
        start = load_i32(_word(step, R.FIRSTS) + 4 * token)
        sequence = load_i32(_word(step, R.SEQUENCES) + 4 * token)
        place = load_i32(_word(step, R.STATES) + 4 * sequence)
        state = _word(record, R.STATE) + place * _word(record, R.STATE_STRIDE)
        x = _word(record, R.IN) + token * _word(record, R.IN_STRIDE)
        out = _word(record, R.OUT) + token * _word(record, R.OUT_STRIDE)
        before = x - _word(record, R.IN_STRIDE) if start < token else state
        at_start = load_i32(_word(step, R.POSITIONS) + 4 * token) == 0
        for i in range(first, last):
            store_f32(out + 8 * i, float32(0.0) if at_start else load_f32(before + 4 * i))
            store_f32(out + 8 * i + 4, load_f32(x + 4 * i))
        ends = token + 1 == tokens or load_i32(_word(step, R.FIRSTS) + 4 * (token + 1)) == token + 1
        if ends:
            for i in range(first, last):
                store_f32(state + 4 * i, load_f32(x + 4 * i))
        if _word(record, R.Q):
            _quantise(record, token, out, 2 * first, 2 * last)


@kernel("sum-parts")
def sum_parts(record, thread, threads):
    """out = the parts of all ranks, added in rank order."""
    tokens, width = _tokens(record), _word(record, R.WIDTH)
    begin, end = _token_share(tokens, thread, threads)
    first, last = _feature_share(tokens, width, thread, threads)
    # A message holds the tokens of the batch and no more.
    part_bytes = tokens * _word(record, R.IN_STRIDE)
    for token in range(begin, end):
        x = _word(record, R.IN) + token * _word(record, R.IN_STRIDE)
        out = _word(record, R.OUT) + token * _word(record, R.OUT_STRIDE)
        for i in range(first, last, LANES):
            value = v.load(x + 4 * i)
            for part in range(1, _word(record, R.PARTS)):
                value = v.add(value, v.load(x + part * part_bytes + 4 * i))
            v.store(out + 4 * i, value)
