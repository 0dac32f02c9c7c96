"""Rotation, the cache and attention over it, against the reference: head sizes, groups, blocks, pages and pieces."""

import numpy as np
import pytest

from tests.kernels.binding import TOLERANCES, Bound, FakeModel, Held, assert_close, expected, reference, same_bits
from tpcpu.kernels import attention
from tpcpu.kernels import record as R
from tpcpu.kernels.attention_pieces import BLOCK_ROWS, part_bytes
from tpcpu.parallel.partition import Range
from tpcpu.program.attending import FEW_TOKENS
from tpcpu.program.kv_format import KV_FORMATS
from tpcpu.program.operations import Heads
from tpcpu.program.rope import DynamicScaling, Rope

VOCAB = 300


def fake(
    dim, heads, kv_of, *, stacked=False, local=None, full=None, window=0, seed=0, rope=None, norms=False, sinks=None,
    **scores,
):  # fmt: skip
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
    weights = [model.vector(f"{name}_norm.weight", dim) for name in "qk" if norms]
    for weight in weights:
        model.hold((weight, None), "float32", 1 + model.normal(dim) / 4)
    rotated = model.rope_and_store(q, k, v, rope or Rope(10000.0, dim), weights, 1e-6)
    local = local or Range(0, heads)
    if sinks is not None:
        scores["sinks"] = model.vector("sinks", heads)
        model.tensors["sinks"] = Held.of(np.array(sinks), "float32")
    return model, model.result(model.attention(rotated, local, full or heads, kv_of, dim**-0.5, window, **scores))


def check(model, program, teams, steps, *, cache, tolerance=None, **settings):
    exact = cache == "float32"
    tolerance = tolerance or TOLERANCES[{"float32": "attention", "bf16": "bfloat16 cache", "int8": "int8 cache"}[cache]]
    reader = reference(program, model.tensors, exact, dtype=np.float32, context=1024, kv=cache)
    bound = [Bound(program, model.tensors, team, exact=exact, tokens=300, kv=cache, **settings) for team in teams]
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
each_cache = pytest.mark.parametrize("cache", KV_FORMATS)


@each_cache
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads(teams, heads, cache):
    steps = [[([3], 0, 0)], [([4, 5], 1, 0)], [(range(7), 3, 0)], [(range(20, 84), 10, 0)], [([9], 74, 0)]]
    check(*fake(*heads), teams, steps, cache=cache, context=128)


@each_cache
def test_large_heads(teams, cache):
    """Their sums of pieces need more room than those of any published model."""
    steps = [[(np.arange(270) % VOCAB, 0, 0)], [([3], 270, 0)], [(range(30), 271, 0)]]
    check(*fake(512, 3, (0, 1, 0)), teams, steps, cache=cache, context=520)


@each_cache
def test_heads_of_queries_and_keys_alternate(teams, cache):
    check(*fake(32, 3, (0, 1, 2), stacked=True), teams, [[(range(30), 0, 0)], [([3], 30, 0)]], cache=cache)


VARIANTS = {
    "norms": {"norms": True},
    "a part is rotated": {"rope": Rope(10000.0, 24)},
    "neighbours are rotated": {"rope": Rope(10000.0, 16, interleaved=True), "norms": True},
    "nothing is rotated": {"rope": Rope(10000.0, 0), "slopes": (0.5, 0.25, 0.0)},
    "a longer base behind some position": {"rope": Rope(10000.0, 40, DynamicScaling(4.0, 100), 1.25)},
    "scores are capped": {"cap": 2.0},
    "sinks": {"sinks": (3.0, -1.0, 0.5), "window": 30},
    "all at once": {
        "rope": Rope(500.0, 32), "norms": True, "cap": 3.0, "slopes": (1.0, 0.01, 2.0), "window": 30,
        "sinks": (1.0, 2.0, -3.0),
    },
}  # fmt: skip


@each_cache
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(teams, variant, cache):
    """One token, few and many, over two pieces of the cache, in heads that are no whole registers."""
    model, program = fake(40, 3, (0, 1, 1), **variant)
    steps = [
        [([3], 0, 0)],
        [(range(7), 1, 0)],
        [(range(250), 8, 0)],
        [([9], 258, 0)],
        [(range(5), 259, 0), ([4], 0, 1)],
    ]
    check(model, program, teams, steps, cache=cache, context=300)


def latent(heads, dim, turned, **scores):
    """Attention of heads that read one key, whose first `dim` dimensions are its value."""
    model = FakeModel()
    sources = [
        Heads(model.inputs(model.normal(VOCAB, count * (size + 4))), count, size, 4, size + 4)
        for count in (heads, 1) for size in (dim, turned)
    ]  # fmt: skip
    rotated = model.rope_and_store_latent(*sources, Rope(10000.0, turned, interleaved=True))
    out = model.attention(
        rotated, Range(0, heads), heads, (0,) * heads, (dim + turned) ** -0.5, value_dim=dim, **scores
    )  # fmt: skip
    return model, model.result(out)


LATENT = {
    "as published": {"heads": 16, "dim": 512, "turned": 64},
    "no whole registers": {"heads": 19, "dim": 40, "turned": 12},
    "one head": {"heads": 1, "dim": 64, "turned": 16},
    "all at once": {"heads": 10, "dim": 24, "turned": 6, "cap": 2.0, "window": 200, "slopes": (0.1, 1.0) * 5},
}


@pytest.mark.parametrize(
    "cache", ["bf16", *(pytest.param(each, marks=pytest.mark.full) for each in ("float32", "int8"))]
)
@pytest.mark.parametrize("variant", LATENT.values(), ids=LATENT)
def test_values_that_lie_in_keys(teams, variant, cache):
    """One token, few and many, in blocks of several tokens and of one, in pages and over several pieces."""
    steps, at = [], 0
    for size in (1, 3, 8, 9, 65, 1, 170, 1, 1, 1, 260, 1, 7):
        steps.append([(np.arange(at, at + size) % VOCAB, at, 0)])
        at += size
    steps += [[([4, 5], 0, 1), ([7], at, 0)], [([6], 2, 1), (range(20), at + 1, 0)]]
    check(*latent(**variant), teams, steps, cache=cache, context=at + 30, page_tokens=48)


def test_values_in_keys_are_no_company(teams):
    """A head's result is the same bits token by token, in few and in many, beside another sequence, in any pages."""
    model, program = latent(10, 40, 12)
    ids = np.arange(560) * 7 % VOCAB

    def attend(team, sizes, page_tokens, beside=0):
        bound = Bound(program, model.tensors, team, tokens=300, context=600, page_tokens=page_tokens)
        got, at, step = [], 0, 0
        while at < len(ids):
            size = min(sizes[step % len(sizes)], len(ids) - at)
            before = [(ids[step : step + 1], step, 1)] if beside else []
            got.append(bound.run(*before, (ids[at : at + size], at, 0))[len(before) :])
            at, step = at + size, step + 1
        return np.concatenate(got)

    wanted = attend(teams[0], [1], 64)
    assert same_bits(attend(teams[2], [1], 16), wanted)
    assert same_bits(attend(teams[1], [5, 1, 8], 48), wanted)
    assert same_bits(attend(teams[2], [300], 256), wanted)
    assert same_bits(attend(teams[1], [63, 9, 1, 70], 48, beside=1), wanted)


@pytest.mark.parametrize("cache", ["float32", "bf16"])
def test_keys_that_are_no_numbers(teams, cache):
    """Who sees one is none either, token by token as in a prompt; who comes before it is spared."""
    model, program = fake(40, 3, (0, 1, 1))
    model.tensors["inputs1.weight"].stored[7] = np.nan
    for team in teams:
        bound = Bound(program, model.tensors, team, exact=cache == "float32", kv=cache)
        steps = [([5, 6], 0, 0), ([7], 2, 0), ([8], 3, 0), (range(5, 45), 0, 1)]
        for tokens, first, number in steps:
            wrong = [first + place >= 2 for place in range(len(tokens))]
            assert (np.isnan(bound.run((tokens, first, number))).any(axis=1) == wrong).all()


def test_sinks_in_numbers(teams):
    """Against the formula: one column of scores more, of which the softmax's weights are dropped."""
    sinks = np.array([0.0, 5.0, -5.0, 200.0, -200.0], np.float32)
    model, program = fake(16, 5, (0, 0, 1, 1, 1), sinks=sinks, rope=Rope(10000.0, 0))
    q, k, v = (model.tensors[f"inputs{number}.weight"].stored.astype(np.float64) for number in range(3))
    keys, values = (each[:300].reshape(300, 2, 16)[:, [0, 0, 1, 1, 1]] for each in (k, v))
    scores = np.einsum("hd,phd->hp", q[299].reshape(5, 16), keys) / 4
    scores = np.concatenate((scores, sinks[:, None]), axis=1)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights = (weights / weights.sum(axis=1, keepdims=True))[:, :-1]
    wanted = np.einsum("hp,phd->hd", weights, values).ravel()
    for team in teams:
        bound = Bound(program, model.tensors, team, exact=True, tokens=300, context=300)
        many = bound.run((range(299), 0, 0), wanted=[298])
        assert np.isfinite(many).all()
        one = bound.run(([299], 299, 0))
        assert np.abs(one - wanted).max() < 1e-5


def test_heads_of_a_share_lie_inside_their_blocks(teams):
    model, program = fake(24, 3, (0, 0, 1), local=Range(3, 6), full=8)
    out = program.operations[-2].out
    assert (out.width, out.own) == (128, Range(8, 80))
    check(model, program, teams, [[(range(9), 0, 0)], [([3], 9, 0)]], cache="float32")


@each_cache
@pytest.mark.parametrize("page_tokens", [16, 48, 64, 256, 1024])
def test_contexts_of_several_pieces(teams, page_tokens, cache):
    """One token, few and many at once, at lengths around the ends of tiles, pages and pieces."""
    model, program = fake(16, 2, (0, 0))
    lengths = (255, 256, 257, 511, 520, 521, 529, 767, 768, 800)
    steps, at = [], 0
    for length in lengths:
        steps.append([(np.arange(at, length) % VOCAB, at, 0)])
        at = length
    check(model, program, teams, steps, cache=cache, context=800, page_tokens=page_tokens)


@each_cache
@pytest.mark.parametrize("dim", [64, 80])
def test_groups_over_several_pieces(teams, dim, cache):
    """Registers for one, two and four heads of a group, with values in whole blocks of registers and beside them."""
    model, program = fake(dim, 9, (2, 0, 0, 0, 0, 0, 0, 0, 1))
    steps, at = [], 0
    for length in (254, 255, 256, 257, 272, 273, 530, 531):
        steps.append([(np.arange(at, length) % VOCAB, at, 0)])
        at = length
    check(model, program, teams, steps, cache=cache, context=540, page_tokens=48)


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
    records = compiled._array[compiled._array[:, R.KERNELS] == attention.attend_one(R.BF16, False).address]
    assert len(records) == 2
    read = [{int(record[word]) for word in (R.A_Q, R.A_K, R.A_V)} for record in records]
    rotated = [int(record[R.A_ROTATED]) for record in records]
    for record, sources, queries in zip(records, read, rotated, strict=True):
        assert len(sources | {queries, int(record[R.A_OUT])}) == 5
    assert read[1] < read[0] | {rotated[0]}, "afterwards their memory is used again"


@each_cache
def test_sequences_side_by_side(teams, cache):
    """Each token sees its own sequence only; lengths of one piece and of several in one batch."""
    model, program = fake(16, 2, (0, 1))
    steps = [
        [(range(300), 0, 0)],
        [(range(5), 0, 1), (range(200), 300, 0)],
        [([1], 5, 1), ([2], 500, 0), ([3, 4], 0, 2)],
        [([5], 6, 1)],
        [(range(40, 60), 7, 1), (range(60, 80), 501, 0), ([5], 2, 2)],
    ]
    check(model, program, teams, steps, cache=cache, context=600)


def test_one_score_far_above_the_others(teams):
    """Large scores of either sign: the maximum is subtracted before exp, in every piece and where pieces join."""
    model, program = fake(16, 2, (0, 0))
    for name in ("inputs0.weight", "inputs1.weight"):
        model.tensors[name].stored[:] *= np.float32(12)
    steps = [[(np.arange(300) % VOCAB, 0, 0)], [([1], 300, 0)], [(range(290), 301, 0)]]
    # Scores of a thousand are rounded to 1e-4, and exp makes of that a relative error.
    check(model, program, teams, steps, cache="float32", tolerance=2e-4, context=600)


@each_cache
@pytest.mark.parametrize("window", [0, 300])
def test_a_cache_that_was_used_before(teams, cache, window):
    """What lies behind a sequence's end, here infinities, is not looked at, and not through weights of zero either."""
    model, program = fake(24, 2, (0, 0), window=window)
    steps = [(range(5), 0, 0), (range(20), 5, 0), ([3], 25, 0), (range(280), 26, 0), ([1], 306, 0), ([5, 6], 307, 0)]
    for team in teams:
        bound = Bound(program, model.tensors, team, exact=True, tokens=300, context=400, kv=cache)
        clean = [bound.run(step) for step in steps]
        for memory in bound.cache._arenas:
            np.asarray(memory).view(np.float32)[:] = np.inf
        assert all(same_bits(bound.run(step), before) for step, before in zip(steps, clean, strict=True))


BLOCKS = {
    "one head of its own": (16, 2, (0, 1)),
    "four heads": (32, 8, (0, 0, 0, 0, 1, 1, 1, 1)),
    "seven heads and none": (24, 8, (0, 0, 0, 0, 0, 0, 0, 2)),
    "more heads than rows": (8, BLOCK_ROWS + 6, (0,) * (BLOCK_ROWS + 6)),
}


@each_cache
@pytest.mark.parametrize("heads", BLOCKS.values(), ids=BLOCKS)
def test_blocks(teams, heads, cache):
    """Chunks that end before, at and behind the ends of blocks, of what registers hold, and of pieces."""
    steps, at = [], 0
    for size in (9, 15, 17, 63, 64, 65, 23, 1, 130, 127, 2, 8, 5):
        steps.append([(np.arange(at, at + size) % VOCAB, at, 0)])
        at += size
    check(*fake(*heads), teams, steps, cache=cache, context=at, page_tokens=48)


@each_cache
@pytest.mark.parametrize("window", [1, 2, 16, 100, 255, 256, 257, 400])
def test_windows(teams, window, cache):
    """A token sees itself and those just before it: one, few, many tokens, blocks that begin to see in two pieces."""
    steps, at = [], 0
    for size in (3, 1, 20, 230, 1, 1, 1, 8, 300, 2, 1, 64, 1, 7, 100):
        steps.append([(np.arange(at, at + size) % VOCAB, at, 0)])
        at += size
    check(*fake(32, 4, (0, 1, 1, 1), window=window), teams, steps, cache=cache, context=at, page_tokens=64)


def test_memory_does_not_grow_with_chunk_and_context_together(teams):
    """What is kept for each piece is kept for few tokens; a chunk of many joins its pieces as they come."""
    model, program = fake(64, 4, (0, 0, 1, 1))

    def nbytes(tokens, context):
        bound = Bound(program, model.tensors, teams[1], tokens=tokens, context=context, page_tokens=64)
        return bound.compiled._buffers.nbytes

    longer = nbytes(256, 32768) - nbytes(256, 1024)
    assert longer == FEW_TOKENS * 4 * (32768 - 1024) // 256 * part_bytes(64)
    assert longer == nbytes(16, 32768) - nbytes(16, 1024)


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
