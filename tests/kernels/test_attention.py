"""Rotation, the cache and attention over it, against the reference: head sizes, groups of heads, pages and pieces."""

import numpy as np
import pytest

from tests.kernels.binding import TOLERANCES, Bound, FakeModel, assert_close, expected, reference, same_bits
from tpcpu.kernels import attention
from tpcpu.kernels import record as R
from tpcpu.parallel.partition import Range
from tpcpu.program.operations import Heads, Rope

VOCAB = 300


def fake(dim, heads, kv_of, *, stacked=False, local=None, full=None, seed=0):
    """Attention of `heads` over `max(kv_of) + 1` key/value heads; `stacked`: q and k alternate in one buffer."""
    model = FakeModel(seed)
    kv_heads = max(kv_of) + 1
    if stacked:
        qk = model.inputs(model.normal(VOCAB, 2 * heads * dim))
        q, k = Heads(qk, heads, dim, 0, 2 * dim), Heads(qk, heads, dim, dim, 2 * dim)
    else:
        q = Heads(model.inputs(model.normal(VOCAB, heads * dim)), heads, dim, 0, dim)
        k = Heads(model.inputs(model.normal(VOCAB, kv_heads * dim)), kv_heads, dim, 0, dim)
    v = Heads(model.inputs(model.normal(VOCAB, kv_heads * dim)), kv_heads, dim, 0, dim)
    rotated = model.rope_and_store(q, k, v, Rope(10000.0, dim))
    local = local or Range(0, heads)
    return model, model.result(model.attention(rotated, local, full or heads, kv_of, dim**-0.5))


def check(model, program, teams, steps, *, exact, tolerance=None, **settings):
    tolerance = tolerance or TOLERANCES["attention" if exact else "bfloat16 cache"]
    reader = reference(program, model.tensors, exact, dtype=np.float32, context=1024)
    bound = [Bound(program, model.tensors, team, exact=exact, tokens=300, **settings) for team in teams]
    for parts in steps:
        results = [each.run(*parts) for each in bound]
        assert all(same_bits(result, results[0]) for result in results)
        assert_close(results[0], expected(reader, *parts), tolerance)


HEADS = {
    "one head": (64, 1, (0,)),
    "small heads": (8, 8, (0, 0, 1, 1, 2, 2, 3, 3)),
    "heads of 80": (80, 3, (0, 1, 2)),
    "a group of all": (128, 4, (0, 0, 0, 0)),
    "a share that cuts groups": (24, 3, (0, 1, 1)),
    "groups of seven and of none": (16, 8, (0, 0, 0, 0, 0, 0, 0, 2)),
    "scattered groups": (48, 6, (1, 0, 1, 1, 0, 1)),
}
each_cache = pytest.mark.parametrize("exact", [False, True], ids=["bfloat16", "float32"])


@each_cache
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads(teams, heads, exact):
    steps = [[([3], 0, 0)], [([4, 5], 1, 0)], [(range(7), 3, 0)], [(range(20, 84), 10, 0)], [([9], 74, 0)]]
    check(*fake(*heads), teams, steps, exact=exact, context=128)


@each_cache
def test_large_heads(teams, exact):
    """Their sums of pieces need more room than those of any published model."""
    steps = [[(np.arange(270) % VOCAB, 0, 0)], [([3], 270, 0)], [(range(30), 271, 0)]]
    check(*fake(512, 3, (0, 1, 0)), teams, steps, exact=exact, context=520)


@each_cache
def test_heads_of_queries_and_keys_alternate(teams, exact):
    check(*fake(32, 3, (0, 1, 2), stacked=True), teams, [[(range(30), 0, 0)], [([3], 30, 0)]], exact=exact)


def test_heads_of_a_share_lie_inside_their_blocks(teams):
    model, program = fake(24, 3, (0, 0, 1), local=Range(3, 6), full=8)
    out = program.operations[-2].out
    assert (out.width, out.own) == (128, Range(8, 80))
    check(model, program, teams, [[(range(9), 0, 0)], [([3], 9, 0)]], exact=True)


@each_cache
@pytest.mark.parametrize("page_tokens", [16, 48, 64, 256, 1024])
def test_contexts_of_several_pieces(teams, page_tokens, exact):
    """One token, few and many at once, at lengths around the ends of tiles, pages and pieces."""
    model, program = fake(16, 2, (0, 0))
    lengths = (255, 256, 257, 511, 520, 521, 529, 767, 768, 800)
    steps, at = [], 0
    for length in lengths:
        steps.append([(np.arange(at, length) % VOCAB, at, 0)])
        at = length
    check(model, program, teams, steps, exact=exact, context=800, page_tokens=page_tokens)


@each_cache
@pytest.mark.parametrize("dim", [64, 80])
def test_groups_over_several_pieces(teams, dim, exact):
    """Registers for one, two and four heads of a group, with values in whole blocks of registers and beside them."""
    model, program = fake(dim, 9, (2, 0, 0, 0, 0, 0, 0, 0, 1))
    steps, at = [], 0
    for length in (254, 255, 256, 257, 272, 273, 530, 531):
        steps.append([(np.arange(at, length) % VOCAB, at, 0)])
        at = length
    check(model, program, teams, steps, exact=exact, context=540, page_tokens=48)


def test_what_is_read_is_not_overwritten(teams):
    """One token's attention reads the projections, which the rotation before it was said to read last."""
    model = FakeModel()
    x = model.inputs(model.normal(VOCAB, 64))
    for layer in range(2):
        q, k, v = model.linear(
            x, **{name: model.hold(model.matrix(f"{layer}.{name}", (64, 64)), "bf16") for name in "qkv"}
        )
        rotated = model.rope_and_store(*[Heads(each, 4, 16, 0, 16) for each in (q, k, v)], Rope(10000.0, 16))
        x = model.attention(rotated, Range(0, 4), 4, (0, 1, 2, 3), 0.25)
    compiled = Bound(model.result(x), model.tensors, teams[0]).compiled
    records = compiled._array[compiled._array[:, R.KERNELS] == attention.attend_one(R.BF16).address]
    assert len(records) == 2
    read = [{int(record[word]) for word in (R.A_Q, R.A_K, R.A_V)} for record in records]
    rotated = [int(record[R.A_ROTATED]) for record in records]
    for record, sources, queries in zip(records, read, rotated, strict=True):
        assert len(sources | {queries, int(record[R.A_OUT])}) == 5
    assert read[1] < read[0] | {rotated[0]}, "afterwards their memory is used again"


@each_cache
def test_sequences_side_by_side(teams, exact):
    """Each token sees its own sequence only; lengths of one piece and of several in one batch."""
    model, program = fake(16, 2, (0, 1))
    steps = [
        [(range(300), 0, 0)],
        [(range(5), 0, 1), (range(200), 300, 0)],
        [([1], 5, 1), ([2], 500, 0), ([3, 4], 0, 2)],
        [([5], 6, 1)],
        [(range(40, 60), 7, 1), (range(60, 80), 501, 0), ([5], 2, 2)],
    ]
    check(model, program, teams, steps, exact=exact, context=600)


def test_one_score_far_above_the_others(teams):
    """Large scores of either sign: the maximum is subtracted before exp, in every piece and where pieces join."""
    model, program = fake(16, 2, (0, 0))
    for name in ("inputs0.weight", "inputs1.weight"):
        model.tensors[name].stored[:] *= np.float32(12)
    steps = [[(np.arange(300) % VOCAB, 0, 0)], [([1], 300, 0)], [(range(290), 301, 0)]]
    # Scores of a thousand are rounded to 1e-4, and exp makes of that a relative error.
    check(model, program, teams, steps, exact=True, tolerance=2e-4, context=600)


def test_a_cache_that_was_used_before(teams):
    """What lies behind a sequence's end, here infinities, is not looked at."""
    model, program = fake(16, 2, (0, 0))
    for team in teams:
        bound = Bound(program, model.tensors, team, exact=True, tokens=64)
        clean = bound.run((range(5), 0, 0))
        for memory in bound.cache._arenas:
            np.asarray(memory).view(np.float32)[:] = np.inf
        assert same_bits(bound.run((range(5), 0, 0)), clean)


def test_no_heads(teams):
    """More ranks than heads: nothing to attend with, and no key or value to keep."""
    model = FakeModel()
    (none,) = model.linear(
        model.inputs(model.normal(VOCAB, 64)), none=model.hold(model.matrix("q", (64, 64), rows=Range(0, 0)), "bf16")
    )
    rotated = model.rope_and_store(*[Heads(none, 0, 16, 0, 16)] * 3, Rope(10000.0, 16))
    out = model.attention(rotated, Range(0, 0), 4, (), 0.25)
    (y,) = model.linear(out, y=model.hold(model.matrix("o", (20, 64), columns=Range(0, 0)), "bf16"))
    program = model.result(y)
    for team in teams:
        assert not Bound(program, model.tensors, team, exact=True).run((range(9), 0, 0)).any()
