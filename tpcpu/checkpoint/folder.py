"""A checkpoint: a folder with `config.json` and weights in one or many files, safetensors or torch.

Opening it reads headers only. Each tensor is a view of its file's pages, read when touched, and given back by
`release`.

Knows which files a folder should have and how an index names them. Knows nothing of what the tensors are for.
"""

import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

import numpy.typing as npt

from tpcpu.checkpoint import hub
from tpcpu.checkpoint.header import StoredTensor, parse_json
from tpcpu.checkpoint.mapped import MappedFile
from tpcpu.checkpoint.stacks import Stack, StackedTensor
from tpcpu.checkpoint.torch_file import TorchFile
from tpcpu.errors import CheckpointError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

MAX_JSON_BYTES = 64 << 20  # the largest index published is a few megabytes


class Source(Protocol):
    """Where the values of tensors come from. Advice counts bytes of a tensor, `offset` those of its file."""

    path: Path
    tensors: tuple[StoredTensor, ...]

    def array(self, tensor: StoredTensor) -> npt.NDArray[Any]: ...
    def is_mapped(self, tensor: StoredTensor) -> bool: ...
    def offset(self, tensor: StoredTensor) -> int | None: ...
    def advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> None: ...


class WeightsFile(Source, Protocol):
    """A file of tensors, of whichever format."""

    def close(self) -> None: ...


class Checkpoint:
    """An open checkpoint. A context manager; views that were taken outlive it."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]  # in the order of the files, and of the data in them
    files: tuple[Path, ...]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the folder `path`, or the model of that name in the local Hugging Face cache.

        Raises CheckpointError naming file and fault: no such folder, no config, no weights, files that an index names
        and that are absent, damaged files, a tensor in two files.
        """
        self = cls()
        self.path = _find(path)
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{self.path}: no config.json; expected the folder of a Hugging Face model")
        self.config = read_json(self.path / "config.json")
        generation = self.path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        files, weight_map = _weight_files(self.path)
        self._take([TorchFile(file) if file.suffix == ".bin" else MappedFile(file) for file in files], weight_map)
        for name, file_name in weight_map.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.path / file_name}: tensor {name} is missing, which the index says is there"
                )
        return self

    _open: Sequence["WeightsFile"]
    _owners: dict[str, Source]
    _stacks: tuple[Stack, ...] = ()

    def _take(self, opened: Sequence["WeightsFile"], weight_map: Mapping[str, str]) -> None:
        """The tensors of the files; those that `weight_map` names only from the file that it says."""
        owners: dict[str, Source] = {}
        tensors: dict[str, StoredTensor] = {}
        for file in opened:
            for tensor in file.tensors:
                if weight_map.get(tensor.name, file.path.name) != file.path.name:
                    continue  # the index says that another file's copy counts
                if tensor.name in tensors:
                    raise CheckpointError(
                        f"tensor {tensor.name} is in {tensors[tensor.name].file} and in {file.path},"
                        " and no index says which counts"
                    )
                tensors[tensor.name], owners[tensor.name] = tensor, file
        self._open, self.files = opened, tuple(file.path for file in opened)
        self.tensors, self._owners = MappingProxyType(tensors), owners

    def take_apart(self, stacks: Sequence[Stack]) -> None:
        """From now on parts of stacks are tensors, and stacks are not. Raises CheckpointError for a misshapen one."""
        self._stacks = tuple(stacks)
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in self.tensors.items():
            stack = next((stack for stack in stacks if name.rpartition(".")[2] == stack.stored), None)
            if stack is None:
                tensors[name] = tensor
                continue
            of = StackedTensor(self._owners[name], tensor, stack)
            for part in of.tensors:
                if part.name in self.tensors or part.name in tensors:
                    raise CheckpointError(f"{tensor.file}: tensor {part.name} is there, and also a part of {name}")
                tensors[part.name], self._owners[part.name] = part, of
        self.tensors = MappingProxyType(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        """The tensor called `name`, unread. Raises CheckpointError naming checkpoint and tensor."""
        if name not in self.tensors:
            held = [
                f"{found[1]}.{stack.stored}"
                for stack in self._stacks
                for part in stack.parts
                if (found := re.fullmatch(rf"(.*)\.\d+\.{re.escape(part)}", name))
            ]
            part = f", and not a part of {' or '.join(held)} either" if held else ""
            raise CheckpointError(f"{self.path}: tensor {name} is missing{part}")
        return self.tensors[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a read-only view of its file; float32, float16, bfloat16 (ml_dtypes), uint8, int8, …

        Nothing is read until it is touched. Raises CheckpointError for an unknown name or a dtype that numpy cannot
        hold.
        """
        return self._owners[self[name].name].array(self.tensors[name])

    def is_mapped(self, name: str) -> bool:
        """Whether `array` gives the file's own pages, which can be dropped and come back; else it gives a copy."""
        return self._owners[self[name].name].is_mapped(self.tensors[name])

    def place(self, name: str) -> tuple[Path, int] | None:
        """The file of the tensor and where in it the tensor begins; None where its values do not lie together."""
        offset = self._owners[self[name].name].offset(self.tensors[name])
        return None if offset is None else (self.tensors[name].file, offset)

    def neighbours(self, name: str) -> str:
        """The same for all tensors that lie between one another in their file; of most its own name."""
        owner, tensor = self._owners[self[name].name], self.tensors[name]
        return owner.neighbours(tensor) if isinstance(owner, StackedTensor) else name

    def expect_scattered_reads(self, scattered: bool) -> None:
        """Whether little is read through `array`, here and there: the system then reads nothing around it."""
        for name, tensor in self.tensors.items():
            self._advise(name, 0, tensor.nbytes, mmap.MADV_RANDOM if scattered else mmap.MADV_NORMAL)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of the tensor's bytes `start` to `stop` back. Views stay valid: they are read again."""
        self._advise(name, start, stop, mmap.MADV_DONTNEED)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read the tensor's bytes `start` to `stop` ahead; returns at once."""
        self._advise(name, start, stop, mmap.MADV_WILLNEED)

    def _advise(self, name: str, start: int, stop: int | None, advice: int) -> None:
        tensor = self[name]
        self._owners[name].advise(tensor, start, tensor.nbytes if stop is None else min(stop, tensor.nbytes), advice)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises CheckpointError naming file and fault."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; no more than {MAX_JSON_BYTES} are read")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_json(text, str(path))


def _find(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        hint = "; tpcpu quantize makes one of a GGUF file" if folder.suffix == ".gguf" else ""
        raise CheckpointError(f"{path}: is a file; expected the folder that holds config.json and the weights{hint}")
    if (cached := hub.find(str(path))) is not None:
        return cached
    raise CheckpointError(
        f"{path}: no such folder, and no model of that name in {hub.cache_folder()}; nothing is downloaded"
    )


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The files that hold weights, and, where an index says so, the file of each tensor. Safetensors come first."""
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH, TORCH_INDEX)):
        if (folder / single).is_file():
            return (folder / single,), {}
        if (folder / index).is_file():
            weight_map = read_index(folder / index)
            names = sorted(set(weight_map.values()))
            absent = [name for name in names if not (folder / name).is_file()]
            if absent:
                shown = ", ".join(map(repr, absent[:3])) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
                raise CheckpointError(f"{folder / index}: names files that are not there: {shown}; download them again")
            return tuple(folder / name for name in names), weight_map
    shards = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    found = f"found {', '.join(shards[:3])} but no index" if shards else "found neither"
    raise CheckpointError(f"{folder}: expected {SAFETENSORS}, {SAFETENSORS_INDEX}, {TORCH} or {TORCH_INDEX}; {found}")


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name to file name, both checked. Raises CheckpointError."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map of tensors to files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} is said to be in {file!r}; expected a file of the same folder"
            )
        if not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{path}: tensor {tensor!r} is said to be in {file!r}; expected .safetensors or .bin")
    return weight_map


def _is_plain(name: str) -> bool:
    # an index is data from elsewhere: it may name files beside it and nothing else
    return PurePosixPath(name).name == name and "\0" not in name and len(name.encode(errors="replace")) < 256
