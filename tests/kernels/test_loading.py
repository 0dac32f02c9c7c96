"""What loading tells: how far it is, and in the end how fast it was; and whose pages it may drop."""

import shutil

import numpy as np
import pytest

from tests.models.tiny import load as load_tensors
from tests.shared import DATA
from tpcpu.engine import loader
from tpcpu.engine.engine import Engine, Options
from tpcpu.parallel.communicator import Solo
from tpcpu.program.weights import Packer


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def advance(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def load(told: Told) -> Engine:
    engine = Engine(DATA / "llama-tiny", Solo(), Options(format="nf4"), told)
    engine.close()
    return engine


def test_speed_is_told_where_it_was_noticed(monkeypatch):
    monkeypatch.setattr(loader, "NOTICED_SECONDS", 0)
    told, loaders, inner = Told(), [], loader.Loader.load

    def load_and_keep(self, needed):
        loaders.append(self)
        return inner(self, needed)

    monkeypatch.setattr(loader.Loader, "load", load_and_keep)
    engine = load(told)
    (seconds,) = [each.seconds for each in loaders]
    assert 0 < seconds <= engine.load_seconds + 0.01
    total = engine.source.loaded_bytes
    assert told.steps[0] == (0, total)
    assert told.steps[-1] == (total, total)
    assert told.steps == sorted(told.steps)
    # All weights in two bytes each; of the embedding only the rows of tokens are read, later.
    assert total == sum(tensor.nbytes for tensor in engine.checkpoint.tensors.values()) - 4096 * 256 * 2
    (line,) = [line for line in told.lines if line.startswith("read")]
    assert line == f"read 0.01 GB in {seconds:.1f} s, {total / seconds / 1e9:.1f} GB/s"


def test_nothing_is_told_of_what_takes_no_time(monkeypatch):
    monkeypatch.setattr(loader, "NOTICED_SECONDS", 1e9)
    told = Told()
    load(told)
    assert not any("GB/s" in line for line in told.lines)


def test_copies_of_turned_tensors_are_not_taken_for_pages_of_the_file(tmp_path, monkeypatch):
    """Packing drops the pages that it has read. Those of a file come back; a copy would be zeros from then on.

    A torch shard may store a tensor turned: reading it makes the only copy.
    """
    torch = pytest.importorskip("torch")
    for file in (DATA / "stories260k").glob("*.json"):
        shutil.copy(file, tmp_path)
    stored = {name: torch.from_numpy(values) for name, values in load_tensors("stories260k").tensors.items()}
    turned = {name for name in stored if name.endswith(("q_proj.weight", "down_proj.weight"))}
    for name in turned:
        stored[name] = stored[name].t().contiguous().t()
        assert not stored[name].is_contiguous()
    torch.save(stored, tmp_path / "pytorch_model.bin")

    mapped = {}
    pack = Packer.pack

    def noting(self, weight, source):
        mapped[weight.name] = source.mapped
        return pack(self, weight, source)

    monkeypatch.setattr(Packer, "pack", noting)
    engine = Engine(tmp_path, Solo(), Options(), Told())
    monkeypatch.undo()
    assert {name for name, drops in mapped.items() if not drops} == turned
    assert len(turned) == 10
    assert len(mapped) > len(turned)
    assert [engine.checkpoint.is_mapped(name) for name in sorted(turned)] == [False] * 10
    published = Engine(DATA / "stories260k", Solo(), Options(), Told())
    assert np.array_equal(np.asarray(engine.arena), np.asarray(published.arena))
    engine.close()
    published.close()
