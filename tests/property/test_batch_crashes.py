"""A batch that loses its power at any byte that it writes, again and again: the answers are the undisturbed ones.

A run is recorded as what it had written, in order: bytes behind the end of a file, and files put in the place of
others. A crash is a place in that record. What was synced before stays, of the last piece any part may be there, or
zeros in its place, as a file system may have noted a length and not yet the bytes.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_batch_store import answers, lines_to_answer, run
from tpcpu.batch import appended, runner, store

Files = dict[str, bytes]
PROBLEMS = "out.jsonl.errors.jsonl"


class Recorded:
    """What was written since a run began, as files that were there behind every whole piece."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.before: list[Files] = []
        self.pieces: list[tuple[str, bytes, bool]] = []
        """A file's name, what was written, and whether it is the whole file."""

    def append(self, path: Path, data: bytes) -> None:
        self._note(path.name, data, False)

    def replace(self, path: Path, data: bytes) -> None:
        self._note(path.name, data, True)

    def _note(self, name: str, data: bytes, is_whole: bool) -> None:
        self.before.append(snapshot(self._folder))
        self.pieces.append((name, data, is_whole))


class AtOnce:
    """In the place of the thread that writes: the order of events is the same every time."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> "Future[None]":
        done: Future[None] = Future()
        try:
            done.set_result(work(*arguments))
        except OSError as error:
            done.set_exception(error)
        return done

    def shutdown(self) -> None:
        pass


def snapshot(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.glob("out.jsonl*") if not path.name.endswith(".lock")}


@pytest.fixture(scope="module", autouse=True)
def _every_step_is_written() -> Iterator[None]:
    """And the journal is often written anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "COMMIT_SECONDS", 0.0)
        patch.setattr(store, "ThreadPoolExecutor", AtOnce)
        patch.setattr(store, "_COMPACT_BYTES", 1500)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorded]:
    """A folder with the files of a run that nothing disturbed, and what it wrote."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recorded = recorded_run(lines_to_answer(folder / "in.jsonl"), folder / "out.jsonl")
    assert len(recorded.pieces) > 50
    assert sum(is_whole for _, _, is_whole in recorded.pieces) > 3
    return folder, recorded


def recorded_run(given_lines: Path, output: Path) -> Recorded:
    """A run to its end, of which everything that it wrote is known."""
    recorded = Recorded(output.parent)
    append, replace = appended.Appended.append, store.replace
    with pytest.MonkeyPatch.context() as patch:

        def noted_append(file: appended.Appended, data: bytes) -> None:
            recorded.append(file.path, data)
            append(file, data)

        def noted_replace(path: Path, data: bytes) -> None:
            recorded.replace(path, data)
            replace(path, data)

        patch.setattr(appended.Appended, "append", noted_append)
        patch.setattr(store, "replace", noted_replace)
        run(given_lines, output)
    return recorded


def crash(recorded: Recorded, draw: Any) -> Files:
    """The files as they are found afterwards."""
    number = draw(st.integers(0, len(recorded.pieces) - 1), label="piece")
    name, data, is_whole = recorded.pieces[number]
    files = dict(recorded.before[number])
    written = draw(st.integers(0, len(data)), label="bytes")
    part = data[:written]
    if draw(st.booleans(), label="zeros"):
        part += bytes(draw(st.integers(0, len(data) - written), label="zeros"))
    if is_whole:
        files[name + ".tmp"] = part  # it was to take the place of the other when it is whole
    else:
        files[name] = files.get(name, b"") + part
    return files


def put(folder: Path, files: Files) -> None:
    for path in folder.glob("out.jsonl*"):
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_crash_at_any_byte_costs_nothing(undisturbed, tmp_path, data):
    source, recorded = undisturbed
    whole, wanted = snapshot(source), answers(source / "out.jsonl")
    output = tmp_path / "out.jsonl"
    for _ in range(data.draw(st.integers(1, 2), label="crashes")):
        put(tmp_path, crash(recorded, data.draw))
        recorded = recorded_run(source / "in.jsonl", output)
        found = snapshot(tmp_path)
        assert answers(output) == wanted
        assert sorted(found[PROBLEMS].splitlines()) == sorted(whole[PROBLEMS].splitlines())
        assert set(found) == set(whole)
        if not recorded.pieces:
            break
