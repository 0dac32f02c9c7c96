"""The values of a tensor in pieces, whatever way it is stored: views of its file where they stand there as floats.

Knows formats and checkpoints. Knows nothing of what becomes of the values.
"""

import math
from abc import ABC, abstractmethod

import numpy as np

from tpcpu.checkpoint import Checkpoint, StoredTensor
from tpcpu.formats import fp8, ggml
from tpcpu.formats.floats import Array
from tpcpu.quantize.gguf import GgufCheckpoint

PIECE = 1 << 20  # values that one thread converts at a time: a few megabytes of source

DTYPE_NAMES = dict.fromkeys(ggml.BY_NAME, "bfloat16") | {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F8_E4M3": "bfloat16",
}
"""What stored tensors become where they are kept as they are: floats, by safetensors' and ggml's names."""


class Values(ABC):
    """A tensor's values, flattened, cut into pieces of `step` values, of which the last may be short."""

    dtype: str  # of the pieces: bfloat16, float16 or float32

    def __init__(self, checkpoint: Checkpoint, tensor: StoredTensor, step: int) -> None:
        self._checkpoint, self.tensor, self.step = checkpoint, tensor, step
        self.size = math.prod(tensor.shape)
        self.dtype = DTYPE_NAMES[tensor.dtype]

    @abstractmethod
    def piece(self, start: int) -> Array:
        """The values from `start` on, aligned; to be read only. Called by many threads."""

    def stored_bytes(self, start: int) -> int:
        """Bytes of the file that the piece is made of."""
        return self._place(min(start + self.step, self.size)) - self._place(start)

    def release(self, start: int) -> None:
        """Gives the pages of a piece back."""
        self._checkpoint.release(self.tensor.name, self._place(start), self._place(min(start + self.step, self.size)))

    def _place(self, value: int) -> int:
        return value * self.tensor.nbytes // max(self.size, 1)


class _Floats(Values):
    def __init__(self, checkpoint: Checkpoint, tensor: StoredTensor) -> None:
        super().__init__(checkpoint, tensor, PIECE)
        self._values = checkpoint.array(tensor.name).reshape(-1)

    def piece(self, start: int) -> Array:
        values = self._values[start : start + self.step]
        return values if values.flags.aligned and values.flags.c_contiguous else values.copy()


class _Fp8(Values):
    """Whole rows at a time."""

    def __init__(self, checkpoint: Checkpoint, tensor: StoredTensor) -> None:
        layout = fp8.layout(
            tensor.name, tensor.shape, lambda name: checkpoint[name].shape, checkpoint.tensors,
            fp8.block_of(checkpoint.config),
        )  # fmt: skip
        self._columns = tensor.shape[1]
        super().__init__(checkpoint, tensor, max(PIECE // self._columns, 1) * self._columns)
        self._values, self._block = checkpoint.array(tensor.name), layout.block
        self._scales = fp8.read_scales(layout, checkpoint.array)

    def piece(self, start: int) -> Array:
        row, count = start // self._columns, self.step // self._columns
        values = self._values[row : row + count]
        return np.ascontiguousarray(fp8.dequantize(values, self._scales, self._block, row)).reshape(-1)


class _Ggml(Values):
    """Whole rows at a time, in the order that the model knows."""

    def __init__(self, checkpoint: GgufCheckpoint, tensor: StoredTensor) -> None:
        self._columns = tensor.shape[-1]
        super().__init__(checkpoint, tensor, max(PIECE // self._columns, 1) * self._columns)
        self.dtype = "float32"
        self._rows, self._order = checkpoint.array(tensor.name), checkpoint.order(tensor.name)
        self._added = np.float32(checkpoint.added(tensor.name))

    def piece(self, start: int) -> Array:
        piece = slice(start // self._columns, (start + self.step) // self._columns)
        rows = self._rows[piece] if self._order is None else self._rows[self._order[piece]]
        values = ggml.dequantize(self.tensor.dtype, rows).reshape(-1)
        return values - self._added if self._added else values


def values_of(checkpoint: Checkpoint, tensor: StoredTensor) -> Values:
    """The values of a stored tensor. Raises CheckpointError naming tensor and fault."""
    if isinstance(checkpoint, GgufCheckpoint):
        return _Ggml(checkpoint, tensor)
    return _Fp8(checkpoint, tensor) if tensor.dtype == "F8_E4M3" else _Floats(checkpoint, tensor)
