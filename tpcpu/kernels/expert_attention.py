"""Scores of a token's experts by attention to one another; the formula is `operations.ExpertAttention`.

Every score is one thread's from end to end, so its bits depend on neither the threads nor the tokens beside it.
"""

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.activations import word
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.memory import load_f32, store_f32
from tpcpu.kernels.simd import vectors as v

LANES = v.LANES
LOWEST = float32(-3.4e38)


@helper
def _score(query, k, values, count):
    """sum_j softmax_j(query * k_j) values_j over `count` experts."""
    q, largest = v.splat(query), v.splat(LOWEST)
    for i in range(0, count, LANES):
        largest = v.maximum(largest, v.first_lanes(v.mul(q, v.load(k + 4 * i)), count - i, LOWEST))
    peak = v.splat(v.max_lanes(largest))
    total, weighted = v.splat(float32(0.0)), v.splat(float32(0.0))
    for i in range(0, count, LANES):
        weights = v.exp(v.sub(v.mul(q, v.load(k + 4 * i)), peak))
        total = v.add(total, v.first_lanes(weights, count - i, float32(0.0)))
        # What lies behind the last expert may be no number.
        weighted = v.add(weighted, v.first_lanes(v.mul(weights, v.load(values + 4 * i)), count - i, float32(0.0)))
    return v.sum_lanes(weighted) / v.sum_lanes(total)


@kernel("expert-attention")
def attend(record, thread, threads):
    """The scores of all tokens, divided over the threads."""
    count = word(record, R.WIDTH)
    scores = word(word(record, R.STEP), R.TOKENS) * count
    for number in range(scores * thread // threads, scores * (thread + 1) // threads):
        token, expert = number // count, number % count
        q = word(record, R.IN) + token * word(record, R.IN_STRIDE)
        k = word(record, R.SECOND) + token * word(record, R.SECOND_STRIDE)
        values = word(record, R.THIRD) + token * word(record, R.THIRD_STRIDE)
        score = _score(load_f32(q + 4 * expert), k, values, count)
        store_f32(word(record, R.OUT) + token * word(record, R.OUT_STRIDE) + 4 * expert, score)
