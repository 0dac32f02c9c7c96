"""fp8 against torch's own arithmetic, in each of the published layouts; what is misshapen is named."""

import numpy as np
import pytest

from tpcpu.errors import CheckpointError
from tpcpu.formats import floats, fp8

torch = pytest.importorskip("torch")

NAME, INV, SCALE = "x.weight", "x.weight_scale_inv", "x.weight_scale"


def read(tensors, block=fp8.USUAL_BLOCK):
    """The tensor called NAME, dequantised."""
    values = tensors[NAME]
    found = fp8.layout(NAME, values.shape, lambda name: tensors[name].shape, tensors, block)
    return fp8.dequantize(values, fp8.read_scales(found, tensors.__getitem__), found.block)


def random(rows, columns):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    return values, values.view(torch.uint8).numpy().view(fp8.E4M3)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(INV, (3, 4)), (SCALE, ()), (SCALE, (1,)), (SCALE, (300,)), (SCALE, (300, 1)), (SCALE, (3, 4)), (INV, (1,))],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(name, shape, dtype):
    theirs, ours = random(300, 500)
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    scales = scales.to(getattr(torch, dtype)).float()
    wide = scales
    if shape == (3, 4):
        wide = scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :500]
    elif shape == (300,):
        wide = scales[:, None]
    expected = (theirs.float() * wide).to(torch.bfloat16)
    found = read({NAME: ours, name: floats.convert(scales.numpy(), dtype)})
    assert np.array_equal(found.view(np.uint16), expected.view(torch.uint16).numpy())


def test_a_region_is_a_part_of_the_whole():
    _, values = random(300, 500)
    scales = np.random.default_rng(0).random((3, 4), np.float32)
    whole = fp8.dequantize(values, scales, (128, 128))
    part = fp8.dequantize(values[100:290, 77:400], scales, (128, 128), 100, 77)
    assert np.array_equal(part.view(np.uint16), whole[100:290, 77:400].view(np.uint16))


def test_every_value_of_e4m3():
    every = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(every.copy()).view(torch.float8_e4m3fn).to(torch.bfloat16).view(torch.uint16).numpy()
    found = fp8.dequantize(every.view(fp8.E4M3)[None], np.ones((1, 1), np.float32), (1, 256))[0]
    numbers = ~np.isnan(found.astype(np.float32))
    assert np.array_equal(found.view(np.uint16)[numbers], expected[numbers])
    assert (~numbers).sum() == 2


GOOD = {NAME: np.zeros((300, 500), fp8.E4M3), INV: np.ones((3, 4), np.float32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({INV: None}, f"tensor {NAME} is fp8; .*{INV} or {SCALE}.*neither"),
        ({SCALE: np.ones(1, np.float32)}, f"tensor {NAME}.*found"),
        ({INV: np.ones((4, 3), np.float32)}, rf"tensor {INV}: shape \[4, 3\]; expected \[3, 4\]"),
        ({INV: np.ones((3, 4), np.uint8)}, f"tensor {INV} is uint8"),
        ({INV: np.full((3, 4), np.nan, np.float32)}, f"tensor {INV} holds NaN"),
        ({NAME: np.zeros((2, 3, 4), fp8.E4M3)}, f"tensor {NAME}: fp8 of shape"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    tensors = {name: values for name, values in (GOOD | changes).items() if values is not None}
    with pytest.raises(CheckpointError, match=message):
        read(tensors)


@pytest.mark.parametrize("block", [[128], "128", [0, 128], [128, 1.5]])
def test_block_sizes_that_are_none(block):
    with pytest.raises(CheckpointError, match="weight_block_size"):
        fp8.block_of({"quantization_config": {"weight_block_size": block}})
    assert fp8.block_of({"quantization_config": {"weight_block_size": [64, 32]}}) == (64, 32)
    assert fp8.block_of({}) == (128, 128)
