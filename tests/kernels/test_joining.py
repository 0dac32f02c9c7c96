"""Whole models: joined kernels give the bits of the operations apart, and what nobody owns stays zero."""

import numpy as np
import pytest

from tests.kernels.binding import Bound, FakeRanks, Held, floats_at, same_bits
from tests.models.tiny import load, random_model
from tpcpu.kernels import record as R
from tpcpu.parallel.partition import Share
from tpcpu.program import cost
from tpcpu.program.lowering import stages
from tpcpu.program.operations import BLOCK, AllReduce, Kind, Logits, ShortConv

FORMS = [("nf4", False), ("nf4", True), ("bf16", True)]
IDS = ["nf4-int8", "nf4-exact", "bf16"]


def held(tiny, form):
    """The model's tensors: what multiplies in `form`, where rows allow it."""
    result = {}
    for weight in tiny.model.program(Share()).weights:
        values = np.asarray(tiny.tensors[weight.name], np.float32)
        wanted = form if weight.kind.multiplies and weight.full_columns % BLOCK == 0 else "bf16"
        result.setdefault(weight.name, Held.of(values, "float32" if weight.kind is Kind.VECTOR else wanted))
    return result


@pytest.mark.parametrize(("form", "exact"), FORMS, ids=IDS)
@pytest.mark.parametrize("name", ["llama-tiny", "yuan-tiny"])
def test_joined_gives_the_bits_of_the_parts(teams, name, form, exact):
    tiny = load(name)
    program, tensors = tiny.model.program(Share()), held(tiny, form)
    ids = np.random.default_rng(5).integers(0, 4000, 80)
    settings = {"exact": exact, "context": 128}
    apart, joined = (Bound(program, tensors, teams[1], join=join, **settings) for join in (False, True))
    assert len(joined.compiled._array) < len(apart.compiled._array)
    for first, last in ((0, 64), (64, 65), (65, 67), (67, 80)):
        part = (ids[first:last], first, 0)
        assert same_bits(joined.run(part), apart.run(part))


def test_every_rule_is_met():
    """The models above use each way of joining, so that comparing their bits compares all rules."""
    met = set()
    for name in ("llama-tiny", "yuan-tiny"):
        program = load(name).model.program(Share())
        for stage in stages(program, {id(operation) for operation in program.operations}):
            met.add((*(type(operation).__name__ for operation in stage.operations), stage.rounded))
    assert {group for group in met if len(group) > 2 or group[-1]} == {
        ("Add", "RmsNorm", True), ("RmsNorm", True), ("Glu", True),
        ("RopeAndStore", "Attention", False),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama-tiny", "yuan-tiny"])
def test_threads_wait_as_often_as_is_said(teams, name):
    """`explain` counts the waits of a step of one token before anything is bound; here they are."""
    tiny = load(name)
    program = tiny.model.program(Share())
    bound = Bound(program, held(tiny, "nf4"), teams[1])
    storage = cost.Storage(head="bf16")
    waits = bound.compiled._array[:, R.BARRIER] & 1
    assert waits.sum() == sum(cost.barriers(program, storage)) + 1
    assert waits[-1]


ODD = {
    "llama": {
        "model_type": "llama", "hidden_size": 80, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 101, "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": True,
    },
    "yuan": {
        "model_type": "yuan", "hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 2,
        "num_attention_heads": 5, "vocab_size": 101,
    },
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_what_a_rank_does_not_own_stays_zero(teams, config, size):
    """Buffers pass their memory on, kernels write whole registers: neighbours' features and padding stay zero."""
    tiny = random_model(config)
    tensors, ranks = held(tiny, "nf4"), FakeRanks(size)
    for rank in range(size):
        program = tiny.model.program(Share(rank, size))
        bound = Bound(program, tensors, teams[2], all_reduce=ranks.ordered, tokens=40)
        for first, last in ((0, 40), (40, 41), (41, 44)):
            bound.run((range(first, last), first, 0))
        foreign = 0
        for buffer in program.buffers:
            if buffer.name not in bound.compiled._buffers._places:
                continue
            place = bound.compiled._buffers[buffer]
            rows = floats_at(place.address, 40 * place.stride // 4).reshape(40, -1)
            outside = np.delete(rows, np.s_[buffer.own.start : buffer.own.stop], axis=1)
            assert not outside.any(), buffer
            foreign += outside.size
        assert foreign
        for number, width in enumerate(program.states):
            memory = bound.cache.memory
            row = memory.state_bytes[number] // 4
            assert not floats_at(memory.states[number], row)[width:].any()


def test_the_models_here_have_what_is_tested():
    program = random_model(ODD["yuan"]).model.program(Share(1, 3))
    kinds = {type(operation) for operation in program.operations}
    assert {AllReduce, ShortConv, Logits} <= kinds
    assert any(buffer.own.start for buffer in program.buffers)
