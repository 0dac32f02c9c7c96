"""Products of weights in every format with the activations of some tokens, against the reference."""

import numpy as np
import pytest

from tests.kernels.binding import (
    FLOATS,
    FORMS,
    QUANTISED,
    TOLERANCES,
    Bound,
    FakeModel,
    Held,
    Mxfp4,
    assert_close,
    expected,
    reference,
    same_bits,
)
from tpcpu.formats import mxfp4
from tpcpu.parallel.partition import Range
from tpcpu.program.operations import Kind

COUNTS = (1, 2, 7, 19, 49, 52, 55, 64)
ARITHMETICS = [(form, exact) for form in FORMS for exact in (False, True) if exact or form in QUANTISED]
IDS = [f"{form}-{'exact' if exact else 'int8'}" for form, exact in ARITHMETICS]
each_arithmetic = pytest.mark.parametrize(("form", "exact"), ARITHMETICS, ids=IDS)


def check(model, program, teams, form, exact, tolerance=None):
    """All teams agree in every bit, and with the reference within the tolerance; gives the last result.

    A token's row is the same bits beside fewer others, which other kernels and other tiles multiply.
    """
    reader = reference(program, model.tensors, exact, dtype=np.float64 if exact else np.float32)
    bound = [Bound(program, model.tensors, team, exact=exact) for team in teams]
    tolerance = tolerance or TOLERANCES["product" if exact or form in FLOATS else "integer product"]
    fewer = np.zeros((0, 0), np.float32)
    for count in COUNTS:
        part = (range(count), 0, 0)
        results = [each.run(part) for each in bound]
        assert all(same_bits(result, results[0]) for result in results)
        assert len(fewer) == 0 or same_bits(results[0][: len(fewer)], fewer), f"{count} tokens"
        fewer = results[0]
        assert_close(results[0], expected(reader, part), tolerance)
    return results[0]


SHAPES = {
    "one row": (1, 64),
    "one panel": (16, 64),
    "short last panel": (37, 192),
    "groups of scales that cross rows": (300, 192),
    "more than a span of blocks": (19, 1088),
    "a panel that all threads share": (5, 5000 // 64 * 64),
    "panels that threads share": (70, 3136),
    "more panels than fit a tile": (83, 128),
}


@each_arithmetic
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(teams, form, exact, shape):
    model = FakeModel()
    rows, columns = shape
    x = model.inputs(model.normal(64, columns))
    (y,) = model.linear(x, y=model.hold(model.matrix("w", (rows, columns), bias=True), form))
    check(model, model.result(y), teams, form, exact)


def test_every_weight_of_mxfp4(teams):
    """All codes at all scales, by inputs that pick one each: bit for bit, those below the normal numbers too."""
    model = FakeModel()
    x = model.inputs(np.eye(64, dtype=np.float32))
    matrix = model.matrix("w", (mxfp4.LARGEST + 1, 64))
    codes = np.tile(np.arange(16, dtype=np.uint8), (mxfp4.LARGEST + 1, 4))
    powers = np.arange(mxfp4.LARGEST + 1, dtype=np.uint8)
    held = Held("mxfp4", Mxfp4(codes, np.stack([powers, powers[::-1]], axis=1)))
    model.tensors["w.weight"] = held
    (y,) = model.linear(x, y=matrix)
    program = model.result(y)
    wanted = mxfp4.dequantize(held.stored.codes[:, ::2] | held.stored.codes[:, 1::2] << 4, held.stored.powers).T
    for team in teams:
        bound = Bound(program, model.tensors, team, exact=True)
        for got in (bound.run((range(64), 0, 0)), np.concatenate([bound.run(([at], 0, 0)) for at in range(64)])):
            # Sums of zeros lose their sign.
            assert same_bits(got + np.float32(0), wanted + np.float32(0))


@pytest.mark.parametrize("form", FLOATS)
@pytest.mark.parametrize("columns", [1, 63, 65, 172, 1100])
def test_floats_need_no_whole_blocks(teams, form, columns):
    model = FakeModel()
    x = model.inputs(model.normal(64, columns))
    (y,) = model.linear(x, y=model.hold(model.matrix("w", (21, columns)), form))
    check(model, model.result(y), teams, form, True)


@each_arithmetic
def test_rows_of_a_share(teams, form, exact):
    """Rows from the middle: the first scale lies inside a group, and the first group is not that of the tensor."""
    model = FakeModel()
    x = model.inputs(model.normal(64, 192))
    matrix = model.hold(model.matrix("w", (400, 192), rows=Range(107, 211), bias=True), form)
    (y,) = model.linear(x, y=matrix)
    check(model, model.result(y), teams, form, exact)


@each_arithmetic
def test_columns_of_a_share(teams, form, exact):
    """A share that ends inside blocks multiplies the blocks that cover it, with zeros for its neighbours' features."""
    model = FakeModel()
    x = model.inputs(model.normal(64, 64))
    features = Range(70, 150)
    gate, up = (model.hold(model.matrix(name, (320, 64), rows=features), form) for name in ("gate", "up"))
    covering = model.glu(*model.linear(x, gate=gate, up=up), features, 320)
    assert (covering.width, covering.own) == (128, Range(6, 86))
    (y,) = model.linear(covering, y=model.hold(model.matrix("down", (50, 320), columns=features), form))
    # The gate comes before the rounding to int8, which a difference of one bit can turn.
    check(model, model.result(y), teams, form, exact, tolerance=None if exact else TOLERANCES["rounded again"])


@each_arithmetic
def test_an_empty_share(teams, form, exact):
    """More ranks than heads or blocks: no rows here, no columns there, and nothing but zeros to give."""
    model = FakeModel()
    x = model.inputs(model.normal(64, 64))
    none = Range(0, 0)
    gate, up = (model.hold(model.matrix(name, (128, 64), rows=Range(64, 64)), form) for name in ("gate", "up"))
    empty = model.glu(*model.linear(x, gate=gate, up=up), none, 128)
    (y,) = model.linear(empty, y=model.hold(model.matrix("down", (50, 128), columns=none), form))
    assert not check(model, model.result(y), teams, form, exact).any()


@each_arithmetic
def test_zeros(teams, form, exact):
    """Blocks of zeros among the weights, activations of zeros, and tokens of zeros."""
    model = FakeModel()
    values, x = model.normal(40, 256), model.normal(64, 256)
    values[::3, 64:128] = 0
    values[7] = 0
    x[::2, 128:192] = 0
    x[1] = 0
    (y,) = model.linear(model.inputs(x), y=model.hold(model.matrix("w", (40, 256)), form, values))
    assert not check(model, model.result(y), teams, form, exact)[1].any()


@each_arithmetic
def test_identity(teams, form, exact):
    model = FakeModel()
    x = model.normal(64, 128)
    matrix = model.hold(model.matrix("w", (128, 128)), form, np.eye(128, dtype=np.float32))
    (y,) = model.linear(model.inputs(x), y=matrix)
    result = check(model, model.result(y), teams, form, exact)
    # One scale, 1: NF4 and int8 hold it to the last bits, activations of 8 bits to 1 in 254 of a block's largest.
    error = np.abs(result - x).max()
    assert error < (1e-6 if exact or form in FLOATS else np.abs(x).max() / 250)
    if form in FLOATS:
        assert same_bits(result, x)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e30])
def test_activations_of_any_size(teams, size):
    """A block too small to be scaled to 127 counts as zero; nothing overflows on the way."""
    model = FakeModel()
    x = model.normal(64, 128)
    x[:, :64] *= np.float32(size)
    x[::2, 64:] = 0
    (y,) = model.linear(model.inputs(x), y=model.hold(model.matrix("w", (40, 128)), "nf4"))
    check(model, model.result(y), teams, "nf4", False)


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
def test_segments_of_different_formats(teams, exact):
    """One product, several tensors: offsets, group scales, formats and biases of their own, one of them empty."""
    model = FakeModel()
    x = model.inputs(model.normal(64, 2112))

    def matrix(name, rows, form, size=1.0, part=None):
        declared = model.matrix(name, (rows, 2112), rows=part, bias=part is not None)
        return model.hold(declared, form, model.normal(rows, 2112) * np.float32(size))

    (y,) = model.linear(
        x,
        y=[
            matrix("a", 37, "nf4"),
            matrix("b", 90, "nf4", 0.01, Range(30, 90)),
            matrix("c", 20, "int8", 3.0),
            matrix("d", 33, "bf16", 0.1, Range(0, 33)),
            matrix("e", 48, "nf4", 1.0, Range(48, 48)),
            matrix("f", 5, "nf4", 2.0),
            matrix("g", 16, "nf4-single"),
            matrix("h", 16, "float32"),
        ],
    )
    assert y.width == 37 + 60 + 20 + 33 + 5 + 16 + 16
    check(model, model.result(y), teams, "mixed", exact)


def test_outputs_of_one_product_are_apart(teams):
    """Each output has its own buffer; rows behind a short panel must not spill into what lies there."""
    model = FakeModel()
    x = model.inputs(model.normal(64, 64))
    a, b = model.linear(
        x,
        a=model.hold(model.matrix("a", (20, 64)), "nf4"),
        b=model.hold(model.matrix("b", (20, 64)), "nf4"),
    )
    check(model, model.result(model.add(a, b)), teams, "nf4", False)


def test_logits_of_the_wanted_tokens_only(teams):
    """In the order that is asked for; the head's own rows of the vocabulary."""
    model = FakeModel()
    x = model.inputs(model.normal(64, 192))
    model.hold((model.matrix("head", (100, 192), kind=Kind.HEAD).weight, None), "int8")
    model.logits(x, "head", 100)
    program = model.finish()
    whole = expected(reference(program, model.tensors, False), (range(64), 0, 0))
    for team in teams:
        bound = Bound(program, model.tensors, team)
        every = bound.run((range(64), 0, 0))
        assert_close(every, whole, TOLERANCES["integer product"])
        for wanted in ([63], [5, 2], list(range(0, 64, 7)), []):
            assert same_bits(bound.run((range(64), 0, 0), wanted=wanted), every[wanted])


def test_programs_that_take_turns(teams):
    """What threads tell each other about shared panels is never mistaken for what they told in another program."""
    bound, alone = [], []
    for seed in range(3):
        model = FakeModel(seed)
        x = model.inputs(model.normal(64, 4096))
        (y,) = model.linear(x, y=model.hold(model.matrix("w", (30 + 20 * seed, 4096)), "int8"))
        program = model.result(y)
        alone.append(Bound(program, model.tensors, teams[0]).run(([5], 0, 0)))
        bound.append(Bound(program, model.tensors, teams[2]))
    for _ in range(200):
        bound[0].run(([5], 0, 0))
    for number in 200 * [1, 2, 0, 0]:
        bound[number].compiled.logits[:] = 0
        assert same_bits(bound[number].run(([5], 0, 0)), alone[number])
