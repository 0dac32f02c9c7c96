"""`tpcpu supervise`: commands that fail, stop, or lose a host, and are started again."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import Family, family
from tests.e2e.test_faults import PROGRAM, TIMEOUT
from tests.hosts import hosts, missing

SUPERVISE = [sys.executable, "-m", "tpcpu", "supervise", "--json", "--log", "log", "--fault-timeout", str(TIMEOUT)]
TRIES = 'echo x >> tries; n=$(wc -l < tries); echo "tpcpu: error: rank 3 on b died" >&2; '


def summary(started: Family) -> dict[str, object]:
    code, out, _ = started.end()
    result: dict[str, object] = json.loads(out.splitlines()[-1])
    assert result["exit_code"] == code
    started.assert_nothing_left()
    return result


def log_of(folder: Path) -> list[str]:
    """Without its times, which are all of one form."""
    lines = (folder / "log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d ", line) for line in lines), lines
    return [line.partition(" ")[2] for line in lines]


def test_a_failing_command_is_started_again(tmp_path):
    with family([*SUPERVISE, "--", "bash", "-c", TRIES + "exit $((n < 3 ? 9 : 0))"], tmp_path) as started:
        done = summary(started)
    assert done["restarts"] == 2
    assert [run["code"] for run in done["runs"]] == [9, 9, 0]
    assert done["runs"][0]["error"] == "rank 3 on b died"
    assert done["seconds_lost"] >= 1.5
    log = log_of(tmp_path)
    assert [line.split()[0] for line in log] == ["start", "ended", "starts"] * 2 + ["start", "ended", "done"]
    assert re.fullmatch(r"ended with exit code 9 after .* s: rank 3 on b died", log[1])


def test_the_limit(tmp_path):
    with family([*SUPERVISE, "--restarts", "1", "--", "bash", "-c", TRIES + "exit 9"], tmp_path) as started:
        done = summary(started)
    assert [run["code"] for run in done["runs"]] == [9, 9]
    assert any(line.startswith("given up") for line in log_of(tmp_path))


@pytest.mark.parametrize("code", [2, 75, 130])
def test_an_end_that_is_no_fault(tmp_path, code):
    with family([*SUPERVISE, "--", "bash", "-c", f"exit {code}"], tmp_path) as started:
        done = summary(started)
    assert (done["exit_code"], done["restarts"]) == (code, 0)


def test_a_signal_is_passed_on_and_ends_it(tmp_path):
    script = "trap 'exit 7' TERM; echo begun; while true; do sleep 0.1; done"
    with family([*SUPERVISE, "--", "bash", "-c", script], tmp_path) as started:
        started.say_until("begun")
        started.process.send_signal(signal.SIGTERM)
        done = summary(started)
    assert (done["exit_code"], done["restarts"]) == (7, 0)


def test_a_stopped_command_is_ended_and_started_again(tmp_path):
    script = "echo x >> tries; n=$(wc -l < tries); [ $n = 1 ] && kill -STOP $$; exit 0"
    with family([*SUPERVISE, "--", "bash", "-c", script], tmp_path) as started:
        done = summary(started)
    assert (done["exit_code"], done["restarts"]) == (0, 1)
    assert any("(bash) is stopped" in line for line in log_of(tmp_path))


@pytest.mark.parametrize("who", ["keeper", "rank"])
def test_ranks_are_started_again(tmp_path, who):
    """The program answers for ever the first time; what is killed is a rank, or stopped, the keeper."""
    program = PROGRAM.format(before="", begin="pass").replace("while True:", "while not Path('go').exists():")
    (tmp_path / "program.py").write_text(program)
    argv = ["mpiexec", "-n", "2", sys.executable, "program.py"]
    with family([*SUPERVISE, "--", *argv], tmp_path) as started:
        started.say_until("begun")
        (tmp_path / "go").touch()
        if who == "rank":
            os.kill(started.ranks()[1], signal.SIGKILL)
        else:
            (keeper,) = [pid for pid, command in started.members().items() if "keeper.main" in command]
            os.kill(keeper, signal.SIGSTOP)
        done = summary(started)
    assert (done["exit_code"], done["restarts"]) == (0, 1), done
    if who == "rank":
        assert re.match(r"rank 1 on .* was killed by signal 9", done["runs"][0]["error"])


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_host_is_left_out(tmp_path):
    """Two of three ranks are on a host whose link goes down: the rest of the work is done by one."""
    (tmp_path / "program.py").write_text(
        PROGRAM.format(before="", begin="Path(f'size{llm.info.ranks}').touch()").replace(
            "while True:", "while not Path('go').exists():"
        )
    )
    with hosts(2, tmp_path) as made:
        first, second = made.names
        (tmp_path / "hosts").write_text(f"# a comment\n{first}:1\n{second} slots=2\n")
        inside = made.inside([*SUPERVISE, "--hostfile", "hosts", "--ranks", "3", "--", sys.executable, "program.py"])
        with family(inside, tmp_path) as started:
            started.say_until("begun")
            (tmp_path / "go").touch()
            made.link_down(second)
            done = summary(started)
    assert (done["exit_code"], done["restarts"]) == (0, 1), done
    assert re.match(rf"host {second} \(ranks 1, 2\) does not answer", done["runs"][0]["error"])
    log = log_of(tmp_path)
    assert f"host {second} does not answer, and is left out" in log
    assert any(line.startswith(f"start 2 with 1 ranks on {first}:") for line in log), log
    assert (tmp_path / "size3").exists()
    assert (tmp_path / "size1").exists()
