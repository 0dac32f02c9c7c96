"""One torch `.bin` file, through the interface of a mapped safetensors file, without torch.

A file of today is a zip archive: a pickle that describes the tensors, and their storages, one entry each, not
compressed. One of the old format, from before torch 1.6, is a row of pickles, then the storages. In both a tensor is a
place in the file. Pickles are read by `torch_pickle`, which executes nothing.

Knows torch's files. Knows nothing of folders.
"""

import io
import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcpu.checkpoint import torch_pickle
from tpcpu.checkpoint.header import NUMPY_DTYPES, StoredTensor
from tpcpu.checkpoint.mapped import Pages
from tpcpu.checkpoint.torch_pickle import DTYPES, MAX_PICKLE_BYTES, RefusedError, Storage, Tensor
from tpcpu.errors import CheckpointError

_OLD_MAGIC, _OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_OLD_BYTES = {"": 1, "complex64": 8, "complex128": 16} | {
    name: NUMPY_DTYPES[stored].itemsize for name, stored in DTYPES.items()
}


class TorchFile(Pages):
    """A torch file of tensors. Tensors that share memory (a tied head) are each there under their name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                is_zip = file.read(4) == b"PK\x03\x04"
                value, runs = _zip_file(file, len(self._map)) if is_zip else _old_file(file, len(self._map))
            self._tensors = torch_pickle.tensors(value)
        except RefusedError as refusal:
            raise CheckpointError(f"{path}: it holds {refusal}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except ValueError:  # an empty file cannot be mapped
            raise CheckpointError(f"{path}: is no torch file; it is truncated or empty") from None
        self._starts = {name: self._start(name, tensor, runs) for name, tensor in self._tensors.items()}
        self.tensors = tuple(
            StoredTensor(name, DTYPES[t.dtype], t.shape, _count(t) * _itemsize(t), path)
            for name, t in self._tensors.items()
        )

    def _start(self, name: str, tensor: Tensor, runs: dict[str, tuple[int, int]]) -> int:
        """Where in the file the tensor's first value lies; all of them lie inside its storage, and the file."""
        key, item = tensor.storage.key, _itemsize(tensor)
        if key not in runs:
            raise CheckpointError(f"{self.path}: tensor {name} is in storage {key!r:.80}, which is missing")
        start, size = runs[key]
        if _count(tensor) * item > size:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {list(tensor.shape)} repeats values of its storage"
            )
        if tensor.end * item > size:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {list(tensor.shape)} ends at byte {tensor.end * item} of its"
                f" storage, which has {size}; the file is truncated or damaged"
            )
        return start + tensor.offset * item

    def array(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """The tensor, as a read-only view (a copy where it is not contiguous in its file)."""
        if self._map is None:
            raise CheckpointError(f"{self.path} was closed")
        stored, dtype = self._tensors[tensor.name], NUMPY_DTYPES[tensor.dtype]
        start = self._starts[tensor.name]
        if stored.is_contiguous:
            return np.frombuffer(self._map, dtype, _count(stored), start).reshape(stored.shape)
        strides = tuple(stride * dtype.itemsize for stride in stored.strides)
        values = np.ndarray(stored.shape, dtype, self._map, start, strides).copy(order="C")
        values.flags.writeable = False
        return values

    def is_mapped(self, tensor: StoredTensor) -> bool:
        """Whether `array` is a view of the file's pages."""
        return self._tensors[tensor.name].is_contiguous

    def offset(self, tensor: StoredTensor) -> int | None:
        """Where in the file the tensor begins; None where its values do not lie together."""
        return self._starts[tensor.name] if self.is_mapped(tensor) else None

    def advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> None:
        """Advice for the bytes `start` to `stop` of the tensor."""
        if self._map is not None and stop > start and self.is_mapped(tensor):
            self._advise(self._starts[tensor.name] + start, stop - start, advice)


def _count(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _itemsize(tensor: Tensor) -> int:
    return NUMPY_DTYPES[DTYPES[tensor.dtype]].itemsize


def _zip_file(file: io.BufferedReader, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What is pickled, and place and bytes of each storage. Raises RefusedError."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickled = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
            if len(pickled) != 1:
                raise RefusedError(f"{len(pickled)} descriptions of tensors (data.pkl), expected one")
            root = pickled[0].removesuffix("data.pkl")
            for entry in entries.values():
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise RefusedError(
                        f"the entry {entry.filename!r:.80} compressed or encrypted, which torch does not do"
                    )
                # Both sizes of what is not compressed: reading takes memory by the one, and reads by the other.
                if entry.compress_size != entry.file_size or entry.file_size > size:
                    raise RefusedError(f"the entry {entry.filename!r:.80} of impossible size")
            if entries[pickled[0]].file_size > MAX_PICKLE_BYTES:
                raise RefusedError(f"a description of tensors of more than {MAX_PICKLE_BYTES} bytes")
            order = f"{root}byteorder"
            if order in entries and (entries[order].file_size > 8 or archive.read(order) != b"little"):
                raise RefusedError("values in another byte order than this machine's")
            value, storages = torch_pickle.load(io.BytesIO(archive.read(pickled[0])))
            places = {key: entries.get(f"{root}data/{key}") for key in storages}
            return value, {key: (_data_start(file, entry, size), entry.file_size) for key, entry in places.items()
                           if entry is not None}  # fmt: skip
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, UnicodeDecodeError, RuntimeError) as error:
        raise RefusedError(f"a damaged zip archive: {error!s:.80}; it is truncated, get it anew") from None


def _data_start(file: io.BufferedReader, entry: zipfile.ZipInfo, size: int) -> int:
    """Where an entry's bytes begin: behind its own header, whose names may be longer than the directory's."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise RefusedError(f"no entry where its directory says that {entry.filename!r:.80} is")
    name, extra = struct.unpack("<HH", header[26:])
    start: int = entry.header_offset + 30 + name + extra
    if start + entry.file_size > size:
        raise RefusedError(f"the entry {entry.filename!r:.80}, which ends outside the file")
    return start


def _old_file(file: io.BufferedReader, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same of the old format."""
    file.seek(0)
    stream = io.BytesIO(file.read(min(size, MAX_PICKLE_BYTES)))
    if stream.read(2) != b"\x80\x02":
        raise CheckpointError("is no torch file: neither a zip archive nor a pickle")
    stream.seek(0)
    magic, protocol, system = (torch_pickle.load(stream)[0] for _ in range(3))
    if magic != _OLD_MAGIC or protocol != _OLD_PROTOCOL:
        raise RefusedError("a pickle of something else, no file that torch has written")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("values in another byte order than this machine's")
    value, storages = torch_pickle.load(stream)
    keys, _ = torch_pickle.load(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise RefusedError("storages that no tensor has")
    runs, position = {}, stream.tell()
    for key in keys:
        storage: Storage = storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little", signed=True)
        nbytes = storage.count * _OLD_BYTES[storage.dtype]
        if count != storage.count or position + 8 + nbytes > size:
            raise RefusedError(
                f"the storage {key!r:.80} cut short or of another size than described; get the file anew"
            )
        runs[key] = position + 8, nbytes
        position += 8 + nbytes
    return value, runs
