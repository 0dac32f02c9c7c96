"""Whether hosts read one folder together, and what becomes of copies that are not equal."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.shared import DATA
from tpcpu.checkpoint import Checkpoint, marks
from tpcpu.engine import copies
from tpcpu.engine.copies import is_read_together
from tpcpu.errors import CheckpointError, UsageError
from tpcpu.parallel.communicator import Solo


class Pair(Solo):
    """Rank 0 of two, each on a host; the other sees `theirs` of the model."""

    def __init__(self, theirs: Path) -> None:
        super().__init__()
        self.size, self.hosts, self.host_of = 2, ("a", "b"), (0, 1)
        self._theirs = theirs

    def all_gather_object(self, value: Any) -> list[Any]:
        if value is None:
            return [None, None]  # no rank has anything to complain of
        with Checkpoint.open(self._theirs) as checkpoint:
            return [value, copies._look(checkpoint, True)]


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Two copies of a model with the same times, as `cp -p` makes them, on whatever is no network here."""
    monkeypatch.setattr(copies, "is_on_network", lambda _: False)
    return shutil.copytree(DATA / "yuan-tiny", tmp_path / "a"), shutil.copytree(DATA / "yuan-tiny", tmp_path / "b")


def together(ours: Path, theirs: Path | None, read: str | None = None) -> bool:
    with Checkpoint.open(ours) as checkpoint:
        return is_read_together(checkpoint, Solo() if theirs is None else Pair(theirs), read)


def test_it_is_found_out(folders, monkeypatch):
    first, second = folders
    assert together(first, first)
    assert not together(first, second)
    assert not together(first, None)
    # A host that sees the folder through a network's file system is enough.
    monkeypatch.setattr(copies, "is_on_network", lambda file: file.parent == second)
    assert together(first, second)
    assert together(second, None)


def test_what_is_asked_for_counts(folders):
    first, second = folders
    assert together(first, second, "shared")
    assert together(first, None, "shared")
    assert not together(first, first, "local")
    with pytest.raises(UsageError, match="--read once is unknown; shared and local are"):
        copies.check_read("once")


def lengthen(folder: Path) -> None:
    with open(folder / "config.json", "a") as file:
        file.write("\n")


def overwrite(folder: Path) -> None:
    with open(folder / "model-00002-of-00002.safetensors", "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(2000))


@pytest.mark.parametrize("read", [None, "shared", "local"])
@pytest.mark.parametrize(
    ("change", "file", "what"),
    [
        (lengthen, "config.json", r"806 and 805 bytes"),
        (overwrite, "model-00002-of-00002.safetensors", "contents"),
    ],
)
def test_copies_that_differ_are_refused(folders, change, file, what, read):
    first, second = folders
    change(second)
    with pytest.raises(
        CheckpointError, match=rf"/b/{file} on b differs from {file} on a \({what}\); .* copy the folder"
    ):
        together(first, second, read)


def test_other_tensors_are_seen_in_whatever_part_of_a_header(folders, monkeypatch):
    """Ranks with unlike plans of who reads what would wait for one another for ever."""
    first, second = folders
    for file in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        content = (second / file).read_bytes()
        assert b"layers.5.mlp.up_proj" in content
        (second / file).write_bytes(content.replace(b"layers.5.mlp.up_proj", b"layers.5.mlp.up_prof"))
    monkeypatch.setattr(marks, "samples", lambda *_: iter(()))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors on b differs from .* \(contents\)"):
        together(first, second)


def test_copies_of_other_files_are_refused(folders):
    first, _ = folders
    with pytest.raises(CheckpointError, match=r"llama-tiny on b and on a: only one has \['model-00001-of-00002"):
        together(first, DATA / "llama-tiny")


MOUNTS = """22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
35 22 0:44 / /models rw,relatime shared:2 master:1 - nfs4 server:/models rw,vers=4.2
36 22 0:45 / /home\\040s rw,relatime - fuse.sshfs server:/home rw
"""


@pytest.mark.parametrize(
    ("device", "kind"), [((254, 0), "ext4"), ((0, 44), "nfs4"), ((0, 45), "fuse.sshfs"), ((0, 4), "")]
)
def test_the_kind_of_a_file_system_is_read_from_the_mounts(device, kind):
    assert marks._file_system(os.makedev(*device), MOUNTS) == kind
