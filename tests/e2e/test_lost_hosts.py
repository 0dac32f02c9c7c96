"""A rank on another host that dies, and a link that goes down: told once, where rank 0 is, and ended on every host."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.processes import Family, family
from tests.e2e.test_faults import LINE, TIMEOUT, WHERE, start
from tests.flavours import rank_in, variables_of
from tests.hosts import Hosts, hosts, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

PROXY_FAILED = "HYD_pmcd_pmip_control_cmd_cb"
"""MPICH's proxy, told to end its ranks while it ends by itself, at times fails an assertion of its own; with it goes
the stream that the line would have gone to."""


def job(made: Hosts, folder: Path) -> list[str]:
    """A rank on the first host, and two on the second."""
    return made.command([1, 2], start(folder)[3:], "mpich")


def rank_of(started: Family, number: int) -> int:
    """Of the processes that run the program, the one with this rank."""
    for pid, command in started.members().items():
        if command.startswith(sys.executable) and rank_in(variables_of(pid)) == number:
            return pid
    raise AssertionError(f"no rank {number}: {started.members()}")


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, rf"(was killed by signal 9.*|died) {WHERE}"),
        (signal.SIGSTOP, rf"was stopped {WHERE} and does not go on"),
    ],
    ids=["killed", "stopped"],
)
def test_a_rank_of_another_host_is_lost(tmp_path, number, told):
    for attempt in map(str, range(4)):
        folder = tmp_path / attempt
        folder.mkdir()
        with hosts(2, folder) as made, family(job(made, folder), folder) as started:
            started.say_until("begun")
            victim, since = rank_of(started, 2), time.monotonic()
            os.kill(victim, number)
            code, _, err = started.end()
            assert code != 0
            assert time.monotonic() - since < TIMEOUT + 2
            started.assert_nothing_left()
        if PROXY_FAILED not in err:
            break
    (line,) = LINE.findall(err) or [err]
    assert re.fullmatch(rf"rank 2 on {made.names[1]} \(pid {victim}\) {told}", line), line


def test_a_link_goes_down(tmp_path):
    """Both sides find out by themselves, and end."""
    with hosts(2, tmp_path) as made, family(job(made, tmp_path), tmp_path) as started:
        started.say_until("begun")
        ranks = [rank_of(started, number) for number in range(3)]
        since = time.monotonic()
        made.link_down(made.names[1])
        deadline = since + TIMEOUT + 2
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline, started.members()
            time.sleep(0.05)
        code, _, err = started.end()
        assert code != 0
        assert time.monotonic() - since < TIMEOUT + 5
        (line,) = LINE.findall(err)
        assert re.fullmatch(rf"host {made.names[1]} \(ranks 1, 2\) does not answer, while rank 0 {WHERE}", line), line
        started.assert_nothing_left()
