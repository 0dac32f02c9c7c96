"""Launchers, hosts and numbers of ranks: one greedy text, that of one rank, on each; with the MPI that runs the tests.

`./launch/test.sh` runs a few of these cells, fewer with the other MPIs, and with `--full` all of them with each.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.processes import family
from tests.flavours import flavour
from tests.hosts import Hosts, hosts, missing

DATA = Path(__file__).parents[1] / "data"
TOKENS = 24
MORE = [(1, 1), (1, 2), (2, 2), (1, 3), (3, 1), (1, 1, 1), (2, 1, 1), (1, 1, 2)]


def generate(model: str) -> list[str | Path]:
    text = ["--prompt", case(model)["prompt"], "--exact", "--ignore-eos", "--max-tokens", str(TOKENS), "--json"]
    return [sys.executable, "-m", "tpcpu", "generate", "--model", DATA / model, *text]


def case(model: str) -> dict[str, object]:
    cases = json.loads((DATA / model / "reference.json").read_text())["cases"]
    found: dict[str, object] = next(case for case in cases if case["name"] == "story")
    return found


def check(command: list[str | Path], folder: Path, model: str, ranks: int) -> None:
    with family(command, folder) as started:
        code, out, err = started.end()
        assert code == 0, err
        answer = json.loads(out.splitlines()[-1])
        assert answer["ranks"] == ranks
        assert answer["ids"] == case(model)["greedy_ids"][:TOKENS]
        started.assert_nothing_left()


def cells(every: Sequence[object], ours: Sequence[object], long: Sequence[object]) -> list[object]:
    """Those that always run with every MPI, those that do with the one of the tests alone, and those of `--full`."""
    marked = [pytest.param(cell, marks=pytest.mark.flavours) for cell in every]
    return [*marked, *ours, *(pytest.param(cell, marks=[pytest.mark.flavours, pytest.mark.full]) for cell in long)]


@pytest.mark.parametrize("ranks", cells([2], [], [1, 3, 4]))
def test_ranks_that_tpcpu_starts(tmp_path, ranks):
    check([*generate("llama-tiny"), "--ranks", str(ranks)], tmp_path, "llama-tiny", ranks)


@pytest.mark.parametrize("ranks", cells([], [3], [1, 2, 4]))
def test_ranks_under_mpiexec(tmp_path, ranks):
    check(["mpiexec", "-n", str(ranks), *generate("yuan-tiny")], tmp_path, "yuan-tiny", ranks)


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> Iterator[Hosts]:
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("ranks", cells([(2, 1)], [(1, 2, 1)], MORE), ids=lambda ranks: "+".join(map(str, ranks)))
def test_several_hosts(bed, tmp_path, ranks):
    """So many ranks on each of two or three hosts that share no memory."""
    model = "yuan-tiny" if len(ranks) == 2 else "llama-tiny"
    check(bed.command(ranks, generate(model), flavour()), tmp_path, model, sum(ranks))
    assert bed.shared_files() == []
