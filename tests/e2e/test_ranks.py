"""What ranks do to a machine: what they use while idle, and more of them than cores."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.processes import SECONDS, Family, environment, family
from tests.flavours import flavour
from tests.hosts import hosts, missing

DATA = Path(__file__).parents[1] / "data"
YUAN = DATA / "yuan-tiny"
STORY = next(case for case in json.loads((YUAN / "reference.json").read_text())["cases"] if case["name"] == "story")
GENERATE = [sys.executable, "-m", "tpcpu", "generate", "--model", YUAN, "--prompt", STORY["prompt"], "--ignore-eos"]
TICKS = os.sysconf("SC_CLK_TCK")


WAITING = f"""
import sys
from tpcpu import LLM, SamplingParams
with LLM({str(YUAN)!r}, format="nf4") as llm:
    for _ in range(2):
        llm.generate("Once", SamplingParams(max_tokens=4))
        if llm.is_root:
            print("waits", flush=True)
            sys.stdin.readline()
"""
LENGTHS = [3, pytest.param(30, marks=pytest.mark.full)]


def used_seconds(number: int) -> float:
    """Processor time of a process."""
    # the name, in brackets, may hold blanks
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def assert_idle(started: Family, seconds: float) -> None:
    """Every process, launchers and witnesses among them, uses less than 2 % of a core; ranks end when told to go on."""
    started.say_until("waits")
    time.sleep(0.5)  # ranks look closely for a moment
    before = {number: used_seconds(number) for number in started.members()}
    start = time.monotonic()
    time.sleep(seconds)
    shares = {number: (used_seconds(number) - used) / (time.monotonic() - start) for number, used in before.items()}
    commands = started.members()
    assert {commands[number]: share for number, share in shares.items() if share >= 0.02} == {}
    started.process.communicate("\n\n", timeout=SECONDS)
    assert started.process.returncode == 0
    started.assert_nothing_left()


@pytest.mark.flavours
@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("driver", [True, False], ids=["a driver", "mpiexec"])
def test_idle_ranks_use_no_processor(tmp_path, driver, seconds):
    """A driver that waits, and ranks under mpiexec whose rank 0 does."""
    (tmp_path / "program.py").write_text(WAITING.replace('"nf4")', '"nf4", ranks=2)') if driver else WAITING)
    launcher = [] if driver else ["mpiexec", "-n", "2"]
    with family([*launcher, sys.executable, "program.py"], tmp_path, stdin=subprocess.PIPE) as started:
        assert_idle(started, seconds)


@pytest.mark.flavours
@pytest.mark.full
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_idle_ranks_of_two_hosts_use_no_processor(tmp_path):
    (tmp_path / "program.py").write_text(WAITING)
    with hosts(2, tmp_path) as made:
        command = made.command([2, 1], [sys.executable, "program.py"], flavour())
        with family(command, tmp_path, stdin=subprocess.PIPE) as started:
            assert_idle(started, 30)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2 * (os.cpu_count() or 1), ()), (2, ("--all-reduce", "mpi"))],
    ids=["crowded", "MPI_Allreduce"],
)
def test_answers_of_other_launches(ranks, flags):
    """Twice as many ranks as processors, up to eight; and MPI's own sum, which has its own order, on two."""
    command = ["mpiexec", "-n", str(min(ranks, 8)), *GENERATE, "--exact", "--max-tokens", "48", "--json", *flags]
    done = subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ids"] == STORY["greedy_ids"]
    # Ranks that wait for one another without giving way take a hundred times as long.
    assert answer["decode_tokens_per_s"] > 5
