"""Ranks, launchers and witnesses that are killed, stopped or out of memory: one line says so, and nothing is left."""

import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.processes import Family, eventually, family
from tests.flavours import flavour

DATA = Path(__file__).parents[1] / "data"
TIMEOUT = 3.0
PROGRAM = f"""
import ctypes, os, sys, threading, time
from pathlib import Path
from tpcpu import LLM, SamplingParams
from tpcpu.parallel.announcement import announced
from tpcpu.parallel.communicator import connect

{{before}}
with LLM({str(DATA / "yuan-tiny")!r}, exact=True, fault_timeout={TIMEOUT}) as llm:
    {{begin}}
    print("begun", flush=True) if llm.is_root else None
    while True:
        for chunk in llm.stream("Once", SamplingParams(max_tokens=400, ignore_eos=True)):
            pass
"""
LINE = re.compile(r"^tpcpu: error: (.*)$", re.MULTILINE)
WHERE = r"(in (layer \d+ [\w. +]+|[a-z_.]+)|between two steps)"
HOST = re.escape(os.uname().nodename)
PROXY = [] if flavour() == "openmpi" else ["proxy"]
"""The process between mpiexec and the ranks of a host; Open MPI has one on other hosts only."""


def marked(parameter: str) -> object:
    return pytest.param(parameter, marks=pytest.mark.flavours)


def start(folder: Path, *, before: str = "", begin: str = "pass", ranks: int = 2) -> list[str]:
    (folder / "program.py").write_text(PROGRAM.format(before=before, begin=begin))
    return ["mpiexec", "-n", str(ranks), sys.executable, "program.py"]


def parent(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])


def process(started: Family, who: str) -> int:
    if who == "witness":
        (number,) = [pid for pid, command in started.members().items() if "witness.main" in command]
        return number
    if who == "mpiexec":
        return started.process.pid
    if who == "proxy":
        return parent(started.ranks()[0])
    return started.ranks()[int(who)]


def line_of(started: Family, since: float, within: float) -> str:
    """The one line of error, from a program that has failed in time and left nothing behind."""
    code, _, err = started.end()
    assert code != 0
    assert time.monotonic() - since < within, err
    lines = LINE.findall(err)
    assert len(lines) == 1, err
    started.assert_nothing_left()
    return str(lines[0])


@pytest.mark.parametrize("who", ["0", marked("1"), marked("mpiexec"), *PROXY, "witness"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_is_lost(tmp_path, who, number):
    files = set(Path("/tmp").glob("hydra_hwloc*"))
    with family(start(tmp_path), tmp_path) as started:
        started.say_until("begun")
        time.sleep(0.2)
        victim, since = process(started, who), time.monotonic()
        os.kill(victim, number)
        # a machine that does other things beside may take longer than was asked for
        line = line_of(started, since, TIMEOUT + 2)
    how = r"was killed by signal 9 \(SIGKILL\)" if number == signal.SIGKILL else "was stopped"
    if who in ("0", "1"):
        end = "" if number == signal.SIGKILL else " and does not go on"
        assert re.fullmatch(rf"rank {who} on {HOST} \(pid {victim}\) {how} {WHERE}{end}", line), line
    elif who == "witness":
        how = "died" if number == signal.SIGKILL else "was stopped and does not go on"
        assert re.fullmatch(rf"the witness of {HOST} \(pid {victim}\) {how}; rank 0 ends {WHERE}", line), line
    else:
        assert re.match(rf"the launcher \S+ on {HOST} \(pid {victim}\) {how} \(.*rank \d {WHERE}", line), line
    assert set(Path("/tmp").glob("hydra_hwloc*")) <= files


def test_a_pause_is_no_fault(tmp_path):
    """Shorter than a third of the time allowed."""
    with family(start(tmp_path), tmp_path) as started:
        started.say_until("begun")
        victim = process(started, "1")
        os.kill(victim, signal.SIGSTOP)
        time.sleep(TIMEOUT / 3)
        os.kill(victim, signal.SIGCONT)
        time.sleep(TIMEOUT)
        assert started.process.poll() is None
        since = time.monotonic()
        os.kill(process(started, "0"), signal.SIGKILL)
        assert line_of(started, since, TIMEOUT + 2).startswith("rank 0 ")


def test_a_request_to_end_is_no_fault(tmp_path):
    with family(start(tmp_path), tmp_path) as started:
        started.say_until("begun")
        started.process.send_signal(signal.SIGTERM)
        code, _, err = started.end()
        assert code != 0
        assert LINE.findall(err) == []
        started.assert_nothing_left()


def test_a_follower_raises(tmp_path):
    """In the middle of an answer, while rank 0 is in a step that needs it."""
    begin = """
    def later(thread):
        time.sleep(0.5)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(ValueError))
    if not llm.is_root:
        threading.Thread(target=later, args=(threading.get_ident(),), daemon=True).start()
    """
    with family(start(tmp_path, begin=begin), tmp_path) as started:
        started.say_until("begun")
        line = line_of(started, time.monotonic(), TIMEOUT + 2)
    assert re.match(rf"rank 1 on {HOST} raised ValueError {WHERE}", line), line


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 500 MB, of either version, below the one of this process."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    first = groups.get("memory")
    if first is not None:
        base = Path("/sys/fs/cgroup/memory")
        limit = "memory.limit_in_bytes"
    else:
        base, first = Path("/sys/fs/cgroup"), groups[""]
        limit = "memory.max"
    path = base / first.lstrip("/")
    folder = (path if path.exists() else base) / f"tpcpu-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(500 << 20))
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"needs the right to make control groups of memory ({error.strerror})")
    yield folder
    eventually(lambda: not (folder / "cgroup.procs").read_text(), 10, lambda: "the control group is not empty")
    folder.rmdir()


def test_a_rank_has_no_memory_left(tmp_path, memory_group):
    enter = f"""
if announced().rank == 1:
    Path({str(memory_group)!r}, "cgroup.procs").write_text(str(os.getpid()))
"""
    begin = """
    def later():
        time.sleep(0.3)
        held = [bytes(range(256)) * (1 << 16) for _ in range(200)]
    if not llm.is_root:
        threading.Thread(target=later, daemon=True).start()
    """
    with family(start(tmp_path, before=enter, begin=begin), tmp_path) as started:
        started.say_until("begun")
        line = line_of(started, time.monotonic(), TIMEOUT + 5)
    wanted = rf"rank 1 on {HOST} \(pid \d+\) was killed for want of memory: the limit .* 500 MB; {WHERE}"
    assert re.fullmatch(wanted, line), line
