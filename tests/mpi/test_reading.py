"""A checkpoint that the ranks of a job read together: every rank gets the regions that it would read by itself."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.binding import bind
from tpcpu.engine.extents import LEAST_BYTES, Plan
from tpcpu.engine.parts import Part, parts
from tpcpu.engine.supply import Mapped, Shared
from tpcpu.errors import CheckpointError
from tpcpu.models import read_config
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.partition import Share
from tpcpu.program.operations import Kind
from tpcpu.quantize import quantize

pytestmark = pytest.mark.mpi

DATA = Path(__file__).parents[1] / "data"
STORED = ("llama-tiny", "yuan-tiny", "stories260k", "nf4", "int8")


@pytest.fixture(scope="module")
def written(communicator: Communicator) -> Iterator[Path]:
    """Folders of yuan-tiny as NF4 and int8."""
    root = Path(tempfile.mkdtemp(prefix="tpcpu-test-")) if communicator.is_root else None
    folder: Path = communicator.broadcast_object(root)
    if communicator.is_root:
        for form in ("nf4", "int8"):
            quantize(DATA / "yuan-tiny", folder / form, form)
    communicator.barrier()
    yield folder
    communicator.barrier()
    if communicator.is_root:
        shutil.rmtree(folder)


def declared(checkpoint: Checkpoint, communicator: Communicator) -> list[Part]:
    """All that the ranks need of a checkpoint, in the order of use."""
    model = read_config(checkpoint.config)
    programs = [model.program(Share(rank, communicator.size)) for rank in range(communicator.size)]
    tables = [{(weight.name, weight.kind): weight for weight in program.weights} for program in programs]
    bindings = bind(checkpoint, model, programs[communicator.rank], None, None)
    heads = {each.weight.name for each in bindings if each.weight.kind is Kind.HEAD}
    found: list[Part] = []
    for each in bindings:
        key = each.weight.name, each.weight.kind
        if each.weight.kind is not Kind.EMBEDDING or each.weight.name not in heads:
            of_ranks = {rank: table[key] for rank, table in enumerate(tables)}
            found += parts(each, of_ranks, checkpoint).values()
    return found


def folder_of(name: str, written: Path) -> Path:
    return written / name if name in ("nf4", "int8") else DATA / name


@pytest.mark.parametrize("name", STORED)
def test_regions_are_those_of_the_mapped_file_and_read_once(
    communicator: Communicator, written: Path, name: str
) -> None:
    with Checkpoint.open(folder_of(name, written)) as checkpoint:
        wanted = declared(checkpoint, communicator)
        shared = Shared(checkpoint, communicator, wanted, os.sched_getaffinity(0))
        mapped = Mapped(checkpoint, communicator, communicator.rank)
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
        stored = sum(part.nbytes for part in wanted)
        assert stored <= sum(communicator.all_gather_object(shared.nbytes)) <= 1.05 * stored


@pytest.mark.parametrize("name", STORED)
def test_extents_are_long_and_lie_apart(communicator: Communicator, written: Path, name: str) -> None:
    with Checkpoint.open(folder_of(name, written)) as checkpoint:
        plan = Plan(declared(checkpoint, communicator), checkpoint.place, communicator.size)
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
