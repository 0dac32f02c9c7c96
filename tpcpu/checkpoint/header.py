"""What a safetensors file says about itself: names, dtypes, shapes and places of its tensors.

The `safetensors` library's own parser decides whether a file is valid; the places, which it keeps to itself, are then
read from the JSON header, where a name that stands twice is refused. Sizes are bounded before anything is allocated.

Knows the format. Knows nothing of models and of what the bytes mean.
"""

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tpcpu.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""The dtypes whose tensors can be read; others may be in a file, and are an error only when asked for."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, unread."""

    name: str
    dtype: str  # as safetensors writes it: BF16, F16, F32, U8, I8, …
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    inside: str = ""  # the tensor of the file that it is a part of, where it has no place of its own there

    @property
    def title(self) -> str:
        """Its name as messages have it: with that of the tensor that holds it."""
        return f"{self.name}, a part of {self.inside}," if self.inside else self.name


@dataclass(frozen=True)
class Header:
    """The header of one file: its tensors, and where in the file each begins (bytes)."""

    tensors: tuple[StoredTensor, ...]
    offsets: dict[str, int]


def read_header(path: Path) -> Header:
    """The header of the safetensors file `path`, validated. Raises CheckpointError naming file and fault."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{path}: {size} bytes are too few for a safetensors file; it is truncated or empty"
                )
            length = struct.unpack("<Q", prefix)[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                limit = (
                    f"{size} bytes of the file"
                    if length <= MAX_HEADER_BYTES
                    else f"{MAX_HEADER_BYTES} the format allows"
                )
                raise CheckpointError(
                    f"{path}: its header would be {length} bytes long, more than the {limit};"
                    " it is truncated or no safetensors file"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    _validate(path, text, size - 8 - length)
    # Valid for the library: what follows can rely on types, and on places inside the file without holes or overlaps.
    entries = parse_json(text, f"{path}: header")
    tensors, offsets = [], {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):  # the library takes bare lists too
            raise CheckpointError(f"{path}: the entry of tensor {name!r} is not a JSON object")
        start, stop = entry["data_offsets"]
        tensors.append(StoredTensor(name, entry["dtype"], tuple(entry["shape"]), stop - start, path))
        offsets[name] = 8 + length + start
    # in the order of the data, which is the order to read them in; JSON objects promise none
    tensors.sort(key=lambda tensor: (offsets[tensor.name], tensor.name))
    return Header(tuple(tensors), offsets)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises CheckpointError for anything else, and for a name that stands twice."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where}: the name {name!r} stands twice")
        return entries

    try:
        value = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _validate(path: Path, text: bytes, data_bytes: int) -> None:
    try:
        with safe_open(path, framework="numpy"):
            return
    except (SafetensorError, ValueError, OverflowError, OSError) as error:
        refusal = str(error).removeprefix("Error while deserializing header: ")
    fault = _diagnose(parse_json(text, f"{path}: header"), data_bytes) or refusal
    raise CheckpointError(f"{path}: not a valid safetensors file: {fault}")


def _diagnose(entries: dict[str, Any], data_bytes: int) -> str | None:
    """What is wrong with a header that the library refused, naming the tensor; None where that is not plain."""
    places = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
                if not all(type(size) is int and size >= 0 for size in shape):
                    return f"tensor {name!r} has the shape {shape!r}"
                known = NUMPY_DTYPES.get(dtype)
                if known is not None and math.prod(shape) * known.itemsize != stop - start:
                    wanted = math.prod(shape) * known.itemsize
                    return f"tensor {name!r}: {dtype} of shape {shape} needs {wanted} bytes, it has {stop - start}"
                places.append((start, stop, name))
            case _:
                return f"the entry of tensor {name!r} is not of the form dtype, shape, data_offsets"
    end, before = 0, "the header"
    for start, stop, name in sorted(places):
        if start != end:
            gap = "overlap" if start < end else "leave a hole"
            return f"tensor {name!r} begins at byte {start} of the data, but {before!r} ends at {end}: they {gap}"
        end, before = stop, name
    if end > data_bytes:
        return f"tensor {before!r} ends at byte {end} of the data, outside the file ({data_bytes} bytes): truncated"
    if end < data_bytes:
        return f"{data_bytes - end} bytes after tensor {before!r} belong to no tensor"
    return None
