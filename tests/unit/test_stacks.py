"""Stacks of experts: every part is found with its values, places and sizes; what cannot be one is named."""

import mmap

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tpcpu.checkpoint import Checkpoint, Stack
from tpcpu.errors import CheckpointError

RANDOM = np.random.default_rng(0)
EXPERTS = 3
STACKS = (
    Stack("both", ("gate.weight", "up.weight"), 3, turned=True),
    Stack("down", ("down.weight",), 3, turned=True),
    Stack("both_blocks", ("one.weight", "two.weight"), 4),
    Stack("down_blocks", ("last.weight",), 4),
    Stack("both_bias", ("gate.bias", "up.bias"), 2),
    Stack("down_bias", ("down.bias",), 2),
)
STORED = {
    "m.experts.both": RANDOM.standard_normal((EXPERTS, 6, 10)).astype(ml_dtypes.bfloat16),
    "m.experts.down": RANDOM.standard_normal((EXPERTS, 5, 6)).astype(np.float32),
    "m.experts.both_blocks": RANDOM.integers(0, 256, (EXPERTS, 10, 2, 16), np.uint8),
    "m.experts.down_blocks": RANDOM.integers(0, 256, (EXPERTS, 6, 1, 16), np.uint8),
    "m.experts.both_bias": RANDOM.standard_normal((EXPERTS, 10)).astype(np.float32),
    "m.experts.down_bias": RANDOM.standard_normal((EXPERTS, 6)).astype(np.float32),
    "m.down.weight": np.ones((2, 2), np.float32),
}


def parts():
    """What the parts have to be, by name."""
    for expert in range(EXPERTS):
        each, of = f"m.experts.{expert}", {name.rpartition(".")[2]: values for name, values in STORED.items()}
        for first, name in enumerate(("gate", "up")):
            yield f"{each}.{name}.weight", of["both"][expert].T[first::2]
            yield f"{each}.{name}.bias", of["both_bias"][expert][first::2]
        yield f"{each}.down.weight", of["down"][expert].T
        yield f"{each}.down.bias", of["down_bias"][expert]
        for first, name in enumerate(("one", "two")):
            yield f"{each}.{name}.weight", of["both_blocks"][expert][first::2].reshape(5, 32)
        yield f"{each}.last.weight", of["down_blocks"][expert].reshape(6, 16)


def opened(folder, stored=STORED):
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def test_parts(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.take_apart(STACKS)
    wanted = dict(parts())
    assert set(checkpoint.tensors) == {*wanted, "m.down.weight"}
    for name, values in wanted.items():
        tensor, found = checkpoint[name], checkpoint.array(name)
        assert np.array_equal(found, values)
        assert (tensor.shape, tensor.nbytes) == (values.shape, values.nbytes)
        assert tensor.inside.rpartition(".")[0] == "m.experts"
        checkpoint.release(name)
        checkpoint.release(name, 0, tensor.nbytes // 2)
        assert np.array_equal(found, values)
    checkpoint.expect_scattered_reads(True)


def test_places(tmp_path):
    """Who says where a part begins says it truly; a part that lies apart has no place, and no pages of its own."""
    checkpoint = opened(tmp_path)
    checkpoint.take_apart(STACKS)
    together = {"down.bias", "last.weight"}
    for name, values in parts():
        place = checkpoint.place(name)
        assert (place is not None) == checkpoint.is_mapped(name) == (name.split(".", 3)[3] in together)
        if place is not None:
            content = place[0].read_bytes()[place[1] :][: values.nbytes]
            assert content == values.tobytes()
    assert checkpoint.is_mapped("m.down.weight")
    one, two = (checkpoint.neighbours(f"m.experts.1.{part}.weight") for part in ("one", "two"))
    assert one == two != checkpoint.neighbours("m.experts.2.two.weight")
    assert checkpoint.neighbours("m.down.weight") == "m.down.weight"


def test_advice_stays_inside_the_expert(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.take_apart(STACKS)
    given = []
    owner = type("Owner", (), {"advise": lambda _self, tensor, *advice: given.append((tensor.name, *advice))})()
    for name in ("m.experts.1.two.weight", "m.experts.2.last.weight", "m.experts.1.up.weight"):
        checkpoint._owners[name]._owner = owner
    checkpoint.release("m.experts.1.two.weight", 32, 64)
    checkpoint.release("m.experts.2.last.weight", 16, 32)
    checkpoint.release("m.experts.1.up.weight", 10, 20)
    whole = STORED["m.experts.both"].nbytes // EXPERTS
    assert given == [
        ("m.experts.both_blocks", 320 + 64, 320 + 128, mmap.MADV_DONTNEED),
        ("m.experts.down_blocks", 192 + 16, 192 + 32, mmap.MADV_DONTNEED),
        ("m.experts.both", whole, 2 * whole, mmap.MADV_DONTNEED),
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("both", (3, 6, 9)), ("both", (3, 60)), ("down", (3, 5, 6, 1)), ("both_blocks", (3, 9, 2, 16)),
        ("both_blocks", (3, 10, 32)), ("both_bias", (3, 7)), ("down_bias", (18,)), ("down", (0, 5, 6)),
    ],
)  # fmt: skip
def test_a_misshapen_stack_is_named(tmp_path, name, shape):
    checkpoint = opened(tmp_path, {f"m.experts.{name}": np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=rf"tensor m.experts.{name} has shape \[{', '.join(map(str, shape))}\]"):
        checkpoint.take_apart(STACKS)


def test_a_missing_part_is_named_with_its_stack(tmp_path):
    stored = {name: values for name, values in STORED.items() if not name.endswith("both_blocks")}
    checkpoint = opened(tmp_path, stored)
    checkpoint.take_apart(STACKS)
    with pytest.raises(
        CheckpointError, match=r"m.experts.1.one.weight is missing, and .* m.experts.both_blocks either"
    ):
        checkpoint.array("m.experts.1.one.weight")


def test_the_same_part_twice(tmp_path):
    stored = STORED | {"m.experts.1.down.weight": np.zeros((6, 5), np.float32)}
    checkpoint = opened(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"tensor m.experts.1.down.weight is there, and also a part of m.experts"):
        checkpoint.take_apart(STACKS)
