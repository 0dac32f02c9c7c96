"""A checkpoint in fewer bits: NF4 with double quantisation, int8, or plain bfloat16 or float32.

Streams file by file and tensor by tensor, in the order of the source. Knows the order of the work and the folder that
it makes; what becomes of each tensor is in `plan`, the conversion in `convert`, the arithmetic in `formats` and
`kernels.quantize`, the files in `checkpoint`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcpu.checkpoint import Checkpoint, FolderWriter, Planned, read_header
from tpcpu.errors import UsageError
from tpcpu.quantize import gguf_tokenizer
from tpcpu.quantize.convert import Converter
from tpcpu.quantize.gguf import GgufCheckpoint
from tpcpu.quantize.plan import new_config, output_files, parts, plan

__all__ = ["FORMATS", "Progress", "Report", "open_source", "quantize"]

FORMATS = ("nf4", "int8", "bf16", "float32")

_SMALL_FILE = 256 << 20  # a larger file beside the weights is no tokenizer

Progress = Callable[[int, int], None]
"""Told, from time to time, the bytes of source weights that are done, and all there are."""


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
    src: str | Path,
    dst: str | Path,
    format: str = "nf4",  # noqa: A002
    *,
    progress: Progress | None = None,
    jobs: int | None = None,
) -> Report:
    """Write the checkpoint `src` to the new folder `dst` in `format`: nf4, int8, bf16 or float32, with `jobs` threads.

    `src` is a folder, the name of one in the local Hugging Face cache, or a GGUF file.

    `dst` is complete or absent. After an interruption or a full disk the same call goes on after the files that were
    finished. Raises CheckpointError, ConfigError or OutputError.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown; the formats are {', '.join(FORMATS)}")
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs; at least one thread has to work")
    began = time.monotonic()
    with open_source(src) as checkpoint:
        treatments, dropped = plan(checkpoint, format)
        files = output_files(treatments)
        planned = {
            name: [part for treatment in content for part in parts(treatment)] for name, content in files.items()
        }
        room = sum(part.nbytes for content in planned.values() for part in content)
        total = sum(treatment.source.nbytes for treatment in treatments)
        kept = {
            treatment.source.name: treatment.reason
            for treatment in treatments
            if treatment.reason and format in ("nf4", "int8")
        }
        with (
            FolderWriter(dst, _settings(checkpoint, format), room) as folder,
            Converter(checkpoint, jobs) as converter,
        ):
            done = resumed = 0

            def advance(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                if progress is not None:
                    progress(done, total)

            for name, content in files.items():
                if folder.is_finished(name):
                    resumed += 1
                    advance(sum(treatment.source.nbytes for treatment in content))
                    continue
                with folder.weights(name, planned[name]) as weights:
                    for treatment, following in zip(content, [*content[1:], None], strict=True):
                        if following is not None:
                            checkpoint.prefetch(following.source.name)
                        converter.convert(treatment, weights, advance)
                    weights.finish()
            left = [treatment.source.name for treatment in treatments if treatment.reason or treatment.routes]
            _write_rest(checkpoint, folder, format, planned, left)
            written = sum((folder.partial / name).stat().st_size for name in files)
            folder.finish()
    return Report(total, written, time.monotonic() - began, len(files), resumed, kept, dropped)


def open_source(src: str | Path) -> Checkpoint:
    """What can be quantised, opened: a folder, the name of one in the local Hugging Face cache, or a GGUF file."""
    is_gguf = Path(src).suffix == ".gguf" and Path(src).expanduser().is_file()
    return (GgufCheckpoint if is_gguf else Checkpoint).open(src)


def _settings(checkpoint: Checkpoint, target: str) -> dict[str, Any]:
    """What a later run must agree on to go on with this one's files."""
    source = [*checkpoint.files]
    if not isinstance(checkpoint, GgufCheckpoint):
        source.insert(0, checkpoint.path / "config.json")
    stats = [(path.name, path.stat()) for path in source]
    return {
        "layout": "1",
        "format": target,
        "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _write_rest(
    checkpoint: Checkpoint, folder: FolderWriter, target: str, planned: dict[str, list[Planned]], kept: list[str]
) -> None:
    """Index, config, tokenizer and the other small files; `kept`: matrices that stay as given."""
    if set(planned) != {"model.safetensors"}:
        weight_map = {part.name: name for name, parts in planned.items() for part in parts}
        total = sum(tensor.nbytes for name in planned for tensor in read_header(folder.partial / name).tensors)
        folder.write_json(
            "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    is_gguf = isinstance(checkpoint, GgufCheckpoint)
    if isinstance(checkpoint, GgufCheckpoint):
        for name, content in gguf_tokenizer.files(checkpoint.path, checkpoint.metadata).items():
            folder.write(name, content)
    for path in () if is_gguf else sorted(checkpoint.path.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
        if weights or path.name.endswith((".index.json", ".tmp")) or path.name.startswith("."):
            continue
        if path.name != "config.json" and path.is_file() and path.stat().st_size <= _SMALL_FILE:
            folder.write(path.name, path.read_bytes())
    folder.write_json("config.json", new_config(checkpoint.config, target, kept))
