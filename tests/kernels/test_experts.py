"""Mixtures of experts in compiled form against the reference: choices, experts of many and of no tokens, any share."""

import numpy as np
import pytest

from tests.kernels.binding import Bound, FakeModel, Held, check, same_bits
from tpcpu.parallel.partition import Range, Share
from tpcpu.program.operations import Clamp, Kind, Scoring

ARITHMETICS = [
    ("nf4", False), ("nf4", True), ("int8", False), ("bf16", True), ("nf4-single", False), ("mxfp4", False),
    ("mxfp4", True),
]  # fmt: skip
each_arithmetic = pytest.mark.parametrize(("form", "exact"), ARITHMETICS)


def mixture(
    model, x, scores, *, form="nf4", experts=7, top=2, hidden=64, full=256, features=None, normalised=True, forms=None,
    bias=False, **choice,
):  # fmt: skip
    """A mixture over inputs `x`, whose scores are inputs as well."""
    features = Range(0, full) if features is None else features
    made = []
    for number in range(experts):
        expert = model.expert((f"{number}.gate", f"{number}.up", f"{number}.down"), hidden, features, full, bias=bias)
        biases = expert.gate_bias, expert.up_bias, expert.down_bias
        for name, *matrix in zip(("gate", "up", "down"), expert.matrices, biases, strict=True):
            model.hold(matrix, (forms or {}).get((number, name), form))
        made.append(expert)
    return model.experts(x, scores, top, made, features, full, normalised=normalised, **choice)


def scores_of(chosen, experts):
    """Scores (tokens, experts) with which tokens choose what `chosen` names, the first the most."""
    scores = np.full((64, experts), -3, np.float32)
    for token in range(64):
        for place, number in enumerate(chosen(token)):
            scores[token, number] = 1 - np.float32(0.3) * place
    return scores


CHOICES = {
    "all the same": lambda _: (3, 5),
    "one token alone": lambda token: (6, 0) if token == 31 else (2, 0),
    "the last and the first": lambda _: (6, 0),
    "all different": lambda token: (token % 7, (token + 1 + token // 7) % 7),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@each_arithmetic
def test_choices(teams, form, exact, choice):
    """Experts with all tokens, with one, with none."""
    model = FakeModel()
    scores = model.inputs(scores_of(choice, 7))
    y = mixture(model, model.inputs(model.normal(64, 64)), scores, form=form)
    check(model, model.result(y), teams, exact)


@each_arithmetic
@pytest.mark.parametrize(
    ("hidden", "full", "features"),
    [(128, 320, Range(70, 150)), (1088, 192, Range(128, 192)), (72, 128, Range(0, 64)), (64, 1216, None)],
    ids=["ends in blocks", "more than a span", "short last panel", "more than a span of features"],
)
def test_shares(teams, form, exact, hidden, full, features):
    if hidden % 64 and not exact:
        form = "bf16"
    model = FakeModel()
    x, scores = model.inputs(model.normal(64, hidden)), model.inputs(model.normal(64, 5))
    forms = {(number, name): "bf16" for number in range(5) for name in ("gate", "up")} if hidden % 64 else {}
    y = mixture(model, x, scores, form=form, forms=forms, experts=5, top=3, hidden=hidden, full=full, features=features)
    check(model, model.result(y), teams, exact)


CLAMP = Clamp(0.8, 1.7)
"""Low enough that it holds back a part of what is random here."""


@each_arithmetic
@pytest.mark.parametrize(
    ("share", "full", "features"),
    [(Share(), 192, None), (Share(0, 2), 320, Range(0, 150)), (Share(1, 2), 320, Range(150, 320))],
    ids=["alone", "the first of two", "the second"],
)
def test_biases_and_a_clamp(teams, form, exact, share, full, features):
    """The last bias is the first rank's alone. Panels of an expert that threads share begin inside its biases."""
    model = FakeModel()
    x, scores = model.inputs(model.normal(64, 128)), model.inputs(model.normal(64, 5))
    model.share = share
    y = mixture(
        model, x, scores, form=form, experts=5, hidden=128, full=full, features=features, bias=True, clamp=CLAMP
    )
    model.share = Share()
    check(model, model.result(y), teams, exact)


def test_a_clamp_in_numbers(teams):
    """Against the formula as the publisher has it."""
    model = FakeModel()
    x, scores = model.normal(64, 64), model.normal(64, 3)
    y = mixture(
        model, model.inputs(x), model.inputs(scores), form="float32", experts=3, top=1, full=64, bias=True, clamp=CLAMP
    )
    got = Bound(model.result(y), model.tensors, teams[0], exact=True).run((range(64), 0, 0))
    w = {name: held.stored.astype(np.float64) for name, held in model.tensors.items()}
    for token, number in enumerate(scores.argmax(axis=1)):
        gate, up = (w[f"{number}.{name}.weight"] @ x[token] + w[f"{number}.{name}.bias"] for name in ("gate", "up"))
        assert gate.max() > 0.8
        gate, up = np.minimum(gate, 0.8), np.clip(up, -0.8, 0.8)
        inner = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
        wanted = w[f"{number}.down.weight"] @ inner + w[f"{number}.down.bias"]
        assert np.abs(got[token] - wanted).max() < 1e-5


@pytest.mark.parametrize("exact", [False, True])
def test_an_empty_share(teams, exact):
    """More ranks than blocks of an expert: nothing is held, and zeros are given."""
    model = FakeModel()
    x, scores = model.inputs(model.normal(64, 64)), model.inputs(model.normal(64, 5))
    y = mixture(model, x, scores, experts=5, full=128, features=Range(128, 128))
    assert not check(model, model.result(y), teams, exact).any()


@pytest.mark.parametrize("exact", [False, True])
def test_experts_of_different_formats(teams, exact):
    """Experts that whoever quantised the model left as they were, beside others; one half of another."""
    model = FakeModel()
    x, scores = model.inputs(model.normal(64, 128)), model.inputs(model.normal(64, 6))
    forms = {(2, name): "bf16" for name in ("gate", "up", "down")} | {(4, "down"): "int8", (0, "up"): "float32"}
    y = mixture(model, x, scores, experts=6, top=3, hidden=128, forms=forms)
    check(model, model.result(y), teams, exact)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("experts", [1, 8, 19])
def test_weights_of_a_choice(teams, experts, normalised):
    """Ties go to the lower number; without normalising what was not chosen takes its part of the weights."""
    model = FakeModel()
    values = model.normal(64, experts)
    values[:, 1::3] = values[:, :1]  # level ones
    values[5] = 0
    values[6] *= 40
    x, scores = model.inputs(model.normal(64, 64)), model.inputs(values)
    top = min(4, experts)
    y = mixture(model, x, scores, experts=experts, top=top, full=64, normalised=normalised, form="float32")
    check(model, model.result(y), teams, True)


@pytest.mark.parametrize("experts", [1, 15, 16, 33])
def test_experts_that_attend_to_one_another(teams, experts):
    """Large products, equal ones, and nothing at all among them."""
    model = FakeModel()
    q, k, v = (model.normal(64, experts) for _ in range(3))
    q[3], k[4], k[5] = 0, 0, k[5, 0]
    q[6] *= 30
    k[6] *= 30
    program = model.result(model.expert_attention(*map(model.inputs, (q, k, v))))
    check(model, program, teams, True)


def test_a_product_that_is_no_number_spoils_its_token(teams):
    model = FakeModel()
    q, k, v = (model.normal(64, 9) for _ in range(3))
    q[3, 1], k[4, 8], v[5, 0] = np.nan, np.inf, np.nan
    program = model.result(model.expert_attention(*map(model.inputs, (q, k, v))))
    for team in teams:
        found = Bound(program, model.tensors, team).run((range(9), 0, 0))
        assert np.isnan(found[3:6]).all()
        assert np.isfinite(found[[0, 1, 2, 6, 7, 8]]).all()


WAYS = {
    "softmax in groups": {"groups": (4, 2, 1), "factor": 1.5},
    "sigmoid": {"scoring": Scoring.SIGMOID, "normalised": True},
    "sigmoid in groups": {"scoring": Scoring.SIGMOID, "groups": (4, 3, 2), "factor": 2.5, "normalised": True},
    "sigmoid, not normalised": {"scoring": Scoring.SIGMOID, "groups": (2, 1, 3), "factor": 0.5},
    "softmax, corrected": {"scoring": Scoring.SOFTMAX},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_choose(teams, way):
    """Groups of experts, and what is added to p in comparing only."""
    model, count, settings = FakeModel(), 20, {"normalised": False} | WAYS[way]
    if way != "softmax in groups":
        settings["correction"] = model.hold(
            (model.vector("correction", count), None), "float32", model.normal(count) / 4
        )[0]
    x, scores = model.inputs(model.normal(64, 64)), model.inputs(model.normal(64, count) * 2)
    y = mixture(model, x, scores, experts=count, top=5, full=64, form="float32", **settings)
    check(model, model.result(y), teams, True)


@pytest.mark.parametrize("normalised", [False, True])
def test_sigmoids_of_nothing(teams, normalised):
    """All weights may be 0 at once."""
    model = FakeModel()
    x, scores = model.inputs(model.normal(64, 64)), model.inputs(np.full((64, 4), -200, np.float32))
    y = mixture(model, x, scores, experts=4, full=64, normalised=normalised, scoring=Scoring.SIGMOID)
    program = model.result(y)
    for team in teams:
        assert np.abs(Bound(program, model.tensors, team).run((range(9), 0, 0))).max() < 1e-15


@pytest.mark.parametrize("normalised", [False, True])
def test_scores_that_are_no_numbers(teams, normalised):
    """A token gone wrong stays so, reads nothing that is not there, and leaves others alone."""
    model = FakeModel()
    values = model.normal(64, 5)
    values[3] = np.nan
    values[4, 2] = np.nan
    values[5, 0] = np.inf
    x, scores = model.inputs(model.normal(64, 64)), model.inputs(values)
    program = model.result(mixture(model, x, scores, experts=5, normalised=normalised))
    for team in teams:
        bound = Bound(program, model.tensors, team)
        together = bound.run((range(64), 0, 0))
        assert np.isnan(together[3:6]).all()
        for token in (3, 4, 5):
            assert np.isnan(bound.run(([token], 0, 0))).all()
        others = together[6:60]
        assert np.isfinite(others).all()
        assert same_bits(bound.run((range(6, 60), 0, 0)), others)


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer(teams, exact):
    """A norm, a router beside the gate of a shared expert, both kinds of experts, and their sum: as models have it."""
    model = FakeModel()
    hidden, full = 192, 128
    n = model.rms_norm(model.inputs(model.normal(64, hidden)), "norm", 1e-5)
    model.tensors["norm.weight"] = Held.of(model.normal(hidden), "float32")
    router = model.hold(model.matrix("router", (9, hidden), kind=Kind.ROUTER), "bf16")
    shared_gate = model.hold(model.matrix("shared_gate", (1, hidden), kind=Kind.ROUTER), "float32")
    scores, opened = model.linear(n, scores=router, opened=shared_gate)
    features = Range(0, full)
    gate, up = (model.hold(model.matrix(f"shared.{name}", (full, hidden)), "nf4") for name in ("gate", "up"))
    g = model.glu(*model.linear(n, gate=gate, up=up), features, full)
    (shared,) = model.linear(g, down=model.hold(model.matrix("shared.down", (hidden, full)), "nf4"))
    y = mixture(model, n, scores, experts=9, top=3, hidden=hidden, full=full)
    check(model, model.result(model.gated_add(y, shared, opened)), teams, exact)
