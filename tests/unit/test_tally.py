"""The sum of a test run, on reports that a real pytest wrote."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

sys.path.insert(0, str(LAUNCH))
tally = import_module("tally")
sys.path.remove(str(LAUNCH))

TESTS = """
import os, pytest

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.skip("no AMX on this machine")
@pytest.fixture
def broken(): raise OSError
def test_errors(broken): pass
@pytest.mark.xfail
def test_xfails(): assert False
class TestRanks:
    @pytest.mark.skipif(os.environ["RANKS"] == "1", reason="needs 2 ranks")
    def test_two(self): pass
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A folder with `mpi-1.xml` and `mpi-2.xml`: 3 pass and 2 fail under 2 ranks, one test less under 1."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_probe.py").write_text(TESTS)
    for ranks in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests", f"--junitxml={folder}/mpi-{ranks}.xml"],
            cwd=folder,
            env={"PYTEST_ADDOPTS": "-p no:cacheprovider -o junit_family=xunit1", "RANKS": ranks},
            capture_output=True,
            timeout=60,
            check=False,
        )
    return folder


@pytest.fixture
def results(tmp_path, reports):
    """A results folder; call it with the ranks whose report it should hold and the lines of notes.tsv."""

    def make(ranks, notes):
        for n in ranks:
            (tmp_path / f"mpi-{n}.xml").write_bytes((reports / f"mpi-{n}.xml").read_bytes())
        (tmp_path / "notes.tsv").write_text("".join(f"{name}\t{status}\n" for name, status in notes))
        return tmp_path

    return make


SKIPPED = "tests/test_probe.py::test_skips"
TWO = "tests/test_probe.py::TestRanks::test_two"


def test_one_report(results):
    total = tally.tally(results("1", [("mpi-1", 1)]), allowed=None)
    assert total.line() == "2 passed, 2 failed, 2 skipped"
    assert total.skipped == {SKIPPED: "no AMX on this machine", TWO: "needs 2 ranks"}
    assert total.complaints == []


def test_what_ran_elsewhere_was_not_skipped(results):
    total = tally.tally(results("12", [("mpi-1", 1), ("mpi-2", 1)]), allowed=None)
    assert total.line() == "5 passed, 4 failed, 1 skipped"
    assert list(total.skipped) == [SKIPPED]


def test_under_ci_a_skip_fails_unless_it_is_allowed_for_its_reason(results):
    folder = results("2", [("mpi-2", 1)])
    assert tally.tally(folder, []).line() == "3 passed, 3 failed, 0 skipped"
    assert tally.tally(folder, [(SKIPPED, "no AMX*")]).line() == "3 passed, 2 failed, 1 skipped"
    other_reason = tally.tally(folder, [(SKIPPED, "no GPU*")])
    assert other_reason.line() == "3 passed, 3 failed, 0 skipped"
    assert "no AMX on this machine" in other_reason.complaints[0]


@pytest.mark.parametrize(
    ("notes", "line", "complaint"),
    [
        ([("ruff check", 0)], "1 passed, 0 failed, 0 skipped", None),
        ([("ruff check", 1)], "0 passed, 1 failed, 0 skipped", "ruff check: exit status 1"),
        ([("ruff check", 0), ("unit", 5)], "1 passed, 1 failed, 0 skipped", "unit: no test was found"),
        ([("ruff check", 0), ("unit", 124)], "1 passed, 1 failed, 0 skipped", "unit: ended at its time limit"),
        ([], "0 passed, 1 failed, 0 skipped", "no test ran"),
    ],
)
def test_what_leaves_no_report_counts_too(results, notes, line, complaint):
    total = tally.tally(results("", notes), allowed=None)
    assert total.line() == line
    assert total.complaints == ([complaint] if complaint else [])


def test_the_last_line_is_the_sum(results, capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert tally.main([str(results("2", [("mpi-2", 1)]))]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 2 failed, 1 skipped"


def test_allowed_skips_can_be_read():
    pairs = tally.read_allowed_skips(tally.ALLOWED_SKIPS.read_text())
    for test, _ in pairs:
        assert (ROOT / test.split("::")[0]).is_file() or "*" in test.split("::")[0], f"{test}: no such file"


@pytest.mark.parametrize("line", ["tests/unit/test_x.py::test_y", "| no test", "tests/unit/test_x.py |", "a|b"])
def test_a_skip_without_a_reason_is_refused(line):
    with pytest.raises(ValueError, match="line 2"):
        tally.read_allowed_skips(f"# comment\n{line}\n")
