"""MXFP4 of the OCP Microscaling specification, as gpt-oss is published in it: 4-bit floats and powers of two.

A row is cut into blocks of 32. Each value is one of 16, a sign, two bits of exponent and one of mantissa (e2m1); two
share a byte, the first in the low half. A block's scale is 2^(n - 127), n being a byte (e8m0). A weight is value x
scale, which float32 and bfloat16 hold exactly.

`X` is uint8 (rows, columns / 2); `X.scales` uint8 (rows, columns / 32). Read, and never written.

Knows the arithmetic and the names. Knows nothing of files.
"""

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcpu.errors import CheckpointError
from tpcpu.formats.floats import Array

METHOD = "mxfp4"
"""The name under which configs announce such weights."""

BLOCK = 32
BIAS = 127
LARGEST = 252
"""The byte of the largest scale whose largest weight, 6 times that, is finite."""

CODE: npt.NDArray[np.float32] = np.array(
    [sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], np.float32
)
CODE.flags.writeable = False

STEPS = 2
"""All values are whole numbers of 1 / STEPS: int8 products lose nothing of them."""


def scales_name(name: str) -> str:
    """The name of the scales of the tensor `name`."""
    return f"{name}.scales"


def shape(name: str, codes: tuple[int, ...], scales: tuple[int, ...], dtypes: tuple[str, str]) -> tuple[int, int]:
    """Rows and columns of a tensor by the shapes and dtypes, U8, of its codes and its scales.

    Raises CheckpointError that begins with `name`.
    """
    if dtypes != ("U8", "U8") or len(codes) != 2:
        raise CheckpointError(
            f"{name} is {dtypes[0]} {list(codes)} with scales in {dtypes[1]}; expected matrices of U8"
        )
    rows, columns = codes[0], 2 * codes[1]
    if scales != (rows, columns // BLOCK) or columns % BLOCK:
        raise CheckpointError(
            f"{name} has codes of {rows} x {columns} values and scales of shape {list(scales)}; "
            f"expected one scale for each {BLOCK} values of a row"
        )
    return rows, columns


def is_announced(config: Mapping[str, Any]) -> bool:
    """Whether the config of a checkpoint says that its experts are in this format."""
    section = config.get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == METHOD


def is_stored(name: str, names: Container[str]) -> bool:
    """Whether the tensor called `name` has scales of this format."""
    return scales_name(name) in names


def high_first(codes: Array) -> Array:
    """The bytes with their halves exchanged: the first value in the high one, as bitsandbytes has it."""
    swapped: Array = (codes << np.uint8(4)) | (codes >> np.uint8(4))
    return swapped


def dequantize(codes: Array, scales: Array) -> npt.NDArray[np.float32]:
    """The values, (rows, columns) float32, of codes (rows, columns / 2) and scales (rows, columns / 32)."""
    values = np.stack((CODE[codes & 15], CODE[codes >> 4]), axis=2).reshape(len(codes), -1)
    # Scales below the smallest normal number are no numbers of numpy's ldexp for float32 alone.
    powers = np.ldexp(1.0, scales.astype(np.int32) - BIAS).astype(np.float32)
    out: npt.NDArray[np.float32] = values * np.repeat(powers, BLOCK, axis=1)
    return out
