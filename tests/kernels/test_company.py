"""A token's logits are the same bits in any company: batch, chunks, pages, threads, other sequences, restarts.

A model of two layers with every awkward size, and with a convolution; a sequence that crosses several pieces of the
cache. Every way of running it is compared with one: token by token, alone, on one thread.
"""

import numpy as np
import pytest

from tests.kernels.binding import FORMS, Bound, FakeModel, same_bits
from tpcpu.parallel.partition import Range
from tpcpu.program.kv_format import KV_FORMATS
from tpcpu.program.operations import Heads, Kind
from tpcpu.program.rope import Rope

VOCAB, HIDDEN, FEATURES, LENGTH = 90, 192, 320, 780
ARITHMETICS = [(form, exact) for form in FORMS for exact in (False, True)]
IDS = [f"{form}-{'exact' if exact else 'int8'}" for form, exact in ARITHMETICS]


def build(form):
    """Yuan's and Llama's operations in one model, and a head of the format too."""
    model = FakeModel()

    def matrix(name, out, into, **part):
        return model.hold(model.matrix(name, (out, into), **part), form)

    def norm(x, name):
        model.hold((model.vector(f"{name}.weight", HIDDEN), None), "float32", 1 + model.normal(HIDDEN) / 9)
        return model.rms_norm(x, name, 1e-5)

    x = model.inputs(model.normal(VOCAB, HIDDEN))
    for layer in range(2):
        n = norm(x, f"{layer}.before")
        conv = model.matrix(f"{layer}.conv", (HIDDEN, HIDDEN, 2, 1), bias=True, kind=Kind.CONV)
        n = model.add(n, model.short_conv(n, model.hold(conv, form)))
        q, k, v = model.linear(
            n,
            q=matrix(f"{layer}.q", 6 * 24, HIDDEN, bias=True),
            k=matrix(f"{layer}.k", 2 * 24, HIDDEN),
            v=matrix(f"{layer}.v", 2 * 24, HIDDEN),
        )
        q = model.rope_and_store(
            Heads(q, 6, 24, 0, 24), Heads(k, 2, 24, 0, 24), Heads(v, 2, 24, 0, 24), Rope(10000.0, 24)
        )
        a = model.attention(q, Range(0, 6), 8, (0, 0, 0, 1, 1, 1), 24**-0.5)
        (o,) = model.linear(a, o=matrix(f"{layer}.o", HIDDEN, 192, columns=Range(0, 144)))
        x = model.add(x, o)
        n = norm(x, f"{layer}.after")
        g = model.glu(
            *model.linear(
                n, gate=matrix(f"{layer}.gate", FEATURES, HIDDEN), up=matrix(f"{layer}.up", FEATURES, HIDDEN)
            ),
            Range(0, FEATURES),
            FEATURES,
        )
        (d,) = model.linear(g, d=matrix(f"{layer}.down", HIDDEN, FEATURES))
        x = model.add(x, d)
    model.hold((model.matrix("head", (101, HIDDEN), kind=Kind.HEAD).weight, None), form)
    model.logits(norm(x, "norm"), "head", 101)
    return model, model.finish()


def chunks(sizes):
    """(start, stop) of chunks of these sizes, over and over, up to the whole length."""
    at = 0
    while at < LENGTH:
        for size in sizes:
            yield at, min(at + size, LENGTH)
            at += size
            if at >= LENGTH:
                return


@pytest.mark.parametrize(("form", "exact"), ARITHMETICS, ids=IDS)
def test_company_does_not_matter(teams, form, exact):
    model, program = build(form)
    ids = model.random.integers(0, VOCAB, LENGTH)
    others = model.random.integers(0, VOCAB, (2, LENGTH))

    def bind(team, **settings):
        sizes = {"context": LENGTH, "page_tokens": 64, "tokens": 300} | settings
        return Bound(program, model.tensors, team, exact=exact, **sizes)

    alone = bind(teams[0])
    wanted = np.concatenate([alone.run(([token], at, 0)) for at, token in enumerate(ids)])
    assert wanted.std() > 0.1

    def whole(bound, sizes, sequence=0):
        return np.concatenate([bound.run((ids[a:b], a, sequence)) for a, b in chunks(sizes)])

    for team in teams:
        assert same_bits(whole(bind(team), [300]), wanted), f"{team.threads} threads, long chunks"
    for page_tokens in (16, 256):
        bound = bind(teams[1], page_tokens=page_tokens)
        assert same_bits(whole(bound, [1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 12, 23, 49, 53]), wanted), (
            f"pages of {page_tokens}"
        )
    # The state and the cache of a sequence that was here before are no company either.
    bound = bind(teams[2])
    bound.run((others[0][:200], 0, 0))
    assert same_bits(whole(bound, [64]), wanted), "a sequence begun anew"

    # Others before and behind it in the batch, at positions of their own, now short and now long.
    mixed, got, at = bind(teams[1]), [], 0
    for step, size in enumerate((3, 1, 1, 60, 7, 200, 1, 2, 230, 1, 5, 64)):
        a, b = 20 * step, 20 * step + (20 if step % 2 else 1)
        mine, before, behind = (ids[at : at + size], at, 0), (others[0][a:b], a, 1), (others[1][: step + 1], 0, 2)
        logits = mixed.run(before, mine, behind)
        got.append(logits[b - a : b - a + size])
        mixed.run((others[0][b : a + 20], b, 1)) if b < a + 20 else None
        at += size
    assert same_bits(np.concatenate(got), wanted[:at]), "beside other sequences"

    # Only some tokens' logits are wanted.
    bound = bind(teams[0])
    bound.run((ids[:300], 0, 0), wanted=[])
    assert same_bits(bound.run((ids[300:310], 300, 0), wanted=[9, 4]), wanted[[309, 304]]), "few logits"


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("kv_of", [(0,) * 7, (1, 0, 1, 1, 0, 1, 1, 1), (0, 1, 2)], ids=["seven", "scattered", "alone"])
def test_groups_of_heads_are_no_company(teams, kv_of, window, kv):
    """A head's result is the same bits beside the others of its group, in kernels for one, few and many tokens."""
    dim, heads = 40, len(kv_of)
    sources = FakeModel(1)
    q, k, v = (sources.normal(VOCAB, n * dim) for n in (heads, max(kv_of) + 1, max(kv_of) + 1))

    def attend(team, chosen, sizes, page_tokens, beside=0):
        model = FakeModel()
        inputs = [model.inputs(x) for x in (np.hstack([q[:, dim * h : dim * (h + 1)] for h in chosen]), k, v)]
        count = max(kv_of) + 1
        rotated = model.rope_and_store(
            *[Heads(x, n, dim, 0, dim) for x, n in zip(inputs, (len(chosen), count, count), strict=True)],
            Rope(10000.0, dim),
        )
        part = tuple(kv_of[h] for h in chosen)
        program = model.result(model.attention(rotated, Range(0, len(chosen)), len(chosen), part, dim**-0.5, window))
        bound = Bound(
            program, model.tensors, team, exact=True, kv=kv, tokens=300, context=LENGTH, page_tokens=page_tokens
        )
        ids, got, other = np.arange(LENGTH) * 7 % VOCAB, [], 0
        for step, (a, b) in enumerate(chunks(sizes)):
            parts = [(ids[a:b], a, 0)]
            if beside:
                # A sequence that goes on by one token, before, and one that begins, behind.
                parts = [(ids[other : other + 1], other, 1), *parts, (ids[: step % 3 + 1], 0, 2)]
                other += 1
            logits = bound.run(*parts)
            got.append(logits[beside : beside + b - a])
        return np.concatenate(got)

    wanted = np.hstack([attend(teams[0], [head], [1], 64) for head in range(heads)])
    everyone = range(heads)
    assert same_bits(attend(teams[2], everyone, [1], 16), wanted), "one token at a time"
    assert same_bits(attend(teams[1], everyone, [5, 1, 8], 48), wanted), "few tokens"
    assert same_bits(attend(teams[2], everyone, [300], 256), wanted), "many tokens"
    assert same_bits(attend(teams[0], everyone, [63, 9, 70], 48), wanted), "blocks that end anywhere"
    assert same_bits(attend(teams[1], everyone, [1, 5, 40, 2], 16, beside=1), wanted), "beside other sequences"
