"""One GGUF file: its metadata and the places of its tensors, through the interface of a mapped safetensors file.

Tensors are given as rows of bytes: what these mean is in `formats.ggml`. Every count in the file is compared with the
bytes that are left before anything is made of it.

Knows the format. Knows nothing of models.
"""

import math
import mmap
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcpu.checkpoint.header import StoredTensor
from tpcpu.checkpoint.mapped import Pages
from tpcpu.errors import CheckpointError

_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LONGEST_NAME = 1 << 16
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24  # bytes of the shortest entry of the metadata, and of a tensor's

Sizes = dict[int, tuple[str, int, int]]
"""Of ggml's types by number: name, weights of a block, bytes of a block."""


class _Fault(Exception):  # noqa: N818
    """What is wrong, in words."""


class _Cursor:
    """Reads numbers and texts one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self.at

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.left:
            raise _Fault("ends in the middle of its header; it is truncated or damaged")
        self.at += nbytes
        return self._data[self.at - nbytes : self.at]

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self) -> str:
        # tokens may be parts of characters
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def count(self, least: int, what: str) -> int:
        """A number of things of at least so many bytes."""
        count = self.number("Q")
        if count > self.left // least:
            raise _Fault(f"says that it has {count} {what}, more than its {self.left} bytes can hold")
        return count

    def value(self, inside: bool = False) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and not inside:
            return self.array()
        if kind not in _NUMBERS:
            raise _Fault(f"has metadata of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def array(self) -> list[Any]:
        kind = self.number("I")
        if kind == _STRING:
            return [self.text() for _ in range(self.count(8, "texts in a list"))]
        if kind not in _NUMBERS:
            raise _Fault(f"has a list of the type {kind} in its metadata, which is not known")
        dtype = np.dtype(_NUMBERS[kind])
        count = self.count(dtype.itemsize, "numbers in a list")
        return list(np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist())


class GgufFile(Pages):
    """A GGUF file. Views stay valid as long as they are held, also after `close`."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        """Raises CheckpointError naming file and fault."""
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata: dict[str, Any] = {}
            self._offsets: dict[str, int] = {}
            self.tensors = self._read(_Cursor(self._map), sizes)
        except _Fault as fault:
            raise CheckpointError(f"{path}: {fault}") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except ValueError:  # an empty file cannot be mapped
            raise CheckpointError(f"{path}: is empty; expected a GGUF file") from None

    def _read(self, cursor: _Cursor, sizes: Sizes) -> tuple[StoredTensor, ...]:
        if cursor.take(min(4, cursor.left)) != b"GGUF":
            raise _Fault("is no GGUF file: it does not begin with GGUF")
        version = cursor.number("I")
        if version not in (2, 3):
            raise _Fault(f"is GGUF of version {version}; versions 2 and 3 are read, little-endian")
        count = cursor.count(_LEAST_TENSOR, "tensors")
        for _ in range(cursor.count(_LEAST_ENTRY, "entries of metadata")):
            key = cursor.text()
            if key in self.metadata:
                raise _Fault(f"has two entries {key!r:.80} in its metadata")
            self.metadata[key] = cursor.value()
        described = [self._tensor(cursor, sizes) for _ in range(count)]
        unit = self.metadata.get("general.alignment", 32)
        if type(unit) is not int or not 0 < unit <= 1 << 20 or unit & (unit - 1):
            raise _Fault(f"has general.alignment {unit!r:.80}, expected a power of two")
        start = -(-cursor.at // unit) * unit
        tensors = []
        for tensor, offset in described:
            if tensor.name in self._offsets:
                raise _Fault(f"has two tensors {tensor.name!r:.80}")
            if start + offset + tensor.nbytes > cursor.at + cursor.left:
                raise _Fault(
                    f"tensor {tensor.name!r:.80} ends at byte {start + offset + tensor.nbytes}, outside the file"
                    f" ({cursor.at + cursor.left} bytes): truncated"
                )
            self._offsets[tensor.name] = start + offset
            tensors.append(tensor)
        tensors.sort(key=lambda tensor: (self._offsets[tensor.name], tensor.name))
        return tuple(tensors)

    def _tensor(self, cursor: _Cursor, sizes: Sizes) -> tuple[StoredTensor, int]:
        name = cursor.text()
        dimensions = cursor.number("I")
        if len(name) > _LONGEST_NAME or not 1 <= dimensions <= 4:
            raise _Fault(f"tensor {name!r:.80} has {dimensions} dimensions, expected 1 to 4")
        # the first is the one whose values lie together
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in sizes:
            known = ", ".join(each[0] for each in sizes.values())
            raise _Fault(f"tensor {name!r:.80} is of ggml's type {kind}, which is not read; known: {known}")
        dtype, weights, nbytes = sizes[kind]
        if not all(0 < size < 2**40 for size in shape) or math.prod(shape) >= 2**56 or shape[-1] % weights:
            raise _Fault(f"tensor {name!r:.80} has the shape {list(shape)}; {dtype} needs rows of whole {weights}")
        return StoredTensor(name, dtype, shape, math.prod(shape) // weights * nbytes, self.path), offset

    def rename(self, names: dict[str, str]) -> None:
        """Calls each tensor by another name. Raises CheckpointError where two would have one."""
        if len(set(names.values())) < len(names):
            raise CheckpointError(f"{self.path}: has tensors of which two stand for one")
        self._offsets = {names[name]: offset for name, offset in self._offsets.items()}
        self.tensors = tuple(replace(tensor, name=names[tensor.name]) for tensor in self.tensors)

    def array(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """The tensor as rows of bytes, a view."""
        if self._map is None:
            raise CheckpointError(f"{self.path} was closed")
        rows = math.prod(tensor.shape[:-1])
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, self._offsets[tensor.name]).reshape(rows, -1)

    def is_mapped(self, tensor: StoredTensor) -> bool:  # noqa: ARG002
        """Whether `array` is a view of the file's pages."""
        return True

    def offset(self, tensor: StoredTensor) -> int | None:
        """Where in the file the tensor begins."""
        return self._offsets[tensor.name]

    def advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> None:
        """Advice for the bytes `start` to `stop` of the tensor."""
        if self._map is not None and stop > start:
            self._advise(self._offsets[tensor.name] + start, stop - start, advice)
