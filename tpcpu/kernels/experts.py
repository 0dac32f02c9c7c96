"""Mixtures of experts: who chooses whom, and products in which every token has matrices of its own.

A token and an expert that it chose are a pair. Of one token every thread chooses for itself, and puts the segments of
the chosen experts together to one product, which threads share like any other. Of several tokens pairs are put in the
order of their experts: each expert's are then a product of as many tokens, of which a thread has some panels, about as
much work as every other. Products themselves are those of `linear.py` and `gemm.py`, called by address with a record of
the thread's own, so a pair's sums have the same bits on every way; and a token's pairs are added in the order of its
choice, whoever else is there.
"""

from numpy import float32

from tpcpu.kernels import record as R
from tpcpu.kernels.activations import feature_share, gated, token_share, word
from tpcpu.kernels.compile import helper, kernel
from tpcpu.kernels.isa import selected
from tpcpu.kernels.memory import call_kernel, float_bits, load_f32, load_i32, store_f32, store_i32, store_i64
from tpcpu.kernels.rounding import round_to_int8
from tpcpu.kernels.simd import vectors as v

ROWS = selected().panel_rows
LANES = v.LANES
BLOCK = R.BLOCK

UNPACKING = 8
"""Unpacking a panel is as much work as multiplying it with so many tokens."""


NEVER = float32(-float("inf"))
SMALLEST = float32(1e-20)
"""Added to a sum of weights, so that none of them is divided by 0."""


def choice_bytes(experts: int, groups: int) -> int:
    """What a thread needs to choose: what is compared, then of each group its sum and whether it is kept."""
    return 4 * (experts + 2 * groups + 2 * LANES)


def own_bytes(segments: int) -> int:
    """What a thread needs for products of so many segments: a record, a count, segments."""
    return 8 * (R.RECORD_WORDS + 8 + segments * R.SEGMENT_WORDS)


@helper
def _tokens(record):
    return word(word(record, R.STEP), R.TOKENS)


@helper
def _largest(scores, count, after, last):
    """The largest score behind score `after` of number `last` in the order of size, then of number; -1 if none is."""
    found, best = -1, float32(0.0)
    for i in range(count):
        score = load_f32(scores + 4 * i)
        follows = last < 0 or score < after or (score == after and i > last)
        if follows and (found < 0 or score > best):
            found, best = i, score
    return found


@helper
def _p(record, scores, largest):
    """A register of e^(score - largest), or of sigmoids."""
    if word(record, R.T_SIGMOID):
        one = v.splat(float32(1.0))
        return v.div(one, v.add(one, v.exp(v.sub(v.splat(float32(0.0)), v.load(scores)))))
    return v.exp(v.sub(v.load(scores), largest))


@helper
def _keep_groups(record, compared, count):
    """Puts all experts out of the running that are not in the best groups."""
    groups, top, best = word(record, R.T_GROUPS), word(record, R.T_TOP_GROUPS), word(record, R.T_GROUP_BEST)
    size, sums = count // groups, compared + 4 * count
    kept = sums + 4 * groups
    for group in range(groups):
        first, last, after, total = compared + 4 * group * size, -1, float32(0.0), float32(0.0)
        for _ in range(best):
            last = max(_largest(first, size, after, last), 0)
            after = load_f32(first + 4 * last)
            total += after
        store_f32(sums + 4 * group, total)
        store_f32(kept + 4 * group, float32(0.0))
    last, after = -1, float32(0.0)
    for _ in range(top):
        last = max(_largest(sums, groups, after, last), 0)
        after = load_f32(sums + 4 * last)
        store_f32(kept + 4 * last, float32(1.0))
    for i in range(count):
        if load_f32(kept + 4 * (i // size)) == float32(0.0):
            store_f32(compared + 4 * i, NEVER)


@helper
def _compared(record, scores, count, largest, whole, own):
    """What is compared: scores themselves, whose order softmax keeps, or in a thread's memory p and what is added."""
    bias, groups = word(record, R.BIAS), word(record, R.T_GROUPS)
    if bias == 0 and groups == 1:
        return scores
    for i in range(0, count, LANES):
        some = v.load(scores + 4 * i)
        if bias:
            some = v.add(v.div(_p(record, scores + 4 * i, largest), whole), v.load(bias + 4 * i))
        v.store(own + 4 * i, some)
    if groups > 1:
        _keep_groups(record, own, count)
    return own


@helper
def _choose(record, scores, out, own):
    """The numbers of a token's experts and their weights."""
    count, top, sigmoid = word(record, R.WIDTH), word(record, R.E_TOP), word(record, R.T_SIGMOID)
    largest = v.splat(load_f32(scores + 4 * max(_largest(scores, count, float32(0.0), -1), 0)))
    total = v.splat(float32(0.0))
    for i in range(0, count, LANES):
        total = v.add(total, v.first_lanes(_p(record, scores + 4 * i, largest), count - i, float32(0.0)))
    whole, chosen = v.sum_lanes(total), float32(0.0)
    # A score that is no number spoils all weights of its token.
    spoiled = whole - whole
    if sigmoid:
        whole = float32(1.0)
    compared = _compared(record, scores, count, largest, v.splat(whole), own)
    last, after = -1, float32(0.0)
    for place in range(top):
        last = _largest(compared, count, after, last)
        # Where scores are not numbers, neither is the result; experts it must have.
        last = max(last, 0)
        after = load_f32(compared + 4 * last)
        store_f32(out + 4 * place, float32(last))
        weight = v.first_lane(_p(record, scores + 4 * last, largest))
        chosen += weight
        store_f32(out + 4 * (top + place), weight)
    if word(record, R.E_NORMALISED):
        whole = chosen + SMALLEST
    factor = float_bits(word(record, R.T_FACTOR)) + spoiled
    for place in range(top):
        at = out + 4 * (top + place)
        store_f32(at, load_f32(at) / whole * factor)


@helper
def _choice_memory(record, thread):
    return word(record, R.T_OWN) + thread * word(record, R.T_OWN_STRIDE)


@kernel("route")
def route(record, thread, threads):
    """Chooses the experts of each token."""
    tokens = _tokens(record)
    for token in range(tokens * thread // threads, tokens * (thread + 1) // threads):
        scores = word(record, R.IN) + token * word(record, R.IN_STRIDE)
        out = word(record, R.E_CHOICE) + token * word(record, R.E_CHOICE_STRIDE)
        _choose(record, scores, out, _choice_memory(record, thread))


@helper
def _own_choice(record, thread):
    """A thread's copy of what the only token has chosen."""
    return word(record, R.E_CHOICE_ONE) + thread * word(record, R.E_CHOICE_STRIDE)


@kernel("route-one")
def route_one(record, thread, _threads):
    """Chooses the experts of the one token, every thread for itself."""
    _choose(record, word(record, R.IN), _own_choice(record, thread), _choice_memory(record, thread))


@kernel("arrange-pairs")
def arrange(record, thread, _threads):
    """Numbers the pairs expert by expert, those of an expert by token."""
    if thread != 0:
        return
    tokens, top, experts = _tokens(record), word(record, R.E_TOP), word(record, R.E_EXPERTS)
    starts, pairs, numbers = word(record, R.E_STARTS), word(record, R.E_PAIRS), word(record, R.E_NUMBERS)
    for expert in range(experts + 1):
        store_i32(starts + 4 * expert, 0)
    for token in range(tokens):
        choice = word(record, R.E_CHOICE) + token * word(record, R.E_CHOICE_STRIDE)
        for place in range(top):
            behind = starts + 4 * (int(load_f32(choice + 4 * place)) + 1)
            store_i32(behind, load_i32(behind) + 1)
    for expert in range(experts):
        behind = starts + 4 * (expert + 1)
        store_i32(behind, load_i32(behind) + load_i32(behind - 4))
    for token in range(tokens):
        choice = word(record, R.E_CHOICE) + token * word(record, R.E_CHOICE_STRIDE)
        for place in range(top):
            # Starts move on while their pairs are numbered, each to the start of the next.
            at = starts + 4 * int(load_f32(choice + 4 * place))
            pair = load_i32(at)
            store_i32(at, pair + 1)
            store_i32(pairs + 4 * pair, token)
            store_i32(numbers + 4 * (token * top + place), pair)
    for expert in range(experts, 0, -1):
        store_i32(starts + 4 * expert, load_i32(starts + 4 * (expert - 1)))
    store_i32(starts, 0)


@helper
def _copy(source, target, count):
    """`count` bytes, rounded up to whole registers."""
    for i in range(0, count, 4 * LANES):
        v.store(target + i, v.load(source + i))


@kernel("gather-pairs")
def gather(record, thread, threads):
    """Lays the activations of each pair's token in the order of pairs."""
    pairs = _tokens(record) * word(record, R.E_TOP)
    stride, scales_stride = word(record, R.X_STRIDE), word(record, R.X_SCALES_STRIDE)
    # Behind the scales of a row is room for a register, and no more.
    scales_bytes = scales_stride - 64
    for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
        token = load_i32(word(record, R.E_PAIRS) + 4 * pair)
        _copy(word(record, R.X) + token * stride, word(record, R.E_X) + pair * stride, stride)
        if scales_stride:
            at, to = token * scales_stride, pair * scales_stride
            _copy(word(record, R.X_SCALES) + at, word(record, R.E_X_SCALES) + to, scales_bytes)
            _copy(word(record, R.X_SUMS) + at, word(record, R.E_X_SUMS) + to, scales_bytes)


@helper
def _own_record(record, thread):
    """A copy of the record that a thread may change; what belongs to each thread is this one's there."""
    own = word(record, R.E_OWN) + thread * word(record, R.E_OWN_STRIDE)
    for i in range(R.RECORD_WORDS):
        store_i64(own + 8 * i, word(record, i))
    for i in range(3):
        store_i64(own + 8 * (R.KERNELS + i), word(record, R.E_KERNELS + i))
    store_i64(own + 8 * R.SEGMENTS, own + 8 * (R.RECORD_WORDS + 8))
    return own


@helper
def _set(record, number, value):
    store_i64(record + 8 * number, value)


@kernel("linear-experts-of-one")
def product_of_one(record, thread, threads):
    """The matrices of the one token's experts, one after another, times its activations: a product like any other."""
    own, choice = _own_record(record, thread), _own_choice(record, thread)
    top, parts, apart = word(record, R.E_TOP), word(record, R.E_PARTS), word(record, R.E_APART)
    segment, panels = word(own, R.SEGMENTS), 0
    for place in range(top):
        number = int(load_f32(choice + 4 * place))
        source = word(record, R.E_SEGMENTS) + 8 * R.SEGMENT_WORDS * parts * number
        for _ in range(parts):
            for i in range(R.SEGMENT_WORDS):
                _set(segment, i, word(source, i))
            _set(segment, R.S_OUT_ONE, word(source, R.S_OUT) + place * word(source, R.S_OUT_STRIDE))
            if apart:
                _set(segment, R.S_ROW_ONE, thread * top + place)
            panels += word(source, R.S_PANELS)
            source += 8 * R.SEGMENT_WORDS
            segment += 8 * R.SEGMENT_WORDS
    _set(own, R.SEGMENT_COUNT, top * parts)
    _set(own, R.PANELS, panels)
    call_kernel(word(own, R.KERNELS), own, thread, threads)


@helper
def _panels(segment, parts):
    """Panels of an expert's segments."""
    panels = 0
    for part in range(parts):
        panels += word(segment + 8 * R.SEGMENT_WORDS * part, R.S_PANELS)
    return panels


@helper
def _cut(record, source, segment, first, stop, pair):
    """Makes `segment` panels `first` to `stop` of another, its results those of pairs from `pair` on."""
    first, stop = max(first, 0), min(stop, word(source, R.S_PANELS))
    panels = max(stop - first, 0)
    for i in range(R.SEGMENT_WORDS):
        _set(segment, i, word(source, i))
    row = first * ROWS
    _set(segment, R.S_VALUES, word(source, R.S_VALUES) + first * word(record, R.E_PANEL_BYTES))
    _set(segment, R.S_SCALES, word(source, R.S_SCALES) + first * word(record, R.E_SCALES_BYTES))
    _set(segment, R.S_FIRST_BLOCK, word(source, R.S_FIRST_BLOCK) + row * word(source, R.S_FULL_BLOCKS))
    _set(segment, R.S_ROWS, max(min(word(source, R.S_ROWS) - row, panels * ROWS), 0))
    _set(segment, R.S_PANELS, panels)
    _set(segment, R.S_OUT, word(source, R.S_OUT) + 4 * row + pair * word(source, R.S_OUT_STRIDE))
    if word(source, R.S_BIAS):
        _set(segment, R.S_BIAS, word(source, R.S_BIAS) + 4 * row)
    return panels


@helper
def _units_before(work, begin, unit, units):
    """Of `units` that begin at `begin`, each of `unit` work, those that begin before `work`."""
    return min(max((work - begin + unit - 1) // unit, 0), units)


@kernel("linear-experts")
def product(record, thread, threads):
    """Each expert's matrices times the activations of its pairs. Threads have as much work each, in whole panels."""
    own = _own_record(record, thread)
    experts, parts, starts = word(record, R.E_EXPERTS), word(record, R.E_PARTS), word(record, R.E_STARTS)
    expert_bytes = 8 * R.SEGMENT_WORDS * parts
    work = 0
    for expert in range(experts):
        many = load_i32(starts + 4 * (expert + 1)) - load_i32(starts + 4 * expert)
        if many:
            work += (many + UNPACKING) * _panels(word(record, R.E_SEGMENTS) + expert * expert_bytes, parts)
    begin, end = work * thread // threads, work * (thread + 1) // threads
    count = own + 8 * R.RECORD_WORDS
    _set(own, R.COUNT, count)
    _set(own, R.SEGMENT_COUNT, parts)
    # It multiplies by itself: what belongs to thread 0 of one is this thread's.
    _set(own, R.ROOM, word(record, R.ROOM) + thread * word(record, R.ROOM_STRIDE))
    _set(own, R.SCRATCH, word(record, R.SCRATCH) + thread * word(record, R.SCRATCH_STRIDE))
    done = 0
    for expert in range(experts):
        pair = load_i32(starts + 4 * expert)
        many = load_i32(starts + 4 * (expert + 1)) - pair
        if many == 0 or done >= end:
            continue
        source, segment = word(record, R.E_SEGMENTS) + expert * expert_bytes, word(own, R.SEGMENTS)
        panels = _panels(source, parts)
        first = _units_before(begin, done, many + UNPACKING, panels)
        stop = _units_before(end, done, many + UNPACKING, panels)
        done += (many + UNPACKING) * panels
        if first >= stop:
            continue
        held = 0
        for _ in range(parts):
            held += _cut(record, source, segment, first, stop, pair)
            first -= word(source, R.S_PANELS)
            stop -= word(source, R.S_PANELS)
            source += 8 * R.SEGMENT_WORDS
            segment += 8 * R.SEGMENT_WORDS
        _set(own, R.PANELS, held)
        store_i64(count, many)
        _set(own, R.X, word(record, R.E_X) + pair * word(record, R.X_STRIDE))
        _set(own, R.X_SCALES, word(record, R.E_X_SCALES) + pair * word(record, R.X_SCALES_STRIDE))
        _set(own, R.X_SUMS, word(record, R.E_X_SUMS) + pair * word(record, R.X_SCALES_STRIDE))
        call_kernel(word(own, R.KERNELS + 2), own, 0, 1)


@helper
def _gate(record, source, row):
    """Row `row` of what `down` multiplies, of row `source` of gates and ups; zero outside its own columns."""
    x = word(record, R.IN) + source * word(record, R.IN_STRIDE)
    y = word(record, R.SECOND) + source * word(record, R.SECOND_STRIDE)
    out = word(record, R.OUT) + row * word(record, R.OUT_STRIDE)
    width, first, columns = word(record, R.WIDTH), word(record, R.E_FIRST), word(record, R.E_COLUMNS)
    gated(record, x, y, out + 4 * first, 0, width)
    for i in range(first + width, columns):
        store_f32(out + 4 * i, float32(0.0))
    if word(record, R.Q):
        round_to_int8(record, row, out, 0, columns)


@kernel("gate-pairs")
def gate(record, thread, threads):
    """activation(gate) * up of every pair, rounded to int8 as well where asked."""
    pairs = _tokens(record) * word(record, R.E_TOP)
    for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
        _gate(record, pair, pair)


@kernel("gate-pairs-of-one")
def gate_of_one(record, thread, _threads):
    """The same for one token: every thread has rows of its own."""
    top = word(record, R.E_TOP)
    for place in range(top):
        _gate(record, place, thread * top + place)


@helper
def _weighted(record, choice, place, pair, i, total):
    """Adds features i and following of a pair, by its weight."""
    at = word(record, R.IN) + pair * word(record, R.IN_STRIDE) + 4 * i
    weight = load_f32(choice + 4 * (word(record, R.E_TOP) + place))
    return v.fma(v.splat(weight), v.load(at), total)


@kernel("sum-pairs")
def combine(record, thread, threads):
    """out = the results of each token's experts by their weights, added in the order of its choice."""
    tokens, top, numbers = _tokens(record), word(record, R.E_TOP), word(record, R.E_NUMBERS)
    begin, end = token_share(tokens, thread, threads)
    first, last = feature_share(tokens, word(record, R.WIDTH), thread, threads)
    for token in range(begin, end):
        choice = word(record, R.E_CHOICE) + token * word(record, R.E_CHOICE_STRIDE)
        out = word(record, R.OUT) + token * word(record, R.OUT_STRIDE)
        for i in range(first, last, LANES):
            total = v.splat(float32(0.0))
            for place in range(top):
                pair = load_i32(numbers + 4 * (token * top + place))
                total = _weighted(record, choice, place, pair, i, total)
            v.store(out + 4 * i, total)


@kernel("sum-pairs-of-one")
def combine_of_one(record, thread, threads):
    """The same for one token: every thread adds up its slice."""
    choice = _own_choice(record, thread)
    first, last = feature_share(1, word(record, R.WIDTH), thread, threads)
    for i in range(first, last, LANES):
        total = v.splat(float32(0.0))
        for place in range(word(record, R.E_TOP)):
            total = _weighted(record, choice, place, place, i, total)
        v.store(word(record, R.OUT) + 4 * i, total)
