"""What the builder gives: divisions, buffers, declared weights, and the readings of an operation."""

import pytest

from tests.configs import PUBLISHED
from tpcpu.models import multiplying, read_config
from tpcpu.parallel.partition import Range, Share
from tpcpu.program.builder import Builder
from tpcpu.program.operations import Kind, Linear, Logits, ShortConv, inputs, outputs, weights

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 16, "attention_bias": True,
    "tie_word_embeddings": True,
}  # fmt: skip


def program(config, rank=0, size=1):
    return read_config(config).program(Share(rank, size))


@pytest.mark.parametrize("config", [TINY, PUBLISHED["yuan2-2b"]], ids=["llama", "yuan"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_rank_walks_the_same_list(config, size):
    programs = [program(config, rank, size) for rank in range(size)]
    for together in zip(*(p.operations for p in programs), strict=True):
        assert len({type(operation) for operation in together}) == 1
    assert len({p.layer_of for p in programs}) == 1
    assert isinstance(programs[0].operations[-1], Logits)


@pytest.mark.parametrize("config", [TINY, PUBLISHED["yuan2-2b"]], ids=["llama", "yuan"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_buffers_are_written_once_before_they_are_read(config, size):
    for rank in range(size):
        of_rank = program(config, rank, size)
        written = []
        for operation in of_rank.operations:
            assert set(inputs(operation)) <= set(written)
            written += outputs(operation)
        assert sorted(buffer.name for buffer in written) == sorted(buffer.name for buffer in of_rank.buffers)
        assert len(set(written)) == len(written)


@pytest.mark.parametrize("config", [TINY, PUBLISHED["yuan2-2b"]], ids=["llama", "yuan"])
def test_declared_weights_are_those_that_operations_read(config):
    of_rank = program(config, 1, 3)
    read = {weight for operation in of_rank.operations for weight in weights(operation)}
    assert read == set(of_rank.weights)


def test_a_tied_head_is_declared_beside_the_embedding():
    """One tensor, two weights: the head may have a format of its own, and a rank holds a part of its rows."""
    tied = [weight for weight in program(TINY, 1, 2).weights if weight.name == "model.embed_tokens.weight"]
    assert [(weight.kind, weight.rows) for weight in tied] == [
        (Kind.EMBEDDING, Range(0, 16)), (Kind.HEAD, Range(8, 16)),
    ]  # fmt: skip


def test_a_rank_without_rows_holds_no_bias():
    """An empty range is false: such a rank once held the whole bias, and could not run."""
    of_rank = program(TINY | {"num_attention_heads": 2, "num_key_value_heads": 2}, 0, 3)
    held = {weight.name: weight for weight in of_rank.weights}
    assert held["model.layers.0.self_attn.q_proj.weight"].size == 0
    assert held["model.layers.0.self_attn.q_proj.bias"].size == 0
    assert Builder(Share()).vector("all", 7).size == 7


def test_columns_cover_blocks_and_own_features_stay_marked():
    """Heads of 24: rank 1 of 3 has features 48 to 95 of 144, in the blocks of 64 from 0 to 127."""
    of_rank = program(TINY, 1, 3)
    (output,) = [
        operation for operation, layer in zip(of_rank.operations, of_rank.layer_of, strict=True)
        if layer == 0 and isinstance(operation, Linear) and "o_proj" in operation.segments[0].weight.name
    ]  # fmt: skip
    assert output.segments[0].weight.columns == Range(0, 128)
    assert (output.x.width, output.x.own) == (128, Range(48, 96))


def test_yuan_ranks_take_queries_and_keys_from_the_stack():
    """q_proj stacked on k_proj holds q and k of each head in turn: 3 ranks of 32 heads cut both tensors."""
    config = PUBLISHED["yuan2-2b"]
    rows = []
    for rank in range(3):
        held = {weight.name: weight for weight in program(config, rank, 3).weights}
        names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"]
        rows.append([(held[name].rows.start, held[name].rows.stop) for name in names])
    assert rows == [[(0, 1280), (0, 0)], [(1280, 2048), (0, 640)], [(2048, 2048), (640, 2048)]]


def test_a_yuan_layer_has_three_messages_and_its_convolutions_are_divided():
    of_rank = program(PUBLISHED["yuan2-102b"], 1, 4)
    layer = [operation for operation, n in zip(of_rank.operations, of_rank.layer_of, strict=True) if n == 5]
    assert sum(type(operation).__name__ == "AllReduce" for operation in layer) == 3
    first, second = [operation for operation in layer if isinstance(operation, ShortConv)]
    assert first.weight.rows == Range(1024, 2048)
    assert (second.weight.rows, second.weight.columns) == (Range(0, 8192), Range(2048, 4096))
    assert second.bias is None  # added once, after the sum
    assert of_rank.states == (8192, 1024) * 84


def test_what_multiplies_is_quantised():
    names = multiplying(read_config(PUBLISHED["yuan2-2b"]))
    assert len(names) == 24 * 9
    assert "model.layers.3.self_attn.lf_gate.conv1.weight" in names
    assert not any("norm" in name or "bias" in name or "embed" in name for name in names)
