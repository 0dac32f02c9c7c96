"""Embedding, norm, sum, gate and taps against the reference, at widths that fill no register and no block."""

import numpy as np
import pytest

from tests.kernels.binding import (
    FLOATS,
    TOLERANCES,
    Bound,
    FakeModel,
    Held,
    assert_close,
    expected,
    reference,
    same_bits,
)
from tpcpu.parallel.partition import Range
from tpcpu.program.operations import Activation, Kind

COUNTS = (1, 2, 7, 64)
WIDTHS = (1, 8, 17, 63, 64, 100, 256, 1000)


def check(model, program, teams, tolerance, *, exact=True):
    """All teams agree in every bit, and with the reference within `tolerance`; gives the last result."""
    reader = reference(program, model.tensors, exact, dtype=np.float32)
    bound = [Bound(program, model.tensors, team, exact=exact) for team in teams]
    for count in COUNTS:
        part = (range(count), 0, 0)
        results = [each.run(part) for each in bound]
        assert all(same_bits(result, results[0]) for result in results)
        assert_close(results[0], expected(reader, part), tolerance)
    return results[0]


@pytest.mark.parametrize("form", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_embed(teams, form, width):
    """Every finite value arrives exactly: subnormal halves, signed zeros and the largest among them."""
    model = FakeModel()
    values = model.normal(64, width)
    edges = np.array([0, -0.0, 6e-8, -5.9e-5, 6.1e-5, 65504, -65504, 1 / 3], np.float32)
    values.reshape(-1)[: len(edges)] = edges[: values.size]
    assert (check(model, model.result(model.inputs(values, form)), teams, 0)[0] == model_row(model)).all()


@pytest.mark.parametrize("form", FLOATS)
def test_a_scaled_embedding_and_capped_logits(teams, form):
    """The head is the identity: logits near zero, within the cap, and far beyond it."""
    model, width = FakeModel(), 100
    model.tensors["table.weight"] = Held.of(
        model.normal(64, width) * np.float32(10) ** np.arange(-2, 2).repeat(25), form
    )
    model.tensors["identity.weight"] = Held.of(np.eye(width, dtype=np.float32), "float32")
    model.logits(model.embed("table", 64, width, 7.5), "identity", width, cap=30.0)
    check(model, model.finish(), teams, TOLERANCES["gate"])


def test_what_is_no_number_stays_so(teams):
    """Of one token, and of many: capped logits, and what a gate lets through."""
    model, width = FakeModel(), 100
    x, gate = model.normal(64, width), model.normal(64, 1)
    x[3, 7] = gate[4] = np.nan
    y = model.gated_add(model.inputs(x), model.inputs(model.normal(64, width)), model.inputs(gate))
    model.tensors["identity.weight"] = Held.of(np.eye(width, dtype=np.float32), "float32")
    model.logits(y, "identity", width, cap=30.0)
    program = model.finish()
    for team in teams:
        bound = Bound(program, model.tensors, team)
        for tokens in ([2], [3], [4], range(64)):
            wrong = [token in (3, 4) for token in tokens]
            assert (np.isnan(bound.run((tokens, 0, 0))).any(axis=1) == wrong).all()


def model_row(model):
    return model.tensors["inputs0.weight"].values()[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(teams, width):
    model = FakeModel()
    x = model.normal(64, width)
    x[3] = 0
    x[4] *= np.float32(1e-15)
    n = model.rms_norm(model.inputs(x), "norm", 1e-5)
    model.hold((model.vector("norm.weight", width), None), "float32", model.normal(width))
    assert not check(model, model.result(n), teams, TOLERANCES["norm"])[3].any()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("width", WIDTHS)
def test_add(teams, width, bias):
    model = FakeModel()
    x, y = model.inputs(model.normal(64, width)), model.inputs(model.normal(64, width))
    vector = model.vector("bias", width) if bias else None
    if vector:
        model.hold((vector, None), "float32", model.normal(width))
    check(model, model.result(model.add(x, y, vector)), teams, 0)


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
@pytest.mark.parametrize("width", [64, 100, 256])
def test_add_norm_and_product(teams, width, exact):
    """The sum is needed twice: by the norm of the same kernel, and as it is by what follows."""
    model = FakeModel()
    x, y = model.inputs(model.normal(64, width)), model.inputs(model.normal(64, width))
    total = model.add(x, y, model.hold((model.vector("bias", width), None), "float32", model.normal(width))[0])
    n = model.rms_norm(total, "norm", 1e-6)
    model.hold((model.vector("norm.weight", width), None), "float32", model.normal(width))
    (z,) = model.linear(n, z=model.hold(model.matrix("w", (width, width)), "int8" if width % 64 == 0 else "bf16"))
    tolerance = TOLERANCES["product" if exact or width % 64 else "rounded again"]
    check(model, model.result(model.add(total, z)), teams, tolerance, exact=exact)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("features", [Range(0, 64), Range(0, 172), Range(70, 150), Range(65, 66), Range(190, 200)])
def test_glu(teams, features, activation):
    """A share's features lie anywhere in the blocks that cover them; what is beside them stays zero."""
    model = FakeModel()
    width = len(features)
    x, y = (model.inputs(model.normal(64, width) * np.float32(4)) for _ in range(2))
    g = model.glu(x, y, features, 200, activation)
    result = check(model, model.result(g), teams, TOLERANCES["gate"])
    assert not np.delete(result, np.s_[g.own.start : g.own.stop], axis=1).any()


@pytest.mark.parametrize("size", [-200, -88, 80, 200])
def test_gate_of_any_size(teams, size):
    """No exponential overflows; a gate far below zero is closed, to within what float32 can hardly hold."""
    model = FakeModel()
    x = np.float32(size) + model.normal(64, 96)
    x[:, 0] = 1
    g = model.glu(model.inputs(x), model.inputs(np.ones((64, 96), np.float32)), Range(0, 96), 96)
    result = check(model, model.result(g), teams, TOLERANCES["gate"])
    assert np.abs(result[:, 1:]).min() > 75 if size > 0 else np.abs(result[:, 1:]).max() < 1e-30


CONVOLUTIONS = [
    (form, channels, width, exact)
    for form, exact in (("nf4", False), ("nf4", True), ("int8", False), ("bf16", True))
    for channels, width in ((40, 64), (32, 96), (96, 32))
] + [("float32", 10, 5, True), ("bf16", 17, 70, True)]


@pytest.mark.parametrize(("form", "channels", "width", "exact"), CONVOLUTIONS)
def test_short_conv(teams, form, channels, width, exact):
    """Taps from the batch, from the state of the sequence, and zero at the start, for sequences side by side."""
    model = FakeModel()
    x = model.inputs(model.normal(64, width))
    matrix = model.hold(model.matrix("conv", (channels, width, 2, 1), bias=True, kind=Kind.CONV), form)
    program = model.result(model.short_conv(x, matrix))
    reader = reference(program, model.tensors, exact, dtype=np.float32)
    bound = [Bound(program, model.tensors, team, exact=exact) for team in teams]
    steps = [
        [([5], 0, 0)],
        [([6], 1, 0)],
        [(range(7), 2, 0), ([9], 0, 1)],
        [([1], 1, 1), (range(10, 40), 9, 0), ([3, 4], 0, 2)],
        [([8], 39, 0), ([8], 2, 2)],
        [([7], 0, 0)],
    ]
    for parts in steps:
        results = [each.run(*parts) for each in bound]
        assert all(same_bits(result, results[0]) for result in results)
        assert_close(results[0], expected(reader, *parts), TOLERANCES["product" if exact else "integer product"])


def test_channels_of_a_share(teams):
    """Two convolutions divided by channels, as ranks divide them: a share's channels inside their covering block."""
    model = FakeModel()
    x = model.inputs(model.normal(64, 192))
    channels = Range(40, 90)
    first = model.matrix("first", (96, 192, 2, 1), rows=channels, bias=True, kind=Kind.CONV)
    second = model.matrix("second", (50, 96, 2, 1), columns=channels * 2, kind=Kind.CONV)
    y = model.short_conv(x, model.hold(first, "nf4"), covering=(channels, 96))
    assert (y.width, y.own) == (64, Range(8, 58))
    program = model.result(model.short_conv(y, model.hold(second, "nf4")))
    for exact in (False, True):
        reader = reference(program, model.tensors, exact, dtype=np.float32)
        bound = [Bound(program, model.tensors, team, exact=exact) for team in teams]
        for parts in ([(range(9), 0, 0)], [([9], 9, 0)], [([2], 0, 1), ([3, 4], 10, 0)]):
            results = [each.run(*parts) for each in bound]
            assert all(same_bits(result, results[0]) for result in results)
            assert_close(results[0], expected(reader, *parts), TOLERANCES["product" if exact else "rounded again"])
