"""The table of joining rules: which neighbours become one stage, and which results are rounded on the way."""

import pytest

from tpcpu.parallel.partition import Range, Share
from tpcpu.program.builder import Builder
from tpcpu.program.lowering import stages
from tpcpu.program.operations import Add, Embed, Experts, Kind, Linear, Logits, RmsNorm, Route


def block(p, x, name):
    """A sum, its norm, and a product of that."""
    y = p.add(x, x)
    n = p.rms_norm(y, f"{name}.norm", 1e-5)
    (z,) = p.linear(n, z=p.matrix(f"{name}.w", (64, 64)))
    return y, n, z


def program(finish):
    p = Builder(Share())
    p.logits(finish(p, p.embed("embed", 9, 64)), "embed", 9)
    return p.finish()


def kinds(program, integer=True, join=True):
    numbers = {id(operation) for operation in program.operations} if integer else set()
    return [(*map(type, stage.operations), stage.rounded) for stage in stages(program, numbers, join=join)]


def test_a_sum_its_norm_and_the_rounding_for_a_product():
    made = program(lambda p, x: block(p, x, "a")[2])
    assert kinds(made) == [(Embed, False), (Add, RmsNorm, True), (Linear, False), (Logits, False)]


def test_a_norm_is_rounded_for_the_experts_behind_a_router_in_floats():
    p = Builder(Share())
    n = p.rms_norm(p.embed("embed", 9, 64), "norm", 1e-5)
    (scores,) = p.linear(n, scores=p.matrix("router", (5, 64), kind=Kind.ROUTER))
    experts = [p.expert((f"{i}.gate", f"{i}.up", f"{i}.down"), 64, Range(0, 64), 64) for i in range(5)]
    p.logits(p.experts(n, scores, 2, experts, Range(0, 64), 64, normalised=True), "embed", 9)
    made = p.finish()
    integer = {id(operation) for operation in made.operations if isinstance(operation, Experts)}
    found = stages(made, integer)
    assert [stage.rounded for stage in found] == [False, True, False, False, False]
    assert [type(operation) for operation in found[3].operations] == [Route, Experts]
    assert found[2].from_copy
    assert found[3].from_copy
    # For the scores, between the products, and before the sum.
    assert (found[3].waits, found[3].inner_waits) == (True, 2)


def test_a_router_that_attends_is_no_hindrance():
    """Each thread has some of the scores: one more wait, and the experts read the norm's copy all the same."""
    p = Builder(Share())
    n = p.rms_norm(p.embed("embed", 9, 64), "norm", 1e-5)
    router = {name: p.matrix(name, (5, 64), kind=Kind.ROUTER) for name in ("query", "key", "value")}
    scores = p.expert_attention(*p.linear(n, **router))
    experts = [p.expert((f"{i}.gate", f"{i}.up", f"{i}.down"), 64, Range(0, 64), 64) for i in range(5)]
    p.logits(p.experts(n, scores, 2, experts, Range(0, 64), 64, normalised=True), "embed", 9)
    made = p.finish()
    found = stages(made, {id(operation) for operation in made.operations if isinstance(operation, Experts)})
    assert [stage.rounded for stage in found] == [False, True, False, False, False, False]
    assert [stage.waits for stage in found[2:5]] == [False, True, True]
    assert found[4].from_copy


def test_floats_are_not_rounded():
    made = program(lambda p, x: block(p, x, "a")[2])
    assert (Add, RmsNorm, False) in kinds(made, integer=False)


def test_without_joining_every_operation_is_a_stage():
    made = program(lambda p, x: block(p, x, "a")[2])
    assert kinds(made, join=False) == [(type(operation), False) for operation in made.operations]


def test_a_norm_of_something_else_is_not_joined():
    def finish(p, x):
        p.add(x, x)
        return p.linear(p.rms_norm(x, "norm", 1e-5), z=p.matrix("w", (64, 64)))[0]

    assert (RmsNorm, True) in kinds(program(finish))
    assert (Add, False) in kinds(program(finish))


def test_a_product_of_something_else_rounds_nothing():
    def finish(p, x):
        p.rms_norm(x, "norm", 1e-5)
        return p.linear(x, z=p.matrix("w", (64, 64)))[0]

    assert (RmsNorm, False) in kinds(program(finish))


@pytest.mark.parametrize("join", [True, False])
def test_no_operation_is_lost_or_moved(join):
    made = program(lambda p, x: block(p, block(p, x, "a")[0], "b")[2])
    assert tuple(op for stage in stages(made, (), join=join) for op in stage.operations) == made.operations
