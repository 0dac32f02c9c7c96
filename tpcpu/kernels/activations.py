"""What happens to activations between products: embedding, norms, gates, taps, and rounding to int8.

Of several tokens a thread takes whole ones when there are enough, else a slice of blocks of 64 features of each. Of one
token every thread makes a copy of its own of what a product reads next, rounded where it is to be: that is cheaper than
waiting for one another. Beside it, it writes its slice of the features for those who read slices.
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
)
from tpcpu.kernels.rounding import round_to_int8
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
BLOCK = R.BLOCK


@helper
def word(record, word):
    return load_i64(record + 8 * word)


@helper
def _tokens(record):
    return word(word(record, R.STEP), R.TOKENS)


@helper
def token_share(tokens, thread, threads):
    """The tokens that this thread goes through: its part, or all of them when there are fewer than threads."""
    if tokens >= threads:
        return tokens * thread // threads, tokens * (thread + 1) // threads
    return 0, tokens


@helper
def feature_share(tokens, width, thread, threads):
    """The features that this thread writes of each of its tokens, in whole blocks."""
    if tokens >= threads:
        return 0, width
    blocks = (width + BLOCK - 1) // BLOCK
    return blocks * thread // threads * BLOCK, min(blocks * (thread + 1) // threads * BLOCK, width)


@helper
def copy(record, thread):
    """A thread's own copy of the result."""
    return word(record, R.ROW) + thread * word(record, R.ROW_STRIDE)


@helper
def finish_copy(record, thread, width):
    """What follows the features up to a whole block is zero; then the copy is rounded where asked."""
    own = copy(record, thread)
    blocks = (width + BLOCK - 1) // BLOCK * BLOCK
    for i in range(width, blocks):
        store_f32(own + 4 * i, float32(0.0))
    if word(record, R.Q):
        round_to_int8(record, thread, own, 0, blocks)


@helper
def _store_slice(record, own, thread, threads, width):
    """Writes this thread's features of its copy to the one token of `OUT`."""
    first, last = feature_share(1, width, thread, threads)
    out = word(record, R.OUT)
    for i in range(first, last, LANES):
        v.store(out + 4 * i, v.load(own + 4 * i))


@kernel("nothing")
def nothing(_record, _thread, _threads):
    """For a class of token counts in which an operation has no second part."""


@kernel("embed")
def embed(record, thread, threads):
    """out = factor * the stored row of each token, as float32."""
    begin, end = token_share(_tokens(record), thread, threads)
    first, last = feature_share(_tokens(record), word(record, R.WIDTH), thread, threads)
    ids = word(word(record, R.STEP), R.TOKEN_IDS)
    element = word(record, R.ELEMENT)
    factor = float_bits(word(record, R.CONSTANT))
    scale = v.splat(factor)
    for token in range(begin, end):
        row = word(record, R.IN) + load_i32(ids + 4 * token) * word(record, R.IN_STRIDE)
        out = word(record, R.OUT) + token * word(record, R.OUT_STRIDE)
        whole = first + (last - first) // LANES * LANES
        for i in range(first, whole, LANES):
            if element == R.FLOAT32:
                v.store(out + 4 * i, v.mul(scale, v.load(row + 4 * i)))
            elif element == R.BF16:
                v.store(out + 4 * i, v.mul(scale, v.load_bf16(row + 2 * i)))
            else:
                v.store(out + 4 * i, v.mul(scale, v.load_f16(row + 2 * i)))
        # One by one at the end of a row: behind the last row the file may end.
        for i in range(whole, last):
            if element == R.FLOAT32:
                store_f32(out + 4 * i, factor * load_f32(row + 4 * i))
            elif element == R.BF16:
                store_f32(out + 4 * i, factor * float_bits(load_u16(row + 2 * i) << 16))
            else:
                store_f32(out + 4 * i, factor * half_to_float(load_u16(row + 2 * i)))


@kernel("select")
def select(record, thread, threads):
    """Copies the rows of the tokens that need logits, and rounds them to int8 where asked."""
    step = word(record, R.STEP)
    wanted, ids = word(step, R.WANTED), word(step, R.WANTED_IDS)
    width = word(record, R.WIDTH)
    begin, end = token_share(wanted, thread, threads)
    first, last = feature_share(wanted, width, thread, threads)
    for i in range(begin, end):
        source = word(record, R.IN) + load_i32(ids + 4 * i) * word(record, R.IN_STRIDE)
        out = word(record, R.OUT) + i * word(record, R.OUT_STRIDE)
        for k in range(first, last, LANES):
            v.store(out + 4 * k, v.load(source + 4 * k))
        if word(record, R.Q):
            round_to_int8(record, i, out, first, last)


@kernel("soft-cap")
def soft_cap(record, thread, threads):
    """out = factor * tanh(out / factor), of the tokens whose logits are wanted."""
    wanted, width = word(word(record, R.STEP), R.WANTED), word(record, R.WIDTH)
    begin, end = token_share(wanted, thread, threads)
    first, last = feature_share(wanted, width, thread, threads)
    factor = float_bits(word(record, R.CONSTANT))
    height, inverse = v.splat(factor), v.splat(float32(1.0) / factor)
    for i in range(begin, end):
        out = word(record, R.OUT) + i * word(record, R.OUT_STRIDE)
        for k in range(first, last, LANES):
            v.store(out + 4 * k, v.mul(height, v.tanh(v.mul(v.load(out + 4 * k), inverse))))


@kernel("quantise-one")
def quantise_one(record, thread, _threads):
    """Rounds the one token to int8, every thread for itself."""
    blocks = (word(record, R.WIDTH) + BLOCK - 1) // BLOCK * BLOCK
    round_to_int8(record, thread, word(record, R.IN), 0, blocks)


@kernel("quantise")
def quantise(record, thread, threads):
    """Rounds activations to int8."""
    tokens = _tokens(record)
    begin, end = token_share(tokens, thread, threads)
    first, last = feature_share(tokens, word(record, R.WIDTH), thread, threads)
    for token in range(begin, end):
        round_to_int8(record, token, word(record, R.IN) + token * word(record, R.IN_STRIDE), first, last)


@helper
def _add_row(record, token, begin, end):
    """total = x + y + bias for some features of a token."""
    x = word(record, R.IN) + token * word(record, R.IN_STRIDE)
    y = word(record, R.SECOND) + token * word(record, R.SECOND_STRIDE)
    total = word(record, R.TOTAL) + token * word(record, R.TOTAL_STRIDE)
    bias = word(record, R.BIAS)
    for i in range(begin, end, LANES):
        value = v.add(v.load(x + 4 * i), v.load(y + 4 * i))
        if bias:
            value = v.add(value, v.load(bias + 4 * i))
        v.store(total + 4 * i, value)


@kernel("add")
def add(record, thread, threads):
    """total = x + y + bias"""
    tokens = _tokens(record)
    begin, end = token_share(tokens, thread, threads)
    first, last = feature_share(tokens, word(record, R.WIDTH), thread, threads)
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


@helper
def _norm_factor(record, x, y, bias, width):
    """1 / sqrt(mean(x^2) + eps) in every lane, where x may be x + y + bias."""
    # Two sums hide the latency of the addition; what lies behind the last feature is zero.
    even = v.splat(float32(0.0))
    odd = even
    for i in range(0, width, 2 * LANES):
        value = _squared(x, y, bias, i)
        even = v.fma(value, value, even)
        value = _squared(x, y, bias, i + LANES)
        odd = v.fma(value, value, odd)
    mean = v.sum_lanes(v.add(even, odd)) / float32(width)
    return v.splat(float32(1.0) / square_root(mean + float_bits(word(record, R.EPS))))


@kernel("rms-norm")
def rms_norm(record, thread, threads):
    """out = weight * x / sqrt(mean(x^2) + eps), where x may be the sum of two inputs and a bias, kept as `TOTAL`.

    The result is rounded to int8 as well where asked.
    """
    tokens, width = _tokens(record), word(record, R.WIDTH)
    begin, end = token_share(tokens, thread, threads)
    first, last = feature_share(tokens, width, thread, threads)
    weight, bias = word(record, R.WEIGHT), word(record, R.BIAS)
    for token in range(begin, end):
        x = word(record, R.IN) + token * word(record, R.IN_STRIDE)
        y = word(record, R.SECOND)
        if y:
            y += token * word(record, R.SECOND_STRIDE)
        out = word(record, R.OUT) + token * word(record, R.OUT_STRIDE)
        factor = _norm_factor(record, x, y, bias, width)
        for i in range(first, last, LANES):
            value = _squared(x, y, bias, i)
            if y:
                v.store(word(record, R.TOTAL) + token * word(record, R.TOTAL_STRIDE) + 4 * i, value)
            v.store(out + 4 * i, v.mul(v.load(weight + 4 * i), v.mul(value, factor)))
        if word(record, R.Q):
            round_to_int8(record, token, out, first, last)


@kernel("rms-norm-one")
def rms_norm_one(record, thread, threads):
    """As `rms_norm`, for one token: every thread has the whole result, rounded where asked, and writes its slice."""
    width = word(record, R.WIDTH)
    weight, bias = word(record, R.WEIGHT), word(record, R.BIAS)
    x, y = word(record, R.IN), word(record, R.SECOND)
    own = copy(record, thread)
    factor = _norm_factor(record, x, y, bias, width)
    for i in range(0, width, LANES):
        v.store(own + 4 * i, v.mul(v.load(weight + 4 * i), v.mul(_squared(x, y, bias, i), factor)))
    if y:
        first, last = feature_share(1, width, thread, threads)
        for i in range(first, last, LANES):
            v.store(word(record, R.TOTAL) + 4 * i, _squared(x, y, bias, i))
    finish_copy(record, thread, width)
    _store_slice(record, own, thread, threads, width)


@helper
def gated(record, x, y, out, first, last):
    """out = activation(x) * y for some features of a token."""
    one = v.splat(float32(1.0))
    zero = v.splat(float32(0.0))
    if word(record, R.ACTIVATION) == R.SILU:
        for i in range(first, last, LANES):
            gate = v.load(x + 4 * i)
            silu = v.div(gate, v.add(one, v.exp(v.sub(zero, gate))))
            v.store(out + 4 * i, v.mul(silu, v.load(y + 4 * i)))
        return
    if word(record, R.ACTIVATION) == R.CLAMPED:
        limit = float_bits(word(record, R.LIMIT))
        high, low = v.splat(limit), v.splat(-limit)
        sharpness = v.splat(-float_bits(word(record, R.SHARPNESS)))
        for i in range(first, last, LANES):
            # In this order: what is no number stays so.
            gate = v.minimum(high, v.load(x + 4 * i))
            up = v.minimum(high, v.maximum(low, v.load(y + 4 * i)))
            swish = v.div(gate, v.add(one, v.exp(v.mul(sharpness, gate))))
            v.store(out + 4 * i, v.mul(v.add(up, one), swish))
        return
    # GELU's tanh(u) is 2 sigmoid(2u) - 1: x * sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
    for i in range(first, last, LANES):
        gate = v.load(x + 4 * i)
        cubic = v.fma(v.mul(gate, gate), v.splat(float32(0.044715)), one)
        negative = v.mul(v.mul(gate, cubic), v.splat(float32(-1.5957691216057308)))
        v.store(out + 4 * i, v.mul(v.div(gate, v.add(one, v.exp(negative))), v.load(y + 4 * i)))


@kernel("glu")
def glu(record, thread, threads):
    """out = activation(x) * y. The features may lie anywhere inside the blocks of `out` that cover them.

    The result is rounded to int8 as well where asked, which its whole blocks allow.
    """
    tokens, width = _tokens(record), word(record, R.WIDTH)
    begin, end = token_share(tokens, thread, threads)
    first, last = feature_share(tokens, width, thread, threads)
    for token in range(begin, end):
        x = word(record, R.IN) + token * word(record, R.IN_STRIDE)
        y = word(record, R.SECOND) + token * word(record, R.SECOND_STRIDE)
        out = word(record, R.OUT) + token * word(record, R.OUT_STRIDE)
        gated(record, x, y, out, first, last)
        if word(record, R.Q):
            round_to_int8(record, token, out, first, last)


@kernel("glu-one")
def glu_one(record, thread, threads):
    """As `glu`, for one token: every thread has the whole result, rounded where asked, and writes its slice."""
    width, own = word(record, R.WIDTH), copy(record, thread)
    gated(record, word(record, R.IN), word(record, R.SECOND), own, 0, width)
    finish_copy(record, thread, width)
    _store_slice(record, own, thread, threads, width)


@kernel("gated-add")
def gated_add(record, thread, threads):
    """out = x + sigmoid(gate) * y, a token's gate being one number."""
    tokens = _tokens(record)
    begin, end = token_share(tokens, thread, threads)
    first, last = feature_share(tokens, word(record, R.WIDTH), thread, threads)
    one = v.splat(float32(1.0))
    for token in range(begin, end):
        x = word(record, R.IN) + token * word(record, R.IN_STRIDE)
        y = word(record, R.SECOND) + token * word(record, R.SECOND_STRIDE)
        out = word(record, R.OUT) + token * word(record, R.OUT_STRIDE)
        gate = v.splat(load_f32(word(record, R.GATE) + token * word(record, R.GATE_STRIDE)))
        factor = v.div(one, v.add(one, v.exp(v.sub(v.splat(float32(0.0)), gate))))
        for i in range(first, last, LANES):
            v.store(out + 4 * i, v.fma(factor, v.load(y + 4 * i), v.load(x + 4 * i)))


@kernel("sum-parts")
def sum_parts(record, thread, threads):
    """out = the parts of all ranks, added in rank order."""
    tokens, width = _tokens(record), word(record, R.WIDTH)
    begin, end = token_share(tokens, thread, threads)
    first, last = feature_share(tokens, width, thread, threads)
    # A message holds the tokens of the batch and no more.
    part_bytes = tokens * word(record, R.IN_STRIDE)
    for token in range(begin, end):
        x = word(record, R.IN) + token * word(record, R.IN_STRIDE)
        out = word(record, R.OUT) + token * word(record, R.OUT_STRIDE)
        for i in range(first, last, LANES):
            value = v.load(x + 4 * i)
            for part in range(1, word(record, R.PARTS)):
                value = v.add(value, v.load(x + part * part_bytes + 4 * i))
            v.store(out + 4 * i, value)
