"""A checkpoint that the ranks of a job read together: every rank gets the weights that it would read by itself."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it, which safetensors asks for)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine import extents
from tpcpu.engine.binding import bind
from tpcpu.engine.extents import LEAST_BYTES, Plan
from tpcpu.engine.parts import Part, needed
from tpcpu.engine.progress import Silent
from tpcpu.engine.source import Folder
from tpcpu.engine.supply import Mapped, Shared
from tpcpu.errors import CheckpointError
from tpcpu.formats import fp8, nf4
from tpcpu.kernels import record as R
from tpcpu.models import read_config
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.partition import Share
from tpcpu.parallel.team import Team
from tpcpu.program.weights import Packed, Vector
from tpcpu.quantize import quantize

pytestmark = pytest.mark.mpi

DATA = Path(__file__).parents[1] / "data"
STORED = ("yuan-tiny", "nf4", "nested", "fp8", "torch")


@pytest.fixture(scope="module")
def written(communicator: Communicator) -> Iterator[Path]:
    """Folders of yuan-tiny as NF4 and int8, of llama-tiny in fp8, and of stories260k as a torch file and in NF4 whose
    blocks partly cross rows."""
    root = Path(tempfile.mkdtemp(prefix="tpcpu-test-")) if communicator.is_root else None
    folder: Path = communicator.broadcast_object(root)
    if communicator.is_root:
        for form in ("nf4", "int8"):
            quantize(DATA / "yuan-tiny", folder / form, form)
        for form in ("nested", "single"):
            write_flat_nf4(folder / form, nested=form == "nested")
        write_fp8(folder / "fp8")
        write_torch(folder / "torch")
    communicator.barrier()
    yield folder
    communicator.barrier()
    if communicator.is_root:
        shutil.rmtree(folder)


def write_flat_nf4(folder: Path, nested: bool) -> None:
    """As bitsandbytes writes it: whatever the length of a row."""
    shutil.copytree(DATA / "stories260k", folder)
    tensors: dict[str, Any] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors |= nf4.to_tensors(name, nf4.quantize(values, nested=nested))
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors")


def write_fp8(folder: Path) -> None:
    """llama-tiny in fp8, with a scale for each block of 128 x 128; and `folder-bf16`, what that stands for."""
    for each in (folder, folder.with_name(f"{folder.name}-bf16")):
        shutil.copytree(DATA / "llama-tiny", each)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        scales = np.random.default_rng(rows).uniform(1e-4, 4e-4, (-(-rows // 128), -(-columns // 128)))
        values = (tensors[name].astype(np.float32) * 2000).clip(-448, 448).astype(fp8.E4M3)
        tensors |= {name: values, f"{name}_scale_inv": scales.astype(np.float32)}
        plain[name] = fp8.dequantize(values, scales.astype(np.float32), fp8.USUAL_BLOCK)
    save_file(tensors, folder / "model.safetensors")
    save_file(plain, folder.with_name(f"{folder.name}-bf16") / "model.safetensors")


def write_torch(folder: Path) -> None:
    """stories260k as a torch file, in which some tensors are turned: their rows lie nowhere together."""
    import torch  # here: it takes seconds, and one rank needs it

    shutil.copytree(DATA / "stories260k", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {
        name: torch.from_numpy(values) for name, values in load_file(DATA / "stories260k/model.safetensors").items()
    }
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "down_proj.weight"))]:
        tensors[name] = tensors[name].t().contiguous().t()
    torch.save(tensors, folder / "pytorch_model.bin")


def declared(checkpoint: Checkpoint, communicator: Communicator) -> list[Part]:
    """All that the ranks need of a checkpoint, in the order of use."""
    model = read_config(checkpoint.config)
    programs = {rank: model.program(Share(rank, communicator.size)) for rank in range(communicator.size)}
    bindings = bind(checkpoint, model, programs[communicator.rank], None, None)
    weights = {rank: program.weights for rank, program in programs.items()}
    return [part for _, parts in needed(bindings, weights, checkpoint) for part in parts.values()]


def folder_of(name: str, written: Path) -> Path:
    return DATA / name if (DATA / name).exists() else written / name


def load(folder: Path, form: str | None, read: str, communicator: Communicator) -> str:
    """A digest of all weights of this rank, in memory as kernels find them."""
    source = Folder(folder, read)
    model = read_config(source.open())
    source.bind(model, model.program(Share(communicator.rank, communicator.size)), form, None)
    cpus = sorted(os.sched_getaffinity(0))[:1]
    team = Team(cpus, pinned=False, crowded=True)
    try:
        weights, arena = source.load(communicator, team, cpus, Silent())
    finally:
        team.close()
        source.close()
    digest = hashlib.sha256(np.asarray(arena))
    for weight in weights.values():
        if isinstance(weight, Packed):
            tables = [table for table in weight.keep if isinstance(table, np.ndarray)]
            digest.update(weight.segment[[R.S_ROWS, R.S_COLUMNS, R.S_OFFSET, R.S_FIRST_BLOCK]])
        else:
            tables = [weight.values if isinstance(weight, Vector) else weight.rows]
        for table in tables:
            digest.update(np.ascontiguousarray(table).view(np.uint8))
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("yuan-tiny", None), ("yuan-tiny", "nf4"), ("llama-tiny", "int8"), ("stories260k", "nf4"),
        ("stories260k", "bf16"), ("nf4", None), ("int8", None), ("nested", None), ("single", None),
        ("torch", None), ("torch", "nf4"), ("torch", "int8"),
    ],
)  # fmt: skip
def test_weights_are_the_same_read_either_way(
    communicator: Communicator, written: Path, name: str, form: str | None
) -> None:
    folder = folder_of(name, written)
    assert load(folder, form, "shared", communicator) == load(folder, form, "local", communicator)


@pytest.mark.parametrize("form", [None, "nf4", "int8"])
@pytest.mark.parametrize("read", ["shared", "local"])
def test_fp8_is_what_it_stands_for(communicator: Communicator, written: Path, read: str, form: str | None) -> None:
    """Also in regions that begin and end inside the blocks of its scales."""
    expected = load(written / "fp8-bf16", form, "local", communicator)
    assert load(written / "fp8", form, read, communicator) == expected


def test_each_byte_is_read_once_in_long_pieces(communicator: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel counts what a process reads, all its threads together."""

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        count = read(number, buffers, offset)
        pieces.append(count)
        return count

    folder, pieces, read = DATA / "llama-tiny", list[int](), os.preadv
    load(folder, "nf4", "shared", communicator)  # kernels are read too, the first time
    monkeypatch.setattr(os, "preadv", preadv)
    begin = read_bytes()
    load(folder, "nf4", "shared", communicator)
    ours = read_bytes() - begin
    stored = sum(values.nbytes for values in load_file(folder / "model.safetensors").values())
    assert stored <= sum(communicator.all_gather_object(ours)) <= 1.05 * stored
    assert sum(pieces) <= ours
    assert min(pieces, default=LEAST_BYTES) >= LEAST_BYTES


@pytest.mark.parametrize(
    ("form", "name"), [("nf4", "model.layers.2.self_attn.o_proj.weight"), ("float32", "model.norm.weight")]
)
def test_what_no_weight_can_be_is_refused_on_all_ranks(communicator: Communicator, form: str, name: str) -> None:
    """It may be one rank alone that sees it; the others must not wait for that one."""
    folder = Path(tempfile.mkdtemp(prefix="tpcpu-test-"))
    try:
        shutil.copytree(DATA / "stories260k", folder / "copy")
        tensors = load_file(folder / "copy" / "model.safetensors")
        tensors[name].reshape(-1)[-1] = np.nan
        save_file(tensors, folder / "copy" / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity"):
            load(folder / "copy", form, "shared", communicator)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("nbytes", [extents.USUAL_BYTES, 10_000])
def test_regions_are_those_of_the_mapped_file(
    communicator: Communicator, written: Path, name: str, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from extents so small that there are many, and the memory of one serves others."""
    monkeypatch.setattr(extents, "USUAL_BYTES", nbytes)
    monkeypatch.setattr(extents, "LEAST_BYTES", nbytes // 2)
    with Checkpoint.open(folder_of(name, written)) as checkpoint:
        wanted = declared(checkpoint, communicator)
        shared = Shared(checkpoint, communicator, wanted, os.sched_getaffinity(0))
        mapped = Mapped(checkpoint, communicator)
        for part in wanted:
            seen = []
            ours = shared.fetch(part, lambda rows, values, seen=seen: seen.append((rows, values.copy())))  # type: ignore[misc]
            theirs = mapped.fetch(part)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == np.ascontiguousarray(theirs).tobytes(), part.name
            whole = checkpoint.array(part.name).reshape(-1).view(np.uint8).reshape(part.rows, part.row_bytes)
            for rows, values in seen:
                assert values.tobytes() == whole[rows.start : rows.stop].tobytes()
            assert [rows for rows, _ in seen] == [rows for rank, rows in shared.seen(part) if rank == communicator.rank]
            # together the ranks see every row once
            assert sum(len(rows) for _, rows in shared.seen(part)) == part.rows
        assert shared.close() is None


@pytest.mark.parametrize("name", ["llama-tiny", *STORED])
def test_extents_are_long_and_lie_apart(communicator: Communicator, written: Path, name: str) -> None:
    with Checkpoint.open(folder_of(name, written)) as checkpoint:
        plan = Plan(declared(checkpoint, communicator), checkpoint.place, communicator.size, checkpoint.neighbours)
        for file in checkpoint.files:
            runs = sorted((extent.offset, extent.end) for extent in plan.extents if extent.file == file)
            assert all(end <= start for (_, end), (start, _) in pairwise(runs))
            # a small file has less than one extent ought to have
            assert len(runs) == 1 or min(end - start for start, end in runs) >= LEAST_BYTES


def test_a_file_that_one_rank_finds_cut_off_holds_nobody_up(communicator: Communicator) -> None:
    """Its rank passes zeros on and tells the reason in the end."""
    folder = Path(tempfile.mkdtemp(prefix="tpcpu-test-"))
    try:
        shutil.copytree(DATA / "llama-tiny", folder / "copy")
        with Checkpoint.open(folder / "copy") as checkpoint:
            wanted = declared(checkpoint, communicator)
            if communicator.is_root:
                os.truncate(folder / "copy" / "model.safetensors", 100_000)
            shared = Shared(checkpoint, communicator, wanted, os.sched_getaffinity(0))
            for part in wanted:
                shared.fetch(part)
            error = shared.close()
            with pytest.raises(CheckpointError, match=r"model\.safetensors: became shorter"):
                communicator.raise_together(error)
    finally:
        shutil.rmtree(folder)
