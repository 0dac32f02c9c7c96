"""Writing a folder so that it is complete or absent, and so that work survives an interruption.

Everything goes to `DST.partial` beside the destination, each file under a temporary name until it is whole and on disk;
at the end the folder is renamed. What was finished stays, with a note of the settings it was made with: the same job,
begun again, goes on from there, and another one is refused. A lock keeps two jobs apart.

Knows files, locks and the safetensors format. Knows nothing of what the tensors are for.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tpcpu.checkpoint.durable import NO_LOCKS, NO_ROOM, sync, write_all
from tpcpu.checkpoint.header import NUMPY_DTYPES, read_header
from tpcpu.errors import CheckpointError, OutputError

SETTINGS = ".tpcpu-settings.json"
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written. If it is `late`, `shape` (of one dimension) only bounds its size."""

    name: str
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    late: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file, at most."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


class FolderWriter:
    """The folder `destination` in the making. A context manager: leaving it without `finish` keeps what is finished.

    `settings` (JSON) identify the job; `room` is how many bytes it will write in all, for the message of a full disk.
    Raises OutputError where the destination exists, is locked, was begun with other settings, or has no room.
    """

    def __init__(self, destination: str | Path, settings: Mapping[str, Any], room: int = 0) -> None:
        self.destination = Path(os.path.abspath(Path(destination).expanduser()))
        self.partial = self.destination.with_name(self.destination.name + ".partial")
        self._settings, self._room, self._lock = dict(settings), room, -1
        self._refuse_existing()
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._compare_settings()
        except OSError as error:
            self.close()
            raise self._translated(error) from None
        except BaseException:
            self.close()
            raise

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.destination):
            raise OutputError(f"{self.destination} exists; remove it or name another folder")

    def _take_lock(self) -> None:
        path = self.partial / SETTINGS
        if not path.exists() and any(self.partial.iterdir()):
            raise OutputError(f"{self.partial} exists and was not begun here; remove it or name another destination")
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OutputError(f"{self.partial} is being written by another job; wait for it or end it") from None
        # whoever held the lock may just have renamed the folder away
        self._refuse_existing()
        if not path.exists() or not os.path.samestat(os.fstat(self._lock), os.stat(path)):
            raise OutputError(f"{self.partial} was changed by another job; run the command again")

    def _compare_settings(self) -> None:
        wanted = json.dumps(self._settings, indent=1, sort_keys=True).encode()
        found = os.pread(self._lock, os.fstat(self._lock).st_size, 0)
        if found == wanted:
            return
        if [name for name in os.listdir(self.partial) if name != SETTINGS and not name.endswith(_TEMPORARY)]:
            differing = _differences(found, self._settings)
            raise OutputError(
                f"{self.partial} was begun with other settings ({differing});"
                " remove it to begin anew, or use the same again"
            )
        os.ftruncate(self._lock, 0)
        write_all(self._lock, wanted, 0)
        os.fsync(self._lock)

    def is_finished(self, name: str) -> bool:
        """Whether an earlier run finished the weights file `name`."""
        path = self.partial / name
        if not path.is_file():
            return False
        try:
            read_header(path)
        except CheckpointError:  # finished files are whole, but disks are disks
            return False
        return True

    def weights(self, name: str, tensors: Iterable[Planned]) -> "WeightsWriter":
        """Begin the safetensors file `name`."""
        return WeightsWriter(self.partial / name, tensors)

    def write(self, name: str, data: bytes) -> None:
        """The small file `name`, whole."""
        temporary = self.partial / (name + _TEMPORARY)
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, self.partial / name)

    def write_json(self, name: str, value: Any) -> None:
        """The JSON file `name`."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def finish(self) -> None:
        """Rename the folder to its destination. Nothing can be written after this."""
        for leftover in self.partial.glob("*" + _TEMPORARY):
            leftover.unlink()
        sync(self.partial)
        self._refuse_existing()
        os.rename(self.partial, self.destination)
        # only now: without its note a partial folder could not be taken up again
        (self.destination / SETTINGS).unlink()
        sync(self.destination)
        sync(self.destination.parent)

    def close(self) -> None:
        """Give the lock back; what is finished stays."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, OSError) and error.errno is not None:
            raise self._translated(error) from None

    def _translated(self, error: OSError) -> OutputError:
        if error.errno not in NO_ROOM:
            return OutputError(f"{error.filename or self.partial}: cannot be written: {error.strerror}")
        finished = sum(path.stat().st_size for path in self.partial.glob("*") if path.suffix != _TEMPORARY)
        free = shutil.disk_usage(self.partial).free
        return OutputError(
            f"{self.partial}: no room left: {max(self._room - finished, 0) / 1e9:.3f} GB more are needed,"
            f" {free / 1e9:.3f} GB are free; make room and run the same command again:"
            " it goes on after the files that are finished"
        )


class WeightsWriter:
    """One safetensors file in the making; `write` may be called from many threads. A context manager.

    Places are settled beforehand, so that tensors can be written in any order: those whose size is a multiple of more
    come first, which aligns every tensor to its items, and the large ones to 64 bytes. Late tensors, whose sizes are
    not known yet, come last, after room for the longest header; what is left of it is filled with spaces, as the format
    allows.
    """

    def __init__(self, path: Path, tensors: Iterable[Planned]) -> None:
        self.path, self._temporary = path, path.with_name(path.name + _TEMPORARY)
        tensors = list(tensors)
        self._places: dict[str, tuple[Planned, int]] = {}
        position = 0
        for tensor in sorted((t for t in tensors if not t.late), key=lambda tensor: -math.gcd(tensor.nbytes, 64)):
            self._places[tensor.name] = tensor, position
            position += tensor.nbytes
        self._late = {tensor.name: tensor for tensor in tensors if tensor.late}
        self._late_start = position
        longest = self._header({name: tensor.shape[0] for name, tensor in self._late.items()})
        self._data_start = -(-(8 + len(longest)) // 64) * 64
        self._late_data: dict[str, bytes] = {}
        self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, name: str, data: npt.NDArray[Any], start: int = 0) -> None:
        """The bytes of contiguous `data` to the tensor `name`, from its byte `start` on."""
        tensor, position = self._places[name]
        assert start + data.nbytes <= tensor.nbytes, name
        write_all(self._file, data.reshape(-1).view(np.uint8).data, self._data_start + position + start)

    def write_late(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """All bytes of the late tensor `name`."""
        assert data.nbytes <= self._late[name].nbytes, name
        self._late_data[name] = bytes(data)

    def _header(self, late_sizes: Mapping[str, int]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (tensor, position) in self._places.items():
            offsets = [position, position + tensor.nbytes]
            entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = self._late_start
        for name, size in late_sizes.items():
            entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
            position += size
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()

    def finish(self) -> None:
        """Complete the file, see it on disk, and give it its name."""
        late = {name: self._late_data[name] for name in self._late}
        header = self._header({name: len(data) for name, data in late.items()}).ljust(self._data_start - 8)
        write_all(self._file, len(header).to_bytes(8, "little") + header, 0)
        write_all(self._file, b"".join(late.values()), self._data_start + self._late_start)
        os.fsync(self._file)
        self._close()
        os.replace(self._temporary, self.path)
        sync(self.path.parent)

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._temporary.unlink(missing_ok=True)  # gives its room back; after `finish` there is none


def _differences(found: bytes, wanted: Mapping[str, Any]) -> str:
    try:
        before = json.loads(found)
        changed = [key for key in wanted if before.get(key) != wanted[key]]
    except (ValueError, AttributeError):
        return "unreadable"
    return ", ".join(
        f"{key}: {before.get(key)!r}, now {wanted[key]!r}" if isinstance(wanted[key], str) else f"{key} changed"
        for key in changed
    )
