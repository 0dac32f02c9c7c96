"""A checkpoint in fewer bits: NF4 with double quantisation, int8, or plain bfloat16 or float32.

Streams file by file and tensor by tensor, in the order of the source; all cores work on pieces of one tensor, and each
gives back the pages that it has converted, so that no more than one tensor is in memory. What multiplies is quantised,
vectors become float32, embedding and head stay as given. The model itself says which tensor is which.

Knows what becomes of each tensor, and the config that tells other software about it. The arithmetic is in `formats/` and
`kernels/quantize.py`, the files in `checkpoint/`.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcpu import models
from tpcpu.checkpoint import Checkpoint, FolderWriter, Planned, StoredTensor, WeightsWriter, read_header
from tpcpu.errors import CheckpointError, UsageError
from tpcpu.formats import floats, int8, nf4
from tpcpu.formats.tables import DYNAMIC_MAP, NEAREST_CODE, NF4_CODE
from tpcpu.kernels import quantize as kernels
from tpcpu.parallel.partition import Share
from tpcpu.program.operations import Kind

FORMATS = ("nf4", "int8", "bf16", "float32")

PIECE = 1 << 20  # values that one thread converts at a time: a few megabytes of source
BLOCK = 64
_LONGEST_STATE = 512  # bytes of the JSON part of an NF4 tensor; its eight dimensions and numbers cannot fill them
_SMALL_FILE = 256 << 20  # a larger file beside the weights is no tokenizer

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_STORED_NAMES = {name: stored for stored, name in _DTYPE_NAMES.items()}
_KERNEL_DTYPES = {"bfloat16": kernels.BF16, "float16": kernels.F16, "float32": kernels.F32}

Progress = Callable[[int, int], None]
"""Told, from time to time, the bytes of source weights that are done, and all there are."""


@dataclass(frozen=True)
class Treatment:
    """What becomes of one tensor: `into` is nf4, int8, bfloat16, float16 or float32; `reason` says why it is not quantised."""

    source: StoredTensor
    into: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `quantize` did. Bytes are those of weights."""

    source_bytes: int
    written_bytes: int
    seconds: float
    files: int
    resumed_files: int  # finished by an earlier run
    kept: dict[str, str]  # multiplying tensors that were not quantised, and why
    dropped: tuple[str, ...]  # tensors that no one needs


def quantize(
    src: str | Path, dst: str | Path, format: str = "nf4", *, progress: Progress | None = None, jobs: int | None = None
) -> Report:
    """Write the checkpoint `src` to the new folder `dst` in `format`: nf4, int8, bf16 or float32, with `jobs` threads.

    `dst` is complete or absent. After an interruption or a full disk the same call goes on after the files that were finished.
    Raises CheckpointError, ConfigError or OutputError.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown; the formats are {', '.join(FORMATS)}")
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs; at least one thread has to work")
    began = time.monotonic()
    with Checkpoint.open(src) as checkpoint:
        treatments, dropped = plan(checkpoint, format)
        files = _output_files(treatments)
        planned = {
            name: [part for treatment in content for part in _parts(treatment)] for name, content in files.items()
        }
        room = sum(part.nbytes for parts in planned.values() for part in parts)
        total = sum(treatment.source.nbytes for treatment in treatments)
        kept = {
            treatment.source.name: treatment.reason
            for treatment in treatments
            if treatment.reason and format in ("nf4", "int8")
        }
        with FolderWriter(dst, _settings(checkpoint, format), room) as folder, _Converter(checkpoint, jobs) as converter:
            done = resumed = 0
            for name, content in files.items():
                if folder.is_finished(name):
                    resumed += 1
                    done += sum(treatment.source.nbytes for treatment in content)
                    continue
                with folder.weights(name, planned[name]) as weights:
                    for treatment, following in zip(content, [*content[1:], None], strict=True):
                        if following is not None:
                            checkpoint.prefetch(following.source.name)
                        for nbytes in converter.convert(treatment, weights):
                            done += nbytes
                            if progress is not None:
                                progress(done, total)
                    weights.finish()
            if progress is not None:
                progress(done, total)
            _write_rest(checkpoint, folder, format, planned, kept)
            written = sum((folder.partial / name).stat().st_size for name in files)
            folder.finish()
    return Report(total, written, time.monotonic() - began, len(files), resumed, kept, dropped)


def plan(checkpoint: Checkpoint, format: str) -> tuple[list[Treatment], tuple[str, ...]]:
    """What becomes of each tensor, in the order of the source, and the names of those that are not needed.

    Raises ConfigError for a model that is not supported, CheckpointError for tensors that do not fit it or are quantised already.
    """
    if checkpoint.config.get("quantization_config") is not None:
        method = checkpoint.config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(f"{checkpoint.path}: is quantised already ({method}); start from the model as published")
    model = models.read_config(checkpoint.config)
    weights = {weight.name: weight for weight in model.program(Share(0, 1)).weights}
    for name, weight in weights.items():
        if (shape := checkpoint[name].shape) != weight.full_shape:
            raise CheckpointError(
                f"{checkpoint[name].file}: tensor {name} has the shape {list(shape)}, but by config.json it is {list(weight.full_shape)}"
            )
    treatments, dropped = [], []
    for name, tensor in checkpoint.tensors.items():
        if name not in weights:
            if not model.is_optional(name):
                raise CheckpointError(f"{tensor.file}: tensor {name} does not belong to a model of type {model.model_type}")
            dropped.append(name)
            continue
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}; weights are expected as {', '.join(_DTYPE_NAMES)}"
            )
        treatments.append(_treatment(tensor, weights[name].kind, format))
    _check_tied_heads(checkpoint, [n for n, w in weights.items() if w.kind is Kind.EMBEDDING], dropped)
    return treatments, tuple(dropped)


def _treatment(tensor: StoredTensor, kind: Kind, format: str) -> Treatment:
    given = _DTYPE_NAMES[tensor.dtype]
    if kind is Kind.VECTOR:
        return Treatment(tensor, "float32")
    if format in ("bf16", "float32"):
        return Treatment(tensor, {"bf16": "bfloat16"}.get(format, format))
    if not kind.multiplies:
        return Treatment(tensor, given)
    if (columns := math.prod(tensor.shape[1:])) % BLOCK:
        return Treatment(tensor, given, f"rows of {columns} values are no multiple of {BLOCK}")
    return Treatment(tensor, format)


def _check_tied_heads(checkpoint: Checkpoint, embeddings: list[str], dropped: list[str]) -> None:
    """A head beside a tied embedding is left out; one that is not its copy would be lost in silence."""
    for name in dropped:
        if not name.endswith("lm_head.weight") or not embeddings:
            continue
        head, embedding = checkpoint.array(name).reshape(-1), checkpoint.array(embeddings[0]).reshape(-1)
        same = head.dtype == embedding.dtype and head.size == embedding.size
        for start in range(0, head.size if same else 0, PIECE):
            piece = slice(start, start + PIECE)
            same = same and np.array_equal(head[piece].view(np.uint8), embedding[piece].view(np.uint8))
        checkpoint.release(name)
        checkpoint.release(embeddings[0])
        if not same:
            raise CheckpointError(
                f"{checkpoint[name].file}: {name} differs from {embeddings[0]}, but config.json ties them; one of the two is wrong"
            )


def _parts(treatment: Treatment) -> list[Planned]:
    """The tensors that one source tensor becomes."""
    name, shape = treatment.source.name, treatment.source.shape
    blocks = math.prod(shape) // BLOCK
    match treatment.into:
        case "nf4":
            return [
                Planned(name, "U8", (blocks * BLOCK // 2, 1)),
                Planned(f"{name}.absmax", "U8", (blocks,)),
                Planned(f"{name}.nested_absmax", "F32", (-(-blocks // nf4.GROUP),)),
                Planned(f"{name}.nested_quant_map", "F32", (256,)),
                Planned(f"{name}.quant_map", "F32", (16,)),
                Planned(f"{name}.{nf4.STATE_KEY}", "U8", (_LONGEST_STATE,), late=True),
            ]
        case "int8":
            scales = (shape[0], math.prod(shape[1:]) // BLOCK)
            return [Planned(name, "I8", shape), Planned(int8.scale_name(name), "F32", scales)]
        case into:
            return [Planned(name, _STORED_NAMES[into], shape)]


class _Converter:
    """Converts one tensor at a time, in pieces, on all cores."""

    def __init__(self, checkpoint: Checkpoint, jobs: int | None) -> None:
        self._checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)), "quantize")
        self._buffers = threading.local()

    def __enter__(self) -> "_Converter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)  # pieces at work still use the files

    def convert(self, treatment: Treatment, weights: WeightsWriter) -> Iterator[int]:
        """Convert and write the tensor; yields the bytes of source done, piece after piece."""
        name = treatment.source.name
        values = self._checkpoint.array(name).reshape(-1)
        dtype = _DTYPE_NAMES[treatment.source.dtype]
        match treatment.into:
            case "nf4":
                maxima = self._maxima(name, values, dtype)
                self._write_nf4_scales(treatment, maxima, dtype, weights)
                yield from self._run(values, lambda start, piece: self._nf4(name, dtype, start, piece, maxima, weights))
            case "int8":
                maxima = self._maxima(name, values, dtype)
                yield from self._run(values, lambda start, piece: self._int8(name, dtype, start, piece, maxima, weights))
                weights.write(int8.scale_name(name), maxima)
            case into:
                yield from self._run(values, lambda start, piece: self._float(name, into, start, piece, weights))
        self._checkpoint.release(name)

    def _run(self, values: floats.Array, work: Callable[[int, floats.Array], None]) -> Iterator[int]:
        """`work(start, piece)` for all pieces of the flat `values`, on all cores."""

        def one(start: int) -> int:
            piece = values[start : start + PIECE]
            work(start, piece if piece.flags.aligned else piece.copy())
            return piece.nbytes

        yield from self._pool.map(one, range(0, values.size, PIECE))

    def _release(self, name: str, start: int, piece: floats.Array) -> None:
        self._checkpoint.release(name, start * piece.itemsize, (start + piece.size) * piece.itemsize)

    def _maxima(self, name: str, values: floats.Array, dtype: str) -> npt.NDArray[np.float32]:
        maxima = np.empty(values.size // BLOCK, np.float32)

        def work(start: int, piece: floats.Array) -> None:
            out = maxima[start // BLOCK : (start + piece.size) // BLOCK]
            self._check(name, dtype, start, piece, out)

        for _ in self._run(values, work):
            pass
        return maxima

    def _check(self, name: str, dtype: str, start: int, piece: floats.Array, maxima: npt.NDArray[np.float32]) -> None:
        """Block maxima of a piece of whole blocks; refuses NaN and infinity by name and place."""
        bad = kernels.block_maxima(
            _KERNEL_DTYPES[dtype], piece.ctypes.data, 1, maxima.size, 0, maxima.ctypes.data, 0
        )
        if bad >= 0:
            self._refuse(name, start + bad * BLOCK, piece[bad * BLOCK :])

    def _refuse(self, name: str, start: int, values: floats.Array) -> None:
        wide = floats.to_float32(values[:BLOCK])
        place = int(np.argmin(np.isfinite(wide)))
        tensor = self._checkpoint[name]
        index = [int(i) for i in np.unravel_index(start + place, tensor.shape)]
        raise CheckpointError(
            f"{tensor.file}: tensor {name} holds {wide[place]} at {index}; weights must be finite, get the model anew"
        )

    def _buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Room of this thread."""
        room: npt.NDArray[np.uint8] | None = getattr(self._buffers, "room", None)
        if room is None or room.size < nbytes:
            room = self._buffers.room = np.empty(nbytes, np.uint8)
        return room[:nbytes]

    def _nf4(
        self,
        name: str,
        dtype: str,
        start: int,
        piece: floats.Array,
        maxima: npt.NDArray[np.float32],
        weights: WeightsWriter,
    ) -> None:
        own, codes = maxima[start // BLOCK :], self._buffer(piece.size // 2)
        blocks = piece.size // BLOCK
        kernels.nf4_codes(
            _KERNEL_DTYPES[dtype], piece.ctypes.data, 1, blocks, 0, own.ctypes.data, 0, codes.ctypes.data, 0
        )
        self._release(name, start, piece)
        weights.write(name, codes, start // 2)

    def _write_nf4_scales(
        self, treatment: Treatment, maxima: npt.NDArray[np.float32], dtype: str, weights: WeightsWriter
    ) -> None:
        name = treatment.source.name
        offset = nf4.scale_offset(maxima)
        codes, groups = np.empty(maxima.size, np.uint8), np.empty(-(-maxima.size // nf4.GROUP), np.float32)
        kernels.nf4_scale_codes(
            maxima.ctypes.data,
            maxima.size,
            offset,
            NEAREST_CODE.ctypes.data,
            codes.ctypes.data,
            groups.ctypes.data,
        )
        weights.write(f"{name}.absmax", codes)
        weights.write(f"{name}.nested_absmax", groups)
        weights.write(f"{name}.nested_quant_map", DYNAMIC_MAP)
        weights.write(f"{name}.quant_map", NF4_CODE)
        weights.write_late(f"{name}.{nf4.STATE_KEY}", nf4.pack_state(treatment.source.shape, dtype, offset))

    def _int8(
        self,
        name: str,
        dtype: str,
        start: int,
        piece: floats.Array,
        maxima: npt.NDArray[np.float32],
        weights: WeightsWriter,
    ) -> None:
        own, values = maxima[start // BLOCK :], self._buffer(piece.size)
        blocks, scales = piece.size // BLOCK, own.ctypes.data  # the scales take the place of the maxima
        kernels.int8_values(
            _KERNEL_DTYPES[dtype], piece.ctypes.data, 1, blocks, 0, scales, 0, values.ctypes.data, 0, scales, 0
        )
        self._release(name, start, piece)
        weights.write(name, values, start)

    def _float(self, name: str, into: str, start: int, piece: floats.Array, weights: WeightsWriter) -> None:
        full = piece.size // BLOCK * BLOCK
        dtype = _DTYPE_NAMES[self._checkpoint[name].dtype]
        self._check(name, dtype, start, piece[:full], np.empty(full // BLOCK, np.float32))
        if not np.isfinite(floats.to_float32(piece[full:])).all():
            self._refuse(name, start + full, piece[full:])
        converted = floats.convert(piece, into)
        if dtype != into != "float32" and not np.isfinite(floats.to_float32(converted)).all():
            raise CheckpointError(f"tensor {name} holds values beyond the range of {into}; use --format float32")
        weights.write(name, converted, start * converted.itemsize)
        self._release(name, start, piece)


def _output_files(treatments: list[Treatment]) -> dict[str, list[Treatment]]:
    """The weights files to write, in order, and what goes into each: as in the source, as safetensors."""
    files: dict[str, list[Treatment]] = {}
    for treatment in treatments:
        stem = treatment.source.file.stem
        name = stem.replace("pytorch_model", "model", 1) + ".safetensors"
        files.setdefault(name, []).append(treatment)
    return files


def _settings(checkpoint: Checkpoint, format: str) -> dict[str, Any]:
    """What a later run must agree on to go on with this one's files."""
    source = [checkpoint.path / "config.json", *checkpoint.files]
    stats = [(path.name, path.stat()) for path in source]
    return {
        "layout": "1",
        "format": format,
        "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _write_rest(
    checkpoint: Checkpoint, folder: FolderWriter, format: str, planned: dict[str, list[Planned]], kept: dict[str, str]
) -> None:
    """Index, config, tokenizer and the other small files."""
    if set(planned) != {"model.safetensors"}:
        weight_map = {part.name: name for name, parts in planned.items() for part in parts}
        total = sum(tensor.nbytes for name in planned for tensor in read_header(folder.partial / name).tensors)
        folder.write_json(
            "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    for path in sorted(checkpoint.path.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
        if weights or path.name.endswith((".index.json", ".tmp")) or path.name.startswith("."):
            continue
        if path.name != "config.json" and path.is_file() and path.stat().st_size <= _SMALL_FILE:
            folder.write(path.name, path.read_bytes())
    folder.write_json("config.json", new_config(checkpoint.config, format, list(kept)))


def new_config(config: dict[str, Any], format: str, kept: list[str]) -> dict[str, Any]:
    """The config of a folder quantised to `format`; `kept` names the multiplying tensors that stay as given."""
    config = dict(config)
    key = "dtype" if "dtype" in config else "torch_dtype"
    match format:
        case "nf4":
            compute = config.get(key)
            # unless told, transformers leaves only the head alone
            modules = ["lm_head", *(name.removesuffix(".weight") for name in kept)] if kept else None
            config["quantization_config"] = {
                "_load_in_4bit": True,
                "_load_in_8bit": False,
                "bnb_4bit_compute_dtype": compute if compute in floats.FLOATS else "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": modules,
                "llm_int8_threshold": 6.0,
                "load_in_4bit": True,
                "load_in_8bit": False,
                "quant_method": "bitsandbytes",
            }
        case "int8":
            config["quantization_config"] = dict(int8.QUANTIZATION_CONFIG)
        case _:
            config[key] = {"bf16": "bfloat16"}.get(format, format)
    return config
