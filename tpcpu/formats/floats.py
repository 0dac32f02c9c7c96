"""The float formats of checkpoints: bfloat16, float16, float32, and the way between them.

Knows their names, their bits and IEEE rounding (to nearest, ties to even). Knows nothing of files and of tensors'
meaning.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

FLOATS: dict[str, np.dtype[Any]] = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether weights may be stored in this dtype and still be read as numbers: bfloat16, float16 or float32."""
    return dtype in FLOATS.values()


def convert(values: Array, name: str) -> Array:
    """`values` (any shape; bfloat16, float16 or float32) as `name`; the same array where it already is.

    The conversions that matter in bulk are written on integers: numpy runs those without the interpreter lock.
    """
    wanted = FLOATS[name]
    if values.dtype == wanted:
        return values
    if values.dtype == BFLOAT16:
        wide = (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide if wanted == FLOAT32 else _narrow(wide)
    if wanted == FLOAT32:
        return values.astype(np.float32)
    wide = values.astype(np.float32)
    return _to_bfloat16(wide) if wanted == BFLOAT16 else _narrow(wide)


def to_float32(values: Array) -> npt.NDArray[np.float32]:
    """`values` as float32, exactly: both 16-bit formats are subsets of it."""
    return convert(values, "float32")


def _narrow(wide: npt.NDArray[np.float32]) -> Array:
    with np.errstate(over="ignore"):  # beyond 65504 float16 has only infinity; whoever minds looks for it
        return wide.astype(np.float16)


def _to_bfloat16(wide: npt.NDArray[np.float32]) -> Array:
    bits = wide.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    # the carry must not turn a NaN into an infinity or a zero
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return rounded.view(BFLOAT16)
