"""fp8 weights as others publish them: e4m3 values, and scales for blocks of rows and columns, for rows, or for all.

`X.weight` is float8_e4m3fn. Its scales stand beside it: `X.weight_scale_inv`, one for each block of 128 × 128
(DeepSeek, Qwen; the last blocks of a row or column may be short), or `X.weight_scale`, one for each row, or one for
all. The weight is `value × scale` in float32, rounded to bfloat16: what its publishers' own dequantisers give. So an
fp8 tensor is read as the bfloat16 tensor that it stands for.

Scales of activations, which some publish too, are not needed here: activations are not rounded to fp8.

Knows the arithmetic and the names. Knows nothing of files.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tpcpu.errors import CheckpointError
from tpcpu.formats import floats
from tpcpu.formats.floats import Array

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt")
"""Names under which configs announce such weights."""

USUAL_BLOCK = (128, 128)
_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("input_scale", "input_scale_ub", "activation_scale")

_VALUES: npt.NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """Where the scales of a tensor are: their name and shape, and how many rows and columns share each."""

    scales: str
    shape: tuple[int, int]
    block: tuple[int, int]


def part_names(name: str) -> tuple[str, ...]:
    """The names that may accompany `name` in a file."""
    stem = name.removesuffix("weight")
    return tuple(stem + suffix for suffix in (*_SCALES, *_UNUSED)) if name.endswith("weight") else ()


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, by the config of the checkpoint."""
    section = config.get("quantization_config")
    block = section.get("weight_block_size") if isinstance(section, dict) else None
    if block is None:
        return USUAL_BLOCK
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(f"config.json: weight_block_size is {block!r}, expected two sizes, such as [128, 128]")
    return block[0], block[1]


def layout(
    name: str, shape: tuple[int, ...], shape_of: Callable[[str], tuple[int, ...]], names: Container[str],
    block: tuple[int, int] = USUAL_BLOCK,
) -> Layout:  # fmt: skip
    """How the tensor `name` is scaled. Raises CheckpointError naming tensor and fault."""
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"tensor {name}: fp8 of shape {list(shape)}; expected a matrix")
    rows, columns = shape
    found = [each for each in part_names(name)[: len(_SCALES)] if each in names]
    if len(found) != 1:
        wanted = " or ".join(part_names(name)[: len(_SCALES)]) or "a name that ends in weight"
        raise CheckpointError(f"tensor {name} is fp8; expected its scales as {wanted}, found {found or 'neither'}")
    scales = shape_of(found[0])
    in_blocks = (-(-rows // block[0]), -(-columns // block[1]))
    if scales == in_blocks and found[0].endswith("_inv"):
        return Layout(found[0], in_blocks, block)
    if scales in ((), (1,), (1, 1)):
        return Layout(found[0], (1, 1), (rows, columns))
    if scales in ((rows,), (rows, 1)):
        return Layout(found[0], (rows, 1), (1, columns))
    if scales == in_blocks:
        return Layout(found[0], in_blocks, block)
    raise CheckpointError(
        f"tensor {found[0]}: shape {list(scales)}; expected {list(in_blocks)}, one scale for each block of"
        f" {block[0]} x {block[1]} of a weight of {list(shape)}, or [{rows}, 1], or one for all"
    )


def read_scales(of: Layout, get: Callable[[str], Array]) -> npt.NDArray[np.float32]:
    """The scales, `of.shape` float32, all finite. Raises CheckpointError naming tensor and fault."""
    array = get(of.scales)
    if not floats.is_float(array.dtype):
        raise CheckpointError(f"tensor {of.scales} is {array.dtype}; scales are expected as {', '.join(floats.FLOATS)}")
    scales = floats.to_float32(np.ascontiguousarray(array)).reshape(of.shape)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"tensor {of.scales} holds NaN or infinity; get the model anew")
    return scales


def dequantize(
    values: Array, scales: npt.NDArray[np.float32], block: tuple[int, int], row: int = 0, column: int = 0
) -> Array:
    """`values` (rows, columns) of a region that begins at `row`, `column` of the tensor, as bfloat16."""
    rows, columns = values.shape
    down = (np.arange(row, row + rows) // block[0])[:, None]
    right = np.arange(column, column + columns) // block[1]
    wide = _VALUES.take(values.view(np.uint8))
    wide *= scales[down, right[None]]
    return floats.convert(wide, "bfloat16")
