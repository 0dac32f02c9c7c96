"""int8 with a scale per 64: exact by its definition, near to what was given, and read back from its parts."""

import numpy as np
import pytest

from tpcpu.errors import CheckpointError
from tpcpu.formats import int8
from tpcpu.formats.floats import FLOATS, convert


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(8, 64), (7, 192), (6, 32, 2, 1)])
def test_error_is_at_most_half_a_step(shape, dtype):
    values = convert(np.random.default_rng(0).standard_normal(shape).astype(np.float32), dtype)
    tensor = int8.quantize(values)
    assert tensor.values.dtype == np.int8
    assert tensor.values.min() >= -127
    columns = values.size // values.shape[0]
    assert tensor.scales.shape == (values.shape[0], columns // 64)
    error = np.abs(int8.dequantize(tensor) - values.astype(np.float32)).reshape(-1, 64)
    assert (error <= tensor.scales.reshape(-1, 1) * 0.5001).all()


def test_integers_survive():
    values = np.arange(-127, 129, dtype=np.float32).reshape(1, 256)
    values[0, ::64] = 127  # each block has a scale of 1
    values = np.clip(values, -127, 127)
    assert np.array_equal(int8.dequantize(int8.quantize(values)), values)


def test_ties_go_to_even():
    values = np.zeros((1, 64), np.float32)
    values[0, :5] = [127, 0.5, 1.5, -0.5, -2.5]
    assert int8.quantize(values).values[0, :5].tolist() == [127, 0, 2, 0, -2]


def test_zero_blocks_are_zero():
    values = np.zeros((2, 128), np.float32)
    values[1, 3] = 5
    tensor = int8.quantize(values)
    assert np.array_equal(int8.dequantize(tensor)[0], values[0])
    assert tensor.scales[0].tolist() == [0, 0]


def test_parts_round_trip():
    values = np.random.default_rng(0).standard_normal((6, 32, 2, 1)).astype(np.float32)
    tensor = int8.quantize(values)
    parts = int8.to_tensors("c.weight", tensor)
    assert parts["c.weight"].shape == values.shape
    again = int8.from_tensors("c.weight", parts.__getitem__, parts)
    assert again.shape == tensor.shape
    assert np.array_equal(int8.dequantize(again), int8.dequantize(tensor))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w.scale": None}, "not stored as int8"),
        ({"w": np.zeros((2, 64), np.uint8)}, "expected a matrix of int8"),
        ({"w": np.zeros((2, 65), np.int8)}, "whole blocks"),
        ({"w.scale": np.zeros((2, 2), np.float32)}, r"shape \[2, 2\]"),
        ({"w.scale": np.zeros((2, 1), np.float16)}, "float16"),
    ],
)
def test_broken_tensors_are_named(changes, message):
    parts = {"w": np.zeros((2, 64), np.int8), "w.scale": np.zeros((2, 1), np.float32)} | changes
    parts = {name: part for name, part in parts.items() if part is not None}
    with pytest.raises(CheckpointError, match=message) as error:
        int8.from_tensors("w", parts.__getitem__, parts)
    assert "tensor w" in str(error.value)


def test_rows_must_be_whole_blocks():
    with pytest.raises(CheckpointError, match="found 65"):
        int8.quantize(np.zeros((1, 65), np.float32))
