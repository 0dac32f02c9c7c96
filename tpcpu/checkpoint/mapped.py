"""One safetensors file, mapped: tensors as read-only views of the file's pages, which can be given back.

Knows pages. Knows nothing of folders.
"""

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcpu.checkpoint.header import NUMPY_DTYPES, Header, StoredTensor, read_header
from tpcpu.errors import CheckpointError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def advise(address: int, nbytes: int, advice: int) -> None:
    """`madvise` for the pages that hold `nbytes` bytes at `address`. Only advice that may be given for neighbours too.

    Nothing is lost when the kernel declines.
    """
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    if nbytes:
        _libc.madvise(start, address + nbytes - start, advice)


class Pages:
    """A file that is mapped, of whatever format. Views stay valid as long as they are held, also after `close`."""

    _map: mmap.mmap | None = None

    def _advise(self, start: int, nbytes: int, advice: int) -> None:
        """Advice for bytes of the file that is mapped."""
        # Not the method of mmap: that holds the interpreter lock while the disk is waited for.
        advise(np.frombuffer(self._map, np.uint8).ctypes.data + start, nbytes, advice)  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of the file; its pages go with the last view."""
        mapping, self._map = self._map, None
        try:
            if mapping is not None:
                mapping.close()
        except BufferError:
            pass  # views are still held


class MappedFile(Pages):
    """A validated safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header = read_header(path)
        self.tensors = self.header.tensors
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
        end = max((self.header.offsets[t.name] + t.nbytes for t in self.header.tensors), default=0)
        if end > len(self._map):
            raise CheckpointError(f"{path}: became shorter while it was opened")

    def array(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """The tensor, as a view. It is aligned to its items only where the writer of the file saw to that."""
        dtype = NUMPY_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {tensor.name} is {tensor.dtype}, which cannot be read here")
        if self._map is None:
            raise CheckpointError(f"{self.path} was closed")
        count = tensor.nbytes // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, self.header.offsets[tensor.name]).reshape(tensor.shape)

    def is_mapped(self, tensor: StoredTensor) -> bool:  # noqa: ARG002
        """Whether `array` is a view of the file's pages."""
        return True

    def offset(self, tensor: StoredTensor) -> int | None:
        """Where in the file the tensor begins."""
        return self.header.offsets[tensor.name]

    def advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> None:
        """Advice for the bytes `start` to `stop` of the tensor."""
        if self._map is not None and stop > start:
            self._advise(self.header.offsets[tensor.name] + start, stop - start, advice)
