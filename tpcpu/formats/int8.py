"""int8 with one scale per 64: a format of our own, in numpy, the specification.

Stored as two tensors. `X.weight` is int8 in the shape of the original. `X.weight.scale` is float32, (rows, columns /
64), where rows is the first dimension and columns the product of the others, a multiple of 64; blocks run along a row.
A config says `"quantization_config": {"quant_method": "tpcpu_int8", "block": 64}`.

For each block `scale = max|x| / 127`, rounded to float32; `value = round(x / scale)` to nearest, ties to even, within
±127; a block whose scale is 0 holds zeros. The weight is `value × scale`, rounded once. Every step is float32.

Knows the arithmetic and the names. Knows nothing of files; `kernels/quantize.py` is tested against this.
"""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tpcpu.errors import CheckpointError
from tpcpu.formats.floats import Array, to_float32

BLOCK = 64
QUANTIZATION_CONFIG = {"quant_method": "tpcpu_int8", "block": BLOCK}


@dataclass(frozen=True, eq=False)
class Int8Tensor:
    """One tensor in int8; `columns` is the product of all dimensions but the first."""

    shape: tuple[int, ...]
    values: npt.NDArray[np.int8]  # (rows, columns)
    scales: npt.NDArray[np.float32]  # (rows, columns / 64)

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the tensor."""
        return self.values.nbytes + self.scales.nbytes


def quantize(values: Array) -> Int8Tensor:
    """`values` in int8: rows of a multiple of 64, of bfloat16, float16 or float32, all finite."""
    rows, columns = values.shape[0], math.prod(values.shape[1:])
    if columns % BLOCK:
        raise CheckpointError(f"int8 needs rows of a multiple of {BLOCK} values, found {columns}")
    blocks = to_float32(values.reshape(-1)).reshape(rows, columns // BLOCK, BLOCK)
    scales = np.abs(blocks).max(axis=2, initial=0) / np.float32(127)
    # dividing by infinity is what a block of zeros wants: zeros, without a branch
    divisor = np.where(scales == 0, np.float32(np.inf), scales)
    limit = np.float32(127)
    rounded = np.rint(np.clip(blocks / divisor[:, :, None], -limit, limit))
    return Int8Tensor(values.shape, rounded.astype(np.int8).reshape(rows, columns), scales)


def dequantize(tensor: Int8Tensor) -> npt.NDArray[np.float32]:
    """The values, `tensor.shape` float32."""
    rows, columns = tensor.values.shape
    blocks = tensor.values.reshape(rows, columns // BLOCK, BLOCK).astype(np.float32)
    blocks *= tensor.scales[:, :, None]
    return blocks.reshape(tensor.shape)


def scale_name(name: str) -> str:
    """The name of the scales of the tensor `name`."""
    return f"{name}.scale"


def is_stored(name: str, names: Container[str]) -> bool:
    """Whether `name` is stored in this format."""
    return scale_name(name) in names


def to_tensors(name: str, tensor: Int8Tensor) -> dict[str, Array]:
    """The stored parts of the tensor called `name`."""
    return {name: tensor.values.reshape(tensor.shape), scale_name(name): tensor.scales}


def from_tensors(name: str, get: Callable[[str], Array], names: Container[str]) -> Int8Tensor:
    """Read the tensor called `name` from its stored parts. Raises CheckpointError naming tensor and fault."""
    if scale_name(name) not in names:
        raise CheckpointError(f"tensor {name} has no {scale_name(name)}: it is not stored as int8")
    values, scales = get(name), get(scale_name(name))
    if values.dtype != np.int8 or values.ndim < 2:
        raise CheckpointError(
            f"tensor {name}: found {values.dtype} of shape {list(values.shape)}, expected a matrix of int8"
        )
    rows, columns = values.shape[0], math.prod(values.shape[1:])
    expected = (rows, columns // BLOCK)
    if columns % BLOCK or scales.dtype != np.float32 or scales.shape != expected:
        raise CheckpointError(
            f"tensor {scale_name(name)}: found {scales.dtype} of shape {list(scales.shape)}, expected float32 of"
            f" [{rows}, {columns}/{BLOCK}] with whole blocks"
        )
    return Int8Tensor(values.shape, values.reshape(rows, columns), scales)
