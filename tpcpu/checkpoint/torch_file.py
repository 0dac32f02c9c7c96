"""One torch `.bin` file, through the interface of a mapped safetensors file.

Torch is optional, and only reads: mapped, on the CPU, weights only, so that no pickle is executed. Files of the old
format, from before torch 1.6, cannot be mapped and are refused.

Knows torch's files. Knows nothing of folders.
"""

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tpcpu.checkpoint.header import NUMPY_DTYPES, StoredTensor
from tpcpu.checkpoint.mapped import advise
from tpcpu.errors import CheckpointError

_DTYPES = (
    {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32", "torch.float64": "F64"}
    | {
        f"torch.{torch_name}": name
        for torch_name, name in (("uint8", "U8"), ("int8", "I8"), ("int16", "I16"), ("int32", "I32"), ("int64", "I64"))
    }
    | {"torch.bool": "BOOL"}
)


class TorchFile:
    """A torch file of tensors. Tensors that share memory (a tied head) are each there under their name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded = _load(path)
        self._mappings: list[tuple[int, int, int]] | None = None
        self.tensors = tuple(
            StoredTensor(name, _DTYPES[str(t.dtype)], tuple(t.shape), t.numel() * t.element_size(), path)
            for name, t in self._loaded.items()
        )

    def array(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """The tensor, as a read-only view (a copy where it is not contiguous in its file)."""
        stored = self._loaded[tensor.name].detach().contiguous()
        dtype = NUMPY_DTYPES[tensor.dtype]
        # numpy knows no bfloat16 of torch's: cross over as bytes
        view: npt.NDArray[Any] = stored.reshape(-1).view(_uint8()).numpy().view(dtype).reshape(tensor.shape)
        view.flags.writeable = False
        return view

    def is_mapped(self, tensor: StoredTensor) -> bool:
        """Whether `array` is a view of the file's pages."""
        return bool(self._loaded[tensor.name].is_contiguous())

    def offset(self, tensor: StoredTensor) -> int | None:
        """Where in the file the tensor begins; None where its values do not lie together.

        Torch keeps that to itself, but the tensor is a view of the mapped file, and the kernel tells what is mapped.
        """
        stored = self._loaded[tensor.name]
        if not stored.is_contiguous():
            return None
        if self._mappings is None:
            self._mappings = _mappings(self.path)
        address = stored.data_ptr()
        return next((at + address - start for start, stop, at in self._mappings if start <= address < stop), None)

    def advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> None:
        """Advice for the bytes `start` to `stop` of the tensor. The mapping is private, but nobody writes to it."""
        stored = self._loaded[tensor.name]
        if stored.is_contiguous():
            advise(stored.data_ptr() + start, stop - start, advice)

    def close(self) -> None:
        """Let go of the file; its pages go with the last view."""
        self._loaded = {}


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """Addresses, from and to, where this process has the file mapped, and the place in the file of the first."""
    status = path.stat()
    device, found = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, dev, inode = line.split(maxsplit=5)[:5]
        if int(inode) == status.st_ino and dev == device:
            first, last = span.split("-")
            found.append((int(first, 16), int(last, 16), int(offset, 16)))
    return found


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            "torch .bin files are read with torch, which is not installed: pip install 'tpcpu[torch]'"
        ) from None
    return torch


def _uint8() -> Any:
    return _torch().uint8


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    torch = _torch()
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises what it likes over a bad file: RuntimeError, UnpicklingError, KeyError, …
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: torch cannot read it as weights only: {first}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(tensor).__name__}, expected tensors by name")
        if str(tensor.dtype) not in _DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name} ({tensor.dtype}, {tensor.layout}) cannot be read here")
    return loaded
