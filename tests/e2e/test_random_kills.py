"""A batch under `tpcpu supervise` that loses a process again and again: the answers are the undisturbed ones.

Which process, when, and whether it is killed or stopped, is drawn; the seed is printed, and TPCPU_KILL_SEED repeats it.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.batches import SECONDS, Job, answers_of, command, problems_of, tokens_on_disk, undisturbed_job
from tests.e2e.processes import Family, eventually, family
from tpcpu.parallel.segments import launchers_files, used_files

KILLS = 3
"""Of one job."""
TIMEOUT = 3.0
SUPERVISE = [sys.executable, "-m", "tpcpu", "supervise", "--json", "--log", "log", "--fault-timeout", str(TIMEOUT)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Several times as much work as is done between two kills."""
    return undisturbed_job(tmp_path_factory.mktemp("undisturbed"), 5.0)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 10))])
def test_answers_are_the_same_whatever_process_is_lost(tmp_path, undisturbed, number):
    given, wanted = undisturbed.given, undisturbed.answers
    output = tmp_path / "out.jsonl"
    seed = int(os.environ.get("TPCPU_KILL_SEED", random.randrange(1 << 32)))
    print(f"TPCPU_KILL_SEED={seed} (job {number})")
    draw = random.Random(seed)
    arguments = [*SUPERVISE, "--", *command(given, output, 2, "--fault-timeout", str(TIMEOUT))]
    before = launchers_files()
    victims = []
    with family(arguments, tmp_path) as started:
        eventually(lambda: starts(tmp_path) > 0, SECONDS, lambda: "the supervisor does not start")
        for _ in range(KILLS):
            wait_for_a_moment(started, output, draw)
            if started.process.poll() is not None:
                break
            begun = starts(tmp_path)
            victims.append(lose(started, draw))
            print(victims[-1])
            # what is only there to start something may be lost without harm, and work goes on
            deadline = time.monotonic() + TIMEOUT + 2
            while starts(tmp_path) == begun and started.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        code, out, err = started.end()
        log = (tmp_path / "log").read_text()
        assert code == 0, (victims, log, err)
        started.assert_nothing_left()
    assert len(victims) == KILLS, "the job ended before its time; it needs more lines"
    assert answers_of(output) == wanted, victims
    assert problems_of(output) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out.jsonl", "out.jsonl.journal", "temporary"]
    assert abandoned(launchers_files() - before) == frozenset()
    assert '"finished": true' in out


def abandoned(files: frozenset[str]) -> frozenset[str]:
    """Those that no process, another job's for one, has open."""
    return files.difference(*map(used_files, Path("/proc").glob("[0-9]*")))


def starts(folder: Path) -> int:
    """How often the supervisor has started the job."""
    log = folder / "log"
    return log.read_text().count(" start ") if log.exists() else 0


def wait_for_a_moment(started: Family, output: Path, draw: random.Random) -> None:
    """Most often while answers are being written, at times while ranks are only starting."""
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0, 1.5))
        return
    before = tokens_on_disk(output)
    eventually(
        lambda: started.process.poll() is not None or tokens_on_disk(output) > before,
        SECONDS,
        lambda: "no token more",
    )
    time.sleep(draw.uniform(0, 0.3))


def lose(started: Family, draw: random.Random) -> str:
    """Kills or stops one of all processes but the supervisor; tells which, and how."""
    found = {pid: told for pid, told in started.members().items() if pid != started.process.pid}
    pid = draw.choice(sorted(found))
    number = draw.choice([signal.SIGKILL, signal.SIGSTOP])
    os.kill(pid, number)
    return f"{number.name} to {pid}: {role(found[pid])}"


def role(told: str) -> str:
    """Of a process with this command line."""
    for word in ("keeper.main", "witness.main", "hydra_pmi_proxy", "mpiexec", "tpcpu batch"):
        if word in told:
            return word
    return "rank" if "tpcpu.cli" in told else told
