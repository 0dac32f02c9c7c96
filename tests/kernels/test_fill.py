"""Random weights: all of their memory is written, nothing in it is out of range, and products keep their size."""

import math

import numpy as np
import pytest

from tests.configs import PUBLISHED
from tpcpu.engine.cache import Cache
from tpcpu.engine.engine import Engine, Options
from tpcpu.engine.fake import FakeWeights
from tpcpu.errors import UsageError
from tpcpu.kernels import fill
from tpcpu.kernels import record as R
from tpcpu.kernels.compile import prepare
from tpcpu.parallel.communicator import AllReduce, Solo
from tpcpu.parallel.numa import arena
from tpcpu.parallel.partition import Share
from tpcpu.program import builder as program_builder
from tpcpu.program.batch import Batch
from tpcpu.program.compiled import Compiled
from tpcpu.program.kv_format import KV_FORMATS
from tpcpu.program.operations import Kind
from tpcpu.program.weights import NOISE_FORMS, Draw, Noise, Packed, Packer, Table, packed_bytes

NAMES = {R.NF4: "nf4", R.INT8: "int8", R.MXFP4: "mxfp4", R.BF16: "bf16", R.FLOAT32: "float32"}


@pytest.fixture(autouse=True, scope="module")
def _prepared():
    prepare([fill.fill_bytes, fill.fill_float32, fill.fill_bf16])


def drawn(team, draw, dtype, count, units=7):
    memory = arena(count * np.dtype(dtype).itemsize)
    team.run(draw.record(memory.address, memory.nbytes, units))
    return np.asarray(memory).view(dtype).copy()


def test_contents_do_not_depend_on_the_number_of_threads(teams):
    for kernel, dtype in ((fill.fill_bytes, np.uint8), (fill.fill_float32, np.float32), (fill.fill_bf16, np.uint16)):
        one, two, three = (drawn(team, Draw(kernel, 5, middle=1, spread=0.5), dtype, 7 * 4096) for team in teams)
        assert np.array_equal(one, two)
        assert np.array_equal(one, three)
        assert not np.array_equal(one, drawn(teams[0], Draw(kernel, 6, middle=1, spread=0.5), dtype, 7 * 4096))


def test_bytes_are_evenly_drawn_and_every_page_is_its_own(teams):
    values = drawn(teams[1], Draw(fill.fill_bytes, 1), np.uint8, 7 << 18)
    counts = np.bincount(values, minlength=256) / len(values)
    assert np.allclose(counts, 1 / 256, rtol=0.1)
    pages = values.reshape(-1, 4096)
    assert len(np.unique(pages, axis=0)) == len(pages)


def test_bits_that_are_asked_for_are_set(teams):
    values = drawn(teams[1], Draw(fill.fill_bytes, 1, bits=0x0101010101010101), np.int8, 7 << 12)
    assert (values & 1).all()
    assert values.min() == -127


@pytest.mark.parametrize(("kernel", "dtype"), [(fill.fill_float32, np.uint32), (fill.fill_bf16, np.uint16)])
def test_floats_are_evenly_drawn_around_the_middle(teams, kernel, dtype):
    bits = drawn(teams[1], Draw(kernel, 3, middle=2.0, spread=0.5), dtype, 7 << 14)
    values = (bits.astype(np.uint32) << (16 if dtype == np.uint16 else 0)).view(np.float32)
    assert np.isfinite(values).all()
    assert 1.5 <= values.min() < 1.52
    assert 2.48 < values.max() <= 2.5
    assert abs(values.mean() - 2) < 0.02
    assert abs(values.std() - 0.5 / math.sqrt(3)) < 0.01


@pytest.mark.parametrize("form", NOISE_FORMS, ids=NAMES.get)
@pytest.mark.parametrize("share", [Share(), Share(1, 3)], ids=["whole", "1 of 3"])
def test_a_product_with_a_random_weight_keeps_the_size_of_its_input(teams, form, share):
    """x of deviation 1 gives y of deviation 1, also in a part of rows that no panel divides."""
    x = np.random.default_rng(0).standard_normal((3, 2048)).astype(np.float32)
    builder = Builder(share)
    program = builder.result(builder.embed("x", *x.shape))
    answers = []
    for team in teams:
        (weight,) = (each for each in program.weights if each.kind is Kind.HEAD)
        nbytes = packed_bytes(len(weight.rows), 2048, form)
        packer = Packer(team, arena(nbytes))
        packed = packer.fill(weight, Noise(form, 1 / math.sqrt(2048), 9))
        packer.flush()
        assert nbytes - 128 < packed.nbytes <= 1.01 * nbytes
        (table,) = (each for each in program.weights if each.kind is Kind.EMBEDDING)
        weights = {weight.key: packed, table.key: Table(x, R.FLOAT32)}
        cache = Cache(program, context=16, page_tokens=16, sequences=1, kv=KV_FORMATS["bf16"])
        compiled = Compiled(program, weights, cache.memory, team, tokens=3, wanted=3, all_reduce=AllReduce("local"))
        batch = Batch.build([(range(3), 0, cache.begin().state, [0])], range(3), candidates=0, vocabulary=400)
        answers.append(compiled.run(batch).copy())
    assert answers[0].shape == (3, len(weight.rows))
    assert np.isfinite(answers[0]).all()
    # Scales that are powers of two come within a root of 2.
    least, most = (0.6, 1.6) if form == R.MXFP4 else (0.85, 1.15)
    assert least < answers[0].std() < most
    assert abs(answers[0].mean()) < 0.25
    assert all(np.array_equal(answers[0], other) for other in answers[1:])


class Builder(program_builder.Builder):
    """Logits of x and nothing between."""

    def result(self, x):
        self.logits(x, "head", 400)
        return self.finish()


SMALL = {
    "yuan2-2b": {"num_hidden_layers": 3, "vocab_size": 1003},
    "llama-1b": {"num_hidden_layers": 3, "vocab_size": 1003},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", [None, "int8", "bf16", "float32"])
def test_a_model_of_random_weights_stays_near_one(name, form):
    """Logits of a few layers in the published widths: finite, of deviation 1, and the same whatever the threads."""
    answers = []
    for threads in (1, 2):
        engine = Engine(FakeWeights(PUBLISHED[name] | SMALL[name]), Solo(), Options(form, threads=threads, context=64))
        cached = engine.cache.begin()
        engine.cache.reserve(cached, 4)
        batch = Batch.build([([1, 2, 3, 999], 0, cached.state, cached.pages)], [3], candidates=0, vocabulary=1003)
        (candidates,) = engine.step(batch)
        answers.append(candidates.logits)
        held = [each for each in engine.weights.values() if isinstance(each, Packed)]
        assert {each.form for each in held} == {None: {R.NF4, R.INT8}, "int8": {R.INT8}, "bf16": {R.BF16}}.get(
            form, {R.FLOAT32}
        )
        assert engine.source.loaded_bytes >= engine.weight_bytes * 0.99
        engine.close()
    assert answers[0].shape == (1003,)
    assert np.isfinite(answers[0]).all()
    assert 0.7 < answers[0].std() < 1.4
    assert np.array_equal(*answers)


@pytest.mark.parametrize(
    ("options", "part"), [({"format": "fp8"}, "--format fp8"), ({"lm_head": "fp8"}, "--lm-head fp8")]
)
def test_unknown_formats_are_refused(options, part):
    with pytest.raises(UsageError, match=f"{part} is unknown"):
        Engine(FakeWeights(PUBLISHED["llama-1b"]), Solo(), Options(**options))
