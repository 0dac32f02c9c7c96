"""Ranks, launchers and witnesses that are killed, stopped or out of memory: one line says so, and nothing is left."""

import fcntl
import os
import re
import secrets
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.processes import SECONDS, Family, eventually, family
from tests.flavours import flavour, rank_in, variables_of
from tpcpu import LLM, SamplingParams
from tpcpu.errors import RankError
from tpcpu.parallel.processes import children, open_files, stat, tree

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


def process(started: Family, who: str) -> int:
    if who == "witness":
        (number,) = [pid for pid, command in started.members().items() if "witness.main" in command]
        return number
    if who == "mpiexec":
        return started.process.pid
    if who == "proxy":
        return stat(started.ranks()[0]).parent
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
    with family(start(tmp_path), tmp_path) as started:
        started.say_until("begun")
        files = open_files(process(started, "proxy"), "hydra_hwloc")
        assert files or flavour() != "mpich"
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
    assert not [path for path in files if path.exists()]


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


def test_a_launcher_that_is_stopped_at_a_terminal_is_no_fault(tmp_path):
    """Ctrl-Z reaches mpiexec alone, and somebody means to bring it back."""
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    # as a shell with job control does
    code = "import subprocess as s, sys; sys.exit(s.run(sys.argv[1:], process_group=0, stdin=s.DEVNULL).returncode)"
    shell = [sys.executable, "-c", code, *start(tmp_path)]
    with family(shell, tmp_path, stdin=theirs, preexec_fn=take_terminal) as started:
        os.close(theirs)
        started.say_until("begun")
        (launcher,) = children(started.process.pid)
        os.killpg(launcher, signal.SIGTSTP)
        eventually(lambda: stat(launcher).is_stopped, 5, lambda: "mpiexec goes on")
        time.sleep(0.8 * TIMEOUT)  # more than a process that is stopped has
        os.killpg(launcher, signal.SIGCONT)
        assert len(started.ranks()) == 2
        since = time.monotonic()
        os.kill(process(started, "1"), signal.SIGKILL)
        assert line_of(started, since, TIMEOUT + 2).startswith("rank 1 ")
    os.close(ours)


def test_a_driver_raises_what_was_seen(capfd):
    """Told once: by whoever catches it, and not by the witness, too."""
    with LLM(DATA / "yuan-tiny", 2, fault_timeout=TIMEOUT) as llm:
        stream = llm.stream("Once", SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
        (victim,) = [pid for pid in tree(os.getpid()) if rank_in(variables_of(pid)) == 1]
        os.kill(victim, signal.SIGKILL)
        wanted = rf"rank 1 on {HOST} \(pid {victim}\) was killed by signal 9 \(SIGKILL\) {WHERE}$"
        with pytest.raises(RankError, match=f"^{wanted}"):
            list(stream)
    assert LINE.findall(capfd.readouterr().err) == []


THREADS = """
    names = {thread.name: thread.native_id for thread in threading.enumerate()}
    if not llm.is_root:
        Path("thread.new").write_text(str(names["tpcpu-1"]))
        Path("thread.new").rename("thread")
"""
HOLD = """
import ctypes, os, sys
thread, SEIZE, INTERRUPT, WALL = int(sys.argv[1]), 0x4206, 0x4207, 1 << 30
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
assert ptrace(SEIZE, thread, None, None) == 0, os.strerror(ctypes.get_errno())
assert ptrace(INTERRUPT, thread, None, None) == 0, os.strerror(ctypes.get_errno())
while not os.WIFSIGNALED(os.waitpid(thread, WALL)[1]):
    pass
"""


def test_no_rank_gets_on(tmp_path):
    """One thread of one rank is held, as by a page that a file server does not give: all wait, and all are alive."""
    program = start(tmp_path, begin=THREADS)
    (tmp_path / "program.py").write_text((tmp_path / "program.py").read_text().replace("exact=True", "threads=2"))
    with family(program, tmp_path) as started:
        started.say_until("begun")
        held = tmp_path / "thread"
        eventually(held.exists, 10, lambda: "rank 1 has not begun")
        since = time.monotonic()
        holder = subprocess.Popen([sys.executable, "-c", HOLD, held.read_text()])
        line = line_of(started, since, TIMEOUT + 3)
        assert holder.wait(10) == 0
    assert re.fullmatch(rf"no rank gets on: rank 0 {WHERE}, rank 1 {WHERE} for 1\.8 s", line), line


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


def test_standard_output_goes_to_a_full_disk(tmp_path):
    """Told in one line, and the ranks end with it."""
    generate = ["generate", "--model", DATA / "yuan-tiny", "--ranks", "2", "--prompt", "Once", "--max-tokens", "8"]
    with (
        open("/dev/full", "w") as full,
        family([sys.executable, "-m", "tpcpu", *generate], tmp_path, stdout=full) as started,
    ):
        line = line_of(started, time.monotonic(), SECONDS)
    assert line.startswith("standard output: No space left on device")


@contextmanager
def control_group(controller: str, v1_settings: dict[str, str], v2_settings: dict[str, str]) -> Iterator[Path]:
    """A control group of either version, below the one of this process."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    first = groups.get(controller)
    if first is not None:
        base, settings = Path("/sys/fs/cgroup") / controller, v1_settings
    else:
        base, settings, first = Path("/sys/fs/cgroup"), v2_settings, groups[""]
    path = base / first.lstrip("/")
    folder = (path if path.exists() else base) / f"tpcpu-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        for name, value in settings.items():
            (folder / name).write_text(value)
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"needs the right to make control groups of {controller} ({error.strerror})")
    try:
        yield folder
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text(), 10, lambda: "the control group is not empty")
        folder.rmdir()


@pytest.fixture
def memory_group() -> Iterator[Path]:
    limit = str(500 << 20)
    with control_group("memory", {"memory.limit_in_bytes": limit}, {"memory.max": limit}) as folder:
        yield folder


@pytest.fixture
def freezer() -> Iterator[Path]:
    with control_group("freezer", {}, {}) as folder:
        yield folder


def test_a_rank_shows_no_life(tmp_path, freezer):
    """Frozen, not stopped: nothing says so, and nothing of it moves."""
    with family(start(tmp_path), tmp_path) as started:
        started.say_until("begun")
        victim, since = process(started, "1"), time.monotonic()
        (freezer / "cgroup.procs").write_text(str(victim))
        state = freezer / "freezer.state"
        (state if state.exists() else freezer / "cgroup.freeze").write_text("FROZEN" if state.exists() else "1")
        try:
            deadline = since + TIMEOUT + 2
            while process_of := [each for each in started.ranks() if each != victim]:
                assert time.monotonic() < deadline, process_of
                time.sleep(0.05)
        finally:
            # version 1 kills what is frozen only when it thaws
            (state if state.exists() else freezer / "cgroup.freeze").write_text("THAWED" if state.exists() else "0")
        line = line_of(started, since, TIMEOUT + 4)
    assert re.fullmatch(rf"rank 1 on {HOST} \(pid {victim}\) shows no life {WHERE}", line), line


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
