"""Products by heads, as they are and turned, against the reference: rows anywhere in panels, every format and team."""

import pytest

from tests.kernels.binding import FORMS, Bound, FakeModel, check
from tpcpu.parallel.partition import Range
from tpcpu.program.operations import Heads

SHAPES = {
    "as published": (3, 128, 128, 512, 64),
    "heads that begin inside panels": (5, 20, 28, 128, 12),
    "heads of less than a panel": (7, 5, 2, 64, 0),
    "more than a span of blocks": (2, 24, 40, 1088, 8),
}
"""Heads, rows of the first kind and of the second, columns, and what lies between heads in the activations."""


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(teams, form, shape, turned):
    """The second head's rows onwards, so that the first scale lies inside a group; both kinds of rows."""
    heads, one, other, columns, between = shape
    model, step = FakeModel(), one + other
    full = (heads + 1) * step
    weight = model.hold(model.matrix("w", (full, columns), rows=Range(step, full)), form).weight
    rows, first = (one, 0) if turned else (other, one)
    dim = rows if turned else columns
    x = model.inputs(model.normal(64, heads * (dim + between)))
    out = model.linear_by_heads(Heads(x, heads, dim, 0, dim + between), weight, rows, first, step, turned=turned)
    check(model, model.result(out), teams, True)


@pytest.mark.parametrize("columns", [40, 72])
@pytest.mark.parametrize("turned", [False, True])
def test_floats_need_no_whole_blocks(teams, columns, turned):
    model = FakeModel()
    weight = model.hold(model.matrix("w", (4 * 30, columns)), "bf16").weight
    dim = 18 if turned else columns
    heads = Heads(model.inputs(model.normal(64, 4 * dim)), 4, dim, 0, dim)
    check(model, model.result(model.linear_by_heads(heads, weight, 18, 12, 30, turned=turned)), teams, True)


def test_heads_of_a_share_lie_inside_their_blocks(teams):
    """What follows is divided by blocks of 64."""
    model = FakeModel()
    weight = model.hold(model.matrix("w", (3 * 24, 64)), "nf4").weight
    heads = Heads(model.inputs(model.normal(64, 3 * 64)), 3, 64, 0, 64)
    out = model.linear_by_heads(heads, weight, 24, 0, 24, covering=(Range(3, 6), 8))
    assert (out.width, out.own) == (128, Range(8, 80))
    check(model, model.result(out), teams, True)


def test_no_heads(teams):
    """More ranks than heads."""
    model = FakeModel()
    weight = model.hold(model.matrix("w", (64, 64), rows=Range(0, 0)), "nf4").weight
    x = model.inputs(model.normal(64, 64))
    out = model.linear_by_heads(Heads(x, 0, 64, 0, 64), weight, 8, 0, 16, covering=(Range(0, 0), 4))
    (y,) = model.linear(out, y=model.hold(model.matrix("o", (20, 64), columns=Range(0, 0)), "bf16"))
    program = model.result(y)
    for team in teams:
        assert not Bound(program, model.tensors, team, exact=True).run((range(9), 0, 0)).any()
